"""Intervals for accuracies."""

import math
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """A share of n samples with its 95 % Wilson interval [low, high]; float(accuracy) is the share."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """hits / n."""
        return self.hits / self.n

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return wilson(self.hits, self.n)[0]

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return wilson(self.hits, self.n)[1]

    def to_json(self) -> dict[str, float]:
        """The share, its interval and the counts, ready for json.dumps."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "hits": self.hits,
            "n": self.n,
        }

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of hits out of n. Source: Wilson 1927, JASA 22:209."""
    share = hits / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if hits == 0 else (centre - half) / scale
    high = 1.0 if hits == n else (centre + half) / scale
    return low, high


@dataclass(frozen=True)
class Difference:
    """b less a on the same n samples, of which only_a are hits of a alone and only_b of b alone; float is the value.

    value, low, high: the difference of the shares and its 95 % interval (`tango`); p: of no difference (`mcnemar`).
    """

    a: Accuracy
    b: Accuracy
    only_a: int
    only_b: int

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.a.n

    @property
    def value(self) -> float:
        """b less a, as a share of n."""
        return (self.only_b - self.only_a) / self.n

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return tango(self.only_a, self.only_b, self.n)[0]

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return tango(self.only_a, self.only_b, self.n)[1]

    @property
    def p(self) -> float:
        """The exact two-sided p-value of McNemar's test."""
        return mcnemar(self.only_a, self.only_b)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        digits = 1 if self.n <= 5000 else 2  # so that no interval is printed as [+0.0, +0.0]
        value, low, high = (
            f"{100 * share:+z.{digits}f}" for share in (self.value, self.low, self.high)
        )
        p = self.p
        return f"{value} points [{low}, {high}], " + (f"p = {p:.2g}" if p >= 0.001 else "p < 0.001")


def tango(only_a: int, only_b: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of (only_b - only_a) / n, for n pairs of which only_a and only_b are discordant each way.

    Every difference d that the score test keeps, whose variance is taken at d and not at the data, so that few
    discordant pairs, or none, still give an interval of positive width: with none it is +- z^2 / (n + z^2).
    Source: Tango 1998, Statistics in Medicine 17:891, equations 24 to 26.
    """
    return _tango_low(only_a, only_b, n, z), -_tango_low(only_b, only_a, n, z)


def _tango_low(only_a: int, only_b: int, n: int, z: float) -> float:
    """The least d that the score test keeps, by bisection between -1 and the estimate."""
    gain, discordant = only_b - only_a, only_a + only_b
    low, kept = -1.0, gain / n
    for _ in range(64):
        d = (low + kept) / 2
        # The likeliest share of discordant pairs given d: the larger root of n s^2 - (discordant + gain d) s
        # + gain d - (n - discordant) d^2 = 0, which is equation 25 rewritten for s = 2 q + d, free of cancellation.
        linear = discordant + gain * d
        share = (
            linear + math.sqrt(max(0.0, linear**2 - 4 * n * (gain * d - (n - discordant) * d * d)))
        ) / (2 * n)
        if (gain - n * d) ** 2 <= z * z * n * (share - d * d):
            kept = d
        else:
            low = d
    return kept


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value that discordant pairs fall either way alike; 1 where there are none.

    Twice the binomial tail at 1/2, in whole numbers, at most 1. Source: McNemar 1947, Psychometrika 12:153.
    """
    pairs = only_a + only_b
    tail = term = 1
    for hits in range(1, min(only_a, only_b) + 1):
        term = term * (pairs - hits + 1) // hits
        tail += term
    return min(1.0, 2 * tail / 2**pairs)

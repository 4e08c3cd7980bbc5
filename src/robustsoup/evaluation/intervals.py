"""Confidence intervals and tests for accuracies and their differences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Accuracy:
    """A share of n samples with its 95 % Wilson interval; `float(accuracy)` is the share.

    An estimate by two-phase sampling (`robustsoup.evaluation.two_phase`) has counts of two attacks:
    a brief one on all samples, and the full one on some of the survivors.

    Attributes:
        hits: Number of correct samples; of an estimate, those that survive the brief attack.
        n: Number of samples, at least 1.
        drawn: Survivors that were attacked in full; None unless the share is an estimate.
        missed: How many of these the full attack broke.
    """

    hits: int
    n: int
    drawn: int | None = None
    missed: int = 0

    @property
    def value(self) -> float:
        """The share, hits / n; of an estimate, less the share of misses."""
        return self.hits / self.n * (1 - self.missed / (self.drawn or 1))

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self._interval()[0]

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self._interval()[1]

    def _interval(self) -> tuple[float, float]:
        return wilson(*self.effective_counts)

    @property
    def effective_counts(self) -> tuple[float, float]:
        """The hits and the number of samples of a full attack that would say as much."""
        if self.drawn is None:
            return self.hits, self.n
        n = effective_size(self.hits, self.n, self.drawn, self.missed)
        return self.value * n, n

    def to_json(self) -> dict[str, float]:
        """Return the share, its interval and the counts, ready for json.dumps."""
        counts = {} if self.drawn is None else {"drawn": self.drawn, "missed": self.missed}
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "hits": self.hits,
            "n": self.n,
            **counts,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, float]) -> "Accuracy":
        """Read what `to_json` returned, or a share and n as other programs write them."""
        n = int(content["n"])
        drawn = content.get("drawn")
        return cls(
            int(content.get("hits", round(content["value"] * n))),
            n,
            None if drawn is None else int(drawn),
            int(content.get("missed", 0)),
        )

    def __float__(self) -> float:
        """Return the share."""
        return self.value

    def __str__(self) -> str:
        """Return the share and its interval in percent."""
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def effective_size(survivors: int, n: int, drawn: int, missed: int) -> float:
    """Return how many samples, attacked in full, would give an estimate of the same variance.

    With the survivors' share s and the miss rate m of the brief attack, the variance of the
    estimate s (1 - m) is

        (1 - m)^2 s (1 - s) / n + s^2 m (1 - m) / drawn
        = p (1 - p) / n + s^2 m (1 - m) (1 / drawn - 1 / survivors),  p = s (1 - m).

    The second term is taken at the rate (missed + 1) / (drawn + 2), since no miss in a small part
    does not show that the brief attack misses nothing.

    Args:
        survivors: Survivors of the brief attack.
        n: Number of samples.
        drawn: Survivors that were attacked in full.
        missed: How many of these the full attack broke.
    """
    if drawn == survivors:
        return float(n)
    share, rate = survivors / n, (missed + 1) / (drawn + 2)
    value = share * (1 - missed / max(drawn, 1))
    spread = max(value * (1 - value), 1 / n)
    added = share**2 * rate * (1 - rate) * (1 / max(drawn, 1) - 1 / survivors)
    return max(1.0, spread / (spread / n + added))


def wilson(hits: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a share.

    Args:
        hits: Number of hits, in 0..n; an effective one need not be whole.
        n: Number of samples, at least 1.
        z: Quantile of the standard normal distribution.

    Returns:
        The lower and the upper end.

    Source: Wilson 1927, JASA 22:209.
    """
    share = hits / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if hits == 0 else (centre - half) / scale
    high = 1.0 if hits == n else (centre + half) / scale
    return low, high


@dataclass(frozen=True)
class Difference:
    """The accuracy of b minus that of a on the same n samples; `float(difference)` is its value.

    Attributes:
        a, b: The two accuracies.
        only_a: Number of samples that only a gets right.
        only_b: Number of samples that only b gets right.
        z: Quantile of the interval: 1.96 for one comparison alone, larger where the intervals of
            several comparisons hold at once.
    """

    a: Accuracy
    b: Accuracy
    only_a: int
    only_b: int
    z: float = Z95

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.a.n

    @property
    def value(self) -> float:
        """The difference of the shares."""
        return (self.only_b - self.only_a) / self.n

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval (`tango`)."""
        return tango(self.only_a, self.only_b, self.n, self.z)[0]

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval (`tango`)."""
        return tango(self.only_a, self.only_b, self.n, self.z)[1]

    @property
    def p(self) -> float:
        """The exact two-sided p-value of McNemar's test of no difference, of this pair alone."""
        return mcnemar(self.only_a, self.only_b)

    def to_json(self) -> dict[str, Any]:
        """Return both shares, the counts, the difference, its interval and p, for json.dumps.

        The quantile of the interval is "z", unless it is that of one comparison alone.
        """
        adjusted = {} if self.z == Z95 else {"z": self.z}
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "p": self.p,
            **adjusted,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Difference":
        """Read what `to_json` returned."""
        a, b = Accuracy.from_json(content["a"]), Accuracy.from_json(content["b"])
        z = float(content.get("z", Z95))
        return cls(a, b, content["only_a"], content["only_b"], z)

    def __float__(self) -> float:
        """Return the difference of the shares."""
        return self.value

    def __str__(self) -> str:
        """Return the difference and its interval in points, and the p-value."""
        digits = 1 if self.n <= 5000 else 2  # with 1 digit a narrow interval would print as 0
        value, low, high = (
            f"{100 * share:+z.{digits}f}" for share in (self.value, self.low, self.high)
        )
        p = self.p
        return f"{value} points [{low}, {high}], " + (f"p = {p:.2g}" if p >= 0.001 else "p < 0.001")


def tango(only_a: int, only_b: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return Tango's score interval of a difference of paired shares, (only_b - only_a) / n.

    The interval holds every difference d that the score test does not reject. The test takes the
    variance at d rather than at the data, so the interval has a positive width for few discordant
    pairs and for none: it is then +- z^2 / (n + z^2).

    Args:
        only_a: Number of pairs in which only a is a hit.
        only_b: Number of pairs in which only b is a hit.
        n: Number of pairs.
        z: Quantile of the standard normal distribution.

    Returns:
        The lower and the upper end.

    Source: Tango 1998, Statistics in Medicine 17:891, equations 24 to 26.
    """
    return _tango_lower_end(only_a, only_b, n, z), -_tango_lower_end(only_b, only_a, n, z)


def _tango_lower_end(only_a: int, only_b: int, n: int, z: float) -> float:
    """Return the least d that the test does not reject, by bisection of [-1, estimate]."""
    gain, discordant = only_b - only_a, only_a + only_b
    rejected, accepted = -1.0, gain / n
    for _ in range(64):
        d = (rejected + accepted) / 2
        # Maximum-likelihood share of discordant pairs given d: the larger root of
        # n s^2 - (discordant + gain d) s + gain d - (n - discordant) d^2 = 0. This is equation 25
        # rewritten for s = 2 q + d, which avoids cancellation.
        linear = discordant + gain * d
        root = math.sqrt(max(0.0, linear**2 - 4 * n * (gain * d - (n - discordant) * d * d)))
        share = (linear + root) / (2 * n)
        if (gain - n * d) ** 2 <= z * z * n * (share - d * d):
            accepted = d
        else:
            rejected = d
    return accepted


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    It is twice the tail of the binomial distribution with probability 1/2, computed in integers,
    and at most 1; without discordant pairs it is 1.

    Args:
        only_a: Number of pairs in which only a is a hit.
        only_b: Number of pairs in which only b is a hit.

    Source: McNemar 1947, Psychometrika 12:153.
    """
    pairs = only_a + only_b
    tail = term = 1
    for hits in range(1, min(only_a, only_b) + 1):
        term = term * (pairs - hits + 1) // hits
        tail += term
    return min(1.0, 2 * tail / 2**pairs)


def binomial_tail(hits: int, n: int, probability: float) -> float:
    """Return the probability of at least `hits` hits in n independent draws.

    Args:
        hits: Number of hits, in 0..n.
        n: Number of draws.
        probability: Probability of a hit in one draw.
    """
    if hits <= 0 or probability >= 1:
        return 1.0
    if probability <= 0:
        return 0.0
    if hits <= n * probability:  # the other tail is the smaller one
        return 1.0 - _sum_tail(n - hits + 1, n, 1 - probability)
    return _sum_tail(hits, n, probability)


def _sum_tail(hits: int, n: int, probability: float) -> float:
    """Return the probability of at least `hits` hits, more than are expected."""
    log_term = (
        math.lgamma(n + 1)
        - math.lgamma(hits + 1)
        - math.lgamma(n - hits + 1)
        + hits * math.log(probability)
        + (n - hits) * math.log1p(-probability)
    )
    term, odds = math.exp(log_term), probability / (1 - probability)
    terms = [term]
    for count in range(hits, n):
        term *= (n - count) / (count + 1) * odds
        terms.append(term)
        if term < 1e-20 * terms[0]:
            break
    return min(1.0, math.fsum(terms))

"""Proofs that hold simultaneously for many accuracies on the same samples.

A search looks at many soups. If each were tested on its own, one of them would pass by luck more
often than the level says. `prove_accuracies` controls the probability that any of its statements
is wrong. `fixed_sequence` tests in an order that was fixed without looking at the samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robustsoup.evaluation.intervals import Z95, binomial_tail

Hits = NDArray[np.bool_]
Floats = NDArray[np.float64]

ERROR_RATE = 0.05
"""Greatest probability of a wrong statement."""
DRAWS = 10_000
"""Draws of the multiplier bootstrap."""
LEAST_EXPECTED = 20
"""Expected hits and misses at a threshold, below which the normal approximation is not used."""
POWER = 0.8
"""Probability of success that numbers of samples are computed for."""
Z_ERROR = NormalDist().inv_cdf(1 - ERROR_RATE)
Z_POWER = NormalDist().inv_cdf(POWER)

_MOST_NORMALS = 4_000_000
_JITTER = 1e-9
_CONSTANT = 1e-9


@dataclass(frozen=True)
class Proof:
    """Which accuracies were shown to reach their thresholds, and lower bounds.

    Attributes:
        met: (k,) whether the accuracy was shown to be at least its threshold.
        low: (k,) lower bounds; where `met`, at least the threshold.
        method: "max-t" or "exact".
        critical: Quantile in the place of 1.645: that of max-t, or Bonferroni's for "exact", whose
            tests use none.
    """

    met: NDArray[np.bool_]
    low: Floats
    method: Literal["max-t", "exact"]
    critical: float


def prove_accuracies(
    hits: Hits, thresholds: Sequence[float] | Floats, *, seed: int = 0, draws: int = DRAWS
) -> Proof:
    """Show which of k accuracies on the same n samples are at least their thresholds.

    With probability 1 - `ERROR_RATE` all accuracies in `met` are at least their thresholds
    (step-down), and with the same probability all single-step bounds hold; `low` is the single-step
    bound, or the threshold where only stepping down proves it.

    The method is max-t: a multiplier bootstrap of the samples, which knows how the accuracies are
    correlated, gives the quantile of Wilson's one-sided bound with continuity correction. If
    fewer than 20 hits or misses are expected at any threshold, all are tested by exact binomial
    tests with Holm's correction, and bounds are Clopper and Pearson's with Bonferroni's.

    Args:
        hits: (n, k) whether each sample is a hit.
        thresholds: (k,) thresholds, in [0, 1].
        seed: Seed of the bootstrap.
        draws: Draws of the bootstrap.

    Source: Romano and Wolf 2005, JASA 100:94; Chernozhukov, Chetverikov and Kato 2013, Annals of
    Statistics 41:2786 (multiplier bootstrap); Wilson 1927, JASA 22:209; Holm 1979, Scandinavian
    Journal of Statistics 6:65.
    """
    n, k = hits.shape
    wanted = np.asarray(thresholds, dtype=np.float64)
    counts = hits.sum(0)
    expected = n * np.minimum(wanted, 1 - wanted)
    if expected.min(initial=np.inf, where=wanted > 0) < LEAST_EXPECTED:
        return _prove_exactly(counts, n, wanted)
    root = correlation_root(hits)

    def quantile(columns: NDArray[np.intp]) -> float:
        return max_quantile(root[columns], seed=seed, draws=draws)

    critical = quantile(np.arange(k))
    low = wilson_lower(counts, n, critical)
    met = (low >= wanted) | (wanted <= 0)
    met = step_down(met, lambda rest: wilson_lower(counts, n, quantile(rest)) >= wanted)
    return Proof(met, np.where(met, np.maximum(low, wanted), low), "max-t", critical)


def step_down(
    met: NDArray[np.bool_], test: Callable[[NDArray[np.intp]], NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """Test again what was not shown, as if it were all, until nothing more is shown.

    Args:
        met: (k,) what the first step showed.
        test: Returns (k,) results with the critical value of the given columns alone.
    """
    while met.any() and not met.all():
        more = met | test(np.flatnonzero(~met))
        if (more == met).all():
            break
        met = more
    return met


def correlation_root(values: NDArray[np.bool_] | Floats) -> Floats:
    """Return L with L L' = the correlation matrix of the columns of (n, k) values.

    Rows of constant columns are 0. The root exists for dependent columns, too, because 1e-9 is
    added to the diagonal.
    """
    deviations = np.asarray(values, dtype=np.float64)
    deviations = deviations - deviations.mean(0)
    moments = deviations.T @ deviations
    scale = np.sqrt(moments.diagonal())
    varying = scale > 0
    scale = np.where(varying, scale, 1.0)
    correlation = moments / scale / scale[:, None]
    root = np.linalg.cholesky(correlation + _JITTER * np.eye(len(scale)) + np.diag(~varying * 1.0))
    return np.where(varying[:, None], root, 0.0)


def max_quantile(
    root: Floats, *, seed: int = 0, draws: int = DRAWS, two_sided: bool = False
) -> float:
    """Return the 1 - `ERROR_RATE` quantile of the maximum of correlated normal variables.

    Args:
        root: (m, k) rows of `correlation_root`, one for each of m variables.
        seed: Seed of the draws.
        draws: Number of draws.
        two_sided: Take the maximum of absolute values.

    Returns:
        The quantile, at least that of one variable.
    """
    maxima = np.sort(_draw_maxima(root, seed, draws, two_sided=two_sided))
    alone = NormalDist().inv_cdf(1 - (ERROR_RATE / 2 if two_sided else ERROR_RATE))
    return max(float(maxima[math.ceil((1 - ERROR_RATE) * draws) - 1]), alone)


def _draw_maxima(root: Floats, seed: int, draws: int, *, two_sided: bool) -> Floats:
    def maxima(normals: Floats) -> Floats:
        values = normals @ root.T
        return np.maximum(values.max(1), -values.min(1)) if two_sided else values.max(1)

    rows = max(1, _MOST_NORMALS // max(root.shape))
    if draws <= rows:
        return maxima(_draw_normals(seed, draws, root.shape[1]))
    generator = np.random.Generator(np.random.PCG64(seed))
    counts = [min(rows, draws - start) for start in range(0, draws, rows)]
    return np.concatenate([maxima(generator.standard_normal((c, root.shape[1]))) for c in counts])


@lru_cache(maxsize=1)
def _draw_normals(seed: int, draws: int, k: int) -> Floats:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((draws, k))


def wilson_lower(counts: NDArray[np.int64] | Floats, n: float, z: float) -> Floats:
    """Return Wilson's lower bounds of shares with continuity correction.

    Args:
        counts: (k,) hits, in 0..n.
        n: Number of samples; those of an estimate may be no integers.
        z: Quantile of the one-sided bound.

    Returns:
        (k,) bounds: the least share that is not rejected by the observed share less 1 / (2 n).
    """
    share = np.maximum(np.asarray(counts) - 0.5, 0) / n
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = (share + z * z / (2 * n) - half) / (1 + z * z / n)
    return np.where(np.asarray(counts) == 0, 0.0, low)


def _prove_exactly(counts: NDArray[np.int64], n: int, thresholds: Floats) -> Proof:
    """Test by the binomial distribution, with Holm's correction."""
    tails = np.array(
        [binomial_tail(int(h), n, float(t)) for h, t in zip(counts, thresholds, strict=True)]
    )
    met = np.zeros(len(tails), dtype=bool)
    for tested, column in enumerate(np.argsort(tails, kind="stable")):
        if tails[column] > ERROR_RATE / (len(tails) - tested):
            break
        met[column] = True
    met |= thresholds <= 0
    bound = lru_cache(maxsize=None)(clopper_pearson_lower)
    low = np.array([bound(int(h), n, ERROR_RATE / len(tails)) for h in counts])
    critical = NormalDist().inv_cdf(1 - ERROR_RATE / len(tails))
    return Proof(met, np.where(met, np.maximum(low, thresholds), low), "exact", critical)


def clopper_pearson_lower(hits: int, n: int, error_rate: float = ERROR_RATE) -> float:
    """Return the exact one-sided lower bound of a share.

    Args:
        hits: Number of hits, in 0..n.
        n: Number of samples.
        error_rate: Probability that the bound exceeds the share.

    Source: Clopper and Pearson 1934, Biometrika 26:404.
    """
    if hits == 0:
        return 0.0
    low, high = 0.0, hits / n
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_tail(hits, n, middle) > error_rate:
            high = middle
        else:
            low = middle
    return low


def fixed_sequence(hits: Sequence[Sequence[int]], n: int, thresholds: Sequence[float]) -> int:
    """Test candidates in a fixed order by exact binomial tests, and stop at the first failure.

    Each test has the whole `ERROR_RATE`: an error needs the first candidate that truly misses a
    threshold to pass. A candidate passes if each of its accuracies passes.

    Args:
        hits: (k, r) hits of each candidate for each threshold, in an order that was fixed without
            these samples.
        n: Number of samples.
        thresholds: (r,) thresholds, in [0, 1].

    Returns:
        How many candidates pass, counted from the first.
    """
    needed = [fewest_hits(n, threshold) for threshold in thresholds]
    passed = 0
    for counts in hits:
        if any(count < least for count, least in zip(counts, needed, strict=True)):
            break
        passed += 1
    return passed


@lru_cache(maxsize=4096)
def fewest_hits(n: int, threshold: float) -> int:
    """Return the fewest hits of n that show an accuracy of at least `threshold`, alone and exactly.

    Returns:
        The number; n + 1 if n hits do not.
    """
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        if middle <= n and binomial_tail(middle, n, threshold) > ERROR_RATE:
            low = middle + 1
        else:
            high = middle
    return low


def samples_that_can_show(threshold: float, statements: int = 1) -> int | None:
    """Return the fewest samples that could show an accuracy of at least `threshold`.

    So many samples show it if all are hits, by the methods of `prove_accuracies`.

    Args:
        threshold: The threshold, in [0, 1].
        statements: Number of statements that are tested together.

    Returns:
        The number; None for a threshold of 1, which no number of samples can show.
    """
    if threshold >= 1:
        return None
    if threshold <= 0:
        return 1
    exact = max(1, math.ceil(math.log(ERROR_RATE / statements) / math.log(threshold) - 1e-9))
    normal = math.ceil(LEAST_EXPECTED / min(threshold, 1 - threshold) - 1e-9)
    return min(exact, normal)


def difference_quantile(
    first: Floats, second: Floats, *, seed: int = 0, draws: int = DRAWS
) -> float:
    """Return the quantile with which all paired differences have intervals that hold at once.

    In the place of 1.96 of a single two-sided interval, it makes the intervals of all k m
    differences, each column of `first` less each of `second` on the same n samples, hold together
    with a probability of 1 - `ERROR_RATE`. Differences that are the same for all samples do not
    count.

    Args:
        first: (n, k) scores of each sample, such as hits.
        second: (n, m) scores of the same samples.
        seed: Seed of the bootstrap.
        draws: Draws of the bootstrap.

    Source: as `prove_accuracies`.
    """
    values = np.concatenate([first, second], axis=1).astype(np.float64)
    root = correlation_root(values) * values.std(0)[:, None]  # a root of the covariance
    pairs = (root[: first.shape[1], None] - root[None, first.shape[1] :]).reshape(-1, len(root))
    size = np.sqrt((pairs**2).sum(1, keepdims=True))
    varying = _vary(first, second)
    pairs = np.where(varying[:, None], pairs / np.where(size > 0, size, 1), 0.0)
    return max_quantile(pairs, seed=seed, draws=draws, two_sided=True)


def bonferroni_quantile(statements: int) -> float:
    """Return the two-sided quantile with which any so many intervals hold at once."""
    return NormalDist().inv_cdf(1 - ERROR_RATE / (2 * max(statements, 1)))


def _vary(first: Floats, second: Floats) -> NDArray[np.bool_]:
    """Return (k m,) whether the difference of two columns is not the same for all samples."""
    columns = [
        (first - second[:, [column]]).std(0) > _CONSTANT for column in range(second.shape[1])
    ]
    return np.stack(columns, axis=1).ravel()


def samples_to_prove(share: float, threshold: float, critical: float = Z_ERROR) -> int | None:
    """Return how many samples show a true accuracy above a threshold, with a power of 80 %.

    Args:
        share: The accuracy, in [0, 1]; an estimate stands in for it.
        threshold: The threshold, in [0, 1].
        critical: Quantile that the test uses.

    Returns:
        The number; None if the accuracy is not above the threshold.
    """
    if share <= threshold:
        return None
    at_threshold, at_share = threshold * (1 - threshold), share * (1 - share)
    root = critical * math.sqrt(at_threshold) + Z_POWER * math.sqrt(at_share)
    margin = share - threshold
    corrected = (root / margin) ** 2 + 1 / margin  # the second term: continuity correction
    return max(math.ceil(corrected), samples_that_can_show(threshold) or 1)


def samples_to_separate(differences: Floats) -> int | None:
    """Return how many samples tell two candidates apart, with a power of 80 %.

    The test is two-sided at 5 %, paired; the differences stand in for the true distribution.

    Args:
        differences: (n,) difference of the two for each sample.

    Returns:
        The number; None if the mean difference is 0.
    """
    mean, deviation = float(differences.mean()), float(differences.std())
    if abs(mean) < 1e-12:
        return None
    return max(2, math.ceil(((Z95 + Z_POWER) * deviation / mean) ** 2))

"""Wilson's and Tango's intervals and McNemar's test, against published values and definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.evaluation.intervals import Z95, Accuracy, Difference, mcnemar, tango, wilson

few_examples = settings(max_examples=60, deadline=None)
Z90 = 1.6448536269514722


def tables(largest=300):
    """Draw (only_a, only_b, n) with only_a + only_b <= n and n >= 1."""
    counts = st.tuples(*[st.integers(0, largest)] * 3)
    return counts.filter(any).map(lambda c: (c[0], c[1], sum(c)))


# Wilson's interval of a share


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857
        (8500, 10_000, 0.8429, 0.8569),
    ],
)
def test_known_intervals_of_a_share(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)
    accuracy = Accuracy(hits, n)
    assert (accuracy.low, accuracy.high) == wilson(hits, n)
    assert float(accuracy) == accuracy.value == hits / n


@few_examples
@given(n=st.integers(1, 10_000), share=st.floats(0, 1))
def test_an_interval_solves_its_equation_and_holds_the_estimate(n, share):
    """Each end p lies z standard errors (computed at p) from the estimate."""
    hits = round(share * n)
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            distance = Z95 * (p * (1 - p) / n) ** 0.5
            assert abs(hits / n - p) == pytest.approx(distance, rel=1e-6, abs=1e-9)
    mirrored = wilson(n - hits, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


# Tango's interval of a paired difference


@pytest.mark.parametrize(
    ("only_a", "only_b", "n", "z", "low", "high", "digits"),
    [
        # Tango 1998, section 6.1: lenses disinfected in two ways
        (1, 0, 44, Z90, -0.096, None, 3),
        # Fagerland et al. 2014, Statistics in Medicine 33:2850: Bentur
        (7, 1, 21, Z95, -0.517, -0.026, 3),
        # the same authors' contingencytables for R: Cavo
        (16, 6, 161, Z95, -0.1240, -0.0054, 4),
        # PropCIs::scoreci.mp for R
        (60, 20, 1000, Z95, -0.0584, -0.0231, 4),
        (25, 28, 618, Z90, -0.0148, 0.0247, 4),
    ],
)
def test_published_intervals_of_a_difference(only_a, only_b, n, z, low, high, digits):
    interval = tango(only_a, only_b, n, z)
    assert round(interval[0], digits) == low
    assert high is None or round(interval[1], digits) == high


def score_statistic(only_a, only_b, n, d):
    """Return the score statistic of the difference d; the nuisance share is found by search."""

    def log_likelihood(q):
        """Log-likelihood of the shares q (only a hits), q + d (only b), 1 - 2 q - d (rest)."""
        shares = ((only_a, q), (only_b, q + d), (n - only_a - only_b, 1 - 2 * q - d))
        return sum(
            count * math.log(share) if share > 0 else -math.inf for count, share in shares if count
        )

    low, high = max(0.0, -d), (1 - d) / 2
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if log_likelihood(left) > log_likelihood(right):
            high = right
        else:
            low = left
    return (only_b - only_a - n * d) / math.sqrt(n * (low + high + d - d * d))


@pytest.mark.parametrize(
    ("only_a", "only_b", "n"),
    [(3, 9, 40), (0, 4, 25), (4, 0, 25), (1, 1, 10), (20, 19, 40), (150, 210, 10_000)],
)
def test_an_interval_holds_exactly_what_the_score_test_accepts(only_a, only_b, n):
    low, high = tango(only_a, only_b, n)
    assert score_statistic(only_a, only_b, n, low) == pytest.approx(Z95, abs=1e-4)
    assert score_statistic(only_a, only_b, n, high) == pytest.approx(-Z95, abs=1e-4)
    for d in np.linspace(-0.999, 0.999, 101):
        assert (abs(score_statistic(only_a, only_b, n, d)) < Z95) == (low < d < high), d


@few_examples
@given(tables())
def test_an_interval_holds_the_estimate_and_has_a_width(table):
    only_a, only_b, n = table
    low, high = tango(only_a, only_b, n)
    assert -1 <= low <= (only_b - only_a) / n <= high <= 1
    assert high - low > 1 / (n + 4)
    assert tango(only_b, only_a, n) == (-high, -low)


@pytest.mark.parametrize("n", [1, 10, 1000, 10_000])
def test_without_discordant_pairs_the_ends_are_those_of_none_out_of_n(n):
    end = wilson(0, n)[1]
    assert tango(0, 0, n) == pytest.approx((-end, end), abs=1e-15)


def test_the_interval_covers_as_it_should_by_enumeration():
    """All tables of n = 60 with their probabilities: score intervals cover 95 % on average."""
    n, coverage = 60, []
    counts = [(x, y) for x in range(n + 1) for y in range(n + 1 - x)]
    x, y = np.array(counts).T
    low, high = np.array([tango(a, b, n) for a, b in counts]).T
    log_factorial = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    log_ways = log_factorial[n] - log_factorial[x] - log_factorial[y] - log_factorial[n - x - y]
    for p in (0.02, 0.05, 0.1, 0.2, 0.3):
        for q in (0.02, 0.05, 0.1, 0.2, 0.3):
            rest = (n - x - y) * np.log(1 - p - q)
            probability = np.exp(log_ways + x * np.log(p) + y * np.log(q) + rest)
            assert probability.sum() == pytest.approx(1)
            coverage.append(probability[(low <= q - p) & (q - p <= high)].sum())
    assert min(coverage) > 0.93
    assert max(coverage) < 0.995
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("only_a", "only_b"), [(400, 300), (90, 130), (2000, 2050)])
def test_with_many_samples_the_interval_is_that_of_the_bootstrap(only_a, only_b):
    n = 10_000
    shares = [only_a / n, only_b / n, 1 - (only_a + only_b) / n]
    draws = np.random.default_rng(0).multinomial(n, shares, size=200_000)
    expected = np.quantile((draws[:, 1] - draws[:, 0]) / n, [0.025, 0.975])
    low, high = tango(only_a, only_b, n)
    assert (low, high) == pytest.approx(expected, abs=0.03 * (high - low))


# McNemar's test


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (0, 10, 2 / 1024),
        (7, 1, 0.0703125),
        # Fagerland et al., contingencytables for R: Cavo, the exact conditional test
        (6, 16, 0.052479),
        (10, 50_000, 0.0),
    ],
)
def test_known_p_values(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == pytest.approx(p, abs=5e-7)


@few_examples
@given(st.integers(0, 400), st.integers(0, 400))
def test_p_is_the_probability_of_a_split_at_least_as_uneven(only_a, only_b):
    pairs = only_a + only_b
    uneven = [k for k in range(pairs + 1) if abs(2 * k - pairs) >= abs(only_b - only_a)]
    ways = sum(math.comb(pairs, k) for k in uneven)
    assert mcnemar(only_a, only_b) == float(Fraction(ways, 2**pairs))


@pytest.mark.parametrize("pairs", [1, 5, 6, 20, 101])
def test_equal_networks_are_rejected_at_most_as_often_as_p_says(pairs):
    for level in (0.01, 0.05, 0.2):
        rejected = [k for k in range(pairs + 1) if mcnemar(k, pairs - k) <= level]
        assert sum(math.comb(pairs, k) for k in rejected) / 2**pairs <= level


# differences as text


@pytest.mark.parametrize(
    ("only_a", "only_b", "n", "text"),
    [
        (12, 24, 1000, "+1.2 points [+0.0, +2.5], p = 0.065"),
        (24, 12, 1000, "-1.2 points [-2.5, +0.0], p = 0.065"),
        (10, 40, 1000, "+3.0 points [+1.7, +4.5], p < 0.001"),
        (0, 0, 1000, "+0.0 points [-0.4, +0.4], p = 1"),
        (0, 0, 5000, "+0.0 points [-0.1, +0.1], p = 1"),
        (20, 29, 10_000, "+0.09 points [-0.05, +0.24], p = 0.25"),
        (0, 0, 10_000, "+0.00 points [-0.04, +0.04], p = 1"),
    ],
)
def test_a_difference_as_text(only_a, only_b, n, text):
    a, b = Accuracy(n // 2 + only_a, n), Accuracy(n // 2 + only_b, n)
    difference = Difference(a, b, only_a, only_b)
    assert str(difference) == text
    assert float(difference) == difference.value == (only_b - only_a) / n

"""Bounds that hold simultaneously: against exact probabilities, and in simulated searches."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.evaluation.intervals import binomial_tail, wilson
from robustsoup.evaluation.simultaneous import (
    Z_ERROR,
    clopper_pearson_lower,
    correlation_root,
    difference_quantile,
    fewest_hits,
    fixed_sequence,
    max_quantile,
    prove_accuracies,
    samples_that_can_show,
    samples_to_prove,
    samples_to_separate,
    wilson_lower,
)

few = settings(max_examples=50, deadline=None)
COUNTS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def sum_exactly(hits, n, probability):
    """Return the upper tail of the binomial distribution, term by term."""
    counts = range(hits, n + 1)
    return math.fsum(
        math.comb(n, k) * probability**k * (1 - probability) ** (n - k) for k in counts
    )


def hit_matrix(shares, n, seed, *, shared=0.0):
    """Return (n, k) hits of k accuracies; `shared` is the correlation of their normal scores."""
    generator = np.random.default_rng(seed)
    common = generator.standard_normal((n, 1))
    own = generator.standard_normal((n, len(shares)))
    scores = math.sqrt(shared) * common + math.sqrt(1 - shared) * own
    ranks = scores.argsort(0).argsort(0)
    return ranks < np.round(np.asarray(shares) * n)


# exact bounds


@few
@given(COUNTS, st.floats(0.01, 0.99))
def test_the_tail_is_the_sum_of_its_terms(counts, probability):
    assert binomial_tail(*counts, probability) == pytest.approx(
        sum_exactly(*counts, probability), rel=1e-9, abs=1e-12
    )


def test_the_tail_is_finite_for_many_samples():
    assert binomial_tail(20_000, 40_000, 0.5) == pytest.approx(0.502, abs=1e-3)
    assert binomial_tail(40_000, 40_000, 0.5) == 0.0
    assert binomial_tail(1, 40_000, 0.5) == 1.0
    assert binomial_tail(0, 5, 0.0) == binomial_tail(3, 5, 1.0) == 1.0
    assert binomial_tail(1, 5, 0.0) == 0.0


@few
@given(COUNTS, st.sampled_from([0.05, 0.01, 0.05 / 21]))
def test_an_exact_bound_is_where_the_tail_equals_the_error_rate(counts, error_rate):
    hits, n = counts
    low = clopper_pearson_lower(hits, n, error_rate)
    assert 0 <= low <= hits / n
    if hits:
        assert binomial_tail(hits, n, low) == pytest.approx(error_rate, rel=1e-6)


def test_exact_bounds_of_the_literature():
    """The rule of three, and all of n hits, have closed forms."""
    assert clopper_pearson_lower(40, 40) == pytest.approx(0.05 ** (1 / 40))
    assert clopper_pearson_lower(1, 50) == pytest.approx(1 - 0.95 ** (1 / 50))
    assert clopper_pearson_lower(0, 50) == 0.0


@few
@given(st.integers(1, 400), st.floats(0.01, 0.99))
def test_the_fewest_hits_show_the_threshold_and_one_less_does_not(n, threshold):
    least = fewest_hits(n, threshold)
    if least <= n:
        assert binomial_tail(least, n, threshold) <= 0.05
    assert binomial_tail(least - 1, n, threshold) > 0.05
    assert (least <= n) == (threshold**n <= 0.05)


def test_a_fixed_sequence_stops_at_the_first_failure():
    least = fewest_hits(100, 0.5)
    assert fixed_sequence([[least], [least - 1], [100]], 100, [0.5]) == 1
    assert fixed_sequence([[least, 100], [least, least], [least, 40]], 100, [0.5, 0.5]) == 2
    assert fixed_sequence([[0]], 100, [0.5]) == 0
    assert fixed_sequence([[], []], 100, []) == 2


# Wilson and max-t


@few
@given(COUNTS)
def test_the_corrected_bound_is_wilsons_with_half_a_hit_less(counts):
    hits, n = counts
    low = float(wilson_lower(np.array([hits]), n, 1.645)[0])
    assert low == 0.0 if hits == 0 else low <= wilson(hits, n, 1.645)[0]
    if hits:
        share = (hits - 0.5) / n
        assert (share - low) / math.sqrt(low * (1 - low) / n) == pytest.approx(1.645)


def test_the_quantile_of_one_variable_and_of_copies_is_that_of_one():
    hits = hit_matrix([0.5], 500, 0)
    assert max_quantile(correlation_root(hits)) == pytest.approx(Z_ERROR, abs=0.05)
    copies = np.repeat(hits, 30, axis=1)
    assert max_quantile(correlation_root(copies)) == pytest.approx(Z_ERROR, abs=0.05)


def test_the_quantile_of_independent_variables_is_that_of_their_maximum():
    root = np.eye(21)
    exact = 2.8  # P(max of 21 < 2.81) = 0.95
    assert max_quantile(root) == pytest.approx(exact, abs=0.06)
    assert max_quantile(root, seed=1) != max_quantile(root, seed=2)
    assert max_quantile(root, seed=1) == max_quantile(root, seed=1)


@few
@given(st.integers(2, 12), st.floats(0, 0.95), st.integers(0, 99))
def test_the_root_gives_the_correlation_also_of_dependent_and_constant_columns(k, shared, seed):
    hits = hit_matrix(np.linspace(0.2, 0.9, k), 200, seed, shared=shared)
    hits = np.concatenate([hits, hits[:, :1], np.ones((200, 1), bool)], axis=1)
    root = correlation_root(hits)
    expected = np.corrcoef(hits[:, :-1].T)
    assert (root @ root.T)[:-1, :-1] == pytest.approx(expected, abs=1e-6)
    assert not root[-1].any()


def test_correlated_accuracies_have_higher_bounds():
    shares = [0.8] * 15
    far, near = (prove_accuracies(hit_matrix(shares, 1000, 1, shared=r), shares) for r in (0, 0.95))
    assert Z_ERROR < near.critical < far.critical < 3.1
    assert (near.low > far.low).all()
    assert (near.method, far.method) == ("max-t", "max-t")


def test_stepping_down_shows_more_and_never_less():
    shares = [0.95] * 12 + [0.8265]
    hits = hit_matrix(shares, 1000, 0)
    thresholds = [0.8] * 13
    proof = prove_accuracies(hits, thresholds)
    single = wilson_lower(hits.sum(0), 1000, proof.critical)
    assert proof.met.all()
    assert single[-1] < 0.8
    assert proof.low[-1] == 0.8
    assert (proof.low[:-1] == single[:-1]).all()


def test_small_counts_are_tested_exactly_with_holms_correction():
    hits = np.zeros((60, 3), dtype=bool)
    hits[:, 0] = True
    hits[:59, 1] = True
    hits[:50, 2] = True
    proof = prove_accuracies(hits, [0.9] * 3)  # 6 misses are expected
    assert proof.method == "exact"
    tails = [binomial_tail(h, 60, 0.9) for h in (60, 59, 50)]
    assert tails[0] < 0.05 / 3
    assert tails[1] < 0.05 / 2
    assert proof.met.tolist() == [True, True, False]
    assert proof.low[0] == clopper_pearson_lower(60, 60, 0.05 / 3)
    assert prove_accuracies(hits[:, 1:], [0.9] * 2).met.tolist() == [tails[1] < 0.025, False]


def test_a_threshold_of_0_is_always_met():
    hits = np.zeros((30, 2), dtype=bool)
    assert prove_accuracies(hits, [0.0, 0.0]).met.tolist() == [True, True]
    assert prove_accuracies(hits, [0.0, 0.5]).met.tolist() == [True, False]


@few
@given(st.integers(0, 1000), st.sampled_from([(400, 0.6), (60, 0.9)]))
def test_what_is_met_has_a_bound_of_at_least_the_threshold(seed, case):
    n, threshold = case
    shares = np.random.default_rng(seed).uniform(threshold - 0.05, 1, 6)
    hits = hit_matrix(shares, n, seed, shared=0.5)
    proof = prove_accuracies(hits, [threshold] * 6, seed=seed, draws=500)
    assert (proof.met == (proof.low >= threshold)).all()
    assert (proof.low <= np.maximum(hits.mean(0), threshold)).all()
    order = np.random.default_rng(seed).permutation(6)
    again = prove_accuracies(hits[:, order], [threshold] * 6, seed=seed, draws=500)
    if proof.method == "exact":
        assert (again.met == proof.met[order]).all()


# paired gains


def test_the_quantile_of_differences_grows_with_their_number():
    hits = np.random.default_rng(0).random((500, 12)) < 0.5
    scores = hits.astype(float)
    alone = difference_quantile(scores[:, :1], scores[:, 11:])
    assert alone == pytest.approx(1.96, abs=0.05)
    many = difference_quantile(scores[:, :11], scores[:, 11:])
    assert alone + 0.3 < many < NormalDist().inv_cdf(1 - 0.025 / 11) + 0.05  # at most Bonferroni's
    assert difference_quantile(0.3 * scores[:, :11], 0.3 * scores[:, 11:]) == pytest.approx(many)


def test_equal_columns_are_no_comparison():
    hits = np.random.default_rng(0).random((500, 3)).round()
    alone = difference_quantile(hits[:, :1], hits[:, 1:2])  # for two, 2.24
    assert difference_quantile(hits[:, :2], hits[:, 1:2]) == pytest.approx(alone, abs=0.05)
    shifted = np.concatenate([hits[:, :1], hits[:, 1:2] + 0.3], axis=1)
    assert difference_quantile(shifted, hits[:, 1:2]) == pytest.approx(alone, abs=0.05)
    assert difference_quantile(hits[:, :1], hits[:, :1]) == pytest.approx(1.96, abs=1e-3)


# numbers of samples


def test_so_many_samples_can_show_a_threshold():
    assert samples_that_can_show(0.95) == 59  # 0.95^59 = 0.0485
    assert samples_that_can_show(0.95, statements=20) == 117
    assert samples_that_can_show(1.0) is None
    assert samples_that_can_show(0.0) == 1
    for n in (58, 59):
        hits = np.ones((n, 1), dtype=bool)
        assert prove_accuracies(hits, [0.95]).met.tolist() == [n == 59]


def test_numbers_of_samples_have_the_power_that_they_promise():
    """By simulation: with so many samples, four in five tests succeed."""
    generator = np.random.default_rng(0)
    n = samples_to_prove(0.88, 0.85)
    successes = generator.binomial(n, 0.88, 4000) >= fewest_hits(n, 0.85)
    assert 0.77 < successes.mean() < 0.84
    assert samples_to_prove(0.88, 0.85, critical=2.5) > n
    assert samples_to_prove(0.85, 0.85) is None

    differences = np.repeat([1.0, -1.0, 0.0], [40, 20, 940])
    n = samples_to_separate(differences)
    drawn = generator.multinomial(n, [0.04, 0.02, 0.94], 4000)
    statistic = (drawn[:, 0] - drawn[:, 1]) / np.sqrt(drawn[:, 0] + drawn[:, 1])
    assert 0.77 < (statistic > 1.96).mean() < 0.84
    assert samples_to_separate(np.zeros(9)) is None

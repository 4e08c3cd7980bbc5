"""Two-phase sampling: unbiased estimates, intervals that cover, evidence that keeps its level."""

import math

import numpy as np
import pytest
import torch

from robustsoup.evaluation.intervals import Accuracy, wilson
from robustsoup.evaluation.two_phase import (
    attacked_rows,
    estimate_accuracy,
    miss_evidence,
    sample_order,
    subset_rows,
)


def draw_estimates(rng, n, share, rate, size, draws):
    """Draw the counts of two-phase samples of a population."""
    survivors = rng.binomial(n, share, draws)
    drawn = rng.hypergeometric(survivors, n - survivors, size)
    missed = rng.binomial(drawn, rate)
    counts = np.stack([survivors, drawn, missed], axis=1).tolist()
    return [Accuracy(survived, n, tried, broken) for survived, tried, broken in counts]


@pytest.mark.parametrize("n", [300, 2000])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("part", [16, 4])
def test_the_estimate_is_unbiased_and_its_interval_covers(n, share, rate, part):
    """2,000 draws; coverage at least 95 % less two standard errors of the simulation and a half."""
    rng, draws = np.random.default_rng([n, int(100 * share), int(100 * rate), part]), 2000
    truth = share * (1 - rate)
    estimates = draw_estimates(rng, n, share, rate, max(32, n // part), draws)
    values = np.array([e.value for e in estimates])
    assert abs(values.mean() - truth) <= 4 * values.std() / math.sqrt(draws)
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert covered >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / draws) - 0.005


def test_a_part_of_all_survivors_is_the_full_evaluation():
    whole = Accuracy(120, 200, 120, 20)
    assert whole.value == pytest.approx(0.5)
    assert (whole.low, whole.high) == pytest.approx(wilson(100, 200))


def test_a_smaller_part_has_a_wider_interval():
    widths = [a.high - a.low for a in (Accuracy(500, 1000, d, d // 20) for d in (40, 200, 500))]
    assert widths == sorted(widths, reverse=True)
    assert all(0 <= a.low <= a.value <= a.high <= 1 for a in (Accuracy(5, 9, 0, 0),))


@pytest.mark.parametrize("counts", [(0, 50, 0, 0), (50, 50, 3, 0), (3, 50, 3, 3), (9, 50, 4, 4)])
def test_intervals_of_extreme_counts_are_intervals(counts):
    accuracy = Accuracy(*counts)
    assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1
    assert accuracy.high > accuracy.low


@pytest.mark.parametrize(("survivors", "misses"), [(400, 4), (400, 20), (1000, 100)])
def test_evidence_keeps_its_level_under_repeated_looks(survivors, misses):
    """2,000 draws of a population with exactly the allowed misses, looked at ten times."""
    rng, draws = np.random.default_rng([survivors, misses]), 2000
    population = np.arange(survivors) < misses
    looks = np.linspace(20, survivors, 10).astype(int)
    highest = []
    for _ in range(draws):
        counts = np.cumsum(rng.permutation(population))
        evidence = [miss_evidence(int(counts[t - 1]), int(t), survivors, misses) for t in looks]
        highest.append(max(evidence))
    for level in (0.05, 0.005):
        error = 2 * math.sqrt(level * (1 - level) / draws)
        assert np.mean(np.array(highest) >= 1 / level) <= level + error


def test_evidence_is_the_least_over_all_allowed_numbers():
    def at(allowed):
        return miss_evidence(9, 60, 300, allowed)

    values = [at(allowed) for allowed in range(9, 100)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 20
    assert at(8) == math.inf
    assert miss_evidence(0, 0, 300, 5) == 1
    assert miss_evidence(2, 300, 300, 5) <= 1


def test_the_order_depends_on_ids_and_seed_alone():
    ids = torch.arange(100, 200)
    order = sample_order(ids, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    backwards = ids.flip(0)
    assert torch.equal(ids[order], backwards[sample_order(backwards, seed=0)])
    assert not torch.equal(order, sample_order(ids, seed=1))
    small, large = (subset_rows(ids, size, seed=0) for size in (10, 30))
    assert int(small.sum()) == 10
    assert bool((small <= large).all())
    assert bool(attacked_rows(ids, {}).all())


def test_an_estimate_counts_what_the_full_attack_broke():
    hits = torch.tensor([True, False, True, True, False])
    attacked = torch.tensor([True, True, False, False, False])
    assert estimate_accuracy(hits, attacked, 1) == Accuracy(4, 5, 2, 1)

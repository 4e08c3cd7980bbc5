"""Racing: who leaves when, and how seldom the best one does."""

import numpy as np
import pytest
import torch

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.two_phase import estimate_accuracy
from robustsoup.soups.racing import Race, round_ends


@pytest.mark.parametrize(
    ("n", "ends"),
    [
        (1, (1,)),
        (297, (297,)),
        (1023, (1023,)),
        (1024, (64, 512, 1024)),
        (5000, (313, 512, *range(1024, 5000, 512), 5000)),
        (10000, (512, *range(1024, 10000, 512), 10000)),
    ],
)
def test_rounds_end_at_multiples_of_512(n, ends):
    assert round_ends(n) == ends


def soups(rng, shares, n, missed=0.05):
    """Return correlated verdicts of a brief and of a full attack with given shares of hits."""
    level = rng.random(n)
    runners = {}
    for number, share in enumerate(shares):
        short = level + rng.normal(0, 0.05, n) < share + missed
        gone = rng.random(n) < missed / (share + missed)
        runners[f"s{number}"] = (torch.from_numpy(short), torch.from_numpy(short & ~gone))
    return runners


def race(hits, n, *, alpha=0.05, leader=None):
    """Race soups in the order of the rows; return the leader and who left after how many rounds."""
    ends, left = round_ends(n), {}
    totals = {name: int(full.sum()) for name, (_, full) in hits.items()}
    leader = leader or max(totals, key=totals.get)
    for name, (short, full) in hits.items():
        for number, end in enumerate(ends[:-1]):
            rows = torch.arange(n) < end
            mask = torch.where(rows, full, short)
            accuracy = estimate_accuracy(mask, rows, int((short & ~full)[rows].sum()))
            if name != leader and Race(len(hits), totals[leader], alpha).has_lost(accuracy):
                left[name] = number + 1
                break
    return leader, left


def test_hopeless_soups_leave_early_and_close_ones_late():
    n = 4096
    hits = soups(np.random.default_rng(3), [0.5, 0.3, 0.495, 0.44], n)
    leader, left = race(hits, n)
    assert left["s1"] == 1
    assert left["s3"] <= 3
    assert "s2" not in left or left["s2"] > left["s3"]
    assert leader not in left


def test_the_best_soup_leaves_at_most_at_the_level():
    """The worst case: the soups tie, so each would win. None may leave in over 5 % of races."""
    rng, n, lost, draws = np.random.default_rng(2), 1500, 0, 500
    for _ in range(draws):
        misses, survivors = int(rng.integers(5, 120)), 700
        short = torch.zeros(n, dtype=torch.bool)
        short[rng.permutation(n)[:survivors]] = True
        full = short.clone()
        full[rng.permutation(short.nonzero().flatten().numpy())[:misses]] = False
        leader = (full, full)
        _, left = race({"leader": leader, "tied": (short, full)}, n, leader="leader")
        lost += "tied" in left
    assert lost / draws <= 0.05 + 2 * (0.05 * 0.95 / draws) ** 0.5


def test_what_cannot_reach_the_leader_has_lost_for_certain():
    assert Race(9, 80, 1e-300).has_lost(Accuracy(79, 200, 10, 0))
    assert Race(9, 80, 1e-300).has_lost(Accuracy(90, 200, 30, 11))
    assert not Race(9, 80, 1e-300).has_lost(Accuracy(90, 200, 30, 10))  # a tie is possible
    assert not Race(9, None, 0.05).has_lost(Accuracy(0, 200, 0, 0))


def test_more_runners_take_more_evidence():
    accuracy = Accuracy(150, 200, 40, 9)
    lost = [Race(runners, 141, 0.05).has_lost(accuracy) for runners in (2, 10**6)]
    assert lost == [True, False]

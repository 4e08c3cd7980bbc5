"""Racing: who leaves when, and how seldom the best one does."""

import math

import numpy as np
import pytest

from robustsoup.soups.racing import Race, lead_evidence, race_order


def pairs(rng, n, only_leader, only_other, both):
    """Return the verdicts of two candidates on n samples in random order, with given counts."""
    kinds = np.repeat(
        [0, 1, 2, 3], [only_leader, only_other, both, n - only_leader - only_other - both]
    )
    kinds = rng.permutation(kinds)
    return (kinds == 0) | (kinds == 2), (kinds == 1) | (kinds == 2)


def run(race, hits):
    """Run a race over the whole verdicts of each candidate; return the end and the rounds run."""
    done = {name: [] for name in race.names}
    while waiting := race.standing(done).waiting:
        for name, number in waiting:
            assert len(done[name]) == number
            done[name].append(hits[name][race.samples(number)])
    return race.standing(done), {name: len(rounds) for name, rounds in done.items()}


@pytest.mark.parametrize("n", [500, 3000])
@pytest.mark.parametrize("discordant", [0.02, 0.1, 0.4])
def test_a_tie_is_called_a_lead_at_most_at_the_level(n, discordant):
    """The worst case of the hypothesis, looked at after every sample, over 2,000 draws."""
    rng, count = np.random.default_rng([n, int(1000 * discordant)]), int(n * discordant / 2)
    evidence = [lead_evidence(*pairs(rng, n, count, count, n // 3), n) for _ in range(2000)]
    for level in (0.05, 0.0025):
        error = 2 * math.sqrt(level * (1 - level) / 2000)
        assert np.mean(np.array(evidence) >= 1 / level) <= level + error


def test_a_clear_lead_is_seen_long_before_the_end():
    rng = np.random.default_rng(0)
    leader, other = pairs(rng, 5000, 300, 100, 2000)  # 4 points, 8 % of the samples differ
    evidence = [lead_evidence(leader[:t], other[:t], 5000) for t in (500, 1500, 2500)]
    assert evidence[0] < 1 / 0.0025 < evidence[2]
    assert evidence == sorted(evidence)


def test_a_lead_that_the_rest_cannot_change_is_certain():
    leader, other = np.ones(60, dtype=bool), np.zeros(60, dtype=bool)
    assert lead_evidence(leader, other, 100) == math.inf
    assert lead_evidence(leader[:40], other[:40], 100) < math.inf


def test_without_samples_or_differences_there_is_no_evidence():
    nothing = np.zeros(0, dtype=bool)
    assert lead_evidence(nothing, nothing, 100) == 1
    same = np.random.default_rng(1).random(90) < 0.5
    assert lead_evidence(same, same, 100) == pytest.approx(1)


def soups(rng, shares, n):
    """Return correlated verdicts with the given shares of hits."""
    level = rng.random(n)
    return {f"s{i}": level + rng.normal(0, 0.05, n) < share for i, share in enumerate(shares)}


def test_the_best_candidate_leaves_at_most_at_the_level():
    rng, lost = np.random.default_rng(2), 0
    for _ in range(300):
        hits = soups(rng, [0.4, 0.41, 0.395, 0.405, 0.35], 2048)
        race = Race(tuple(hits), 2048, length=256)
        end, _ = run(race, hits)
        best = max(hits, key=lambda name: int(hits[name].sum()))
        lost += best in end.left_after
    assert lost / 300 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_hopeless_candidates_leave_early_and_the_leader_wins():
    hits = soups(np.random.default_rng(3), [0.5, 0.3, 0.49, 0.2], 4096)
    end, rounds = run(Race(tuple(hits), 4096), hits)
    assert end.leader == max(hits, key=lambda name: int(hits[name].sum()))
    assert end.left_after["s3"] == rounds["s3"] <= 2
    assert rounds["s1"] <= 3
    assert rounds["s2"] >= 3
    assert rounds[end.leader] == 8


def test_verdicts_of_later_rounds_do_not_enter():
    hits = soups(np.random.default_rng(4), [0.5, 0.495, 0.3], 2000)
    race = Race(tuple(hits), 2000, length=300)
    whole = {name: [h[race.samples(i)] for i in range(race.rounds)] for name, h in hits.items()}
    end, rounds = run(race, hits)
    assert race.standing(whole) == end
    assert sum(rounds.values()) < race.rounds * 3
    ahead = {name: parts[:2] for name, parts in whole.items()}
    ahead["s0"] = whole["s0"]
    standing = race.standing(ahead)
    assert standing.rounds == 2
    assert all(number == 2 for _, number in standing.waiting)


def test_the_last_round_holds_the_rest_and_ties_go_to_the_earlier():
    race = Race(("a", "b"), 1000, length=300)
    assert [race.samples(i).stop for i in range(race.rounds)] == [300, 600, 900, 1000]
    same = np.random.default_rng(5).random(1000) < 0.5
    end, rounds = run(race, {"a": same, "b": same})
    assert end.leader == "a"
    assert rounds == {"a": 4, "b": 4}


def test_a_race_of_one_still_evaluates_it():
    end, rounds = run(Race(("a",), 100, length=60), {"a": np.ones(100, dtype=bool)})
    assert (end.leader, rounds) == ("a", {"a": 2})


def test_the_order_depends_on_ids_and_seed_alone():
    ids = list(range(100, 200))
    order = race_order(ids, seed=0)
    assert sorted(order) == list(range(100))
    backwards = race_order(ids[::-1], seed=0)
    assert [ids[i] for i in order] == [ids[::-1][i] for i in backwards]
    assert list(order) != list(race_order(ids, seed=1))

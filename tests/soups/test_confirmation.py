"""The confirm part of the samples, the order of finalists, and their tests."""

from dataclasses import replace

import pytest
import torch
from soup_candidates import LINF, N, candidate

from robustsoup.evaluation.simultaneous import Z_ERROR, fewest_hits, samples_to_prove
from robustsoup.soups.confirmation import (
    confirm_finalists,
    confirm_part,
    judge_unattacked,
    order_finalists,
)
from robustsoup.soups.explanation import Explained, explain
from robustsoup.soups.goal import Goal

FIRST_PART = [1, 4, 7, 9, 14]


def ids_aside(ids, seed):
    return set(ids[confirm_part(ids, seed=seed)].tolist())


def test_the_confirm_part_is_a_third_that_depends_on_ids_and_seed_alone():
    ids = torch.arange(100, 400)
    aside = ids_aside(ids, 0)
    assert len(aside) == 100
    shuffled = ids[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert ids_aside(shuffled, 0) == aside
    assert ids_aside(ids, 1) != aside
    assert 15 < len(ids_aside(ids, 1) & aside) < 55  # a third of a third, give or take
    assert len({i % 3 for i in aside}) == 3
    assert len(ids_aside(ids[:2], 0)) == 0


def test_samples_stay_in_or_out_when_others_come_for_the_most_part():
    ids = torch.arange(3000)
    before, after = ids_aside(ids[:1500], 0), ids_aside(ids, 0)
    moved = before ^ {i for i in after if i < 1500}
    assert len(moved) < 100


def test_the_confirm_part_never_changes():
    """A stored run must find the same samples again on every machine."""
    assert sorted(ids_aside(torch.arange(15), 0)) == FIRST_PART


def test_without_a_robust_requirement_the_finalists_are_the_best_that_meet_the_others():
    tried = [
        candidate("unclean", 100, 100),
        candidate("best", 180, 95),
        candidate("second", 185, 90),
        candidate("third", 190, 85),
    ]
    goal = Goal.parse(LINF, ["clean>=0.8"])
    clean = judge_unattacked(tried, goal)
    finalists = order_finalists(tried, goal, clean, confirm_samples=100, most=2)
    assert [item.name for item in finalists] == ["best", "second"]
    selection = confirm_finalists(finalists, goal, clean)
    assert (selection.best.name, selection.met) == ("best", True)
    assert selection.judgement.method == "max-t"
    assert selection.checks == clean.checks["best"]


def test_with_a_robust_requirement_the_test_runs_from_the_safest_to_the_best():
    tried = [
        candidate("hopeless", 199, 60),
        candidate("cleanest", 190, 122),  # margin (0.61 - 0.5) / 0.05 = 2.2
        candidate("dominated", 170, 121),
        candidate("middle", 180, 130),
        candidate("safest", 160, 150),
    ]
    goal = Goal.parse("clean", [f"{LINF}>=0.5"])
    clean = judge_unattacked(tried, goal)

    def names(candidates, most=5):
        ordered = order_finalists(candidates, goal, clean, confirm_samples=100, most=most)
        return [item.name for item in ordered]

    assert names(tried) == ["safest", "middle", "cleanest"]
    assert names(tried, most=2) == ["middle", "cleanest"]
    assert names(tried[:1]) == ["hopeless"]


@pytest.mark.parametrize(
    ("hits", "winner", "met"),
    [
        ((150, 140, 130), "c", True),
        ((150, 140, 100), "b", True),
        ((150, 100, 140), "a", True),  # the test stops at b
        ((100, 150, 150), "a", False),
    ],
)
def test_the_last_finalist_that_passes_wins(hits, winner, met):
    finalists = [candidate(name, 160, count) for name, count in zip("abc", hits, strict=True)]
    goal = Goal.parse("clean", [f"{LINF}>=0.5", "clean>=0.7"])
    clean = judge_unattacked(finalists, goal)
    selection = confirm_finalists(finalists, goal, clean)
    assert (selection.best.name, selection.met) == (winner, met)
    assert selection.judgement.method == "max-t and fixed sequence"
    tested, measured = selection.checks
    assert tested.met == met
    assert tested.low >= 0.5 if met else tested.low < 0.5
    assert measured == clean.checks[winner][0]
    evaluations = {"a": finalists[0].evaluation}
    answer = explain(selection, Explained(ingredients=evaluations, fresh_split="confirm"))
    assert answer.fresh_accuracy[LINF].hits == hits["abc".index(winner)]
    assert answer.selected_on == "confirm"
    assert answer.guarantee.candidates == 3


def test_a_finalist_behind_the_first_failure_was_not_tested():
    finalists = [candidate("a", 160, 150), candidate("b", 165, 100), candidate("c", 170, 140)]
    goal = Goal.parse("clean", [f"{LINF}>=0.5"])
    selection = confirm_finalists(finalists, goal, judge_unattacked(finalists, goal))
    answer = explain(selection, Explained(ingredients={}, fresh_split="confirm"))
    assert (answer.chosen, answer.refused.name) == ("a", "c")
    assert answer.refused.why.endswith(
        f"but not tested for {LINF}>=0.5, as a safer finalist failed before it"
    )
    (check,) = selection.judgement.checks["c"]
    assert (check.met, check.shortfall) == (False, 0)


def test_a_test_is_exact_and_the_estimate_may_replace_it():
    least = fewest_hits(N, 0.5)
    barely, fails = candidate("a", 160, least), candidate("a", 160, least - 1)
    for point, expected in ((False, [True, False]), (True, [True, True])):
        goal = Goal.parse("clean", [f"{LINF}>=0.5"], point=point)
        clean = judge_unattacked([barely], goal)
        assert [confirm_finalists([c], goal, clean).met for c in (barely, fails)] == expected


def test_the_answer_says_how_many_were_tested_where_nothing_meets_the_requirements():
    tried = [candidate("a", 190, 60), candidate("b", 180, 70), candidate("c", 100, 65)]
    goal = Goal.parse(LINF, ["clean>=0.8", f"{LINF}>=0.9"])
    clean = judge_unattacked(tried, goal)
    finalists = order_finalists(tried, goal, clean, confirm_samples=100, most=1)
    answer = explain(confirm_finalists(finalists, goal, clean), Explained(ingredients={}))
    assert answer.obstacle == (
        f"of 3 candidates, clean>=0.8 is met by 2, of 1 finalists, {LINF}>=0.9 is met by none"
    )


def test_samples_to_prove_count_those_that_are_not_kept_aside():
    tried = [candidate("a", 190, 110), candidate("b", 165, 130)]
    goal = Goal.parse(LINF, [f"{LINF}>=0.6"])
    clean = judge_unattacked(tried, goal)
    answer = explain(confirm_finalists(tried[1:], goal, clean), Explained(ingredients={}))
    assert not answer.met
    assert answer.samples_to_prove == 3 * samples_to_prove(0.65, 0.6)
    assert "(one-sided 95 % bound of this finalist alone)" in "\n".join(answer.lines())
    unmet = Goal.parse(LINF, ["clean>=0.8", f"{LINF}>=0.5"])
    clean = judge_unattacked(tried, unmet)
    assert clean.critical > Z_ERROR or clean.method == "exact"
    answer = explain(confirm_finalists(tried[1:], unmet, clean), Explained(ingredients={}))
    assert answer.samples_to_prove == samples_to_prove(0.825, 0.8, clean.critical)


def test_ingredients_keep_their_clean_verdicts_of_all_samples():
    soup, name = candidate("soup", 190, 150), "ingredient 1"
    ingredient = replace(candidate("1-0", 190, 150), ingredient=name)
    goal = Goal.parse(LINF, ["clean>=0.85", f"{LINF}>=0.5"])
    selection = confirm_finalists([soup], goal, judge_unattacked([soup, ingredient], goal))
    for robust, meets in ((150, True), (100, False)):
        aside = candidate("", 171, robust).evaluation  # so few samples do not show clean>=0.85
        answer = explain(selection, Explained(ingredients={name: aside}, fresh_split="confirm"))
        assert [item.meets for item in answer.against] == [meets]

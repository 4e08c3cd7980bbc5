"""The screening engine: which evaluations it requests, given the evaluations that it gets."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soup_candidates import LINF, N, candidate

from robustsoup.evaluation.two_phase import subset_rows
from robustsoup.soups import racing, time_limit
from robustsoup.soups.screening import (
    Contender,
    EvaluationRequest,
    Screening,
    decisive_measure,
    mark_screened,
    run_screening,
)
from robustsoup.soups.selection import Candidate, Goal, pareto_front, select, worth_confirming
from robustsoup.soups.time_limit import Late, TimeLimit

CHOICE = Goal.parse(LINF, ["clean>=0.5"], point=True)
FIRST = 32
"""Samples of the first round of the races below."""


@pytest.fixture(autouse=True, scope="module")
def short_rounds():
    """Let N samples form several rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(racing, "ROUND", 64)
        yield


@dataclass(frozen=True)
class Truth:
    """What a soup scores: survivors of the short attack and of the full one."""

    clean: int
    short: int
    full: int


def evaluate_truth(truths, log):
    """Return an `evaluate` for `run_screening` that reads the results from a table."""

    def evaluate(request, results):
        assert request not in log
        assert all(item in results for item in request.pool)
        assert request.after is None or request.after in results
        log.append(request)
        truth = truths[request.candidate]
        if request.mode == "short":
            return mark_screened(candidate("", truth.clean, truth.short).evaluation)
        if request.subset is not None:
            return attack_subset(truth, request.subset)
        return candidate("", truth.clean, truth.full).evaluation

    return evaluate


def attack_subset(truth, subset):
    """Return the evaluation after the full attack on a part of the samples."""
    evaluation = candidate("", truth.clean, truth.short).evaluation
    rows = subset_rows(evaluation.ids, subset, seed=0)
    full = torch.arange(N) < truth.full
    verdicts = evaluation.threats[LINF]
    missed = int((verdicts.robust & ~full)[rows].sum())
    robust = torch.where(rows, full, verdicts.robust)
    record = {"subset": {"samples": subset, "seed": 0, "missed": {LINF: missed}}}
    return replace(evaluation, threats={LINF: replace(verdicts, robust=robust)}, record=record)


def steps_of(log):
    """Return the candidates and sizes of the attacks after the first round."""
    attacks = [(r.candidate, r.subset) for r in log if r.after and not r.after.keep_points]
    return [item for item in attacks if item[1] != FIRST]


def run(truths, goal, contenders=None, alpha=0.05):
    """Screen the soups between the ingredients "a" and "b"; return candidates and requests."""
    names = [name for name in truths if name not in ("a", "b")]
    contenders = contenders or [
        Contender("a", "a"),
        *(Contender(name) for name in names),
        Contender("b", "b"),
    ]
    screening, log = Screening(("a", "b"), tuple(contenders), goal, N, alpha), []
    final, late = run_screening(screening, evaluate_truth(truths, log))
    assert late == Late()
    return [Candidate(name, (), evaluation) for name, evaluation in final.items()], log


TRUTHS = {
    "a": Truth(190, 40, 40),
    "b": Truth(120, 80, 80),
    "high": Truth(150, 110, 70),
    "middle": Truth(160, 100, 90),
    "low": Truth(170, 60, 50),
}


def test_the_first_requests_depend_on_no_result():
    contenders = (Contender("a", "a"), Contender("soup"), Contender("learned", mode="full"))
    screening = Screening(("a", "b"), contenders, Goal(), N)
    pool = (EvaluationRequest("a", keep_points=True), EvaluationRequest("b", keep_points=True))
    assert screening.first_requests() == (
        *pool,
        EvaluationRequest("a", pool=pool, after=pool[0]),
        EvaluationRequest("soup", "short", pool=pool),
        EvaluationRequest("learned", pool=pool),
        EvaluationRequest(
            "soup", after=EvaluationRequest("soup", "short", pool=pool), subset=FIRST
        ),
    )


def test_a_choice_races_the_most_promising_first_and_drops_what_has_lost():
    final, log = run(TRUTHS, CHOICE)
    assert steps_of(log)[:4] == [("middle", 64), ("middle", 128), ("middle", 192), ("middle", None)]
    by_name = {c.name: c for c in final}
    assert by_name["middle"].confirmed
    assert not by_name["low"].confirmed  # 60 survivors cannot beat 90
    assert by_name["low"].evaluation.record["subset"]["samples"] == FIRST
    assert select(final, maximise=LINF, require=["clean>=0.5"], point=True).best.name == "middle"


def test_few_samples_are_one_round():
    contender = Contender("soup")
    screening = Screening(("a",), (contender,), CHOICE, 127)
    assert screening.opening_request(contender) == screening.first_request(contender)
    assert screening.first_requests() == (*screening.pool, screening.first_request(contender))


def test_without_a_leader_the_most_promising_runs_all_rounds():
    contenders = [Contender("high"), Contender("middle"), Contender("low")]
    _, log = run(TRUTHS, CHOICE, contenders)
    assert steps_of(log)[0][1] is None


def test_a_choice_passes_over_what_misses_the_clean_requirement():
    final, log = run(TRUTHS, Goal.parse(LINF, ["clean>=0.79"], point=True))
    assert {name for name, _ in steps_of(log)} == {"middle"}
    assert [c.name for c in final if not c.confirmed] == ["high", "low"]


def test_if_no_soup_meets_the_requirement_the_closest_compete():
    goal = Goal.parse(LINF, ["clean>=0.999"])
    _, log = run(TRUTHS, goal)
    assert steps_of(log) == []  # a is the closest
    truths = {**TRUTHS, "high": Truth(195, 110, 20), "middle": Truth(195, 100, 30)}
    final, log = run(truths, goal)
    assert {name for name, _ in steps_of(log)} <= {"high", "middle"}
    selection = select(final, maximise=LINF, require=goal.require)
    assert (selection.best.name, selection.met) == ("middle", False)


@pytest.mark.parametrize(
    "goal", [Goal(), Goal.parse("clean"), Goal.parse(LINF, [f"{LINF}>=0.1"])], ids=str
)
def test_other_goals_confirm_the_front_in_full(goal):
    _, log = run(TRUTHS, goal)
    screened = [
        candidate("a", 190, 40),
        *(
            candidate(name, t.clean, t.short, screened=True)
            for name, t in TRUTHS.items()
            if name not in ("a", "b")
        ),
        candidate("b", 120, 80),
    ]
    expected = {c.name for c in worth_confirming(screened)}
    if goal.maximise is not None:
        expected.add(
            select(
                screened, maximise=goal.maximise, require=goal.require, unconfirmed=True
            ).best.name
        )
    assert sorted(steps_of(log)) == sorted((name, None) for name in expected - {"a", "b"})


@pytest.mark.parametrize(
    ("maximise", "require", "attacked", "races"),
    [
        (LINF, ["clean>=0.5"], [LINF], True),
        (LINF, [f"{LINF}>=0.5"], [LINF], False),
        (LINF, [], [LINF, "L2 0.5"], False),
        ("clean", [], [LINF], False),
        (None, [], [LINF], False),
    ],
)
def test_a_race_needs_one_attacked_measure_that_decides(maximise, require, attacked, races):
    goal = Goal.parse(maximise, require)
    assert decisive_measure(goal, attacked) == (LINF if races else None)


@pytest.mark.parametrize(
    "goal",
    [
        Goal.parse(f"0.1 clean + 0.9 {LINF}"),
        Goal.parse("knee"),
        Goal.parse("clean", [f"{LINF}>=0.4"], point=True),
    ],
    ids=str,
)
def test_other_goals_attack_soups_in_full_until_the_winner_is(goal):
    truths = {
        "a": Truth(190, 40, 40),
        "b": Truth(120, 60, 60),
        "first": Truth(155, 130, 20),
        "second": Truth(154, 128, 25),
        "third": Truth(153, 126, 100),
        "fourth": Truth(152, 124, 90),
    }
    final, _ = run(truths, goal)
    wanted = {"maximise": goal.maximise, "require": goal.require, "point": goal.point}
    assert select(final, **wanted, unconfirmed=True).best.confirmed


OPEN_TRUTHS = {"a": Truth(150, 20, 20), "x": Truth(150, 130, 20), "y": Truth(150, 125, 20)}
OPEN = Screening(
    ("a",),
    (Contender("a", "a"), Contender("x"), Contender("y")),
    Goal.parse(f"0.1 clean + 0.9 {LINF}"),
    100,
)
"""A screening in which x and y may still win after their first requests."""


def test_what_may_still_win_is_pending():
    evaluate, results = evaluate_truth(OPEN_TRUTHS, []), {}
    for request in OPEN.first_requests():
        results[request] = evaluate(request, results)
    assert [request.candidate for request in OPEN.next_requests(results)] == ["x"]
    assert OPEN.pending(results) == ("x", "y")


def test_what_may_still_win_at_the_time_limit_is_counted(monkeypatch):
    """Every look at the clock takes a second; each soup begins in time, and nothing after them."""
    monkeypatch.setattr(time_limit, "clock", itertools.count().__next__)
    final, late = run_screening(OPEN, evaluate_truth(OPEN_TRUTHS, []), limit=TimeLimit("7s"))
    assert list(final) == ["a", "x", "y"]
    assert late == Late(left_out=0, unfinished=2)


def test_a_contender_that_is_evaluated_in_full_is_not_confirmed_again():
    contenders = [Contender("high", mode="full"), Contender("low")]
    final, log = run(TRUTHS, CHOICE, contenders)
    assert [r.candidate for r in log if not r.keep_points] == ["high", "low", "low"]
    assert [c.confirmed for c in final] == [True, False]


def test_without_contenders_nothing_is_confirmed():
    screening = Screening(("a",), (), CHOICE, N)
    assert screening.first_requests() == screening.pool
    assert screening.next_requests({screening.pool[0]: candidate("a", 9, 9).evaluation}) == ()


TABLES = st.lists(
    st.tuples(st.integers(0, N), st.integers(0, N), st.integers(0, N)), min_size=1, max_size=10
)


def tabled(rows):
    sorted_rows = [sorted(row, reverse=True) for row in rows]
    truths = {f"soup {number}": Truth(*row) for number, row in enumerate(sorted_rows)}
    return {"a": Truth(200, 30, 30), "b": Truth(100, 90, 90)} | truths


@settings(max_examples=60, deadline=None)
@given(TABLES, st.floats(0, 1))
def test_without_chance_the_choice_is_the_one_of_a_full_search(rows, least):
    truths = tabled(rows)
    goal = Goal.parse(LINF, {"clean": least}, point=True)
    final, _ = run(truths, goal, alpha=1e-300)
    full = [candidate(c.name, truths[c.name].clean, truths[c.name].full) for c in final]
    wanted = {"maximise": LINF, "require": {"clean": least}, "point": True}
    chosen, best = select(final, **wanted), select(full, **wanted)
    assert chosen.met == best.met
    for measure in (LINF, "clean"):
        hits = [s.best.evaluation.accuracy[measure].hits for s in (chosen, best)]
        assert hits[0] == hits[1]


@settings(max_examples=40, deadline=None)
@given(TABLES, st.booleans())
def test_a_resumed_screening_requests_the_same(rows, chooses):
    truths, log = tabled(rows), []
    names = [name for name in truths if name not in ("a", "b")]
    contenders = (Contender("a", "a"), *map(Contender, names))
    screening = Screening(("a", "b"), contenders, CHOICE if chooses else Goal(), N)
    evaluate, results = evaluate_truth(truths, log), {}
    batch = screening.first_requests()
    while batch:
        for request in batch:
            results[request] = evaluate(request, results)
        batch = screening.next_requests(results)
        again = dict(reversed(results.items()))  # the order of the results does not matter
        assert replace(screening).next_requests(again) == batch
    assert list(screening.final_evaluations(results)) == [c.name for c in contenders]


@settings(max_examples=40, deadline=None)
@given(TABLES)
def test_a_front_is_confirmed_but_for_noise(rows):
    truths = tabled(rows)
    final, _ = run(truths, Goal())
    bounds = [candidate(c.name, truths[c.name].clean, truths[c.name].short) for c in final]
    confirmed = [c for c, bound in zip(final, bounds, strict=True) if c.confirmed]
    reach = 0.5 / N**0.5 + 1e-9
    short = {c.name: c.evaluation.accuracy for c in bounds}
    for member in pareto_front(bounds, ["clean", LINF]):
        scores = member.evaluation.accuracy
        assert any(
            all(short[c.name][key].value >= scores[key].value - reach for key in scores)
            for c in confirmed
        )

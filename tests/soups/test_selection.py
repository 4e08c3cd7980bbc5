"""Selecting among evaluated soups: requirements, scores, the Pareto front and the choice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soup_candidates import L2, LINF, N, candidate

from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import wilson
from robustsoup.evaluation.simultaneous import Z_ERROR, samples_that_can_show, wilson_lower
from robustsoup.soups.goal import Goal, Requirement, Score, check_goal
from robustsoup.soups.selection import judge, pareto_front, select, worth_confirming
from robustsoup.threats import ThreatModel

few = settings(max_examples=30, deadline=None)


# select


def test_without_requirements_the_most_robust_is_selected():
    candidates = [candidate("a", 180, 90), candidate("b", 150, 100), candidate("c", 190, 80)]
    selection = select(candidates, maximise=LINF)
    assert selection.best.name == "b"
    assert selection.met
    assert selection.message.startswith("chosen: b (clean 75.0%")
    assert f"{LINF} 50.0%" in selection.message


def test_a_requirement_is_met_by_the_lower_bound_or_with_point_by_the_estimate():
    candidates = [
        candidate("sure", 185, 80),
        candidate("just", 172, 100),
        candidate("never", 150, 120),
    ]
    assert wilson(185, N)[0] >= 0.85 > wilson(172, N)[0]
    assert 172 / N >= 0.85
    selection = select(candidates, maximise=LINF, require=["clean>=0.85"])
    assert (selection.best.name, selection.met) == ("sure", True)
    selection = select(candidates, maximise=LINF, require=["clean>=0.85"], point=True)
    assert (selection.best.name, selection.met) == ("just", True)


def bound(hits):
    """Return the bound of a single candidate that is not near 0 or 1."""
    return float(wilson_lower(np.array([hits]), N, Z_ERROR)[0])


@pytest.mark.parametrize("point", [False, True])
def test_a_requirement_that_is_met_exactly_is_met(point):
    threshold = 0.86 if point else bound(172)
    wanted = {"maximise": LINF, "require": {"clean": threshold}, "point": point}
    assert select([candidate("a", 172, 100)], **wanted).met
    assert not select([candidate("a", 171, 100)], **wanted).met


def test_if_no_candidate_meets_the_requirement_the_closest_is_returned_and_said_so():
    candidates = [
        candidate("far", 120, 150),
        candidate("close", 170, 50),
        candidate("middle", 150, 80),
    ]
    selection = select(candidates, maximise=LINF, require=["clean>=0.95"])
    assert (selection.best.name, selection.met) == ("close", False)
    assert selection.message.startswith(
        "no candidate meets clean>=0.95 by its 95 % lower bound; the closest is close ("
    )
    by_estimate = select(candidates, maximise=LINF, require=["clean>=0.95"], point=True)
    assert "by its estimate" in by_estimate.message
    assert not by_estimate.met


def test_the_closest_has_the_least_total_shortfall():
    candidates = [candidate("one", 190, 40), candidate("both", 150, 90)]
    wanted = {"maximise": LINF, "point": True}
    selection = select(candidates, require=["clean>=0.95", f"{LINF}>=0.5"], **wanted)
    assert selection.best.name == "both"  # 0.2 + 0.05 short, against 0 + 0.3
    selection = select(candidates, require=["clean>=0.95", f"{LINF}>=0.25"], **wanted)
    assert selection.best.name == "one"  # 0 + 0.05, against 0.2


def test_the_shortfall_is_that_of_the_lower_bound():
    candidates = [candidate("just", 180, 100), candidate("clean", 200, 96)]
    require = ["clean>=0.9", f"{LINF}>=0.5"]
    bounds = [wilson(180, N)[0], wilson(100, N)[0], wilson(96, N)[0]]
    assert (0.9 - bounds[0]) + (0.5 - bounds[1]) > 0.5 - bounds[2]
    selection = select(candidates, maximise=LINF, require=require)
    assert (selection.best.name, selection.met) == ("clean", False)
    selection = select(candidates, maximise=LINF, require=require, point=True)
    assert (selection.best.name, selection.met) == ("just", True)


def test_every_requirement_must_be_met():
    candidates = [
        candidate("a", 180, 90, 60),
        candidate("b", 175, 100, 20),
        candidate("c", 120, 110, 90),
    ]
    require = ["clean>=80%", f"{L2}>=0.2"]
    selection = select(candidates, maximise=LINF, require=require, point=True)
    assert (selection.best.name, selection.met) == ("a", True)
    assert [str(item) for item in selection.require] == ["clean>=0.8", "L2 0.5>=0.2"]


def test_ties_go_to_the_cleaner_then_to_the_earlier_candidate():
    candidates = [
        candidate("a", 150, 90),
        candidate("b", 160, 90),
        candidate("c", 160, 90),
        candidate("d", 170, 80),
    ]
    assert select(candidates, maximise=LINF).best.name == "b"
    assert select(candidates[::-1], maximise=LINF).best.name == "c"
    closest = select(candidates[:3], maximise=LINF, require=[f"{LINF}>=0.9"])
    assert (closest.best.name, closest.met) == ("b", False)


def test_the_measure_is_a_threat_model_the_union_or_clean():
    candidates = [candidate("a", 190, 100, 30), candidate("b", 150, 60, 50)]
    for maximise, best in (
        (LINF, "a"),
        (ThreatModel("Linf", 8 / 255), "a"),
        ("linf 8/255", "a"),
        (L2, "b"),
        ("union", "b"),
        ("clean", "a"),
    ):
        assert select(candidates, maximise=maximise).best.name == best


@few
@given(
    st.lists(st.tuples(st.integers(0, N), st.integers(0, N)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_selection_is_the_best_of_the_candidates_that_qualify(table, threshold, point):
    candidates = [candidate(str(i), clean, robust) for i, (clean, robust) in enumerate(table)]
    require = [Requirement("clean", threshold)]
    selection = select(candidates, maximise=LINF, require=require, point=point)
    judgement = judge(candidates, Goal(LINF, tuple(require), point))
    bounds = [judgement.checks[c.name][0].low for c in candidates]
    assert all(
        low <= clean / N or threshold == 0 for low, (clean, _) in zip(bounds, table, strict=True)
    )
    qualified = [i for i, low in enumerate(bounds) if low >= threshold]
    assert selection.met == bool(qualified)
    if qualified:
        expected = max(qualified, key=lambda i: (table[i][1], table[i][0], -i))
    else:
        closest = [i for i, bound in enumerate(bounds) if bound == max(bounds)]
        expected = max(closest, key=lambda i: (table[i][1], -i))
    assert selection.best is candidates[expected]


@few
@given(st.floats(0, 1))
def test_any_share_is_a_requirement(threshold):
    candidates = [candidate("a", N, 0)]
    assert select(candidates, maximise=LINF, require={"clean": threshold}, point=True).met


@pytest.mark.parametrize(
    ("text", "key", "threshold"),
    [
        ("clean>=85%", "clean", 0.85),
        ("clean >= 0.85", "clean", 0.85),
        (" clean>= 85 % ", "clean", 0.85),
        ("clean>=1", "clean", 1.0),
        ("clean>=0", "clean", 0.0),
        ("Linf 8/255 >= 40%", LINF, 0.4),
        ("l2 .5>=.4", L2, 0.4),
        ("union>=12.5%", "union", 0.125),
    ],
)
def test_a_requirement_is_parsed(text, key, threshold):
    requirement = Requirement.parse(text)
    assert (requirement.key, requirement.threshold) == (key, pytest.approx(threshold))
    assert Requirement.parse(requirement) is requirement
    assert Requirement.parse(str(requirement)) == requirement


@pytest.mark.parametrize(
    "text",
    [
        "",
        "clean",
        "clean>0.85",
        "clean<=0.85",
        ">=0.85",
        "clean>=",
        "clean>=high",
        "clean>=85",
        "clean>=101%",
        "clean>=-0.1",
        "clean>=1.2.3",
        "robust>=0.5",
        "Linf>=0.5",
        "L7 3>=0.5",
    ],
)
def test_a_wrong_requirement_is_refused_in_one_line(text):
    with pytest.raises(RequestError) as error:
        Requirement.parse(text)
    assert "\n" not in str(error.value)
    assert text.partition(">=")[0] in str(error.value)


def test_a_goal_is_parsed_once():
    goal = Goal.parse("linf 8/255", {"clean": 0.85, LINF: 0.4}, point=True)
    assert goal == Goal(LINF, (Requirement("clean", 0.85), Requirement(LINF, 0.4)), True)
    candidates = [candidate("a", 170, 80), candidate("b", 169, 80), candidate("c", 150, 70)]
    judgement = judge(candidates, goal)
    assert [judgement.met(c) for c in candidates] == [True, False, False]
    assert judgement.shortfall(candidates[2]) == pytest.approx(0.1 + 0.05)
    assert Goal.parse() == Goal()
    assert goal.measures == [LINF, "clean"]


def test_more_candidates_need_more_hits():
    """One of many candidates passes by luck more often than one alone."""
    generator = np.random.default_rng(0)
    others = [candidate(str(i), 0) for i in range(20)]
    for item in others:
        item.evaluation.prediction[:] = torch.from_numpy(generator.random(N) < 0.3).long()
    goal = Goal.parse(LINF, ["clean>=0.75"])
    alone, among = judge([candidate("a", 164)], goal), judge([candidate("a", 164), *others], goal)
    assert among.checks["a"][0].low < alone.checks["a"][0].low
    assert (alone.checks["a"][0].met, among.checks["a"][0].met) == (True, False)
    assert among.critical > alone.critical


@pytest.mark.parametrize(
    "change",
    [
        lambda evaluation: evaluation.ids.add_(1),
        lambda evaluation: evaluation.labels.add_(1),
        lambda evaluation: evaluation.record.update(data={"digest": "other"}),
        lambda evaluation: evaluation.record.update(split="test"),
    ],
)
@pytest.mark.parametrize("require", [(), ["clean>=0.5"]])
def test_candidates_on_different_samples_are_refused(change, require):
    candidates = [candidate(name, 150, data={"digest": "0"}, split="val") for name in "ab"]
    change(candidates[1].evaluation)
    text = "b and a were evaluated on different samples"
    with pytest.raises(RequestError, match=f"select: {text}"):
        select(candidates, maximise=LINF, require=require)
    with pytest.raises(RequestError, match=f"pareto_front: {text}"):
        pareto_front(candidates, ["clean"])


def test_candidates_of_one_name_are_refused():
    candidates = [candidate("a", 150), candidate("a", 180)]
    with pytest.raises(RequestError, match="select: several candidates are named a"):
        select(candidates, maximise=LINF, require=["clean>=0.5"])
    with pytest.raises(RequestError, match="pareto_front: several candidates are named a"):
        pareto_front(candidates, ["clean"])


def test_every_candidate_needs_the_measures():
    candidates = [candidate("a", 150, 50, 60), candidate("b", 180, 50)]
    for choose in (lambda: select(candidates, maximise=L2), lambda: pareto_front(candidates, L2)):
        with pytest.raises(RequestError, match=f'"{L2}" was not evaluated'):
            choose()


@pytest.mark.parametrize(
    ("maximise", "best"),
    [
        ("0.5 clean + 0.5 Linf 8/255", "b"),  # 0.68, against 0.645 and 0.625
        ("0.9 clean + 0.1 Linf 8/255", "a"),
        ("0.1 clean + 0.9 Linf 8/255", "c"),
        ("knee", "b"),
    ],
)
def test_a_weighted_sum_and_the_knee_can_be_maximised(maximise, best):
    candidates = [candidate("a", 198, 60), candidate("b", 182, 90), candidate("c", 150, 100)]
    selection = select(candidates, maximise=maximise)
    assert selection.best.name == best
    assert selection.maximise == maximise


def test_the_knee_without_an_attack_is_the_cleanest():
    candidates = [candidate("a", 150), candidate("b", 180)]
    for item in candidates:
        item.evaluation.threats.clear()
    assert select(candidates, maximise="knee").best.name == "b"


@pytest.mark.parametrize(
    ("require", "text"),
    [
        (
            ["clean>=85"],
            r'got "clean>=85", expected a fraction in .* 0.85, .*; did you mean "clean>=85%"\?$',
        ),
        (["clean>=1.5"], r'got "clean>=1.5", expected a fraction in .* such as 85%$'),
        (["clean>=850%"], r'got "clean>=850%", expected a fraction in .* such as 85%$'),
        (["clean>=0.85%"], r'got "clean>=0.85%", .*; did you mean "clean>=0.85"\?$'),
        ([Requirement("clean", 0.5), "clean >= 50%"], 'got "clean>=0.5" and "clean>=0.5"'),
        (["clean>=0.5", "clean>=0.6"], 'got "clean>=0.5" and "clean>=0.6", .*one requirement on'),
    ],
)
def test_requirements_that_cannot_be_meant_are_refused(require, text):
    with pytest.raises(RequestError, match=text):
        Goal.parse(LINF, require)


@pytest.mark.parametrize(
    ("require", "samples", "text"),
    [
        ("clean>=1", 10**6, 'no number of samples can show "clean>=1"'),
        ("clean>=0.99", 40, "40 samples cannot show .* 21 candidates, .*; evaluate 602 or more"),
        ("L2 0.5>=0.1", 5000, 'select: "L2 0.5" was not evaluated; expected one of clean, Linf'),
    ],
)
def test_a_goal_that_cannot_be_decided_is_refused_before_work(require, samples, text):
    measures = ["clean", LINF]
    with pytest.raises(RequestError, match=text):
        check_goal(Goal.parse(LINF, [require]), measures, samples=samples, candidates=21)
    goal = Goal.parse(LINF, ["clean>=0.99"], point=True)
    check_goal(goal, measures, samples=40, candidates=21)


@pytest.mark.parametrize(
    ("require", "least"),
    [
        (["clean>=0.9", f"{LINF}>=0.1"], samples_that_can_show(0.9, 21)),
        (["clean>=0.1", f"{LINF}>=0.9"], 3 * samples_that_can_show(0.9)),
    ],
)
def test_clean_accuracy_needs_samples_for_all_soups_and_a_confirmed_one_for_itself(require, least):
    goal = Goal.parse(LINF, require)
    arguments = {"measures": ["clean", LINF], "candidates": 21, "confirms": True}
    check_goal(goal, samples=least, **arguments)
    with pytest.raises(RequestError, match=f"{least - 1} samples cannot .* {least} or more"):
        check_goal(goal, samples=least - 1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"maximise": "L1 12"},
            'select: "L1 12.0" was not evaluated; expected one of clean, Linf 8/255',
        ),
        ({"maximise": LINF, "require": ["L2 0.5>=0.1"]}, 'select: "L2 0.5" was not evaluated'),
        ({"maximise": "union"}, 'select: "union" was not evaluated'),
        ({"maximise": "robust"}, 'got "robust"'),
        ({"maximise": LINF, "require": {"accuracy": 0.5}}, 'got "accuracy"'),
        ({"maximise": LINF, "require": {"clean": 85}}, "expected a fraction"),
    ],
)
def test_a_measure_that_was_not_evaluated_is_refused(arguments, text):
    with pytest.raises(RequestError, match=text):
        select([candidate("a", 180, 90)], **arguments)
    with pytest.raises(RequestError, match="no candidates"):
        select([], **arguments)


# the Pareto front


def test_the_front_holds_what_no_candidate_dominates():
    candidates = [
        candidate("a", 190, 50),
        candidate("b", 180, 60),
        candidate("c", 180, 55),
        candidate("d", 150, 90),
        candidate("e", 150, 90),
        candidate("f", 189, 50),
    ]
    assert [c.name for c in pareto_front(candidates, ["clean", LINF])] == ["a", "b", "d", "e"]
    assert [c.name for c in pareto_front(candidates, [ThreatModel.parse(LINF)])] == ["d", "e"]
    assert pareto_front([], ["clean"]) == []


@few
@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=10))
def test_a_front_of_three_measures(table):
    candidates = [candidate(str(i), *hits) for i, hits in enumerate(table)]

    def dominated(hits):
        return any(
            all(a >= b for a, b in zip(other, hits, strict=True)) and other != hits
            for other in table
        )

    expected = [str(i) for i, hits in enumerate(table) if not dominated(hits)]
    assert [c.name for c in pareto_front(candidates, ["clean", LINF, L2])] == expected


def test_a_front_of_a_measure_that_was_not_evaluated_is_refused():
    with pytest.raises(RequestError, match="L1 12"):
        pareto_front([candidate("a", 190, 50)], ["clean", "L1 12"])


# screened candidates

PART = {"samples": 50, "seed": 0, "missed": {LINF: 3}}


def test_upper_bounds_are_not_confirmed():
    assert candidate("a", 180, 90).confirmed
    assert not candidate("a", 180, 90, screened=True).confirmed
    assert not candidate("a", 180, 90, subset=PART).confirmed


@pytest.mark.parametrize("record", [{"screened": True}, {"subset": PART}])
def test_a_soup_that_was_not_attacked_in_full_shows_nothing_under_attack(record):
    """Where the full attack did not run, its hits are those of a brief attack or of none."""
    tried = [candidate("full", 180, 90), candidate("part", 185, 180, **record)]
    goal = Goal.parse(LINF, ["clean>=0.7", f"{LINF}>=0.6"])
    judgement = judge(tried, goal)
    assert [check.met for check in judgement.checks["part"]] == [True, False]
    assert not select(tried, maximise=LINF, require=goal.require).met
    assert judge(tried, goal, unconfirmed=True).met(tried[1])


def test_a_selection_skips_upper_bounds():
    candidates = [
        candidate("high", 190, 120, screened=True),
        candidate("low", 180, 60),
        candidate("middle", 120, 80),
    ]
    assert select(candidates, maximise=LINF).best.name == "middle"
    assert select(candidates, maximise=LINF, require=["clean>=0.8"]).best.name == "low"
    assert select(candidates, maximise=LINF, unconfirmed=True).best.name == "high"
    closest = select(candidates, maximise=LINF, require=["clean>=0.999"])
    assert (closest.best.name, closest.met) == ("low", False)
    assert select(candidates[:1], maximise=LINF).best.name == "high"  # no other candidate


SCREENED = st.lists(
    st.tuples(st.integers(0, N), st.integers(0, N), st.booleans()), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(SCREENED)
def test_the_confirmed_candidates_cover_the_front(table):
    """Every candidate of the front has a confirmed one that is as accurate, up to noise."""
    candidates = [
        candidate(str(i), max(clean, robust), robust, screened=screened)
        for i, (clean, robust, screened) in enumerate(table)
    ]
    to_confirm = worth_confirming(candidates)
    front = pareto_front(candidates, ["clean", LINF])
    names = {c.name for c in to_confirm}
    assert names <= {c.name for c in front if not c.confirmed}
    assert len(names) == len(to_confirm)
    noise = 0.5 / N**0.5 + 1e-9
    cover = [c.evaluation.accuracy for c in candidates if c.confirmed or c.name in names]
    for member in front:
        scores = member.evaluation.accuracy
        assert any(all(c[key].value >= scores[key].value - noise for key in scores) for c in cover)
    confirmed = [c for c in candidates if c.confirmed]
    assert worth_confirming(confirmed or [candidate("a", 1)]) == []


def test_only_candidates_that_extend_the_front_are_worth_confirming():
    candidates = [
        candidate("corner", 190, 20),
        candidate("alone", 150, 100, screened=True),
        candidate("twin", 151, 99, screened=True),
        candidate("dominated", 140, 60, screened=True),
        candidate("like the corner", 188, 25, screened=True),
    ]
    names = [c.name for c in worth_confirming(candidates)]
    assert len(names) == 1
    assert names[0] in ("alone", "twin")


# scores


@pytest.mark.parametrize(
    ("text", "terms", "written"),
    [
        ("clean", ((1, "clean"),), "clean"),
        ("union", ((1, "union"),), "union"),
        (LINF, ((1, LINF),), LINF),
        (L2, ((1, L2),), L2),
        ("0.3 clean + 0.7 Linf 8/255", ((0.3, "clean"), (0.7, LINF)), "0.3 clean + 0.7 Linf 8/255"),
        ("clean + 2 L2 0.5", ((1, "clean"), (2, L2)), "1 clean + 2 L2 0.5"),
    ],
)
def test_a_score_is_parsed_and_written(text, terms, written):
    score = Score.parse(text)
    assert (score.terms, str(score)) == (terms, written)
    assert Score.parse(written) == score
    assert Score.parse(score) is score


@pytest.mark.parametrize(
    "text", ["", "best", "0.5 clean +", "0 clean", "-1 clean", "1..2 clean", "0.5 Linf"]
)
def test_a_wrong_score_is_refused_in_one_line(text):
    with pytest.raises(RequestError) as error:
        Score.parse(text)
    assert "score: got" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_score_weights_accuracies():
    accuracy = candidate("a", 180, 90).evaluation.accuracy
    score = Score.parse("0.25 clean + 0.75 Linf 8/255")
    assert score.of(accuracy) == pytest.approx(0.25 * 0.9 + 0.75 * 0.45)
    with pytest.raises(
        RequestError, match=r'score: "L2 0\.5" was not evaluated; expected one of clean'
    ):
        Score.parse(L2).of(accuracy)


def test_soups_that_are_only_looked_at_widen_the_bounds_on_clean_accuracy():
    rng = np.random.default_rng(0)
    tried = [candidate("a", 180, 90), candidate("b", 150, 100)]
    others = rng.random((N, 300)) < 0.9
    goal = Goal.parse(LINF, ["clean>=0.5"])
    alone, together = judge(tried, goal), judge(tried, goal, looked_at=others)
    assert list(together.checks) == ["a", "b"]
    for name in ("a", "b"):
        assert together.checks[name][0].low < alone.checks[name][0].low
    robust = Goal.parse(LINF, [f"{LINF}>=0.4"])
    assert judge(tried, robust, looked_at=others) == judge(tried, robust)
    choice = select(tried, maximise=LINF, require=["clean>=0.5"], looked_at=others)
    assert choice.checks == together.checks[choice.best.name]


# Arguments of other types, and spellings


def test_generators_single_measures_and_single_requirements_are_taken():
    candidates = [candidate("a", 180, 90), candidate("b", 150, 100)]
    selection = select(iter(candidates), maximise=LINF, require="clean>=0.5")
    assert (selection.best.name, selection.met) == ("b", True)
    assert [item.name for item in pareto_front(iter(candidates), "clean")] == ["a"]


@pytest.mark.parametrize("weight", [1e-5, 1e6, 1 / 3, 0.123456789, 1.0])
def test_weights_and_thresholds_are_spelled_with_all_digits(weight):
    score = Score(((weight, "clean"), (0.5, LINF)))
    assert Score.parse(str(score)) == score
    requirement = Requirement("clean", min(weight, 1.0))
    assert Requirement.parse(str(requirement)) == requirement
    assert Goal.parse(score).measures == ["clean", LINF]

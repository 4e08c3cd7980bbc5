"""Choosing among soups that were tried, what may be chosen on, and the search that tries them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data, to_float
from robustsoup.errors import CheckpointError, LeakageError, RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.intervals import wilson
from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.models import load_model
from robustsoup.soups.grid import grid
from robustsoup.soups.mixing import mix
from robustsoup.soups.search import greedy, search
from robustsoup.soups.selection import (
    Candidate,
    Requirement,
    Score,
    pareto_front,
    select,
    worth_confirming,
)
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train

N = 200
LINF, L2 = "Linf 8/255", "L2 0.5"
few = settings(max_examples=30, deadline=None)


def candidate(name, clean, robust=0, second=None, **record):
    """A soup that gets the first `clean` of 200 samples right, and stays right under attack on the first `robust`."""
    labels = torch.zeros(N, dtype=torch.long)
    scores = {LINF: robust} if second is None else {LINF: robust, L2: second}
    threats = {
        key: Verdicts(
            torch.arange(N) < hits, *torch.zeros(2, N, dtype=torch.long), *torch.zeros(2, N)
        )
        for key, hits in scores.items()
    }
    prediction = (torch.arange(N) >= clean).long()
    return Candidate(
        name,
        (1.0,),
        Evaluation(torch.arange(N), labels, prediction, torch.zeros(N), threats, record),
    )


# select


def test_without_requirements_the_most_robust_is_taken():
    chosen = select(
        [candidate("a", 180, 90), candidate("b", 150, 100), candidate("c", 190, 80)], maximise=LINF
    )
    assert chosen.best.name == "b"
    assert chosen.met
    assert chosen.message.startswith("chosen: b (clean 75.0%")
    assert f"{LINF} 50.0%" in chosen.message


def test_a_requirement_is_met_by_the_lower_end_of_the_interval_unless_by_the_point():
    tried = [candidate("sure", 185, 80), candidate("just", 172, 100), candidate("never", 150, 120)]
    assert wilson(185, N)[0] >= 0.85 > wilson(172, N)[0]
    assert 172 / N >= 0.85
    chosen = select(tried, maximise=LINF, require=["clean>=0.85"])
    assert (chosen.best.name, chosen.met) == ("sure", True)
    chosen = select(tried, maximise=LINF, require=["clean>=0.85"], point=True)
    assert (chosen.best.name, chosen.met) == ("just", True)


@pytest.mark.parametrize("point", [False, True])
def test_a_requirement_that_is_met_exactly_is_met(point):
    least = 0.86 if point else wilson(172, N)[0]
    chosen = select(
        [candidate("a", 172, 100)], maximise=LINF, require={"clean": least}, point=point
    )
    assert chosen.met
    assert not select(
        [candidate("a", 171, 100)], maximise=LINF, require={"clean": least}, point=point
    ).met


def test_where_nothing_meets_it_the_closest_is_returned_and_said_so():
    tried = [candidate("far", 120, 150), candidate("close", 170, 50), candidate("middle", 150, 80)]
    chosen = select(tried, maximise=LINF, require=["clean>=0.95"])
    assert (chosen.best.name, chosen.met) == ("close", False)
    assert chosen.message.startswith(
        "no candidate meets clean>=0.95 by its 95 % lower bound; the closest is close ("
    )
    by_point = select(tried, maximise=LINF, require=["clean>=0.95"], point=True)
    assert "by its estimate" in by_point.message
    assert not by_point.met


def test_the_closest_has_the_least_total_shortfall():
    tried = [candidate("one", 190, 40), candidate("both", 150, 90)]
    chosen = select(tried, maximise=LINF, require=["clean>=0.95", f"{LINF}>=0.5"], point=True)
    assert chosen.best.name == "both"  # 0.2 + 0.05 short, against 0 + 0.3
    chosen = select(tried, maximise=LINF, require=["clean>=0.95", f"{LINF}>=0.25"], point=True)
    assert chosen.best.name == "one"  # 0 + 0.05, against 0.2


def test_the_shortfall_is_of_the_lower_end_too():
    tried = [candidate("just", 180, 100), candidate("clean", 200, 96)]
    require = ["clean>=0.9", f"{LINF}>=0.5"]
    ends = [wilson(180, N)[0], wilson(100, N)[0], wilson(96, N)[0]]
    assert (0.9 - ends[0]) + (0.5 - ends[1]) > 0.5 - ends[2]
    chosen = select(tried, maximise=LINF, require=require)
    assert (chosen.best.name, chosen.met) == ("clean", False)
    chosen = select(tried, maximise=LINF, require=require, point=True)
    assert (chosen.best.name, chosen.met) == ("just", True)


def test_every_requirement_must_be_met():
    tried = [
        candidate("a", 180, 90, 60),
        candidate("b", 175, 100, 20),
        candidate("c", 120, 110, 90),
    ]
    chosen = select(tried, maximise=LINF, require=["clean>=80%", f"{L2}>=0.2"], point=True)
    assert (chosen.best.name, chosen.met) == ("a", True)
    assert [str(requirement) for requirement in chosen.require] == ["clean>=0.8", "L2 0.5>=0.2"]


def test_ties_go_to_the_cleaner_one_then_to_the_earlier_one():
    tried = [
        candidate("a", 150, 90),
        candidate("b", 160, 90),
        candidate("c", 160, 90),
        candidate("d", 170, 80),
    ]
    assert select(tried, maximise=LINF).best.name == "b"
    assert select(tried[::-1], maximise=LINF).best.name == "c"
    short = select(tried[:3], maximise=LINF, require=[f"{LINF}>=0.9"])
    assert (short.best.name, short.met) == ("b", False)


def test_what_is_maximised_may_be_a_threat_model_the_union_or_clean():
    tried = [candidate("a", 190, 100, 30), candidate("b", 150, 60, 50)]
    for maximise, best in (
        (LINF, "a"),
        (ThreatModel("Linf", 8 / 255), "a"),
        ("linf 8/255", "a"),
        (L2, "b"),
        ("union", "b"),
    ):
        assert select(tried, maximise=maximise).best.name == best
    assert select(tried, maximise="clean").best.name == "a"


@few
@given(
    st.lists(st.tuples(st.integers(0, N), st.integers(0, N)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_selection_is_the_best_of_those_that_qualify(scores, least, point):
    tried = [candidate(str(number), clean, robust) for number, (clean, robust) in enumerate(scores)]
    chosen = select(tried, maximise=LINF, require=[Requirement("clean", least)], point=point)
    ends = [clean / N if point else wilson(clean, N)[0] for clean, _ in scores]
    qualified = [i for i, end in enumerate(ends) if end >= least]
    assert chosen.met == bool(qualified)
    if qualified:
        expected = max(qualified, key=lambda i: (scores[i][1], scores[i][0], -i))
    else:
        expected = max(
            (i for i in range(len(ends)) if ends[i] == max(ends)), key=lambda i: (scores[i][1], -i)
        )
    assert chosen.best is tried[expected]


@few
@given(st.floats(0, 1))
def test_any_share_is_a_requirement(least):
    tried = [candidate("a", N, 0)]
    assert select(tried, maximise=LINF, require={"clean": least}, point=True).met


@pytest.mark.parametrize(
    ("text", "key", "least"),
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
def test_a_requirement_is_read(text, key, least):
    found = Requirement.parse(text)
    assert (found.key, found.threshold) == (key, pytest.approx(least))
    assert Requirement.parse(found) is found
    assert Requirement.parse(str(found)) == found


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
def test_a_wrong_requirement_is_told_in_one_line(text):
    with pytest.raises(RequestError) as told:
        Requirement.parse(text)
    assert "\n" not in str(told.value)
    assert text.partition(">=")[0] in str(told.value)


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
        ({"maximise": LINF, "require": {"clean": 85}}, "between 0 and 1"),
    ],
)
def test_what_was_not_evaluated_cannot_be_asked_for(arguments, text):
    with pytest.raises(RequestError, match=text):
        select([candidate("a", 180, 90)], **arguments)
    with pytest.raises(RequestError, match="no candidates"):
        select([], **arguments)


# the Pareto front


def test_the_front_is_what_nothing_beats():
    tried = [
        candidate("a", 190, 50),
        candidate("b", 180, 60),
        candidate("c", 180, 55),
        candidate("d", 150, 90),
        candidate("e", 150, 90),
        candidate("f", 189, 50),
    ]
    assert [c.name for c in pareto_front(tried, ["clean", LINF])] == ["a", "b", "d", "e"]
    assert [c.name for c in pareto_front(tried, [ThreatModel.parse(LINF)])] == ["d", "e"]
    assert pareto_front([], ["clean"]) == []


@few
@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=10))
def test_a_front_of_three_measures(scores):
    tried = [candidate(str(number), *hits) for number, hits in enumerate(scores)]

    def beaten(own):
        return any(
            all(a >= b for a, b in zip(other, own, strict=True)) and other != own
            for other in scores
        )

    expected = [str(number) for number, own in enumerate(scores) if not beaten(own)]
    assert [c.name for c in pareto_front(tried, ["clean", LINF, L2])] == expected


def test_a_front_of_what_was_not_evaluated_is_refused():
    with pytest.raises(RequestError, match="L1 12"):
        pareto_front([candidate("a", 190, 50)], ["clean", "L1 12"])


# what was only screened


def test_upper_bounds_are_not_confirmed():
    assert candidate("a", 180, 90).confirmed
    assert not candidate("a", 180, 90, screened=True).confirmed
    assert not candidate("a", 180, 90, stopped=True).confirmed


@pytest.mark.parametrize("mark", ["screened", "stopped"])
def test_a_choice_passes_over_upper_bounds(mark):
    tried = [
        candidate("high", 190, 120, **{mark: True}),
        candidate("low", 180, 60),
        candidate("middle", 120, 80),
    ]
    assert select(tried, maximise=LINF).best.name == "middle"
    assert select(tried, maximise=LINF, require=["clean>=0.8"]).best.name == "low"
    assert select(tried, maximise=LINF, unconfirmed=True).best.name == "high"
    none = select(tried, maximise=LINF, require=["clean>=0.999"])
    assert (none.best.name, none.met) == ("low", False)
    assert select(tried[:1], maximise=LINF).best.name == "high"  # better than nothing


MARKED = st.lists(
    st.tuples(st.integers(0, N), st.integers(0, N), st.booleans()), min_size=1, max_size=12
)


@settings(max_examples=200, deadline=None)
@given(MARKED)
def test_what_is_confirmed_covers_the_front(scores):
    """Once those are confirmed, each soup of the front has one as good, up to half the reach of an interval."""
    tried = [
        candidate(str(i), max(c, r), r, screened=marked) for i, (c, r, marked) in enumerate(scores)
    ]
    asked = worth_confirming(tried)
    front = pareto_front(tried, ["clean", LINF])
    assert {c.name for c in asked} <= {c.name for c in front if not c.confirmed}
    assert len({c.name for c in asked}) == len(asked)
    reach = 0.5 / N**0.5 + 1e-9
    sure = [c.evaluation.accuracy for c in tried if c.confirmed or c in asked]
    for one in front:
        own = one.evaluation.accuracy
        assert any(all(a[key].value >= own[key].value - reach for key in own) for a in sure)
    assert worth_confirming([c for c in tried if c.confirmed] or [candidate("a", 1)]) == []


def test_what_stands_alone_on_the_front_is_confirmed_and_what_is_beaten_is_not():
    tried = [
        candidate("corner", 190, 20),
        candidate("alone", 150, 100, screened=True),
        candidate("twin", 151, 99, screened=True),
        candidate("beaten", 140, 60, screened=True),
        candidate("like it", 188, 25, screened=True),
    ]
    asked = [c.name for c in worth_confirming(tried)]
    assert len(asked) == 1
    assert asked[0] in ("alone", "twin")


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


# scores and the greedy soup


@pytest.mark.parametrize(
    ("text", "terms", "shown"),
    [
        ("clean", ((1, "clean"),), "clean"),
        ("union", ((1, "union"),), "union"),
        (LINF, ((1, LINF),), LINF),
        (L2, ((1, L2),), L2),
        ("0.3 clean + 0.7 Linf 8/255", ((0.3, "clean"), (0.7, LINF)), "0.3 clean + 0.7 Linf 8/255"),
        ("clean + 2 L2 0.5", ((1, "clean"), (2, L2)), "1 clean + 2 L2 0.5"),
    ],
)
def test_a_score_is_read_and_written(text, terms, shown):
    score = Score.parse(text)
    assert (score.terms, str(score)) == (terms, shown)
    assert Score.parse(shown) == score


@pytest.mark.parametrize(
    "text", ["", "best", "0.5 clean +", "0 clean", "-1 clean", "1..2 clean", "0.5 Linf"]
)
def test_a_wrong_score_is_told_in_one_line(text):
    with pytest.raises(RequestError) as caught:
        Score.parse(text)
    assert "score: got" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_score_weighs_accuracies():
    accuracy = candidate("a", 180, 90).evaluation.accuracy
    assert Score.parse("0.25 clean + 0.75 Linf 8/255").of(accuracy) == pytest.approx(
        0.25 * 0.9 + 0.75 * 0.45
    )
    with pytest.raises(
        RequestError, match=r'score: "L2 0.5" was not evaluated; expected one of clean'
    ):
        Score.parse(L2).of(accuracy)


def brewed(alone, pots, score=LINF):
    """The greedy soup of ingredients and soups whose scores are known, and what was tried."""
    asked = []

    def judge(alpha):
        members = tuple(i for i, share in enumerate(alpha) if share)
        assert all(alpha[i] == pytest.approx(1 / len(members)) for i in members)
        asked.append(members)
        return candidate("pot", *pots[members]).evaluation

    tried = greedy([candidate("one", *scores).evaluation for scores in alone], judge, score)
    return tried, asked


def test_the_greedy_soup_begins_with_the_best_and_keeps_what_does_not_lose():
    alone = [(100, 50), (100, 80), (100, 60), (100, 70)]
    tried, asked = brewed(alone, {(1, 3): (100, 79), (1, 2): (100, 80), (0, 1, 2): (100, 90)})
    assert asked == [(1, 3), (1, 2), (0, 1, 2)]
    assert tried[-1].alpha == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0))
    assert [c.alpha.index(1.0) for c in tried[:4]] == [0, 1, 2, 3]
    assert len(tried) == 7


def test_a_greedy_soup_may_be_its_best_ingredient():
    tried, _ = brewed([(100, 50), (100, 80)], {(0, 1): (100, 79)})
    assert tried[-1].alpha == (0.0, 1.0)
    assert len(tried) == 3


def test_the_greedy_score_decides():
    alone, pots = [(150, 50), (100, 80)], {(0, 1): (140, 70)}
    assert brewed(alone, pots, "clean")[0][-1].alpha == (1.0, 0.0)
    assert brewed(alone, pots, LINF)[0][-1].alpha == (0.0, 1.0)
    assert brewed(alone, pots, "0.5 clean + 0.5 Linf 8/255")[0][-1].alpha == (0.5, 0.5)


# search


@pytest.fixture(scope="module")
def ingredients(data):
    network = {"spec": "resnet9:width=2", "channels": 1}
    record = {"network": network, "data": data.record, "trained_on": ["train"]}
    return [
        Checkpoint.of(load_model("resnet9:width=2", channels=1, seed=seed), record)
        for seed in range(2)
    ]


def labelled_by(network, split):
    """The same images under the labels that the network gives them, so that it has something to lose."""
    with torch.no_grad():
        return replace(split, labels=network(to_float(split.images)).argmax(1))


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_search_evaluates_every_soup_of_the_grid(ingredients, data, buffers):
    made = {"buffers": buffers, "calibrate_on": data.train.first(64)}
    settings_ = {"steps": 2, "seed": 4, "samples": 30}
    split = labelled_by(mix(ingredients, [0.5, 0.5], seed=4, **made).network(), data.val.first(40))
    told = []
    tried = search(
        ingredients,
        split,
        ["Linf 0.01"],
        step=0.5,
        on_progress=lambda *figures: told.append(figures),
        **made,
        **settings_,
    )
    assert [c.alpha for c in tried] == grid(2, 0.5)
    assert [c.name for c in tried] == ["0-1", "0.5-0.5", "1-0"]
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    for c in tried:
        expected = evaluate(
            mix(ingredients, c.alpha, seed=4, **made), split, ["Linf 0.01"], **settings_
        )
        assert torch.equal(c.evaluation.prediction, expected.prediction)
        assert torch.equal(c.evaluation.margin, expected.margin)
        for part in ("robust", "step", "norm"):
            assert torch.equal(
                getattr(c.evaluation.threats["Linf 0.01"], part),
                getattr(expected.threats["Linf 0.01"], part),
            )
        assert c.evaluation.record["seed"] == 4
    assert tried[1].evaluation.accuracy["clean"].hits == 30
    assert len({tuple(c.evaluation.margin.tolist()) for c in tried}) == 3


def test_a_greedy_search_judges_on_the_split_it_is_given_and_refuses_one_that_was_trained_on(
    ingredients, data
):
    split = labelled_by(ingredients[0].network(), data.val.first(40))
    told = []
    tried = search(
        ingredients,
        split,
        ["Linf 0.01"],
        method="greedy",
        score="clean",
        steps=2,
        on_progress=lambda *figures: told.append(figures),
    )
    assert {c.name for c in tried} == {"1-0", "0-1", "0.5-0.5"}
    assert tried[-1].name == "1-0"  # the labels are its own answers
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(LeakageError, match="trained on the train split"):
        search(ingredients, data.train.first(40), ["Linf 0.01"], method="greedy", steps=2)
    with pytest.raises(RequestError, match=r"greedy.*screen"):
        search(ingredients, split, ["Linf 0.01"], method="greedy", screen=True)
    with pytest.raises(RequestError, match=r'score: "L2 0.5" was not evaluated'):
        search(ingredients, split, ["Linf 0.01"], method="greedy", score=L2, steps=2)


def test_search_with_a_given_network_leaves_it_alone(ingredients, data, tmp_path):
    paths = []
    for number, item in enumerate(ingredients):
        torch.save(dict(item.tensors), tmp_path / f"{number}.pth")
        paths.append(tmp_path / f"{number}.pth")
    network = load_model("resnet9:width=2", channels=1, seed=9)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tried = search(paths, data.val.first(20), [], method="uniform", network=network)
    assert [c.alpha for c in tried] == [(0.5, 0.5)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    expected = evaluate(mix(ingredients, [0.5, 0.5], buffers="average"), data.val.first(20))
    assert torch.equal(tried[0].evaluation.margin, expected.margin)


def test_search_refuses_what_the_ingredients_were_trained_on(ingredients, data):
    with pytest.raises(LeakageError, match="trained on the train split itself"):
        search(ingredients, data.train.first(10), [], method="uniform")
    assert search(ingredients, data.train.first(10), [], method="uniform", allow_leakage=True)


def test_search_refuses_files_that_are_not_there(data):
    with pytest.raises(CheckpointError, match="no such file"):
        search(["absent.pth"], data.val, [])


# search, screened


THREAT = ["Linf 48/255"]
FULL = {"steps": 20, "seed": 1}


@pytest.fixture(scope="module")
def soupable(data):
    """Two ingredients whose soups lie between them, and what a full search of them finds."""
    asked = {"batch_size": 64, "device": "cpu", "precision": "float32"}
    base = train(
        load_model("resnet9:width=4", channels=1),
        data.train,
        threat="Linf 32/255",
        epochs=6,
        lr=0.2,
        **asked,
    )
    ends = [
        train(base, data.train, threat=t, epochs=3, lr=0.02, **asked)
        for t in ("Linf 4/255", "Linf 96/255")
    ]
    return ends, search(ends, data.val.first(100), THREAT, step=0.1, **FULL)


@pytest.fixture(scope="module")
def points(soupable, data):
    """The full evaluations of the ingredients, with their points."""
    return [
        evaluate(end, data.val.first(100), THREAT, keep_points=True, **FULL) for end in soupable[0]
    ]


def surviving(found):
    return found.threats[str(ThreatModel.parse(THREAT[0]))].robust


def test_a_screened_search_confirms_the_front_and_marks_the_rest(soupable, points, data):
    ends, full = soupable
    split, told = data.val.first(100), []
    tried = search(
        ends,
        split,
        THREAT,
        step=0.1,
        screen=True,
        screen_steps=3,
        on_progress=lambda *said: told.append(said[:2]),
        **FULL,
    )
    assert [(c.name, c.alpha) for c in tried] == [(c.name, c.alpha) for c in full]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    asked, screened = [], []
    for one, other in zip(tried, full, strict=True):
        assert torch.equal(one.evaluation.prediction, other.evaluation.prediction)
        soup = mix(ends, one.alpha, buffers="average", seed=1)
        if 1.0 in one.alpha:
            short = evaluate(soup, split, THREAT, pool=points, **FULL)
        else:
            short = evaluate(soup, split, THREAT, steps=3, seed=1, precision="auto", pool=points)
        assert bool((surviving(one.evaluation) <= surviving(short)).all())
        if one.confirmed:  # the pool, the short attack and the full one
            assert torch.equal(
                surviving(one.evaluation), surviving(other.evaluation) & surviving(short)
            )
            assert (one.evaluation.record["steps"], one.evaluation.record["search_precision"]) == (
                20,
                "float32",
            )
        else:
            assert torch.equal(surviving(one.evaluation), surviving(short))
            assert one.evaluation.record["screened"] is True
            assert one.evaluation.record["steps"] == 3
        asked.append(one.confirmed)
        mark = {} if 1.0 in one.alpha else {"screened": True}
        screened.append(replace(one, evaluation=replace(short, record={**short.record, **mark})))
    expected = {c.name for c in worth_confirming(screened)}
    assert {c.name for c in tried if c.confirmed} == expected | {"0-1", "1-0"}
    assert len(expected) >= 1
    assert sum(asked) < len(full)
    assert select(tried, maximise=THREAT[0]).best.confirmed


def test_the_choice_of_a_screened_search_is_as_good_up_to_noise(soupable, data):
    ends, full = soupable
    for require in ((), ("clean>=0.8",)):
        best = select(full, maximise=THREAT[0], require=require, point=True).best
        tried = search(
            ends, data.val.first(100), THREAT, step=0.1, screen=True, screen_steps=3, **FULL
        )
        found = select(tried, maximise=THREAT[0], require=require, point=True).best
        truth = next(c for c in full if c.name == found.name)
        assert (
            best.evaluation.accuracy[THREAT[0]].hits - truth.evaluation.accuracy[THREAT[0]].hits
            <= 100 * 0.5 / 10
        )


@pytest.mark.parametrize("require", [(), ("clean>=0.85",)])
def test_with_the_goal_known_the_choice_is_exact(soupable, points, data, require):
    """Every soup judged by all that the search has: the pool, the short attack, the full one. The best of them is found."""
    ends, full = soupable
    split = data.val.first(100)
    tried = search(
        ends,
        split,
        THREAT,
        step=0.1,
        screen=True,
        screen_steps=3,
        maximise=THREAT[0],
        require=require,
        point=True,
        **FULL,
    )
    truth = []
    for one in full:
        soup = mix(ends, one.alpha, buffers="average", seed=1)
        asked = FULL if 1.0 in one.alpha else {"steps": 3, "seed": 1, "precision": "auto"}
        left = surviving(evaluate(soup, split, THREAT, pool=points, **asked)) & surviving(
            one.evaluation
        )
        key = next(iter(one.evaluation.threats))
        threats = {key: replace(one.evaluation.threats[key], robust=left)}
        truth.append(replace(one, evaluation=replace(one.evaluation, threats=threats)))
    best = select(truth, maximise=THREAT[0], require=require, point=True).best
    found = select(tried, maximise=THREAT[0], require=require, point=True).best
    assert found.name == best.name
    assert torch.equal(surviving(found.evaluation), surviving(best.evaluation))
    for one, other in zip(tried, truth, strict=True):
        assert bool(
            (surviving(other.evaluation) <= surviving(one.evaluation)).all()
        )  # upper bounds
        if one.confirmed:
            assert torch.equal(surviving(one.evaluation), surviving(other.evaluation))
        if one.evaluation.record.get("stopped"):
            assert (
                one.evaluation.accuracy[THREAT[0]].hits < found.evaluation.accuracy[THREAT[0]].hits
            )
        elif not one.confirmed and all(
            Requirement.parse(r).met_by(one.evaluation.accuracy, point=True) for r in require
        ):
            assert (
                one.evaluation.accuracy[THREAT[0]].hits < found.evaluation.accuracy[THREAT[0]].hits
            )  # could not win
    assert not all(c.confirmed for c in tried)


def test_a_screened_search_works_without_a_front_to_confirm(ingredients, data):
    tried = search(ingredients, data.val.first(20), ["Linf 0.01"], step=0.5, screen=True, steps=2)
    assert [c.name for c in tried] == ["0-1", "0.5-0.5", "1-0"]
    clean = search(ingredients, data.val.first(20), [], step=0.5, screen=True)
    assert [list(c.evaluation.accuracy) for c in clean] == [["clean"]] * 3


def test_with_clean_accuracy_as_the_goal_the_cleanest_is_chosen(soupable, data):
    split = data.val.first(250)
    tried = search(
        soupable[0], split, THREAT, step=0.1, steps=5, screen=True, screen_steps=2, maximise="clean"
    )
    best = max(c.evaluation.accuracy["clean"].hits for c in tried)
    assert select(tried, maximise="clean").best.evaluation.accuracy["clean"].hits == best

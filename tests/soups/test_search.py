"""search: the soups of a method, evaluated on one split, in full or screened."""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trained_seed import trained_seed

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data, to_float
from robustsoup.errors import CheckpointError, LeakageError, RequestError, RobustsoupError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.two_phase import attacked_rows
from robustsoup.models import load_model
from robustsoup.settings import AttackSettings, EarlyStop, LearnSettings, SearchSettings
from robustsoup.soups import search_methods, selection, soup_evaluator, time_limit
from robustsoup.soups.confirmation import confirm_part
from robustsoup.soups.goal import Requirement
from robustsoup.soups.grid import grid
from robustsoup.soups.learned_search import LearnedFamily, threat_slug
from robustsoup.soups.learning import learn
from robustsoup.soups.merging import merge
from robustsoup.soups.mixing import Buffers, mix
from robustsoup.soups.search import search
from robustsoup.soups.selection import Candidate, select, worth_confirming
from robustsoup.soups.surrogate_search import requests_in_time
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train

WEAK = ["Linf 0.01"]


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


@pytest.fixture(scope="module")
def ingredients(data):
    network = {"spec": "resnet9:width=2", "channels": 1}
    record = {"network": network, "data": data.record, "trained_on": ["train"]}
    return [
        Checkpoint.of(load_model("resnet9:width=2", channels=1, seed=trained_seed(seed)), record)
        for seed in range(2)
    ]


def labelled_by(network, split):
    """Return the split with the network's predictions as labels, so that it is 100 % accurate."""
    with torch.no_grad():
        return replace(split, labels=network(to_float(split.images)).argmax(1))


def same_evaluation(a, b):
    return (
        torch.equal(a.prediction, b.prediction)
        and torch.equal(a.margin, b.margin)
        and all(
            torch.equal(getattr(a.threats[threat], part), getattr(b.threats[threat], part))
            for threat in a.threats
            for part in ("robust", "step", "norm")
        )
    )


def test_the_masking_check_of_soups_tries_the_points_of_the_ingredients(ingredients, data):
    soup = mix(ingredients, [0.5, 0.5]).network()
    split = labelled_by(soup, data.val.first(60))
    tried = search(ingredients, split, WEAK, step=0.5, steps=20).candidates
    findings = {c.name: c.evaluation.record["masking_check"]["Linf 0.01"] for c in tried}
    assert findings["0.5-0.5"]["transfer"]["n"] >= 3
    assert not any("transfer" in findings[name] for name in ("0-1", "1-0"))
    assert all(c.evaluation.threats["Linf 0.01"].x_adv is None for c in tried)


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_search_evaluates_every_soup_of_the_grid(ingredients, data, buffers):
    mixing = {"buffers": buffers, "calibrate_on": data.train.first(64)}
    attack = {"steps": 2, "seed": 4, "samples": 30}
    split = labelled_by(
        mix(ingredients, [0.5, 0.5], seed=4, **mixing).network(), data.val.first(40)
    )
    reports = []
    candidates = search(
        ingredients,
        split,
        WEAK,
        step=0.5,
        on_progress=lambda *report: reports.append(report),
        **mixing,
        **attack,
    ).candidates
    assert [c.alpha for c in candidates] == grid(2, 0.5)
    assert [c.name for c in candidates] == ["0-1", "0.5-0.5", "1-0"]
    assert [(done, total) for done, total, _ in reports] == [(1, 3), (2, 3), (3, 3)]
    for c in candidates:
        soup = mix(ingredients, c.alpha, seed=4, **mixing)
        assert same_evaluation(c.evaluation, evaluate(soup, split, WEAK, **attack))
        assert c.evaluation.record["seed"] == 4
    assert candidates[1].evaluation.accuracy["clean"].hits == 30
    assert len({tuple(c.evaluation.margin.tolist()) for c in candidates}) == 3


def test_settings_objects_and_keywords_say_the_same(ingredients, data):
    split = data.val.first(20)
    by_keywords = search(ingredients, split, WEAK, step=0.5, steps=2, seed=4).candidates
    settings, attack = SearchSettings(step=0.5), AttackSettings(steps=2, seed=0)
    by_objects = search(ingredients, split, WEAK, settings, attack, seed=4).candidates
    assert [c.name for c in by_objects] == [c.name for c in by_keywords]
    for a, b in zip(by_objects, by_keywords, strict=True):
        assert same_evaluation(a.evaluation, b.evaluation)


def test_a_greedy_search_scores_on_the_split_that_is_given(ingredients, data):
    split, reports = labelled_by(ingredients[0].network(), data.val.first(40)), []
    greedy = {"method": "greedy", "steps": 2}
    found = search(
        ingredients,
        split,
        WEAK,
        score="clean",
        on_progress=lambda *report: reports.append(report),
        **greedy,
    )
    # The labels are the first ingredient's own predictions; the soup of both may predict the same.
    (soup,), answer = found.candidates, found.answer
    assert soup.evaluation.accuracy["clean"].value == 1.0
    assert (soup.name, soup.alpha in {(1.0, 0.0), (0.5, 0.5)}) == ("greedy", True)
    assert answer.comparisons == 2 * 3 - (soup.ingredient is not None)
    assert [(done, total) for done, total, _ in reports] == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(LeakageError, match="trained on the train split"):
        search(ingredients, data.train.first(40), WEAK, **greedy)


@pytest.mark.parametrize("method", ["greedy", "all"])
@pytest.mark.parametrize(
    ("score", "message"),
    [("L2 0.5", 'score: "L2 0.5" was not evaluated'), ("best", "score: got 'best'")],
)
def test_a_wrong_score_is_refused_before_any_work(ingredients, data, method, score, message):
    steps = []
    given = {"method": method, "score": score, "calibrate_on": data.train.first(64)}
    with pytest.raises(RequestError, match=message):
        search(ingredients, data.val, WEAK, on_progress=lambda *step: steps.append(step), **given)
    assert not steps


@pytest.mark.parametrize(
    ("goal", "score"),
    [
        ({"maximise": "clean"}, "clean"),
        ({"maximise": "knee"}, WEAK[0]),
        (
            {"maximise": "clean", "score": f"0.5 clean + 0.5 {WEAK[0]}"},
            f"0.5 clean + 0.5 {WEAK[0]}",
        ),
        ({}, WEAK[0]),
    ],
)
def test_a_greedy_search_adds_by_what_is_maximised(ingredients, data, monkeypatch, goal, score):
    scores = []

    def stop(_ingredients, _evaluate, score):
        scores.append(str(score))
        raise KeyboardInterrupt

    monkeypatch.setattr(search_methods, "greedy", stop)
    with pytest.raises(KeyboardInterrupt):
        search(ingredients, data.val, WEAK, method="greedy", samples=8, steps=1, **goal)
    assert scores == [score]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "greedy", "screen": True}, '"greedy", which evaluates each soup in full'),
        (
            {"attack": "autoattack", "screen": True},
            "screen requires an attack that can be shortened",
        ),
        ({"method": "gird"}, 'methods: got "gird", .*did you mean "grid"'),
        ({"step": 0.3}, r"step: got 0\.3, expected a fraction of 1"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"require": ["clean>85"]}, 'require: got "clean>85"'),
        ({"maximise": "robust"}, 'got "robust"'),
        ({"retsarts": 2}, 'unknown setting "retsarts"; did you mean "restarts"'),
    ],
)
def test_a_wrong_request_is_refused(ingredients, data, wrong, message):
    with pytest.raises(RequestError, match=message):
        search(ingredients, data.val.first(4), WEAK, **wrong)


def test_search_leaves_a_given_network_unchanged(ingredients, data, tmp_path):
    paths = []
    for number, ingredient in enumerate(ingredients):
        torch.save(dict(ingredient.tensors), tmp_path / f"{number}.pth")
        paths.append(tmp_path / f"{number}.pth")
    network = load_model("resnet9:width=2", channels=1, seed=9)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    candidates = search(paths, data.val.first(20), [], method="uniform", network=network).candidates
    assert [c.alpha for c in candidates] == [(0.5, 0.5)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    expected = evaluate(mix(ingredients, [0.5, 0.5], buffers="average"), data.val.first(20))
    assert torch.equal(candidates[0].evaluation.margin, expected.margin)


def test_search_refuses_what_the_ingredients_were_trained_on(ingredients, data):
    with pytest.raises(LeakageError, match="trained on the train split itself"):
        search(ingredients, data.train.first(10), [], method="uniform")
    assert search(ingredients, data.train.first(10), [], method="uniform", allow_leakage=True)


def test_search_refuses_no_files(data):
    with pytest.raises(RequestError, match="search: got no checkpoints, expected one or more"):
        search([], data.val, ["Linf 8/255"])


def test_search_refuses_missing_files(data):
    with pytest.raises(CheckpointError, match="no such file"):
        search(["absent.pth"], data.val, [])


# screened searches


THREAT = "Linf 48/255"
FULL = {"steps": 20, "seed": 1}
SHORT = {"steps": 3, "seed": 1, "precision": "auto"}
SCREEN = {"step": 0.1, "screen": True, "screen_steps": 3}


@pytest.fixture(scope="module")
def split(data):
    return data.val.first(100)


@pytest.fixture(scope="module")
def ends(data):
    """Two ingredients of one loss basin: one tends to clean accuracy, one to robustness."""
    settings = {"batch_size": 64, "device": "cpu", "precision": "float32"}
    settings["seed"] = trained_seed()
    network = load_model("resnet9:width=4", channels=1, seed=trained_seed())
    base = train(network, data.train, threat="Linf 32/255", epochs=6, lr=0.2, **settings)
    return [
        train(base, data.train, threat=threat, epochs=3, lr=0.02, **settings)
        for threat in ("Linf 4/255", "Linf 96/255")
    ]


@pytest.fixture(scope="module")
def full(ends, split):
    """The candidates of a search without screening."""
    return search(ends, split, [THREAT], step=0.1, **FULL).candidates


@pytest.fixture(scope="module")
def pool(ends, split):
    """The full evaluations of the ingredients, with their adversarial points."""
    return [evaluate(end, split, [THREAT], keep_points=True, **FULL) for end in ends]


@pytest.fixture(scope="module")
def short(ends, split, full, pool):
    """What a screening evaluates first, by name: short attacks, but the ingredients in full."""
    return {
        c.name: evaluate(
            mix(ends, c.alpha, buffers="average", seed=1),
            split,
            [THREAT],
            pool=pool,
            **(FULL if 1.0 in c.alpha else SHORT),
        )
        for c in full
    }


def survivors(evaluation):
    return evaluation.threats[str(ThreatModel.parse(THREAT))].robust


def hits(candidate):
    return candidate.evaluation.accuracy[THREAT].hits


def test_a_screening_judges_by_the_bounds_of_the_choice(ingredients, data, monkeypatch):
    seeds, prove = [], selection.prove_accuracies

    def record_seed(hits, thresholds, *, seed):
        seeds.append(seed)
        return prove(hits, thresholds, seed=seed)

    monkeypatch.setattr(selection, "prove_accuracies", record_seed)
    for require in (["clean>=0"], [f"{WEAK[0]}>=0"]):  # a race, and possible winners
        goal = {"maximise": WEAK[0], "require": require}
        settings = {"step": 0.5, "screen": True, "screen_steps": 1, "steps": 2, "seed": 3}
        search(ingredients, data.val.first(20), WEAK, **goal, **settings)
    assert len(seeds) > 2
    assert set(seeds) == {3}


def test_a_screened_search_confirms_the_front_and_marks_the_rest(ends, split, full, short):
    reports = []
    candidates = search(
        ends,
        split,
        [THREAT],
        maximise="clean",
        on_progress=lambda *report: reports.append(report[:2]),
        **SCREEN,
        **FULL,
    ).candidates
    assert [(c.name, c.alpha) for c in candidates] == [(c.name, c.alpha) for c in full]
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    for c, in_full in zip(candidates, full, strict=True):
        assert torch.equal(c.evaluation.prediction, in_full.evaluation.prediction)
        record, bound = c.evaluation.record, survivors(short[c.name])
        if c.confirmed:  # by the pool, the short attack and the full one
            assert torch.equal(survivors(c.evaluation), survivors(in_full.evaluation) & bound)
            assert (record["steps"], record["search_precision"]) == (20, "float32")
        else:
            assert torch.equal(survivors(c.evaluation), bound)
            assert (record["screened"], record["steps"]) == (True, 3)
    screened = []
    for c in full:
        mark = {} if 1.0 in c.alpha else {"screened": True}
        evaluation = replace(short[c.name], record=short[c.name].record | mark)
        screened.append(replace(c, evaluation=evaluation))
    cleanest = select(screened, maximise="clean", unconfirmed=True).best.name
    expected = {c.name for c in worth_confirming(screened)} | {"0-1", "1-0", cleanest}
    assert {c.name for c in candidates if c.confirmed} == expected
    assert select(candidates, maximise="clean").best.confirmed


def test_a_screened_search_without_a_goal_confirms_soups_for_the_first_threat(ends, split):
    def search_screened(**goal):
        brief = {"step": 0.2, "steps": 5, "screen": True, "screen_steps": 1}
        result = search(ends, split.first(50), [THREAT], **brief, **goal)
        return result.answer.chosen, [c.name for c in result.candidates if c.confirmed]

    assert search_screened() == search_screened(maximise=THREAT)


def median_clean(candidates):
    """Return a requirement that half of the candidates meet, whatever the training gave."""
    ordered = sorted(c.evaluation.accuracy["clean"].value for c in candidates)
    return Requirement("clean", ordered[len(ordered) // 2])


def meets(candidate, require):
    return all(candidate.evaluation.accuracy[r.key].value >= r.threshold for r in require)


@pytest.mark.parametrize("required", [False, True])
def test_with_the_goal_known_the_choice_is_exact(ends, split, full, short, required):
    """The choice is the best soup under the pool, the short attack and the full one together."""
    require = [median_clean(full)] if required else []
    wanted = {"maximise": THREAT, "require": require, "point": True}
    candidates = search(ends, split, [THREAT], **SCREEN, **FULL, **wanted).candidates
    truth = []
    for c in full:
        survived = survivors(c.evaluation) & survivors(short[c.name])
        threats = {
            name: replace(verdicts, robust=survived)
            for name, verdicts in c.evaluation.threats.items()
        }
        truth.append(replace(c, evaluation=replace(c.evaluation, threats=threats)))
    best, chosen = select(truth, **wanted).best, select(candidates, **wanted).best
    assert chosen.name == best.name
    assert torch.equal(survivors(chosen.evaluation), survivors(best.evaluation))
    to_beat = max((hits(c) for c in truth if 1.0 in c.alpha and meets(c, require)), default=0)
    for c, true in zip(candidates, truth, strict=True):
        bound, survived = survivors(c.evaluation), survivors(true.evaluation)
        assert bool((survived <= bound).all())
        if c.confirmed:
            assert torch.equal(bound, survived)
        elif meets(c, require):
            assert hits(c) < hits(chosen)  # it could not win
        if 1.0 not in c.alpha and int(survivors(short[c.name]).sum()) < to_beat:
            assert not c.confirmed  # an ingredient was better before any soup was attacked


def test_a_screened_search_works_without_a_front_to_confirm(ingredients, data):
    split = data.val.first(20)
    candidates = search(ingredients, split, WEAK, step=0.5, screen=True, steps=2).candidates
    assert [c.name for c in candidates] == ["0-1", "0.5-0.5", "1-0"]
    clean = search(ingredients, split, [], step=0.5, screen=True).candidates
    assert [list(c.evaluation.accuracy) for c in clean] == [["clean"]] * 3


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_ingredients_meet_the_points_that_screened_soups_meet(
    ingredients, data, monkeypatch, buffers
):
    attacked = []

    def evaluate_and_record(network, *args, pool, after, keep_points, **options):
        attacked.append((len(pool), after is not None, keep_points))
        return evaluate(network, *args, pool=pool, after=after, keep_points=keep_points, **options)

    monkeypatch.setattr(soup_evaluator, "evaluate", evaluate_and_record)
    brief = {"method": "uniform", "screen": True, "steps": 2, "samples": 20}
    calibrate_on = data.train.first(64)
    found = search(ingredients, data.val, WEAK, buffers=buffers, calibrate_on=calibrate_on, **brief)
    own_attacks = [item for item in attacked if not item[0] and not item[1]]
    assert own_attacks == [(0, False, True)] * 2
    assert attacked.count((2, True, False)) == 2  # the ingredients again, with all points
    expected = [evaluate(item, data.val, samples=20).accuracy["clean"] for item in ingredients]
    assert [item.differences["clean"].a for item in found.answer.against] == expected


def test_with_clean_accuracy_as_the_goal_the_cleanest_soup_is_chosen(ends, data):
    brief = {"step": 0.1, "steps": 5, "screen": True, "screen_steps": 2}
    candidates = search(ends, data.val.first(250), [THREAT], maximise="clean", **brief).candidates
    best = max(c.evaluation.accuracy["clean"].hits for c in candidates)
    chosen = select(candidates, maximise="clean").best
    assert chosen.evaluation.accuracy["clean"].hits == best


def test_the_surrogate_attacks_a_part_of_the_grid_as_the_grid_does(ends, split, full):
    """Twenty points are as good here, so that the search ends soon whatever the training gave."""
    wide = {"step": 0.1, "tolerance": 0.2}
    result = search(ends, split, [THREAT], method="surrogate", **wide, **FULL)
    few = result.candidates
    by_name = {c.name: c for c in full}
    names = [c.name for c in few]
    assert names == [c.name for c in full if c.name in names]
    assert {"1-0", "0-1"} <= set(names)
    assert len(few) < len(full)
    assert [soup.name for soup in result.predicted] == [c.name for c in full]
    assert [soup.attacked for soup in result.predicted] == [c.name in names for c in full]
    assert result.answer.chosen in names
    for c in few:
        assert torch.equal(survivors(c.evaluation), survivors(by_name[c.name].evaluation))


def test_the_surrogate_attacks_on_a_part_first_and_the_answer_on_all(
    ends, split, full, monkeypatch
):
    monkeypatch.setattr("robustsoup.soups.surrogate_search.SMALLEST_PART", len(split) // 3)
    wide = {"step": 0.1, "tolerance": 0.999}
    result = search(ends, split, [THREAT], method="surrogate", **wide, **FULL)
    by_name = {c.name: c for c in full}
    in_part = [c for c in result.candidates if not c.confirmed]
    assert (len(in_part), len(result.candidates)) == (4, 6)
    for c in result.candidates:
        rows = attacked_rows(c.evaluation.ids, c.evaluation.record)
        assert int(rows.sum()) == (len(split) // 3 if c in in_part else len(split))
        expected = survivors(by_name[c.name].evaluation)
        assert torch.equal(survivors(c.evaluation)[rows], expected[rows])
    chosen = next(c for c in result.candidates if c.name == result.answer.chosen)
    assert chosen.confirmed


def test_the_surrogate_attacks_every_soup_that_it_named_before_it_looks_again(
    ends, split, monkeypatch
):
    looks = []

    def look(engine, attacked, limit):
        requests, late = requests_in_time(engine, attacked, limit)
        looks.append(([request.candidate for request in requests], set(attacked)))
        return requests, late

    monkeypatch.setattr("robustsoup.soups.search_methods.requests_in_time", look)
    search(ends, split, [THREAT], method="surrogate", step=0.1, steps=1)
    assert len(looks[0][0]) > 1
    for (named, _), (_, attacked) in itertools.pairwise(looks):
        assert attacked >= set(named)


# the time limit, by a clock that the test turns


@pytest.fixture
def ticks(monkeypatch):
    """Let every look at the clock take a second: a soup takes one, and so does the next start."""
    counter = itertools.count()
    monkeypatch.setattr(time_limit, "clock", lambda: float(next(counter)))


@pytest.mark.usefixtures("ticks")
def test_soups_that_come_too_late_are_left_out_and_counted(ends, split, full):
    limited = search(ends, split, [THREAT], step=0.1, time_limit="7s", **FULL)
    assert [c.name for c in limited.candidates] == ["0-1", "0.5-0.5", "1-0"]
    answer = limited.answer
    assert (answer.left_out, answer.unfinished) == (8, 0)
    assert "the time limit left out 8 soups that no attack was tried on" in answer.lines()
    whole = {c.name: c.evaluation for c in full}
    for c in limited.candidates:
        assert torch.equal(survivors(c.evaluation), survivors(whole[c.name]))


@pytest.mark.usefixtures("ticks")
def test_a_screening_that_comes_to_no_end_says_so(ends, split):
    whole = search(ends, split, [THREAT], step=0.5, screen=True, **FULL)
    assert (whole.answer.left_out, whole.answer.unfinished) == (0, 0)
    late = search(ends, split, [THREAT], step=0.25, screen=True, time_limit="7s", **FULL)
    assert [c.name for c in late.candidates] == ["0-1", "0.5-0.5", "1-0"]
    assert late.answer.left_out == 2
    open_race = not late.candidates[1].confirmed
    assert late.answer.unfinished <= open_race
    assert late.answer.chosen in [c.name for c in late.candidates if c.confirmed]


@pytest.mark.usefixtures("ticks")
def test_soups_that_the_surrogate_comes_too_late_for_are_counted(ends, split, monkeypatch):
    brief = {"method": "surrogate", "step": 0.1, "steps": 1}
    whole = search(ends, split, [THREAT], **brief)
    assert (whole.answer.left_out, whole.answer.unfinished) == (0, 0)
    late = search(ends, split, [THREAT], time_limit="7s", **brief)
    assert len(late.candidates) + late.answer.left_out == 11
    assert late.answer.left_out > 0
    monkeypatch.setattr("robustsoup.soups.surrogate_search.SMALLEST_PART", len(split) // 3)
    in_part = search(ends, split, [THREAT], time_limit="13s", **brief)  # the first soups
    assert in_part.answer.unfinished <= sum(not c.confirmed for c in in_part.candidates)


@pytest.mark.usefixtures("ticks")
def test_the_search_by_all_counts_what_the_surrogate_came_too_late_for(
    ends, split, data, monkeypatch
):
    monkeypatch.setattr("robustsoup.soups.search.methods_of", lambda _: ("surrogate", "greedy"))
    monkeypatch.setattr("robustsoup.soups.search_methods.LEARNING", ())
    brief = {"step": 0.1, "steps": 1, "calibrate_on": data.train.first(64)}
    late = search(ends, split, [THREAT], method="all", time_limit="7s", **brief)
    assert len(late.candidates) + late.answer.left_out == 11 + 1  # the greedy soup


@pytest.mark.usefixtures("ticks")
def test_the_first_soup_is_evaluated_whatever_the_limit(ends, split):
    brief = {"steps": 1, "time_limit": "1s", "samples": 20}
    for method in ("uniform", "grid", "surrogate"):
        assert search(ends, split, [THREAT], method=method, **brief).candidates


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize("limit", ["1s", "2s", "3s"])
def test_a_soup_whose_race_the_limit_cut_short_is_confirmed_on_the_part_kept_aside(
    ends, split, limit
):
    found = search(
        ends,
        split,
        [THREAT],
        method="uniform",
        screen=True,
        time_limit=limit,
        require=[f"{THREAT}>=0"],
        **FULL,
    )
    assert found.answer.chosen == found.candidates[0].name


# learned soups


LINF = ThreatModel.parse(THREAT)
LEARNED = {"learn_settings": LearnSettings(epochs=1, attack_steps=1), "steps": 1, "samples": 60}


def test_a_search_learns_soups_against_several_radii(ends, data):
    train = data.train.first(128)
    found = search(ends, data.val, [THREAT], method="learned", calibrate_on=train, **LEARNED)
    names = [c.name for c in found.candidates]
    assert names[0] == "learned-clean"
    assert len(names) == len({str(t) for t in LearnedFamily.of("learned", [LINF]).threats}) == 5
    settings = replace(LEARNED["learn_settings"], threat="clean")
    expected = mix(ends, learn(ends, train, settings))
    first = found.candidates[0]
    soup = mix(ends, first.mixed_by)
    assert all(torch.equal(soup.tensors[k], v) for k, v in expected.tensors.items())
    assert "learned against clean" in first.description
    assert found.answer.chosen in names
    assert {item.ingredient for item in found.answer.against} == {"ingredient 1", "ingredient 2"}
    assert found.chosen.name == found.answer.chosen


def test_a_sweep_of_alpha_learns_with_several_weights(ends, data):
    train = data.train.first(64)
    found = search(
        ends, data.val, [THREAT], method="learned", sweep="alpha", calibrate_on=train, **LEARNED
    )
    slug = threat_slug(LINF)
    weights = ("0.2", "0.4", "0.6", "0.8", "1")
    expected = ["ce", *(f"mixed-{w}" for w in weights)]
    assert [c.name for c in found.candidates] == [f"learned-{slug}-{w}" for w in expected]
    assert len({c.description for c in found.candidates}) == 6
    assert found.candidates[1].description.endswith("with mixed 0.2")


def test_a_dial_is_learned_once_and_turned(ends, data):
    steps = []
    learn_settings = replace(LEARNED["learn_settings"], early_stop=EarlyStop(samples=16))
    found = search(
        ends,
        data.val,
        [THREAT],
        method="dial",
        calibrate_on=data.train.first(64),
        on_progress=lambda done, total, figures: steps.append((done, total, figures)),
        require=["clean>=0"],
        **(LEARNED | {"learn_settings": learn_settings}),
    )
    assert not any("early" in gap for gap in found.answer.guarantee.leaves_out)
    assert [c.name for c in found.candidates] == [f"dial-t{t / 10:g}" for t in range(11)]
    learning = [figures for _, _, figures in steps if figures.startswith("learning dial")]
    assert learning
    assert len(learning) == len(set(learning))  # one run of steps, for all positions
    assert steps[-1][:2] == (11, 11)
    t = found.candidates[0]
    assert found.answer.description.startswith("the dial of ingredient 1 and ingredient 2 at t = ")
    assert t.mixed_by is t.coefficients


def test_all_methods_are_on_one_front(ends, data):
    found = search(
        ends,
        data.val,
        [THREAT],
        method="all",
        step=0.5,
        calibrate_on=data.train.first(64),
        report_on=data.test.first(16),
        **LEARNED,
    )
    names = [c.name for c in found.candidates]
    roles = list(dict.fromkeys(name.split("-")[0] for name in names))
    assert roles == ["surrogate", "learned", "dial", "greedy"]
    assert len(set(names)) == len(names)
    assert names.count("greedy") == 1
    assert "the guarantee leaves out: the greedy soup was built by the score on val" in (
        found.answer.lines()
    )
    assert found.answer.fresh_split == "test"


def test_the_greedy_soup_completes_what_the_surrogate_attacked_on_a_part(
    ingredients, data, monkeypatch
):
    monkeypatch.setattr("robustsoup.soups.surrogate_search.SMALLEST_PART", 30)
    monkeypatch.setattr("robustsoup.soups.search.methods_of", lambda _: ("surrogate", "greedy"))
    monkeypatch.setattr("robustsoup.soups.search_methods.LEARNING", ())
    split = labelled_by(mix(ingredients, [0.5, 0.5]).network(), data.val.first(90))
    quick = {"step": 0.1, "steps": 2, "tolerance": 0.999, "calibrate_on": data.train.first(64)}
    found = {c.name: c for c in search(ingredients, split, WEAK, method="all", **quick).candidates}
    assert not found["surrogate-0.5-0.5"].confirmed
    assert found["greedy"].alpha == (0.5, 0.5)
    assert found["greedy"].confirmed


def test_soups_that_the_greedy_one_left_behind_count_in_comparisons(ingredients, data, monkeypatch):
    def leave_one_behind(evaluations, *_):
        left, best = zip([(0.3, 0.7), (0.0, 1.0)], evaluations, strict=True)
        return [Candidate("left", *left), Candidate("best", *best)]

    monkeypatch.setattr(search_methods, "greedy", leave_one_behind)
    monkeypatch.setattr("robustsoup.soups.search.methods_of", lambda _: ("surrogate", "greedy"))
    monkeypatch.setattr("robustsoup.soups.search_methods.LEARNING", ())
    quick = {"step": 0.5, "steps": 1, "samples": 16, "calibrate_on": data.train.first(64)}
    found = search(ingredients, data.val, WEAK, method="all", **quick)
    same = sum(c.ingredient is not None for c in found.candidates)
    assert [c.name for c in found.candidates if c.name == "greedy"] == ["greedy"]
    assert found.answer.comparisons == (len(found.candidates) + 1) * len(ingredients) - same


@pytest.mark.usefixtures("ticks")
def test_learned_soups_that_come_too_late_are_left_out(ends, data):
    found = search(
        ends,
        data.val,
        [THREAT],
        method="learned",
        calibrate_on=data.train.first(64),
        time_limit="5s",
        **LEARNED,
    )
    assert found.candidates[0].name == "learned-clean"
    assert len(found.candidates) + found.answer.left_out == 5
    assert found.answer.left_out == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "all"}, 'method "all" learns on training samples; give calibrate_on'),
        ({"method": "dial"}, 'method "dial" learns on training samples; give calibrate_on'),
        ({"method": "learned", "screen": True}, "which evaluates each soup in full"),
        ({"sweep": "alpha"}, 'sweep: applies to method "learned", got "grid"'),
        ({"method": "learned", "sweep": "t"}, 'sweep: got "t", expected one of eps, alpha'),
    ],
)
def test_wrong_requests_of_learning_methods_are_refused(ends, split, arguments, message):
    with pytest.raises(RequestError, match=message):
        search(ends, split, [THREAT], **arguments)


@pytest.mark.parametrize(
    ("require", "message"),
    [
        ({"clean": 85}, 'require: got "clean>=85", .*did you mean "clean>=85%"'),
        ({"clean": float("nan")}, 'require: got "clean>=nan"'),
        (["clean>=0.3", "clean>=50%"], 'got "clean>=0.3" and "clean>=0.5", .*keep the higher'),
        (0.85, 'require: got "0.85", expected a form such as'),
        ([0.85], 'require: got "0.85", expected a form such as'),
    ],
)
def test_wrong_requirements_are_refused(ends, split, require, message):
    with pytest.raises(RequestError, match=message):
        search(ends, split, [THREAT], require=require)


def test_requirements_may_be_a_mapping(ends, split):
    require = {"clean": 0.0, LINF: "0%"}
    found = search(ends, split.first(8), [THREAT], method="uniform", steps=1, require=require)
    assert found.answer.require == ("clean>=0", f"{THREAT}>=0")


def test_soups_are_not_learned_without_an_attack(ends, data):
    with pytest.raises(RequestError, match="learns under attack; give a threat"):
        search(ends, data.val, ["clean"], method="dial", calibrate_on=data.train)


def test_the_surrogate_neither_screens_nor_finds_the_knee(ends, split):
    with pytest.raises(RequestError, match="the knee depends on the whole front"):
        search(ends, split, [THREAT], method="surrogate", maximise="knee")
    with pytest.raises(
        RequestError, match="which attacks few soups by a rule of its own; leave out screen"
    ):
        search(ends, split, [THREAT], method="surrogate", screen=True)


def test_search_evaluates_the_merges_of_a_grid_of_weights(ingredients, data):
    found = search(
        ingredients, data.val, WEAK, method="slerp", step=0.5, steps=1, samples=16, device="cpu"
    )
    assert [candidate.alpha for candidate in found.candidates] == [(0, 1), (0.5, 0.5), (1, 0)]
    merged = merge(ingredients, "slerp", [0.5, 0.5], device="cpu")
    expected = evaluate(merged, data.val, WEAK, AttackSettings(steps=1), samples=16, device="cpu")
    assert same_evaluation(found.candidates[1].evaluation, expected)
    assert "slerp of equal parts" in found.candidates[1].description
    assert found.candidates[0].ingredient is None
    for name, tensor in found.make_soup(found.candidates[1]).tensors.items():
        assert torch.equal(tensor, merged.tensors[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "slerp", "screen": True}, '"slerp", which evaluates each soup in full'),
        ({"density": 0.5}, 'density: has no meaning with method "grid"'),
        ({"method": "slerp", "density": 0.5}, 'density: has no meaning with method "slerp"'),
        ({"method": "greedy", "step": 0.5}, 'step: has no meaning with method "greedy"'),
        ({"tolerance": 0.01}, 'tolerance: has no meaning with method "grid"'),
        ({"score": "clean"}, 'score: has no meaning with method "grid"'),
        ({"learn_settings": LearnSettings()}, 'learn_settings: has no meaning with method "grid"'),
        ({"method": "fisher"}, "measures on training samples; give data"),
        ({"method": "swap"}, "give the blocks"),
    ],
)
def test_wrong_requests_of_merging_methods_are_refused(ingredients, data, arguments, message):
    with pytest.raises(RequestError, match=message):
        search(ingredients, data.val, WEAK, **arguments)


# the answer


def test_the_answer_names_ingredients_and_says_what_test_says(ends, data, split, full):
    result = search(
        ends, split, [THREAT], step=0.5, report_on=data.test.first(50), require=["clean>=0"], **FULL
    )
    answer, first = result.answer, result.candidates[0]
    assert [c.ingredient for c in result.candidates] == ["ingredient 2", None, "ingredient 1"]
    assert first.description == "ingredient 2 itself"
    assert result.candidates[1].description == "equal parts of ingredient 1 and ingredient 2"
    assert answer.chosen == select(result.candidates, maximise=THREAT).best.name
    assert (answer.selected_on, answer.fresh_split) == ("val", "test")
    assert answer.fresh_accuracy["clean"].n == 50
    assert answer.held_on_test is True
    assert answer.guarantee.candidates == 3
    assert answer.guarantee.leaves_out == ()
    best = next(c for c in full if c.alpha == (1.0, 0.0))
    against = {item.ingredient: item for item in answer.against}
    if "ingredient 1" in against:
        assert against["ingredient 1"].differences[THREAT].a == best.evaluation.accuracy[THREAT]


def test_the_answer_of_a_uniform_soup_compares_it_with_the_ingredients(ends, split, full):
    result = search(ends, split, [THREAT], method="uniform", **FULL)
    assert [c.name for c in result.candidates] == ["0.5-0.5"]
    accuracy = {c.alpha: c.evaluation.accuracy for c in full}
    for item, alpha in zip(result.answer.against, ((1.0, 0.0), (0.0, 1.0)), strict=True):
        assert item.differences[THREAT].a == accuracy[alpha][THREAT]


def test_a_requirement_under_attack_is_confirmed_on_samples_kept_aside(ends, split):
    wanted = {"maximise": "clean", "require": [f"{THREAT}>=0.01"]}
    result = search(ends, split, [THREAT], **SCREEN, **FULL, **wanted)
    answer = result.answer
    assert not any("hold together" in gap for gap in answer.guarantee.leaves_out)
    aside = confirm_part(split.ids, seed=1)
    assert int(aside.sum()) == 33
    for c in result.candidates:  # the search did not look at what is kept aside
        assert torch.equal(c.evaluation.ids, split.ids[~aside])
    assert answer.fresh_split == "a part of val kept aside"
    assert answer.guarantee.method in ("fixed sequence", "none and fixed sequence")
    alpha = next(c.alpha for c in result.candidates if c.name == answer.chosen)
    soup = mix(ends, alpha, buffers="average", seed=1)
    expected = evaluate(soup, split.take(aside), [THREAT], **FULL).accuracy
    assert dict(answer.accuracy) == dict(expected)
    assert answer.checks[0].estimate == expected[THREAT]
    assert not any("decided which" in gap for gap in answer.guarantee.leaves_out)
    by_estimate = search(ends, split, [THREAT], point=True, **SCREEN, **FULL, **wanted)
    assert torch.equal(by_estimate.candidates[0].evaluation.ids, split.ids)


def test_a_requirement_that_the_samples_cannot_show_is_refused_before_work(ends, split):
    with pytest.raises(RequestError, match=r'100 samples cannot show "clean>=0.99" for 11'):
        search(ends, split, [THREAT], step=0.1, require=["clean>=0.99"])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("all", {"affine": True}),
        ("all", {"average_last": 0.5}),
        ("dial", {"clean_limit": 1.0}),
    ],
)
def test_settings_that_do_not_fit_a_method_are_refused_before_any_work(
    ends, data, method, settings
):
    steps = []
    with pytest.raises(RequestError):
        search(
            ends,
            data.val,
            [THREAT],
            method=method,
            calibrate_on=data.train.first(64),
            learn_settings=LearnSettings(epochs=1, **{"clean_limit": None, **settings}),
            on_progress=lambda *figures: steps.append(figures),
            steps=1,
            samples=20,
        )
    assert not steps


@pytest.mark.parametrize(
    "changes", [{"also": ["L2 0.5"], "combine": "mean"}, {"clean_limit": 2.0}], ids=str
)
def test_the_soup_learned_without_an_attack_has_no_settings_of_attacks(ends, data, changes):
    settings = LearnSettings(epochs=1, attack_steps=1, **changes)
    arguments = {"calibrate_on": data.train.first(64), "steps": 1, "samples": 20}
    found = search(ends, data.val, [THREAT], method="learned", learn_settings=settings, **arguments)
    plain = search(
        ends, data.val, [THREAT], method="learned", **{**arguments, **LEARNED, "samples": 20}
    )
    assert torch.equal(found.candidates[0].mixed_by.alpha, plain.candidates[0].mixed_by.alpha)
    assert not torch.equal(found.candidates[3].mixed_by.alpha, plain.candidates[3].mixed_by.alpha)
    assert found.candidates[0].description.endswith("learned against clean")
    for threat in changes.get("also", ()):
        assert found.candidates[3].description.endswith(f" and {threat}")


def test_the_soup_learned_without_an_attack_recalibrates_without_one(ends, data):
    policy = LearnSettings(epochs=1, attack_steps=1, buffers="recalibrate-adversarial")
    arguments = {"calibrate_on": data.train.first(64), "steps": 1, "samples": 20}
    found = search(ends, data.val, [THREAT], method="learned", learn_settings=policy, **arguments)
    policies = [c.mixed_by.record["learning"]["buffers"] for c in found.candidates]
    assert policies == ["recalibrate", *["recalibrate-adversarial"] * 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"affine": True, "buffers": "average"}, "averaged variances can turn negative"),
        ({"init": "0.2,0.3,0.5"}, "init: got 3 weights, expected 2"),
        ({"schedule": "linear"}, "schedule: got 'linear'"),
        ({"granularity": "layer"}, 'granularity: got "layer"'),
        ({"granularity": "re:nothing"}, "matches no parameter"),
        ({"early_stop": {"samples": 30}}, "requested 30 samples, expected 1 to 20"),
        ({"transform": "nowhere:flip"}, "nowhere"),
    ],
    ids=str,
)
def test_settings_that_learning_cannot_take_are_refused_before_any_work(
    ingredients, data, monkeypatch, settings, message
):
    monkeypatch.setattr("robustsoup.soups.soup_evaluator.evaluate", None)
    arguments = {"method": "learned", "calibrate_on": data.train, "samples": 20}
    with pytest.raises(RobustsoupError, match=message):
        search(ingredients, data.val, WEAK, learn_settings=LearnSettings(**settings), **arguments)


@pytest.mark.parametrize("method", ["learned", "dial", "all", "fisher", "regmean"])
def test_soups_are_not_fitted_to_the_samples_that_choose_them(ends, data, method):
    arguments = {"method": method, "steps": 1, "samples": 20}
    with pytest.raises(LeakageError, match="got 20 samples of val that choose or report a soup"):
        search(ends, data.val, [THREAT], calibrate_on=data.val, **arguments)
    with pytest.raises(LeakageError, match="samples of test that choose or report a soup"):
        search(ends, data.val, [THREAT], calibrate_on=data.test, report_on=data.test, **arguments)


def test_joined_and_redrawn_splits_are_searched_for_the_samples_that_choose(ends, data):
    arguments = {"method": "learned", "steps": 1, "samples": 20}
    for fitted in (data.unsplit(), load_data("digits", seed=1).train):
        shared = len(set(fitted.ids.tolist()) & set(data.val.first(20).ids.tolist()))
        with pytest.raises(LeakageError, match=f"got {shared} samples of val that choose"):
            search(ends, data.val, [THREAT], calibrate_on=fitted, **arguments)
    with pytest.raises(RequestError, match="report_on: got 20 samples of val"):
        search(ends, data.val, [THREAT], report_on=data.unsplit(), samples=20)


def test_ingredients_of_another_split_are_merged_if_leakage_is_allowed(ends, data):
    other = {"data": load_data("digits", seed=1).record}
    items = [ends[0], ends[1].with_provenance(**other)]
    arguments = {"steps": 1, "samples": 20, "calibrate_on": data.train, "measure_samples": 8}
    with pytest.raises(LeakageError, match="was trained on another split"):
        search(items, data.val, [THREAT], method="fisher", **arguments)
    found = search(items, data.val, [THREAT], method="fisher", allow_leakage=True, **arguments)
    assert found.candidates


def test_statistics_are_not_measured_on_the_samples_that_choose(ends, data):
    arguments = {"method": "uniform", "steps": 1, "samples": 20, "buffers": "recalibrate"}
    with pytest.raises(LeakageError, match="got 20 samples of val that choose or report a soup"):
        search(ends, data.val, [THREAT], calibrate_on=data.val, **arguments)
    allowed = {**arguments, "allow_leakage": True}
    assert search(ends, data.val, [THREAT], calibrate_on=data.val, **allowed).candidates


def test_adversarial_calibration_is_under_the_first_threat_of_the_search(ends, data):
    train = data.train.first(64)
    arguments = {"method": "uniform", "steps": 1, "samples": 20, "calibrate_on": train}
    policy = "recalibrate-adversarial"
    found = search(ends, data.val, ["clean", "L2 1", THREAT], buffers=policy, **arguments)
    soup = mix(ends, [0.5, 0.5], buffers=policy, calibrate_on=train, threat="L2 1", seed=0)
    for name, tensor in found.make_soup().tensors.items():
        assert torch.equal(tensor, soup.tensors[name]), name
    expected = evaluate(soup, data.val.first(20), ["L2 1"], steps=1)
    assert torch.equal(found.chosen.evaluation.margin, expected.margin)


def test_statistics_are_measured_under_attack_where_finalists_are_confirmed_too(
    ingredients, data, monkeypatch
):
    threats = []

    def record_threat(soup):
        threats.append(str(soup.calibration.threat))
        return Buffers({})

    monkeypatch.setitem(sys.modules, "own_policies", SimpleNamespace(record=record_threat))
    arguments = {"method": "greedy", "require": [f"{WEAK[0]}>=0"], "samples": 12, "steps": 1}
    arguments |= {"buffers": "own_policies:record", "masking_check": False}
    arguments["require"] = [*arguments["require"], "clean>=0"]
    found = search(ingredients, data.val, WEAK, **arguments)
    assert set(threats) == set(WEAK)
    assert any("hold together" in gap for gap in found.answer.guarantee.leaves_out)

"""Search by surrogate in a run: what is attacked, what is stored, and how a killed run resumes."""

import json

import numpy as np
import pytest
from tiny_runs import FEW_SAMPLES, RecordingReporter, recipe_of_files, run_recipe

from robustsoup.errors import RobustsoupError
from robustsoup.reports import write_report
from robustsoup.runs.results import Results
from robustsoup.runs.run import prepare_run
from robustsoup.runs.store import Store
from robustsoup.runs.worker import load_hits
from robustsoup.soups.screening import EvaluationRequest

THREAT = "Linf 32/255"
SOUPS = {"map": {"method": "surrogate", "step": 0.1}}


def make_recipe(files, evaluate=FEW_SAMPLES, **changes):
    soups = {"map": SOUPS["map"] | changes}
    return recipe_of_files(files, soups=soups, select={"require": ["clean>=0"]}, evaluate=evaluate)


@pytest.fixture(scope="module")
def surrogate_run(finished, tmp_path_factory):
    """A search that settles soon, since 20 points are as good: recipe, folder, choice, reporter."""
    place = tmp_path_factory.mktemp("surrogate")
    recipe = make_recipe(finished.folder / "checkpoints", tolerance=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTSOUP_STORE", str(place / "store"))
        _, selection, reporter = run_recipe(recipe, place / "run")
    return recipe, place / "run", selection, reporter


@pytest.fixture
def same_store(surrogate_run, monkeypatch):
    """Let the test use the store of the finished search."""
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(surrogate_run[1].parent / "store"))


def test_few_soups_are_attacked_and_all_are_predicted(surrogate_run):
    _, folder, selection, _ = surrogate_run
    results = Results.load(folder / "results.json")
    (surrogate,) = results.surrogates
    attacked = [row.name for row in results.rows if row.soup == "map"]
    assert surrogate["attacked"] == len(attacked) < surrogate["soups"] == 11
    rows = {row["name"]: row for row in surrogate["rows"]}
    assert len(rows) == 11
    assert {name for name, row in rows.items() if row["attacked"]} == set(attacked)
    assert selection.best.name in attacked
    for row in rows.values():
        band = row["predicted"][THREAT]
        assert 0 <= band["low"] <= band["value"] <= band["high"] <= 1
    for row in results.rows:
        if row.soup == "map":
            assert rows[row.name]["clean"] == row.val["clean"].to_json()
    assert surrogate["message"].startswith(f"map: attacked {len(attacked)} of 11 soups")


@pytest.fixture
def run_on_a_part(finished, tmp_path, monkeypatch):
    """A search that attacks soups on 24 of 72 samples first, and is content with any answer."""
    monkeypatch.setattr("robustsoup.soups.surrogate_search.SMALLEST_PART", 24)
    evaluate = FEW_SAMPLES | {"select_samples": 72}
    recipe = make_recipe(finished.folder / "checkpoints", evaluate, tolerance=0.999)
    _, selection, reporter = run_recipe(recipe, tmp_path / "run")
    return recipe, tmp_path / "run", selection, reporter


def test_soups_attacked_on_a_part_have_estimates_and_are_not_chosen(run_on_a_part):
    _, folder, selection, _ = run_on_a_part
    results = Results.load(folder / "results.json")
    rows = [row for row in results.rows if row.soup == "map"]
    (surrogate,) = results.surrogates
    in_full = [row for row in rows if not row.screened]
    assert (surrogate["in_full"], surrogate["attacked"]) == (len(in_full), len(rows)) == (2, 6)
    assert surrogate["part"] == 24
    assert f"{len(in_full)} on all 72 samples and the others on 24" in surrogate["message"]
    assert {row.name for row in in_full} == {"map-1-0", "map-0-1"}
    assert selection.best.name in {"map-1-0", "map-0-1"}
    for row in rows:
        assert row.attacked == (24 if row.screened else None)
        assert row.left_after is None
        assert row.doubt == (
            ""
            if not row.screened
            else "robust accuracies are estimates: 24 samples were attacked in full"
        )
    best = max(row.val[THREAT].value for row in in_full)
    assert selection.best.evaluation.accuracy[THREAT].value == best


def test_completing_an_attack_on_a_part_is_the_step_that_a_grid_asks_for(run_on_a_part):
    planner = prepare_run(run_on_a_part[0], device="cpu").planner
    row, settings = planner.plan.row("map-0-1"), planner.selecting_settings()
    part = EvaluationRequest("map-0-1", subset=24)
    begun = planner.add_evaluation("x", row.network, settings, part)
    completed = planner.add_evaluation(
        "x", row.network, settings, EvaluationRequest("map-0-1", after=part)
    )
    assert completed == planner.add_evaluation("x", row.network, settings) != begun
    soup = planner.plan.rows[-1]
    completed = planner.add_evaluation(
        "y", soup.network, settings, EvaluationRequest(soup.name, after=part)
    )
    assert planner.plan.step(completed).parts == (
        planner.add_evaluation("y", soup.network, settings, part),
    )


def test_a_search_on_a_part_resumes_with_the_same_requests(run_on_a_part, tmp_path):
    recipe, folder, *_ = run_on_a_part
    again = run_recipe(recipe, tmp_path / "again")[2]
    assert not any(again.missing)
    assert Results.load(tmp_path / "again" / "results.json").surrogates == (
        Results.load(folder / "results.json").surrogates
    )


def test_the_ingredients_are_not_evaluated_twice(surrogate_run):
    _, _, _, reporter = surrogate_run
    names = [name for _, name in reporter.finished_steps]
    assert len(names) == len(set(names))
    assert not {"map-1-0.val", "map-0-1.val"} & set(names)


@pytest.mark.usefixtures("same_store")
def test_the_same_run_repeats_no_step_and_gives_the_same_answer(surrogate_run):
    recipe, folder, selection, _ = surrogate_run
    before = json.loads((folder / "results.json").read_text())
    _, again, reporter = run_recipe(recipe, folder)
    after = json.loads((folder / "results.json").read_text())
    assert reporter.finished_steps == []
    assert again.best.name == selection.best.name
    assert after["surrogates"] == before["surrogates"]


def test_a_killed_search_resumes_with_the_same_soups(surrogate_run, tmp_path):
    recipe, folder, _, _ = surrogate_run
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "run", RecordingReporter(stop_after=9))
    run_recipe(recipe, tmp_path / "run")
    results, whole = (Results.load(f / "results.json") for f in (tmp_path / "run", folder))
    assert results.surrogates == whole.surrogates


def test_a_surrogate_does_not_go_with_screening(files):
    evaluate = FEW_SAMPLES | {"screen": True}
    with pytest.raises(RobustsoupError, match=r"soups.map: .*remove evaluate.screen"):
        recipe_of_files(files, soups=SOUPS, evaluate=evaluate)


@pytest.mark.parametrize("text", ["soon", "0s", "30", "5m3"])
def test_a_time_limit_that_is_none_is_refused(files, text):
    with pytest.raises(RobustsoupError, match="expected a time such as 90s, 30m or 1h30m"):
        make_recipe(files, time_limit=text)


@pytest.mark.usefixtures("same_store")
def test_the_step_with_the_clean_verdicts_holds_every_soup(surrogate_run):
    planner = prepare_run(surrogate_run[0], device="cpu").planner
    table = load_hits(Store(), planner.plan.surrogates["map"])
    assert len(table.names) == 11
    assert table.hits["clean"].shape == (11, 64)
    assert np.allclose(table.coefficients.sum(1), 1)


def test_a_requirement_under_attack_is_confirmed_on_samples_kept_aside(finished, tmp_path):
    """The surrogate sees two thirds of the samples; bounds on clean accuracy count all soups."""
    recipe = recipe_of_files(
        finished.folder / "checkpoints",
        soups={"map": SOUPS["map"] | {"tolerance": 0.2}},
        select={"maximise": "clean", "require": [f"{THREAT}>=0.01", "clean>=0.05"]},
        evaluate=FEW_SAMPLES | {"select_samples": 63},
    )
    results, selection, _ = run_recipe(recipe, tmp_path / "run")
    answer = results["selection"]
    assert {row["val"]["clean"]["n"] for row in results["rows"]} == {42}
    tested, measured = answer["checks"]
    assert (tested["estimate"]["n"], measured["estimate"]["n"]) == (21, 63)
    assert answer["guarantee"]["candidates"] == 11
    assert answer["accuracy"][THREAT]["n"] == 21
    assert selection.best.name == answer["chosen"]


def test_one_split_has_one_evaluation_of_a_soup_however_often_it_runs(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("robustsoup.soups.surrogate_search.SMALLEST_PART", 24)
    evaluate = FEW_SAMPLES | {"report_samples": 72, "report": "all"}
    recipe = recipe_of_files(
        finished.folder / "checkpoints",
        protocol="paper",
        soups={"map": SOUPS["map"] | {"tolerance": 0.999}},
        select={},
        evaluate=evaluate,
    )
    for _ in range(2):
        _, selection, _ = run_recipe(recipe, tmp_path / "run")
        results = Results.load(tmp_path / "run" / "results.json")
        measured = [row for row in results.rows if row.soup == "map"]
        assert len(measured) > 2
        assert not any(row.screened for row in measured)
        assert {item.name for item in selection.ranking} == {row.name for row in measured}
        assert results.selection.fresh_split is None
        write_report(tmp_path / "run")

"""Screening in a run: short attacks first, then confirmations of possible winners."""

import shutil

import pytest
import tiny_runs
from tiny_runs import DATA, SCREENED, RecordingReporter, recipe_of, recipe_of_files, run_recipe

import robustsoup as rs
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.recipes import load_recipe
from robustsoup.soups.confirmation import confirm_part

THREAT = "Linf 32/255"
SOUPS = {"grid-0.25-0.75", "grid-0.5-0.5", "grid-0.75-0.25"}


def test_a_screened_run_marks_upper_bounds_and_chooses_a_confirmed_soup(screened):
    results, folder = screened.results, screened.folder
    assert results["protocol"]["screened"] is True
    rows = {row["name"]: row for row in results["rows"]}
    marked = {name for name, row in rows.items() if row.get("screened")}
    evaluations = {
        name: Evaluation.load(folder / "evaluations" / f"{name}.val.json") for name in rows
    }
    assert marked <= SOUPS
    for name, evaluation in evaluations.items():
        record = evaluation.record
        assert evaluation.to_json()["accuracy"] == rows[name]["val"]
        assert (name in marked) == bool(record.get("screened"))
        assert record["steps"] == (2 if record.get("screened") else 3)
        assert "pool" in record["broken_by"]
        report = Evaluation.load(folder / "evaluations" / f"{name}.test.json").record
        assert (report["steps"], report["broken_by"]) == (3, ["clean", "apgd-ce"])
        assert not report.get("screened")
    chosen = screened.selection.best
    assert chosen.confirmed
    assert chosen.name not in marked
    # The figures of marked soups are upper bounds, and even these do not win.
    best = rows[chosen.name]["val"][THREAT]["hits"]
    assert all(rows[name]["val"][THREAT]["hits"] <= best for name in marked)
    assert load_recipe(folder / "recipe.toml") == recipe_of(SCREENED)
    assert tiny_runs.find_leftovers(folder) == []


def test_confirmations_follow_the_screening(screened):
    first, *confirmations = screened.reporter.missing
    assert sum(confirmations, first) == screened.reporter.finished_steps
    for batch in confirmations:
        assert {name for _, name in batch} <= {f"{name}.val" for name in SOUPS}


@pytest.mark.parametrize("require", [["clean>=0"], [f"{THREAT}>=0"]])
def test_a_screened_recipe_decides_as_search_does(files, tmp_path, require):
    """With a robust requirement, search confirms a front; with a clean one, possible winners."""
    evaluate = {"threats": [THREAT], "steps": 3, "screen": True, "screen_steps": 1}
    samples = {"select_samples": 64, "report_samples": 16, "report": "chosen"}
    recipe = recipe_of_files(files, select={"require": require}, evaluate=evaluate | samples)
    results, selection, _ = run_recipe(recipe, tmp_path / "run")
    candidates = rs.search(
        [files / f"{name}.safetensors" for name in ("low", "high")],
        DATA.val,
        [THREAT],
        step=0.5,
        steps=3,
        samples=64,
        screen=True,
        screen_steps=1,
        maximise=THREAT,
        require=require,
        device="cpu",
    ).candidates
    rows = {row["name"]: row for row in results["rows"]}
    for candidate in candidates:
        row = rows[f"grid-{candidate.name}"]
        assert row["val"] == candidate.evaluation.to_json()["accuracy"]
        assert row.get("screened", False) != candidate.confirmed
    chosen = rs.select(candidates, maximise=THREAT, require=require)
    assert selection.best.name == f"grid-{chosen.best.name}"


def test_confirmed_accuracies_are_at_most_those_of_a_full_run(screened, finished):
    full = {row["name"]: row["val"][THREAT]["hits"] for row in finished.results["rows"]}
    for row in screened.results["rows"]:
        hits = row["val"][THREAT]["hits"]
        if row["name"] in full and not row.get("screened"):
            assert hits <= full[row["name"]]  # the points of the pool come on top of the attack
        assert row["val"]["clean"]["hits"] >= hits


def test_running_a_screened_run_again_executes_no_step(screened, tmp_path):
    shutil.copytree(screened.store, tmp_path / "store")
    before = tiny_runs.modification_times(tmp_path / "store")
    results, selection, reporter = run_recipe(recipe_of(SCREENED), tmp_path / "run")
    assert reporter.finished_steps == []
    assert not any(reporter.missing)
    assert tiny_runs.modification_times(tmp_path / "store") == before
    assert results["rows"] == screened.results["rows"]
    assert selection.best.name == screened.selection.best.name


def test_a_screened_run_can_report_the_chosen_soup_alone(screened, tmp_path):
    shutil.copytree(screened.store, tmp_path / "store")
    recipe = recipe_of([*SCREENED, (("evaluate", "report"), "chosen")])
    results, selection, reporter = run_recipe(recipe, tmp_path / "run")
    assert reporter.finished_steps == []
    assert [row["name"] for row in results["rows"] if row["test"]] == [selection.best.name]


def test_an_interrupted_screened_run_resumes(finished, screened, tmp_path):
    shutil.copytree(finished.store, tmp_path / "store")
    for stop_after in (2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe_of(SCREENED), tmp_path / "run", RecordingReporter(stop_after))
    results, _, reporter = run_recipe(recipe_of(SCREENED), tmp_path / "run")
    steps = len(screened.reporter.finished_steps)
    assert 2 + 3 + 4 + len(reporter.finished_steps) == steps
    assert results["rows"] == screened.results["rows"]


def test_a_requirement_under_attack_is_confirmed_on_samples_kept_aside(files, tmp_path):
    """The rows hold the two thirds that steered the search, the answer holds the other third."""
    evaluate = {"threats": [THREAT], "steps": 3, "screen": True, "screen_steps": 1}
    samples = {"select_samples": 63, "report_samples": 16, "report": "chosen"}
    wanted = {"maximise": "clean", "require": [f"{THREAT}>=0.01"]}
    recipe = recipe_of_files(files, select=wanted, evaluate=evaluate | samples)
    results, selection, reporter = run_recipe(recipe, tmp_path / "run")
    answer = results["selection"]
    assert {row["val"]["clean"]["n"] for row in results["rows"]} == {42}
    assert answer["accuracy"]["clean"]["n"] == answer["checks"][0]["estimate"]["n"] == 21
    assert all(item["differences"]["clean"]["a"]["n"] == 21 for item in answer["against"])
    assert "fixed sequence" in answer["guarantee"]["method"]
    assert answer["guarantee"]["candidates"] == 3
    confirmed = {name for _, name in reporter.finished_steps if ".confirm" in name}
    assert f"{selection.best.name}.confirm.val" in confirmed or selection.best.ingredient
    folder = tmp_path / "run" / "evaluations"
    ids = Evaluation.load(folder / "low.val.json").ids
    aside = confirm_part(DATA.val.first(63).ids, seed=0)
    assert ids.tolist() == DATA.val.first(63).ids[~aside].tolist()
    again, _, reporter = run_recipe(recipe, tmp_path / "run")
    assert reporter.finished_steps == []
    assert again["selection"] == answer


@pytest.mark.parametrize(
    ("select", "confirms"),
    [
        ({"require": [f"{THREAT}>=0.3"]}, True),
        ({"require": ["clean>=0.3"]}, False),
        ({"require": [f"{THREAT}>=0.3"], "point": True}, False),
    ],
)
def test_only_proofs_under_attack_need_samples_kept_aside(files, select, confirms):
    screen = {"threats": [THREAT], "screen": True}
    assert recipe_of_files(files, select=select, evaluate=screen).confirms == confirms
    in_full = {"threats": [THREAT]}
    assert not recipe_of_files(files, select=select, evaluate=in_full).confirms
    greedy = {"greedy": {"method": "greedy"}}
    recipe = recipe_of_files(files, select=select, evaluate=in_full, soups=greedy)
    assert recipe.confirms == confirms

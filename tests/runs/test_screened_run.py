"""Screening in a run: short attacks first, then confirmations of possible winners."""

import shutil

import pytest
import tiny_runs
from tiny_runs import DATA, SCREENED, RecordingReporter, recipe_of, recipe_of_files, run_recipe

import robustsoup as rs
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.recipes import load_recipe

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
        assert (name in marked) == bool(record.get("screened") or record.get("stopped"))
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

"""A time limit in a run: which soups are left out, by a clock that the test turns."""

import itertools
import json
import re

import pytest
from tiny_runs import FEW_SAMPLES, recipe_of_files, run_recipe

from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.runs.results import Results
from robustsoup.soups import time_limit

THREAT = "Linf 32/255"


@pytest.fixture
def ticks(monkeypatch):
    """Let every look at the clock take a second: a soup takes one, and so does the next start."""
    counter = itertools.count()
    monkeypatch.setattr(time_limit, "clock", lambda: float(next(counter)))


def make_recipe(files, soups, **evaluate):
    return recipe_of_files(
        files, soups=soups, select={"require": ["clean>=0"]}, evaluate=FEW_SAMPLES | evaluate
    )


def load_results(folder):
    return Results.load(folder / "results.json")


def verdicts_of(folder, name):
    return Evaluation.load(folder / "evaluations" / f"{name}.val.json").to_json()


@pytest.mark.usefixtures("ticks")
def test_soups_that_come_too_late_are_left_out_and_counted(files, tmp_path):
    grid = {"method": "grid", "step": 0.1}
    limited = make_recipe(files, {"map": grid | {"time_limit": "7s"}})
    _, selection, _ = run_recipe(limited, tmp_path / "limited")
    results = load_results(tmp_path / "limited")
    soups = [row.name for row in results.rows if row.soup]
    # the ends and the soup between them begin 1, 3 and 5 seconds after the start
    assert sorted(soups) == ["map-0-1", "map-0.5-0.5", "map-1-0"]
    assert selection.best.name in soups
    answer = results.selection
    assert (answer.left_out, answer.unfinished) == (8, 0)
    assert answer.guarantee.candidates == 3
    assert "the time limit left out 8 soups that no attack was tried on" in answer.lines()
    # those that were judged have the verdicts of a search without a limit
    _, _, reporter = run_recipe(make_recipe(files, {"map": grid}), tmp_path / "whole")
    later = [name for _, name in reporter.finished_steps if re.fullmatch(r"map-.*\.val", name)]
    assert len(later) == 8
    assert not {f"{name}.val" for name in soups} & {*later}
    assert load_results(tmp_path / "whole").selection.left_out == 0
    for name in soups:
        limited_verdicts = verdicts_of(tmp_path / "limited", name)
        assert limited_verdicts == verdicts_of(tmp_path / "whole", name)


@pytest.mark.usefixtures("ticks")
def test_the_first_soup_is_evaluated_whatever_the_limit(files, tmp_path):
    soups = {"half": {"method": "uniform", "time_limit": "1s"}}
    _, selection, _ = run_recipe(make_recipe(files, soups), tmp_path / "run")
    assert selection.best.name == "half"
    assert load_results(tmp_path / "run").selection.left_out == 0


@pytest.mark.usefixtures("ticks")
def test_a_race_that_comes_to_no_end_is_said_to(files, tmp_path):
    """All soups begin in time, and the last second is over before one is attacked in full."""
    soups = {"map": {"method": "grid", "step": 0.25, "time_limit": "10s"}}
    evaluate = {"screen": True, "screen_steps": 1}
    _, selection, _ = run_recipe(make_recipe(files, soups, **evaluate), tmp_path / "run")
    results = load_results(tmp_path / "run")
    answer = results.selection
    assert answer.left_out == 0
    screened = [row.name for row in results.rows if row.screened]
    assert selection.best.name not in screened
    assert answer.unfinished <= len(screened)
    assert any("could still win" in line for line in answer.lines()) == (answer.unfinished > 0)


@pytest.mark.usefixtures("ticks")
def test_a_dial_is_learned_once_and_its_positions_have_the_limit(files, tmp_path):
    dial = {"method": "dial", "epochs": 1, "at": [0, 0.5, 1], "threats": [THREAT]}
    soups = {"dial": dial | {"time_limit": "6s"}}
    run_recipe(make_recipe(files, soups), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["name"] for row in results["rows"] if row.get("soup")] == ["dial-t0", "dial-t0.5"]
    assert results["selection"]["left_out"] == 1


@pytest.mark.usefixtures("ticks")
def test_the_surrogate_stops_at_the_limit(files, tmp_path):
    soups = {"map": {"method": "surrogate", "step": 0.1, "time_limit": "6s"}}
    run_recipe(make_recipe(files, soups), tmp_path / "run")
    results = load_results(tmp_path / "run")
    (surrogate,) = results.surrogates
    assert results.selection.left_out == 6
    assert (surrogate["stage"], surrogate["attacked"]) == ("late", 5)

"""evaluate --shift: accuracy on corrupted copies of the test set."""

import json

import numpy
from command_line import run
from corruptions import write_corruptions


def test_evaluate_prints_and_records_natural_shift(here, capsys):
    write_corruptions(here / "digits-c")
    command = ("evaluate", "low.safetensors", "--data", "digits", "--shift", "digits-c")
    assert run(*command, "--samples", 40, "-o", "out") == 0
    printed = capsys.readouterr().out
    assert "low, natural shift, all corruptions " in printed
    assert "low, natural shift, black at severity 1 to 5: " in printed
    content = json.loads((here / "out" / "low.test.json").read_text())
    assert set(content["shift"]["corruptions"]) == {"none", "black"}
    assert run(*command, "--split", "val") == 2
    assert "--shift: applies to --split test, got val" in capsys.readouterr().err


SEARCH = ("search", "low.safetensors", "high.safetensors", "--data", "digits", "--step", "0.5")


def test_search_chooses_by_natural_shift_and_reports_it(here, capsys):
    write_corruptions(here / "digits-c")
    goal = ("--maximise", "shift", "--require", "shift>=0.01", "--threat", "clean", "--point")
    command = (*SEARCH, *goal, "--samples", 60, "-o", "best", "--shift", "digits-c")
    assert run(*command) == 0
    capsys.readouterr()
    results = json.loads((here / "best" / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    soups = [row for row in rows.values() if row["role"] == "grid"]
    assert all(row["val"]["shift"]["n"] == 60 for row in rows.values())
    chosen = rows[results["selection"]["chosen"]]
    best = max(row["val"]["shift"]["hits"] for row in soups)
    assert chosen["val"]["shift"]["hits"] == best
    name = results["selection"]["chosen"]
    parts = {
        split: json.loads((here / "best" / "evaluations" / f"{name}.{split}.json").read_text())
        for split in ("val", "test")
    }
    assert parts["val"]["shift"]["part"] == "select"
    assert parts["test"]["shift"]["part"] == "report"
    page = (here / "best" / "report.html").read_text()
    assert "shift, test" in page
    assert "Selected by corrupted copies of half of the test images" in page
    card = (here / "best" / "README.md").read_text()
    assert "selected by corrupted copies of half of the test images" in card
    assert "which chose nothing" not in card
    assert run(*SEARCH, *goal, "-o", "none") == 2
    assert "is not evaluated; expected one of clean; set evaluate.shift" in capsys.readouterr().err


def test_another_content_of_the_folder_is_evaluated_anew(here, capsys):
    folder = write_corruptions(here / "digits-c")
    command = (*SEARCH, "--threat", "clean", "--samples", 40, "-o", "best", "--shift", "digits-c")
    for changed in (False, True):
        assert run(*command) == 0
        capsys.readouterr()
        if changed:
            numpy.save(folder / "black.npy", numpy.load(folder / "none.npy"))
        assert run(*command) == 0
        assert ("evaluate low.val" in capsys.readouterr().err) == changed

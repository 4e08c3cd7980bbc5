"""robustsoup run, plan and report."""

import json
import re
import shutil
from pathlib import Path

from command_line import RECIPE, run

from robustsoup.cli import recipe_runs
from robustsoup.errors import StorageError


def test_plan_and_run_print_json(here, capsys):
    (here / "two.toml").write_text(RECIPE)
    assert run("plan", "two.toml", "--json") == 0
    before = json.loads(capsys.readouterr().out)
    assert [step["done"] for step in before["steps"]] == [False] * 7
    assert before["seconds"] > 0
    assert run("run", "two.toml", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in output["rows"]] == ["low", "high", "flat"]
    assert (here / "runs" / "two" / "report.html").is_file()
    assert run("plan", "two.toml", "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert [step["key"] for step in after["steps"]] == [step["key"] for step in before["steps"]]
    assert all(step["done"] for step in after["steps"])
    assert after["seconds"] == 0
    assert run("plan", "two.toml", "--set", "evaluate.steps=3") == 0
    assert "7 steps, 6 to do" in capsys.readouterr().out


def refuse_to_write(folder):
    raise StorageError(f"{folder}: the disk is full")


def test_report_needs_only_stored_results(here, capsys, monkeypatch):
    (here / "two.toml").write_text(RECIPE)
    assert run("run", "two.toml", "-o", "two") == 0
    page = (here / "two" / "report.html").read_text()
    answer, report = capsys.readouterr().out.splitlines()[-2:]
    assert report.startswith("report: ")
    shutil.rmtree(here / "two" / "figures", ignore_errors=True)
    (here / "two" / "report.html").unlink()
    with monkeypatch.context() as patch:  # the answer is printed before the report is drawn
        patch.setattr(recipe_runs, "write_report", refuse_to_write)
        assert run("run", "two.toml", "-o", "two") == 1
    assert capsys.readouterr().out.splitlines()[-1] == answer
    for name in ("low", "high"):
        (here / f"{name}.safetensors").unlink()
    assert run("report", "two") == 0
    assert str(Path("two") / "report.html") in capsys.readouterr().out
    again = (here / "two" / "report.html").read_text()
    assert re.findall(r"<h\d[^>]*>(.*?)</h\d>", again) == re.findall(r"<h\d[^>]*>(.*?)</h\d>", page)

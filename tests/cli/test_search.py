"""robustsoup search: methods, requirements, screening and the exit code."""

import json
import re
import shutil

import pytest
from command_line import FEW, LINF, PAIR, SEARCH, run

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.soups.mixing import mix


def find_chosen(output):
    return next(row for row in output["rows"] if row["name"] == output["selection"]["chosen"])


def test_the_written_soup_is_the_chosen_mix(here, capsys):
    command = (*SEARCH, "--require", "clean>=0", "-o", "best")
    assert run(*command, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["selection"]["met"] is True
    assert output["selection"]["require"] == ["clean>=0"]
    chosen = find_chosen(output)
    assert chosen["test"]["clean"]["n"] == 64
    soup = Checkpoint.load(here / "best" / output["soup"])
    assert soup.digest == mix(PAIR, chosen["coefficients"], buffers="average").digest
    assert (here / "best" / "report.html").is_file()
    assert run(*command) == 0
    assert "to do" not in capsys.readouterr().err


def test_a_greedy_search_chooses_the_greedy_soup(here, capsys):
    score = "0.5 clean + 0.5 Linf 32/255"
    command = ("search", *PAIR, *LINF, *FEW, "--method", "greedy", "--score", score)
    assert run(*command, "--json", "-o", "best") == 0
    output = json.loads(capsys.readouterr().out)
    row = next(row for row in output["rows"] if row["role"] == "greedy")
    assert sum(row["coefficients"]) == pytest.approx(1)
    assert output["selection"]["chosen"] == "greedy"
    assert (here / "best" / "soup.safetensors").exists()
    assert "greedy" in (here / "best" / "report.html").read_text()


def test_a_screened_search_confirms_what_it_chooses(here, capsys):
    command = ("search", *PAIR, *LINF, "--steps", 12, "--samples", 64, "--step", 0.25, "--screen")
    assert run(*command, "--json", "-o", "best") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["protocol"]["screened"] is True
    chosen = find_chosen(output)
    assert not chosen.get("screened")
    assert chosen["test"]["clean"]["n"] == 64
    soup = Checkpoint.load(here / "best" / output["soup"])
    assert soup.digest == mix(PAIR, chosen["coefficients"], buffers="average").digest
    assert run(*command, "-o", "best") == 0
    assert "to do" not in capsys.readouterr().err


def test_a_requirement_that_nothing_meets_is_exit_code_3(here, capsys):
    impossible = (*SEARCH, "--require", "clean>=1", "-o", "best")  # no lower bound reaches 1
    assert run(*impossible) == 3
    output = capsys.readouterr().out
    assert re.search(r"no candidate meets clean>=1 .*the closest is grid-", output)
    assert (here / "best" / "soup.safetensors").is_file()
    assert run(*impossible, "--json") == 3
    selection = json.loads(capsys.readouterr().out)["selection"]
    assert selection["met"] is False
    assert "no candidate meets" in selection["message"]


@pytest.mark.parametrize(("method", "count"), [("uniform", 1), ("line", 3), ("grid", 3)])
def test_a_method_tries_its_soups(here, capsys, method, count):
    assert run(*SEARCH, "--method", method, "--json", "-o", method) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len([row for row in rows if row["role"] == method]) == count


def test_an_ingredient_may_have_the_name_of_a_method(here, capsys):
    shutil.copy("low.safetensors", "uniform.safetensors")
    command = ("search", "uniform.safetensors", "high.safetensors", *LINF, *FEW)
    assert run(*command, "--method", "uniform", "--json", "-o", "best") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len({row["name"] for row in rows}) == len(rows) == 3
    low = Evaluation.load("best/evaluations/uniform.val.json").record["checkpoint"]
    assert low == Checkpoint.load("low.safetensors").digest

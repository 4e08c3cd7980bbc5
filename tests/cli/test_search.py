"""robustsoup search: methods, requirements, screening and the exit code."""

import json
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import FEW, LINF, PAIR, SEARCH, run

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli.inputs import name_checkpoints
from robustsoup.cli.searching import _name_section
from robustsoup.data import to_float
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.runs import run as running
from robustsoup.soups.answer import Answer
from robustsoup.soups.merging import merge
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
    too_much = "Linf 32/255>=0.9"  # networks of 2 channels are far from that
    impossible = (*SEARCH, "--require", too_much, "-o", "best")
    assert run(*impossible) == 3
    output = capsys.readouterr().out
    assert re.search(rf"no candidate meets {too_much} .*the closest is grid-", output)
    assert f"{too_much} is met by none" in output
    assert (here / "best" / "soup.safetensors").is_file()
    assert run(*impossible, "--json") == 3
    selection = json.loads(capsys.readouterr().out)["selection"]
    assert selection["met"] is False
    assert "no candidate meets" in selection["message"]
    assert Answer.from_json(selection).to_json() == selection


@pytest.mark.parametrize(("method", "count"), [("uniform", 1), ("line", 3), ("grid", 3)])
def test_a_method_tries_its_soups(here, capsys, method, count):
    steps = () if method == "uniform" else ("--step", 0.5)
    search = ("search", *PAIR, *LINF, *FEW, *steps, "--method", method)
    assert run(*search, "--json", "-o", method) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len([row for row in rows if row["role"] == method]) == count


def test_a_method_may_be_a_function_in_this_folder(here, capsys):
    code = "def halves(n, step, max_soups):\n    return [(1 / n,) * n]\n"
    (here / "halving_soups.py").write_text(code)
    search = ("search", *PAIR, *LINF, *FEW, "--method", "halving_soups:halves")
    assert run(*search, "--json", "-o", "best") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["coefficients"] for row in rows if row["coefficients"]] == [[0.5, 0.5]]


def test_an_ingredient_may_have_the_name_of_a_method(here, capsys):
    shutil.copy("low.safetensors", "uniform.safetensors")
    command = ("search", "uniform.safetensors", "high.safetensors", *LINF, *FEW)
    assert run(*command, "--method", "uniform", "--json", "-o", "best") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len({row["name"] for row in rows}) == len(rows) == 3
    low = Evaluation.load("best/evaluations/uniform.val.json").record["checkpoint"]
    assert low == Checkpoint.load("low.safetensors").digest


@pytest.mark.parametrize(
    ("checkpoint", "section"),
    [
        ("gridded", "grid"),
        ("Grid", "grid-soup"),
        ("grid-0.6-0.4", "grid-soup"),
        ("grid-soup-0.6-0.4", "grid-soup-soup"),
    ],
)
def test_the_soups_of_a_search_have_names_of_their_own(checkpoint, section):
    assert _name_section("grid", ["low", checkpoint]) == section


def test_checkpoints_that_differ_in_case_alone_get_different_names():
    paths = [Path("runs/1/Best.pt"), Path("runs/2/best.pt"), Path("runs/3/Pretrained.pt")]
    assert list(name_checkpoints(paths)) == ["Best", "2-best", "3-Pretrained"]


def test_a_requirement_that_fails_on_test_is_exit_code_4(here, capsys, monkeypatch):
    """Labels of the test set are changed, so that no network is right there."""
    load = running.load_recipe_data

    def load_with_wrong_test(*arguments, **more):
        data = load(*arguments, **more)
        networks = [Checkpoint.load(path).network().eval() for path in PAIR]
        with torch.no_grad():
            outputs = [network(to_float(data.test.images)).argmax(1) for network in networks]
        taken = torch.nn.functional.one_hot(torch.stack(outputs), 10).sum(0)
        wrong = taken.argmin(1)  # a class that neither predicts; a soup may
        return replace(data, test=replace(data.test, labels=wrong))

    monkeypatch.setattr(running, "load_recipe_data", load_with_wrong_test)
    command = ("search", *PAIR, *LINF, *FEW, "--step", 1, "--require", "clean>=0.05", "-o", "best")
    assert run(*command) == 4
    output = capsys.readouterr().out
    assert "clean>=0.05 did NOT hold on test: 0.0%, at least 0.0%" in output
    assert (here / "best" / "soup.safetensors").is_file()


def test_a_search_by_surrogate_says_what_it_attacked(here, capsys):
    command = ("search", *PAIR, *LINF, *FEW, "--method", "surrogate", "--step", 0.1)
    assert run(*command, "--tolerance", 0.2, "-o", "best") == 0
    output = capsys.readouterr()
    assert re.search(r"11 soups: about .*; --screen: .*; --method surrogate: ", output.err, re.M)
    assert re.search(
        r"^surrogate: attacked \d+ of 11 soups; another soup is more", output.out, re.M
    )
    content = json.loads((here / "best" / "results.json").read_text())
    (surrogate,) = content["surrogates"]
    assert 6 <= surrogate["attacked"] < 11
    chosen = find_chosen(content)
    soup = Checkpoint.load(here / "best" / content["soup"])
    assert soup.digest == mix(PAIR, chosen["coefficients"], buffers="average").digest
    assert run(*command, "--tolerance", 0.2, "-o", "best") == 0
    assert "to do" not in capsys.readouterr().err


def test_a_dial_is_turned_to_the_position_that_meets_the_requirement(here, capsys):
    command = ("search", *PAIR, *LINF, *FEW, "--method", "dial", "--epochs", 1, "--json")
    assert run(*command, "--require", "clean>=0.01", "--point", "-o", "best") == 0
    output = json.loads(capsys.readouterr().out)
    chosen = find_chosen(output)
    assert chosen["role"] == "dial"
    turned = f"the dial of low and high at t = {chosen['at']:g} (0 is robust, 1 is clean)"
    assert output["selection"]["description"] == turned
    positions = [row["at"] for row in output["rows"] if row["role"] == "dial"]
    assert positions == [number / 10 for number in range(11)]
    robust = {row["name"]: row["val"]["Linf 32/255"]["hits"] for row in output["rows"] if row["at"]}
    assert chosen["val"]["Linf 32/255"]["hits"] >= max(robust.values())


def test_all_methods_compete_on_one_front(here, capsys):
    command = ("search", *PAIR, *LINF, "--steps", 1, "--samples", 32, "--epochs", 1)
    assert run(*command, "--method", "all", "--step", 0.5, "--json", "-o", "best") == 0
    output = json.loads(capsys.readouterr().out)
    soups = {row["soup"] for row in output["rows"]} - {None}
    assert soups == {"surrogate", "learned", "dial", "greedy"}
    learned = [row["threat"] for row in output["rows"] if row["role"] == "learned"]
    assert learned == ["clean", "Linf 8/255", "Linf 16/255", "Linf 32/255", "Linf 64/255"]


def test_learning_needs_a_threat_and_screening_does_not_go_with_a_surrogate(here, capsys):
    clean = ("search", *PAIR, "--data", "digits", "--threat", "clean", *FEW, "-o", "best")
    assert run(*clean, "--method", "dial") == 2
    assert 'method "dial" learns under attack' in capsys.readouterr().err
    for method in ("surrogate", "all"):
        assert run(*SEARCH, "--method", method, "--screen", "-o", "best") == 2
        assert f"--screen: does not apply to --method {method}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "options", "arguments"),
    [
        ("ties", ("--density", 0.5), {"density": 0.5, "base": "base.safetensors"}),
        ("slerp", (), {}),
    ],
)
def test_a_merging_method_is_searched(here, capsys, method, options, arguments):
    if "base" in arguments:
        options = (*options, "--base", "base.safetensors")
    command = (*SEARCH, "--method", method, *options, "--json", "-o", "best")
    assert run(*command) in (0, 4)
    output = json.loads(capsys.readouterr().out)
    rows = [row for row in output["rows"] if row["role"] == "merge"]
    assert [row["coefficients"] for row in rows] == [[0, 1], [0.5, 0.5], [1, 0]]
    chosen = find_chosen(output)
    soup = Checkpoint.load(here / "best" / output["soup"])
    expected = merge(PAIR, method, chosen["coefficients"], buffers="average", **arguments)
    assert soup.digest == expected.digest
    assert f"{method} of" in output["selection"]["message"] or method in chosen["name"]


def test_a_measuring_method_is_searched_with_uniform_weights(here, capsys):
    options = ("--method", "fisher", "--weights", "uniform", "--measure-samples", 16)
    assert run(*SEARCH, *options, "--json", "-o", "best") in (0, 4)
    output = json.loads(capsys.readouterr().out)
    (row,) = [row for row in output["rows"] if row["role"] == "merge"]
    assert row["coefficients"] == [0.5, 0.5]
    assert row["threat"] == "Linf 32/255"
    record = Checkpoint.load(here / "best" / output["soup"]).provenance["merge"]
    assert record["threat"] == "Linf 32/255"
    assert record["measure_samples"] == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--density", 0.5), "--density: has no meaning with --method grid"),
        (("--weights", "uniform"), "--weights: has no meaning with --method grid"),
        (
            ("--base", "base.safetensors"),
            "--base: requires --buffers base or a --method that takes a base",
        ),
        (("--method", "slerp", "--scale", 2), "--scale: has no meaning with --method slerp"),
        (("--method", "greedy"), "--step: has no meaning with --method greedy"),
        (("--tolerance", 0.01), "--tolerance: has no meaning with --method grid"),
        (("--epochs", 3), "--epochs: has no meaning with --method grid"),
        (("--method", "swap"), "soups.swap.blocks: missing"),
        (("high.safetensors", "--method", "slerp"), "merges 2 ingredients, got 3"),
    ],
)
def test_options_of_other_methods_are_refused(here, capsys, options, message):
    shutil.copy("high.safetensors", "third.safetensors")
    options = tuple("third.safetensors" if o == "high.safetensors" else o for o in options)
    assert run(*SEARCH, *options, "-o", "best") == 2
    assert message in capsys.readouterr().err


def test_adversarial_calibration_is_under_the_threat_of_the_search(here):
    attack = ("--threat", "clean", "--threat", "L2 1", "--steps", 1, "--samples", 32)
    command = ("search", *PAIR, "--data", "digits", *attack, "--method", "uniform")
    assert run(*command, "--buffers", "recalibrate-adversarial", "-o", "best") == 0
    recipe = tomllib.loads((here / "best" / "recipe.toml").read_text())
    assert recipe["soups"]["uniform"]["calibrate_threat"] == "L2 1.0"


@pytest.mark.parametrize(
    "option", [("--method", "fisher"), ("--buffers", "recalibrate-adversarial")], ids=str
)
def test_what_attacks_training_samples_requires_a_threat(here, capsys, option):
    command = ("search", *PAIR, "--data", "digits", "--threat", "clean", "--samples", 32, *option)
    assert run(*command, "-o", "best") == 2
    message = f"{' '.join(option)}: attacks training samples; give a threat (--threat)"
    assert message in capsys.readouterr().err


def test_functions_of_the_current_folder_are_found(here, capsys):
    name = f"own_{here.parent.name}"
    (here / f"{name}.py").write_text(
        "from robustsoup.soups.buffers import average\n"
        "def stay(model, x, y, threat, *, seed):\n    return x\n"
        "def policy(soup):\n    return average(soup)\n"
    )
    own = {key: f"{name}:{key}" for key in ("stay", "policy")}
    few = ("--samples", 32, "--data", "digits")
    command = ("search", *PAIR, *few, "--threat", "Linf 32/255", "--method", "uniform")
    assert run(*command, "--attack", own["stay"], "--buffers", own["policy"], "-o", "best") == 0
    recipe = here / "again.toml"
    recipe.write_text((here / "best" / "recipe.toml").read_text())
    assert run("run", recipe, "-o", "again") == 0
    mixed = ("mix", *PAIR, "--coefficients", "0.5,0.5", "-o", "mixed.safetensors")
    assert run(*mixed, "--buffers", own["policy"]) == 0
    learn = ("learn", *PAIR, "--data", "digits", "--threat", "Linf 32/255", "--epochs", 1)
    assert run(*learn, "--attack-steps", 1, "--buffers", own["policy"], "-o", "learned") == 0
    assert capsys.readouterr().err.count("cannot be found") == 0

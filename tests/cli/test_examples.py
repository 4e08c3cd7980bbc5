"""The examples in --help run one after another, whatever the trained networks score.

They run with small settings, on networks that the tests of all commands share. Exit codes 3 and 4
count where the printed JSON says that the answer is no. None of them may use the network: `fetch`
alone was asked to.
"""

import json
import shutil
import sys

import pytest
from command_line import SMALL, list_examples, run
from network_watch import refused_network

from robustsoup.cli import running
from robustsoup.recipes import load_recipe
from robustsoup.soups.answer import Answer

SMALL_QUICKSTART = (
    *("pretrain.epochs=1", "finetune.epochs=1", "soups.learned.epochs=1", "soups.grid.step=0.5"),
    *('soups.learned.threats=["Linf 16/255"]', "evaluate.steps=1", 'select.require=["clean>=0"]'),
    *("evaluate.select_samples=16", "evaluate.report_samples=16", 'model="resnet9:width=2"'),
)
EXAMPLES = list_examples()
CHECKPOINT_COMMANDS = (
    *("check", "mix", "learn", "evaluate", "compare", "search", "landscape", "show", "push"),
)
RECIPE_COMMANDS = ("demo", "run", "plan", "report", "verify")


@pytest.fixture(autouse=True)
def _no_network():
    with refused_network() as attempts:
        yield
    assert not attempts


@pytest.fixture
def small_quickstart(tmp_path, monkeypatch):
    """Make `robustsoup demo` run the quickstart recipe with small settings."""
    recipe = load_recipe(running.locate_quickstart(), SMALL_QUICKSTART)
    path = tmp_path / "small.toml"
    path.write_text(recipe.to_toml())
    monkeypatch.setattr(running, "locate_quickstart", lambda: path)


def distinct_examples(*commands):
    """Return the examples of some commands in order, each line once."""
    lines = [tuple(words) for command in commands for words in EXAMPLES[command]]
    return [list(words) for words in dict.fromkeys(lines)]


def run_example(words, capsys):
    """Run an example with small settings and check its exit code."""
    command = words[1]
    as_json = ["--json"] if command in ("check", "search") else []
    code = run(*words[1:], *SMALL.get(command, ()), *as_json)
    printed = capsys.readouterr()
    expected = 0
    if command == "search":
        assert printed.out, printed.err
        expected = Answer.from_json(json.loads(printed.out)["selection"]).exit_code
    if command == "check":
        expected = 0 if json.loads(printed.out)["soupable"] else 3
    assert code == expected, (words, printed.err)


def test_every_command_has_an_example():
    assert len(EXAMPLES) >= 14
    for name, lines in EXAMPLES.items():
        assert any(words[1] == name for words in lines), name


def test_every_command_but_fetch_runs_without_the_network():
    tested = {*CHECKPOINT_COMMANDS, *RECIPE_COMMANDS, "train", "doctor"}
    assert tested == set(EXAMPLES) - {"fetch"}


def test_help_shows_the_examples(capsys):
    for name in EXAMPLES:
        assert run(name, "--help") == 0
        text = capsys.readouterr().out
        assert "Example" in text
        assert f"robustsoup {name}" in text


def test_the_examples_of_train_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in EXAMPLES["train"]:
        run_example(words, capsys)
    assert (tmp_path / "base.safetensors").exists()
    assert (tmp_path / "eps16.safetensors").exists()


def test_the_examples_about_checkpoints_run(trained_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    networks = {"base": "base", "eps16": "low", "eps64": "base", "eps96": "high"}
    for name, source in networks.items():
        shutil.copy(trained_files / f"{source}.safetensors", f"{name}.safetensors")
    for words in distinct_examples(*CHECKPOINT_COMMANDS):
        run_example(words, capsys)
    for written in (
        *("soup.safetensors", "learned/soup.safetensors", "learned/coefficients.safetensors"),
        *("turned/dial.safetensors", "turned/coefficients.svg", "cleaner.safetensors"),
        *("best/soup.safetensors", "best/report.html", "plane/report.html"),
    ):
        assert (tmp_path / written).exists(), written
    assert not [path for path in tmp_path.rglob(".*") if "store" not in path.parts]


def test_the_examples_about_recipes_run(small_quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in distinct_examples(*RECIPE_COMMANDS):
        if "--ray" in words:  # tests/scale runs steps on Ray, which is an extra
            at = words.index("--ray")
            words = words[:at] + words[at + 2 :]
        code = run(*words[1:])
        printed = capsys.readouterr()
        nothing_met = words[1] == "run" and "no candidate meets" in printed.out
        assert code == (3 if nothing_met else 0), (words, printed.err)
    results = json.loads((tmp_path / "runs" / "ten" / "results.json").read_text())
    assert results["protocol"]["steps"] == 10
    for written in (
        *("runs/quickstart/report.html", "runs/quickstart/results.json"),
        *("runs/ten/results.json", "runs/ten/soup.safetensors"),
    ):
        assert (tmp_path / written).exists(), written
    figures = {path.stem for path in (tmp_path / "runs" / "quickstart" / "figures").iterdir()}
    assert {"ternary", "tradeoff"} <= {figure.split("-")[0] for figure in figures}


def test_the_example_of_doctor_runs(capsys):
    for words in EXAMPLES["doctor"]:
        assert run(*words[1:]) == 0
    assert f"python {sys.version.split()[0]}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_shows_the_trade_off(tmp_path, monkeypatch):
    """The whole demo: ingredients of large radius are more robust and less accurate.

    Seen: 33 points of robust accuracy, and 6 points of clean accuracy.
    """
    monkeypatch.chdir(tmp_path)
    assert run("demo") == 0
    results = json.loads((tmp_path / "runs" / "quickstart" / "results.json").read_text())
    scores = {row["name"]: row["test"] for row in results["rows"]}

    def difference(measure):
        return scores["eps96"][measure]["value"] - scores["eps16"][measure]["value"]

    assert difference("Linf 64/255") > 0.2
    assert difference("clean") < -0.02

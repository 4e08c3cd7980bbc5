"""The example package: its code, and the package as a user installs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from plugins import write_plugin

import robustsoup as rs
from robustsoup.catalog import ATTACKS, DATA_SOURCES, MODELS

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"


@pytest.fixture
def _example_package(tmp_path, monkeypatch):
    """The example package, findable as an installed one in an empty current folder."""
    code = (PLUGIN / "robustsoup_example.py").read_text("utf-8")
    write_plugin(tmp_path, "robustsoup_example", code, "unused", "unused")
    project = (PLUGIN / "pyproject.toml").read_text("utf-8")
    points = "\n".join(
        line.replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "")
        for line in project.splitlines()
        if "entry-points" in line or "robustsoup_example:" in line
    )
    (tmp_path / "robustsoup_example-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)


@pytest.mark.usefixtures("_example_package")
def test_the_example_package_adds_an_attack_a_network_and_a_data_source():
    for registry, name in ((ATTACKS, "fgsm"), (MODELS, "tiny-cnn"), (DATA_SOURCES, "stripes")):
        assert name in registry.all_entries()
    data = rs.load_data("stripes")
    network = rs.load_model("tiny-cnn:width=4", classes=2, channels=1)
    trained = rs.train(network, data.train, threat="Linf 8/255", epochs=1, attack_steps=1)
    evaluation = rs.evaluate(
        trained, data.test, ["Linf 8/255"], attack="fgsm", samples=16, masking_check=False
    )
    assert len(evaluation.prediction) == 16
    assert evaluation.record["attack"]


@pytest.mark.usefixtures("_example_package")
def test_commands_know_what_the_example_package_adds(capsys):
    what = ("--data", "stripes", "--model", "tiny-cnn:width=4", "--device", "cpu")
    training = ("--epochs", 20, "--attack-steps", 1)
    for name, threat in (("a", "Linf 1/255"), ("b", "Linf 8/255")):
        trained = f"{name}.safetensors"
        assert run("train", *what, *training, "--threat", threat, "-o", trained) == 0
    attacked = ("a.safetensors", "b.safetensors", *what, "--threat", "Linf 8/255")
    attack = ("--attack", "fgsm", "--samples", 16)
    assert run("evaluate", *attacked, *attack, "-o", "verdicts") == 0
    assert run("search", *attacked, *attack, "--method", "line", "-o", "soup.safetensors") == 0
    assert "fgsm" in capsys.readouterr().out
    assert rs.Evaluation.load("verdicts/a.test.json").record["attack"] == "fgsm"


@pytest.mark.slow
def test_the_example_package_is_installed_and_its_readme_works(tmp_path):
    """Pip builds the package with its own build tools, as for a user."""
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(installed), str(PLUGIN)], check=True)
    commands = (PLUGIN / "README.md").read_text("utf-8").partition("```sh\n")[2]
    commands = commands.partition("```")[0].splitlines()
    assert commands[0] == "pip install examples/plugin"
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    small = {
        "train": "--epochs 20 --attack-steps 1 --device cpu",
        "evaluate": "--samples 16 --device cpu",
    }
    for command in commands[1:]:
        verb = command.split()[1]
        subprocess.run(
            f"{sys.executable} -m {command} {small[verb]}",
            shell=True,
            check=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
        )

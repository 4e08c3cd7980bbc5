"""Whose network runs: the one that the user names, never code that a file names."""

import json
import sys

import pytest
from command_line import FEW, LINF, RECIPE, read_files, run

from robustsoup.checkpoints.checkpoint import Checkpoint

SPEC = "resnet9:width=2"
LANDSCAPE = ("--points", 2, "--calibrate-samples", 32)
COMMANDS = {
    "evaluate": ("evaluate", "low.safetensors", *LINF, *FEW),
    "check": ("check", "low.safetensors", "high.safetensors", "--data", "digits", "--samples", 32),
    "train": ("train", "--from", "low.safetensors", *LINF, "--epochs", 1, "-o", "t.safetensors"),
    "learn": ("learn", "low.safetensors", "high.safetensors", *LINF, "--epochs", 1, "-o", "l"),
    "search": ("search", "low.safetensors", "high.safetensors", *LINF, *FEW, "-o", "s"),
    "mix": (
        *("mix", "low.safetensors", "high.safetensors", "--data", "digits"),
        *("--buffers", "recalibrate", "-o", "m.safetensors"),
    ),
    "landscape": (
        *("landscape", "base.safetensors", "low.safetensors", "high.safetensors", *LINF),
        *("--samples", 32, *LANDSCAPE, "-o", "p"),
    ),
    "run": ("run", "recipe.toml", "-o", "r"),
    "plan": ("plan", "recipe.toml"),
}
OWN_NETWORK = """
from pathlib import Path
from robustsoup.models.resnet9 import resnet9

Path("imported").touch()

def load(classes, channels):
    return resnet9(classes=classes, channels=channels, width=2)
"""


@pytest.fixture
def hostile(here):
    """The trained files, whose records name code that leaves a folder called "ran"."""
    for name in ("base", "low", "high"):
        item = Checkpoint.load(f"{name}.safetensors")
        network = {**item.provenance["network"], "spec": f"os:mkdir:path={here / 'ran'}"}
        item.with_provenance(network=network).save(f"{name}.safetensors")
    (here / "recipe.toml").write_text(RECIPE)
    return here


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_code_that_a_file_names(hostile, capsys, name):
    before = read_files(hostile)
    assert run(*COMMANDS[name]) == 2
    error = capsys.readouterr().err
    assert "safetensors: the file names 'os:mkdir:path=" in error
    assert "--model package.module:factory" in error
    assert error.count("\n") == 1
    assert not (hostile / "ran").exists()
    assert read_files(hostile) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_the_named_network_comes_before_every_record(hostile, name):
    if name in ("run", "plan"):
        assert run(*COMMANDS[name], "--set", f"model={SPEC}") == 0
    else:
        assert run(*COMMANDS[name], "--model", SPEC) == 0
    assert not (hostile / "ran").exists()
    for written in ("t", "l/soup", "m", "r/soup"):
        if (path := hostile / f"{written}.safetensors").exists():
            assert Checkpoint.load(path).provenance["network"]["spec"] == SPEC


def test_another_named_network_does_not_fit_the_files(hostile, capsys):
    assert run(*COMMANDS["evaluate"], "--model", "resnet9:width=4") == 2
    assert "low.safetensors: prep.0.weight: got shape (2, 1, 3, 3)" in capsys.readouterr().err


def test_mix_needs_no_data_to_name_a_network(here, capsys):
    assert run("mix", "low.safetensors", "-o", "m.safetensors", "--model", SPEC) == 0
    mixed = Checkpoint.load("m.safetensors")
    assert mixed.network_settings == Checkpoint.load("low.safetensors").network_settings
    constants = ("--normalize", 0.5, 0.2)
    assert run("mix", "low.safetensors", "-o", "n.safetensors", *constants) == 2
    assert "mix: --normalize requires --model or --data" in capsys.readouterr().err


def test_a_network_of_ones_own_is_named_in_each_command(here, monkeypatch, capsys):
    (here / "own_net.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(here)
    own = ("--model", "own_net:load")
    train = ("train", *LINF, "--epochs", 1, "--lr", 0.1, "-o", "own.safetensors")
    assert run(*train, *own) == 0
    (here / "imported").unlink()
    monkeypatch.delitem(sys.modules, "own_net")
    evaluate = ("evaluate", "own.safetensors", "--data", "digits", "--samples", 32)
    assert run(*evaluate) == 2
    assert (
        "own.safetensors: the file names 'own_net:load' as its network" in capsys.readouterr().err
    )
    assert not (here / "imported").exists()
    assert run("mix", "own.safetensors", "own.safetensors", "-o", "soup.safetensors") == 0
    assert run("check", "own.safetensors", "soup.safetensors") == 0
    assert not (here / "imported").exists()
    assert run(*evaluate, *own) in (0, 2)  # 2: hardly trained
    assert (here / "imported").exists()


def test_a_recipe_names_a_network_of_ones_own(here, monkeypatch, capsys):
    (here / "own_net.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(here)
    network = {"spec": "own_net:load", "classes": 10, "channels": 1}
    for name in ("low", "high"):
        item = Checkpoint.load(f"{name}.safetensors")
        item.with_provenance(network=network).save(f"{name}.safetensors")
    learned = '[soups.learned]\nmethod = "learned"\nthreats = ["Linf 32/255"]\nepochs = 1\n'
    (here / "recipe.toml").write_text(RECIPE + learned)
    assert run("run", "recipe.toml", "-o", "out") == 2
    assert "the file names 'own_net:load' as its network" in capsys.readouterr().err
    assert not (here / "imported").exists()
    assert run("run", "recipe.toml", "--set", "model=own_net:load", "-o", "out", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["name"] for row in rows} == {"low", "high", "flat", "learned-linf-32-255"}

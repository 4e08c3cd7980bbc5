"""`robustsoup plan` before the data and the checkpoints of a recipe are downloaded."""

import json
from pathlib import Path

import pytest
from markers import needs_cifar10

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main
from robustsoup.data import load_data
from robustsoup.data.cifar import imitate_cifar
from robustsoup.models import load_model
from robustsoup.recipes import load_recipe
from robustsoup.runs.run import prepare_run
from robustsoup.runs.stand_ins import list_absent

NAME = "Gowal2021Improving_R18_ddpm_100m"
RECIPE = """
name = "far"
data = "{data}"
{model}
{base}
[ingredients]
a = "{a}"
b = "{b}"
[soups.line]
method = "grid"
step = 0.5
[evaluate]
threats = ["Linf 8/255"]
steps = 2
"""
ADDRESSES = {"a": "memory://nowhere/a.safetensors", "b": "memory://nowhere/b.safetensors"}


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Return what `plan` says of a recipe, in folders without data: code, JSON and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBUSTSOUP_DATA", raising=False)

    def run(command="plan", **values):
        model = values.pop("model", "resnet9:width=2")
        values = {"data": "cifar10", **ADDRESSES, **values}
        named = f'model = "{model}"' if model else ""
        base = 'adapter_base = "memory://nowhere/base"' if values.pop("has_base", False) else ""
        Path("far.toml").write_text(RECIPE.format(model=named, base=base, **values))
        with pytest.raises(SystemExit) as end:
            main([command, "far.toml", "--json", "--device", "h100"])
        captured = capsys.readouterr()
        return end.value.code, json.loads(captured.out or "null"), captured.err

    return run


@pytest.mark.parametrize(("data", "has_base"), [("cifar10", False), ("cifar100", True)])
def test_nothing_is_downloaded(plan, data, has_base, monkeypatch):
    def fail(*rest, **more):
        raise AssertionError("a download began")

    monkeypatch.setattr("robustsoup.data.cifar.download", fail)
    monkeypatch.setattr("robustsoup.cli.recipe_runs.copy_checkpoint", fail)
    code, priced, said = plan(data=data, has_base=has_base)
    assert code == 0
    for place in (data, *ADDRESSES.values()):
        assert f"{place} is not on this machine; planned by its size" in said
    names = [step["name"] for step in priced["steps"] if step["kind"] == "evaluate"]
    assert sorted(names) == sorted(
        f"{name}.{split}" for name in ("a", "b", "line-0.5-0.5") for split in ("val", "test")
    )
    assert not any(step["done"] for step in priced["steps"])


def test_a_published_checkpoint_names_its_network(plan):
    places = {"a": f"robustbench:{NAME}", "b": f"robustbench:{NAME}"}
    code, _, said = plan(model="", **places)
    assert code == 0
    assert said.count("is not on this machine") == 2  # the data, and one checkpoint
    code, _, said = plan(model="", a="robustbench:Nobody", b="robustbench:Nobody")
    assert code == 2
    assert 'robustbench: got "Nobody"' in said


def test_a_missing_file_is_an_error(plan):
    code, _, said = plan(a="a.safetensors", b="b.safetensors")
    assert code != 0
    assert "a.safetensors" in said.splitlines()[-1]


def test_an_address_of_an_unknown_network_is_copied(plan):
    code, _, said = plan(model="")
    assert code != 0
    assert "memory://nowhere/a.safetensors" in said.splitlines()[-1]


def test_what_is_here_is_used(plan, tmp_path):
    for number, name in enumerate("ab"):
        network = load_model("resnet9:width=2", channels=3, seed=number)
        Checkpoint.of(network).save(tmp_path / f"{name}.safetensors")
    code, _, said = plan(a="a.safetensors", b="b.safetensors")
    assert code == 0
    assert "a.safetensors" not in said
    assert "cifar10 is not on this machine" in said


@pytest.mark.parametrize("root", ["n" * 300, "far.toml"])
def test_a_root_that_cannot_hold_data_is_a_wrong_request(plan, tmp_path, monkeypatch, root):
    monkeypatch.setenv("ROBUSTSOUP_DATA", str(tmp_path / root))
    code, _, said = plan()
    assert code == 2
    assert said.count("\n") == 1
    assert f"{root}: " in said
    assert "set another root" in said


@needs_cifar10
def test_the_plan_has_the_keys_of_the_real_data(tmp_path, monkeypatch):
    recipe = tmp_path / "trains.toml"
    recipe.write_text(
        'name = "trains"\ndata = "cifar10"\nmodel = "resnet9:width=2"\n'
        '[pretrain]\nthreat = "clean"\n[ingredients]\na = { threat = "Linf 2/255" }\n'
    )
    loaded = load_recipe(recipe)
    real = prepare_run(loaded, device="cpu", absent=list_absent(loaded))
    assert real.absent == ()
    imitated = prepare_run(
        loaded, device="cpu", absent=list_absent(loaded, str(tmp_path / "empty"))
    )
    assert imitated.absent == ("cifar10",)
    assert list(imitated.plan.steps_by_key) == list(real.plan.steps_by_key)
    data, other = load_data("cifar10", seed=1), imitate_cifar("cifar10", seed=1)
    assert other.record == data.record
    for split in ("train", "val", "test"):
        assert data.split(split).images.shape == other.split(split).images.shape
        assert data.split(split).ids.equal(other.split(split).ids)

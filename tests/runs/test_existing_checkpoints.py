"""Recipes of checkpoints that exist already."""

import dataclasses
import shutil

import pytest
import torch
from small_data import write_images
from tiny_runs import DATA, MODEL, keys_of, recipe_of_files, run_recipe

from robustsoup.checkpoints import network
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import Leakage
from robustsoup.errors import CheckpointError, LeakageError, ModelError
from robustsoup.models import load_model
from robustsoup.models.libraries import InputSettings
from robustsoup.runs.run import prepare_run
from robustsoup.runs.tasks import file_key


def test_keys_of_files_follow_from_their_weights(files):
    before = keys_of(prepare_run(recipe_of_files(files), device="cpu").plan)
    moved = files / "moved"
    moved.mkdir()
    for name in ("low", "high"):
        (files / f"{name}.safetensors").rename(moved / f"{name}.safetensors")
    assert keys_of(prepare_run(recipe_of_files(moved), device="cpu").plan) == before
    shutil.copy(moved / "low.safetensors", moved / "high.safetensors")
    assert keys_of(prepare_run(recipe_of_files(moved), device="cpu").plan) != before


def test_ingredients_that_were_trained_on_evaluated_samples_are_refused(files):
    def leakage_of(**changes):
        return prepare_run(recipe_of_files(files, **changes), device="cpu").leakage

    with pytest.raises(LeakageError, match=r"another split \(seed 0\).*allow_leakage in a recipe"):
        leakage_of(seed=1)
    assert leakage_of(seed=1, allow_leakage=True).status == "violated"
    assert leakage_of() == Leakage()
    path = files / "low.safetensors"
    low = Checkpoint.load(path)
    low.with_provenance(trained_on=["train", "val"]).save(path)
    with pytest.raises(LeakageError, match="was trained on the val split itself"):
        leakage_of()
    dataclasses.replace(low, provenance={"network": MODEL.as_record()}).save(path)
    assert leakage_of().status == "unknown"


def test_an_ingredient_near_chance_is_refused_with_a_hint(files, tmp_path):
    """With equal logits, every image is put into the first class."""
    network = Checkpoint.of(load_model("resnet9:width=2", channels=1))
    weight = torch.zeros_like(network.tensors["linear.weight"])
    tensors = {**network.tensors, "linear.weight": weight}
    dataclasses.replace(network, tensors=tensors).save(files / "low.safetensors")
    share = float((DATA.val.labels[:1000] == 0).float().mean())
    with pytest.raises(
        ModelError, match=rf"accuracy {share:.1%} .*near chance \(10\.0%\).*--normalize"
    ):
        run_recipe(recipe_of_files(files), tmp_path / "run")


def test_a_folder_is_decoded_at_the_size_that_the_files_record(files):
    for number in range(10):
        write_images(files / "images" / str(number), 10)
    for name in ("low", "high"):
        path = files / f"{name}.safetensors"
        item = Checkpoint.load(path)
        item.with_provenance(data={**item.provenance["data"], "size": [9, 9]}).save(path)
    recipe = recipe_of_files(files, data=f"folder:{files / 'images'}", channels=1)
    prepared = prepare_run(recipe, device="cpu")
    assert prepared.image_size == 9
    assert prepared.context.data.record["size"] == [9, 9]
    assert prepared.plan.warnings == ()
    other = prepare_run(recipe.model_copy(update={"image_size": 10}), device="cpu")
    assert "9 x 9 pixels, the data has 10 x 10" in other.plan.warnings[0]


def test_classes_in_another_order_than_those_of_the_data_are_named(files, monkeypatch):
    names = [str(digit) for digit in (1, 0, *range(2, 10))]
    configuration = InputSettings(class_names=tuple(names))
    monkeypatch.setattr(network, "input_settings", lambda settings: configuration)
    recipe = recipe_of_files(files, model=MODEL.spec)
    (warning,) = prepare_run(recipe, device="cpu").plan.warnings
    assert 'class 0 is "1" there, "0" in the data' in warning


def test_a_missing_file_is_named(files):
    (files / "low.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"low\.safetensors: no such file"):
        prepare_run(recipe_of_files(files), device="cpu")


def test_files_are_compared_under_the_names_of_the_named_network(files):
    low = Checkpoint.load(files / "low.safetensors")
    averaged = {f"module.{name}": tensor for name, tensor in low.tensors.items()}
    torch.save(averaged | {"n_averaged": torch.tensor(3)}, files / "average.pth")
    names = {"low": str(files / "average.pth"), "high": str(files / "high.safetensors")}
    recipe = recipe_of_files(files, ingredients=names, model=MODEL.spec)
    read = prepare_run(recipe, device="cpu").plan.files.values()
    assert [set(item.tensors) for item in read] == [set(low.tensors)] * 2


def test_the_key_of_a_file_tells_other_constants_of_normalisation():
    plain = Checkpoint.of(load_model("resnet9:width=2", channels=1))
    shifted = plain.with_network(normalize=([0.5], [0.5]))
    assert plain.digest == shifted.digest
    network = plain.network_settings
    assert file_key(plain, network) == f"file:{plain.digest}"
    keys = {file_key(item, network) for item in (plain, shifted)}
    assert len(keys) == 2
    assert file_key(shifted, shifted.network_settings) == f"file:{plain.digest}"
    bare = Checkpoint(plain.tensors, {})
    assert file_key(bare, network) == f"file:{plain.digest}"
    named = shifted.network_settings
    assert file_key(plain, named, constants_named=True) == f"file:{plain.digest}"
    assert file_key(plain, named) != f"file:{plain.digest}"


def test_each_file_keeps_its_constants_and_a_warning_says_that_they_differ(files):
    low = Checkpoint.load(files / "low.safetensors")
    low.with_network(normalize=([0.1], [0.9])).save(files / "low.safetensors")

    def prepare(**changes):
        plan = prepare_run(recipe_of_files(files, **changes), device="cpu").plan
        return plan, [item.network_settings.normalize for item in plan.files.values()]

    plan, constants = prepare()
    assert constants == [((0.1,), (0.9,)), None]
    assert "high.safetensors: normalises its input by None" in plan.warnings[0]
    named, constants = prepare(normalize=[[0.1], [0.9]])
    assert constants == [((0.1,), (0.9,))] * 2
    assert named.warnings == ()
    high = ("evaluate", "high.val")
    assert keys_of(named)[high] != keys_of(plan)[high]

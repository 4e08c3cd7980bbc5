"""Leakage from ingredients, their ancestors and soups into a split."""

from dataclasses import replace

import pytest
import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import (
    Leakage,
    check_leakage,
    find_leakage,
    stopped_early_on,
    worst_leakage,
)
from robustsoup.data import Split, load_data
from robustsoup.data.sketches import sketch_split
from robustsoup.errors import LeakageError
from robustsoup.models import load_model
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.mixing import mix
from robustsoup.training.train import train

FRESH = Leakage("known", "")


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


def trained(data, on=("train",), value=0.0, **changes):
    """A checkpoint with a record of being fitted on splits of `data`; None: without a record."""
    record = {"data": {**data.record, **changes}, "trained_on": list(on)} if data else {}
    return Checkpoint({"w": torch.full((2,), value)}, record)


def test_other_samples_of_the_same_split_are_known_to_be_fresh(data):
    ingredients = [trained(data), trained(data, value=1.0)]
    for split in (data.val, data.test):
        assert find_leakage(ingredients, split) == FRESH
        assert check_leakage(ingredients, split) == FRESH


def test_early_stopping_is_by_the_loss_on_val_of_the_same_data(data):
    stopped, other = trained(data), trained(data, split_digest="0" * 64)
    assert not stopped_early_on(stopped, data.val)
    for checkpoint in (stopped, other):
        checkpoint.provenance["early_stopped_at"] = 2
    assert stopped_early_on(stopped, data.val)
    assert not stopped_early_on(stopped, data.test)
    assert not stopped_early_on(other, data.val)


@pytest.mark.parametrize("split", ["val", "test"])
def test_without_a_record_it_is_unknown(data, split):
    leakage = find_leakage([trained(data), trained(None)], data.split(split))
    assert leakage.status == "unknown"
    assert "no record" in leakage.why
    assert check_leakage([trained(None)], data.split(split)).status == "unknown"


def test_fine_tuning_keeps_the_record_of_earlier_data(data):
    net = load_model("resnet9:width=2", channels=1)

    def tune(origin, split):
        return train(origin, split, threat="clean", epochs=1, lr=0.01, device="cpu")

    fit = data.train.first(64)
    tuned = tune(Checkpoint.of(net), fit)
    assert find_leakage([tuned], data.val).status == "unknown"
    soup = mix([tuned, tune(net, fit)], [0.5, 0.5])
    assert find_leakage([soup], data.test).status == "unknown"
    elsewhere = tune(net, load_data("digits", seed=1).train.first(64))
    twice = tune(tune(elsewhere, fit), fit)
    assert find_leakage([twice], data.val).status == "violated"
    assert find_leakage([twice], data.test).status == "known"
    fresh = tune(tune(net, fit), fit)
    assert find_leakage([fresh], data.val) == FRESH
    assert "earlier_data" not in fresh.provenance


def test_after_training_on_other_data_it_is_unknown(data):
    leakage = find_leakage([trained(data, digest="other", name="cifar10")], data.val)
    assert leakage.status == "unknown"
    assert "trained on other data (cifar10)" in leakage.why


def test_a_split_of_the_same_name_of_other_data_is_no_leakage(data):
    samples = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 10
    own = Split.from_tensors(*samples, classes=10)
    settings = {"threat": "clean", "epochs": 1, "lr": 0.01, "device": "cpu"}
    base = train(load_model("resnet9:width=2", channels=1), own, **settings)
    tuned = train(base, data.train.first(40), **settings)
    assert tuned.provenance["trained_on"] == ["test", "train"]
    assert find_leakage([tuned], data.test).status == "unknown"
    assert find_leakage([tuned], data.train).status == "violated"
    assert find_leakage([mix([tuned, tuned], [0.5, 0.5])], data.test).status == "unknown"
    assert find_leakage([tuned], own).status == "violated"
    for part in (data.test.first(40), own):
        assert find_leakage([train(tuned, part, **settings)], data.test.first(30)).status == (
            "violated" if part is not own else "unknown"
        )
    for sketches in ([], tuned.provenance["fitted_images"][:1]):  # those of older files, or few
        older = tuned.with_provenance(fitted_images=sketches)
        assert find_leakage([older], data.test).status == "violated"


@pytest.mark.parametrize("others", [[], ["known"], ["unknown"]])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_that_was_trained_on_is_violated_whatever_the_others(data, others, split):
    ingredients = [trained(data if other == "known" else None) for other in others]
    ingredients.append(trained(data, on=("train", split)))
    leakage = find_leakage(ingredients, data.split(split))
    assert leakage.status == "violated"
    assert f"was trained on the {split} split" in leakage.why
    with pytest.raises(LeakageError, match=rf"the {split} split itself.*allow_leakage in a recipe"):
        check_leakage(ingredients, data.split(split))
    assert check_leakage(ingredients, data.split(split), allow=True) == leakage


def test_another_split_of_the_same_data_is_violated_on_val_alone(data):
    ingredients = [trained(data), trained(load_data("digits", seed=1))]
    leakage = find_leakage(ingredients, data.val)
    assert leakage.status == "violated"
    assert "another split (seed 1)" in leakage.why
    assert find_leakage(ingredients, data.test).status == "known"
    with pytest.raises(LeakageError):
        check_leakage(ingredients, data.val)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_soup_inherits_the_record_of_every_ingredient(data, order):
    ingredients = [trained(data), trained(data, on=("train", "val"), value=1.0)]
    soup = mix([ingredients[i] for i in order], [0.5, 0.5])
    assert find_leakage([soup], data.val).status == "violated"


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_soup_with_an_unknown_ingredient_is_unknown(data, order):
    ingredients = [trained(data), trained(None, value=1.0)]
    soup = mix([ingredients[i] for i in order], [0.5, 0.5])
    assert find_leakage([soup], data.val).status == "unknown"


def test_a_soup_of_fresh_ingredients_is_fresh(data):
    soup = mix([trained(data), trained(data, value=1.0)], [0.5, 0.5])
    assert find_leakage([soup], data.val) == FRESH


def test_the_first_of_the_worst_findings_is_reported():
    findings = [FRESH, Leakage("unknown", "a"), Leakage("violated", "b"), Leakage("violated", "c")]
    assert worst_leakage(findings) == findings[2]
    assert worst_leakage(findings[:2]) == findings[1]
    assert findings[1].as_record() == {"status": "unknown", "why": "a"}


def under_another_name(split, name="test"):
    """The same images as a split of data that no record knows."""
    record = {**split.record, "name": "mine", "digest": "other", "split_digest": "other"}
    return replace(split, ids=split.ids + 10**6, name=name, record=record)


def fitted(split, *more):
    """A checkpoint whose record holds the sketches of the splits that it was fitted on."""
    sketches = [sketch_split(part) for part in (split, *more)]
    record = {"data": split.record, "trained_on": [split.name], "fitted_images": sketches}
    return Checkpoint({"w": torch.zeros(2)}, record)


@pytest.mark.parametrize("name", ["val", "test"])
def test_training_images_under_another_name_are_found(data, name):
    leakage = find_leakage([fitted(data.train)], under_another_name(data.train, name))
    assert leakage.status == "violated"
    n = f"{len(data.train):,}"
    assert f"about {n} of the {n} images of digits train are in it" in leakage.why
    with pytest.raises(LeakageError, match="images of this"):
        check_leakage([trained(None), fitted(data.train)], under_another_name(data.train, name))
    assert find_leakage([fitted(data.train)], under_another_name(data.test)).status == "unknown"


def test_training_images_among_others_are_found(data):
    n = len(data.test)
    images = torch.cat([data.test.images[: n // 2], data.train.images[: n - n // 2]])
    mixed = replace(under_another_name(data.test), images=images)
    leakage = find_leakage([fitted(data.train)], mixed)
    assert leakage.status == "violated"
    assert "about" in leakage.why


def test_a_copy_of_train_as_test_of_the_same_data_is_found(data):
    copied = replace(data.test, images=data.train.images[: len(data.test)])
    assert find_leakage([fitted(data.train)], copied).status == "violated"
    assert find_leakage([fitted(data.train)], replace(data.train, name="test")).status == "violated"


def test_a_few_duplicates_within_one_data_set_are_no_leakage(data):
    few = data.train.first(20)
    images = data.test.images.clone()
    images[:3] = few.images[:3]
    assert find_leakage([fitted(few)], replace(data.test, images=images)) == FRESH
    assert find_leakage([fitted(few)], under_another_name(replace(data.test, images=images))) != (
        find_leakage([fitted(few)], under_another_name(data.test))
    )


def test_training_and_mixing_record_sketches(data, tmp_path):
    net = load_model("resnet9:width=2", channels=1)
    parts = [data.train.first(64), data.train.sample(48, 1)]
    first, second = (
        train(net, part, threat="clean", epochs=1, lr=0.01, device="cpu") for part in parts
    )
    tuned = train(first, parts[1], threat="clean", epochs=1, lr=0.01, device="cpu")
    assert first.provenance["fitted_images"] == [sketch_split(parts[0])]
    assert tuned.provenance["fitted_images"] == [sketch_split(part) for part in parts]
    soup = Checkpoint.load(mix([first, second], [0.5, 0.5]).save(tmp_path / "soup.safetensors"))
    assert soup.provenance["fitted_images"] == tuned.provenance["fitted_images"]
    for part in parts:
        assert find_leakage([soup], under_another_name(part)).status == "violated"


def test_learned_coefficients_carry_what_they_were_fitted_on(data):
    val = data.val.first(64)
    record = {
        "data": data.record,
        "trained_on": ["val"],
        "fitted_images": [sketch_split(val)],
    }
    coefficients = Coefficients(torch.tensor([[0.5, 0.5]]).double(), record=record)
    soup = mix([trained(data), trained(data, value=1.0)], coefficients)
    assert find_leakage([soup], data.val).status == "violated"
    assert find_leakage([soup], data.test) == FRESH
    assert find_leakage([soup], under_another_name(val)).status == "violated"

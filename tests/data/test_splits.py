"""Splits: those of digits, and the methods and statistics of every split."""

import hashlib
import json

import numpy
import pytest
import torch
from small_data import all_ids, small_split

from robustsoup.data import (
    Augmentation,
    load_data,
    to_float,
)
from robustsoup.data.splits import Samples, channel_statistics, content_digest
from robustsoup.errors import DataError
from robustsoup.seeding import keyed_generator


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    reference = datasets.load_digits()
    data = load_data("digits")
    for split in (data.train, data.val, data.test):
        expected = numpy.round(reference.images[split.ids.numpy()] * 255 / 16).astype(numpy.uint8)
        assert numpy.array_equal(split.images[:, 0].numpy(), expected)
        assert numpy.array_equal(split.labels.numpy(), reference.target[split.ids.numpy()])


def test_digits_shapes_and_record():
    data = load_data("digits", seed=3)
    assert [len(data.train), len(data.val), len(data.test)] == [1000, 297, 500]
    assert data.train.images.shape == (1000, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.is_contiguous()
    assert data.train.labels.dtype == data.train.ids.dtype == torch.int64
    assert data.train.augmentation == Augmentation()
    record = json.loads(json.dumps(data.record))
    assert record == data.record == data.train.record == data.val.record == data.test.record
    assert (record["name"], record["seed"], record["val"]) == ("digits", 3, 297)
    assert (record["channels"], record["size"], data.test.classes) == (1, [8, 8], 10)
    pool = to_float(torch.cat([data.train.images, data.val.images])).double()
    assert record["mean"] == pytest.approx([pool.mean().item()], abs=1e-5)
    assert record["std"] == pytest.approx([pool.std(correction=0).item()], abs=1e-5)


def test_digits_splits_are_disjoint_and_complete():
    data = load_data("digits")
    assert torch.equal(all_ids(data.train, data.val, data.test), torch.arange(1797))


def test_seed_moves_val_and_leaves_test():
    zero, again, one = load_data("digits"), load_data("digits", seed=0), load_data("digits", seed=1)
    assert zero.record == again.record
    assert torch.equal(zero.train.images, again.train.images)
    assert zero.record["digest"] == one.record["digest"]
    assert zero.record["split_digest"] != one.record["split_digest"]
    assert not torch.equal(all_ids(zero.val), all_ids(one.val))
    assert torch.equal(zero.test.images, one.test.images)
    assert torch.equal(zero.test.ids, one.test.ids)
    assert (zero.record["mean"], zero.record["std"]) == (one.record["mean"], one.record["std"])


def test_a_stored_digest_still_describes_the_embedded_digits():
    expected = "ac2213023a1dd19f8222ec82825f32c3504d17957813b2fdf14736bb5f12f150"
    assert load_data("digits").record["digest"] == expected


def test_every_digits_split_starts_with_a_mix_of_classes():
    data = load_data("digits")
    for split in (data.train, data.val, data.test):
        assert len(split.first(100).labels.unique()) == 10


# splits


def test_first():
    split = small_split()
    assert split.first(None) is split
    assert torch.equal(split.first(7).ids, split.ids[:7])
    assert len(split.first(50)) == 50
    with pytest.raises(DataError, match="small train: requested 51 samples, expected 1 to 50"):
        split.first(51)
    with pytest.raises(DataError, match="requested 0 samples"):
        split.first(0)


def test_to_moves_every_tensor():
    moved = small_split().to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.ids.device.type} == {"meta"}


def test_split_by_name():
    data = load_data("digits")
    assert data.split("val") is data.val
    with pytest.raises(
        DataError, match='digits: no split "validation"; expected train, val or test'
    ):
        data.split("validation")


def test_statistics_of_a_constant_channel_stay_above_zero():
    mean, std = channel_statistics(torch.full((4, 1, 3, 3), 51, dtype=torch.uint8))
    assert mean == (0.2,)
    assert std == (1 / 255,)


def test_statistics_and_digest_are_those_of_everything_at_once():
    """Statistics are computed in chunks; 1000 images fill several."""
    images = torch.randint(
        0, 256, (1000, 3, 5, 4), dtype=torch.uint8, generator=keyed_generator("all")
    )
    labels = torch.arange(1000) % 7
    expected_digest = hashlib.sha256(
        b"(1000, 3, 5, 4)" + images.numpy().tobytes() + labels.numpy().tobytes()
    )
    assert (
        content_digest(Samples(images, labels, torch.arange(1000))) == expected_digest.hexdigest()
    )
    values = (images.double() / 255).transpose(0, 1).flatten(1)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx(values.mean(1).tolist(), abs=1e-6)
    assert std == pytest.approx(values.std(1, correction=0).tolist(), abs=1e-6)

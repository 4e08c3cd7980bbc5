"""Splits: those of digits, and the methods and statistics of every split."""

import hashlib
import json
from dataclasses import replace

import numpy
import pytest
import torch
from small_data import all_ids, small_split

from robustsoup.data import (
    Augmentation,
    Data,
    load_data,
    to_float,
)
from robustsoup.data.splits import (
    DataDescription,
    Samples,
    assemble,
    channel_statistics,
    content_digest,
)
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


def test_the_first_samples_of_a_sorted_source_are_a_mix_of_classes_after_unsplit():
    labels = torch.arange(200) // 50
    images = torch.arange(200, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    everything = Data.from_tensors(images, labels).unsplit()
    assert everything.first(40).labels.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(everything.first(len(everything)).ids, everything.ids)


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


# the checks of assemble


def consecutive_samples(n, first=0):
    """Return n black 1x4x4 images of classes 0 and 1 with ids from `first`."""
    images = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
    return Samples(images, torch.arange(n) % 2, torch.arange(first, first + n))


def assemble_parts(**changed):
    """Assemble 8 train, 4 val and 4 test samples of two classes, except for `changed`."""
    parts = {
        "train": consecutive_samples(8),
        "val": consecutive_samples(4, 8),
        "test": consecutive_samples(4, 12),
    }
    description = DataDescription("own", "0" * 64, ("a", "b"), (0.5,), (0.5,))
    return assemble(description, **{**parts, **changed}, seed=0)


@pytest.mark.parametrize("name", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        (
            "images",
            lambda images: images / 255,
            r"images: got float32 \(4, 1, 4, 4\), expected a tensor, uint8 \(n, c, h, w\)$",
        ),
        ("images", lambda images: images[:, 0], r"images: got uint8 \(4, 4, 4\), expected a"),
        ("images", lambda images: images.numpy(), r"images: got numpy.ndarray, expected a tensor"),
        (
            "images",
            lambda images: images.permute(0, 2, 3, 1),
            r"images: got shape \(4, 4, 4, 1\), expected \(n, c, h, w\) with 1 or 3 channels",
        ),
        ("labels", lambda labels: labels + 1, "labels: got 1 to 2, expected 0 to 1"),
        ("labels", lambda labels: labels - 1, "labels: got -1 to 0, expected 0 to 1"),
        (
            "labels",
            lambda labels: labels.float(),
            r"labels: got float32 \(4,\), expected a tensor, int64 \(n,\)$",
        ),
        ("labels", lambda labels: labels[:, None], r"labels: got int64 \(4, 1\), expected a"),
        ("labels", lambda labels: labels.tolist(), "labels: got builtins.list, expected a"),
        ("labels", lambda labels: labels[:3], "got 4 images, 3 labels and 4 ids, expected as many"),
        ("ids", lambda ids: ids.int(), r"ids: got int32 \(4,\), expected a tensor, int64"),
        ("ids", lambda ids: ids // 2, "ids: got an id twice, expected a different id for each"),
    ],
)
def test_assemble_rejects_wrong_tensors(name, field, change, message):
    part = consecutive_samples(4, 100)
    wrong = replace(part, **{field: change(getattr(part, field))})
    with pytest.raises(DataError, match=f"^own {name}: {message}"):
        assemble_parts(**{name: wrong})


def test_assemble_requires_images_of_one_shape():
    part = consecutive_samples(4, 8)
    larger = replace(part, images=torch.zeros(4, 1, 5, 5, dtype=torch.uint8))
    expected = r"^own val: images: got shape \(4, 1, 5, 5\), expected \(n, 1, 4, 4\) as in train$"
    with pytest.raises(DataError, match=expected):
        assemble_parts(val=larger)


def test_assemble_rejects_samples_in_two_splits():
    with pytest.raises(DataError, match=r"^own val: ids: got 2 ids that train has too, "):
        assemble_parts(val=consecutive_samples(4, 6))
    part = consecutive_samples(4, 100)
    for name in ("train", "val"):
        with pytest.raises(DataError, match=f"^own test: images: got the images of {name}, expect"):
            assemble_parts(**{name: part, "test": part})


def test_a_test_split_may_have_its_own_ids():
    assert assemble_parts(test=consecutive_samples(4)).test.ids.tolist() == [0, 1, 2, 3]

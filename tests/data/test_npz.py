"""Data in one .npz file."""

import numpy
import pytest
import torch

from robustsoup import archives
from robustsoup.data import Data, load_data, npz
from robustsoup.errors import DataError

RANDOM = numpy.random.default_rng(0)
LABELS = numpy.arange(40) % 4


def images(count, *shape, dtype=numpy.uint8):
    return RANDOM.integers(0, 256, (count, *shape), dtype=dtype)


def load(path, **arrays):
    numpy.savez(path, **arrays)
    return load_data(f"npz:{path}")


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
@pytest.mark.parametrize("has_val", [False, True])
def test_splits_by_the_names_of_the_arrays(tmp_path, names, has_val):
    counts = {"train": 40, "test": 12} | ({"val": 8} if has_val else {})
    arrays, labels = {}, {}
    for part, count in counts.items():
        arrays[names[0].format(part)] = images(count, 8, 8, 3)
        labels[part] = LABELS[:count]
        arrays[names[1].format(part)] = labels[part][:, None].astype(numpy.uint8)
    data = load(tmp_path / "all.npz", **arrays, other=numpy.zeros(3))
    assert len(data.train) == (40 if has_val else 35)
    assert [len(data.val), len(data.test)] == [8 if has_val else 5, 12]
    assert data.train.images.shape[1:] == (3, 8, 8)
    assert data.record["classes"] == ["0", "1", "2", "3"]
    assert torch.equal(data.test.labels, torch.from_numpy(labels["test"])[data.test.ids])
    expected = torch.from_numpy(arrays[names[0].format("test")]).permute(0, 3, 1, 2)
    assert torch.equal(data.test.images, expected[data.test.ids])


@pytest.mark.parametrize("names", [("images", "labels"), ("image", "label"), ("x", "y")])
def test_a_file_without_splits(tmp_path, names):
    arrays = dict(zip(names, (images(40, 8, 8), LABELS), strict=True))
    data = load(tmp_path / "whole.npz", **arrays)
    assert [len(data.train), len(data.val), len(data.test)] == [28, 4, 8]
    assert data.record["channels"] == 1


def test_a_compressed_file_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    numpy.savez_compressed(tmp_path / "packed.npz", images=images(40, 8, 8), labels=LABELS)
    assert len(load_data("npz:~/packed.npz").test) == 8


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"pixels": images(4, 8, 8)}, "got the arrays pixels, expected x_train, y_train, x_test"),
        ({"x_train": images(4, 8, 8)}, "got x_train without y_train"),
        ({"images": images(4, 8, 8) - 300.0, "labels": LABELS[:4]}, "which look normalised"),
        ({"images": images(4, 8, 8), "labels": LABELS}, "got 4 images and 40 labels"),
        ({"images": numpy.array([None]), "labels": LABELS}, "not a readable .npz file"),
        ({"images": images(0, 3, 8, 8), "labels": LABELS[:0]}, "got no samples, expected one"),
        ({"images": images(1, 8, 8), "labels": LABELS[:1]}, "none is left to train on after val"),
        ({"images": images(2, 8, 8), "labels": LABELS[:2]}, "got 2 samples in all"),
        (
            {"images": images(4, 8, 8), "labels": numpy.array([0, 10**12, 0, 0])},
            "got label 1000000000000, expected 0 to 99,999",
        ),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, text):
    with pytest.raises(DataError) as caught:
        load(tmp_path / "wrong.npz", **arrays)
    assert text in str(caught.value)


def test_the_number_of_classes_is_bounded(tmp_path):
    assert load(tmp_path / "a.npz", images=images(40, 8, 8), labels=LABELS).train.classes == 4
    with pytest.raises(DataError, match=r"tensors: got 1,000,000 classes, expected at most"):
        Data.from_tensors(images(40, 8, 8), LABELS, classes=10**6)


@pytest.mark.parametrize("spelling", ["val", "valid", "validation"])
@pytest.mark.parametrize("train", ["train", "training"])
def test_splits_are_spelled_as_folders_are(tmp_path, spelling, train):
    arrays = {f"x_{train}": images(40, 8, 8), f"y_{train}": LABELS}
    arrays |= {f"x_{spelling}": images(8, 8, 8), f"y_{spelling}": LABELS[:8]}
    data = load(tmp_path / "all.npz", **arrays, x_testing=images(6, 8, 8), y_testing=LABELS[:6])
    assert [len(data.train), len(data.val), len(data.test)] == [40, 8, 6]
    assert data.notes == ()


def test_arrays_that_are_not_used_are_named_and_not_read(tmp_path):
    whole = {"images": images(40, 8, 8), "labels": LABELS}
    others = {"class_names": numpy.array(["a", "b"]), "meta": numpy.array({"a": 1})}
    path = tmp_path / "whole.npz"
    data = load(path, **whole, **others)
    assert len(data.test) == 8
    assert data.notes == (f"npz:{path}: arrays that are not used: class_names, meta",)
    split = {"x_train": images(40, 8, 8), "y_train": LABELS, "x_dev": images(4, 8, 8)}
    assert load(path, **split).notes == (f"npz:{path}: arrays that are not used: x_dev",)


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.uint32, numpy.uint64])
def test_unsigned_integers_of_any_width(tmp_path, dtype):
    pixels = images(40, 8, 8)
    path = tmp_path / "wide.npz"
    data = load(path, images=pixels.astype(dtype), labels=LABELS.astype(dtype))
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(pixels)[data.test.ids])
    assert torch.equal(data.test.labels, data.test.ids % 4)
    with pytest.raises(DataError, match=r"expected 0 to 255; divide 16 bits by 257"):
        load(path, images=pixels.astype(dtype) * 257, labels=LABELS)


def test_compressed_data_may_be_larger_than_evaluations(tmp_path):
    path = tmp_path / "packed.npz"
    pixels = numpy.zeros((33_000, 2048), dtype=numpy.uint8).reshape(-1, 32, 64)
    pixels[:, 0, 0] = 255
    assert pixels.nbytes > archives.MAX_UNPACKED_BYTES
    numpy.savez_compressed(path, images=pixels, labels=numpy.arange(33_000) % 4)
    assert len(load_data(f"npz:{path}").test) == 6600


def test_compressed_data_is_bounded_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "packed.npz"
    numpy.savez_compressed(path, images=images(40, 8, 8), labels=LABELS)
    monkeypatch.setattr(npz, "MAX_UNPACKED_DATA", 1000)
    with pytest.raises(DataError, match=r"1,000 bytes in all .*; write the file with numpy\.savez"):
        load_data(f"npz:{path}")


def test_a_file_that_is_missing_or_something_else(tmp_path):
    with pytest.raises(DataError, match=r"none\.npz: not a readable \.npz file \(No such file"):
        load_data(f"npz:{tmp_path / 'none.npz'}")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz: not a readable \.npz file"):
        load_data(f"npz:{tmp_path / 'text.npz'}")

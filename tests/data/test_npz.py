"""Data in one .npz file."""

import numpy
import pytest
import torch

from robustsoup.data import load_data
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
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, text):
    with pytest.raises(DataError) as caught:
        load(tmp_path / "wrong.npz", **arrays)
    assert text in str(caught.value)


def test_a_file_that_is_missing_or_something_else(tmp_path):
    with pytest.raises(DataError, match=r"none\.npz: not a readable \.npz file \(No such file"):
        load_data(f"npz:{tmp_path / 'none.npz'}")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz: not a readable \.npz file"):
        load_data(f"npz:{tmp_path / 'text.npz'}")

"""CIFAR-100 in the format of its authors, with files and digests of this test."""

import dataclasses
import hashlib
import pickle

import numpy
import pytest
import torch

from robustsoup.data import cifar, load_data
from robustsoup.errors import DataError

COUNTS = {"train": 6000, "test": 200}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as the archive holds it; its digests take the place of the published ones."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    random = numpy.random.default_rng(0)
    content = {"meta": {b"fine_label_names": [f"name {n}".encode() for n in range(100)]}}
    for name, count in COUNTS.items():
        content[name] = {
            b"data": random.integers(0, 256, (count, 3072), dtype=numpy.uint8),
            b"fine_labels": [number % 100 for number in range(count)],
            b"coarse_labels": [0] * count,
        }
    for name, stored in content.items():
        (folder / name).write_bytes(pickle.dumps(stored))
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    release = dataclasses.replace(cifar.CIFAR100, file_md5=md5)
    monkeypatch.setattr(cifar, "CIFAR100", release)
    return folder


def test_the_fine_classes_are_read_from_a_local_folder(folder):
    data = load_data("cifar100", root=folder.parent)
    assert [len(data.train), len(data.val), len(data.test)] == [1000, 5000, 200]
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.record["classes"] == [f"name {number}" for number in range(100)]
    assert data.record["name"] == "cifar100"
    assert torch.equal(data.train.labels, data.train.ids % 100)
    assert torch.equal(data.test.labels, torch.arange(200) % 100)
    stored = pickle.loads((folder / "test").read_bytes())
    assert data.test.images[7].flatten().tolist() == stored[b"data"][7].tolist()


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_changed_file_is_never_unpickled(folder, name):
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(DataError) as caught:
        load_data("cifar100", root=folder.parent)
    assert str(caught.value).startswith(f"{folder / name}: wrong content: got md5 ")


def test_the_published_digests_are_those_of_the_authors_page():
    assert cifar.CIFAR100.archive_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert set(cifar.CIFAR100.file_md5) == {"train", "test", "meta"}

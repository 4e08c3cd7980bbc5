"""Small trained networks that the tests of all commands share."""

import shutil

import pytest
import torch
from trained_seed import trained_seed

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data
from robustsoup.models import load_model
from robustsoup.training.train import train


@pytest.fixture(autouse=True)
def _blank_figures(blank_figures):
    """Draw no figures."""


@pytest.fixture(autouse=True)
def _keep_thread_count():
    """Undo what --threads sets."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


@pytest.fixture(scope="session")
def trained_files(tmp_path_factory, digits):
    """A folder of checkpoints of small digits networks: base, low and high fit each other.

    wide and coloured do not fit; low.pth is the state dict of low without any record.
    """
    folder = tmp_path_factory.mktemp("trained")
    settings = {"batch_size": 32, "device": "cpu", "precision": "float32"}
    settings["seed"] = trained_seed()
    fresh = load_model("resnet9:width=2", channels=1, seed=trained_seed())
    images = digits.train.first(512)
    base = train(fresh, images, threat="clean", epochs=4, lr=0.2, **settings)
    base.save(folder / "base.safetensors")
    for name, threat in (("low", "Linf 8/255"), ("high", "Linf 48/255")):
        start, images = folder / "base.safetensors", digits.train.first(256)
        tuned = train(start, images, threat=threat, epochs=1, lr=0.05, **settings)
        tuned.save(folder / f"{name}.safetensors")
    record = {"data": digits.record, "trained_on": ["train"]}
    wide = Checkpoint.of(load_model("resnet9:width=4", channels=1), record)
    wide.save(folder / "wide.safetensors")
    Checkpoint.of(load_model("resnet9:width=2", channels=3)).save(folder / "coloured.safetensors")
    torch.save(dict(Checkpoint.load(folder / "low.safetensors").tensors), folder / "low.pth")
    return folder


@pytest.fixture
def here(trained_files, tmp_path, monkeypatch):
    """A current folder with copies of the trained files."""
    folder = tmp_path / "here"
    shutil.copytree(trained_files, folder)
    monkeypatch.chdir(folder)
    return folder

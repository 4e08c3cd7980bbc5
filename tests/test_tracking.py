"""Figures of each epoch: JSON lines, functions of the user, and the option --track."""

import json
import sys

import pytest
from command_line import run

import robustsoup as rs
from robustsoup.errors import RequestError, StorageError


@pytest.fixture
def data():
    return rs.load_data("digits")


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def train(data, on_epoch, **settings):
    network = rs.load_model("resnet9:width=1", channels=1)
    return rs.train(
        network, data.train.first(32), threat="Linf 16/255", epochs=2, attack_steps=1,
        batch_size=16, device="cpu", on_epoch=on_epoch, **settings,
    )  # fmt: skip


def test_each_epoch_of_training_is_one_line(data, tmp_path):
    path = tmp_path / "train.jsonl"
    trained = train(data, rs.track(path), val=data.val.first(16))
    assert read_lines(path) == trained.provenance["history"]
    assert [line["epoch"] for line in read_lines(path)] == [1, 2]
    assert set(read_lines(path)[0]) >= {"loss", "robust_loss", "robust_accuracy"}
    train(data, rs.track(path))
    assert [line["epoch"] for line in read_lines(path)] == [1, 2, 1, 2]


def test_any_function_of_a_dictionary_receives_the_figures(data):
    received = []
    first = train(data, received.append)
    assert received == first.provenance["history"]
    received[0].clear()  # a copy: the record of the run stays
    assert first.provenance["history"][0]["epoch"] == 1
    learned = []
    rs.learn(
        [first, train(data, None, seed=1)], data.train.first(32), threat="Linf 16/255", epochs=2,
        attack_steps=1, batch_size=16, device="cpu", on_epoch=learned.append,
    )  # fmt: skip
    assert [figures["epoch"] for figures in learned] == [1, 2]


def test_an_error_of_the_callback_comes_after_the_epoch_is_saved(data, tmp_path):
    received = []

    def fail_once(figures):
        received.append(figures["epoch"])
        if len(received) == 1:
            raise OSError("no connection")

    state = tmp_path / "state.pt"
    with pytest.raises(OSError, match="no connection"):
        train(data, fail_once, state_path=state)
    train(data, fail_once, state_path=state)
    assert received == [1, 2]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"expected FILE.jsonl or tensorboard:FOLDER"):
        rs.track(tmp_path / "train.csv")
    with pytest.raises(StorageError, match=r"absent/train.jsonl: cannot be written: No such file"):
        rs.track(tmp_path / "absent" / "train.jsonl")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RequestError, match=r"pip install 'robustsoup\[tensorboard\]'"):
        rs.track(f"tensorboard:{tmp_path}")


def test_commands_track(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--data", "digits", "--threat", "Linf 16/255", "--epochs", 1, "--device", "cpu")
    small = (*options, "--attack-steps", 1, "--batch-size", 256, "--track", "a.jsonl")
    for name in "ab":
        run("train", "--model", "resnet9:width=1", *small, "-o", f"{name}.safetensors")
    run("learn", "a.safetensors", "b.safetensors", *small, "-o", "learned", "--allow-leakage")
    assert [line["epoch"] for line in read_lines(tmp_path / "a.jsonl")] == [1, 1, 1]

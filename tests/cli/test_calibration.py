"""`robustsoup doctor --calibrate` times passes and names the setting; it stores nothing."""

import json

import pytest
import torch
from command_line import run

from robustsoup.checkpoints import Checkpoint
from robustsoup.diagnosis.pass_shapes import PassTimes
from robustsoup.models import load_model


def test_calibration_times_each_size_of_a_pass(capsys):
    assert run("doctor", "--calibrate", "resnet9:width=1", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["threads"] == torch.get_num_threads()
    for precision, seconds in report["seconds"].items():
        assert {int(size) for size in seconds} == {8, 16, 32}
        assert min(seconds.values()) > 0
        assert report["batch_size"][precision] in (8, 16, 32)


def test_calibration_reads_a_checkpoint(tmp_path, capsys):
    network = load_model("resnet9:width=1", channels=1)
    path = Checkpoint.of(network).save(tmp_path / "network.safetensors")
    assert run("doctor", "--calibrate", path, "--pixels", "8") == 0
    assert "images a pass" in capsys.readouterr().out


def test_calibration_refuses_what_it_cannot_time(capsys):
    assert run("doctor", "--calibrate", "resnet9:width=1", "--prune") == 2
    assert run("doctor", "--pixels", 16) == 2
    assert run("doctor", "--prune", "--json") == 2
    assert run("doctor", "--calibrate", "resnet9:width=1", "--pixels", "2") == 2
    assert "images of shape (3, 2, 2)" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "best"), [(0.94, 16), (0.96, 32), (1.2, 32)])
def test_a_smaller_pass_is_chosen_only_where_it_saves_enough(seconds, best):
    times = PassTimes(2, {"float32": {8: 2.0, 16: seconds, 32: 1.0}})
    assert times.best_size("float32") == best

"""torchrun starts several processes of a command: same results, one message, resumption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_helpers import fresh_network

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.evaluation.verdicts import VERDICT_ARRAYS, Evaluation

pytestmark = pytest.mark.scale

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
EVALUATE = ("--data", "digits", "--threat", "Linf 8/255", "--steps", "20", "--samples", "100")
TRAIN = ("train", "--model", "resnet9:width=2", "--data", "digits", "--threat", "Linf 16/255")
SECONDS = 240


def start(folder, *words):
    """Start Python with words in a folder, with the store there."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "ROBUSTSOUP_STORE": str(folder / "store"), "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """Return the exit code, the output and the messages of this package."""
    output, messages = process.communicate(timeout=SECONDS)
    lines = [line for line in messages.splitlines() if line.startswith("robustsoup: ")]
    return process.returncode, output, lines


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def list_children(process):
    """Return the process ids of the ranks that torchrun started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in path.read_text().split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    network = {"spec": "resnet9:width=2", "channels": 1}
    Checkpoint.of(fresh_network(), {"network": network}).save(folder / "a.safetensors")
    return folder


def test_an_evaluation_by_two_processes_is_that_of_one(folder):
    command = ("-m", "robustsoup", "evaluate", "a.safetensors", *EVALUATE)
    one = finish(start(folder, *command, "-o", "one"))
    two = finish(start(folder, *TORCHRUN, 2, *command, "-o", "two"))
    assert one[:2] == two[:2]
    assert one[0] == 0
    assert one[2] == two[2]
    first, second = (Evaluation.load(folder / name / "a.test.json") for name in ("one", "two"))
    for name, verdicts in first.threats.items():
        for part in VERDICT_ARRAYS:
            assert torch.equal(getattr(verdicts, part), getattr(second.threats[name], part))


def test_an_error_is_one_line(folder):
    code, output, lines = finish(
        start(folder, *TORCHRUN, 2, "-m", "robustsoup", "evaluate", "absent.safetensors", *EVALUATE)
    )
    assert code != 0
    assert output == ""
    assert len(lines) == 1
    assert "absent.safetensors" in lines[0]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("way", ["interrupted", "killed"])
def test_a_training_that_ends_early_resumes(folder, way):
    epochs = 400 if way == "interrupted" else 12
    command = ("-m", "robustsoup", *TRAIN, "--epochs", epochs, "-o", f"{way}.safetensors")
    process = start(folder, *TORCHRUN, 2, "--max-restarts", 1, *command)
    state = folder / f".{way}.safetensors.state.pt"
    wait_for(state.exists)
    if way == "killed":  # torchrun starts both ranks again
        os.kill(list_children(process)[1], signal.SIGKILL)
        code, output, lines = finish(process)
        assert code == 0, lines
        assert output.count("\n") == 1
        assert not state.exists()
        history = Checkpoint.load(folder / "killed.safetensors").provenance["history"]
        assert [entry["epoch"] for entry in history] == list(range(1, epochs + 1))
    else:
        process.send_signal(signal.SIGINT)
        code, _, lines = finish(process)
        assert code != 0
        assert lines == ["robustsoup: interrupted; run the same command again to resume"]
        assert state.exists()
        assert not (folder / "interrupted.safetensors").exists()

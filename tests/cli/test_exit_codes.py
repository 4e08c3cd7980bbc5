"""Exit codes of failed and interrupted work, and what it leaves behind."""

import contextlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import LINF, MIX, SEARCH, read_files, run, start

import robustsoup
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main

TUNE = ("train", "--from", "base.safetensors", *LINF, "-o", "new.safetensors")
DEADLINE = 120  # seconds after which a process that never saves its state fails the test


def test_debug_raises_the_error(here):
    with pytest.raises(robustsoup.RobustsoupError, match=r"nowhere\.safetensors"):
        main(["evaluate", "nowhere.safetensors", *LINF, "--debug"])


def test_failed_work_is_exit_code_1(here, capsys):
    assert run(*TUNE, "--lr", "1e30", "--epochs", 1) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"robustsoup: train: the loss became (nan|inf).*lr\n", error)
    assert not (here / "new.safetensors").exists()


def test_a_current_folder_that_was_removed_is_one_line(here, capsys, monkeypatch):
    folder = here / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert run("doctor") == 1
    error = capsys.readouterr().err
    assert re.fullmatch("robustsoup: the current folder: .*; it was removed: change .*\n", error)
    monkeypatch.chdir(here)


@contextlib.contextmanager
def full_disk():
    """Let no file grow over 4 kB; the system then answers much as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "command",
    [MIX, ("mix", "low.pth", "high.pth", "-o", "soup.pth"), (*SEARCH, "-o", ".")],
    ids=["safetensors", "pth", "search"],
)
def test_a_full_disk_is_exit_code_1_and_earlier_files_stay(here, capsys, command):
    shutil.copy("low.pth", "high.pth")
    for name in ("soup.safetensors", "soup.pth"):
        (here / name).write_text("an earlier result")
    before = read_files(here)
    capsys.readouterr()
    with full_disk():
        code = run(*command)
    error = capsys.readouterr().err
    assert code == 1, error
    last = error.splitlines()[-1]
    assert re.fullmatch(r"robustsoup: .*(soup|store).* cannot be written: .+", last)
    after = read_files(here)
    assert before.items() <= after.items()
    assert set(after) - set(before) <= {"log.txt"}


WAIT_AT_STEP = """
import signal, sys, time
from robustsoup.cli import main
from robustsoup.interruption import signal_waits
from robustsoup.training.train import TrainingRun

take_step, waited = TrainingRun.take_step, []

def take_step_and_wait(self, x, y):
    loss = take_step(self, x, y)
    if self.step == 2 and not waited:
        waited.append(self)
        open("waiting", "w").close()
        while not signal_waits():  # for the end of the step
            time.sleep(0.01)
    return loss

TrainingRun.take_step = take_step_and_wait
signal.signal(signal.SIGINT, signal.default_int_handler)
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "code", "verb"),
    [
        (signal.SIGTERM, 143, "terminated"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, "hung up", marks=pytest.mark.slow),
    ],
)
def test_a_signal_amid_a_step_saves_the_step(here, tmp_path, number, code, verb):
    """The state is saved though none was due, and the finished run equals an undisturbed one."""
    command = (*TUNE, "--epochs", 1, "--lr", 0.01, "--threads", 1)
    process = start(*command, store=tmp_path / "store", script=("-c", WAIT_AT_STEP))
    deadline = time.monotonic() + DEADLINE
    while not (here / "waiting").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate()
    assert error == f"robustsoup: {verb}; run the same command again to resume\n"
    assert process.returncode == code
    assert (here / ".new.safetensors.state.pt").exists()
    assert run(*command) == 0
    resumed = Checkpoint.load("new.safetensors")
    assert run(*command[:-2], "--threads", 1) == 0
    assert Checkpoint.load("new.safetensors").digest == resumed.digest


def test_an_interrupt_during_imports_is_one_line():
    script = """
import sys
from robustsoup.cli import main

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
main(["evaluate", "x.safetensors", "--data", "digits"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "robustsoup: interrupted; run the same command again to resume\n"

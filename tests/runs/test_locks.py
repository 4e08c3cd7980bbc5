"""Locks admit one process; a dead owner's lock is taken, another host's when its lease is over."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from robustsoup.errors import StorageError
from robustsoup.runs import locks
from robustsoup.runs.locks import hold_lock, lock_file, lock_folder

HOLDER = """
import os, signal, socket, sys
from pathlib import Path
from robustsoup.runs import locks
how, folder, host, lease = sys.argv[1:]
if host:
    socket.gethostname = lambda: host
locks.LEASE_SECONDS = float(lease)
with locks.lock_folder(Path(folder), print):
    print("held", flush=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()
"""


@pytest.fixture
def hold_elsewhere():
    """Start processes that lock a folder until a line is written to them."""
    processes = []

    def start(how, folder, host="", lease=60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, how, str(folder), host, str(lease)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        if how == "killed":
            process.wait()
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_lock_leaves_nothing(tmp_path):
    folder = tmp_path / "new" / "folder"
    with lock_folder(folder, pytest.fail):
        assert {path.name for path in folder.iterdir()} == {".lock", ".lock-owner"}
    assert list(folder.iterdir()) == []
    with lock_file(tmp_path / "a" / "out.pt", pytest.fail):
        assert not (tmp_path / "a" / "out.pt").exists()
    assert list((tmp_path / "a").iterdir()) == []


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path, pytest.fail):
        raise ZeroDivisionError
    with lock_folder(tmp_path, pytest.fail):
        pass


def test_a_second_process_waits_with_one_line_that_names_the_first(tmp_path, hold_elsewhere):
    process = hold_elsewhere("waits", tmp_path)
    notes = []

    def release(text):
        notes.append(text)
        process.stdin.write("\n")
        process.stdin.flush()

    with lock_folder(tmp_path, release):
        assert process.wait() == 0
    owner = f"process {process.pid} on {socket.gethostname()}"
    assert notes == [f"{tmp_path}: {owner} is writing there; waiting until it ends"]


def test_a_killed_owner_leaves_a_lock_that_is_taken_at_once(tmp_path, hold_elsewhere):
    hold_elsewhere("killed", tmp_path)
    assert (tmp_path / ".lock-owner").exists()
    with lock_folder(tmp_path, pytest.fail):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_owner_that_was_killed_before_it_wrote_its_name_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "UNNAMED_SECONDS", 0.3)
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock-owner").touch()
    with lock_folder(tmp_path, pytest.fail):
        assert (tmp_path / ".lock-owner").stat().st_size > 0
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_writes_its_name_late_keeps_its_lock(tmp_path, monkeypatch):
    """Another host created the file, and writes its name while this one watches."""
    owner = tmp_path / ".lock-owner"
    with hold_lock(tmp_path / ".lock", "it", pytest.fail):
        name = owner.read_bytes().replace(b"host=", b"host=other-")
    owner.touch()
    sleep, notes = time.sleep, []

    def write_late(seconds):
        if owner.exists() and owner.stat().st_size == 0:
            owner.write_bytes(name)
        sleep(seconds)

    def end(text):
        notes.append(text)
        owner.unlink()

    monkeypatch.setattr(time, "sleep", write_late)
    with lock_folder(tmp_path, end):
        pass
    assert len(notes) == 1
    assert "on other-" in notes[0]


def test_an_owner_that_stands_still_keeps_its_lock(tmp_path, hold_elsewhere, monkeypatch):
    """Its lease is over long before it goes on; on one host that means nothing."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.2)
    process = hold_elsewhere("waits", tmp_path, lease=0.2)
    process.send_signal(signal.SIGSTOP)
    entered = threading.Event()

    def wait_for_lock():
        with lock_folder(tmp_path, lambda text: None):
            entered.set()

    waiting = threading.Thread(target=wait_for_lock)
    waiting.start()
    assert not entered.wait(1.5)
    process.send_signal(signal.SIGCONT)
    process.communicate("\n")
    waiting.join()
    assert entered.is_set()


def test_the_lock_of_another_host_is_taken_when_its_lease_is_over(
    tmp_path, hold_elsewhere, monkeypatch
):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.5)
    hold_elsewhere("killed", tmp_path, host="elsewhere", lease=0.5)
    notes = []
    with lock_folder(tmp_path, notes.append):
        pass
    assert len(notes) == 1
    assert "on elsewhere is writing there" in notes[0]


def test_a_lost_lock_is_an_error_before_anything_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.3)
    with hold_lock(tmp_path / "step.lock", "step", pytest.fail) as lock:
        lock.check()
        (tmp_path / "step.lock-owner").unlink()  # as another host does that takes it
        compromised = threading.Event()
        while lock.lease.compromise is None:
            compromised.wait(0.05)
        with pytest.raises(StorageError, match="step: another host took the lock"):
            lock.check()


def test_a_folder_that_cannot_be_created_or_locked_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"cannot be created: .*; set another one with -o"),
        lock_folder(tmp_path / "file" / "below", pytest.fail),
    ):
        pass

    def refuse(path, *arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(StorageError, match="cannot be locked: No space left on device"),
        lock_folder(tmp_path, pytest.fail),
    ):
        pass


def test_the_folder_may_vanish_while_it_is_locked(tmp_path):
    folder = tmp_path / "run"
    with lock_folder(folder, pytest.fail):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert not folder.exists()

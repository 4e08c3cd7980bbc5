"""Temporary files of processes that are gone are removed; those of live ones stay."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from robustsoup import files, leftovers
from robustsoup.files import write_text
from robustsoup.leftovers import is_leftover, remove_leftovers, temporary_sibling

DEAD = 4194304  # one more than the largest process number of Linux


def name_of_child(folder, code="print(temporary_sibling(Path(sys.argv[1])))"):
    """Return the temporary name that a process chose which has ended."""
    script = "import sys; from pathlib import Path; from robustsoup.leftovers import *; "
    done = subprocess.run(
        [sys.executable, "-c", script + code, str(folder / "file")],
        capture_output=True,
        text=True,
        check=True,
    )
    return folder / Path(done.stdout.strip()).name


def test_a_temporary_name_is_new_and_names_its_process(tmp_path):
    names = {temporary_sibling(tmp_path / "a.txt").name for _ in range(20)}
    assert len(names) == 20
    assert all(re.match(rf"\.a\.txt\.{os.getpid()}-", name) for name in names)
    assert len(temporary_sibling(tmp_path / ("n" * 255)).name) < 255


def test_the_files_and_folders_of_a_process_that_is_gone_are_removed(tmp_path):
    name_of_child(tmp_path).write_text("half")
    folder = name_of_child(tmp_path)
    folder.mkdir()
    (folder / "part").write_text("half")
    (tmp_path / f".old.{DEAD}-0badcafe.tmp").write_text("named without a host")
    own = temporary_sibling(tmp_path / "own")
    own.write_text("being written")
    others = [tmp_path / "file.tmp", tmp_path / ".hidden", tmp_path / ".x.1-2.tmp"]
    for path in others:
        path.write_text("a user's")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([own, *others])


def test_folders_below_are_searched_only_on_request(tmp_path):
    below = tmp_path / "figures" / f".a.svg.{DEAD}-0badcafe.tmp"
    below.parent.mkdir()
    below.write_text("half")
    remove_leftovers(tmp_path)
    assert below.exists()
    remove_leftovers(tmp_path, depth=1)
    assert not below.exists()
    remove_leftovers(tmp_path / "absent", depth=1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_number_that_was_taken_over_is_recognised(tmp_path):
    ended = name_of_child(tmp_path).name
    pid = ended.split(".")[-2].split("-")[0]
    reused = tmp_path / ended.replace(f".{pid}-", f".{os.getpid()}-")
    reused.write_text("half")
    assert is_leftover(reused)


def test_files_of_another_host_stay_for_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    leftovers._host_digest.cache_clear()
    path = temporary_sibling(tmp_path / "file")
    monkeypatch.undo()
    leftovers._host_digest.cache_clear()
    path.write_text("being written there")
    path = path.rename(path.with_name(path.name.replace(f".{os.getpid()}-", f".{DEAD}-")))
    assert not is_leftover(path)
    old = path.stat().st_mtime - leftovers.FOREIGN_SECONDS - 60
    os.utime(path, (old, old))
    assert is_leftover(path)


def test_the_first_write_into_a_folder_tidies_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_tidied_folders", set())
    left = tmp_path / f".out.{DEAD}-0badcafe.tmp"
    left.write_text("half")
    write_text(tmp_path / "other", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_lock_that_a_killed_process_set_aside_is_removed(tmp_path):
    """A kill can fall between the moments when filelock renames a dead lock and removes it."""
    dead, live = (
        tmp_path / f".lock-owner.break.{process}.{'0a' * 16}" for process in (DEAD, os.getpid())
    )
    dead.touch()
    live.touch()
    remove_leftovers(tmp_path)
    assert not dead.exists()
    assert live.exists()

"""Atomic writes: complete or absent, with the permissions of any new file."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robustsoup.errors import StorageError
from robustsoup.files import (
    append_text,
    atomic_path,
    cache_folder,
    link_file,
    open_regular,
    read_regular,
    remove_file,
    write_text,
    write_torch,
)

needs_permissions = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions stop"
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folders_and_nothing_else(tmp_path):
    write_text(tmp_path / "a" / "b" / "note.txt", "grüße\n")
    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == "grüße\n".encode()
    assert names(tmp_path / "a" / "b") == ["note.txt"]


def test_the_temporary_file_lies_beside_the_target_and_is_empty(tmp_path):
    with atomic_path(tmp_path / "file") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".file.")
        assert temporary.name.endswith(".tmp")
        assert temporary.read_bytes() == b""
        assert not (tmp_path / "file").exists()
        temporary.write_bytes(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")

    def write_half():
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_error_of_the_file_system_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("old")
    text = r"file/below: cannot be written: .*; nothing was changed"
    with pytest.raises(StorageError, match=text):
        write_text(tmp_path / "file" / "below", "new")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(StorageError, match="folder: cannot be written: "):
        write_text(tmp_path / "folder", "new")
    assert names(tmp_path) == ["file", "folder"]


def test_an_error_of_torch_save_is_a_storage_error(tmp_path, monkeypatch):
    def fail(content, path):
        raise RuntimeError("unexpected pos 64 vs 0\nmore lines")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(StorageError, match="cannot be written: unexpected pos 64 vs 0;"):
        write_torch(tmp_path / "state.pt", {})
    assert names(tmp_path) == []


def test_tensors_that_could_not_be_read_again_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("robustsoup.files.MAX_FILE_BYTES", 100)
    with pytest.raises(
        StorageError, match="bytes, and 100 are the most that are read again; fewer"
    ):
        write_torch(tmp_path / "state.pt", {"a": torch.arange(3)})
    assert names(tmp_path) == []


def test_tensors_are_written(tmp_path):
    write_torch(tmp_path / "state.pt", {"a": torch.arange(3)})
    assert torch.equal(torch.load(tmp_path / "state.pt")["a"], torch.arange(3))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    """In a process of its own, since the umask belongs to the whole process."""
    masks = [0o022, 0o027, 0o077, 0o000]
    script = f"""
import os
from robustsoup.files import atomic_path, write_text
for umask in {masks}:
    os.umask(umask)
    write_text(f"text-{{umask}}", "content")
    with atomic_path(f"private-{{umask}}") as temporary:
        temporary.write_text("content")
        temporary.chmod(0o600)  # as writers do that create private files
    assert os.umask(umask) == umask
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    for umask in masks:
        for name in ("text", "private"):
            mode = stat.S_IMODE((tmp_path / f"{name}-{umask}").stat().st_mode)
            assert mode == 0o666 & ~umask


def test_importing_does_not_touch_the_umask(monkeypatch):
    """Between two calls of os.umask, files of other threads would get wrong permissions."""

    def refuse(mask):
        raise AssertionError("os.umask was called")

    monkeypatch.setattr(os, "umask", refuse)
    source = Path(atomic_path.__wrapped__.__code__.co_filename)
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), {"__name__": "again"})


@needs_permissions
def test_a_folder_without_permission_is_a_storage_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            write_text(tmp_path / "file", "new")
    finally:
        tmp_path.chmod(0o700)


def test_a_link_shares_the_file_and_replaces_what_was_there(tmp_path):
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_text("content")
    write_text(target, "old")
    link_file(source, target)
    assert target.read_text() == "content"
    assert target.samefile(source)
    link_file(source, target)  # linking again changes nothing
    assert target.samefile(source)
    assert names(target.parent) == ["target"]


def test_a_file_system_without_hard_links_gets_a_copy(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", fail)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("content")
    link_file(source, target)
    assert target.read_text() == "content"
    assert not target.samefile(source)


def test_removing_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    remove_file(path)
    remove_file(path)  # an absent file is no error
    assert names(tmp_path) == []
    with pytest.raises(StorageError, match="cannot be removed"):
        remove_file(tmp_path)


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "robustsoup"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "robustsoup"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "robustsoup"


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(StorageError, match="no home folder; set HOME or XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "robustsoup"


def make_fifo(path):
    os.mkfifo(path)
    return path


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


IRREGULAR = {
    "a folder": lambda path: path.parent,
    "a FIFO": make_fifo,
    "a socket": make_socket,
    "a device": lambda path: Path("/dev/zero"),
}


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices are files on POSIX systems")
@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "linked"])
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind, linked):
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    path = IRREGULAR[kind](Path("irregular"))
    if linked:
        Path("link").symlink_to(path)
        path = Path("link")
    for read in (open_regular, lambda path: read_regular(path, 10)):
        with pytest.raises(OSError, match=f"got {kind}, expected a regular file"):
            read(path)


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices are files on POSIX systems")
@pytest.mark.parametrize("kind", IRREGULAR)
def test_only_regular_files_are_replaced(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    path = Path("folder") if kind == "a folder" else IRREGULAR[kind](Path("irregular"))
    mode = path.stat().st_mode
    with pytest.raises(StorageError, match=f"got {kind}, expected a regular file"):
        write_text(path, "text")
    assert path.stat().st_mode == mode
    assert set(names(tmp_path)) <= {"folder", "irregular"}


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices are files on POSIX systems")
@pytest.mark.parametrize("kind", IRREGULAR)
def test_text_is_appended_to_regular_files_alone(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"regular file|No such device|Is a directory"):
        append_text(IRREGULAR[kind](Path("irregular")), "text")
    for _ in range(2):
        append_text(Path("file"), "ü\n")
    assert Path("file").read_text(encoding="utf-8") == "ü\nü\n"


def test_a_regular_file_is_read_up_to_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_regular(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="larger than 9 bytes, the most that is read"):
        read_regular(path, 9)
    with open_regular(path) as file:
        assert file.read() == b"x" * 10


@pytest.mark.parametrize("name", ["missing", "nul\0"])
def test_a_file_that_cannot_exist_is_an_error_of_the_system(tmp_path, name):
    with pytest.raises(OSError, match=r"No such file|NUL"):
        read_regular(tmp_path / name, 10)

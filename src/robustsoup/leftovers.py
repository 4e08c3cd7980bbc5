"""Names of temporary files that say which process writes them, and removal of dead ones' files.

A temporary file is called `.NAME.PID-RANDOM-HOST-START.tmp`. HOST and START are digests of the
host and of the moment when the process started, so a process number that another process has
taken over since, or that belongs to another host, is not mistaken for the writer.
"""

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

FOREIGN_SECONDS = 24 * 3600
"""Seconds without a change after which the temporary file of another host is a leftover."""

_LONGEST_NAME = 120
"""Letters of the target's name that a temporary name holds; file systems allow 255 bytes."""
_TEMPORARY_NAME = re.compile(
    r"\..*\.(?P<pid>\d+)-[0-9a-f]{8}(?:-(?P<host>[0-9a-f]{8})-(?P<start>[0-9a-f]{8}|0))?\.tmp"
)
_UNKNOWN_START = "0"
_SET_ASIDE = re.compile(r".*-owner\.break\.(?P<pid>\d+)\.[0-9a-f]{32}")
"""A dead owner's lock, which filelock renames for a moment before it removes it."""


def temporary_sibling(target: Path) -> Path:
    """Return a new path beside `target` for a file or a folder that this process writes."""
    process = os.getpid()
    owner = f"{process}-{secrets.token_hex(4)}-{_host_digest()}-{_start_digest(process)}"
    return target.with_name(f".{target.name[:_LONGEST_NAME]}.{owner}.tmp")


def remove_leftovers(folder: Path, *, depth: int = 0) -> None:
    """Remove temporary files and folders whose process is gone; errors are ignored.

    Args:
        folder: The folder; it may be absent.
        depth: How many levels of folders below it are searched too.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        if is_leftover(path):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if is_folder else path.unlink()
        elif depth and is_folder:
            remove_leftovers(path, depth=depth - 1)


def is_leftover(path: Path) -> bool:
    """Return whether a path is the temporary file or folder of a process that is gone.

    Nobody can tell whether a process of another host runs; its files count as left over once they
    have not changed for a day.
    """
    aside = _SET_ASIDE.fullmatch(path.name)
    if aside is not None:
        return not _process_exists(int(aside["pid"]))
    name = _TEMPORARY_NAME.fullmatch(path.name)
    if name is None:
        return False
    if name["host"] not in (None, _host_digest()):
        return _unchanged_seconds(path) > FOREIGN_SECONDS
    process = int(name["pid"])
    if not _process_exists(process):
        return True
    starts = {name["start"] or _UNKNOWN_START, _start_digest(process)}
    return len(starts - {_UNKNOWN_START}) == 2


def _unchanged_seconds(path: Path) -> float:
    """Return the seconds since a file, or a folder or a file in it, last changed."""
    try:
        inside = list(path.iterdir()) if path.is_dir() else []
        return time.time() - max(entry.lstat().st_mtime for entry in (path, *inside))
    except OSError:
        return 0.0


def _process_exists(process: int) -> bool:
    if os.name != "posix":  # os.kill ends the process there
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@functools.cache
def _host_digest() -> str:
    """Return a digest of the host's name and, on Linux, of the namespace of process numbers."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return _short_digest(f"{socket.gethostname()} {namespace}")


def _start_digest(process: int) -> str:
    """Return a digest of the boot and the moment when a process started; "0" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        started = fields.rpartition(")")[2].split()[19]
    except (OSError, IndexError, UnicodeError):
        return _UNKNOWN_START
    return _short_digest(f"{boot} {started}")


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]

"""Locks: one writer for each folder and each step, on one machine and on several.

A lock is two files. The first is locked by the kernel, which frees it when its process ends,
however that happens; it decides between processes of one machine. The second names its owner (host,
boot, process, start of the process) and is renewed by a thread; it decides between machines that
share a file system. It is taken from a process of this host that is gone, and from another host
once it has not been renewed for LEASE_SECONDS.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, SoftFileLease, Timeout

from robustsoup.errors import StorageError
from robustsoup.leftovers import remove_leftovers

LEASE_SECONDS = 60.0
"""Seconds after which a lock that its owner does not renew may be taken by another host."""
POLL_SECONDS = 0.2
UNNAMED_SECONDS = 2.0
"""Seconds after which a file for the owner that stays empty is removed."""

LOCK_NAME = ".lock"
"""The lock of a folder, in it."""
HELD_NAME = ".in-use"
"""The file in a cache folder that processes lock which use the folder."""
_NO_KERNEL_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

Notice = Callable[[str], None]
"""Receives one line, such as what is waited for."""


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds.

    Attributes:
        name: What is locked.
        lease: The file that names the owner.
    """

    name: str
    lease: SoftFileLease

    def check(self) -> None:
        """Check that the lock was not lost, before results are published under it.

        Raises:
            StorageError: This process stood still for so long that another host took the lock.
        """
        if self.lease.compromise is not None:
            raise StorageError(
                f"{self.name}: another host took the lock while this process stood still; "
                "run the same command again"
            )


@contextlib.contextmanager
def lock_folder(folder: Path, notice: Notice) -> Iterator[None]:
    """Create a folder and keep other commands from writing to it; they wait.

    Removes the temporary files that killed processes left in the folder and the folders in it.

    Args:
        folder: The folder.
        notice: Receives one line if this process must wait.

    Raises:
        StorageError: The folder cannot be created or written.
    """
    _create_folder(folder)
    with hold_lock(folder / LOCK_NAME, str(folder), notice):
        remove_leftovers(folder, depth=1)
        yield


@contextlib.contextmanager
def lock_file(path: Path, notice: Notice) -> Iterator[None]:
    """Keep other commands from writing a file; they wait.

    Removes the temporary files that killed processes left beside the file.

    Args:
        path: The file; missing parent folders are created.
        notice: Receives one line if this process must wait.

    Raises:
        StorageError: The folder of the file cannot be created or written.
    """
    _create_folder(path.parent)
    with hold_lock(path.with_name(f".{path.name}{LOCK_NAME}"), str(path), notice):
        remove_leftovers(path.parent)
        yield


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: the folder cannot be created: {error.strerror}; set another one with -o"
        ) from error


@contextlib.contextmanager
def hold_lock(path: Path, name: str, notice: Notice) -> Iterator[Lock]:
    """Hold the lock of a path; wait for another process that holds it.

    Args:
        path: The lock file; a second one lies beside it while the lock is held.
        name: What is locked, for messages.
        notice: Receives one line if this process must wait.

    Raises:
        StorageError: The lock file cannot be written.
    """
    kernel = FileLock(path, poll_interval=POLL_SECONDS)
    lease = SoftFileLease(
        path.with_name(f"{path.name}-owner"),
        lease_duration=LEASE_SECONDS,
        poll_interval=POLL_SECONDS,
    )
    try:
        waited = _acquire(kernel, lease, name, notice, waited=False)
        _acquire(lease, lease, name, notice, waited=waited)
    except OSError as error:
        kernel.release()
        raise StorageError(f"{name}: cannot be locked: {error.strerror or error}") from error
    except BaseException:
        kernel.release()
        raise
    try:
        yield Lock(name, lease)
    finally:
        lease.release()
        if sys.platform != "win32":  # which refuses to remove an open file
            with contextlib.suppress(OSError):
                path.unlink()
        kernel.release()


def _acquire(
    lock: FileLock | SoftFileLease,
    lease: SoftFileLease,
    name: str,
    notice: Notice,
    *,
    waited: bool,
) -> bool:
    """Acquire a lock and return whether this process had to wait, which is noticed once."""
    try:
        lock.acquire(timeout=2 * POLL_SECONDS)  # 3.30 takes a dead owner's lock at the second try
    except Timeout:
        if lock is lease and _remove_unnamed(Path(lease.lock_file)):
            return _acquire(lock, lease, name, notice, waited=waited)
        if not waited:
            notice(f"{name}: {_describe_owner(lease)} is writing there; waiting until it ends")
        lock.acquire()
        return True
    except OSError as error:
        if lock is lease or error.errno not in _NO_KERNEL_LOCKS:
            raise
    return waited


def _remove_unnamed(path: Path) -> bool:
    """Remove a file for the owner that stays empty, and return whether it was.

    Its process was killed between creating the file and writing its name. No other process of this
    host is between the two, because this one holds the kernel's lock.
    """
    with contextlib.suppress(OSError):
        first = path.stat()
        began = time.monotonic()
        while first.st_size == 0 and _same_file(path.stat(), first):
            if time.monotonic() - began >= UNNAMED_SECONDS:
                path.unlink()
                return True
            time.sleep(POLL_SECONDS)
    return False


def _same_file(a: os.stat_result, b: os.stat_result) -> bool:
    return (a.st_ino, a.st_size, a.st_ctime_ns) == (b.st_ino, b.st_size, b.st_ctime_ns)


def _describe_owner(lease: SoftFileLease) -> str:
    """Return the process that a lease names: "process 12 on host a"."""
    owner = lease.owner
    if owner is None:
        return "another process"
    return f"process {owner.pid} on {owner.hostname.partition('?')[0] or 'this host'}"


_held_folders: dict[Path, int] = {}
"""File descriptors of the folders that this process reads, by folder."""


def hold_folder(folder: Path) -> None:
    """Keep `prune` from emptying a cache folder until this process ends; any number may hold it.

    Where locks or writing are not possible, nothing is held.
    """
    if sys.platform == "win32" or folder in _held_folders:
        return
    import fcntl

    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / HELD_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        _held_folders[folder] = descriptor
        fcntl.flock(descriptor, fcntl.LOCK_SH)


@contextlib.contextmanager
def claim_unused_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from holding a cache folder, which must not be held now.

    Raises:
        StorageError: Another process holds the folder, or it cannot be written.
    """
    if (own := _held_folders.pop(folder, None)) is not None:
        os.close(own)
    if sys.platform == "win32":  # which refuses to remove files that are in use
        yield
        return
    import fcntl

    try:
        descriptor = os.open(folder / HELD_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be emptied: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"{folder}: another process of robustsoup uses it; prune when it has ended"
            ) from None
        except OSError as error:
            raise StorageError(f"{folder}: cannot be locked: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)

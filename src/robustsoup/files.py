"""Atomic file writes, bounded reads, and the location of the user's cache folder."""

import contextlib
import errno
import os
import shutil
import stat
import sys
from collections.abc import Generator, Iterator
from io import BufferedReader
from pathlib import Path

import torch

from robustsoup.archives import seal_archive
from robustsoup.errors import RequestError, StorageError
from robustsoup.file_bytes import MAX_FILE_BYTES
from robustsoup.leftovers import remove_leftovers, temporary_sibling
from robustsoup.paths import user_path


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Yield a temporary path beside `target`, then flush it to disk and rename it to `target`.

    The temporary file exists and is empty when it is yielded. If an error occurs, the temporary
    file is removed and `target` stays as it was. The written file has the permissions of any new
    file of this process, whatever the writer sets. The first write of a process into a folder
    removes the temporary files that killed processes left there.

    Args:
        target: Path of the file to write; missing parent folders are created.

    Raises:
        StorageError: If the file system refuses to write (disk full, no permission).
    """
    target = user_path(target)
    temporary = temporary_sibling(target)
    try:
        if target.exists():  # a rename would put a file in the place of a device
            _require_regular(target.stat().st_mode, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _tidy_folder(target.parent)
        mode = _create_empty_file(temporary)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        temporary.replace(target)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot be written: {error.strerror or error}; nothing was changed"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


_tidied_folders: set[Path] = set()
"""Folders from which this process has removed the temporary files of killed processes."""


def _tidy_folder(folder: Path) -> None:
    folder = folder.absolute()
    if folder not in _tidied_folders:
        _tidied_folders.add(folder)
        remove_leftovers(folder)


def _create_empty_file(path: Path) -> int:
    """Create `path` and return its mode: 0o666 less the umask, which the kernel applies.

    `os.umask` cannot read the umask without changing it for the whole process.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)


def check_writable(path: str | os.PathLike[str], *, folder: bool) -> None:
    """Check before long work that a file or a folder can be written; nothing is created.

    Args:
        path: The output; it and its parents may not exist yet.
        folder: Whether a folder is to be written, instead of a file.

    Raises:
        StorageError: There is something of another kind, or a folder without permission.
    """
    path = user_path(path)
    try:
        if not folder and path.exists():
            _require_regular(path.stat().st_mode, path)
        existing = path if folder else path.parent
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing}: got a file, expected a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{existing}: no permission to write")
    except OSError as error:
        message = f"{path}: cannot be written: {error.strerror}; set another one with -o"
        raise StorageError(message) from None


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time enter the block; the others wait.

    Leaves no file. Where folders cannot be locked (Windows, some network file systems), all enter.

    Args:
        folder: What is locked; created if it is missing.

    Raises:
        StorageError: The folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be created: {error.strerror}") from error
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `target` atomically, as UTF-8."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_torch(target: str | os.PathLike[str], content: object) -> None:
    """Write `content` to `target` atomically with `torch.save`, and add its digests.

    Raises:
        StorageError: If the file cannot be written, which includes torch.save's RuntimeError, or
            is larger than MAX_FILE_BYTES.
    """
    with atomic_path(target) as temporary:
        try:
            # Into an open file: torch.save writes the name of a path into the content.
            with temporary.open("wb") as file:
                torch.save(content, file)
                size = file.tell()
            if size > MAX_FILE_BYTES:
                raise OSError(
                    errno.EFBIG,
                    f"{size:,} bytes, and {MAX_FILE_BYTES:,} are the most that are read again; "
                    "fewer samples, no kept points or a smaller network take less",
                )
            seal_archive(temporary)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def append_text(path: Path, text: str) -> None:
    """Append text to a regular file, which is created if it is missing; never waits.

    Raises:
        OSError: The file cannot be written or is not a regular file, such as a FIFO.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        _require_regular(os.fstat(file.fileno()).st_mode, path)
        file.write(text)


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading, without waiting.

    A FIFO, a device or a socket is refused before it is opened: opening one can wait for ever, and
    reading one may never end.

    Args:
        path: The file; symbolic links are followed.

    Returns:
        The file, opened in binary mode.

    Raises:
        OSError: The file is missing, unreadable, or not a regular file; `strerror` is the reason.
    """
    try:
        path = user_path(path)
    except RequestError as error:  # no file has such a name
        raise OSError(errno.EINVAL, str(error)) from None
    _require_regular(path.stat().st_mode, path)
    # The flag keeps the call from waiting if a FIFO took the file's place in between.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Args:
        path: The file.
        limit: Largest size in bytes; no more is ever read, whatever size the file claims to have.

    Raises:
        OSError: The file is missing, unreadable, not a regular file, or larger than `limit`;
            `strerror` is the reason.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        reason = f"the file is larger than {limit:,} bytes, the most that is read"
        raise OSError(errno.EFBIG, reason, str(path))
    return content


_BINARY: int = getattr(os, "O_BINARY", 0)
_FILE_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _require_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in _FILE_KINDS if test(mode)), "something else")
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"got {kind}, expected a regular file", str(path))


def link_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system has no hard links.

    Both names share one content, so this is only for folders that nobody edits.
    """
    if target.exists() and target.samefile(source):
        return
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, with the time of its last change.

    Where the file system can (Btrfs, XFS), the copy is a clone: it takes no space until one of the
    two files changes.

    Raises:
        StorageError: The file cannot be written.
    """
    with atomic_path(target) as temporary:
        state = source.stat()
        if not _clone_file(source, temporary):
            shutil.copyfile(source, temporary)
        os.utime(temporary, ns=(state.st_atime_ns, state.st_mtime_ns))


def _clone_file(source: Path, target: Path) -> bool:
    """Let `target` share the blocks of `source` until one changes; False if that is impossible."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as file, target.open("r+b") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, file.fileno())
        except OSError:
            return False
    return True


_FICLONE = 0x40049409
"""The request of ioctl that clones a file (linux/fs.h)."""


def remove_file(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror or error}") from error


def remove_path(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if there is one.

    Raises:
        OSError: If the file system refuses.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return robustsoup's cache folder.

    It lies in XDG_CACHE_HOME (by default ~/.cache) on Linux, in ~/Library/Caches on macOS and in
    LOCALAPPDATA on Windows.

    Raises:
        StorageError: The user has no home folder, as in a container that runs under a bare number.
    """
    if sys.platform == "darwin":
        base = _home_folder() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or _home_folder() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home_folder() / ".cache")
    return base / "robustsoup"


def _home_folder() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise StorageError(
            "cache: the user of this process has no home folder; "
            "set HOME or XDG_CACHE_HOME to a folder that it can write"
        ) from None

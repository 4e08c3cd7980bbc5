"""Atomic file writes, and the location of the user's cache folder."""

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Generator
from pathlib import Path

import torch

from robustsoup.errors import StorageError


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Yield a temporary path beside `target`, then flush it to disk and rename it to `target`.

    The temporary file exists and is empty when it is yielded. If an error occurs, the temporary
    file is removed and `target` stays as it was. The written file has the permissions of any new
    file of this process, whatever the writer sets.

    Args:
        target: Path of the file to write; missing parent folders are created.

    Raises:
        StorageError: If the file system refuses to write (disk full, no permission).
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
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


def _create_empty_file(path: Path) -> int:
    """Create `path` and return its mode: 0o666 less the umask, which the kernel applies.

    `os.umask` cannot read the umask without changing it for the whole process.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `target` atomically, as UTF-8."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_torch(target: str | os.PathLike[str], content: object) -> None:
    """Write `content` to `target` atomically with `torch.save`.

    Raises:
        StorageError: If the file cannot be written; this includes torch.save's RuntimeError.
    """
    with atomic_path(target) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def link_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system has no hard links."""
    if target.exists() and target.samefile(source):
        return
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def remove_file(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror or error}") from error


def cache_folder() -> Path:
    """Return robustsoup's cache folder.

    It lies in XDG_CACHE_HOME (by default ~/.cache) on Linux, in ~/Library/Caches on macOS and in
    LOCALAPPDATA on Windows.
    """
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "robustsoup"

"""Writing files so that each is complete or absent, and where the user's cache folder is."""

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from robustsoup.errors import StorageError

_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success flush it to disk and rename it to `target`.

    On any error the temporary file is removed and what was at `target` before is untouched.
    Raises StorageError where the system refuses to write (no space left, no permission).
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot be written: {error.strerror or error}; nothing was changed there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(target: str | os.PathLike, text: str) -> None:
    """Write `text` to `target` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_torch(target: str | os.PathLike, content: object) -> None:
    """torch.save `content` to `target`, whole or not at all; its writer's errors become StorageError too."""
    with atomic_path(target) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, by a hard link where the file system can, else a copy."""
    if target.exists() and os.path.samefile(source, target):
        return
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def remove(path: Path) -> None:
    """Remove a file if it is there. Raises StorageError where the system refuses."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror or error}") from error


def cache_folder() -> Path:
    """The user's cache folder for robustsoup: XDG_CACHE_HOME on Linux, the platform's own place elsewhere."""
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "robustsoup"

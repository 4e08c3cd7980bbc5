"""The store: outputs of finished steps by key, shared by all recipes."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from robustsoup.errors import StorageError
from robustsoup.files import cache_folder, write_text

RECORD = "step.json"


class Store:
    """A folder of finished steps.

    The folder of a step is complete or absent: it is written under a temporary name, then renamed.

    Args:
        root: The folder; by default $ROBUSTSOUP_STORE, else `store` in the user's cache.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root or os.environ.get("ROBUSTSOUP_STORE") or cache_folder() / "store")

    def path(self, key: str) -> Path:
        """Return the folder of a step, whether it exists or not."""
        return self.root / key[:2] / key

    def has(self, key: str) -> bool:
        """Return whether a step is finished."""
        return (self.path(key) / RECORD).is_file()

    def record(self, key: str) -> dict[str, Any]:
        """Return the record of a finished step."""
        return json.loads((self.path(key) / RECORD).read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def write_step(self, key: str, record: dict[str, Any]) -> Iterator[Path | None]:
        """Yield the folder for the output of a step.

        On success, the folder becomes the finished step, without its state.pt. After an error or a
        kill, the folder stays, and the next attempt receives it. A lock admits one process.

        Args:
            key: The step.
            record: The record of the step, written on success; may be changed until then.

        Yields:
            The folder, or None if another process has finished the step.

        Raises:
            StorageError: The store cannot be written.
        """
        final = self.path(key)
        partial, lock = final.with_name(f"{key}.partial"), final.with_name(f"{key}.lock")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if self.has(key):
                    yield None
                    return
                partial.mkdir(parents=True, exist_ok=True)
                yield partial
                _remove_step_leftovers(partial)
                write_text(partial / RECORD, json.dumps(record, indent=1, sort_keys=True))
                if final.exists():
                    shutil.rmtree(final)
                partial.replace(final)
        except OSError as error:
            raise StorageError(
                f"{final}: the store cannot be written: {error.strerror or error}"
            ) from error
        with contextlib.suppress(OSError):
            lock.unlink()


def _remove_step_leftovers(folder: Path) -> None:
    """Remove the saved state, and the temporary files of interrupted attempts."""
    for path in (folder / "state.pt", *folder.rglob(".*.tmp")):
        path.unlink(missing_ok=True)

"""The store: finished steps by key, so that recipes share bases, ingredients and evaluations."""

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


class Store:
    """A folder of finished steps. A step's folder is complete or absent: it is filled under another name and renamed."""

    def __init__(self, root: str | os.PathLike | None = None) -> None:
        self.root = Path(root or os.environ.get("ROBUSTSOUP_STORE") or cache_folder() / "store")

    def path(self, key: str) -> Path:
        """Where the output of the step `key` is, or will be."""
        return self.root / key[:2] / key

    def has(self, key: str) -> bool:
        """Whether the step is finished."""
        return (self.path(key) / "step.json").is_file()

    @contextlib.contextmanager
    def filling(self, key: str, record: dict[str, Any]) -> Iterator[Path | None]:
        """Yield the folder to put the step's output into, or None if another process finished it meanwhile.

        On success the folder becomes the finished step, with `record` as its step.json; on an error or a kill it stays
        as it is, and the next attempt is given it with whatever state it holds. One process at a time. A file named
        state.pt in it is dropped at the end.
        """
        final = self.path(key)
        partial = final.with_name(f"{key}.partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = FileLock(final.with_name(f"{key}.lock"))
            with lock:
                if self.has(key):
                    yield None
                    return
                partial.mkdir(parents=True, exist_ok=True)
                yield partial
                for leftover in (
                    partial / "state.pt",
                    *partial.rglob(".*.tmp"),
                ):  # the latter of killed writes
                    leftover.unlink(missing_ok=True)
                write_text(partial / "step.json", json.dumps(record, indent=1, sort_keys=True))
                if final.exists():
                    shutil.rmtree(final)
                os.replace(partial, final)
        except OSError as error:
            raise StorageError(
                f"{final}: the store cannot be written: {error.strerror or error}"
            ) from error
        with contextlib.suppress(OSError):
            final.with_name(f"{key}.lock").unlink()

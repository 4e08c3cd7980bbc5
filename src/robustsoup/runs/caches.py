"""The caches of this user: the store, decoded folders, digests, and copies of checkpoints."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from robustsoup.checkpoints.remote import copies_folder
from robustsoup.data.decoded import decoded_folder
from robustsoup.data.synthetic import digest_cache
from robustsoup.errors import StorageError
from robustsoup.files import remove_path
from robustsoup.runs.locks import claim_unused_folder, hold_folder
from robustsoup.runs.store import UNFINISHED, Store

_STORE_ENTRY = re.compile(
    r"[0-9a-f]{2}/[0-9a-f]+(\.partial)?|"
    + UNFINISHED
    + r"/[0-9a-f]+(\.rank\d+)?\.(pt|json|npz|points\.npz)"
)
_CACHE_ENTRY = re.compile(r"([a-z]+-)?[0-9a-f]{32}(\.json|\.partial)?")


@dataclass(frozen=True)
class Cache:
    """A folder whose entries can be made again.

    Attributes:
        name: What the entries are.
        folder: The folder; it may be absent.
        list_entries: Returns the entries; other files in the folder are not robustsoup's.
    """

    name: str
    folder: Path
    list_entries: Callable[[Path], Iterator[Path]]

    def entries(self) -> list[Path]:
        """Return the files and folders that are entries."""
        return sorted(self.list_entries(self.folder))

    def prune(self) -> None:
        """Remove all entries.

        Raises:
            StorageError: Another process uses the folder, or an entry cannot be removed.
        """
        if not self.folder.is_dir():
            return
        with claim_unused_folder(self.folder):
            for entry in self.entries():
                _remove_entry(entry)


def list_caches() -> list[Cache]:
    """Return the caches that commands of this user fill."""
    return [
        Cache("steps", Store().root, _list_store_entries),
        Cache("decoded folders", decoded_folder(), _list_cache_entries),
        Cache("digests", digest_cache(), _list_cache_entries),
        Cache("remote checkpoints", copies_folder(), _list_cache_entries),
    ]


def hold_caches() -> None:
    """Keep the caches from being pruned until this process ends, and tidy the store."""
    Store().hold()
    hold_folder(decoded_folder())
    hold_folder(copies_folder())


def _list_store_entries(folder: Path) -> Iterator[Path]:
    for entry in folder.glob("*/*"):
        if _STORE_ENTRY.fullmatch(entry.relative_to(folder).as_posix()):
            yield entry


def _list_cache_entries(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.glob("*") if _CACHE_ENTRY.fullmatch(entry.name))


def _remove_entry(entry: Path) -> None:
    try:
        remove_path(entry)
    except OSError as error:
        raise StorageError(f"{entry}: cannot be removed: {error.strerror or error}") from error

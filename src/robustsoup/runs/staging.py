"""Publication of a run folder: all files are written beside it first, and results.json is last."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from robustsoup.digests import FileDigest, digest_folder
from robustsoup.errors import StorageError
from robustsoup.files import copy_file
from robustsoup.interruption import held_signals
from robustsoup.leftovers import temporary_sibling
from robustsoup.runs.store import Store

RESULTS = "results.json"
LOG = "log.txt"
PAGE = "report.html"


@dataclass(frozen=True)
class StagedFiles:
    """The new files of a run folder, which are not under their names yet.

    Attributes:
        folder: The run folder.
        staging: A temporary folder in it, with new files under their later names.
        store: Finished steps.
        stored: Digests of the files that were copied from the store or are in the run folder
            already, by name.
    """

    folder: Path
    staging: Path
    store: Store
    stored: dict[str, FileDigest] = field(default_factory=dict)

    def new_path(self, name: str) -> Path:
        """Return the path to write a new file of the run folder to."""
        return self.staging / name

    def copy(self, key: str, file: str, name: str) -> None:
        """Copy a file of a finished step, unless the run folder holds the same file already.

        Args:
            key: The step.
            file: Name of the file in the step.
            name: Name of the file in the run folder.

        Raises:
            StorageError: The stored file is damaged, or the copy cannot be written.
        """
        digest = self.stored[name] = self.store.digest_of(key, file)
        if digest.find_damage(self.folder / name, thorough=True) is not None:
            copy_file(self.store.file(key, file), self.staging / name)

    def digest_files(self) -> dict[str, FileDigest]:
        """Return the digest of every file that the run folder will hold, by name."""
        new = digest_folder(self.staging)
        return dict(sorted((new | self.stored).items()))

    def publish(self, replaced: set[str]) -> None:
        """Rename the new files to their names and remove replaced ones, results.json last.

        A signal waits for the end. After a kill, the old results.json still names the files that
        the next run removes.

        Args:
            replaced: Files of the earlier run; those that are not among the new files are removed.
        """
        new = {
            path.relative_to(self.staging).as_posix()
            for path in self.staging.rglob("*")
            if path.is_file()
        }
        with held_signals():
            for name in sorted(new - {RESULTS}):
                self._rename(name)
            for name in replaced - new - set(self.stored):
                if (self.folder / name).is_file():
                    (self.folder / name).unlink()
            self._rename(RESULTS)

    def _rename(self, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.staging / name).replace(target)


@contextlib.contextmanager
def stage_files(folder: Path, store: Store) -> Iterator[StagedFiles]:
    """Yield a place for the new files of a run folder; what was not published is removed.

    Raises:
        StorageError: The folder cannot be written.
    """
    staging = temporary_sibling(folder / "staging")
    try:
        staging.mkdir(parents=True)
        yield StagedFiles(folder, staging, store)
    except OSError as error:
        raise StorageError(
            f"{folder}: the results cannot be written: {error.strerror or error}; "
            "finished steps are in the store, run the same command again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)

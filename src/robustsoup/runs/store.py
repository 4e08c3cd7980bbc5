"""The store: outputs of finished steps by key, shared by all recipes."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustsoup.digests import FileDigest, digest_folder, digest_json, find_damaged_file
from robustsoup.documents import read_json
from robustsoup.errors import StorageError
from robustsoup.files import cache_folder, remove_path, write_text
from robustsoup.interruption import held_signals
from robustsoup.leftovers import remove_leftovers
from robustsoup.paths import user_path
from robustsoup.runs.locks import Notice, hold_folder, hold_lock
from robustsoup.schema import MisfitError, anything, mapping_of, number, table, text

RECORD = "step.json"
STATE = "state.pt"
UNFINISHED = "unfinished"
"""The folder in the store for states of interrupted evaluations."""
_KEY_GLOB = "??/*/"
_KEY = re.compile("[0-9a-f]{32}")
"""What the key of a step is, so that other folders of such names are no steps."""
_check_step = table(
    {"files": mapping_of(anything), "digest": text},
    {"inputs": mapping_of(text), "seconds": number, "key": text},
)
"""The entries of a record that code reads."""


@dataclass(frozen=True)
class StoredStep:
    """A finished step, as its record describes it.

    Attributes:
        key: The step; None in records without it.
        record: Settings and cost of the step.
        files: Digest of each file, by name in the folder.
        inputs: Digest of the outputs of each parent that the step read, by key.
    """

    key: str | None
    record: Mapping[str, Any]
    files: Mapping[str, FileDigest]
    inputs: Mapping[str, str]

    @property
    def digest(self) -> str:
        """sha256 (hex) over names and contents of the files."""
        contents = {name: file.sha256 for name, file in self.files.items()}
        return digest_json(contents)

    def to_json(self) -> dict[str, Any]:
        """Return the content of step.json, which ends with a digest of all the rest."""
        content: dict[str, Any] = {
            **self.record,
            "key": self.key,
            "files": {name: file.to_json() for name, file in self.files.items()},
            "inputs": dict(self.inputs),
        }
        return {**content, "digest": digest_json(content)}

    @classmethod
    def from_json(cls, content: Any) -> "StoredStep":
        """Read what `to_json` returned.

        Raises:
            ValueError: The content is something else, or changed.
        """
        try:
            _check_step(content, "record")
        except MisfitError as misfit:
            raise ValueError(f"not the record of a step: {misfit}") from None
        rest = {key: value for key, value in content.items() if key != "digest"}
        if content.get("digest") != digest_json(rest):
            raise ValueError("its content changed")
        files = {str(n): FileDigest.from_json(file) for n, file in rest.pop("files").items()}
        key, inputs = rest.pop("key", None), dict(rest.pop("inputs", {}))
        return cls(key=key, files=files, inputs=inputs, record=rest)


class Store:
    """A folder of finished steps.

    The folder of a step is complete or absent: it is written under a temporary name, then renamed.
    Its record holds a digest of each file; a step whose files differ from them is not finished.

    Args:
        root: The folder; by default $ROBUSTSOUP_STORE, else `store` in the user's cache.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = user_path(
            root or os.environ.get("ROBUSTSOUP_STORE") or cache_folder() / "store"
        )

    def path(self, key: str) -> Path:
        """Return the folder of a step, whether it exists or not."""
        return self.root / key[:2] / key

    def keys(self) -> list[str]:
        """Return the keys of all steps that have a folder, damaged ones included."""
        return sorted(
            folder.name
            for folder in self.root.glob(_KEY_GLOB)
            if folder.parent.name == folder.name[:2] and _KEY.fullmatch(folder.name)
        )

    def has(self, key: str) -> bool:
        """Return whether a step is finished, with files and parents as they were written."""
        return self.path(key).is_dir() and self.find_damage(key) is None

    def find_damage(self, key: str, *, thorough: bool = False) -> str | None:
        """Return what is wrong with the folder of a step, or None for an undamaged or absent one.

        Args:
            key: The step.
            thorough: Read the content of each file, not only of those whose time changed.
        """
        folder = self.path(key)
        if not folder.is_dir():
            return None
        try:
            step = self._read_step(key)
        except ValueError as error:
            return f"{folder / RECORD}: {error}"
        damage = find_damaged_file(folder, step.files, thorough=thorough)
        if damage is not None:
            return f"{folder}/{damage}"
        for parent, digest in step.inputs.items():
            if self.output_digest(parent) not in (None, digest):
                return f"{folder}: made from another output of step {parent[:8]}"
        return None

    def output_digest(self, key: str) -> str | None:
        """Return a digest of the files of a step; None if the store lacks it."""
        try:
            return self._read_step(key).digest
        except ValueError:
            return None

    def record(self, key: str) -> Mapping[str, Any]:
        """Return the record of a finished step.

        Raises:
            StorageError: The record is damaged or gone.
        """
        return self._finished_step(key).record

    def digest_of(self, key: str, name: str) -> FileDigest:
        """Return the digest of a file of a finished step.

        Raises:
            StorageError: The step is damaged or gone, or has no such file.
        """
        try:
            return self._finished_step(key).files[name]
        except KeyError:
            raise StorageError(f"{self.path(key) / name}: no file of this step") from None

    def lists_file(self, key: str, name: str) -> bool:
        """Return whether a finished step wrote a file of this name."""
        return name in self._finished_step(key).files

    def file(self, key: str, name: str) -> Path:
        """Return the path of a file of a finished step, which is as it was written.

        Raises:
            StorageError: The file is damaged, gone or no file of the step.
        """
        path = self.path(key) / name
        damage = self.digest_of(key, name).find_damage(path)
        if damage is not None:
            raise StorageError(
                f"{path}: {damage}; run the same command again, which repeats the step"
            )
        return path

    def _finished_step(self, key: str) -> StoredStep:
        try:
            return self._read_step(key)
        except ValueError as error:
            raise StorageError(
                f"{self.path(key) / RECORD}: {error}; "
                "run the same command again, which repeats the step"
            ) from None

    def _read_step(self, key: str) -> StoredStep:
        try:
            content = read_json(self.path(key) / RECORD)
        except FileNotFoundError:
            raise ValueError("is missing") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not JSON"
            raise ValueError(f"cannot be read ({reason})") from None
        step = StoredStep.from_json(content)
        if step.key is not None and step.key != key:
            raise ValueError(f"the record of another step, {step.key[:8]}")
        return step

    def hold(self) -> None:
        """Keep `prune` from emptying the store until this process ends, and tidy it.

        Removes the temporary files that killed processes left among the states of evaluations.
        """
        hold_folder(self.root)
        remove_leftovers(self.root / UNFINISHED)

    @contextlib.contextmanager
    def write_step(
        self, key: str, record: dict[str, Any], *, parents: tuple[str, ...] = (), notice: Notice
    ) -> Iterator[Path | None]:
        """Yield the folder for the output of a step.

        On success, the folder becomes the finished step, without its state.pt; a damaged one is
        replaced. After an error or a kill, the folder stays, and the next attempt receives it. A
        lock admits one process.

        Args:
            key: The step.
            record: The record of the step, written on success; may be changed until then.
            parents: Steps whose outputs this step reads.
            notice: Receives one line if another process works on the step.

        Yields:
            The folder, or None if another process has finished the step.

        Raises:
            StorageError: The store cannot be written.
        """
        final = self.path(key)
        partial = final.with_name(f"{key}.partial")
        try:
            _make_folder(partial)
            with hold_lock(final.with_name(f"{key}.lock"), str(final), notice) as lock:
                if self.has(key):
                    _remove_if_empty(partial)
                    yield None
                    return
                _make_folder(partial)
                remove_leftovers(partial)
                inputs = {key: digest for key in parents if (digest := self.output_digest(key))}
                yield partial
                _remove_step_leftovers(partial)
                files = digest_folder(partial, without=(STATE,))
                step = StoredStep(key, record, files, inputs)
                write_text(partial / RECORD, json.dumps(step.to_json(), indent=1, sort_keys=True))
                lock.check()
                with held_signals():
                    remove_path(final)
                    partial.replace(final)
                    (final / STATE).unlink(missing_ok=True)  # the step resumed from it until now
        except OSError as error:
            raise StorageError(
                f"{final}: the store cannot be written: {error.strerror or error}"
            ) from error


def _make_folder(path: Path) -> None:
    """Create a folder, in the place of a file or of a link if there is one."""
    if path.is_symlink() or not path.is_dir():
        remove_path(path)
    path.mkdir(parents=True, exist_ok=True)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove_step_leftovers(folder: Path) -> None:
    """Remove the record of a cut publication and temporary files."""
    for path in (folder / RECORD, *folder.rglob(".*.tmp")):
        path.unlink(missing_ok=True)

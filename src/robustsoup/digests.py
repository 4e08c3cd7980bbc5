"""Digests of files: what a file must hold, and a cheap comparison with what it holds now."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MISSING = "is missing"
"""What `FileDigest.find_damage` returns for a file that does not exist."""


@dataclass(frozen=True)
class FileDigest:
    """What a file held when it was written.

    Attributes:
        bytes: Size.
        sha256: Digest of the content (hex).
        modified_ns: Time of its last change in nanoseconds.
    """

    bytes: int
    sha256: str
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Read a file.

        Raises:
            OSError: The file cannot be read.
        """
        state = path.stat()
        return cls(state.st_size, _content_digest(path, state), state.st_mtime_ns)

    @classmethod
    def from_json(cls, content: Any) -> "FileDigest":
        """Read what `to_json` returned.

        Raises:
            ValueError: The content is something else.
        """
        try:
            size, sha256, modified = content["bytes"], content["sha256"], content["modified_ns"]
        except (KeyError, TypeError):
            raise ValueError("expected bytes, sha256 and modified_ns") from None
        if not (isinstance(size, int) and isinstance(sha256, str) and isinstance(modified, int)):
            raise ValueError("expected bytes, sha256 and modified_ns")
        return cls(size, sha256, modified)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"bytes": self.bytes, "sha256": self.sha256, "modified_ns": self.modified_ns}

    def find_damage(self, path: Path, *, thorough: bool = False) -> str | None:
        """Return how a file differs from what was written, or None if it does not.

        The content is read only if the size fits and the time of the last change differs, as after
        a copy.

        Args:
            path: The file.
            thorough: Read the content in any case.
        """
        try:
            state = path.stat()
            if not path.is_file():
                return "is no file"
            if state.st_size != self.bytes:
                return f"got {state.st_size:,} bytes, expected {self.bytes:,}"
            if not thorough and state.st_mtime_ns == self.modified_ns:
                return None
            content = _read_digest(path) if thorough else _content_digest(path, state)
        except FileNotFoundError:
            return MISSING
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            return f"cannot be read ({getattr(error, 'strerror', None) or error})"
        return None if content == self.sha256 else "its content changed"


def digest_folder(folder: Path, *, without: Collection[str] = ()) -> dict[str, FileDigest]:
    """Read every file below a folder; names are relative, with "/".

    Args:
        folder: The folder.
        without: Names of files that are not read.

    Raises:
        OSError: A file cannot be read.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {name: FileDigest.of(path) for name, path in files.items() if name not in without}


def find_damaged_file(
    folder: Path, files: Mapping[str, FileDigest], *, thorough: bool = False
) -> str | None:
    """Return the first file of a folder that differs from its digest and how, or None."""
    for name, digest in files.items():
        damage = digest.find_damage(folder / name, thorough=thorough)
        if damage is not None:
            return f"{name}: {damage}"
    return None


def digest_json(content: Any) -> str:
    """Return the sha256 (hex) of a JSON value, which does not depend on its layout in a file."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


_known_digests: dict[tuple[int, ...], str] = {}
"""Digests that this process computed, by device, inode, size and times of the file."""


def _content_digest(path: Path, state: os.stat_result) -> str:
    """Return the sha256 of a file, which is read again only if it changed."""
    identity = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if identity not in _known_digests:
        _known_digests[identity] = _read_digest(path)
    return _known_digests[identity]


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The stamp of files that robustsoup writes: the number of their format and the release."""

import functools
import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

from robustsoup.errors import CheckpointError

FORMAT = 1
"""The newest format that this release reads and the one that it writes.

A change that would make an older release misread a file raises this number.
"""

_RELEASE_KEY = "robustsoup"


def stamp_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the format number and the release that writes it.

    Bytes of file names that are no UTF-8, which Python holds as lone surrogates, become "?":
    readers refuse text that has no encoding.
    """
    return _make_encodable({**record, "format": FORMAT, _RELEASE_KEY: installed_release()})


def _make_encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_make_encodable(key): _make_encodable(item) for key, item in value.items()}
    return [_make_encodable(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_stamped(record: Mapping[str, Any]) -> bool:
    """Return whether robustsoup wrote a record."""
    return _RELEASE_KEY in record


def unstamp_record(record: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a record without its stamp; foreign records have none.

    Args:
        record: What a file holds.
        path: The file, for the error.

    Raises:
        CheckpointError: If a newer release wrote the file in a newer format.
    """
    number = record.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise CheckpointError(
            f"{path}: written by a newer robustsoup (format {number}); update robustsoup"
        )
    return {key: value for key, value in record.items() if key not in ("format", _RELEASE_KEY)}


def describe_release() -> str:
    """Return the installed release; "not installed" for a source tree on the import path."""
    return installed_release() or "not installed"


@functools.cache
def installed_release() -> str | None:
    """Return the version of the installed package; None for a source tree on the import path."""
    try:
        return importlib.metadata.version("robustsoup")
    except importlib.metadata.PackageNotFoundError:
        return None

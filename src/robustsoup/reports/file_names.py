"""Texts of a report name files, never the folders of the machine that wrote them."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath

_POSIX_FOLDERS = re.compile(r"(?<![\w./<])/(?![/>])(?:[^\s/:\"'<>]+/)+")
_WINDOWS_FOLDERS = re.compile(r"\b[A-Za-z]:[\\/](?:[^\s\\/:\"']+[\\/])+")


def hide_folders(text: str) -> str:
    """Return the text with only the last part of each absolute path."""
    if PurePosixPath(text).is_absolute():
        return PurePosixPath(text).name or text
    if PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name or text
    return _WINDOWS_FOLDERS.sub("", _POSIX_FOLDERS.sub("", text))


def hide_all_folders(value: object) -> object:
    """Return JSON-able values with `hide_folders` applied to every text, keys included."""
    if isinstance(value, str):
        return hide_folders(value)
    if isinstance(value, Mapping):
        return {hide_folders(str(key)): hide_all_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_all_folders(item) for item in value]
    return value

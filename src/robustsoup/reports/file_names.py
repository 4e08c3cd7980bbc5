"""Texts of a report name files, never the folders of the machine that wrote them."""

import re
from collections.abc import Mapping

_WORD = r"(?:[^\s/\\:\"'<>]|'(?=\w))+"
_FILE = r"[^\s/\\]*\.(?:[a-z]\w{0,3}|safetensors)\W?\s"
"""The last word of a path in a sentence, such as "low.pth, "."""
_FOLDER = rf"(?:(?!{_FILE}){_WORD}[^\S\r\n]+)*{_WORD}[/\\](?!255\b)"
"""A name of one or more words; the slash of 8/255 ends none."""
_FOLDERS = re.compile(rf"(?<![\w./\\<])(?:[A-Za-z]:|\\)?[/\\](?![/\\>])(?:{_FOLDER})+")


def hide_folders(text: str) -> str:
    """Return the text with only the last part of each absolute path.

    Names of folders may contain spaces. What follows an absolute path in a sentence is lost up to a
    later slash if the path does not end with a file's ending, a colon or a quote.
    """
    return _FOLDERS.sub("", text)


def hide_all_folders(value: object) -> object:
    """Return JSON-able values with `hide_folders` applied to every text, keys included."""
    if isinstance(value, str):
        return hide_folders(value)
    if isinstance(value, Mapping):
        return {hide_folders(str(key)): hide_all_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_all_folders(item) for item in value]
    return value

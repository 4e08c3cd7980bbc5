"""Paths as users write them."""

import os
from pathlib import Path

from robustsoup.errors import RequestError


def expand_home(text: str) -> str:
    """Replace "~" or "~user" at the start of a path by the home folder.

    Shells do so only at the start of a word, not in "--output=~/x" or "folder:~/x".
    """
    # Path.expanduser raises an error for an unknown user.
    return os.path.expanduser(text)  # noqa: PTH111


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return the path that a user gave, with "~" expanded.

    Raises:
        RequestError: The path holds a NUL, which no file system accepts.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise RequestError(f"{text!r}: a path without NUL characters is expected")
    return Path(expand_home(text))

"""Importing the user's own code that a command names, such as --model my_script:Net."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from robustsoup.catalog import DATA_SOURCES, MODELS, OBJECTIVES, import_user_module


@contextlib.contextmanager
def current_folder_importable(folder: Path | None = None) -> Iterator[None]:
    """Put the current folder on the import path while the block runs.

    Commands import only names that the user typed in such a block; a network that a checkpoint
    records must be importable outside it.

    Args:
        folder: The current folder of the command, where another process does a part of its work.
    """
    place = str(folder or Path.cwd())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(place)


def import_named_module(spec: object, folder: Path | None = None) -> None:
    """Import the module of a "module:name" that the user typed, also from the current folder.

    Names in the catalog are not imported. The code that uses the name reports a missing module.

    Args:
        spec: The name.
        folder: The current folder, as for `current_folder_importable`.
    """
    module, colon, _ = str(spec or "").partition(":")
    if not colon or any(module in names for names in (DATA_SOURCES, MODELS, OBJECTIVES)):
        return
    with current_folder_importable(folder), contextlib.suppress(ValueError):
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            import_user_module(module, label=f'"{spec}"')

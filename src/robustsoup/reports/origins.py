"""Where the chosen soup comes from, as a tree of file names."""

from dataclasses import dataclass
from pathlib import Path

from robustsoup.errors import CheckpointError
from robustsoup.reports.file_names import hide_folders
from robustsoup.runs.description import (
    Ancestor,
    Description,
    describe_checkpoint,
    find_own_file,
)
from robustsoup.runs.results import Results

DIGITS = 16
"""Hex digits of a digest that the report shows."""


@dataclass(frozen=True)
class Origin:
    """A node of the tree: a checkpoint, what is recorded of it, and what it was made of."""

    name: str
    facts: tuple[str, ...]
    parents: tuple["Origin", ...]


def describe_soup_of(results: Results, folder: Path) -> Description:
    """Describe the chosen soup of a run.

    A soup in the format of another program has no record; that of the run's own file has one.

    Raises:
        CheckpointError: No soup was chosen, or its file cannot be read.
    """
    soup = results.soup
    if results.selection is None or soup is None or Path(soup).name != soup:
        raise CheckpointError(f"{folder}: no soup was chosen")
    return describe_checkpoint(find_own_file(results, folder) or folder / soup)


def trace_origins(ancestor: Ancestor) -> Origin:
    """Return the tree of a checkpoint and its ancestors."""
    share = ancestor.coefficient
    facts = (
        "" if share is None else f"coefficient {share:.3g}",
        hide_folders(ancestor.made),
        "" if ancestor.path is None else ancestor.path.name,
        f"sha256 of the weights {ancestor.digest[:DIGITS]}",
    )
    return Origin(
        hide_folders(ancestor.name),
        tuple(fact for fact in facts if fact and fact != ancestor.name),
        tuple(map(trace_origins, ancestor.parents)),
    )

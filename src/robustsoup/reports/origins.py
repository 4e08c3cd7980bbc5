"""Where the chosen soup comes from, as a tree of file names."""

from dataclasses import dataclass

from robustsoup.errors import RobustsoupError
from robustsoup.reports.file_names import hide_folders
from robustsoup.reports.measures import StoredRun
from robustsoup.runs.description import Ancestor, describe_checkpoint

DIGITS = 16
"""Hex digits of a digest that the report shows."""


@dataclass(frozen=True)
class Origin:
    """A node of the tree: a checkpoint, what is recorded of it, and what it was made of."""

    name: str
    facts: tuple[str, ...]
    parents: tuple["Origin", ...]


def trace_origins(run: StoredRun) -> tuple[Origin | None, str]:
    """Return the tree of the chosen soup, or None and why it cannot be drawn."""
    if run.results.soup is None:
        return None, ""
    try:
        return _describe_origin(describe_checkpoint(run.folder / run.results.soup).tree), ""
    except RobustsoupError as error:
        return None, str(error)


def _describe_origin(ancestor: Ancestor) -> Origin:
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
        tuple(map(_describe_origin, ancestor.parents)),
    )

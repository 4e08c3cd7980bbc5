"""Printing: results on standard output, warnings and errors on standard error.

All output passes through here; of several processes of one command, the first prints. Characters
that are not printable are escaped, because names and messages come from files of strangers; each
line, cell and message stays on its line.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from robustsoup import distributed
from robustsoup.printable import make_message, make_printable

if TYPE_CHECKING:
    from rich.console import Console


def print_line(text: str) -> None:
    """Print a line of a result."""
    print_text(make_printable(text))


def print_text(text: str) -> None:
    """Print text of this program, such as its help, with its line breaks."""
    if distributed.is_first():
        print(text)


def print_json(content: Any) -> None:
    """Print JSON on standard output, and nothing else."""
    # json.dumps escapes every character beyond ASCII, and all control characters but one.
    print_text(json.dumps(content, indent=1).replace("\x7f", r"\u007f"))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
) -> None:
    """Print a table on standard output, as wide as the terminal.

    Args:
        columns: The headers.
        rows: One text for each column; text that is too long continues below.
        title: A line above the table.
    """
    from rich.table import Table

    table = Table(
        box=None, title=None if title is None else make_printable(title), title_justify="left"
    )
    for column in columns:
        table.add_column(make_printable(column), overflow="fold")
    for row in rows:
        table.add_row(*map(make_printable, row))
    if distributed.is_first():
        make_console().print(table)


def print_error(text: str, *, any_rank: bool = False) -> None:
    """Print an error or a notice on standard error, in one line.

    Args:
        text: The message.
        any_rank: Whether a process other than the first prints it too.
    """
    if any_rank or distributed.is_first():
        print(f"robustsoup: {make_message(text)}", file=sys.stderr)


def print_warning(text: str) -> None:
    """Print a warning about a doubtful result on standard error."""
    print_error(f"warning: {text}")


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console on standard output or standard error, for tables and bars.

    It prints brackets and colons as they are; rich would read markup and emoji in them.
    """
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)

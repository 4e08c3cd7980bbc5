"""Printing: results on standard output, warnings and errors on standard error."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_line(text: str) -> None:
    """Print a line of a result."""
    sys.stdout.write(f"{text}\n")


def print_json(content: Any) -> None:
    """Print JSON on standard output, and nothing else."""
    print_line(json.dumps(content, indent=1))


def print_table(table: "Table") -> None:
    """Print a table on standard output, as wide as the terminal."""
    make_console().print(table)


def print_error(text: str) -> None:
    """Print an error or a notice on standard error, in one line."""
    sys.stderr.write(f"robustsoup: {text}\n")


def print_warning(text: str) -> None:
    """Print a warning about a doubtful result on standard error."""
    print_error(f"warning: {text}")


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console on standard output or standard error, for tables and bars."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)

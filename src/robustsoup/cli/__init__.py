"""The command line: one command for each Python function."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustsoup.cli.application import app

__all__ = ["app", "main"]

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Ctrl-C ends it in one line at any time, also while modules are being imported.

    Args:
        arguments: The words after `robustsoup`; those of this process by default.
    """
    try:
        from robustsoup.cli.application import run_command_line

        code = run_command_line(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("robustsoup: interrupted; run the same command again to resume", file=sys.stderr)
    sys.exit(code)


def __getattr__(name: str) -> Any:
    """Import the typer application when it is first used; it names every command."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from robustsoup.cli.application import app

    return app

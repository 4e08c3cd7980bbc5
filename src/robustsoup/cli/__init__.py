"""The command line: one command for each Python function."""

import os
import sys
from contextlib import suppress

from robustsoup.interruption import (
    INTERRUPTED,
    describe_end,
    end_at_next_signal,
    exit_code,
    handled_signals,
    signal_received,
)

TYPE_CHECKING = False  # as in robustsoup/__init__.py
if TYPE_CHECKING:
    from typing import Any

    from robustsoup.cli.application import app

__all__ = ["app", "main"]

READER_GONE = 141
"""The exit code where nobody reads the output any more: 128 + SIGPIPE, as a shell reports it."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Ctrl-C, SIGTERM and SIGHUP end it in one line at any time, also while modules are being
    imported; the exit codes are 130, 143 and 129.

    Args:
        arguments: The words after `robustsoup`; those of this process by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name it cannot encode must not lose the result
            stream.reconfigure(errors="backslashreplace")
    with handled_signals(restore=arguments is not None):
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments)
        except KeyboardInterrupt:  # a second signal, after the first ended the work
            code = _say_end()
        code = _flush_output(code)
    sys.exit(code)


def _run(arguments: list[str]) -> "Any":
    """Run one command and return its exit code."""
    try:
        from robustsoup.cli.application import run_command_line

        code = run_command_line(arguments)
        if code != INTERRUPTED:
            return code
    except SystemExit as end:
        # typer answers a broken pipe so
        return READER_GONE if isinstance(end.__context__, BrokenPipeError) else end.code
    except BaseException as error:
        # Where a signal arrives, code outside this package can turn it into another error.
        if not isinstance(error, KeyboardInterrupt) and not signal_received():
            raise
    return _say_end()


def _say_end() -> int:
    """Print that a signal ended the command, and return its exit code."""
    end_at_next_signal()
    from robustsoup import distributed

    if distributed.claim_message():
        with suppress(OSError):
            print(describe_end(), file=sys.stderr)
    return exit_code()


def _flush_output(code: "Any") -> "Any":
    """Write what is left of the output; return the exit code, which a failure changes."""
    output = sys.__stdout__
    if output is None:
        return code
    try:
        output.flush()
    except OSError as error:
        # What could not be written must not fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        if isinstance(error, BrokenPipeError):
            return READER_GONE
        with suppress(OSError):
            print(f"robustsoup: the output cannot be written: {error.strerror}", file=sys.stderr)
        return code or 1
    return code


def __getattr__(name: str) -> "Any":
    """Import the typer application when it is first used; it names every command."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from robustsoup.cli.application import app

    return app

"""The typer application: its commands and its exit codes.

Exit codes: 0 success; 1 the work failed, or `verify` found damage; 2 the request is wrong; 3
success with a negative answer (no soup meets --require, `check` rejects the checkpoints); 4
success, but the chosen soup misses a requirement on `test`; 130, 143 and 129 ended by Ctrl-C,
SIGTERM and SIGHUP; 141 nobody reads the output any more. Commands import PyTorch and other slow
libraries inside their bodies, so that help, usage errors and shell completion are quick.
"""

import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, TextIO

import typer

from robustsoup import distributed
from robustsoup.cli.checking import check_command
from robustsoup.cli.doctor import doctor_command
from robustsoup.cli.evaluating import compare_command, evaluate_command
from robustsoup.cli.fetching import fetch_command
from robustsoup.cli.learning import learn_command
from robustsoup.cli.mixing import mix_command
from robustsoup.cli.options import expand
from robustsoup.cli.pushing import push_command
from robustsoup.cli.running import demo_command, plan_command, report_command, run_command
from robustsoup.cli.searching import landscape_command, search_command
from robustsoup.cli.showing import show_command
from robustsoup.cli.terminal import print_error, print_line, print_text, print_warning
from robustsoup.cli.training import train_command
from robustsoup.cli.verifying import verify_command
from robustsoup.cli.versions import list_versions
from robustsoup.errors import RequestError, RobustsoupError, StorageError, WorkError
from robustsoup.interruption import INTERRUPTED, signal_received
from robustsoup.stamp import describe_release

COMMANDS = {
    "demo": demo_command,
    "run": run_command,
    "plan": plan_command,
    "report": report_command,
    "search": search_command,
    "landscape": landscape_command,
    "train": train_command,
    "check": check_command,
    "mix": mix_command,
    "learn": learn_command,
    "evaluate": evaluate_command,
    "compare": compare_command,
    "show": show_command,
    "push": push_command,
    "verify": verify_command,
    "fetch": fetch_command,
    "doctor": doctor_command,
}
"""The commands, in the order of `robustsoup --help`."""

SHARED_COMMANDS = ("run", "search", "landscape", "train", "learn", "evaluate")
"""The commands that several processes run together, started by torchrun."""

app = typer.Typer(
    help=(
        "Turn several adversarially fine-tuned checkpoints of one network into one, at the "
        "trade-off between clean and robust accuracy that you need."
    ),
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command_name, command in COMMANDS.items():
    app.command(command_name)(expand(command))


@app.callback(invoke_without_command=True)
def show_version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="With --version, list dependencies too.")
    ] = False,
) -> None:
    """Print versions, or help if there is no command."""
    if version:
        print_line(f"robustsoup {describe_release()}")
        if verbose:
            for name, installed in list_versions().items():
                print_line(f"{name} {installed or 'not installed'}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print_text(context.get_help())


def run_command_line(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error is printed in one line.

    Args:
        arguments: The words after `robustsoup`. With --debug, errors are raised instead.
    """
    debug = "--debug" in arguments
    try:
        with _warnings_in_one_line():
            _check_current_folder()
            _join_other_ranks(arguments)
            code = _run_app(arguments)
            if code != INTERRUPTED:  # else one rank says so
                distributed.stop()
    except Exception as error:
        if debug and not hasattr(error, "exit_code"):
            raise
        if signal_received():
            raise
        if distributed.claim_message():
            print_error(_describe_error(error, arguments), any_rank=True)
        is_request = isinstance(error, RequestError) and not isinstance(error, WorkError)
        return 2 if is_request or hasattr(error, "exit_code") else 1
    return code if isinstance(code, int) else 0


def _run_app(arguments: Sequence[str]) -> object:
    """Run one command; what made typer give up is raised as an error like any other.

    Raises:
        RequestError: The input ended at a question.
    """
    try:
        return app(args=list(arguments), prog_name="robustsoup", standalone_mode=False)
    except typer.Abort as abort:
        if signal_received():  # Ctrl-C at a question
            raise KeyboardInterrupt from None
        if isinstance(abort.__cause__, EOFError):  # of the command, such as a file cut short
            raise abort.__cause__ from None
        typer.echo(err=True)  # ends the line of the question
        raise RequestError("the input ended without an answer; --yes asks nothing") from None


def _check_current_folder() -> None:
    """Check that the current folder exists: PyTorch's libraries end the process without it.

    Raises:
        StorageError: It was removed.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise StorageError(
            f"the current folder: {error.strerror}; it was removed: change into another one"
        ) from None


def _join_other_ranks(arguments: Sequence[str]) -> None:
    """Join the other processes of the command, if torchrun started several.

    Raises:
        RequestError: The command runs in one process.
    """
    if distributed.requested_world() == 1:
        return
    distributed.start()
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name in COMMANDS and name not in SHARED_COMMANDS:
        raise RequestError(
            f"{name}: runs in one process, got {distributed.world()}; start it without torchrun "
            f"(commands for several processes: {', '.join(SHARED_COMMANDS)})"
        )


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print the warnings of libraries as this program prints its own."""

    def show_warning(
        message: Warning | str,
        _category: type[Warning],
        _filename: str,
        _line_number: int,
        _file: TextIO | None = None,
        _line: str | None = None,
    ) -> None:
        print_warning(str(message))

    with warnings.catch_warnings():
        # pyrefly: ignore[bad-assignment]  # the names of the parameters differ
        warnings.showwarning = show_warning
        yield


def _describe_error(error: Exception, arguments: Sequence[str]) -> str:
    """Return an error in one line."""
    if isinstance(error, RobustsoupError):
        return str(error)
    if hasattr(error, "exit_code"):
        return _describe_usage_error(error, arguments)
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or take smaller batches or fewer samples"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the output cannot be written'}: {error.strerror}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unexpected {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: "
        f"{error}; --debug shows the traceback, which a report of this fault should hold"
    )


def _describe_usage_error(error: Exception, arguments: Sequence[str]) -> str:
    """Return the usage error, the value of the wrong option, and a pointer to the help."""
    text = error.format_message().rstrip(".") if hasattr(error, "format_message") else str(error)
    unknown = re.match("No such command '(.*?)'", text)
    if unknown:
        return _describe_unknown_command(unknown[1])
    for option in getattr(getattr(error, "param", None), "opts", ()):
        if option in arguments[:-1]:
            text += f", got {arguments[arguments.index(option) + 1]}"
    command = getattr(getattr(error, "ctx", None), "command_path", "robustsoup")
    return f"{text}; see {command} --help"


def _describe_unknown_command(name: str) -> str:
    nearest = get_close_matches(name, COMMANDS, n=1)
    if nearest:
        return f'no command "{name}"; did you mean "{nearest[0]}"? See robustsoup --help'
    return f'no command "{name}"; see robustsoup --help'

"""The application, and its exit codes.

0 done, 1 the work failed, 2 the request was wrong, 3 the work is done and the answer is no (nothing meets --require, or
`check` finds files that cannot be mixed), 130 interrupted (run the same command again to go on).
"""

import re
import sys
from pathlib import Path

import typer
from rich.console import Console

from robustsoup.cli.progress import stderr
from robustsoup.errors import RequestError, RobustsoupError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn several adversarially fine-tuned checkpoints of one network into one, at the trade-off you need.",
)
stdout = Console(highlight=False)
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = spread(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    sys.path.insert(0, str(Path.cwd()))  # so that --model my_script:Net finds a file that lies here
    try:
        code = app(
            args=[a for a in arguments if a != "--debug"],
            prog_name="robustsoup",
            standalone_mode=False,
        )
    except RobustsoupError as error:
        if debug:
            raise
        code = _fail(str(error), 2 if isinstance(error, RequestError) else 1)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        if debug or not hasattr(error, "exit_code"):
            raise
        code = _fail(f"{_usage(error, arguments)}; see robustsoup --help", 2)
    if code == INTERRUPTED:
        _fail("interrupted; run the same command again to go on", code)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Exception, arguments: list[str]) -> str:
    """What is wrong with the words of the command line, with the value that a wrong option was given."""
    text = error.format_message().rstrip(".") if hasattr(error, "format_message") else str(error)
    for option in getattr(getattr(error, "param", None), "opts", ()):
        if option in arguments[:-1]:
            text += f", got {arguments[arguments.index(option) + 1]}"
    return text


def _fail(message: str, code: int) -> int:
    stderr.print(f"robustsoup: {message}", markup=False, soft_wrap=True)
    return code


def spread(arguments: list[str]) -> list[str]:
    """Let --coefficients take several values: each further number gets the option's name before it."""
    out: list[str] = []
    taking = False
    for argument in arguments:
        if taking and out[-1] != "--coefficients" and re.fullmatch(r"[\d./eE+-]*\d\.?", argument):
            out.append("--coefficients")
        elif out[-1:] != ["--coefficients"]:
            taking = argument == "--coefficients"
        out.append(argument)
    return out

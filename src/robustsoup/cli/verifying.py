"""The command that compares stored files with their digests."""

from pathlib import Path
from typing import Annotated

import typer

from robustsoup.cli.options import AsJson, CheckpointPlace
from robustsoup.cli.terminal import print_json, print_line, print_table

MISMATCH = 1
"""The exit code if a file is not what was written."""


def verify_command(
    path: Annotated[
        Path,
        CheckpointPlace(),
        typer.Argument(
            help="A run folder, a store, a checkpoint or its address, coefficients, an evaluation, "
            "or a folder of such files.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> int:
    """Compare files with the digests that were recorded when they were written.

    Reads every file in full. Exit code 1 if one is damaged or missing. A file without a digest, as
    other programs write, is read and listed, but nothing can be said about its content.

    Example, after `robustsoup demo`: `robustsoup verify runs/quickstart`
    """
    from robustsoup.cli.progress import Bar
    from robustsoup.runs.verify import verify_path

    with Bar("verifying") as bar:
        outcomes = verify_path(path, bar)
    damaged = sum(outcome.damage is not None for outcome in outcomes)
    if as_json:
        print_json(
            [{"name": one.name, "damage": one.damage, "recorded": one.recorded} for one in outcomes]
        )
    else:
        print_table(("file", "content"), [(one.name, one.verdict) for one in outcomes])
        print_line(f"{path}: {len(outcomes)} verified, {damaged} damaged or missing")
    return MISMATCH if damaged else 0

"""The command that publishes a checkpoint and its card on the Hugging Face Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from robustsoup.cli.options import AsJson, CheckpointPlace
from robustsoup.cli.terminal import print_error, print_json, print_line
from robustsoup.errors import RequestError


def push_command(
    checkpoint: Annotated[
        Path,
        CheckpointPlace(),
        typer.Argument(help="Checkpoint, or an index of shards.", show_default=False),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="hf://ORG/NAME",
            help="Repository, with @BRANCH if not the default one; made if it does not exist.",
            show_default=False,
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository that only you see.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a checkpoint with its card on the Hugging Face Hub.

    Sends the checkpoint under its own name, and README.md: the card beside it, with what you added
    to it, or a new one from its record and the evaluations beside it. Shows what it will send, and
    asks. Log in with `hf auth login`, or set HF_TOKEN.

    Example: `robustsoup push eps16.safetensors hf://my-name/eps16 --dry-run`
    """
    from robustsoup.checkpoints.hub import HubAddress, push_to_hub
    from robustsoup.cli.tables import format_bytes

    address = HubAddress.parse(target)
    if address.file is not None:
        raise RequestError(f"{target}: got a file, expected hf://ORG/NAME or hf://ORG/NAME@BRANCH")
    files = _list_files(checkpoint)
    sizes = {
        name: len(item) if isinstance(item, bytes) else item.stat().st_size
        for name, item in files.items()
    }
    kind = "a private repository" if private else "a repository that may be public"
    for name, size in sizes.items():
        print_error(f"{name}: {format_bytes(size)}, to hf://{address.repo}, {kind}")
    url = None
    if dry_run:
        print_error("nothing was sent (--dry-run)")
    else:
        _confirm(yes=yes)
        message = f"Add {checkpoint.name} and its card"
        url = push_to_hub(address, files, private=private, message=message)
    if as_json:
        print_json({"repository": address.repo, "files": sizes, "url": url})
    elif url is not None:
        print_line(url)


def _list_files(checkpoint: Path) -> dict[str, Path | bytes]:
    """Return the files to send, by their name in the repository.

    Raises:
        RequestError: The checkpoint is a folder or an adapter, or cannot be read.
    """
    from robustsoup.checkpoints.adapters import find_adapter
    from robustsoup.checkpoints.shards import INDEX_ENDING, read_index
    from robustsoup.cli.progress import Bar
    from robustsoup.reports.card import CARD, find_card, make_card, render_card
    from robustsoup.runs.description import describe_checkpoint

    if checkpoint.is_dir():
        raise RequestError(f"{checkpoint}: got a folder, expected the file of a checkpoint")
    if find_adapter(checkpoint) is not None:
        raise RequestError(
            f"{checkpoint}: holds the factors of an adapter alone, and its card would describe the "
            f"merged network; mix it first: robustsoup mix {checkpoint.parent} --coefficients 1 "
            "-o merged.safetensors"
        )
    with Bar(f"reading {checkpoint.name}") as bar:
        description = describe_checkpoint(checkpoint)
        bar(1, 1)
    files: dict[str, Path | bytes] = {checkpoint.name: checkpoint}
    if checkpoint.name.endswith(INDEX_ENDING):
        files |= {name: checkpoint.parent / name for name in read_index(checkpoint)}
    card = find_card(checkpoint, description.checkpoint.digest)
    files[CARD] = card or render_card(make_card(description)).encode()
    return files


def _confirm(*, yes: bool) -> None:
    """Ask whether to send.

    Raises:
        RequestError: Nobody can answer, or the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise RequestError("push: requires --yes where nobody can answer")
    if not typer.confirm("Send these files?", err=True):
        raise RequestError("push: nothing was sent")

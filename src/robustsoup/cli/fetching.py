"""The command that downloads."""

from typing import Annotated

import typer

from robustsoup.checkpoints.published import PUBLISHED
from robustsoup.cli.app import app, stdout
from robustsoup.cli.inputs import fetch_checkpoint, fetch_data, print_json
from robustsoup.cli.options import AsJson, DataRoot
from robustsoup.data import fetch_cifar10
from robustsoup.errors import RequestError


@app.command()
def fetch(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="cifar10, or robustbench:NAME.", show_default=False),
    ],
    sha256: Annotated[
        str | None, typer.Option(help="Refuse a checkpoint that has not this digest.")
    ] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Download data or a published checkpoint, once, and check it; say where it is and what to do next.

    No digests of RobustBench's files are published: the first one seen is recorded beside the file, and holds from then on.

    Example: `robustsoup fetch robustbench:Wang2023Better_WRN-28-10`
    """
    if what == "cifar10":
        if sha256:
            raise RequestError(
                "--sha256: CIFAR-10 is checked against its published digests; leave it out"
            )
        fetch_data(what, data_root)
        answer = {
            "path": str(fetch_cifar10(data_root)),
            "next": "robustsoup train --model resnet9 --data cifar10 --threat "
            '"Linf 8/255" -o base.safetensors',
        }
    elif what.startswith("robustbench:"):
        answer = fetch_checkpoint(what.removeprefix("robustbench:"), data_root, sha256)
    else:
        known = ", ".join(["cifar10", *(f"robustbench:{name}" for name in PUBLISHED)])
        raise RequestError(f'fetch: got "{what}", expected one of {known}')
    if as_json:
        return print_json(answer)
    stdout.print(answer["path"], markup=False, soft_wrap=True)
    if "sha256" in answer:
        seen = "first seen now; no digest is published" if answer["first_seen"] else "as recorded"
        stdout.print(f"sha256 {answer['sha256']} ({seen})", markup=False, soft_wrap=True)
    stdout.print(f"next: {answer['next']}", markup=False, soft_wrap=True)

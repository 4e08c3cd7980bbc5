"""The command that downloads data and published checkpoints."""

import shlex
from typing import Annotated

import typer

from robustsoup.cli.options import ADDRESSES, AsJson
from robustsoup.cli.running import DataRoot
from robustsoup.cli.terminal import print_json, print_line
from robustsoup.errors import RequestError


def fetch_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="cifar10, cifar100, robustbench:NAME, or the address of a checkpoint: "
            f"{ADDRESSES}.",
            show_default=False,
        ),
    ],
    sha256: Annotated[
        str | None, typer.Option(help="Expected digest of a checkpoint's file (64 hex digits).")
    ] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Download data or a published checkpoint, and verify it.

    Downloads once and prints the path of the file. RobustBench publishes no digests of its files:
    the digest of the first download is recorded next to the file and checked from then on. The
    checkpoint of an address is copied again, in case it changed there.

    Example: `robustsoup fetch robustbench:Wang2023Better_WRN-28-10`
    """
    if name in ("cifar10", "cifar100"):
        if sha256:
            raise RequestError(
                f"--sha256: does not apply to {name}, which is checked against published digests"
            )
        answer = _fetch_data(name, data_root)
    elif name.startswith("robustbench:"):
        answer = _fetch_checkpoint(name.removeprefix("robustbench:"), data_root, sha256)
    elif "://" in name:
        answer = _fetch_address(name, sha256)
    else:
        from robustsoup.checkpoints.published import PUBLISHED_CHECKPOINTS

        known = ", ".join(
            ["cifar10", "cifar100", *(f"robustbench:{key}" for key in PUBLISHED_CHECKPOINTS)]
        )
        raise RequestError(f'fetch: got "{name}", expected one of {known}')
    if as_json:
        print_json(answer)
        return
    print_line(str(answer["path"]))
    if "sha256" in answer:
        origin = " (seen for the first time)" if answer.get("first_seen") else " (as recorded)"
        print_line(f"sha256 {answer['sha256']}{origin if 'first_seen' in answer else ''}")
    print_line(f"next: {answer['next']}")


def _fetch_data(name: str, data_root: str | None) -> dict[str, object]:
    from robustsoup.cli.inputs import download_data
    from robustsoup.data import fetch_cifar10, fetch_cifar100

    download_data(name, data_root)
    fetch = fetch_cifar10 if name == "cifar10" else fetch_cifar100
    return {
        "path": str(fetch(data_root)),
        "next": f"robustsoup train --model resnet9 --data {name}{_root_option(data_root)} --threat "
        '"Linf 8/255" -o base.safetensors',
    }


def _fetch_checkpoint(name: str, data_root: str | None, sha256: str | None) -> dict[str, object]:
    from robustsoup.cli.inputs import download_checkpoint

    fetched = download_checkpoint(name, data_root, sha256)
    model, threat = fetched.published.model, fetched.published.threat
    return {
        "path": str(fetched.path),
        "model": model,
        "threat": threat,
        "sha256": fetched.sha256,
        "first_seen": fetched.first_seen,
        "next": f'robustsoup evaluate "{fetched.path}" --model {model} --data cifar10'
        f'{_root_option(data_root)} --threat "{threat}" --attack autoattack',
    }


def _root_option(data_root: str | None) -> str:
    return "" if data_root is None else f" --data-root {shlex.quote(data_root)}"


def _fetch_address(address: str, sha256: str | None) -> dict[str, object]:
    from robustsoup.checkpoints.remote import copy_remote, find_copy_of, has_copy
    from robustsoup.cli.copying import copy_checkpoint

    digits = None if sha256 is None else sha256.strip().lower().removeprefix("sha256:")
    demanded = "" if digits is None else f"#sha256={digits}"
    path = copy_checkpoint(f"{address}{demanded}", again=True)
    copy = find_copy_of(path)
    if copy and has_copy(address) and copy_remote(address).sha256 != copy.sha256:
        copy_checkpoint(address, again=True)  # else commands would read what was there before
    return {
        "path": str(path),
        "revision": copy and copy.revision,
        "sha256": copy and copy.sha256,
        "next": f'robustsoup show "{address}{demanded}"',
    }

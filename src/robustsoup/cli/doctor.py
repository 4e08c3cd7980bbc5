"""The command that describes the installation and this machine."""

import sys
from typing import Annotated

import typer

from robustsoup.cli.options import AsJson, Given
from robustsoup.cli.running import DataRoot
from robustsoup.cli.terminal import print_json, print_line
from robustsoup.errors import RequestError


def doctor_command(
    given: Given,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Empty the store and the caches; asks first. Results elsewhere stay."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --prune, do not ask.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="Time attacks on the CPU with several numbers of images a pass, for a network or "
            "a checkpoint, and say which to choose.",
        ),
    ] = None,
    pixels: Annotated[
        int, typer.Option(min=1, help="With --calibrate, height and width of the images.")
    ] = 32,
) -> None:
    """Show versions, devices, folders, and causes of slowness.

    Also shows which extras are installed and how to install the others, and what the store and the
    caches hold. --prune empties them, unless another command uses them. --calibrate changes no
    setting: the last bits of verdicts depend on the size of a pass, so it belongs in your command
    or recipe, which records it.

    Example: `robustsoup doctor`, `robustsoup doctor --calibrate resnet9:width=4`, or
    `robustsoup doctor --prune --yes`
    """
    if yes and not prune:
        raise RequestError("--yes: requires --prune")
    if prune and as_json:
        raise RequestError("--json: not with --prune")
    if "pixels" in given and calibrate is None:
        raise RequestError("--pixels: requires --calibrate")
    if calibrate is not None:
        if prune:
            raise RequestError("--calibrate: not with --prune")
        from robustsoup.cli.calibration import calibrate as time_passes

        time_passes(calibrate, pixels, as_json=as_json)
        return
    if prune:
        _prune_caches(ask=not yes)
        return
    from robustsoup.cli.diagnosis import diagnose, print_diagnosis

    diagnosis = diagnose(data_root)
    if as_json:
        print_json(diagnosis)
    else:
        print_diagnosis(diagnosis)


def _prune_caches(*, ask: bool) -> None:
    """Empty the caches and print what was freed."""
    from robustsoup.cli.diagnosis import describe_cache, describe_caches
    from robustsoup.runs.caches import list_caches

    described = describe_caches()
    for name, cache in described.items():
        print_line(describe_cache(name, cache))
    if not any(cache["entries"] for cache in described.values()):
        print_line("nothing to prune")
        return
    if ask:
        if not sys.stdin.isatty():
            raise RequestError("--prune: requires --yes where nobody can answer")
        if not typer.confirm("Remove all of these?", err=True):
            return
    for cache in list_caches():
        cache.prune()
    print_line(f"removed {sum(cache['entries'] for cache in described.values())} entries")

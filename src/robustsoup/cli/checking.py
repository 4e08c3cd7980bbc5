"""The command that checks whether checkpoints can be mixed."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustsoup.cli.options import (
    AsJson,
    CheckpointPlace,
    DataOptions,
    Fields,
    Files,
    Given,
    NetworkOptions,
    RunOptions,
    flag,
)
from robustsoup.cli.terminal import print_json
from robustsoup.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from robustsoup.checkpoints.checkpoint import Checkpoint
    from robustsoup.data import Split
    from robustsoup.diagnosis.layers import LayerMap
    from robustsoup.diagnosis.rules import Finding


READ_WITH_DATA = (
    *("model", "normalize", "threat", "samples", "pairs"),
    *("seed", "data_root", "image_size", "channels"),
)
"""Options that only the measurement on data reads."""


def check_command(
    checkpoints: Files,
    data: Annotated[
        DataOptions,
        Fields(
            defaults={"data": ""},
            helps={"data": "Data to measure the loss between the checkpoints on; uses its val."},
        ),
    ],
    network: NetworkOptions,
    run: RunOptions,
    given: Given,
    threat: Annotated[
        str, typer.Option(help="Threat model to evaluate under, besides clean inputs.")
    ] = "clean",
    base: Annotated[
        Path | None,
        CheckpointPlace(),
        typer.Option(
            help="Checkpoint that the others were fine-tuned from; by default the one in their "
            "records."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Use the first N samples of val.")] = 256,
    pairs: Annotated[
        int, typer.Option(min=1, help="Measure at most N pairs, the most distant ones.")
    ] = 15,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Swap each block between two checkpoints and show what it costs; requires --data.",
        ),
    ] = False,
    granularity: Annotated[
        str,
        typer.Option(
            help="What --layers swaps together: parameter, module, block or re:PATTERN on names."
        ),
    ] = "block",
    as_json: AsJson = False,
) -> int:
    """Check whether checkpoints can be mixed, and explain why not.

    Compares the files and, with --data, the loss between them; also counts exact and near
    duplicates between the splits of the data. Exit code 3 if the files cannot be mixed.

    Example: `robustsoup check eps16.safetensors eps96.safetensors --data digits
    --threat "Linf 56/255"`; which blocks carry robustness: `robustsoup check eps16.safetensors
    eps96.safetensors --data digits --threat "Linf 56/255" --layers`
    """
    from robustsoup.cli.inputs import (
        load_requested_data,
        make_context,
        name_checkpoints,
        open_checkpoints,
    )
    from robustsoup.cli.progress import Bar
    from robustsoup.cli.tables import print_layers, print_soupability
    from robustsoup.data.duplicates import find_overlaps
    from robustsoup.diagnosis.check import check
    from robustsoup.models import build_network

    _check_meanings(given, data, layers=layers)
    if layers:
        _check_layers(checkpoints, data)
    run.use_threads()
    source, split, module = None, None, None
    if data.data:
        source = load_requested_data(data, network, checkpoints, warn=False)
        context = make_context(source, network, run, checkpoints)
        split, module = source.val, build_network(context.network)
    opened = open_checkpoints(checkpoints, network.opening)
    with Bar("checking") as bar:
        result = check(
            opened,
            data=split,
            threat=threat,
            base=None if base is None else network.opening.open(base),
            samples=samples,
            network=module,
            device=run.device,
            pairs=pairs,
            on_progress=bar,
        )
    if source is not None:
        with Bar("comparing images") as bar:
            overlaps = find_overlaps(source, near=True, on_progress=bar)
        found: list[Finding] = [("warning", f"duplicates: {overlap}") for overlap in overlaps]
        result = replace(result, findings=[*result.findings, *found])
    layer_map = None
    if layers and split is not None and not result.differences:
        layer_map = _map_layers(opened, split, threat, granularity, samples, module, run.device)
    if as_json:
        content = result.to_json()
        if layer_map is not None:
            content["layers"] = layer_map.to_json()
        print_json(content)
    else:
        names = list(name_checkpoints(checkpoints))
        print_soupability(result, names, pairs)
        if layer_map is not None:
            print_layers(layer_map, names)
    return 0 if result.soupable else 3


def _check_meanings(given: Given, data: DataOptions, *, layers: bool) -> None:
    """Raise RequestError for options that nothing would read."""
    if "granularity" in given and not layers:
        raise RequestError("--granularity: requires --layers")
    for name in READ_WITH_DATA:
        if name in given and not data.data:
            raise RequestError(f"{flag(name)}: requires --data")


def _check_layers(checkpoints: "Sequence[Path]", data: DataOptions) -> None:
    """Raise RequestError if --layers lacks what it requires."""
    if len(checkpoints) != 2 or not data.data:
        raise RequestError(
            f"--layers: swaps blocks between 2 checkpoints and measures them on --data; got "
            f"{len(checkpoints)} checkpoints and {data.data or 'no data'}"
        )


def _map_layers(
    checkpoints: "Sequence[Checkpoint]",
    split: "Split",
    threat: str,
    granularity: str,
    samples: int,
    network: "nn.Module | None",
    device: str,
) -> "LayerMap":
    """Swap the blocks of two checkpoints, and show how far it is."""
    from robustsoup.cli.progress import Bar
    from robustsoup.diagnosis.layers import map_layers

    first, second = checkpoints
    with Bar("swapping blocks") as bar:
        return map_layers(
            first,
            second,
            split,
            threat=threat,
            granularity=granularity,
            samples=samples,
            network=network,
            device=device,
            on_progress=bar,
        )

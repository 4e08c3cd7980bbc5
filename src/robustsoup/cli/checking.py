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
    NetworkOptions,
    RunOptions,
)
from robustsoup.cli.terminal import print_json
from robustsoup.errors import RequestError

if TYPE_CHECKING:
    from robustsoup.diagnosis.rules import Finding


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
    as_json: AsJson = False,
) -> int:
    """Check whether checkpoints can be mixed, and explain why not.

    Compares the files and, with --data, the loss between them; also counts exact and near
    duplicates between the splits of the data. Exit code 3 if the files cannot be mixed.

    Example: `robustsoup check eps16.safetensors eps96.safetensors --data digits
    --threat "Linf 56/255"`
    """
    from robustsoup.checkpoints.checkpoint import Checkpoint
    from robustsoup.cli.inputs import load_requested_data, make_context, name_checkpoints
    from robustsoup.cli.progress import Bar
    from robustsoup.cli.tables import print_soupability
    from robustsoup.data.duplicates import find_overlaps
    from robustsoup.diagnosis.check import check
    from robustsoup.models import build_network

    run.use_threads()
    source, split, module = None, None, None
    if data.data:
        source = load_requested_data(data, network, warn=False)
        context = make_context(source, network, run, checkpoints)
        split, module = source.val, build_network(context.network)
    elif network.model or network.normalize or threat != "clean":
        raise RequestError("check: --model, --normalize and --threat require --data")
    with Bar("checking") as bar:
        result = check(
            [Checkpoint.open(path, key=network.key) for path in checkpoints],
            data=split,
            threat=threat,
            base=base,
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
    if as_json:
        print_json(result.to_json())
    else:
        print_soupability(result, list(name_checkpoints(checkpoints)), pairs)
    return 0 if result.soupable else 3

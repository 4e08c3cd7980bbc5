"""The command that trains or fine-tunes a network."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustsoup import distributed
from robustsoup.cli.options import (
    CheckpointPlace,
    Combine,
    DataOptions,
    Fields,
    Given,
    NetworkOptions,
    RunOptions,
    Track,
    TrainingThreats,
    flag,
    with_threats,
)
from robustsoup.cli.terminal import print_error, print_line
from robustsoup.errors import ModelError, RequestError
from robustsoup.settings import PRETRAIN_DEFAULTS, TrainSettings

if TYPE_CHECKING:
    from torch import nn

    from robustsoup.checkpoints.checkpoint import Checkpoint
    from robustsoup.data import Data
    from robustsoup.tracking import OnEpoch


def train_command(
    data: DataOptions,
    settings: Annotated[
        TrainSettings,
        Fields(
            omit=("threat", "also", "combine"),
            defaults={"lr": None},
            helps={"lr": "Learning rate; by default 0.1 for fresh weights and 0.001 with --from."},
        ),
    ],
    threat: TrainingThreats,
    output: Annotated[
        Path,
        typer.Option(
            "-o", help="Checkpoint to write (.safetensors); with --subspace, a folder for its ends."
        ),
    ],
    network: NetworkOptions,
    run: RunOptions,
    given: Given,
    start: Annotated[
        Path | None, CheckpointPlace(), typer.Option("--from", help="Checkpoint to fine-tune.")
    ] = None,
    combine: Combine = None,
    subspace: Annotated[
        str | None,
        typer.Option(
            help="Train a whole line or triangle of networks: line or triangle; the first 2 or 3 "
            "--threat are those of its ends, from robust to clean.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            "--subspace-by",
            help="What changes along a subspace: eps (the attack's radius) or objective (the "
            "weight of the clean loss).",
        ),
    ] = "eps",
    at_ends: Annotated[
        float | None,
        typer.Option(
            "--subspace-at-ends",
            min=0,
            max=1,
            help="Share of the steps that are at an end of a subspace, the same for each; the "
            "others draw a point uniformly. By default 2/3 for a line and 3/4 for a triangle.",
            show_default=False,
        ),
    ] = None,
    track: Track = None,
) -> None:
    """Train a network adversarially, or fine-tune a checkpoint.

    Starts from fresh weights (--model) or from a checkpoint (--from). The same command resumes an
    interrupted training. With `torchrun --nproc-per-node N -m robustsoup train ...`, N processes
    share each batch.

    Example: `robustsoup train --model resnet9:width=8 --data digits --threat "Linf 48/255" --lr 0.1
    -o base.safetensors`, then `robustsoup train --from base.safetensors --data digits
    --threat "Linf 16/255" --lr 0.02 -o eps16.safetensors`; a line of networks: `robustsoup train
    --from base.safetensors --data digits --threat "Linf 64/255" --threat "Linf 8/255" --subspace
    line --lr 0.02 -o ends`, then `robustsoup mix ends/end1.safetensors ends/end2.safetensors
    --at 0.3 --data digits -o soup.safetensors`
    """
    from robustsoup import tracking
    from robustsoup.cli.inputs import (
        load_requested_data,
        make_context,
        print_notes,
        warn_of_leakage,
    )
    from robustsoup.cli.progress import Bar
    from robustsoup.files import remove_file
    from robustsoup.runs.locks import lock_file
    from robustsoup.training.train import train
    from robustsoup.user_code import import_named_module

    ends, rest = _split_threats(subspace, threat, combine, given)
    settings = with_threats(settings, [*ends[:1], *rest], combine)
    _check_output(output, folder=bool(ends[1:]))
    _check_train_options(settings, network, start, given)
    if start is None and "lr" not in given:
        settings = replace(settings, lr=PRETRAIN_DEFAULTS["lr"])
    on_epoch = tracking.track(track) if track and distributed.is_first() else None
    run.use_threads()
    import_named_module(settings.objective)
    import_named_module(settings.transform)
    starts = [start] if start else []
    loaded = load_requested_data(data, network, starts)
    context = make_context(loaded, network, run, starts)
    if start is None:
        initial = context.fresh_network(data.seed)
    else:
        initial = context.record_network(network.opening.load(start))
        print_notes(initial)
        warn_of_leakage([initial], loaded, allow=True)
    settings = _open_synthetic_with_bar(settings, loaded)
    if ends[1:]:
        points = {"by": by, "at_ends": at_ends}
        _train_ends(initial, loaded, ends, settings, output, points, run=run, on_epoch=on_epoch)
        return
    state = output.with_name(f".{output.name}.state.pt")
    with lock_file(output, print_error) if distributed.is_first() else nullcontext():
        with Bar(f"training {output.name}") as bar:
            trained = train(
                initial,
                loaded.train,
                settings,
                val=loaded.val if settings.early_stop else None,
                device=run.device,
                state_path=state,
                on_progress=bar,
                on_epoch=on_epoch,
            )
        if distributed.is_first():
            trained.save(output)
            remove_file(state)
    loss = trained.provenance["history"][-1]["loss"]
    print_line(f"{output}: loss {loss:.3f} after {settings.epochs} epochs")


def _check_output(output: Path, *, folder: bool) -> None:
    """Check that the checkpoint, or the folder of a subspace, can be written."""
    from robustsoup.cli.inputs import check_output_file
    from robustsoup.files import check_writable

    if folder:
        check_writable(output, folder=True)
    else:
        check_output_file(output, {".safetensors"})


def _train_ends(
    initial: "nn.Module | Checkpoint",
    data: "Data",
    threats: Sequence[str],
    settings: TrainSettings,
    output: Path,
    points: Mapping[str, Any],
    *,
    run: RunOptions,
    on_epoch: "OnEpoch | None",
) -> None:
    """Train the ends of a subspace (`points`: by, at_ends) and write them."""
    from robustsoup.cli.progress import Bar
    from robustsoup.files import remove_file
    from robustsoup.runs.locks import lock_folder
    from robustsoup.soups.subspace import train_subspace

    state = output / ".state.pt"
    with lock_folder(output, print_error) if distributed.is_first() else nullcontext():
        with Bar(f"training {output.name}") as bar:
            ends = train_subspace(
                initial,
                data.train,
                threats,
                settings,
                **points,
                device=run.device,
                state_path=state,
                on_progress=bar,
                on_epoch=on_epoch,
            )
        for number, (end, threat) in enumerate(zip(ends, threats, strict=True), 1):
            path = output / f"end{number}.safetensors"
            if distributed.is_first():
                end.save(path)
                remove_file(output / f"end{number + 1}.safetensors")  # of an earlier, larger one
            print_line(f"{path}: end {number}, {threat}")
        if distributed.is_first():
            remove_file(state)
    loss = ends[0].provenance["history"][-1]["loss"]
    print_line(f"{output}: loss {loss:.3f} after {settings.epochs} epochs")


def _split_threats(
    subspace: str | None, threats: list[str], combine: str | None, given: Given
) -> tuple[list[str], list[str]]:
    """Return the threats of the ends of a subspace, or the first, and those combined with it."""
    if subspace is None:
        for name in ("by", "at_ends"):
            if name in given:
                raise RequestError(flag(f"subspace_{name}") + ": requires --subspace")
        return threats[:1], threats[1:]
    shapes = {"line": 2, "triangle": 3}
    if subspace not in shapes:
        raise RequestError(f'--subspace: got "{subspace}", expected line or triangle')
    ends = shapes[subspace]
    if len(threats) < ends or (len(threats) > ends and combine is None):
        raise RequestError(
            f"--subspace {subspace}: got {len(threats)} --threat, expected {ends}, one for each "
            "end, from robust to clean; further ones, which hold everywhere, require --combine"
        )
    return threats[:ends], threats[ends:]


def _check_train_options(
    settings: TrainSettings, network: NetworkOptions, start: Path | None, given: Given
) -> None:
    """Raise an error for options that do not apply together."""
    if start is None and network.model is None:
        raise ModelError(
            "train: requires --model for fresh weights, or --from with a checkpoint to fine-tune"
        )
    if "synthetic_fraction" in given and settings.synthetic is None:
        raise RequestError("--synthetic-fraction: requires --synthetic FILE.npz")


def _open_synthetic_with_bar(settings: TrainSettings, data: "Data") -> TrainSettings:
    """Replace the path of generated images, if any, by the images; warn of copies of val or test.

    Args:
        settings: The settings of the command.
        data: The data whose val and test splits are looked for among the images.
    """
    from robustsoup.cli.inputs import warn_of_overlaps
    from robustsoup.cli.progress import Bar
    from robustsoup.data import Synthetic
    from robustsoup.data.duplicates import find_copies

    if settings.synthetic is None:
        return settings
    with Bar(f"reading {Path(settings.synthetic).name}") as bar:
        images = Synthetic.open(settings.synthetic, on_progress=bar)
        images.check_fit(data.train)
        copies = find_copies(images, data, on_progress=bar)
    warn_of_overlaps(copies)
    return replace(settings, synthetic=images)

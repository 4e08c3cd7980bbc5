"""Commands that evaluate checkpoints and compare evaluations."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustsoup import distributed
from robustsoup.cli.options import (
    AsJson,
    DataOptions,
    Fields,
    Files,
    NetworkOptions,
    RunOptions,
    SampleLimit,
    ShiftFolder,
    Threats,
)
from robustsoup.cli.terminal import print_error, print_json, print_warning
from robustsoup.errors import RequestError, RobustsoupError
from robustsoup.settings import AttackSettings, to_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from robustsoup.checkpoints.checkpoint import Checkpoint
    from robustsoup.data import Split
    from robustsoup.evaluation.verdicts import Evaluation


def evaluate_command(
    checkpoints: Files,
    data: DataOptions,
    attack: Annotated[AttackSettings, Fields(omit=("targets",))],
    network: NetworkOptions,
    run: RunOptions,
    threat: Threats = [],
    split: Annotated[str, typer.Option(help="Split: train, val or test.")] = "test",
    samples: SampleLimit = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", help="Folder for one record of each checkpoint (.json and .npz)."),
    ] = None,
    keep_points: Annotated[
        bool, typer.Option("--keep-points", help="Also write the adversarial images (.points.npz).")
    ] = False,
    shift: ShiftFolder = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate checkpoints, clean and under attack.

    Prints accuracies with 95 % Wilson intervals. The same command resumes an interrupted
    evaluation. With `torchrun --nproc-per-node N -m robustsoup evaluate ...`, N processes share the
    samples; the verdicts are the same.

    Example: `robustsoup evaluate eps16.safetensors eps96.safetensors --data digits
    --threat "Linf 56/255" --steps 20`
    """
    from robustsoup.cli.inputs import (
        load_requested_data,
        make_context,
        name_checkpoints,
        print_notes,
    )
    from robustsoup.cli.progress import Bar
    from robustsoup.data.duplicates import find_exact_overlaps
    from robustsoup.evaluation.evaluate import evaluate
    from robustsoup.files import check_writable
    from robustsoup.threats import parse_threats
    from robustsoup.user_code import import_named_module

    if keep_points and not output:
        raise RequestError("--keep-points: requires -o FOLDER")
    if shift and split != "test":
        raise RequestError(f"--shift: applies to --split test, got {split}")
    if output:
        check_writable(output, folder=True)
        for name in name_checkpoints(checkpoints):
            check_writable(output / f"{name}.{split}.json", folder=False)
    run.use_threads()
    import_named_module(attack.attack)
    threats = parse_threats(threat)
    loaded = load_requested_data(data, network)
    context = make_context(loaded, network, run, checkpoints)
    selected = loaded.split(split)
    for model in threats:
        model.check_shape(selected.images.shape[1:])
    described = {
        name: context.record_network(network.opening.load(path))
        for name, path in name_checkpoints(checkpoints).items()
    }
    print_notes(*described.values())
    _warn_of_misfits(described.values(), selected, run.device)
    overlaps = find_exact_overlaps(loaded)
    evaluations: dict[str, Evaluation] = {}
    for name, checkpoint in described.items():
        request = [to_record(attack), threat, samples, keep_points, run.device]
        with Bar(f"evaluating {name}") as bar:
            evaluation = evaluate(
                checkpoint,
                selected,
                threat,
                attack,
                samples=samples,
                device=run.device,
                keep_points=keep_points,
                shift=shift,
                state_path=_locate_state(request, checkpoint, selected),
                on_progress=bar,
            )
        _warn_of_evaluation(name, checkpoint, selected, evaluation)
        evaluation.record["duplicates"] = [
            overlap.as_record() for overlap in overlaps if overlap.split == split
        ]
        evaluations[name] = evaluation
        if output and distributed.is_first():
            try:
                _save_evaluation(evaluation, output, f"{name}.{split}.json")
            except RobustsoupError:
                _print_accuracies(evaluations, split, as_json=as_json)  # or they would be lost
                raise
    _print_accuracies(evaluations, split, as_json=as_json)


def _warn_of_misfits(checkpoints: "Iterable[Checkpoint]", data: "Split", device: str) -> None:
    """Warn of networks that are near chance, or better with another normalisation."""
    from robustsoup.evaluation.evaluate import doubt_network

    for checkpoint in checkpoints:
        if doubt := doubt_network(checkpoint, data, device=device):
            print_warning(f"{checkpoint.name}: {doubt.text}")


def _warn_of_evaluation(
    name: str, checkpoint: "Checkpoint", split: "Split", evaluation: "Evaluation"
) -> None:
    """Record and print leakage, and print the warnings that were not printed before the work."""
    from robustsoup.checkpoints.provenance import find_leakage
    from robustsoup.evaluation.evaluate import BETTER_INPUTS

    leakage = find_leakage([checkpoint], split)
    evaluation.record["leakage"] = leakage.as_record()
    if leakage.status != "known":
        print_error(f"split {leakage.status}: {leakage.why}")
    said_before = evaluation.record.get(BETTER_INPUTS)
    for warning in evaluation.warnings:
        if warning != said_before:
            print_warning(f"{name}: {warning}")


def _save_evaluation(evaluation: "Evaluation", folder: Path, name: str) -> None:
    from robustsoup.runs.locks import lock_folder

    with lock_folder(folder, print_error):
        evaluation.save(folder / name)


def _print_accuracies(
    evaluations: "Mapping[str, Evaluation]", split: str, *, as_json: bool
) -> None:
    from robustsoup.cli.tables import print_evaluations

    if as_json:
        print_json({name: evaluation.to_json() for name, evaluation in evaluations.items()})
    else:
        print_evaluations(evaluations, split)


def _locate_state(request: object, checkpoint: "Checkpoint", split: "Split") -> Path:
    """Return the file for the state of an interrupted evaluation, in the folder of the store."""
    from robustsoup.runs.store import Store

    key = json.dumps([request, checkpoint.digest, split.digest])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Store().root / "unfinished" / f"{name}.pt"


def compare_command(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A.json", help="Record that `evaluate -o` wrote.", show_default=False
        ),
    ],
    second: Annotated[
        Path,
        typer.Argument(
            metavar="B.json", help="Another record of the same split.", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations sample by sample.

    Prints the differences B - A with 95 % intervals and McNemar's exact p-values.

    Example: `robustsoup evaluate eps16.safetensors eps96.safetensors --data digits
    --threat "Linf 56/255" --steps 20 -o verdicts`, then
    `robustsoup compare verdicts/eps16.test.json verdicts/eps96.test.json`
    """
    from robustsoup.cli.inputs import name_checkpoints
    from robustsoup.cli.tables import print_comparison
    from robustsoup.evaluation.comparison import compare
    from robustsoup.evaluation.verdicts import Evaluation

    comparison = compare(Evaluation.load(first), Evaluation.load(second))
    if as_json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison, list(name_checkpoints([first, second])))

"""Commands that evaluate checkpoints and compare evaluations."""

import contextlib
import hashlib
import json
from dataclasses import replace
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
from robustsoup.errors import RequestError, RobustsoupError, StorageError
from robustsoup.settings import AttackSettings, to_record

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    import torch

    from robustsoup.checkpoints.checkpoint import Checkpoint
    from robustsoup.data import Split
    from robustsoup.evaluation.verdicts import Evaluation


def evaluate_command(
    checkpoints: Files,
    data: DataOptions,
    attack: Annotated[AttackSettings, Fields()],
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
    )
    from robustsoup.cli.progress import Bar
    from robustsoup.data.duplicates import find_exact_overlaps
    from robustsoup.evaluation.evaluate import evaluate
    from robustsoup.threats import parse_threats
    from robustsoup.user_code import import_named_module

    if keep_points and not output:
        raise RequestError("--keep-points: requires -o FOLDER")
    if shift and split != "test":
        raise RequestError(f"--shift: applies to --split test, got {split}")
    if output:
        _check_output(output, [f"{name}.{split}.json" for name in name_checkpoints(checkpoints)])
    run.use_threads()
    import_named_module(attack.attack)
    threats = parse_threats(threat)
    loaded = load_requested_data(data, network, checkpoints)
    context = make_context(loaded, network, run, checkpoints)
    selected = loaded.split(split)
    for model in threats:
        model.check_shape(selected.images.shape[1:])
    described = {
        name: context.record_network(network.opening.load(path))
        for name, path in name_checkpoints(checkpoints).items()
    }
    _warn_of_misfits(described.values(), selected, run.device)
    overlaps = find_exact_overlaps(loaded)
    evaluations: dict[str, Evaluation] = {}
    request = [threat, samples, keep_points, _digest_copies(shift, selected)]
    states = _locate_states(described, selected, attack, context.device, request)
    finished = _FinishedEvaluations(states)
    for name, checkpoint in described.items():
        evaluation = finished.load(name)
        if evaluation is None:
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
                    state_path=states.get(name),
                    keep_state=True,
                    on_progress=bar,
                )
            finished.keep(name, evaluation)
        _warn_of_evaluation(name, checkpoint, selected, evaluation)
        evaluation.record["duplicates"] = [
            overlap.as_record() for overlap in overlaps if overlap.split == split
        ]
        evaluations[name] = evaluation
        if output and distributed.is_first():
            with _printed_on_error(evaluations, split, as_json=as_json):
                _save_evaluation(evaluation, output, f"{name}.{split}.json")
    _print_accuracies(evaluations, split, as_json=as_json)
    finished.forget()


def _check_output(folder: Path, names: "Iterable[str]") -> None:
    from robustsoup.files import check_writable

    check_writable(folder, folder=True)
    for name in names:
        check_writable(folder / name, folder=False)


def _digest_copies(folder: Path | None, data: "Split") -> str | None:
    """Return a digest of the files of corrupted copies, which may change between two calls."""
    from robustsoup.data.corruptions import open_corruptions

    return None if folder is None else open_corruptions(folder, data).digest


def _warn_of_misfits(checkpoints: "Collection[Checkpoint]", data: "Split", device: str) -> None:
    """Print the notes of files, and warn of networks near chance or better with other inputs."""
    from robustsoup.cli.inputs import print_notes
    from robustsoup.cli.progress import Bar
    from robustsoup.evaluation.evaluate import doubt_network

    print_notes(*checkpoints)
    warnings: list[str] = []
    with Bar("looking at the networks") as bar:
        for number, checkpoint in enumerate(checkpoints, 1):
            if doubt := doubt_network(checkpoint, data, device=device):
                warnings.append(f"{checkpoint.name}: {doubt.text}")
            bar(number, len(checkpoints))
    for warning in warnings:
        print_warning(warning)


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


@contextlib.contextmanager
def _printed_on_error(
    evaluations: "Mapping[str, Evaluation]", split: str, *, as_json: bool
) -> "Iterator[None]":
    """Print the accuracies if the block fails to write them, or they would be lost."""
    try:
        yield
    except RobustsoupError:
        _print_accuracies(evaluations, split, as_json=as_json)
        raise


def _print_accuracies(
    evaluations: "Mapping[str, Evaluation]", split: str, *, as_json: bool
) -> None:
    from robustsoup.cli.tables import print_evaluations

    if as_json:
        print_json({name: evaluation.to_json() for name, evaluation in evaluations.items()})
    else:
        print_evaluations(evaluations, split)


def _locate_states(
    described: "Mapping[str, Checkpoint]",
    split: "Split",
    attack: AttackSettings,
    device: "torch.device",
    request: "Sequence[object]",
) -> dict[str, Path]:
    """Return the file for the state of each interrupted evaluation, in the folder of the store.

    Args:
        described: The networks by name.
        split: The samples.
        attack: The attack; a user's attack counts by its code.
        device: Where the networks run; its type counts, and the precision that it resolves.
        request: What else decides the verdicts.

    Returns:
        The file by name; none if a rank cannot write there, which is printed.
    """
    from robustsoup.catalog import ATTACKS
    from robustsoup.device import resolve_precision
    from robustsoup.fingerprint import entry_fingerprint
    from robustsoup.models import network_fingerprint
    from robustsoup.runs.store import UNFINISHED, Store

    folder = Store().root / UNFINISHED
    if not all(distributed.gather(_is_writable(folder))):
        print_error(
            f"{folder}: cannot be written, so an interrupted evaluation starts again; "
            "set ROBUSTSOUP_STORE or XDG_CACHE_HOME to another folder"
        )
        return {}
    attack = replace(attack, precision=resolve_precision(attack.precision, device))
    code = entry_fingerprint(ATTACKS, str(attack.attack))
    parts = [to_record(attack), code, device.type, *request]
    states = {}
    for name, checkpoint in described.items():
        network = network_fingerprint(checkpoint.network())
        key = json.dumps([*parts, checkpoint.digest, network, split.fingerprint])
        states[name] = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pt"
    return states


def _is_writable(folder: Path) -> bool:
    from robustsoup.files import check_writable

    try:
        check_writable(folder, folder=True)
    except StorageError:
        return False
    return True


class _FinishedEvaluations:
    """Keeps evaluations in the store until all of a command are finished, so that it may resume.

    The first rank keeps them, and all ranks load what it has kept.

    Args:
        states: The place of the state of each evaluation by name; those without keep nothing.
    """

    def __init__(self, states: "Mapping[str, Path]") -> None:
        self._states = states

    def load(self, name: str) -> "Evaluation | None":
        """Return an evaluation that an interrupted call of the same command has finished."""
        return distributed.from_first(lambda: self._load(name))

    def _load(self, name: str) -> "Evaluation | None":
        from robustsoup.evaluation.verdicts import Evaluation

        state = self._states.get(name)
        if state is None or not (path := state.with_suffix(".json")).is_file():
            return None
        try:
            return Evaluation.load(path)
        except RobustsoupError:
            return None

    def keep(self, name: str, evaluation: "Evaluation") -> None:
        """Keep an evaluation, if the store can be written."""
        if name in self._states and distributed.is_first():
            path = self._states[name].with_suffix(".json")
            with contextlib.suppress(RobustsoupError, OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                evaluation.save(path)

    def forget(self) -> None:
        """Remove what is kept, and the states of all ranks."""
        distributed.gather(None)  # the first rank has written all results
        for state in self._states.values():
            for path in state.parent.glob(f"{state.stem}.*"):
                with contextlib.suppress(OSError):
                    path.unlink()


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

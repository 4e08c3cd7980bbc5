"""The worker executes steps: one function for each kind of task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np
import torch
from torch import Tensor

from robustsoup import distributed
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split, Synthetic
from robustsoup.diagnosis.landscape import PlaneGrid, open_plane
from robustsoup.digests import digest_json
from robustsoup.errors import CheckpointError, DataError, StorageError
from robustsoup.evaluation.evaluate import attack_part, evaluate
from robustsoup.evaluation.hit_tables import HitTable
from robustsoup.evaluation.reuse import lacks_points
from robustsoup.evaluation.verdicts import CLEAN_KEY, Evaluation
from robustsoup.files import link_file, open_regular, remove_file
from robustsoup.progress import Progress, SavedState
from robustsoup.runs.context import Context
from robustsoup.runs.examples import attack_examples
from robustsoup.runs.plan import PlannedRow, Step
from robustsoup.runs.store import STATE, Store
from robustsoup.runs.tasks import (
    AttackExamples,
    BuildGreedySoup,
    DoPart,
    EvaluateNetwork,
    EvaluationSettings,
    Key,
    LearnCoefficients,
    MapPlane,
    MeasureClean,
    MergeSoup,
    Mixing,
    MixSoup,
    TakeEnd,
    TakeSnapshot,
    TrainNetwork,
    TrainSubspace,
    stopping_split,
)
from robustsoup.soups.coefficients import Coefficients, load_coefficients
from robustsoup.soups.constants import describe_differing_constants
from robustsoup.soups.greedy import greedy
from robustsoup.soups.grid import Alpha, alpha_name, corners
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.merging import merge
from robustsoup.soups.mixing import mix
from robustsoup.soups.screening import mark_screened
from robustsoup.soups.subspace import train_subspace
from robustsoup.threats import ThreatModel
from robustsoup.torch_files import read_torch
from robustsoup.training.train import train

if TYPE_CHECKING:
    from torch import nn

CHECKPOINT = "checkpoint.safetensors"
COEFFICIENTS = "coefficients.safetensors"
DIAL = "dial.safetensors"
EVALUATION = "evaluation.json"
EXAMPLES = "examples.npz"
HITS = "hits.npz"
LANDSCAPE = "landscape.json"
PART = "part.pt"
CIRCUMSTANCES = ("processes", "seconds", "threads", "torch")
"""Entries of an evaluation's record that the record of its step holds, or that decide nothing."""
LONGEST_STEM = 200
"""Most letters of a file name without its ending; file systems allow 255 bytes with it."""

Measurement = MeasureClean | EvaluateNetwork | AttackExamples | MapPlane | DoPart
"""The tasks that measure networks and make none."""


def load_evaluation(store: Store, key: Key, threats: Sequence[ThreatModel] = ()) -> Evaluation:
    """Load the output of an evaluation from the store.

    Args:
        store: Finished steps.
        key: The evaluation.
        threats: Threat models that it must hold verdicts for.

    Raises:
        StorageError: A file of it is damaged, or it is another evaluation.
    """
    path = store.file(key, EVALUATION)
    store.file(key, path.with_suffix(".npz").name)
    evaluation = Evaluation.load(path)
    for threat in threats:
        if not threat.is_clean and str(threat) not in evaluation.threats:
            raise StorageError(
                f"{path}: holds no verdicts under {threat}; delete {path.parent} and run the same "
                "command again, which repeats the step"
            )
    return evaluation


def load_shares(store: Store, row: PlannedRow) -> tuple[float, ...] | None:
    """Return one coefficient for each ingredient of a soup; None if they differ by layer.

    Those of a greedy soup are known once it is built.
    """
    if row.role != "greedy" or row.learned is None:
        return row.coefficients
    return tuple(map(float, load_coefficients(store.file(row.learned, COEFFICIENTS)).row("")))


def load_hits(store: Store, key: Key) -> HitTable:
    """Load the output of a measurement of clean verdicts from the store.

    Raises:
        StorageError: A file of it is damaged.
    """
    return HitTable.load(store.file(key, HITS))


@dataclass(frozen=True)
class Worker:
    """Executes steps: reads their inputs from the store and writes their outputs.

    Attributes:
        context: Data, network and device.
        store: Finished steps.
        files: Checkpoints that existed before the run, by key.
        allow_leakage: Whether ingredients may have been trained on another split.
        warn: Called with one-line warnings about doubtful results.
    """

    context: Context
    store: Store
    files: Mapping[Key, Checkpoint]
    allow_leakage: bool
    warn: Callable[[str], None]

    def run_step(self, step: Step, folder: Path, on_progress: Progress) -> str:
        """Execute one step.

        Args:
            step: The step; its parents are finished.
            folder: Receives the output; may hold the state of an interrupted attempt, which stays.
            on_progress: Called with (parts done, total parts, figures).

        Returns:
            The figures of the result in one line.
        """
        task = step.task
        match task:
            case TrainNetwork():
                figures = train_network(self, task, folder, on_progress)
            case TakeSnapshot() | TakeEnd():
                figures = take_checkpoint(self, task, folder)
            case TrainSubspace():
                figures = train_ends(self, task, folder, on_progress)
            case LearnCoefficients():
                figures = learn_coefficients(self, step.name, task, folder, on_progress)
            case BuildGreedySoup():
                figures = build_greedy_soup(self, task, folder, on_progress)
            case MixSoup():
                figures = mix_soup(self, task, folder)
            case MergeSoup():
                figures = merge_soup(self, task, folder)
            case _:
                figures = self._measure(step.name, task, folder, on_progress)
        return figures

    def _measure(self, name: str, task: Measurement, folder: Path, on_progress: Progress) -> str:
        """Execute a task that makes no network."""
        match task:
            case MeasureClean():
                return measure_clean(self, task, folder, on_progress)
            case EvaluateNetwork():
                return evaluate_network(self, name, task, folder, on_progress)
            case AttackExamples():
                return save_examples(self, task, folder, on_progress)
            case MapPlane():
                return map_plane(self, task, folder, on_progress)
            case DoPart():
                return do_part(self, task, folder, on_progress)
            case _:
                assert_never(task)

    def optional_checkpoint(self, key: Key | None) -> Checkpoint | None:
        """Return a checkpoint; None for None."""
        return None if key is None else self.checkpoint(key)

    @cached_property
    def checkpoint(self) -> Callable[[Key], Checkpoint]:
        """The function that returns a checkpoint: the output of a step, or a file."""

        def open_checkpoint(key: Key) -> Checkpoint:
            checkpoint = self.files.get(key)
            if checkpoint is None:
                checkpoint = Checkpoint.open(self.store.file(key, CHECKPOINT))
            return self.context.record_network(checkpoint)

        return lru_cache(maxsize=8)(open_checkpoint)

    @cached_property
    def evaluation(self) -> Callable[[Key], Evaluation]:
        """The function that returns the output of an evaluation."""
        return lru_cache(maxsize=8)(partial(load_evaluation, self.store))

    def fitting_split(self, fits_on_val: bool) -> Split:
        """Return the samples to fit on."""
        return self.context.train_and_val if fits_on_val else self.context.data.train


def train_network(worker: Worker, task: TrainNetwork, folder: Path, on_progress: Progress) -> str:
    """Train a network and write its checkpoint, and checkpoints of earlier epochs if requested."""
    settings = task.settings
    network: Checkpoint | nn.Module
    if task.start is None:
        network = worker.context.fresh_network(settings.seed)
    else:
        network = worker.checkpoint(task.start)
    if settings.synthetic is not None:
        settings = replace(settings, synthetic=_open_planned_images(task))

    def save_epoch(epoch: int, checkpoint: Checkpoint) -> None:
        checkpoint.save(folder / f"epoch{epoch}.safetensors")

    trained = train(
        network,
        worker.fitting_split(task.fits_on_val),
        settings,
        val=stopping_split(settings.early_stop, None, worker.context.data),
        checkpoint_every=task.checkpoint_every,
        on_checkpoint=save_epoch if task.checkpoint_every else None,
        device=worker.context.device,
        state_path=folder / STATE,
        on_progress=on_progress,
    )
    trained.save(folder / CHECKPOINT)
    history = trained.provenance["history"]
    figures = f"loss {history[-1]['loss']:.3f}"
    if settings.early_stop is None:
        return figures
    epoch = trained.provenance["early_stopped_at"]
    best = next(entry for entry in history if entry["epoch"] == epoch)
    return (
        f"{figures}, stopped at epoch {epoch}: val robust loss {best['robust_loss']:.3f}, "
        f"robust {best['robust_accuracy']:.1%}"
    )


def _open_planned_images(task: TrainNetwork) -> Synthetic:
    """Open the generated images, which must not have changed since planning."""
    synthetic = Synthetic.open(task.settings.synthetic)
    if synthetic.digest != task.synthetic:
        raise DataError(
            f"{synthetic.path}: changed since the run was planned; run the same command again"
        )
    return synthetic


def take_checkpoint(worker: Worker, task: TakeSnapshot | TakeEnd, folder: Path) -> str:
    """Link the checkpoint of one epoch, or of one end of a subspace."""
    if isinstance(task, TakeEnd):
        kind, number = "end", task.number
    else:
        kind, number = "epoch", task.epoch
    link_file(worker.store.file(task.run, f"{kind}{number}.safetensors"), folder / CHECKPOINT)
    return f"{kind} {number}"


def train_ends(worker: Worker, task: TrainSubspace, folder: Path, on_progress: Progress) -> str:
    """Train the ends of a subspace and write them."""
    ends = train_subspace(
        worker.checkpoint(task.start),
        worker.fitting_split(task.fits_on_val),
        task.threats,
        task.settings,
        by=task.by,
        at_ends=task.at_ends,
        device=worker.context.device,
        state_path=folder / STATE,
        on_progress=on_progress,
    )
    for number, end in enumerate(ends, 1):
        end.save(folder / f"end{number}.safetensors")
    return f"loss {ends[0].provenance['history'][-1]['loss']:.3f}"


def learn_coefficients(
    worker: Worker, name: str, task: LearnCoefficients, folder: Path, on_progress: Progress
) -> str:
    """Learn the coefficients of a soup, or a dial, and write them."""
    settings = task.settings
    ingredients = [worker.checkpoint(key) for key in task.ingredients]
    data = worker.fitting_split(task.fits_on_val)
    base, device = worker.optional_checkpoint(task.base), worker.context.device
    if settings.dial is not None:
        dial = learn_dial(
            ingredients,
            data,
            settings,
            base=base,
            allow_leakage=worker.allow_leakage,
            device=device,
            state_path=folder / STATE,
            on_progress=on_progress,
        )
        dial.save(folder / DIAL)
        loss = dial.record["history"][-1]["loss"]
        robust, clean = _describe_shares(dial.at(0)), _describe_shares(dial.at(1))
        return f"loss {loss:.3f}; robust end: {robust}; clean end: {clean}"
    coefficients = learn(
        ingredients,
        data,
        settings,
        val=stopping_split(settings.early_stop, task.stops_on, worker.context.data),
        base=base,
        allow_leakage=worker.allow_leakage,
        device=device,
        state_path=folder / STATE,
        on_progress=on_progress,
    )
    coefficients.save(folder / COEFFICIENTS)
    earlier_warnings = set(describe_differing_constants(ingredients))  # at the start of the run
    for warning in coefficients.record.get("warnings", ()):
        if warning not in earlier_warnings:
            worker.warn(f"{name}: {warning}")
    loss = coefficients.record["history"][-1]["loss"]
    return f"loss {loss:.3f}, {_describe_shares(coefficients)}"


def build_greedy_soup(
    worker: Worker, task: BuildGreedySoup, folder: Path, on_progress: Progress
) -> str:
    """Build a greedy soup and write its coefficients.

    Every evaluation stays in the folder until the step ends, and so does the state of each on this
    kind of device, so an interrupted step resumes.
    """
    ingredients = [worker.checkpoint(key) for key in task.ingredients]
    split = task.evaluation.take_samples(worker.context.data)
    evaluated = 0

    def evaluate_soup(alpha: Alpha) -> Evaluation:
        nonlocal evaluated
        stem, device = _file_stem(alpha), worker.context.device
        path = folder / f"{stem}.json"
        if not distributed.from_first(path.exists):
            soup = _mix_checkpoints(worker, ingredients, Coefficients.of(alpha), task.mixing)
            evaluation = evaluate(
                soup,
                split,
                threats,
                task.evaluation.attack,
                device=str(device),
                state_path=folder / f"{stem}.{device.type}.pt",
                keep_state=True,
                shift=task.evaluation.shift_folder,
                shift_part=task.evaluation.shift_part,
            )
            _check_shift(evaluation, task.evaluation)
            _without_circumstances(evaluation).save(path)
        evaluated += 1
        evaluation = distributed.from_first(lambda: Evaluation.load(path))
        figures = f"{alpha_name(alpha)} {evaluation.accuracy}"
        on_progress(evaluated, task.rounds, figures)
        return evaluation

    threats = task.evaluation.threats
    stored = [load_evaluation(worker.store, key, threats) for key in task.evaluations]
    evaluations = stored or [evaluate_soup(alpha) for alpha in corners(len(ingredients))]
    tried = greedy(evaluations, evaluate_soup, task.score)
    trace = [{"alpha": list(c.alpha), "score": task.score.of(c.evaluation.accuracy)} for c in tried]
    best = tried[-1].alpha
    coefficients = replace(
        Coefficients.of(best),
        ingredients=tuple(item.digest for item in ingredients),
        record={"greedy": {"score": str(task.score), "tried": trace, "split": split.name}},
    )
    coefficients.save(folder / COEFFICIENTS)
    for state in folder.glob("*.pt"):
        remove_file(state)
    used = sum(share > 0 for share in best)
    return f"{used} of {len(best)} ingredients, {task.score}: {trace[-1]['score']:.1%}"


def _file_stem(alpha: Alpha) -> str:
    """Return the name of a file about a soup: of many ingredients, a digest of their shares."""
    name = alpha_name(alpha)
    return name if len(name) <= LONGEST_STEM else digest_json(alpha)


def mix_soup(worker: Worker, task: MixSoup, folder: Path) -> str:
    """Mix a soup and write its checkpoint; for a position on a dial, its coefficients too."""
    ingredients = [worker.checkpoint(key) for key in task.ingredients]
    if task.coefficients is None:
        coefficients = Coefficients.of(task.alpha or ())
    elif task.at is None:
        coefficients = load_coefficients(worker.store.file(task.coefficients, COEFFICIENTS))
    else:
        coefficients = load_coefficients(worker.store.file(task.coefficients, DIAL), task.at)
        coefficients.save(folder / COEFFICIENTS)
    soup = _mix_checkpoints(worker, ingredients, coefficients, task.mixing)
    soup.save(folder / CHECKPOINT)
    return f"buffers {task.mixing.policy}"


def merge_soup(worker: Worker, task: MergeSoup, folder: Path) -> str:
    """Merge a soup and write its checkpoint."""
    buffers = task.mixing.buffers
    base = task.base if task.base is not None else task.mixing.base
    soup = merge(
        [worker.checkpoint(key) for key in task.ingredients],
        task.method,
        task.weights,
        task.settings,
        base=worker.optional_checkpoint(base),
        data=worker.fitting_split(task.fits_on_val),
        threat=task.threat,
        attack_steps=task.attack_steps,
        buffers=task.mixing.policy,
        calibrate_samples=buffers.calibrate_samples,
        calibrate_threat=buffers.calibrate_threat,
        allow_leakage=worker.allow_leakage,
        device=worker.context.device,
        precision=task.precision,
        seed=task.seed,
    )
    soup.save(folder / CHECKPOINT)
    return f"{task.method}, buffers {task.mixing.policy}"


def _mix_checkpoints(
    worker: Worker, ingredients: list[Checkpoint], coefficients: Coefficients, mixing: Mixing
) -> Checkpoint:
    settings = mixing.buffers
    return mix(
        ingredients,
        coefficients,
        buffers=mixing.policy,
        base=worker.optional_checkpoint(mixing.base),
        calibrate_on=worker.context.data.train,
        calibrate_samples=settings.calibrate_samples,
        threat=settings.calibrate_threat,
        attack_steps=settings.attack_steps,
        seed=settings.seed,
        device=worker.context.device,
    )


def measure_clean(worker: Worker, task: MeasureClean, folder: Path, on_progress: Progress) -> str:
    """Measure the clean verdicts of many soups and write them as one table."""
    ingredients = [worker.checkpoint(key) for key in task.ingredients]
    split = task.settings.take_samples(worker.context.data)
    saved = SavedState(folder / STATE if distributed.is_first() else None, split.digest)
    state = distributed.from_first(saved.load)
    with saved.refuse_malformed():
        rows: list[Tensor] = [] if state is None else list(state["hits"].bool())
    for alpha in task.alphas[len(rows) :]:
        soup = _mix_checkpoints(worker, ingredients, Coefficients.of(alpha), task.mixing)
        evaluation = evaluate(soup, split, device=str(worker.context.device))
        rows.append(evaluation.hits()[CLEAN_KEY])
        figures = f"{alpha_name(alpha)} {evaluation.accuracy[CLEAN_KEY]}"
        on_progress(len(rows), len(task.alphas), figures)
        if saved.due():
            saved.save({"hits": torch.stack(rows)})
    hits = torch.stack(rows).numpy()
    table = HitTable(
        tuple(map(alpha_name, task.alphas)),
        np.array(task.alphas),
        split.ids.cpu().numpy(),
        {CLEAN_KEY: hits},
        {"split": task.settings.split},
    )
    table.save(folder / HITS)
    shares = hits.mean(1)
    return f"{len(rows)} soups, clean {shares.min():.1%} to {shares.max():.1%}"


def evaluate_network(
    worker: Worker, name: str, task: EvaluateNetwork, folder: Path, on_progress: Progress
) -> str:
    """Evaluate a network and write its verdicts."""
    settings: EvaluationSettings = task.settings
    if task.parts:
        _join_parts(worker, task.parts, folder, join_outcomes)
    key = task.after or task.begun
    after = None if key is None else worker.evaluation(key)
    # Nothing reads the points of an ingredient that a surrogate search attacked on a part first.
    begun_without = after is not None and lacks_points(after, settings.threats)
    evaluation = evaluate(
        worker.checkpoint(task.network),
        settings.take_samples(worker.context.data),
        settings.threats,
        settings.attack,
        keep_points=task.keep_points and not begun_without,
        pool=[worker.evaluation(key) for key in task.pool],
        others=[worker.evaluation(key) for key in task.others],
        after=after,
        subset=task.subset,
        device=str(worker.context.device),
        state_path=folder / STATE,
        keep_state=True,
        on_progress=on_progress,
        shift=settings.shift_folder,
        shift_part=settings.shift_part,
    )
    _check_shift(evaluation, settings)
    if settings.part != "all":
        evaluation = replace(evaluation, record={**evaluation.record, "part": settings.part})
    if task.short:
        evaluation = mark_screened(evaluation)
    _without_circumstances(evaluation).save(folder / EVALUATION)
    for warning in evaluation.warnings:
        worker.warn(f"{name}: {warning}")
    scores = str(evaluation.accuracy)
    return f"{scores} (after a short attack: upper bounds)" if task.short else scores


def _without_circumstances(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation without `CIRCUMSTANCES`; a repeat with its verdicts has its digest."""
    record = {key: value for key, value in evaluation.record.items() if key not in CIRCUMSTANCES}
    return replace(evaluation, record=record)


def _check_shift(evaluation: Evaluation, settings: EvaluationSettings) -> None:
    """Raise DataError if the corrupted copies changed since planning."""
    shift = settings.shift
    if shift is not None and evaluation.record["shift"]["digest"] != shift.digest:
        raise DataError(
            f"{shift.folder}: changed since the run was planned; run the same command again"
        )


def save_examples(worker: Worker, task: AttackExamples, folder: Path, on_progress: Progress) -> str:
    """Attack a few samples and write their pictures."""
    settings = task.settings
    examples = attack_examples(
        worker.checkpoint(task.network),
        worker.context.data.split(settings.split).first(settings.samples),
        settings.threats,
        settings.attack,
        device=worker.context.device,
        on_progress=on_progress,
    )
    examples.save(folder / EXAMPLES)
    return f"{len(examples.labels)} samples"


def map_plane(worker: Worker, task: MapPlane, folder: Path, on_progress: Progress) -> str:
    """Measure the loss on a plane and write it."""
    if task.parts:
        _join_parts(worker, task.parts, folder, join_points)
    plane = _open_plane(worker, task).measure(folder / STATE, on_progress)
    plane.save(folder / LANDSCAPE)
    finite = [value for row in plane.loss for value in row if value is not None]
    if not finite:
        return "no loss is finite"
    return f"robust loss {min(finite):.3f} to {max(finite):.3f}"


def _open_plane(worker: Worker, task: MapPlane) -> PlaneGrid:
    return open_plane(
        [worker.checkpoint(key) for key in task.networks],
        worker.context.data.split(task.split),
        task.settings,
        base=worker.optional_checkpoint(task.base),
        calibrate_on=worker.context.data.train,
        device=str(worker.context.device),
    )


def do_part(worker: Worker, task: DoPart, folder: Path, on_progress: Progress) -> str:
    """Do a part of an evaluation or of a plane, and write what it found."""
    if isinstance(task.whole, MapPlane):
        grid = _open_plane(worker, task.whole)
        rows = task.rows_of(task.whole.settings.points)
        values = grid.measure_rows(rows, folder / STATE, on_progress)
        SavedState(folder / PART, grid.fingerprint).save({"values": values})
        figures = f"{len(values)} points"
    else:
        settings = task.whole.settings
        split = settings.take_samples(worker.context.data)
        rows = task.rows_of(len(split))
        part = attack_part(
            worker.checkpoint(task.whole.network),
            split,
            settings.threats,
            settings.attack,
            rows,
            keep_points=task.whole.keep_points,
            device=str(worker.context.device),
            state_path=folder / STATE,
            on_progress=on_progress,
        )
        SavedState(folder / PART, part.fingerprint).save({"outcomes": part.outcomes})
        figures = f"{len(rows)} samples"
    return figures


def _join_parts(
    worker: Worker, parts: Sequence[Key], folder: Path, join: Callable[[list[Any]], dict[str, Any]]
) -> None:
    """Write the state from which a step resumes whose parts are all done.

    Raises:
        CheckpointError: The parts belong to different work.
    """
    states = []
    for key in parts:
        with open_regular(worker.store.file(key, PART)) as file:
            states.append(read_torch(file))
    fingerprints = {state.pop("fingerprint") for state in states}
    if len(fingerprints) > 1:
        raise CheckpointError(
            f"{folder}: its parts were done on devices of different kinds, and do not fit together"
        )
    SavedState(folder / STATE, fingerprints.pop()).save(join(states))


def join_outcomes(states: list[Any]) -> dict[str, Any]:
    """Return the state of an evaluation from those of its parts."""
    outcomes = [state["outcomes"] for state in states]
    return {
        "outcomes": {
            threat: {name: torch.cat([part[threat][name] for part in outcomes]) for name in first}
            for threat, first in outcomes[0].items()
        }
    }


def join_points(states: list[Any]) -> dict[str, Any]:
    """Return the state of a plane from those of its rows."""
    return {"values": [values for state in states for values in state["values"]]}


def _describe_shares(coefficients: Coefficients) -> str:
    means = ", ".join(f"{value:.2f}" for value in coefficients.alpha.mean(0).tolist())
    return f"mean coefficients {means}, mean entropy {float(coefficients.entropy().mean()):.2f}"

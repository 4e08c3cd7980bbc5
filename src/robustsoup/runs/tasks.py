"""The kinds of work that a run consists of, each one a frozen dataclass.

A task holds its settings and the keys of the steps and files that it reads; its output depends on
these and the data alone. A task also estimates its cost. `robustsoup.runs.worker` executes tasks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Data, Split
from robustsoup.data.corruptions import CorruptionPart
from robustsoup.digests import digest_json
from robustsoup.errors import DataError
from robustsoup.models import NetworkSettings
from robustsoup.settings import (
    AttackSettings,
    BufferSettings,
    EarlyStop,
    LandscapeSettings,
    LearnSettings,
    MergeSettings,
    TrainSettings,
    is_settings,
    to_record,
)
from robustsoup.soups.confirmation import Part, take_part
from robustsoup.soups.goal import Score
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.objectives import Objective

Key = str
"""Key of a step, or that of a checkpoint that existed before the run, see `file_key`."""


def file_key(
    checkpoint: Checkpoint,
    network: NetworkSettings,
    *,
    named: bool = False,
    constants_named: bool = False,
) -> Key:
    """Return the key of a file: "file:DIGEST", and a digest of the network that it is run with.

    The latter is left out if that is the network of the run; it may have other constants of
    normalisation, for example. The arguments are those of `record_network`.
    """
    recorded = checkpoint.provenance.get("network")
    if recorded is None:
        return f"file:{checkpoint.digest}"
    of_file = NetworkSettings.from_record(recorded)
    constants = network.normalize if constants_named else of_file.normalize
    used = dataclasses.replace(network if named else of_file, normalize=constants)
    if used == network:
        return f"file:{checkpoint.digest}"
    return f"file:{checkpoint.digest}:{digest_json({'network': used.as_record()})[:16]}"


MOST_PARTS = 100
"""Most parts of an evaluation."""
BYTES_PER_VALUE = 4
"""Bytes of a value of an adversarial image."""


@dataclass(frozen=True)
class TrainNetwork:
    """Train a network from fresh weights ("pretrain") or from a checkpoint ("finetune").

    Attributes:
        settings: How to train.
        start: The checkpoint to start from; None for fresh weights drawn by the settings' seed.
        synthetic: Digest of the generated images that `settings.synthetic` names.
        checkpoint_every: Epochs between stored checkpoints; None to store only the last.
        fits_on_val: Whether `val` is trained on too.
    """

    settings: TrainSettings
    start: Key | None = None
    synthetic: str | None = None
    checkpoint_every: int | None = None
    fits_on_val: bool = False

    @property
    def kind(self) -> str:
        """Name of the kind of task."""
        return "pretrain" if self.start is None else "finetune"

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints that the task stores."""
        interval = self.checkpoint_every
        return 1 + (self.settings.epochs // interval if interval else 0)

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return () if self.start is None else (self.start,)

    @property
    def precision(self) -> str:
        """Arithmetic of the task."""
        return self.settings.precision

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        settings = self.settings
        return _fitting_passes(settings, data, self.fits_on_val) + _stopping_passes(settings, data)


@dataclass(frozen=True)
class TakeSnapshot:
    """Take the checkpoint of one epoch from a training run that stored several.

    Attributes:
        run: The training run.
        epoch: The epoch.
    """

    run: Key
    epoch: int
    kind = "snapshot"
    precision = "float32"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return (self.run,)

    def count_passes(self, _data: Data) -> int:
        """Return 0: the task runs no network."""
        return 0


@dataclass(frozen=True)
class TrainSubspace:
    """Train the ends of a line or a triangle of networks from a checkpoint.

    Attributes:
        settings: How to train; the threat is that of the first end.
        threats: Threat models of the ends.
        by: What changes along the subspace.
        start: The checkpoint to start from.
        fits_on_val: Whether `val` is trained on too.
        at_ends: Share of the steps at an end; None for the default.
    """

    settings: TrainSettings
    threats: tuple[ThreatModel, ...]
    by: str
    start: Key
    fits_on_val: bool = False
    at_ends: float | None = None
    kind = "subspace"

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints that the task stores."""
        return len(self.threats)

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return (self.start,)

    @property
    def precision(self) -> str:
        """Arithmetic of the task."""
        return self.settings.precision

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        return _fitting_passes(self.settings, data, self.fits_on_val)


@dataclass(frozen=True)
class TakeEnd:
    """Take one end of a subspace.

    Attributes:
        run: The training of the subspace.
        number: Number of the end, from 1.
    """

    run: Key
    number: int
    kind = "end"
    precision = "float32"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return (self.run,)

    def count_passes(self, _data: Data) -> int:
        """Return 0: the task runs no network."""
        return 0


@dataclass(frozen=True)
class SteeringPart:
    """The samples of `val` that steer a search: those that confirm finalists are left out.

    Attributes:
        samples: Number of samples that select; None for all.
        seed: Seed that decides which samples confirm.
    """

    samples: int | None
    seed: int

    def take(self, val: Split) -> Split:
        """Return the samples."""
        return take_part(val.first(self.samples), "search", seed=self.seed)


def stopping_split(stop: EarlyStop | None, part: SteeringPart | None, data: Data) -> Split | None:
    """Return the samples of `val` that early stopping measures on; None without it.

    Args:
        stop: How to stop early.
        part: The part of `val` to take them from; None for all of it.
        data: The data.

    Raises:
        DataError: If there are fewer samples than early stopping measures.
    """
    if stop is None:
        return None
    split = data.val if part is None else part.take(data.val)
    if part is not None and (stop.samples or 0) > len(split):
        raise DataError(
            f"early_stop.samples: got {stop.samples}, expected at most {len(split)}: the other "
            f"samples of {data.val.name} confirm finalists"
        )
    return split.first(stop.samples)


@dataclass(frozen=True)
class LearnCoefficients:
    """Learn the coefficients of one soup ("learn") or of a line of soups ("dial").

    Attributes:
        settings: How to learn; `settings.dial` is set for a dial.
        ingredients: The ingredients.
        base: Checkpoint whose BatchNorm statistics the policy "base" takes.
        fits_on_val: Whether `val` is learned on too.
        stops_on: The part of `val` that early stopping measures on; None for all of it.
    """

    settings: LearnSettings
    ingredients: tuple[Key, ...]
    base: Key | None = None
    fits_on_val: bool = False
    stops_on: SteeringPart | None = None

    @property
    def kind(self) -> str:
        """Name of the kind of task."""
        return "learn" if self.settings.dial is None else "dial"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return self.ingredients

    @property
    def precision(self) -> str:
        """Arithmetic of the task."""
        return self.settings.precision

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        settings = self.settings
        if settings.dial is not None and settings.dial.by == "objective":
            settings = dataclasses.replace(settings, objective="mixed 0.5")
        return _fitting_passes(settings, data, self.fits_on_val) + _stopping_passes(
            settings, data, self.stops_on
        )


@dataclass(frozen=True)
class Mixing:
    """How a soup gets BatchNorm's running statistics.

    Attributes:
        buffers: The policy and its settings.
        base: Checkpoint whose statistics the policy "base" takes.
    """

    buffers: BufferSettings
    base: Key | None = None

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return self.buffers.buffers or "average"

    def count_passes(self, data: Data) -> int:
        """Return the cost of one mix in forward passes of one sample."""
        if not self.policy.startswith("recalibrate"):
            return 0
        samples = min(self.buffers.calibrate_samples, len(data.train))
        attacked = self.policy == "recalibrate-adversarial"
        return samples * (2 + 2 * self.buffers.attack_steps if attacked else 1)


@dataclass(frozen=True)
class ShiftedCopies:
    """Corrupted copies of the test set that networks are evaluated on too.

    Attributes:
        folder: Their folder.
        digest: Its digest, which decides the output; the folder may move.
        part: Copies of which images.
        count: Number of copies that one evaluation takes.
    """

    folder: str
    digest: str
    part: CorruptionPart
    count: int

    def __str__(self) -> str:
        """Return what the output depends on."""
        return f"{self.part} of {self.digest}"

    def take_part(self, part: Part) -> "ShiftedCopies":
        """Return the copies that go with a part of the samples that select."""
        confirm = self.count // 3
        if part == "all":
            return self
        return dataclasses.replace(
            self, part=part, count=confirm if part == "confirm" else self.count - confirm
        )


@dataclass(frozen=True)
class EvaluationSettings:
    """How a network is evaluated.

    Attributes:
        split: Name of the split.
        samples: Number of samples; None for all.
        threats: Threat models.
        attack: The attack; its seed also decides which samples are in which part.
        shift: Corrupted copies, for the measure "shift".
        part: Part of the samples: "all", "confirm" for the third that confirms finalists, or
            "search" for the others.
    """

    split: str
    samples: int | None
    threats: tuple[ThreatModel, ...]
    attack: AttackSettings
    shift: ShiftedCopies | None = None
    part: Part = "all"

    @property
    def shift_folder(self) -> str | None:
        """The folder of corrupted copies, if there is one."""
        return None if self.shift is None else self.shift.folder

    @property
    def shift_part(self) -> CorruptionPart:
        """Copies of which images are taken."""
        return "all" if self.shift is None else self.shift.part

    def of_part(self, part: Part) -> "EvaluationSettings":
        """Return the settings for a part of the samples, and of the corrupted copies."""
        return dataclasses.replace(self, part=part, shift=self.shift and self.shift.take_part(part))

    def take_samples(self, data: Data) -> Split:
        """Return the samples."""
        split = data.split(self.split).first(self.samples)
        return take_part(split, self.part, seed=self.attack.seed)

    def count_samples(self, data: Data) -> int:
        """Return the number of samples."""
        samples = self.samples or len(data.split(self.split))
        confirm = samples // 3
        return {"all": samples, "search": samples - confirm, "confirm": confirm}[self.part]

    def count_point_bytes(self, data: Data) -> int:
        """Return the bytes of the adversarial images, if they are kept."""
        channels, (height, width) = data.record["channels"], data.record["size"]
        threats = sum(not threat.is_clean for threat in self.threats)
        return self.count_samples(data) * threats * channels * height * width * BYTES_PER_VALUE

    def count_passes(self, data: Data, *, points: int = 0, attack: bool = True) -> int:
        """Return the cost of one evaluation in forward passes of one sample.

        Args:
            data: The data.
            points: Number of adversarial points tried on each sample before the attack.
            attack: Whether the attack runs at all.
        """
        threats = sum(not threat.is_clean for threat in self.threats)
        steps = self.attack.most_passes(data.test.classes) // 2 if attack else 0
        copies = 0 if self.shift is None else self.shift.count
        return self.count_samples(data) * (1 + threats * (points // 2 + steps)) + copies


@dataclass(frozen=True)
class BuildGreedySoup:
    """Build a greedy soup: evaluate soups with one more ingredient at a time.

    Attributes:
        score: An ingredient is added only if this score does not drop.
        ingredients: The ingredients.
        evaluations: Evaluations of the ingredients; empty if they must be evaluated as soups.
        mixing: How the soups get their running statistics.
        evaluation: How the soups are evaluated.
    """

    score: Score
    ingredients: tuple[Key, ...]
    evaluations: tuple[Key, ...]
    mixing: Mixing
    evaluation: EvaluationSettings
    kind = "greedy"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return (*self.ingredients, *self.evaluations)

    @property
    def precision(self) -> str:
        """Arithmetic of the task."""
        return self.evaluation.attack.precision

    @property
    def rounds(self) -> int:
        """Number of soups to evaluate."""
        return 2 * len(self.ingredients) - 1 - len(self.evaluations)

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        per_soup = self.evaluation.count_passes(data) + self.mixing.count_passes(data)
        return self.rounds * per_soup


@dataclass(frozen=True)
class MixSoup:
    """Mix ingredients into a soup.

    Attributes:
        ingredients: The ingredients.
        mixing: How the soup gets its running statistics.
        alpha: One coefficient for each ingredient; None to take those of `coefficients`.
        coefficients: Step whose output holds the coefficients.
        at: Position on a dial.
    """

    ingredients: tuple[Key, ...]
    mixing: Mixing
    alpha: tuple[float, ...] | None = None
    coefficients: Key | None = None
    at: float | None = None
    kind = "mix"
    precision = "float32"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return self.ingredients + (() if self.coefficients is None else (self.coefficients,))

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        return self.mixing.count_passes(data)


@dataclass(frozen=True)
class MeasureClean:
    """Measure the clean verdicts of many soups, which takes a forward pass of each sample.

    Attributes:
        ingredients: The ingredients.
        alphas: One coefficient for each ingredient, of each soup.
        mixing: How the soups get their running statistics.
        settings: Which samples are evaluated; without threat models.
    """

    ingredients: tuple[Key, ...]
    alphas: tuple[tuple[float, ...], ...]
    mixing: Mixing
    settings: EvaluationSettings
    kind = "clean"
    precision = "float32"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return self.ingredients

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        samples = self.settings.count_samples(data)
        return len(self.alphas) * (samples + self.mixing.count_passes(data))


@dataclass(frozen=True)
class MergeSoup:
    """Merge ingredients by a method that goes beyond an average.

    Attributes:
        method: Name of the method.
        settings: Its numbers.
        ingredients: The ingredients.
        weights: One weight for each ingredient.
        mixing: How the soup gets its running statistics.
        base: The checkpoint that the ingredients were fine-tuned from, if the method requires it.
        threat: Threat model of the measurement; clean if the method measures nothing.
        attack_steps: APGD steps of the measurement.
        seed: Seed of the method's draws.
        precision: Arithmetic of the attack.
        fits_on_val: Whether `val` is measured on too.
    """

    method: str
    settings: MergeSettings
    ingredients: tuple[Key, ...]
    weights: tuple[float, ...]
    mixing: Mixing
    base: Key | None = None
    threat: ThreatModel = CLEAN
    attack_steps: int = 2
    seed: int = 0
    precision: str = "float32"
    fits_on_val: bool = False
    kind = "merge"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        new = self.base is not None and self.base not in self.ingredients
        return (*self.ingredients, *((self.base,) if new and self.base else ()))

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        measured = 0 if self.threat.is_clean else self.settings.measure_samples
        samples = min(measured, len(data.train)) * len(self.ingredients)
        return samples * (2 * self.attack_steps + 4) + self.mixing.count_passes(data)


@dataclass(frozen=True)
class EvaluateNetwork:
    """Evaluate one network.

    Attributes:
        network: The network.
        settings: How it is evaluated.
        keep_points: Whether the adversarial images are stored.
        pool: Evaluations whose adversarial points are tried before the attack.
        others: Evaluations whose adversarial points the masking check tries.
        after: Earlier evaluation of the network, whose verdicts this one starts from.
        attacked_before: Whether `after` ran the same attack, so that no sample is attacked again.
        short: Whether the attack is the short one of a screening.
        subset: Number of samples to attack; None for all.
        parts: Steps that attack the samples beforehand, in order; the output is the same without.
        begun: Evaluation whose attack on a subset this one completes; so are its verdicts.
    """

    network: Key
    settings: EvaluationSettings
    keep_points: bool = False
    pool: tuple[Key, ...] = ()
    others: tuple[Key, ...] = ()
    after: Key | None = None
    attacked_before: bool = False
    short: bool = False
    subset: int | None = None
    parts: tuple[Key, ...] = ()
    begun: Key | None = None
    kind = "evaluate"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        after = () if self.after is None or self.after in self.pool else (self.after,)
        return (self.network, *self.pool, *self.others, *after)

    @property
    def precision(self) -> str:
        """Arithmetic of the task."""
        return self.settings.attack.precision

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        settings = self.settings
        if self.subset is not None:
            settings = dataclasses.replace(settings, samples=self.subset, part="all", shift=None)
        attack = not (self.attacked_before or self.parts)
        return settings.count_passes(data, points=len(self.pool), attack=attack)

    def count_parts(self, data: Data, samples: int) -> int:
        """Return in how many parts, of about `samples` samples each, the attack can be divided.

        Attacks that take many samples together, and evaluations that build on others, cannot be.
        """
        attack, threats = self.settings.attack, self.settings.threats
        builds_on_others = bool(self.pool or self.after or self.begun or self.subset)
        if (
            not attack.attacks_each_alone
            or builds_on_others
            or all(threat.is_clean for threat in threats)
        ):
            return 1
        return min(max(self.settings.count_samples(data) // samples, 1), MOST_PARTS)


@dataclass(frozen=True)
class AttackExamples:
    """Attack a few samples and keep the attacked images, for pictures.

    Attributes:
        network: The network.
        settings: How the samples are attacked.
    """

    network: Key
    settings: EvaluationSettings
    kind = "examples"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return (self.network,)

    @property
    def precision(self) -> str:
        """Arithmetic of the task."""
        return self.settings.attack.precision

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        return self.settings.count_passes(data)


@dataclass(frozen=True)
class MapPlane:
    """Measure the loss on a grid of points of the plane through three networks.

    Attributes:
        networks: The three networks.
        settings: The grid, the attack and the running statistics.
        split: Name of the split to measure on.
        base: Checkpoint whose statistics the policy "base" takes.
        parts: Steps that measure the rows beforehand, in order; the output is the same without.
    """

    networks: tuple[Key, ...]
    settings: LandscapeSettings
    split: str
    base: Key | None = None
    parts: tuple[Key, ...] = ()
    kind = "plane"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        return self.networks

    @property
    def precision(self) -> str:
        """Arithmetic of the task."""
        return self.settings.precision

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        settings = self.settings
        if self.parts:
            return 0
        per_point = settings.samples * (2 * settings.attack_steps + 3)
        if settings.buffers.startswith("recalibrate"):
            per_point += min(settings.calibrate_samples, len(data.train))
        return settings.points**2 * per_point

    def count_parts(self, _data: Data, _samples: int) -> int:
        """Return in how many parts the plane can be divided: its rows."""
        return self.settings.points


@dataclass(frozen=True)
class DoPart:
    """Do a part of another task, which then takes what its parts have found.

    Attributes:
        whole: The other task.
        number: Number of the part, from 0.
        count: Number of parts.
    """

    whole: EvaluateNetwork | MapPlane
    number: int
    count: int
    kind = "part"

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the task reads."""
        whole = self.whole
        return (whole.network,) if isinstance(whole, EvaluateNetwork) else whole.parents

    @property
    def base(self) -> Key | None:
        """Checkpoint whose statistics a plane takes."""
        return getattr(self.whole, "base", None)

    @property
    def precision(self) -> str:
        """Arithmetic of the task."""
        return self.whole.precision

    def rows_of(self, n: int) -> range:
        """Return which of n samples, or rows of a plane, the part is about."""
        return range(n * self.number // self.count, n * (self.number + 1) // self.count)

    def count_passes(self, data: Data) -> int:
        """Return the cost of the task in forward passes of one sample."""
        return self.whole.count_passes(data) // self.count


Task = (
    TrainNetwork
    | TakeSnapshot
    | TrainSubspace
    | TakeEnd
    | LearnCoefficients
    | BuildGreedySoup
    | MixSoup
    | MeasureClean
    | MergeSoup
    | EvaluateNetwork
    | AttackExamples
    | MapPlane
    | DoPart
)

FittingTask = TrainNetwork | TrainSubspace | LearnCoefficients
"""Tasks that train or learn for a number of epochs."""


def list_bases(task: Task) -> list[Key]:
    """Return the checkpoints that a task takes BatchNorm statistics from or subtracts."""
    mixing = getattr(task, "mixing", None)
    bases = (getattr(task, "base", None), None if mixing is None else mixing.base)
    return [base for base in bases if base is not None]


def task_record(task: Task) -> dict[str, Any]:
    """Return a task as JSON-able values, for its key and its record."""
    record = _as_record(task)
    if isinstance(task, TrainNetwork) and task.settings.synthetic is not None:
        # The output depends on the images, not on their path.
        record["settings"] = record["settings"] | {"synthetic": task.synthetic}
    return record


def _as_record(value: Any) -> Any:
    if is_settings(value):
        return to_record(value)
    if isinstance(value, ThreatModel | Score | ShiftedCopies):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_record(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _as_record(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        record = {f.name: _as_record(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: item for name, item in record.items() if not _is_left_out(value, name)}
    return value


def _is_left_out(value: Any, name: str) -> bool:
    """Return whether a field is no part of a key: it changes no result, or has its default."""
    match value:
        case LearnCoefficients():
            return name == "stops_on" and value.stops_on is None
        case EvaluationSettings():
            return (name == "shift" and value.shift is None) or (
                name == "part" and value.part == "all"
            )
        case (
            EvaluateNetwork() | MapPlane()
        ):  # the parts change who does the work, not what it gives
            return name in ("parts", "begun")
        case TrainSubspace():
            return name == "at_ends" and value.at_ends is None
        case _:
            return False


def step_passes(threat: ThreatModel, objective: str | Objective, attack_steps: int) -> int:
    """Return the cost of one training step in forward passes of one sample.

    The attack takes a forward and a backward pass for each step and one pass at the end, and one
    more if its loss compares with clean logits. The update takes 3 passes for each batch that the
    objective uses, and one more if the batches pass separately.
    """
    parsed = Objective.parse(objective)
    attacked = not threat.is_clean and parsed.uses_attacked
    attack = 2 * attack_steps + 1 + parsed.attack_compares_with_clean if attacked else 0
    both = attacked and parsed.uses_clean
    return attack + (6 + parsed.separate_passes if both else 3)


def _fitting_passes(settings: TrainSettings | LearnSettings, data: Data, fits_on_val: bool) -> int:
    samples = len(data.train) + (len(data.val) if fits_on_val else 0)
    per_sample = step_passes(settings.threat, settings.objective, settings.attack_steps)
    attacks = 1 if settings.combine == "random" else len(settings.threats)
    return samples * settings.epochs * per_sample * attacks


def _stopping_passes(
    settings: TrainSettings | LearnSettings, data: Data, part: SteeringPart | None = None
) -> int:
    stop: EarlyStop | None = settings.early_stop
    split = stopping_split(stop, part, data)
    if stop is None or split is None:
        return 0
    return settings.epochs * len(split) * len(settings.threats) * (2 * stop.steps + 2)

"""Train a line or a triangle of networks instead of its ends one by one."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup import distributed
from robustsoup.attacks.adaptation import copy_network
from robustsoup.attacks.forward import set_mode
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.checkpoints.fitting import load_tensors
from robustsoup.checkpoints.parameters import list_averageable, parameters_and_buffers
from robustsoup.data import SplitLike, as_split, batches
from robustsoup.data.batches import Batch
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import CoefficientError, RequestError
from robustsoup.gradients import gradients_enabled
from robustsoup.models import network_fingerprint
from robustsoup.progress import Progress
from robustsoup.seeding import keyed_generator
from robustsoup.settings import (
    TrainSettings,
    accepts_settings,
    make_settings,
    plain_number,
    to_record,
)
from robustsoup.soups.batchnorm import recalibrate
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.tracking import OnEpoch
from robustsoup.training.accumulation import add_gradients, attack_parts
from robustsoup.training.loop import History, check_step_loss, resume, run_epochs
from robustsoup.training.objectives import Objective, mixed
from robustsoup.training.optimizer import (
    clip_gradients,
    list_frozen,
    make_optimizer,
    prepare_network,
)
from robustsoup.training.recomputation import recomputed_activations
from robustsoup.training.schedules import check_schedule, learning_rate
from robustsoup.training.sharing import (
    BatchShare,
    average_statistics,
    check_same_training,
    share_loss_pass,
    synchronised_batchnorm,
)
from robustsoup.training.train import TrainingInputs, inherited_record, open_trainable
from robustsoup.training.transforms import (
    augmentation_fingerprint,
    take_transform,
    transform_fingerprint,
)

SHAPES = {2: "line", 3: "triangle"}
"""Shape of a subspace by its number of ends."""
WAYS = ("eps", "objective")
CALIBRATION_SAMPLES = 10_000


@accepts_settings(TrainSettings, omit=("threat",))
@gradients_enabled()
def train_subspace(
    network: nn.Module | CheckpointLike,
    data: SplitLike,
    threats: Sequence[ThreatModel | str],
    settings: TrainSettings | None = None,
    *,
    by: str = "eps",
    at_ends: float | None = None,
    device: str | torch.device = "auto",
    state_path: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
    **changes: Any,
) -> list[Checkpoint]:
    """Train the ends of a line or a triangle of weights so that all points between them are good.

    Each step draws weights w, mixes W = sum_i w_i W_i, attacks W, and sends w_i times its gradient
    to end i. On a line, w = (1 - t, t): by default t is 0 in a third of the steps, 1 in a third,
    and uniform in the others; on a triangle, each end and the uniform draw take a quarter.

    Args:
        network: A module, which is not changed, a Checkpoint or a path; all ends start from it.
        data: The training split.
        threats: The threat models of the ends, 2 for a line and 3 for a triangle, from robust to
            clean.
        settings: The settings; TrainSettings() by default. With `also`, the more threats hold at
            every point, and the ends must not be clean.
        by: "eps": between the ends, the radius of the attack is the mean of theirs by w; threats of
            other norms are drawn with probability w. "objective": the first threat at every point,
            and the clean loss weighs what the clean ends weigh; an end has the first threat or is
            clean.
        at_ends: Share of the steps that are at an end, in [0, 1], the same for each; the others
            draw w uniformly. By default 2/3 for a line and 3/4 for a triangle.
        device: "auto", "cpu", "cuda" or a device.
        state_path: File for the state of the run. A killed run resumes from it.
        on_progress: Receives (steps done, all steps, figures).
        on_epoch: Receives the figures of each epoch as a dictionary; see `track`.
        **changes: Fields of TrainSettings, which override `settings`.

    Returns:
        The ends, in the order of their threats: ordinary checkpoints, whose BatchNorm statistics
        are measured anew under their threats. A soup of them is a point of the subspace; its
        statistics should be measured anew too (`buffers="recalibrate"`).

    Raises:
        RequestError: If a setting is unknown, out of range, or not supported here; or if there are
            not 2 or 3 threats.
        ModelError: If the network does not fit the data, or all of it is frozen.
        Diverged: If the loss becomes NaN or infinite.

    Source: Wortsman et al. 2021, arXiv:2102.10472; under attack: here.
    """
    listed = [threats] if isinstance(threats, str | ThreatModel) else threats
    ends = [ThreatModel.parse(threat) for threat in listed]
    if "threat" in changes:
        raise RequestError("threat: the ends have threats of their own; give them as threats")
    settings = make_settings(TrainSettings, settings, {**changes, "threat": (*ends, CLEAN)[0]})
    data = as_split(data, "train_subspace")
    check_schedule(settings.schedule)
    at_ends = plain_number(at_ends)
    check_subspace(ends, settings, by, at_ends)
    place = resolve_device(device)
    data, settings = take_transform(data, settings)
    settings = replace(
        settings,
        threat=ends[0],
        objective=Objective.parse(settings.objective),
        precision=resolve_precision(settings.precision, place),
    )
    model, origin, start = open_trainable(network, data, [*ends, *settings.also], settings)
    inputs = TrainingInputs(data, None, None, settings)
    names = [str(threat) for threat in ends]
    drawn = {} if at_ends is None else {"at_ends": at_ends}
    work = [{**to_record(settings), "ends": names, "by": by, **drawn}, start.digest]
    check_same_training(data, work, settings, place)
    run = SubspaceRun(model, inputs.to(place), ends, by, at_ends)
    work += [data.fingerprint, network_fingerprint(model), list_frozen(model)]
    functions = [run.objective.fingerprint, transform_fingerprint(settings)]
    functions += augmentation_fingerprint(data)
    fingerprint = json.dumps([*work, *functions], sort_keys=True)
    saved = resume(run, state_path, fingerprint)
    run_epochs(run, saved, on_progress, on_epoch)
    identity = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    inherited = inherited_record(run.inputs, origin)
    return [_make_end(run, number, inherited, identity) for number in range(len(ends))]


class SubspaceRun:
    """The state of one run that trains a subspace; a `StepwiseRun`.

    Each end keeps its own running statistics: a step starts from their mean by w, and sends w_i
    times its update to end i, as it does with the gradient.
    """

    verb = "train_subspace"

    def __init__(
        self,
        model: nn.Module,
        inputs: TrainingInputs,
        threats: Sequence[ThreatModel],
        by: str,
        at_ends: float | None = None,
    ) -> None:
        self.inputs, self.threats, self.by, self.at_ends = inputs, tuple(threats), by, at_ends
        self.settings = settings = inputs.settings
        self.device = inputs.data.images.device
        self.model = prepare_network(model, settings, self.device)
        self.objective: Objective = settings.objective.with_label_smoothing(
            settings.label_smoothing
        )
        self.ends = [copy_network(self.model) for _ in threats]
        self._averaged = list_averageable(self.model)
        self.loss_model = share_loss_pass(self.model, inputs.data)
        self.optimizers = [make_optimizer(end, settings) for end in self.ends]
        self.epochs, self.precision = settings.epochs, settings.precision
        self.seed = settings.seed
        self.steps_per_epoch = max(len(inputs.data) // settings.batch_size, 1)
        self.step = 0
        self.loss_sum = torch.zeros((), device=self.device, dtype=torch.float32)
        self.history: History = []

    def restore(self, state: dict[str, Any] | None) -> None:
        """Resume from a saved state; None starts a new run."""
        if state is None:
            return
        for end, weights in zip(self.ends, state["ends"], strict=True):
            end.load_state_dict(weights)
        for optimizer, entries in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(entries)
        self.step, self.history = state["step"], state["history"]
        self.loss_sum = state["loss_sum"].to(self.device)

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` needs; the mixed network follows from the ends."""
        return {
            "ends": [end.state_dict() for end in self.ends],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "history": self.history,
            "loss_sum": self.loss_sum,
        }

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from number `skip` on."""
        s = self.settings
        return batches(self.inputs.data, s.batch_size, seed=s.seed, epoch=epoch, skip=skip)

    def take_step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step on a global batch and return its loss."""
        s, share = self.settings, BatchShare.of(len(x))
        weights = draw_point(len(self.ends), s.seed, self.step, self.at_ends)
        threat, objective = self._goal(weights)
        self.mix(weights)
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        parts, at_point = share.split(s.accumulate), replace(s, threat=threat)
        self.model.zero_grad(set_to_none=True)
        with recomputed_activations(self.model, s.recompute_activations):
            attacked = attack_parts(
                self.model, (x, y), at_point, objective, step=self.step, parts=parts
            )
            with synchronised_batchnorm(self.model, s.batchnorm):
                loss = add_gradients(
                    self.loss_model, (x, y), attacked, objective, precision=s.precision, parts=parts
                )
        loss = distributed.sum_ranks(loss)
        check_step_loss(self, loss, attacked[0][0])
        average_statistics(self.model, share, s.batchnorm)
        clip_gradients(self.model, s.clip_grad)
        self._update_ends(weights, before)
        return loss

    @torch.no_grad()
    def mix(self, weights: Sequence[float]) -> None:
        """Write the point with these weights into the network, with the mean statistics."""
        parts = [parameters_and_buffers(end) for end in self.ends]
        for name, tensor in parameters_and_buffers(self.model).items():
            if name not in self._averaged:
                tensor.copy_(parts[0][name])
                continue
            tensor.zero_()
            for part, weight in zip(parts, weights, strict=True):
                if weight:
                    tensor.add_(part[name], alpha=weight)

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Measure nothing: a subspace has no single network to stop at."""

    def find_non_finite_layer(self) -> str | None:
        """Return None: only the loss of a step reveals a broken layer."""
        return None

    def _goal(self, weights: Sequence[float]) -> tuple[ThreatModel, Objective]:
        """Return the threat and the objective at a point."""
        if self.by == "objective":
            ends = zip(self.threats, weights, strict=True)
            clean = sum(weight for threat, weight in ends if threat.is_clean)
            objective = mixed(min(clean, 1.0))
            return self.threats[0], objective.with_label_smoothing(self.settings.label_smoothing)
        return self._threat_at(weights), self.objective

    def _threat_at(self, weights: Sequence[float]) -> ThreatModel:
        attacked = [threat for threat in self.threats if not threat.is_clean]
        if not attacked:
            return CLEAN
        if len({threat.norm for threat in attacked}) > 1:
            generator = keyed_generator("subspace threat", self.settings.seed, self.step)
            chosen = torch.multinomial(torch.tensor(weights), 1, generator=generator)
            return self.threats[int(chosen)]
        ends = zip(self.threats, weights, strict=True)
        eps = sum(weight * threat.eps for threat, weight in ends if not threat.is_clean)
        return ThreatModel(attacked[0].norm, eps) if eps > 0 else CLEAN

    @torch.no_grad()
    def _update_ends(self, weights: Sequence[float], before: dict[str, Tensor]) -> None:
        """Send each end its share of the gradient and of the update of the statistics."""
        s = self.settings
        epochs_done = self.step / self.steps_per_epoch
        rate = learning_rate(s.schedule, s.lr, epochs_done, s.epochs, self.steps_per_epoch)
        after = dict(self.model.named_buffers())
        for end, optimizer, weight in zip(self.ends, self.optimizers, weights, strict=True):
            for parameter, mixed_one in zip(end.parameters(), self.model.parameters(), strict=True):
                grad = mixed_one.grad
                parameter.grad = None if grad is None else weight * grad
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            for name, buffer in end.named_buffers():
                if name in self._averaged:
                    buffer.add_(after[name] - before[name], alpha=weight)
                else:
                    buffer.copy_(after[name])


def point_on_line(ends: Sequence[Checkpoint], t: float) -> list[float]:
    """Return the weights, in the order of `ends`, of a position on the line that they span.

    Args:
        ends: The two ends that `train_subspace` made of a line, in any order.
        t: From 0, the robust end, to 1, the clean end.

    Raises:
        CoefficientError: If t is outside [0, 1], or these are not the two ends of one line.
    """
    if not 0 <= t <= 1:
        raise CoefficientError(f"--at: got {t:g}, expected a number from 0 (robust) to 1 (clean)")
    records = [end.provenance.get("subspace") or {} for end in ends]
    positions = [record.get("position") for record in records]
    runs = {record.get("run") for record in records}
    is_line = all(record.get("shape") == "line" for record in records)
    if not is_line or len(runs) != 1 or sorted(positions, key=str) != [0, 1]:
        raise CoefficientError(
            "--at: requires a dial, such as --coefficients DIR/dial.safetensors, or the two ends "
            "of one line of `train --subspace line`"
        )
    return [t if position == 1 else 1 - t for position in positions]


def spans_subspace(items: Sequence[Checkpoint]) -> bool:
    """Return whether all checkpoints are ends of one subspace."""
    runs = {(item.provenance.get("subspace") or {}).get("run") for item in items}
    return len(items) > 1 and len(runs) == 1 and None not in runs


def draw_point(ends: int, seed: int, step: int, at_ends: float | None = None) -> tuple[float, ...]:
    """Return the weights of the ends in a step: of one end alone, or uniform on the simplex.

    Each end has the probability `at_ends` / `ends`; by default as much as the uniform draw.
    """
    generator = keyed_generator("subspace", seed, step)
    if at_ends is None:
        place = int(torch.randint(ends + 1, (), generator=generator))
    else:
        is_end = float(torch.rand((), generator=generator, dtype=torch.float64)) < at_ends
        place = int(torch.randint(ends, (), generator=generator)) if is_end else ends
    if place < ends:
        return tuple(float(number == place) for number in range(ends))
    draws = torch.rand(ends - 1, generator=generator, dtype=torch.float64).sort().values.tolist()
    return tuple(high - low for low, high in zip([0.0, *draws], [*draws, 1.0], strict=True))


def check_subspace(
    threats: Sequence[ThreatModel],
    settings: TrainSettings,
    by: str,
    at_ends: float | None = None,
) -> None:
    """Raise RequestError if the threats of the ends and the settings do not go together."""
    _check_ends(threats)
    if by not in WAYS:
        raise RequestError(f'by: got "{by}", expected one of {", ".join(WAYS)}')
    if at_ends is not None and not 0 <= at_ends <= 1:
        raise RequestError(f"at_ends: got {at_ends:g}, expected a number from 0 to 1")
    for name in ("early_stop", "ema", "synthetic"):
        if getattr(settings, name):
            raise RequestError(f"{name}: a subspace is trained without it; leave it out")
    if settings.also and any(threat.is_clean for threat in threats):
        raise RequestError("also: several threats at every point leave no clean end")
    if repeated := [str(threat) for threat in settings.also if threat in threats]:
        raise RequestError(
            f"also: got {repeated[0]}, which is the threat of an end; give a threat that no end has"
        )
    if by == "objective":
        if str(settings.objective) != "ce":
            raise RequestError(
                f'objective: got {settings.objective}, expected none with by "objective", '
                "which weighs the clean loss itself"
            )
        attacked = {threat for threat in threats if not threat.is_clean}
        if attacked != {threats[0]} or not threats[-1].is_clean:
            names = ", ".join(map(str, threats))
            raise RequestError(
                f'threats: got {names} with by "objective", expected a threat first and clean '
                "last, and no other threat between them"
            )


def _check_ends(threats: Sequence[ThreatModel]) -> None:
    """Raise RequestError unless the threats are those of 2 or 3 ends, from robust to clean."""
    if len(threats) not in SHAPES:
        raise RequestError(
            f"threats: got {len(threats)}, expected one for each end: 2 for a line, "
            "3 for a triangle"
        )
    if any(_is_less_robust(*pair) for pair in itertools.combinations(threats, 2)):
        names = ", ".join(map(str, threats))
        raise RequestError(f"threats: got {names}, expected an order from robust to clean")


def _is_less_robust(threat: ThreatModel, other: ThreatModel) -> bool:
    """Return whether a threat is clean, or has the smaller radius in the norm of the other."""
    if threat.is_clean or other.is_clean:
        return not other.is_clean
    return threat.norm == other.norm and threat.eps < other.eps


def _make_end(
    run: SubspaceRun, number: int, inherited: dict[str, Any], identity: str
) -> Checkpoint:
    """Return an end with the statistics of its own weights, and its record."""
    s, end, threat = run.settings, run.ends[number], run.threats[number]
    set_mode(end, training=False)
    measured = recalibrate(
        end,
        run.inputs.data,
        threat=threat,
        attack_steps=s.attack_steps,
        samples=CALIBRATION_SAMPLES,
        seed=s.seed,
        precision=s.precision,
    )
    load_tensors(end, measured)
    record = inherited | {
        "kind": "trained",
        "data": run.inputs.data.record,
        "training": {**to_record(s), "threat": str(threat)},
        "history": list(run.history),
        "early_stopped_at": None,
        "seed": s.seed,
        "subspace": {
            "shape": SHAPES[len(run.ends)],
            "position": number,
            "ends": [str(item) for item in run.threats],
            "by": run.by,
            "run": identity,
            **({} if run.at_ends is None else {"at_ends": run.at_ends}),
        },
        "versions": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": run.device.type,
            **({"processes": distributed.world()} if distributed.world() > 1 else {}),
        },
    }
    return Checkpoint.of(end, record)

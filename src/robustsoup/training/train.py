"""Adversarial training: from fresh weights, or fine-tuning from a checkpoint."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup import distributed
from robustsoup.attacks.adaptation import copy_network
from robustsoup.attacks.cuda_graph import ReplayedCall
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike, as_network
from robustsoup.checkpoints.fitting import load_tensors
from robustsoup.checkpoints.formats import refuse_broken
from robustsoup.checkpoints.provenance import earlier_data, inherited_sketches
from robustsoup.data import (
    Split,
    SplitLike,
    Synthetic,
    as_optional_split,
    as_split,
    batches,
    mixed_batches,
)
from robustsoup.data.batches import Batch
from robustsoup.data.sketches import sketch_split, sketch_synthetic
from robustsoup.data.synthetic import check_fraction
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import ModelError, RequestError
from robustsoup.gradients import gradients_enabled
from robustsoup.models import network_fingerprint
from robustsoup.models.fit import check_fit, check_training
from robustsoup.progress import Progress
from robustsoup.settings import (
    EarlyStop,
    TrainSettings,
    accepts_settings,
    make_settings,
    plain_number,
    to_record,
)
from robustsoup.threats import ThreatModel
from robustsoup.tracking import OnEpoch
from robustsoup.training.accumulation import add_gradients, attack_parts
from robustsoup.training.adversarial_loss import measure_robust_loss
from robustsoup.training.loop import History, check_step_loss, resume, run_epochs
from robustsoup.training.objectives import Objective
from robustsoup.training.optimizer import (
    WeightAverage,
    clip_gradients,
    list_frozen,
    make_optimizer,
    prepare_network,
)
from robustsoup.training.recomputation import check_recomputation, recomputed_activations
from robustsoup.training.schedules import check_schedule, learning_rate
from robustsoup.training.sharing import (
    BatchShare,
    average_statistics,
    check_same_training,
    share_loss_pass,
    synchronised_batchnorm,
)
from robustsoup.training.transforms import (
    augmentation_fingerprint,
    take_transform,
    transform_fingerprint,
)

OnCheckpoint = Callable[[int, Checkpoint], None]
"""on_checkpoint(epoch, checkpoint): receives the network after an epoch, counted from 1."""

OUTDATED_ENTRIES = (
    *("history", "early_stopped_at", "epoch"),
    *("learned", "coefficients", "buffers", "merge", "subspace"),
)
"""Entries of a parent's provenance that do not apply to a network that was trained from it."""


@accepts_settings(TrainSettings)
@gradients_enabled()
def train(
    network: nn.Module | CheckpointLike,
    data: SplitLike,
    settings: TrainSettings | None = None,
    *,
    val: SplitLike | None = None,
    checkpoint_every: int | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    device: str | torch.device = "auto",
    state_path: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
    **changes: Any,
) -> Checkpoint:
    """Train a network adversarially with SGD, for pre-training or fine-tuning.

    Each step attacks the batch in eval mode and takes one train-mode pass on the result.

    Args:
        network: A module, which is not changed, a Checkpoint or a path; training starts from its
            weights.
        data: The training split; its own augmentation is applied.
        settings: The settings; TrainSettings() by default.
        val: Split to measure the robust loss on after every epoch; required by early_stop.
        checkpoint_every: Interval in epochs at which on_checkpoint is called, and after the last.
        on_checkpoint: Receives (epoch, checkpoint). A resumed run passes only the checkpoints that
            it has not passed yet.
        device: "auto", "cpu", "cuda" or a device.
        state_path: File for the state of the run. A killed run resumes from it, bit for bit on a
            CPU with the same number of threads.
        on_progress: Receives (steps done, all steps, figures).
        on_epoch: Receives the figures of each epoch as a dictionary; see `track`.
        **changes: Fields of TrainSettings, which override `settings`.

    Returns:
        The network after the last epoch, or, with early_stop, after the epoch of the lowest robust
        loss; with ema, its moving average.

    Raises:
        RequestError: If a setting is unknown or out of range.
        ModelError: If the network does not fit the data, or all of it is frozen.
        DataError: If the synthetic images do not fit the data.
        Diverged: If the loss becomes NaN or infinite.

    Source: Madry et al. 2018, arXiv:1706.06083; Huang, Adversarial Learned Soups, sections 2 and 4;
        early stopping: Rice et al. 2020, arXiv:2002.11569; averaged weights: Gowal et al. 2020,
        arXiv:2010.03593; synthetic images: Rebuffi et al. 2021, arXiv:2103.01946.
    """
    settings = make_settings(TrainSettings, settings, changes)
    data, val = as_split(data, "train"), as_optional_split(val, "train: val")
    check_schedule(settings.schedule)
    check_early_stop(settings.early_stop, val)
    checkpoint_every = plain_number(checkpoint_every)
    _check_checkpoint_interval(checkpoint_every, on_checkpoint)
    resolved_device = resolve_device(device)
    data, settings = take_transform(data, settings)
    settings = replace(
        settings,
        objective=Objective.parse(settings.objective),
        precision=resolve_precision(settings.precision, resolved_device),
    )
    model, origin, start = open_trainable(network, data, settings.threats, settings)
    inputs = TrainingInputs(data, val, _open_checked_synthetic(settings, data), settings)
    check_same_training(inputs.data, [start.digest, inputs.record], settings, resolved_device)
    run = TrainingRun(model, inputs.to(resolved_device))
    work = [run.record, start.digest, data.fingerprint, val and val.fingerprint]
    work += [network_fingerprint(model), list_frozen(model)]
    work += [run.objective.fingerprint, checkpoint_every]
    work += [transform_fingerprint(settings), *augmentation_fingerprint(data)]
    saved = resume(run, state_path, json.dumps(work, sort_keys=True))

    def pass_checkpoint() -> None:
        epoch = len(run.history)
        due = checkpoint_every and (epoch % checkpoint_every == 0 or epoch == run.epochs)
        if on_checkpoint and due and run.last_passed_epoch < epoch:
            on_checkpoint(epoch, _make_checkpoint(run, origin, epoch=epoch))
            run.last_passed_epoch = epoch
            saved.save(run.state())

    run_epochs(run, saved, on_progress, on_epoch, pass_checkpoint)
    return _make_checkpoint(run, origin)


def open_trainable(
    network: nn.Module | CheckpointLike,
    data: Split,
    threats: Sequence[ThreatModel],
    settings: TrainSettings,
) -> tuple[nn.Module, Checkpoint | None, Checkpoint]:
    """Copy a network, and check before anything is trained that it can be.

    Returns:
        The copy, the checkpoint that holds the network, None for a module, and its weights.

    Raises:
        CheckpointError: If it holds NaN, or infinity outside of constants.
        ModelError: If it does not fit the data, or all of it is frozen.
    """
    model = copy_network(as_network(network))
    origin = None if isinstance(network, nn.Module) else Checkpoint.load(network)
    check_fit(model, data, list(threats))
    _check_trainable(model)
    check_training(model, data, settings.batch_size)
    if settings.recompute_activations:
        check_recomputation(model)
    start = Checkpoint.of(model)
    refuse_broken(start.tensors, "network", start.constants)  # it could not be saved later
    return model, origin, start


def check_early_stop(early_stop: EarlyStop | None, val: Split | None) -> None:
    """Raise RequestError if early stopping lacks a split to measure on."""
    if early_stop is not None and val is None:
        raise RequestError("early_stop: requires a validation split to measure on; pass val")


@dataclass(frozen=True)
class TrainingInputs:
    """The data and the settings of a training run.

    Attributes:
        data: The training split.
        val: Split to measure the robust loss on, or None.
        synthetic: Generated images to mix into each batch, or None.
        settings: Complete settings: the objective is parsed, the precision resolved.
    """

    data: Split
    val: Split | None
    synthetic: Synthetic | None
    settings: TrainSettings

    @property
    def record(self) -> dict[str, Any]:
        """The settings as provenance records them."""
        synthetic = self.synthetic and self.synthetic.digest
        return to_record(replace(self.settings, synthetic=synthetic))

    def to(self, device: torch.device) -> "TrainingInputs":
        """Return the inputs on `device`; early_stop.samples limits val."""
        stop = self.settings.early_stop
        val = self.val.first(stop.samples) if self.val and stop else self.val
        return replace(self, data=self.data.to(device), val=val and val.to(device))


class TrainingRun:
    """The state of one training run; a `StepwiseRun`."""

    verb = "train"

    def __init__(self, model: nn.Module, inputs: TrainingInputs) -> None:
        self.inputs = inputs
        self.settings = settings = inputs.settings
        self.device = inputs.data.images.device
        self.model = prepare_network(model, settings, self.device)
        self.objective: Objective = settings.objective.with_label_smoothing(
            settings.label_smoothing
        )
        self.optimizer = make_optimizer(self.model, settings)
        self.loss_model = share_loss_pass(self.model, inputs.data)
        self.average = WeightAverage(self.model, settings.ema) if settings.ema else None
        self.epochs, self.precision = settings.epochs, settings.precision
        self.seed = settings.seed
        self.steps_per_epoch = max(len(inputs.data) // settings.batch_size, 1)
        self.step = 0
        self.replayed_attack = ReplayedCall()
        self.loss_sum = torch.zeros((), device=self.device, dtype=torch.float32)
        self.history: History = []
        self.best_weights: dict[str, Tensor] | None = None
        self.last_passed_epoch = 0

    @property
    def record(self) -> dict[str, Any]:
        """The settings as provenance records them."""
        return self.inputs.record

    @property
    def result(self) -> nn.Module:
        """The network that is measured, saved and returned."""
        return self.average.model if self.average else self.model

    def restore(self, state: dict[str, Any] | None) -> None:
        """Resume from a saved state; None starts a new run."""
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]
        self.loss_sum = state["loss_sum"].to(self.device)
        self.best_weights = state["best_weights"]
        self.last_passed_epoch = state["last_passed_epoch"]
        if self.average:
            self.average.model.load_state_dict(state["average"])

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "loss_sum": self.loss_sum,
            "best_weights": self.best_weights,
            "last_passed_epoch": self.last_passed_epoch,
            "average": self.average and self.average.model.state_dict(),
        }

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from number `skip` on."""
        s, data = self.settings, self.inputs.data
        if self.inputs.synthetic is None:
            return batches(data, s.batch_size, seed=s.seed, epoch=epoch, skip=skip)
        return mixed_batches(
            data,
            self.inputs.synthetic,
            s.synthetic_fraction,
            s.batch_size,
            seed=s.seed,
            epoch=epoch,
            skip=skip,
        )

    def take_step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step on a global batch and return its loss."""
        s, share = self.settings, BatchShare.of(len(x))
        parts = share.split(s.accumulate)
        epochs_done = self.step / self.steps_per_epoch
        rate = learning_rate(s.schedule, s.lr, epochs_done, s.epochs, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with recomputed_activations(self.model, s.recompute_activations):
            attacked = attack_parts(
                self.model,
                (x, y),
                s,
                self.objective,
                step=self.step,
                parts=parts,
                replayed=self.replayed_attack,
            )
            with synchronised_batchnorm(self.model, s.batchnorm):
                loss = add_gradients(
                    self.loss_model,
                    (x, y),
                    attacked,
                    self.objective,
                    precision=s.precision,
                    parts=parts,
                )
        loss = distributed.sum_ranks(loss)
        check_step_loss(self, loss, attacked[0][0])
        average_statistics(self.model, share, s.batchnorm)
        clip_gradients(self.model, s.clip_grad)
        self.optimizer.step()
        if self.average:
            self.average.update(self.model, self.step)
        return loss

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Measure the robust loss on val, and keep the weights if it is the lowest so far.

        With several threats, the mean over them is measured.
        """
        if self.inputs.val is None:
            return
        stop = self.settings.early_stop
        with recomputed_activations(self.result, self.settings.recompute_activations):
            figures = [
                measure_robust_loss(
                    self.result,
                    self.inputs.val,
                    threat,
                    steps=(stop or EarlyStop()).steps,
                    precision=self.precision,
                )
                for threat in self.settings.threats
            ]
        loss, accuracy = (sum(values) / len(figures) for values in zip(*figures, strict=True))
        entry["robust_loss"], entry["robust_accuracy"] = loss, accuracy
        losses = [past["robust_loss"] for past in self.history]
        lowest = min(filter(math.isfinite, losses), default=math.inf)
        if stop and loss < lowest:
            weights = self.result.state_dict()
            self.best_weights = {name: tensor.clone() for name, tensor in weights.items()}

    def find_non_finite_layer(self) -> str | None:
        """Return None: only the loss of a step reveals a broken layer."""
        return None


def _check_checkpoint_interval(interval: int | None, on_checkpoint: OnCheckpoint | None) -> None:
    if (interval is None) != (on_checkpoint is None) or (interval is not None and interval < 1):
        function = "a" if on_checkpoint else "no"
        raise RequestError(
            f"checkpoint_every: got {interval} and {function} function on_checkpoint, "
            "expected both, at least 1, or neither"
        )


def _check_trainable(model: nn.Module) -> None:
    """Raise ModelError if every parameter is frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "network: every parameter is frozen (requires_grad is False), so nothing can be trained"
        )


def _open_checked_synthetic(settings: TrainSettings, data: Split) -> Synthetic | None:
    """Open the synthetic images and check that they fit the data and the batch size."""
    source = settings.synthetic
    if source is None:
        return None
    check_fraction(settings.synthetic_fraction, settings.batch_size)
    synthetic = source if isinstance(source, Synthetic) else Synthetic.open(source)
    synthetic.check_fit(data)
    return synthetic


def _make_checkpoint(
    run: TrainingRun, origin: Checkpoint | None, *, epoch: int | None = None
) -> Checkpoint:
    """Return a checkpoint of the network after `epoch`; for None, of the network to return."""
    stopped = epoch is None and run.best_weights is not None
    if epoch is None and run.best_weights is not None:
        load_tensors(run.result, run.best_weights)
    finite = [entry for entry in run.history if math.isfinite(entry.get("robust_loss", math.nan))]
    best = min(finite, key=lambda entry: entry["robust_loss"])["epoch"] if stopped else None
    record = inherited_record(run.inputs, origin) | {
        "kind": "trained",
        "data": run.inputs.data.record,
        "training": run.record,
        "history": list(run.history),
        "early_stopped_at": best,
        "seed": run.settings.seed,
        "versions": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": run.device.type,
            **({"processes": distributed.world()} if distributed.world() > 1 else {}),
        },
    }
    if epoch is not None:
        record["epoch"] = epoch
    return Checkpoint.of(run.result, record)


def inherited_record(inputs: TrainingInputs, origin: Checkpoint | None) -> dict[str, Any]:
    """Return the entries that continue the record of the parent: parents, splits, other data."""
    data, synthetic = inputs.data, inputs.synthetic
    inherited = origin.provenance if origin is not None else {}
    record: dict[str, Any] = {
        key: value for key, value in inherited.items() if key not in OUTDATED_ENTRIES
    }
    record["trained_on"] = sorted({*record.get("trained_on", []), data.name})
    parents: list[dict[str, str | None]] = []
    if origin is not None:
        file = origin.path.name if origin.path else None
        parents = [{"digest": origin.digest, "file": file}]
        if earlier := earlier_data(origin, data):
            record["earlier_data"] = earlier
    record["parents"] = parents
    sketches = [sketch_split(data)]
    if synthetic is not None:
        sketches.append(sketch_synthetic(synthetic))
        source = {
            "file": synthetic.path.name,
            "digest": synthetic.digest,
            "images": len(synthetic),
        }
        record["synthetic"] = [*record.get("synthetic", []), source]
    record["fitted_images"] = inherited_sketches([record, {"fitted_images": sketches}])
    return record

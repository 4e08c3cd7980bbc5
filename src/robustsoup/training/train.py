"""Adversarial training: from fresh weights, or fine-tuning from a checkpoint."""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.checkpoints.checkpoint import Checkpoint, as_network
from robustsoup.checkpoints.provenance import earlier_data
from robustsoup.data import Split, Synthetic, batches, mixed_batches
from robustsoup.data.batches import Batch
from robustsoup.data.synthetic import check_fraction
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import ModelError, RequestError
from robustsoup.fingerprint import network_mark
from robustsoup.models.fit import check_fit
from robustsoup.progress import Progress, SavedState
from robustsoup.threats import ThreatModel
from robustsoup.training.adversarial_loss import attacked, objective_loss, robust_loss
from robustsoup.training.loop import check_loss, fit
from robustsoup.training.objectives import Combined, Objective
from robustsoup.training.optimizer import Average, Sgd
from robustsoup.training.schedules import Schedule, check_schedule, rate

OnCheckpoint = Callable[[int, Checkpoint], None]
"""on_checkpoint(epoch, checkpoint): gets the network as it is after that epoch, the first being 1."""


def train(
    network: nn.Module | Checkpoint | str | os.PathLike,
    data: Split,
    *,
    threat: ThreatModel | str,
    objective: Objective | Combined | str = "ce",
    attack_steps: int = 2,
    epochs: int,
    batch_size: int = 128,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: Schedule = "cosine",
    label_smoothing: float = 0.0,
    weight_decay_bn: bool = True,
    nesterov: bool = False,
    clip_grad: float | None = None,
    bn_momentum: float | None = None,
    ema: float = 0.0,
    synthetic: Synthetic | str | os.PathLike | None = None,
    synthetic_fraction: float = 0.7,
    val: Split | None = None,
    early_stop: bool = False,
    early_stop_steps: int = 10,
    checkpoint_every: int | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    state_path: str | os.PathLike | None = None,
    on_progress: Progress | None = None,
) -> Checkpoint:
    """Train on the points that APGD finds (Madry et al. 2018), by SGD; pre-training and fine-tuning alike.

    network: a module (its present weights are the start; it is not changed), a Checkpoint or a path. data: the training
    split, augmented as its data set says. objective: "ce" (paper Eq. 1), "mixed A" (Eq. 2, A the clean weight), "trades B"
    (Zhang et al.), a function loss(clean, attacked, y) of the two batches' logits, or an Objective.
    The attack runs in eval mode; the weights' pass in train mode. val: measures the robust loss (APGD, early_stop_steps
    steps) after every epoch; early_stop: the epoch where it is least is returned, else the last.
    schedule: see `rate`. label_smoothing: in the cross-entropy that the weights see, not in an attack or a KL term.
    weight_decay_bn: whether BatchNorm's weight and bias decay too. clip_grad: the largest norm of the gradient.
    bn_momentum: of BatchNorm's statistics while training, instead of the network's own. ema: the decay of an average of the
    weights, with BatchNorm statistics of its own (see `Average`), which is then what is measured, kept and returned.
    synthetic: generated images (see `Synthetic.open`); each batch holds round(synthetic_fraction * batch_size) of them, and
    an epoch has as many batches as without.
    checkpoint_every: after so many epochs each time, and after the last, on_checkpoint(epoch, checkpoint) is called with the
    network of that epoch. A resumed run hands over what was not handed over before, and that alone.
    precision: "auto" trains in bfloat16 autocast where the device has it. state_path: where the state is kept, so that
    a killed run continues, bit for bit on a CPU with as many threads.
    on_progress(done, total, figures) counts steps.

    Raises RequestError for settings out of range, ModelError if the network does not fit the data, DataError if the
    synthetic images do not, Diverged if the loss becomes NaN or infinite.
    Source: Huang, Adversarial Learned Soups, sections 2 and 4; Rice et al. 2020, arXiv:2002.11569 (early stopping); Gowal et
    al. 2020, arXiv:2010.03593 (averaged weights); Rebuffi et al. 2021, arXiv:2103.01946 (synthetic images).
    """
    threat = ThreatModel.parse(threat)
    objective = Objective.parse(objective).smoothed(label_smoothing)
    sgd = Sgd(
        momentum,
        weight_decay,
        label_smoothing,
        weight_decay_bn,
        nesterov,
        clip_grad,
        bn_momentum,
        ema,
    )
    check_schedule(schedule)
    if epochs < 1 or batch_size < 2 or not 0 < lr < math.inf:
        raise RequestError(
            f"train: got epochs {epochs}, batch_size {batch_size}, lr {lr}; expected at least 1, 2, above 0"
        )
    if early_stop and val is None:
        raise RequestError("early_stop: no validation split to watch; give val")
    if (checkpoint_every is None) != (on_checkpoint is None) or (
        checkpoint_every is not None and checkpoint_every < 1
    ):
        raise RequestError(
            f"checkpoint_every: got {checkpoint_every} and {'a' if on_checkpoint else 'no'} function on_checkpoint, "
            "expected both, at least 1, or neither"
        )
    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    settings = {
        "threat": str(threat),
        "objective": str(objective),
        "attack_steps": attack_steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        **sgd.record(),
        "schedule": schedule,
        "early_stop": early_stop,
        "early_stop_steps": early_stop_steps,
        "seed": seed,
        "precision": precision,
    }
    if synthetic is not None:
        check_fraction(synthetic_fraction, batch_size)
        synthetic = synthetic if isinstance(synthetic, Synthetic) else Synthetic.open(synthetic)
        synthetic.check_fit(data)
        settings |= {"synthetic": synthetic.digest, "synthetic_fraction": synthetic_fraction}
    model = copy.deepcopy(as_network(network)).to(where, memory_format=torch.channels_last)
    check_fit(model, data)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "network: every parameter is frozen (requires_grad is False), so nothing can be trained"
        )
    start = Checkpoint.of(model)
    run = _Run(
        model,
        data.to(where),
        val.to(where) if val is not None else None,
        threat,
        objective,
        sgd,
        synthetic,
        settings,
    )
    work = [settings, start.digest, data.digest, val and val.digest, network_mark(model)]
    work += [given for given in (objective.mark, checkpoint_every) if given is not None]
    saved = SavedState(state_path, json.dumps(work, sort_keys=True))
    run.load(saved.load())
    origin = network if isinstance(network, Checkpoint) else None
    if isinstance(network, (str, os.PathLike)):
        origin = Checkpoint.load(network)
    finished = partial(_checkpoint, run, origin, start, data, where)

    def hand_over() -> None:
        epoch = len(run.history)
        if (
            on_checkpoint
            and run.handed < epoch
            and (epoch % checkpoint_every == 0 or epoch == epochs)
        ):
            on_checkpoint(epoch, finished(epoch=epoch))
            run.handed = epoch
            saved.save(run.state())

    fit(run, saved, on_progress, hand_over)
    return finished()


class _Run:
    """The state of one training run."""

    verb = "train"

    def __init__(
        self,
        model: nn.Module,
        data: Split,
        val: Split | None,
        threat: ThreatModel,
        objective: Objective,
        sgd: Sgd,
        synthetic: Synthetic | None,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.data, self.val, self.threat, self.objective = (
            model,
            data,
            val,
            threat,
            objective,
        )
        self.sgd, self.synthetic, self.settings = sgd, synthetic, settings
        self.optimizer = sgd.optimizer(sgd.prepare(model), settings["lr"])
        self.average = Average(model, sgd.ema) if sgd.ema else None
        self.steps_per_epoch = max(len(data) // settings["batch_size"], 1)
        self.step, self.loss_sum = 0, torch.zeros((), device=data.images.device)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] | None = None
        self.handed = 0

    @property
    def result(self) -> nn.Module:
        """What is measured and kept: the average of the weights, where there is one."""
        return self.average.model if self.average else self.model

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state."""
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.history, self.best = state["step"], state["history"], state["best"]
            self.loss_sum = state["loss_sum"].to(self.loss_sum.device)
            self.handed = state.get("handed", 0)
            if self.average:
                self.average.model.load_state_dict(state["average"])

    def state(self) -> dict[str, Any]:
        """All that `load` needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "best": self.best,
            "loss_sum": self.loss_sum,
            "handed": self.handed,
            "average": self.average and self.average.model.state_dict(),
        }

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of an epoch from number `skip` on."""
        size, key = (
            self.settings["batch_size"],
            {"seed": self.settings["seed"], "epoch": epoch, "skip": skip},
        )
        if self.synthetic is None:
            return batches(self.data, size, **key)
        return mixed_batches(
            self.data, self.synthetic, self.settings["synthetic_fraction"], size, **key
        )

    def take_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on a batch; returns its loss."""
        s = self.settings
        lr = rate(
            s["schedule"],
            s["lr"],
            self.step / self.steps_per_epoch,
            s["epochs"],
            self.steps_per_epoch,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        key = (s["seed"], self.step)
        x_adv = attacked(
            self.model, x, y, self.threat, self.objective, s["attack_steps"], s["precision"], key
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss = objective_loss(self.model, x, x_adv, y, self.objective, s["precision"])
        check_loss(self, loss, x_adv)
        loss.backward()
        self.sgd.clip(self.model)
        self.optimizer.step()
        if self.average:
            self.average.update(self.model, self.step)
        return loss.detach()

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Measure the robust loss on val, and remember the weights if it is the least so far."""
        if self.val is not None:
            entry["robust_loss"], entry["robust_accuracy"] = robust_loss(
                self.result,
                self.val,
                self.threat,
                steps=self.settings["early_stop_steps"],
                precision=self.settings["precision"],
            )
            if self.settings["early_stop"] and entry["robust_loss"] < min(
                (past["robust_loss"] for past in self.history), default=math.inf
            ):
                self.best = {
                    name: tensor.clone() for name, tensor in self.result.state_dict().items()
                }

    def broken(self) -> str | None:
        """Nothing but the loss tells."""
        return None


def _checkpoint(
    run: _Run,
    origin: Checkpoint | None,
    start: Checkpoint,
    data: Split,
    device: torch.device,
    *,
    epoch: int | None = None,
) -> Checkpoint:
    """The network as it is after `epoch`; the one to return for None."""
    if epoch is None and run.best is not None:
        run.result.load_state_dict(run.best)
    settings, stopped = run.settings, epoch is None and run.best is not None
    record: dict[str, Any] = dict(origin.provenance) if origin is not None else {}
    for key in ("history", "early_stopped_at", "learned", "coefficients", "buffers", "epoch"):
        record.pop(key, None)
    chosen = min(run.history, key=lambda entry: entry["robust_loss"])["epoch"] if stopped else None
    record |= {
        "kind": "trained",
        "data": data.record,
        "trained_on": sorted({*record.get("trained_on", []), data.name}),
        "training": settings,
        "history": list(run.history),
        "early_stopped_at": chosen,
        "seed": settings["seed"],
        "parents": [{"digest": start.digest, "file": origin.path.name if origin.path else None}]
        if origin
        else [],
        "versions": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": device.type,
        },
    }
    if epoch is not None:
        record["epoch"] = epoch
    if origin is not None and (earlier := earlier_data(origin, data)):
        record["earlier_data"] = earlier
    if run.synthetic is not None:
        seen = {
            "file": run.synthetic.path.name,
            "digest": run.synthetic.digest,
            "images": len(run.synthetic),
        }
        record["synthetic"] = [*record.get("synthetic", []), seen]
    return Checkpoint.of(run.result, record)

"""Adversarial training: from fresh weights, or fine-tuning from a checkpoint."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.attacks import apgd_train
from robustsoup.attacks.folding import folded
from robustsoup.attacks.forward import frozen_eval
from robustsoup.checkpoints import Checkpoint, as_network
from robustsoup.data import Split, Synthetic, batches, mixed_batches, passes, to_float
from robustsoup.data.batches import Batch
from robustsoup.data.splits import keyed_generator
from robustsoup.data.synthetic import check_fraction
from robustsoup.errors import Diverged, ModelError, RequestError, ThreatError
from robustsoup.leakage import earlier_data
from robustsoup.losses import Combined, Objective, ce
from robustsoup.optimizing import Average, Sgd
from robustsoup.precision import autocast, resolve_device, resolve_precision
from robustsoup.progress import Progress, SavedState
from robustsoup.schedules import Schedule, check_schedule, rate
from robustsoup.threats import CLEAN, ThreatModel, project

OnCheckpoint = Callable[[int, Checkpoint], None]
"""on_checkpoint(epoch, checkpoint): gets the network as it is after that epoch, the first being 1."""

BESIDE = 0.001
"""How far from x, in standard deviations a pixel, an attack begins that has no gradient at x."""


def train(
    network: nn.Module | Checkpoint | str | os.PathLike, data: Split, *, threat: ThreatModel | str,
    objective: Objective | Combined | str = "ce", attack_steps: int = 2, epochs: int, batch_size: int = 128, lr: float,
    momentum: float = 0.9, weight_decay: float = 0.0, schedule: Schedule = "cosine", label_smoothing: float = 0.0,
    weight_decay_bn: bool = True, nesterov: bool = False, clip_grad: float | None = None, bn_momentum: float | None = None,
    ema: float = 0.0, synthetic: Synthetic | str | os.PathLike | None = None, synthetic_fraction: float = 0.7,
    val: Split | None = None, early_stop: bool = False, early_stop_steps: int = 10,
    checkpoint_every: int | None = None, on_checkpoint: OnCheckpoint | None = None,
    seed: int = 0, device: str = "auto", precision: str = "auto",
    state_path: str | os.PathLike | None = None, on_progress: Progress | None = None,
) -> Checkpoint:  # fmt: skip
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
    sgd = Sgd(momentum, weight_decay, label_smoothing, weight_decay_bn, nesterov, clip_grad, bn_momentum, ema)
    check_schedule(schedule)
    if epochs < 1 or batch_size < 2 or not 0 < lr < math.inf:
        raise RequestError(
            f"train: got epochs {epochs}, batch_size {batch_size}, lr {lr}; expected at least 1, 2, above 0"
        )
    if early_stop and val is None:
        raise RequestError("early_stop: no validation split to watch; give val")
    if (checkpoint_every is None) != (on_checkpoint is None) or (checkpoint_every is not None and checkpoint_every < 1):
        raise RequestError(
            f"checkpoint_every: got {checkpoint_every} and {'a' if on_checkpoint else 'no'} function on_checkpoint, "
            "expected both, at least 1, or neither"
        )
    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    settings = {
        "threat": str(threat), "objective": str(objective), "attack_steps": attack_steps, "epochs": epochs,
        "batch_size": batch_size, "lr": lr, **sgd.record(), "schedule": schedule,
        "early_stop": early_stop, "early_stop_steps": early_stop_steps, "seed": seed, "precision": precision,
    }  # fmt: skip
    if synthetic is not None:
        check_fraction(synthetic_fraction, batch_size)
        synthetic = synthetic if isinstance(synthetic, Synthetic) else Synthetic.open(synthetic)
        synthetic.check_fit(data)
        settings |= {"synthetic": synthetic.digest, "synthetic_fraction": synthetic_fraction}
    model = copy.deepcopy(as_network(network)).to(where, memory_format=torch.channels_last)
    check_fit(model, data)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("network: every parameter is frozen (requires_grad is False), so nothing can be trained")
    start = Checkpoint.of(model)
    run = _Run(
        model, data.to(where), val.to(where) if val is not None else None, threat, objective, sgd, synthetic, settings
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
        if on_checkpoint and run.handed < epoch and (epoch % checkpoint_every == 0 or epoch == epochs):
            on_checkpoint(epoch, finished(epoch=epoch))
            run.handed = epoch
            saved.save(run.state())

    fit(run, saved, on_progress, hand_over)
    return finished()


class _Run:
    """The state of one training run."""

    verb = "train"

    def __init__(self, model: nn.Module, data: Split, val: Split | None, threat: ThreatModel, objective: Objective, sgd: Sgd,
                 synthetic: Synthetic | None, settings: dict[str, Any]) -> None:  # fmt: skip
        self.model, self.data, self.val, self.threat, self.objective = model, data, val, threat, objective
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
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "history": self.history, "best": self.best, "loss_sum": self.loss_sum, "handed": self.handed,
            "average": self.average and self.average.model.state_dict(),
        }  # fmt: skip

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of an epoch from number `skip` on."""
        size, key = self.settings["batch_size"], {"seed": self.settings["seed"], "epoch": epoch, "skip": skip}
        if self.synthetic is None:
            return batches(self.data, size, **key)
        return mixed_batches(self.data, self.synthetic, self.settings["synthetic_fraction"], size, **key)

    def take_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on a batch; returns its loss."""
        s = self.settings
        lr = rate(s["schedule"], s["lr"], self.step / self.steps_per_epoch, s["epochs"], self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        key = (s["seed"], self.step)
        x_adv = attacked(self.model, x, y, self.threat, self.objective, s["attack_steps"], s["precision"], key)
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
                self.result, self.val, self.threat, steps=self.settings["early_stop_steps"],
                precision=self.settings["precision"],
            )  # fmt: skip
            if self.settings["early_stop"] and entry["robust_loss"] < min(
                (past["robust_loss"] for past in self.history), default=math.inf
            ):
                self.best = {name: tensor.clone() for name, tensor in self.result.state_dict().items()}

    def broken(self) -> str | None:
        """Nothing but the loss tells."""
        return None


def fit(
    run: Any, saved: SavedState, on_progress: Progress | None, after_epoch: Callable[[], None] | None = None
) -> None:
    """Take a run's steps to the end, epoch by epoch, saving its state from time to time; training and learning alike.

    The run has `verb`, `model`, `settings`, `step`, `steps_per_epoch`, `loss_sum` and `history`, and batches(epoch, skip),
    take_step(x, y), end_epoch(entry), broken() (a layer that is not finite) and state(). after_epoch: called when the
    state at the end of an epoch is saved, and first of all, as a kill may have come in between.

    Raises Diverged, naming the layer, for a loss that is not finite; what was saved before it stays.
    """
    s, per_epoch = run.settings, run.steps_per_epoch
    total = s["epochs"] * per_epoch
    after_epoch = after_epoch or (lambda: None)
    after_epoch()
    while run.step < total:
        epoch, skip = divmod(run.step, per_epoch)
        for x, y, _ in run.batches(epoch, skip):
            x = x.contiguous(memory_format=torch.channels_last)
            run.loss_sum += run.take_step(x, y)
            run.step += 1
            save = saved.due() and run.step % per_epoch
            if save or run.step % per_epoch == 0:
                _check_finite(run, x)
            if on_progress:
                on_progress(run.step, total, _figures(run))
            if save:
                saved.save(run.state())
        entry = {"epoch": epoch + 1, "loss": float(run.loss_sum) / per_epoch}
        run.end_epoch(entry)
        run.history.append(entry)
        run.loss_sum = torch.zeros_like(run.loss_sum)
        saved.save(run.state())
        after_epoch()


def check_loss(run: Any, loss: Tensor, x: Tensor) -> None:
    """Raise Diverged, naming the first layer that is not finite, if the loss of a step is not; before anything is updated.

    Only on a CPU, as looking at every step makes a GPU wait: there `fit` looks now and then.
    """
    if loss.device.type == "cpu" and not math.isfinite(float(loss.detach())):
        raise _diverged(run, float(loss.detach()), _first_not_finite(run.model, x, run.settings["precision"]))


def _check_finite(run: Any, x: Tensor) -> None:
    loss, layer = float(run.loss_sum), run.broken()
    if not math.isfinite(loss) or layer is not None:
        raise _diverged(run, loss, layer or _first_not_finite(run.model, x, run.settings["precision"]))


def _diverged(run: Any, loss: float, layer: str) -> Diverged:
    return Diverged(
        f"{run.verb}: the loss became {loss} at step {run.step}, first in layer {layer}; "
        "what was saved before is kept; try a smaller lr"
    )


@torch.no_grad()
def _first_not_finite(model: nn.Module, x: Tensor, precision: str) -> str:
    """The first module of the forward pass that answers with NaN or infinity."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    probe = copy.deepcopy(model).train()
    for name, module in probe.named_modules():
        if not list(module.children()):
            module.register_forward_hook(watch(name))
    with autocast(x.device, precision):
        probe(x)
    return found[0] if found else "the loss itself"


def _figures(run: Any) -> str:
    """The loss so far and the last robust accuracy, now and then: reading them makes a GPU wait."""
    if run.step % 20 and run.step % run.steps_per_epoch:
        return ""
    done = run.step % run.steps_per_epoch or run.steps_per_epoch
    text = f"epoch {(run.step - 1) // run.steps_per_epoch + 1} loss {float(run.loss_sum) / done:.3f}"
    if run.history and "robust_accuracy" in run.history[-1]:
        text += f" val robust {run.history[-1]['robust_accuracy']:.1%}"
    if run.history and "val_loss" in run.history[-1]:
        text += f" val loss {run.history[-1]['val_loss']:.3f}"
    return text


def attacked(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, objective: Objective, steps: int, precision: str,
    key: tuple[str | int, ...],
) -> Tensor:  # fmt: skip
    """What the objective's robust part is computed on: x itself where it has none. key: seeds the noise, where there is some."""
    if not objective.attacked or threat.is_clean:
        return x
    ask = partial(apgd_train, model, x, y, threat, steps=steps, loss=objective.climbs, precision=precision)
    if not objective.compares:
        return ask()
    with frozen_eval(model), torch.no_grad(), autocast(x.device, precision):
        clean = model(x)
    noise = torch.randn(x.shape, generator=keyed_generator("beside", *key)).to(x)
    start = project(x + BESIDE * noise, x, x.new_full((len(x),), threat.eps), threat.norm)
    return ask(start=start, target=_at_least_float32(clean))


def objective_loss(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, objective: Objective, precision: str
) -> Tensor:
    """The objective, a scalar: one train-mode pass, over the clean and the attacked batch together where it needs both."""
    model.train()
    return _objective(model, x, x_adv, y, objective, precision)


def _objective(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, objective: Objective, precision: str) -> Tensor:
    both = objective.clean and objective.attacked and x_adv is not x
    with autocast(x.device, precision):
        logits = model(torch.cat([x, x_adv]) if both else x_adv if objective.attacked else x)
    logits = _at_least_float32(logits)
    clean, robust = logits.chunk(2) if both else (logits, logits)
    each = objective.loss(clean if objective.clean else None, robust if objective.attacked else None, y)
    if not isinstance(each, Tensor) or each.shape not in ((), y.shape):
        got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
        raise ThreatError(
            f"objective {objective}: returned {got} for {len(y)} samples, expected a loss for each, ({len(y)},)"
        )
    return each.mean()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def robust_loss(
    model: nn.Module, data: Split, threat: ThreatModel, *, steps: int = 10, precision: str = "float32"
) -> tuple[float, float]:
    """Mean highest loss and accuracy under the training form of APGD, over a whole split, in eval mode.

    The attack runs in `precision`; what it finds is judged in float32.
    """
    model.eval()
    searched = model if threat.is_clean else _for_search(model, data, precision)
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in passes(data):
        x_adv = apgd_train(searched, x, y, threat, steps=steps, precision=precision)
        with torch.no_grad():
            logits = model(x_adv)
        sums += torch.stack([ce(logits, y).sum().double(), (logits.argmax(1) == y).sum().double()]).cpu()
    loss, accuracy = (sums / len(data)).tolist()
    return loss, accuracy


def objective_on(
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    objective: Objective,
    *,
    steps: int = 10,
    precision: str = "float32",
) -> float:
    """The objective on a whole split, in eval mode: its attack is the training form of APGD with `steps` steps."""
    weight, total = objective.clean_weight, 0.0
    if weight is None:
        return _own_objective_on(model, data, threat, objective, steps, precision)
    if weight:
        total += weight * robust_loss(model, data, CLEAN, precision=precision)[0]
    if weight < 1:
        total += (1 - weight) * robust_loss(model, data, threat, steps=steps, precision=precision)[0]
    return total


def _own_objective_on(
    model: nn.Module, data: Split, threat: ThreatModel, objective: Objective, steps: int, precision: str
) -> float:
    model.eval()
    searched, total = _for_search(model, data, precision), 0.0
    for number, (x, y) in enumerate(passes(data)):
        x_adv = attacked(searched, x, y, threat, objective, steps, precision, ("val", number))
        with torch.no_grad():
            total += len(x) * float(_objective(model, x, x_adv, y, objective, "float32"))
    return total / len(data)


def _for_search(model: nn.Module, data: Split, precision: str) -> nn.Module:
    """A network in eval mode as it is searched in `precision`: what is found is judged by the network itself."""
    return folded(model, next(passes(data))[0][:2]) if precision == "bfloat16" else model


def network_mark(model: nn.Module) -> str:
    """What a network is, apart from its weights: a saved state goes on under no other one."""
    kept = model.state_dict()
    hidden = {
        name: tensor.tolist() for name, tensor in model.named_buffers() if name not in kept and tensor.numel() < 1000
    }
    text = f"{model} {getattr(model, 'network_settings', None)} {hidden}"
    return hashlib.sha256(text.encode()).hexdigest()


def check_fit(model: nn.Module, data: Split) -> None:
    """Raise ModelError unless the network takes the data's images and has as many classes as they have."""
    modes = [(module, module.training) for module in model.modules()]
    probe = to_float(data.images[:2]).to(next(model.parameters()).device)
    try:
        with torch.no_grad():
            logits = model.eval()(probe)
    except (RuntimeError, ValueError) as error:
        shape = tuple(data.images.shape[1:])
        raise ModelError(f"network: does not take images of shape {shape}: {str(error).splitlines()[0]}") from None
    finally:
        for module, mode in modes:
            module.training = mode
    if logits.dim() != 2 or logits.shape[1] != data.classes:
        raise ModelError(
            f"network: got logits of shape {tuple(logits.shape)} for {len(probe)} images, expected {data.classes} classes, "
            f"as {data.record['name']} has"
        )


def _checkpoint(
    run: _Run, origin: Checkpoint | None, start: Checkpoint, data: Split, device: torch.device, *, epoch: int | None = None,
) -> Checkpoint:  # fmt: skip
    """The network as it is after `epoch`; the one to return for None."""
    if epoch is None and run.best is not None:
        run.result.load_state_dict(run.best)
    settings, stopped = run.settings, epoch is None and run.best is not None
    record: dict[str, Any] = dict(origin.provenance) if origin is not None else {}
    for key in ("history", "early_stopped_at", "learned", "coefficients", "buffers", "epoch"):
        record.pop(key, None)
    chosen = min(run.history, key=lambda entry: entry["robust_loss"])["epoch"] if stopped else None
    record |= {
        "kind": "trained", "data": data.record, "trained_on": sorted({*record.get("trained_on", []), data.name}),
        "training": settings, "history": list(run.history), "early_stopped_at": chosen, "seed": settings["seed"],
        "parents": [{"digest": start.digest, "file": origin.path.name if origin.path else None}] if origin else [],
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type},
    }  # fmt: skip
    if epoch is not None:
        record["epoch"] = epoch
    if origin is not None and (earlier := earlier_data(origin, data)):
        record["earlier_data"] = earlier
    if run.synthetic is not None:
        seen = {"file": run.synthetic.path.name, "digest": run.synthetic.digest, "images": len(run.synthetic)}
        record["synthetic"] = [*record.get("synthetic", []), seen]
    return Checkpoint.of(run.result, record)

"""Adversarial training: from fresh weights, or fine-tuning from a checkpoint."""

import copy
import hashlib
import json
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.attacks import apgd_train
from robustsoup.checkpoints import Checkpoint, as_network
from robustsoup.data import Split, batches, to_float
from robustsoup.errors import Diverged, ModelError, RequestError
from robustsoup.losses import Objective, ce
from robustsoup.precision import autocast, resolve_device, resolve_precision
from robustsoup.progress import Progress, SavedState
from robustsoup.schedules import Schedule, check_schedule, rate
from robustsoup.threats import CLEAN, ThreatModel


def train(
    network: nn.Module | Checkpoint | str | os.PathLike, data: Split, *, threat: ThreatModel | str,
    objective: Objective | str = "ce", attack_steps: int = 2, epochs: int, batch_size: int = 128, lr: float,
    momentum: float = 0.9, weight_decay: float = 0.0, schedule: Schedule = "cosine", val: Split | None = None,
    early_stop: bool = False, early_stop_steps: int = 10, seed: int = 0, device: str = "auto", precision: str = "auto",
    state_path: str | os.PathLike | None = None, on_progress: Progress | None = None,
) -> Checkpoint:  # fmt: skip
    """Train on the points that APGD finds (Madry et al. 2018), by SGD; pre-training and fine-tuning alike.

    network: a module (its present weights are the start; it is not changed), a Checkpoint or a path. data: the training
    split, augmented as its data set says. objective: "ce" (paper Eq. 1) or "mixed A" (Eq. 2, A the clean weight).
    The attack runs in eval mode; the weights' pass in train mode. val: measures the robust loss (APGD, early_stop_steps
    steps) after every epoch; early_stop: the epoch where it is least is returned, else the last.
    precision: "auto" trains in bfloat16 autocast where the device has it. state_path: where the state is kept, so that
    a killed run continues, bit for bit on a CPU with as many threads.
    on_progress(done, total, figures) counts steps.

    Raises ModelError if the network does not fit the data, Diverged if the loss becomes NaN or infinite.
    Source: Huang, Adversarial Learned Soups, sections 2 and 4; Rice et al. 2020, arXiv:2002.11569 (early stopping).
    """
    threat, objective = ThreatModel.parse(threat), Objective.parse(objective)
    check_schedule(schedule)
    if not 0 <= momentum < 1 or not weight_decay >= 0:
        raise RequestError(
            f"train: got momentum {momentum}, weight_decay {weight_decay}; expected momentum in [0, 1), weight_decay at least 0"
        )
    if epochs < 1 or batch_size < 2 or not 0 < lr < math.inf:
        raise RequestError(
            f"train: got epochs {epochs}, batch_size {batch_size}, lr {lr}; expected at least 1, 2, above 0"
        )
    if early_stop and val is None:
        raise RequestError("early_stop: no validation split to watch; give val")
    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    settings = {
        "threat": str(threat), "objective": str(objective), "attack_steps": attack_steps, "epochs": epochs,
        "batch_size": batch_size, "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "schedule": schedule,
        "early_stop": early_stop, "early_stop_steps": early_stop_steps, "seed": seed, "precision": precision,
    }  # fmt: skip
    model = copy.deepcopy(as_network(network)).to(where, memory_format=torch.channels_last)
    check_fit(model, data)
    start = Checkpoint.of(model)
    run = _Run(model, data.to(where), val.to(where) if val is not None else None, threat, objective, settings)
    saved = SavedState(
        state_path,
        json.dumps([settings, start.digest, data.digest, val and val.digest, network_mark(model)], sort_keys=True),
    )
    run.load(saved.load())
    fit(run, saved, on_progress)
    origin = network if isinstance(network, Checkpoint) else None
    if isinstance(network, (str, os.PathLike)):
        origin = Checkpoint.load(network)
    return _finished(run, origin, start, data, settings, where)


class _Run:
    """The state of one training run."""

    verb = "train"

    def __init__(self, model: nn.Module, data: Split, val: Split | None, threat: ThreatModel, objective: Objective,
                 settings: dict[str, Any]) -> None:  # fmt: skip
        self.model, self.data, self.val, self.threat, self.objective = model, data, val, threat, objective
        self.settings = settings
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=settings["lr"], momentum=settings["momentum"], weight_decay=settings["weight_decay"]
        )
        self.steps_per_epoch = max(len(data) // settings["batch_size"], 1)
        self.step, self.loss_sum = 0, torch.zeros((), device=data.images.device)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] | None = None

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state."""
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.history, self.best = state["step"], state["history"], state["best"]
            self.loss_sum = state["loss_sum"].to(self.loss_sum.device)

    def state(self) -> dict[str, Any]:
        """All that `load` needs."""
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "history": self.history, "best": self.best, "loss_sum": self.loss_sum,
        }  # fmt: skip

    def take_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on a batch; returns its loss."""
        s = self.settings
        lr = rate(s["schedule"], s["lr"], self.step / self.steps_per_epoch, s["epochs"])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x_adv = attacked(self.model, x, y, self.threat, self.objective, s["attack_steps"], s["precision"])
        self.optimizer.zero_grad(set_to_none=True)
        loss = objective_loss(self.model, x, x_adv, y, self.objective, s["precision"])
        check_loss(self, loss, x_adv)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Measure the robust loss on val, and remember the weights if it is the least so far."""
        if self.val is not None:
            entry["robust_loss"], entry["robust_accuracy"] = robust_loss(
                self.model, self.val, self.threat, steps=self.settings["early_stop_steps"],
                precision=self.settings["precision"],
            )  # fmt: skip
            if self.settings["early_stop"] and entry["robust_loss"] < min(
                (past["robust_loss"] for past in self.history), default=math.inf
            ):
                self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def broken(self) -> str | None:
        """Nothing but the loss tells."""
        return None


def fit(run: Any, saved: SavedState, on_progress: Progress | None) -> None:
    """Take a run's steps to the end, epoch by epoch, saving its state from time to time; training and learning alike.

    The run has `verb`, `model`, `settings`, `data`, `step`, `steps_per_epoch`, `loss_sum` and `history`, and take_step(x, y),
    end_epoch(entry), broken() (a layer that is not finite) and state().

    Raises Diverged, naming the layer, for a loss that is not finite; what was saved before it stays.
    """
    s, per_epoch = run.settings, run.steps_per_epoch
    total = s["epochs"] * per_epoch
    while run.step < total:
        epoch, skip = divmod(run.step, per_epoch)
        for x, y, _ in batches(run.data, s["batch_size"], seed=s["seed"], epoch=epoch, skip=skip):
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
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, objective: Objective, steps: int, precision: str
) -> Tensor:
    """What the objective's robust part is computed on: x itself where it has none."""
    if objective.clean_weight == 1:
        return x
    return apgd_train(model, x, y, threat, steps=steps, precision=precision)


def objective_loss(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, objective: Objective, precision: str
) -> Tensor:
    """The objective, a scalar: one train-mode pass, over the clean and the attacked batch together for `mixed`."""
    model.train()
    weight = objective.clean_weight
    if weight in (0, 1) or x_adv is x:
        with autocast(x.device, precision):
            logits = model(x_adv if weight == 0 else x)
        return ce(logits, y).mean()
    with autocast(x.device, precision):
        logits = model(torch.cat([x, x_adv]))
    clean, robust = ce(logits, y.repeat(2)).view(2, -1).mean(1)
    return weight * clean + (1 - weight) * robust


def robust_loss(
    model: nn.Module, data: Split, threat: ThreatModel, *, steps: int = 10, batch_size: int = 500,
    precision: str = "float32",
) -> tuple[float, float]:  # fmt: skip
    """Mean highest loss and accuracy under the training form of APGD, over a whole split, in eval mode."""
    model.eval()
    total, right = 0.0, 0
    for images, y in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
        x = to_float(images).contiguous(memory_format=torch.channels_last)
        x_adv = apgd_train(model, x, y, threat, steps=steps, precision=precision)
        with torch.no_grad(), autocast(x.device, precision):
            logits = model(x_adv)
        total += float(ce(logits, y).sum())
        right += int((logits.argmax(1) == y).sum())
    return total / len(data), right / len(data)


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
    if weight:
        total += weight * robust_loss(model, data, CLEAN, precision=precision)[0]
    if weight < 1:
        total += (1 - weight) * robust_loss(model, data, threat, steps=steps, precision=precision)[0]
    return total


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


def _finished(
    run: _Run, origin: Checkpoint | None, start: Checkpoint, data: Split, settings: dict[str, Any], device: torch.device
) -> Checkpoint:
    if run.best is not None:
        run.model.load_state_dict(run.best)
    record: dict[str, Any] = dict(origin.provenance) if origin is not None else {}
    for key in ("history", "early_stopped_at", "learned", "coefficients", "buffers"):
        record.pop(key, None)
    chosen = min(run.history, key=lambda entry: entry["robust_loss"])["epoch"] if run.best is not None else None
    record |= {
        "kind": "trained", "data": data.record, "trained_on": sorted({*record.get("trained_on", []), data.name}),
        "training": settings, "history": run.history, "early_stopped_at": chosen, "seed": settings["seed"],
        "parents": [{"digest": start.digest, "file": origin.path.name if origin.path else None}] if origin else [],
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type},
    }  # fmt: skip
    return Checkpoint.of(run.model, record)

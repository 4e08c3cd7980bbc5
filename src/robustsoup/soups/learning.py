"""learn: the adversarial learned soup. One softmax over the ingredients for each layer, trained adversarially."""

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.checkpoints import Checkpoint
from robustsoup.data import Split
from robustsoup.data.splits import keyed_generator
from robustsoup.errors import Diverged, RequestError
from robustsoup.losses import Objective
from robustsoup.precision import resolve_device, resolve_precision
from robustsoup.progress import Progress, SavedState
from robustsoup.schedules import Schedule, check_schedule, rate
from robustsoup.soups.batchnorm import norm_layers
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.mixing import canonical_order, check_ingredients, mix, weighted_sum
from robustsoup.threats import ThreatModel
from robustsoup.training import attacked, check_fit, fit, objective_loss


def learn(
    ingredients: Sequence[Checkpoint | str | os.PathLike], data: Split, *, threat: ThreatModel | str,
    objective: Objective | str = "ce", attack_steps: int = 2, epochs: int = 30, batch_size: int = 128, lr: float = 10.0,
    momentum: float = 0.9, schedule: Schedule = "cosine", detach: float = 0.8, init: str = "xavier", seed: int = 0,
    network: nn.Module | None = None, device: str = "auto", precision: str = "auto",
    state_path: str | os.PathLike | None = None, on_progress: Progress | None = None,
) -> Coefficients:  # fmt: skip
    """Train coefficients for the ingredients, one softmax for each named parameter, on the points that APGD finds.

    Each step mixes the layers that changed into one ordinary network, attacks it in eval mode, and takes one train-mode
    pass; dL/dalpha = <dL/dtheta_layer, theta_i,layer>, so no autograd graph ever holds n networks.
    detach: the probability that a layer is left out of a step: it is still mixed, but gets no gradient and no update
    (its momentum rests too). init: "xavier" (uniform, bound sqrt(6 / (1 + n))) or "zeros" (the uniform soup).
    BatchNorm statistics start as the mean of the ingredients' and are tracked by the train-mode pass; they come back
    with the coefficients (`mix` with buffers="tracked" takes them).
    network: a module to run, where the ingredients do not say what they are. The rest as in `train`.

    Raises IngredientMismatch, ModelError, RequestError for settings out of range, Diverged for a non-finite loss.
    Source: Huang, Adversarial Learned Soups, section 3; the inner product: MEHL-Soup (Li et al., ECCV 2024).
    """
    loaded = [Checkpoint.load(item) for item in ingredients]
    if network is not None:
        loaded = [item.named_for(network) for item in loaded]
    check_ingredients(loaded)
    threat, objective = ThreatModel.parse(threat), Objective.parse(objective)
    check_schedule(schedule)
    if not 0 <= momentum < 1:
        raise RequestError(f"learn: got momentum {momentum}, expected a number in [0, 1)")
    if not 0 <= detach <= 1 or epochs < 1 or batch_size < 2 or not lr > 0:
        raise RequestError(
            f"learn: got detach {detach}, epochs {epochs}, batch_size {batch_size}, lr {lr}; "
            "expected detach in [0, 1], at least 1 epoch, batches of at least 2, lr above 0"
        )
    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    settings = {
        "threat": str(threat), "objective": str(objective), "attack_steps": attack_steps, "epochs": epochs,
        "batch_size": batch_size, "lr": lr, "momentum": momentum, "schedule": schedule, "detach": detach, "init": init,
        "seed": seed, "precision": precision,
    }  # fmt: skip
    model = copy.deepcopy(network) if network is not None else loaded[0].network()
    mix(loaded, [1 / len(loaded)] * len(loaded), buffers="average").load_into(model)
    check_fit(model, data)
    run = _Run(model.to(where, memory_format=torch.channels_last), loaded, data.to(where), threat, objective, settings)
    digests = [item.digest for item in loaded]
    saved = SavedState(state_path, json.dumps([settings, digests, data.digest], sort_keys=True))
    run.load(saved.load())
    fit(run, saved, on_progress)
    return run.coefficients(digests)


def initial_logits(layers: int, n: int, init: str, seed: int) -> Tensor:
    """(layers, n) float32: Xavier-uniform with fan (1, n), or zeros."""
    if init == "zeros":
        return torch.zeros(layers, n)
    if init != "xavier":
        raise RequestError(f'init: got "{init}", expected "xavier" or "zeros"')
    bound = math.sqrt(6 / (1 + n))
    return torch.empty(layers, n).uniform_(-bound, bound, generator=keyed_generator("logits", seed))


def logits_gradient(grad: Tensor, thetas: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """(n,): dL/dlogits of one layer, from dL/dtheta of its mixed weights and its n ingredients.

    dL/dalpha_i = <dL/dtheta, theta_i>; then the Jacobian of alpha = softmax(logits).
    """
    by_alpha = torch.stack([torch.sum(grad * theta.to(grad.dtype)) for theta in thetas]).to(alpha)
    return alpha * (by_alpha - (alpha * by_alpha).sum())


class _Run:
    """The state of one learning run."""

    def __init__(self, model: nn.Module, ingredients: list[Checkpoint], data: Split, threat: ThreatModel,
                 objective: Objective, settings: Mapping[str, Any]) -> None:  # fmt: skip
        self.model, self.data, self.threat, self.objective, self.settings = model, data, threat, objective, settings
        self.order = canonical_order([item.digest for item in ingredients])
        self.layers = dict(model.named_parameters())
        device = data.images.device
        self.thetas = {
            name: [
                ingredients[i].tensors[name].to(device).contiguous(memory_format=_format(parameter)) for i in self.order
            ]
            for name, parameter in self.layers.items()
        }
        self.logits = initial_logits(len(self.layers), len(ingredients), settings["init"], settings["seed"])
        self.velocity = torch.zeros_like(self.logits)
        self.steps_per_epoch = max(len(data) // settings["batch_size"], 1)
        self.step, self.loss_sum = 0, torch.zeros((), device=device)
        self.history: list[dict[str, float]] = []
        self._remix(range(len(self.layers)))

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state."""
        if state is not None:
            self.logits, self.velocity, self.step = state["logits"], state["velocity"], state["step"]
            self.history, self.loss_sum = state["history"], state["loss_sum"].to(self.loss_sum.device)
            self.model.load_state_dict(state["buffers"], strict=False)
            self._remix(range(len(self.layers)))

    def state(self) -> dict[str, Any]:
        """All that `load` needs; the mixed weights follow from the logits."""
        buffers = {name: buffer for name, buffer in self.model.state_dict().items() if name not in self.layers}
        return {
            "logits": self.logits, "velocity": self.velocity, "step": self.step, "history": self.history,
            "loss_sum": self.loss_sum, "buffers": buffers,
        }  # fmt: skip

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Nothing is measured between epochs."""

    def take_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on a batch; returns its loss."""
        s = self.settings
        lr = rate(s["schedule"], s["lr"], self.step / self.steps_per_epoch, s["epochs"])
        x_adv = attacked(self.model, x, y, self.threat, self.objective, s["attack_steps"], s["precision"])
        active = self._draw_active()
        for parameter, wanted in zip(self.layers.values(), active, strict=True):
            parameter.requires_grad_(wanted)
        with torch.set_grad_enabled(any(active)):
            loss = objective_loss(self.model, x, x_adv, y, self.objective, s["precision"])
        if any(active):
            chosen = [i for i, wanted in enumerate(active) if wanted]
            names = list(self.layers)
            grads = torch.autograd.grad(loss, [self.layers[names[i]] for i in chosen])
            self._update(chosen, grads, lr)
            self._remix(chosen)
        return loss.detach()

    def _draw_active(self) -> list[bool]:
        generator = keyed_generator("detach", self.settings["seed"], self.step)
        return (torch.rand(len(self.layers), generator=generator) >= self.settings["detach"]).tolist()

    def _update(self, chosen: list[int], grads: Sequence[Tensor], lr: float) -> None:
        """SGD with momentum on the rows in `chosen` alone; the others rest, momentum included."""
        names = list(self.layers)
        for i, grad in zip(chosen, grads, strict=True):
            slope = logits_gradient(grad, self.thetas[names[i]], torch.softmax(self.logits[i], 0).to(grad.device))
            self.velocity[i] = self.settings["momentum"] * self.velocity[i] + slope.to(self.velocity)
            self.logits[i] -= lr * self.velocity[i]

    @torch.no_grad()
    def _remix(self, chosen: Sequence[int]) -> None:
        names = list(self.layers)
        alpha = self._alpha()
        for i in chosen:
            self.layers[names[i]].copy_(weighted_sum(self.thetas[names[i]], alpha[i].tolist()))

    def _alpha(self) -> Tensor:
        """(layers, n) float64 in the canonical order of the ingredients."""
        return torch.softmax(self.logits.double(), 1)

    def coefficients(self, digests: Sequence[str]) -> Coefficients:
        """What was learned, with columns in the order in which the ingredients were given."""
        columns = [self.order.index(i) for i in range(len(digests))]
        tracked = {
            name: buffer.cpu().clone()
            for name, buffer in self.model.state_dict().items()
            if name.rpartition(".")[0] in norm_layers(self.model) and name not in self.layers
        }
        record = {"learning": dict(self.settings), "history": self.history, "data": self.data.record,
                  "trained_on": [self.data.name]}  # fmt: skip
        return Coefficients(self._alpha()[:, columns], tuple(self.layers), tuple(digests), record, tracked)

    def check_finite(self) -> None:
        """Raise Diverged, naming the first broken layer, if the loss or a logit is NaN or infinite."""
        if math.isfinite(float(self.loss_sum)) and bool(self.logits.isfinite().all()):
            return
        broken = [name for name, row in zip(self.layers, self.logits, strict=True) if not bool(row.isfinite().all())]
        where = f" first in layer {broken[0]}" if broken else ""
        raise Diverged(f"learn: the loss became {float(self.loss_sum)}{where} at step {self.step}; try a smaller lr")


def _format(parameter: Tensor) -> torch.memory_format:
    last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format

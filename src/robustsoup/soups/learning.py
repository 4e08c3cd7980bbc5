"""learn: the adversarial learned soup, one softmax over the ingredients for each layer, and the dial, a line of them."""

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import check_same_split
from robustsoup.data import Split, batches
from robustsoup.data.batches import Batch
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import Diverged, RequestError
from robustsoup.fingerprint import network_mark
from robustsoup.models.fit import check_fit
from robustsoup.progress import Progress, SavedState
from robustsoup.seeding import keyed_generator
from robustsoup.soups.batchnorm import norm_layers, recalibrate, running_statistics
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.granularity import layer_groups
from robustsoup.soups.ingredients import Ingredients, choose_place
from robustsoup.soups.mixing import POLICIES, canonical_order, check_ingredients, mix, weighted_sum
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.adversarial_loss import attacked, objective_loss, objective_on
from robustsoup.training.loop import check_loss, fit
from robustsoup.training.objectives import Combined, Objective, mixed
from robustsoup.training.schedules import Schedule, check_schedule, rate

DIALS = ("objective", "eps")


def learn(
    ingredients: Sequence[Checkpoint | str | os.PathLike],
    data: Split,
    *,
    threat: ThreatModel | str,
    objective: Objective | Combined | str = "ce",
    attack_steps: int = 2,
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 10.0,
    momentum: float = 0.9,
    schedule: Schedule = "cosine",
    detach: float = 0.8,
    init: str = "xavier",
    granularity: str = "parameter",
    buffers: str = "tracked",
    base: Checkpoint | str | os.PathLike | None = None,
    val: Split | None = None,
    early_stop: bool = False,
    early_stop_steps: int = 10,
    seed: int = 0,
    network: nn.Module | None = None,
    place: str = "auto",
    budget: float | None = None,
    allow_leakage: bool = False,
    device: str = "auto",
    precision: str = "auto",
    state_path: str | os.PathLike | None = None,
    on_progress: Progress | None = None,
) -> Coefficients:
    """Train coefficients for the ingredients, one softmax for each layer, on the points that APGD finds.

    Each step mixes the layers that changed into one ordinary network, attacks it in eval mode, and takes one train-mode
    pass; dL/dalpha = <dL/dtheta_layer, theta_i,layer>, so no autograd graph ever holds n networks.
    granularity: what a layer is: "parameter", "module", "block", "model" or "re:PATTERN" (see `layer_groups`).
    detach: the probability that a layer is left out of a step: it is still mixed, but gets no gradient and no update
    (its momentum rests too). init: "xavier" (uniform, bound sqrt(6 / (1 + n))) or "zeros" (the uniform soup).
    buffers: the BatchNorm statistics that the attack sees: "tracked" start as the mean of the ingredients' and follow the
    train-mode pass; "average" is mixed with the coefficients at each step; "base" (of `base`, as in `mix`) stays;
    "recalibrate" and "recalibrate-adversarial" are measured at the start and after each epoch. The last ones come back with the
    coefficients (`mix` with buffers="tracked" takes them), whatever the policy.
    val: measures the objective (APGD, early_stop_steps steps) after every epoch; early_stop: the epoch where it is least is
    returned, else the last. place, budget: where the ingredients are kept (see `choose_place`); paths are opened, not loaded.
    network: a module to run, where the ingredients do not say what they are. The rest as in `train`.

    Raises IngredientMismatch, ModelError, RequestError for settings out of range, LeakageError for ingredients of another
    split (unless allow_leakage), CheckpointError for a file that is lost on the way, Diverged for a non-finite loss.
    Source: Huang, Adversarial Learned Soups, section 3; the inner product: MEHL-Soup (Li et al., ECCV 2024).
    """
    settings = _settings(
        threat=threat,
        objective=objective,
        attack_steps=attack_steps,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        schedule=schedule,
        detach=detach,
        init=init,
        granularity=granularity,
        buffers=buffers,
        early_stop=early_stop,
        early_stop_steps=early_stop_steps,
        seed=seed,
    )
    run = _start(
        ingredients,
        data,
        val,
        settings,
        base,
        network,
        place,
        budget,
        allow_leakage,
        device,
        precision,
    )
    _finish(run, state_path, on_progress)
    return run.coefficients()


def learn_dial(
    ingredients: Sequence[Checkpoint | str | os.PathLike],
    data: Split,
    *,
    threat: ThreatModel | str,
    by: str = "objective",
    turn_every: int = 4,
    attack_steps: int = 2,
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 10.0,
    momentum: float = 0.9,
    schedule: Schedule = "cosine",
    detach: float = 0.8,
    init: str = "xavier",
    granularity: str = "parameter",
    buffers: str = "tracked",
    base: Checkpoint | str | os.PathLike | None = None,
    seed: int = 0,
    network: nn.Module | None = None,
    place: str = "auto",
    budget: float | None = None,
    allow_leakage: bool = False,
    device: str = "auto",
    precision: str = "auto",
    state_path: str | os.PathLike | None = None,
    on_progress: Progress | None = None,
) -> Dial:
    """Learn a whole line of soups at once: logits(t) = a + b (2t - 1) for each layer, t in [0, 1] from robust to clean.

    Every `turn_every` steps t is drawn uniformly anew and every layer mixed again (`learn` mixes the changed ones only).
    by: "objective": t is the clean weight, t L(clean) + (1 - t) L(attack); "eps": the attack's radius is (1 - t) eps.
    a starts as `init` says, b at zero. The rest as in `learn`. `Dial.at(t)` gives ordinary coefficients.

    Raises as `learn`, and RequestError for a clean threat.
    """
    if by not in DIALS or turn_every < 1:
        raise RequestError(
            f'dial: got by "{by}", turn_every {turn_every}, expected one of {", ".join(DIALS)}, at least 1'
        )
    if ThreatModel.parse(threat).is_clean:
        raise RequestError("dial: it turns from robust to clean; give a threat, not clean")
    settings = _settings(
        threat=threat,
        objective="ce",
        attack_steps=attack_steps,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        schedule=schedule,
        detach=detach,
        init=init,
        granularity=granularity,
        buffers=buffers,
        early_stop=False,
        early_stop_steps=1,
        seed=seed,
        dial=by,
        turn_every=turn_every,
    )
    run = _start(
        ingredients,
        data,
        None,
        settings,
        base,
        network,
        place,
        budget,
        allow_leakage,
        device,
        precision,
    )
    _finish(run, state_path, on_progress)
    return run.dial()


def initial_logits(layers: int, n: int, init: str, seed: int) -> Tensor:
    """(layers, n) float32: Xavier-uniform with fan (1, n), or zeros."""
    if init == "zeros":
        return torch.zeros(layers, n)
    if init != "xavier":
        raise RequestError(f'init: got "{init}", expected "xavier" or "zeros"')
    bound = math.sqrt(6 / (1 + n))
    return torch.empty(layers, n).uniform_(-bound, bound, generator=keyed_generator("logits", seed))


def logits_gradient(by_alpha: Tensor, alpha: Tensor) -> Tensor:
    """(layers, n): dL/dlogits from dL/dalpha, by the Jacobian of alpha = softmax(logits)."""
    return alpha * (by_alpha - (alpha * by_alpha).sum(-1, keepdim=True))


@dataclass(frozen=True)
class _Settings:
    """How a soup is learned, as it is recorded."""

    threat: ThreatModel
    objective: Objective
    record: dict[str, Any]


def _settings(
    *, threat: ThreatModel | str, objective: Objective | Combined | str, **given: Any
) -> _Settings:
    threat, objective = ThreatModel.parse(threat), Objective.parse(objective)
    check_schedule(given["schedule"])
    if given["buffers"] not in POLICIES:
        raise RequestError(
            f'learn: got buffers "{given["buffers"]}", expected one of {", ".join(POLICIES)}'
        )
    if given["buffers"] == "recalibrate-adversarial" and threat.is_clean:
        raise RequestError(
            'learn: buffers "recalibrate-adversarial" need a threat that is not clean'
        )
    momentum, detach, epochs, batch_size, lr = (
        given[k] for k in ("momentum", "detach", "epochs", "batch_size", "lr")
    )
    if not 0 <= momentum < 1:
        raise RequestError(f"learn: got momentum {momentum}, expected a number in [0, 1)")
    if not 0 <= detach <= 1 or epochs < 1 or batch_size < 2 or not 0 < lr < math.inf:
        raise RequestError(
            f"learn: got detach {detach}, epochs {epochs}, batch_size {batch_size}, lr {lr}; "
            "expected detach in [0, 1], at least 1 epoch, batches of at least 2, lr above 0"
        )
    return _Settings(
        threat, objective, {"threat": str(threat), "objective": str(objective), **given}
    )


def _start(
    ingredients: Sequence[Checkpoint | str | os.PathLike],
    data: Split,
    val: Split | None,
    settings: _Settings,
    base: Checkpoint | str | os.PathLike | None,
    network: nn.Module | None,
    place: str,
    budget: float | None,
    allow_leakage: bool,
    device: str,
    precision: str,
) -> "_Run":
    if settings.record["early_stop"] and val is None:
        raise RequestError("early_stop: no validation split to watch; give val")
    opened = [Checkpoint.open(item) for item in ingredients]
    if network is not None:
        opened = [item.described_by(network) for item in opened]
    check_ingredients(opened)
    check_same_split(opened, data, allow=allow_leakage)
    where = resolve_device(device)
    model = copy.deepcopy(network) if network is not None else opened[0].network()
    first = "base" if settings.record["buffers"] == "base" else "average"
    start = mix(opened, [1 / len(opened)] * len(opened), buffers=first, base=base)
    found = {
        "precision": resolve_precision(precision, where),
        "base": start.provenance["buffers"].get("base"),
    }
    settings = replace(settings, record=settings.record | found)
    start.load_into(model)
    check_fit(model, data)
    model.to(where, memory_format=torch.channels_last)
    place = choose_place(place, budget, opened, where)
    return _Run(
        model, opened, data.to(where), val.to(where) if val is not None else None, settings, place
    )


def _finish(
    run: "_Run", state_path: str | os.PathLike | None, on_progress: Progress | None
) -> None:
    held = run.val and run.val.digest
    work = [run.settings, run.digests, run.data.digest, held, network_mark(run.model)]
    work += [run.objective.mark] if run.objective.mark else []
    saved = SavedState(state_path, json.dumps(work, sort_keys=True))
    run.load(saved.load())
    fit(run, saved, on_progress)


class _Run:
    """The state of one learning run.

    weights: (k, layers, n), logits = sum_k basis_k(t) weights_k: k is 1 for a soup, 2 for a dial.
    """

    verb = "learn"

    def __init__(
        self,
        model: nn.Module,
        ingredients: list[Checkpoint],
        data: Split,
        val: Split | None,
        settings: _Settings,
        place: str,
    ) -> None:
        self.model, self.data, self.val = model, data, val
        self.settings, self.threat, self.objective = (
            settings.record,
            settings.threat,
            settings.objective,
        )
        self.digests = [item.digest for item in ingredients]
        self.order = canonical_order(self.digests)
        self.parameters = dict(model.named_parameters())
        self.groups = layer_groups(model, self.settings["granularity"])
        self.layers = list(self.groups)
        self.ingredients = Ingredients(
            [ingredients[i] for i in self.order], list(self.parameters), data.images.device, place
        )
        start = initial_logits(
            len(self.layers), len(ingredients), self.settings["init"], self.settings["seed"]
        )
        self.turning = "dial" in self.settings
        self.weights = torch.stack([start, torch.zeros_like(start)] if self.turning else [start])
        self.started = self.weights.clone()
        self.velocity = torch.zeros_like(self.weights)
        self.slopes = torch.zeros(
            2, len(self.layers), dtype=torch.float64
        )  # sums of norms, and how many
        self.steps_per_epoch = max(len(data) // self.settings["batch_size"], 1)
        self.step, self.loss_sum, self.t = 0, torch.zeros((), device=data.images.device), 0.5
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        self.statistics = _Statistics(
            model, [ingredients[i] for i in self.order], data, self.settings
        )
        self._remix(range(len(self.layers)))
        self.statistics.measure()

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state."""
        if state is not None:
            self.weights, self.velocity, self.slopes = (
                state["weights"],
                state["velocity"],
                state["slopes"],
            )
            self.step, self.history, self.best, self.t = (
                state["step"],
                state["history"],
                state["best"],
                state["t"],
            )
            self.loss_sum = state["loss_sum"].to(self.loss_sum.device)
            self.model.load_state_dict(state["buffers"], strict=False)
            self._remix(range(len(self.layers)))

    def state(self) -> dict[str, Any]:
        """All that `load` needs; the mixed weights follow from the logits."""
        return {
            "weights": self.weights,
            "velocity": self.velocity,
            "slopes": self.slopes,
            "step": self.step,
            "history": self.history,
            "best": self.best,
            "t": self.t,
            "loss_sum": self.loss_sum,
            "buffers": self._buffers(),
        }

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of an epoch from number `skip` on."""
        return batches(
            self.data,
            self.settings["batch_size"],
            seed=self.settings["seed"],
            epoch=epoch,
            skip=skip,
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
        if self.turning and self.step % s["turn_every"] == 0:
            self.t = float(torch.rand((), generator=keyed_generator("dial", s["seed"], self.step)))
            self._remix(range(len(self.layers)))
        threat, objective = self._aim()
        key = (s["seed"], self.step)
        x_adv = attacked(
            self.model, x, y, threat, objective, s["attack_steps"], s["precision"], key
        )
        active = self._draw_active()
        wanted = {name for layer in active for name in self.groups[self.layers[layer]]}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in wanted)
        with torch.set_grad_enabled(bool(active)):
            loss = objective_loss(self.model, x, x_adv, y, objective, s["precision"])
        check_loss(self, loss, x_adv)
        if loss.requires_grad:  # else no active layer is used
            chosen = {
                name: parameter for name, parameter in self.parameters.items() if name in wanted
            }
            grads = torch.autograd.grad(
                loss, list(chosen.values()), allow_unused=True, materialize_grads=True
            )
            self._update(active, dict(zip(chosen, grads, strict=True)), lr)
            self._remix(active)
        return loss.detach()

    def _aim(self) -> tuple[ThreatModel, Objective]:
        """What this step trains on, which the dial turns."""
        if not self.turning:
            return self.threat, self.objective
        if self.settings["dial"] == "eps":
            return ThreatModel(self.threat.norm, self.threat.eps * (1 - self.t)), self.objective
        return self.threat, mixed(self.t)

    def _draw_active(self) -> list[int]:
        generator = keyed_generator("detach", self.settings["seed"], self.step)
        drawn = torch.rand(len(self.layers), generator=generator) >= self.settings["detach"]
        return drawn.nonzero().flatten().tolist()

    def _update(self, active: list[int], grads: dict[str, Tensor], lr: float) -> None:
        """SGD with momentum on the layers in `active` alone; the others rest, momentum included."""
        inner = dict(zip(grads, self.ingredients.inner(grads), strict=True))
        by_alpha = torch.stack(
            [sum(inner[name] for name in self.groups[self.layers[i]]) for i in active]
        )
        finite = by_alpha.isfinite().all(1).tolist()
        if not all(finite):
            layer = self.layers[active[finite.index(False)]]
            raise Diverged(
                f"learn: the gradient of layer {layer} is not finite at step {self.step}; what was saved before is kept; "
                "try a smaller lr"
            )
        slope = logits_gradient(by_alpha, self._alpha()[active])
        self.slopes[:, active] += torch.stack([slope.norm(dim=1), torch.ones(len(active))])
        by_weights = self._basis().view(-1, 1, 1) * slope
        self.velocity[:, active] = self.settings["momentum"] * self.velocity[
            :, active
        ] + by_weights.to(self.velocity)
        self.weights[:, active] -= lr * self.velocity[:, active]

    def _remix(self, active: Sequence[int]) -> None:
        self.ingredients.check()
        alpha = self._alpha()
        for i in active:
            for name in self.groups[self.layers[i]]:
                self.ingredients.mix_into(name, alpha[i].tolist(), self.parameters[name])
                self.statistics.mix(name, alpha[i].tolist())

    def _basis(self) -> Tensor:
        return torch.tensor([1.0, 2 * self.t - 1] if self.turning else [1.0], dtype=torch.float64)

    def _alpha(self) -> Tensor:
        """(layers, n) float64 in the canonical order of the ingredients."""
        return torch.softmax(torch.tensordot(self._basis(), self.weights.double(), 1), 1)

    def _buffers(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in self.parameters
        }

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Measure the objective on val, and remember the coefficients if it is the least so far."""
        self.statistics.measure()
        if self.val is None:
            return
        s = self.settings
        entry["val_loss"] = objective_on(
            self.model,
            self.val,
            self.threat,
            self.objective,
            steps=s["early_stop_steps"],
            precision=s["precision"],
        )
        if s["early_stop"] and entry["val_loss"] < min(
            (past["val_loss"] for past in self.history), default=math.inf
        ):
            buffers = {name: tensor.clone() for name, tensor in self._buffers().items()}
            self.best = {
                "weights": self.weights.clone(),
                "buffers": buffers,
                "epoch": entry["epoch"],
            }

    def broken(self) -> str | None:
        """The first layer whose logits are not finite, if there is one."""
        finite = self.weights.isfinite().all(-1).all(0).tolist()
        return None if all(finite) else self.layers[finite.index(False)]

    def coefficients(self) -> Coefficients:
        """What was learned, with columns in the order in which the ingredients were given."""
        weights, buffers = self.weights, self._buffers()
        if self.best is not None:
            weights, buffers = self.best["weights"], self.best["buffers"]
        start, alpha = (
            torch.softmax(w[0].double(), 1)[:, self._columns()] for w in (self.started, weights)
        )
        return Coefficients(
            alpha,
            tuple(self.layers),
            tuple(self.digests),
            self._record(),
            self._tracked(buffers),
            self._grouped(),
            start,
            self._mean_slopes(),
        )

    def dial(self) -> Dial:
        """The line that was learned, with columns in the order in which the ingredients were given."""
        return Dial(
            self.weights[..., self._columns()].double(),
            tuple(self.layers),
            tuple(self.digests),
            self._record(),
            self._tracked(self._buffers()),
            self._grouped(),
            self.started[..., self._columns()].double(),
            self._mean_slopes(),
        )

    def _columns(self) -> list[int]:
        return [self.order.index(i) for i in range(len(self.digests))]

    def _mean_slopes(self) -> Tensor:
        return self.slopes[0] / self.slopes[1].clamp(min=1)

    def _grouped(self) -> dict[str, str]:
        return {
            name: layer for layer, names in self.groups.items() for name in names if name != layer
        }

    def _tracked(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        norms = norm_layers(self.model)
        return {
            name: tensor.cpu().clone()
            for name, tensor in buffers.items()
            if name.rpartition(".")[0] in norms
        }

    def _record(self) -> dict[str, Any]:
        record = {
            "learning": dict(self.settings),
            "history": self.history,
            "data": self.data.record,
            "trained_on": [self.data.name],
            "early_stopped_at": self.best and self.best["epoch"],
        }
        if len(self.digests) == 1:
            record["warnings"] = [
                "a single ingredient: there is nothing to learn; the soup is the ingredient"
            ]
        return record


class _Statistics:
    """What BatchNorm's running statistics do while a soup is learned."""

    def __init__(
        self, model: nn.Module, ingredients: list[Checkpoint], data: Split, settings: dict[str, Any]
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.layers, self.policy = norm_layers(model), settings["buffers"]
        if self.policy != "tracked":
            for layer in self.layers.values():
                layer.momentum = 0.0  # the train-mode pass leaves them alone
        self.mixed: dict[str, dict[str, list[Tensor]]] = {}
        owners = running_statistics(ingredients[0]) if self.policy == "average" else {}
        for name, parameter in owners.items():
            rows = [item.tensors[name].to(data.images.device, copy=True) for item in ingredients]
            self.mixed.setdefault(parameter, {})[name] = rows

    @torch.no_grad()
    def mix(self, parameter: str, alpha: Sequence[float]) -> None:
        """Average those that follow the coefficients of `parameter`, where that is the policy."""
        for name, rows in self.mixed.get(parameter, {}).items():
            self.model.get_buffer(name).copy_(weighted_sum(rows, alpha))

    def measure(self) -> None:
        """Measure them anew on training samples, where that is the policy."""
        if self.policy.startswith("recalibrate"):
            s = self.settings
            threat = (
                ThreatModel.parse(s["threat"])
                if self.policy == "recalibrate-adversarial"
                else CLEAN
            )
            measured = recalibrate(
                self.model,
                self.data,
                threat=threat,
                attack_steps=s["attack_steps"],
                seed=s["seed"],
                precision=s["precision"],
            )
            self.model.load_state_dict(measured, strict=False)

"""The run that learns coefficients: its state, its steps and its results."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup import distributed
from robustsoup.attacks.adaptation import copy_network, set_memory_format
from robustsoup.attacks.cuda_graph import ReplayedCall
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.checkpoints.fitting import load_tensors
from robustsoup.checkpoints.parameters import inexact_parameters
from robustsoup.data import Split, batches
from robustsoup.data.batches import Batch
from robustsoup.data.sketches import sketch_split
from robustsoup.errors import Diverged
from robustsoup.models.fit import check_fit, check_training
from robustsoup.seeding import keyed_generator
from robustsoup.settings import EarlyStop, LearnSettings, to_record
from robustsoup.soups.batchnorm import norm_layers, running_statistics
from robustsoup.soups.clean_limit import CleanLimit
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.granularity import layer_groups
from robustsoup.soups.ingredients import Ingredients
from robustsoup.soups.layer_weights import Affine, LayerWeights, Softmax
from robustsoup.soups.learning_buffers import LearningBuffers, mix_start
from robustsoup.soups.summation import canonical_order
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.accumulation import attack_parts
from robustsoup.training.adversarial_loss import (
    mean_objective_loss,
    measure_objective,
    measure_robust_loss,
)
from robustsoup.training.loop import History, check_step_loss
from robustsoup.training.objectives import Objective, mixed
from robustsoup.training.recomputation import check_recomputation, recomputed_activations
from robustsoup.training.schedules import learning_rate
from robustsoup.training.sharing import (
    BatchShare,
    average_statistics,
    synchronised_batchnorm,
)


@dataclass(frozen=True)
class LearningInputs:
    """Inputs of a learning run, and where it runs.

    Attributes:
        ingredients: n opened checkpoints of one network.
        data: The training split.
        val: Split to measure the objective on, or None.
        network: The network to run; by default the one that the ingredients record.
        base: Checkpoint for the buffer policy "base".
        place: "device", "memory" or "files": where the ingredients' parameters are stored.
        device: Where the network runs.
    """

    ingredients: list[Checkpoint]
    data: Split
    val: Split | None
    network: nn.Module | None
    base: CheckpointLike | None
    place: str
    device: torch.device


class LearningRun:
    """The state of one learning run; a `StepwiseRun`.

    The learned line has shape (k, layers, n): logits(t) = sum_k basis_k(t) * line_k with k = 1 for
    a soup and k = 2 for a dial. Its columns are in the order of the ingredients' digests, so that
    results do not depend on the order in which the ingredients are listed.
    """

    verb = "learn"

    def __init__(self, inputs: LearningInputs, settings: LearnSettings) -> None:
        self.inputs, self.settings = inputs, settings
        self.objective: Objective = settings.objective
        self.epochs, self.precision = settings.epochs, settings.precision
        self.seed = settings.seed
        self.data = inputs.data.to(inputs.device)
        self.val = _split_to_measure(inputs, settings)
        self.digests = [item.digest for item in inputs.ingredients]
        self.order = canonical_order(self.digests)
        ordered = [inputs.ingredients[i] for i in self.order]
        self.model, start = _start_network(inputs, settings)
        self.base_digest, self.warnings = start.provenance["buffers"].get("base"), start.warnings
        self.parameters = inexact_parameters(self.model)
        self.groups = layer_groups(self.model, settings.granularity)
        self.layers = list(self.groups)
        self.statistics = set(running_statistics(ordered[0]))
        self.ingredients = Ingredients(ordered, list(self.parameters), inputs.device, inputs.place)
        self.buffers = LearningBuffers(self.model, ordered, self.data, settings)
        self.limit = None if settings.clean_limit is None else CleanLimit(settings.clean_limit)
        self.weights: LayerWeights = Affine() if settings.affine else Softmax()
        self.start = self._initial_line()
        self.line = self.start.clone()
        self.velocity = torch.zeros_like(self.line)
        self.slope_sums = torch.zeros(len(self.layers), dtype=torch.float64)
        self.slope_counts = torch.zeros(len(self.layers), dtype=torch.float64)
        self.alpha_sum = torch.zeros(len(self.layers), len(self.digests), dtype=torch.float64)
        self.alpha_count = 0
        self.steps_per_epoch = max(len(inputs.data) // settings.batch_size, 1)
        self.step, self.t = 0, 0.5
        # A dial by eps draws a new radius every few steps, which a recorded attack cannot follow.
        by_eps = settings.dial is not None and settings.dial.by == "eps"
        self.replayed_attack = None if by_eps else ReplayedCall()
        self.loss_sum = torch.zeros((), device=inputs.device, dtype=torch.float32)
        self.history: History = []
        self.best: dict[str, Any] | None = None
        self.mix_layers(range(len(self.layers)))
        self.buffers.end_epoch(self._current_coefficients())

    @property
    def record(self) -> dict[str, Any]:
        """The settings as coefficients record them."""
        return {**to_record(self.settings), "base": self.base_digest}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Resume from a saved state, if there is one."""
        if state is None:
            return
        self.line, self.velocity = state["line"], state["velocity"]
        self.slope_sums, self.slope_counts = state["slope_sums"], state["slope_counts"]
        self.alpha_sum, self.alpha_count = state["alpha_sum"], state["alpha_count"]
        self.step, self.t = state["step"], state["t"]
        self.loss_sum = state["loss_sum"].to(self.inputs.device)
        self.history, self.best = state["history"], state["best"]
        if self.limit is not None:
            self.limit.restore(state["limit"])
        load_tensors(self.model, state["buffers"])
        self.mix_layers(range(len(self.layers)))

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` needs; the mixed weights follow from the line."""
        return {
            "line": self.line,
            "velocity": self.velocity,
            "slope_sums": self.slope_sums,
            "slope_counts": self.slope_counts,
            "alpha_sum": self.alpha_sum,
            "alpha_count": self.alpha_count,
            "step": self.step,
            "t": self.t,
            "loss_sum": self.loss_sum,
            "history": self.history,
            "best": self.best,
            "limit": None if self.limit is None else self.limit.state(),
            "buffers": self._model_buffers(),
        }

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, without the first `skip`."""
        s = self.settings
        return batches(self.data, s.batch_size, seed=s.seed, epoch=epoch, skip=skip)

    def take_step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step on a global batch and return its loss."""
        s, share = self.settings, BatchShare.of(len(x))
        parts = share.split(s.accumulate)
        self._turn_dial()
        threat, objective = self._goal()
        with recomputed_activations(self.model, s.recompute_activations):
            attacked = attack_parts(
                self.model,
                (x, y),
                s if s.dial is None else replace(s, threat=threat),
                objective,
                step=self.step,
                parts=parts,
                replayed=self.replayed_attack,
            )
            active = self._draw_active_layers()
            trained = self._require_gradients(active)
            with synchronised_batchnorm(self.model, s.batchnorm):
                loss, grads = self._pass_parts(
                    (x, y), attacked, objective, parts, list(trained.values())
                )
        loss = distributed.sum_ranks(loss)
        check_step_loss(self, loss, attacked[0][0])
        if self.limit is not None:
            self.limit.end_step(parts)
        if self.settings.buffers == "tracked":
            average_statistics(self.model, share, s.batchnorm)
        if grads:
            self.update_line(active, dict(zip(trained, grads, strict=True)), self._learning_rate())
            self.mix_layers(active)
        self._add_to_average()
        return loss

    def _pass_parts(
        self,
        batch: tuple[Tensor, Tensor],
        attacked: Sequence[Sequence[Tensor]],
        objective: Objective,
        parts: Sequence[BatchShare],
        trained: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the parts' share of the loss, and the sum of its gradients by `trained`.

        There are no gradients if the network uses none of these parameters.
        """
        (x, y), losses, sums = batch, list[Tensor](), list[Tensor]()
        for part, points in zip(parts, attacked, strict=True):
            with torch.set_grad_enabled(bool(trained)):
                loss = part.weight * mean_objective_loss(
                    self.model,
                    part.take(x),
                    points,
                    part.take(y),
                    objective,
                    precision=self.settings.precision,
                )
            losses.append(loss.detach())
            if loss.requires_grad:
                grads = torch.autograd.grad(
                    loss, trained, allow_unused=True, materialize_grads=True
                )
                sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else list(grads)
        return torch.stack(losses).sum(), sums

    def update_line(self, active: Sequence[int], grads: dict[str, Tensor], lr: float) -> None:
        """Take a step of SGD with momentum on some layers, and leave the others unchanged.

        Args:
            active: Numbers of the layers to update.
            grads: dL/dtheta of each of their parameters, by name: this rank's part of the sum.
            lr: Learning rate.

        Raises:
            Diverged: If the gradient of a layer is not finite; names the layer.
        """
        inner = dict(zip(grads, self.ingredients.inner(grads), strict=True))
        zero = torch.zeros(len(self.digests), dtype=torch.float64)
        by_alpha = torch.stack(
            [sum((inner[name] for name in self.groups[self.layers[i]]), zero) for i in active]
        )
        by_alpha = distributed.sum_ranks(by_alpha)
        self._check_gradients(active, by_alpha)
        by_free = self.weights.gradient(by_alpha, self._alpha()[active])
        self.slope_sums[active] += by_free.norm(dim=1)
        self.slope_counts[active] += 1
        by_line = (self._basis().view(-1, 1, 1) * by_free).to(self.velocity)
        self.velocity[:, active] = self.settings.momentum * self.velocity[:, active] + by_line
        self.line[:, active] -= lr * self.velocity[:, active]

    @torch.no_grad()
    def mix_layers(self, active: Sequence[int]) -> None:
        """Mix some layers into the network with the current coefficients."""
        self.ingredients.check()
        alpha = self._alpha()
        for i in active:
            for name in self.groups[self.layers[i]]:
                self.ingredients.mix_into(name, alpha[i].tolist(), self.parameters[name])
        self.buffers.end_step(self._current_coefficients())

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Measure the objective on val, and store the line if the loss is the lowest so far."""
        self.buffers.end_epoch(self._current_coefficients())
        if self.limit is not None:
            self.limit.end_epoch(entry, self.steps_per_epoch)
        if self.val is None:
            return
        stop = self.settings.early_stop
        threats = self.settings.threats
        with recomputed_activations(self.model, self.settings.recompute_activations):
            losses = [
                measure_objective(
                    self.model,
                    self.val,
                    threat,
                    self.objective,
                    steps=(stop or EarlyStop()).steps,
                    precision=self.precision,
                )
                for threat in threats
            ]
        loss = sum(losses) / len(threats)
        entry["val_loss"] = loss
        if self.limit is not None:
            clean = measure_robust_loss(self.model, self.val, CLEAN, precision=self.precision)
            entry["val_clean_loss"] = clean[0]
        earlier = (item["val_loss"] for item in self.history)
        lowest = min(filter(math.isfinite, earlier), default=math.inf)
        if stop and loss < lowest:
            buffers = {name: tensor.clone() for name, tensor in self._model_buffers().items()}
            self.best = {"line": self.line.clone(), "buffers": buffers, "epoch": entry["epoch"]}

    def find_non_finite_layer(self) -> str | None:
        """Return the first layer whose logits are not finite, or None."""
        finite = self.line.isfinite().all(-1).all(0).tolist()
        return None if all(finite) else self.layers[finite.index(False)]

    def coefficients(self) -> Coefficients:
        """Return the learned coefficients, columns in the order of the listed ingredients."""
        best = self.best or {"line": self.line, "buffers": self._model_buffers()}
        start, alpha = (self.weights.alpha(line[0]) for line in (self.start, best["line"]))
        if self.alpha_count:
            alpha = self.alpha_sum / self.alpha_count
        return Coefficients(
            alpha[:, self._columns()],
            tuple(self.layers),
            tuple(self.digests),
            self._result_record(),
            self._tracked_statistics(best["buffers"]),
            self._layer_of_parameter(),
            start[:, self._columns()],
            self._mean_slopes(),
        )

    def dial(self) -> Dial:
        """Return the learned line, columns in the order of the listed ingredients."""
        return Dial(
            self.line[..., self._columns()].double(),
            tuple(self.layers),
            tuple(self.digests),
            self._result_record(),
            self._tracked_statistics(self._model_buffers()),
            self._layer_of_parameter(),
            self.start[..., self._columns()].double(),
            self._mean_slopes(),
        )

    def _initial_line(self) -> Tensor:
        s = self.settings
        weights = s.start_weights
        if weights is not None:
            ordered = [weights[i] for i in self.order]
            start = self.weights.start(ordered).repeat(len(self.layers), 1)
        else:
            start = initial_logits(len(self.layers), len(self.digests), s.init, s.seed)
            if s.affine:
                start = torch.softmax(start, 1)
        return torch.stack([start, torch.zeros_like(start)] if s.dial else [start])

    def _learning_rate(self) -> float:
        s = self.settings
        epochs_done = self.step / self.steps_per_epoch
        return learning_rate(s.schedule, s.lr, epochs_done, s.epochs, self.steps_per_epoch)

    def _add_to_average(self) -> None:
        """Add the current coefficients to their mean, in the last share of the steps."""
        s = self.settings
        first = (1 - s.average_last) * s.epochs * self.steps_per_epoch
        if s.average_last and self.step >= first:
            self.alpha_sum += self._alpha()
            self.alpha_count += 1

    def _turn_dial(self) -> None:
        """Draw a new t and mix all layers again, every `turn_every` steps of a dial."""
        dial = self.settings.dial
        if dial is not None and self.step % dial.turn_every == 0:
            generator = keyed_generator("dial", self.settings.seed, self.step)
            self.t = float(torch.rand((), generator=generator, dtype=torch.float32))
            self.mix_layers(range(len(self.layers)))

    def _goal(self) -> tuple[ThreatModel, Objective]:
        """Return the threat and the objective of this step; a dial varies one of them."""
        threat, dial = self.settings.threat, self.settings.dial
        if self.limit is not None:
            return threat, self.limit.begin_step()
        if dial is None:
            return threat, self.objective
        if dial.by == "eps":
            return ThreatModel(threat.norm, threat.eps * (1 - self.t)), self.objective
        return threat, mixed(self.t)

    def _draw_active_layers(self) -> list[int]:
        """Draw the layers that this step updates; each is detached with probability `detach`."""
        generator = keyed_generator("detach", self.settings.seed, self.step)
        active = (
            torch.rand(len(self.layers), generator=generator, dtype=torch.float32)
            >= self.settings.detach
        )
        return active.nonzero().flatten().tolist()

    def _require_gradients(self, active: Sequence[int]) -> dict[str, nn.Parameter]:
        """Enable gradients for the parameters of the active layers alone, and return these."""
        names = {name for layer in active for name in self.groups[self.layers[layer]]}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        return {name: p for name, p in self.parameters.items() if name in names}

    def _check_gradients(self, active: Sequence[int], by_alpha: Tensor) -> None:
        finite = by_alpha.isfinite().all(1).tolist()
        if not all(finite):
            layer = self.layers[active[finite.index(False)]]
            raise Diverged(
                f"learn: the gradient of layer {layer} is not finite at step {self.step}; "
                "the last saved state is kept; try a smaller lr"
            )

    def _basis(self) -> Tensor:
        values = [1.0, 2 * self.t - 1] if self.settings.dial else [1.0]
        return torch.tensor(values, dtype=torch.float64)

    def _alpha(self) -> Tensor:
        """Return the current coefficients, (layers, n) float64, columns in canonical order."""
        return self.weights.alpha(torch.tensordot(self._basis(), self.line.double(), 1))

    def _current_coefficients(self) -> Coefficients:
        parameters = self._layer_of_parameter()
        return Coefficients(self._alpha(), tuple(self.layers), parameters=parameters)

    def _model_buffers(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self.parameters}

    def _columns(self) -> list[int]:
        return [self.order.index(i) for i in range(len(self.digests))]

    def _mean_slopes(self) -> Tensor:
        return self.slope_sums / self.slope_counts.clamp(min=1)

    def _layer_of_parameter(self) -> dict[str, str]:
        """Map each parameter to its layer, unless both have the same name."""
        return {
            name: layer for layer, names in self.groups.items() for name in names if name != layer
        }

    def _tracked_statistics(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the statistics that the ingredients have; their files may lack counters."""
        counters = {f"{name}.num_batches_tracked".lstrip(".") for name in norm_layers(self.model)}
        names = self.statistics | (counters & self.inputs.ingredients[0].tensors.keys())
        return {name: tensor.cpu().clone() for name, tensor in buffers.items() if name in names}

    def _result_record(self) -> dict[str, Any]:
        record = {
            "learning": self.record,
            "history": self.history,
            "data": self.data.record,
            "trained_on": [self.data.name],
            "fitted_images": [sketch_split(self.data)],
            "early_stopped_at": self.best and self.best["epoch"],
        }
        warnings = list(self.warnings)
        if len(self.digests) == 1:
            warnings.append(
                "a single ingredient: there is nothing to learn; the soup is the ingredient"
            )
        elif self.limit is not None:
            warnings += self.limit.describe_miss(self.history)
        return record | ({"warnings": warnings} if warnings else {})


def initial_logits(layers: int, n: int, init: str, seed: int) -> Tensor:
    """Return the initial logits.

    Args:
        layers: Number of layers.
        n: Number of ingredients.
        init: "xavier" (uniform within sqrt(6 / (1 + n))) or "zeros" (the uniform soup).
        seed: Seed of the draw.

    Returns:
        (layers, n) float32.
    """
    if init == "zeros":
        return torch.zeros(layers, n, dtype=torch.float32)
    bound = math.sqrt(6 / (1 + n))
    logits = torch.empty(layers, n, dtype=torch.float32)
    return logits.uniform_(-bound, bound, generator=keyed_generator("logits", seed))


def _split_to_measure(inputs: LearningInputs, settings: LearnSettings) -> Split | None:
    if inputs.val is None:
        return None
    samples = settings.early_stop.samples if settings.early_stop else None
    return inputs.val.first(samples).to(inputs.device)


def _start_network(inputs: LearningInputs, settings: LearnSettings) -> tuple[nn.Module, Checkpoint]:
    """Return the uniform soup, as a network on the device and as a checkpoint."""
    if inputs.network is not None:
        model = copy_network(inputs.network)
    else:
        model = inputs.ingredients[0].network()
    start = mix_start(inputs.ingredients, inputs.base, settings.buffers)
    start.load_into(model)
    check_fit(model, inputs.data, list(settings.threats))
    check_training(model, inputs.data, settings.batch_size)
    if settings.recompute_activations:
        check_recomputation(model)
    return set_memory_format(model.to(inputs.device)), start

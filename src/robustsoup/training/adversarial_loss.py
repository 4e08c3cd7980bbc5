"""The attack and the loss of one adversarial training step, and their means over a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robustsoup import distributed
from robustsoup.attacks import apgd_train
from robustsoup.attacks.cuda_graph import ReplayedCall
from robustsoup.attacks.folding import fold_batchnorm
from robustsoup.attacks.forward import call_network, frozen_eval, set_mode
from robustsoup.attacks.losses import ce, kl
from robustsoup.attacks.projections import project
from robustsoup.data import Split, passes
from robustsoup.device import autocast
from robustsoup.errors import ThreatError
from robustsoup.precision import full_float32
from robustsoup.seeding import keyed_generator
from robustsoup.settings import LearnSettings, TrainSettings
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.objectives import Objective
from robustsoup.training.sharing import BatchShare

START_NOISE = 0.001
"""Standard deviation, per pixel, of the noise added to the start if x has no gradient."""


@dataclass(frozen=True)
class BatchNoise:
    """Normal noise for a global batch; the noise of an image depends on its place there.

    Attributes:
        key: Seeds the noise.
        share: The part of the global batch that this rank attacks; None for all of it.
    """

    key: tuple[str | int, ...]
    share: BatchShare | None = None

    def draw(self, x: Tensor) -> Tensor:
        """Return the noise of this rank's images x, (b, c, h, w)."""
        share = self.share or BatchShare(0, len(x), len(x))
        noise = torch.randn(
            (share.total, *x.shape[1:]),
            generator=keyed_generator("beside", *self.key),
            dtype=torch.float32,
        )
        return share.take(noise).to(x)


def attack_batch(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    threat: ThreatModel,
    objective: Objective,
    *,
    steps: int,
    precision: str,
    noise: BatchNoise,
    replayed: ReplayedCall | None = None,
) -> Tensor:
    """Return the attacked batch that an objective is computed on.

    Args:
        model: The network; attacked in eval mode and left as it was.
        batch: Images x, (b, c, h, w) in [0, 1], and labels y, (b,) int64.
        threat: Threat model; x itself is returned if it is clean.
        objective: Defines the loss that the attack maximises; x is returned if the objective does
            not use an attacked batch.
        steps: APGD steps.
        precision: "float32" or "bfloat16".
        noise: The noise that `attack_compares_with_clean` adds to the start.
        replayed: Replays the attack on a GPU; the next call may overwrite the returned batch.

    Returns:
        (b, c, h, w) in [0, 1].
    """
    x, y = batch
    if not objective.uses_attacked or threat.is_clean:
        return x
    inputs = {"x": x, "y": y}
    if objective.attack_compares_with_clean:
        with frozen_eval(model), torch.no_grad(), autocast(x.device, precision):
            inputs["target"] = _at_least_float32(call_network(model, x))
        radii = x.new_full((len(x),), threat.eps)
        inputs["start"] = project(x + START_NOISE * noise.draw(x), x, radii, threat.norm)
    attack = partial(
        apgd_train,
        model,
        threat=threat,
        steps=steps,
        loss=objective.attack_loss,
        precision=precision,
    )
    if replayed is None or objective.attack_loss not in (ce, kl):
        return attack(**inputs)  # a loss of the user's may depend on more than its arguments
    return replayed(attack, inputs, model, (threat, steps, objective.attack_loss, precision))


def attack_under_all(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    settings: TrainSettings | LearnSettings,
    objective: Objective,
    *,
    step: int,
    share: BatchShare | None = None,
    replayed: ReplayedCall | None = None,
) -> list[Tensor]:
    """Return the attacked batches of a step, whose mean loss counts.

    One threat gives one batch. Several give, by `settings.combine`, the point of highest loss of
    each image ("max"), one batch for each threat ("mean"), or that of one threat, drawn with equal
    probability ("random").

    Args:
        model: The network; attacked in eval mode and left as it was.
        batch: Images and labels.
        settings: Threat models, steps, precision and seed.
        objective: Defines the loss that the attacks maximise.
        step: Number of the step, which keys its draws.
        share: The part of the global batch that the batch is; None for all of it.
        replayed: Replays the attack on a GPU if there is one threat.

    Source: max and mean: Tramer and Boneh 2019, arXiv:1904.13000; random: Croce and Hein 2022,
        arXiv:2105.12508, whose probabilities follow the robust errors.
    """
    threats = list(settings.threats)
    if settings.combine == "random":
        generator = keyed_generator("threat", settings.seed, step)
        threats = [threats[int(torch.randint(len(threats), (), generator=generator))]]
    attacked = [
        attack_batch(
            model,
            batch,
            threat,
            objective,
            steps=settings.attack_steps,
            precision=settings.precision,
            noise=BatchNoise((settings.seed, step), share),
            replayed=replayed if len(settings.threats) == 1 else None,
        )
        for threat in threats
    ]
    if settings.combine == "max" and objective.uses_attacked:
        return [take_worst(model, batch, attacked, objective, precision=settings.precision)]
    return attacked


@torch.no_grad()
def take_worst(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    attacked: Sequence[Tensor],
    objective: Objective,
    *,
    precision: str,
) -> Tensor:
    """Return for each image the point of highest loss among several attacked batches."""
    x, y = batch
    with frozen_eval(model), autocast(x.device, precision):
        logits = (_at_least_float32(call_network(model, points)) for points in attacked)
        clean: tuple[Tensor, ...] = ()
        if objective.attack_compares_with_clean:
            clean = (_at_least_float32(call_network(model, x)),)
        losses = torch.stack([objective.attack_loss(item, y, *clean) for item in logits])
    worst, points = losses.argmax(0), torch.stack(list(attacked))
    return points[worst, torch.arange(len(x), device=x.device)]


def mean_objective_loss(
    model: nn.Module,
    x: Tensor,
    attacked: Sequence[Tensor],
    y: Tensor,
    objective: Objective,
    *,
    precision: str,
) -> Tensor:
    """Return the mean of `objective_loss` over attacked batches, a scalar, in train mode."""
    losses = [
        objective_loss(model, x, x_adv, y, objective, precision=precision) for x_adv in attacked
    ]
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


def objective_loss(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    objective: Objective,
    *,
    precision: str,
) -> Tensor:
    """Return the objective on a batch, a scalar, in train mode.

    An objective that uses both batches sees them concatenated in one pass, or in separate passes;
    see `Objective.separate_passes`.

    Args:
        model: The network; left in train mode.
        x: Clean batch, (b, c, h, w).
        x_adv: Attacked batch, (b, c, h, w); x itself if there was no attack.
        y: (b,) int64.
        objective: The objective.
        precision: "float32" or "bfloat16".

    Raises:
        ThreatError: If the objective returns neither a loss for each sample nor a scalar.
    """
    set_mode(model, training=True)
    return _compute_objective(model, x, x_adv, y, objective, precision=precision)


@full_float32()
def measure_robust_loss(
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    *,
    steps: int = 10,
    precision: str = "float32",
) -> tuple[float, float]:
    """Measure the mean loss and the accuracy under the training form of APGD.

    Args:
        model: The network; left in eval mode.
        data: The split to measure on, whole and without augmentation.
        threat: Threat model; clean measures without an attack.
        steps: APGD steps.
        precision: Arithmetic of the attack; its points are evaluated in float32.

    Returns:
        Mean cross-entropy in nats, and accuracy in [0, 1].
    """
    set_mode(model, training=False)
    attacked_model = model if threat.is_clean else _model_for_attack(model, data, precision)
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in distributed.take_own(passes(data)):
        x_adv = apgd_train(attacked_model, x, y, threat, steps=steps, precision=precision)
        with torch.no_grad():
            logits = call_network(model, x_adv)
        loss, correct = ce(logits, y).sum(), (logits.argmax(1) == y).sum()
        sums += torch.stack([loss.double(), correct.double()]).cpu()
    mean_loss, accuracy = (distributed.sum_ranks(sums) / len(data)).tolist()
    return mean_loss, accuracy


def measure_objective(
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    objective: Objective,
    *,
    steps: int = 10,
    precision: str = "float32",
) -> float:
    """Measure the objective on a split in eval mode, under the training form of APGD.

    The arguments are those of `measure_robust_loss`.
    """
    if objective.clean_weight is None:
        return _measure_other_objective(
            model, data, threat, objective, steps=steps, precision=precision
        )
    weight, total = objective.clean_weight, 0.0
    if weight:
        total += weight * measure_robust_loss(model, data, CLEAN, precision=precision)[0]
    if weight < 1:
        robust, _ = measure_robust_loss(model, data, threat, steps=steps, precision=precision)
        total += (1 - weight) * robust
    return total


@full_float32()
def _measure_other_objective(
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    objective: Objective,
    *,
    steps: int,
    precision: str,
) -> float:
    set_mode(model, training=False)
    attacked_model, total = _model_for_attack(model, data, precision), 0.0
    for number, (x, y) in distributed.take_own(enumerate(passes(data))):
        x_adv = attack_batch(
            attacked_model,
            (x, y),
            threat,
            objective,
            steps=steps,
            precision=precision,
            noise=BatchNoise(("val", number)),
        )
        with torch.no_grad():
            loss = _compute_objective(model, x, x_adv, y, objective, precision="float32")
        total += len(x) * float(loss)
    total = float(distributed.sum_ranks(torch.tensor(total, dtype=torch.float64)))
    return total / len(data)


def _compute_objective(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    objective: Objective,
    *,
    precision: str,
) -> Tensor:
    with autocast(x.device, precision):
        clean, attacked = map(_at_least_float32, _pass_batches(model, x, x_adv, objective))
    loss = objective.loss(
        clean if objective.uses_clean else None, attacked if objective.uses_attacked else None, y
    )
    if not isinstance(loss, Tensor) or loss.shape not in ((), y.shape):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ThreatError(
            f"objective {objective}: returned {got} for {len(y)} samples, "
            f"expected a loss for each, ({len(y)},)"
        )
    return loss.mean()


def _pass_batches(
    model: nn.Module, x: Tensor, x_adv: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Return the logits of the clean and the attacked batch; of one batch twice if one is used."""
    if not (objective.uses_clean and objective.uses_attacked) or _is_view_of(x_adv, x):
        logits = call_network(model, x_adv if objective.uses_attacked else x)
        return logits, logits
    if not (objective.separate_passes and model.training):  # in eval mode the logits are the same
        clean, attacked = call_network(model, torch.cat([x, x_adv])).chunk(2)
        return clean, attacked
    with torch.no_grad():  # a second update of the running statistics; the logits are those below
        call_network(model, x)
    attacked = call_network(model, x_adv)
    return call_network(model, x), attacked


def _is_view_of(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are one: a clean "attack" returns the images themselves."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _model_for_attack(model: nn.Module, data: Split, precision: str) -> nn.Module:
    """Return the network that an attack in `precision` searches with: folded for bfloat16."""
    return fold_batchnorm(model, next(passes(data))[0][:2]) if precision == "bfloat16" else model

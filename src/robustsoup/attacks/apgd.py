"""APGD and PGD as plain functions of (model, x, y, threat).

`apgd` and `pgd` are for evaluation, `apgd_train` is for adversarial training. The two forms of
APGD differ: see their docstrings.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from robustsoup.attacks.attempts import run_attack
from robustsoup.attacks.forward import (
    ImageBatch,
    LabelBatch,
    frozen_eval,
    input_gradient,
    loss_without_gradient,
)
from robustsoup.attacks.lanes import lane_count, run_in_lanes
from robustsoup.attacks.losses import Loss, ce
from robustsoup.attacks.projections import as_column
from robustsoup.attacks.steps import Stage, StepSchedule, advance, initial_state, observe
from robustsoup.errors import RequestError
from robustsoup.gradients import gradients_enabled
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

MIN_LANE_IMAGES = 16
"""Smallest share of a training batch that is worth a lane."""
TRAINING_TOPK = 0.05
"""First share of pixels that a step in L1 moves in training, as in Croce and Hein 2021."""


def apgd(
    model: nn.Module | Callable[[Tensor], object],
    x: ImageBatch,
    y: LabelBatch,
    threat: ThreatModel | str,
    *,
    steps: int = 100,
    loss: str | Loss = "ce",
    restarts: int = 1,
    targets: int = 9,
    eot: int = 1,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
) -> Tensor:
    """Attack images with AutoPGD, in the form that evaluations use.

    The result for an image depends only on the image, its id and the seed, not on the batch: each
    image has its own noise, and every pass over the network has one fixed, padded shape. An image
    that the network misclassifies is returned unchanged. In L1, the search spends 30 % of the
    steps at 3 eps, 30 % at 2 eps and 40 % at eps, as AutoAttack does.

    The network is attacked in eval mode and left as it was; no global random state is used.

    Args:
        model: Network or function that maps (b, ...) images to (b, classes) logits: a tensor, the
            first element of a tuple, or the entry "logits". Normalisation belongs inside. The
            networks that a function calls must be in eval mode.
        x: (n, ...) float32 or float64 images in [0, 1], on the network's device; a tensor or an
            array.
        y: (n,) integer labels; a tensor, an array or a list.
        threat: Norm and radius in units of x, such as "Linf 8/255", "L2 0.5" or "L1 12"; "clean"
            returns a copy of x.
        steps: Number of steps, at least 1.
        loss: Loss to maximise: "ce", "dlr" (3 classes or more), "targeted dlr" (4 or more), or a
            function (logits (b, classes), y (b,)) -> (b,).
        restarts: Number of random starts; each attacks the images that no earlier one broke.
        targets: Number of most likely other classes that "targeted dlr" tries in turn.
        eot: Number of passes to average each gradient over, for stochastic networks (expectation
            over transformation).
        seed: Seed of the random starts.
        ids: (n,) int64 sample numbers, which seed each image's noise; 0..n-1 by default.
        batch_size: Largest number of images in a pass; 32 on a CPU (which is also the most it
            takes) and 500 on a GPU by default.
        precision: Arithmetic of the search: "float32", "bfloat16" or "auto". Every reported
            adversarial example is misclassified in float32.

    Returns:
        (n, ...) images in [0, 1] and within eps of x: the first misclassified point of each
        search, else its point of highest loss.

    Raises:
        RequestError: If a setting is invalid, or the loss needs more classes.
        DataError: If x is not float32 or float64 in [0, 1], or x and y differ in length.
        ModelError: If the network does not return (b, classes) logits, a label has no class, or a
            function calls a network in train mode.
        Diverged: If the network's logits contain NaN or infinity.

    Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208.
    """
    settings = AttackSettings(
        attack="apgd",
        loss=loss,
        steps=steps,
        restarts=restarts,
        targets=targets,
        eot=eot,
        seed=seed,
        precision=precision,
        batch_size=batch_size,
    )
    return run_attack(model, x, y, ThreatModel.parse(threat), settings, ids=ids).x_adv


def pgd(
    model: nn.Module | Callable[[Tensor], object],
    x: ImageBatch,
    y: LabelBatch,
    threat: ThreatModel | str,
    *,
    steps: int = 20,
    loss: str | Loss = "ce",
    restarts: int = 1,
    targets: int = 9,
    eot: int = 1,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
) -> Tensor:
    """Attack images with projected gradient descent, a baseline that is weaker than `apgd`.

    Every search has a random start and `steps` steps of fixed size 2.5 eps / steps, without
    momentum. In L1, a step moves the fifth of the pixels with the largest gradients.

    Args:
        model: As for `apgd`.
        x: (n, ...) float32 or float64 images in [0, 1], on the network's device; a tensor or an
            array.
        y: (n,) integer labels; a tensor, an array or a list.
        threat: Norm and radius in units of x, such as "Linf 8/255"; "clean" returns a copy of x.
        steps: Number of steps, at least 1.
        loss: As for `apgd`.
        restarts: Number of random starts.
        targets: Number of most likely other classes that "targeted dlr" tries in turn.
        eot: Number of passes to average each gradient over.
        seed: Seed of the random starts.
        ids: (n,) int64 sample numbers, which seed each image's noise; 0..n-1 by default.
        batch_size: As for `apgd`.
        precision: As for `apgd`.

    Returns:
        (n, ...) images in [0, 1] and within eps of x: the first misclassified point of each
        search, else its point of highest loss.

    Raises:
        RequestError, DataError, ModelError, Diverged: As for `apgd`.

    Source: Madry et al. 2018, arXiv:1706.06083.
    """
    settings = AttackSettings(
        attack="pgd",
        loss=loss,
        steps=steps,
        restarts=restarts,
        targets=targets,
        eot=eot,
        seed=seed,
        precision=precision,
        batch_size=batch_size,
    )
    return run_attack(model, x, y, ThreatModel.parse(threat), settings, ids=ids).x_adv


@gradients_enabled()
@torch.no_grad()
def apgd_train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel | str,
    *,
    steps: int = 2,
    loss: Loss = ce,
    precision: str = "float32",
    start: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Attack a training batch with AutoPGD, in the form that adversarial training uses.

    Unlike `apgd`, the search starts at x and returns the point of highest loss of every image,
    including images that are misclassified already and images that are never fooled. It uses no
    randomness, and one cold stage in L1. It takes steps + 1 forward passes and `steps` gradients.

    The network is attacked in eval mode and left as it was. On a CPU the batch is divided among
    the cores.

    Args:
        model: Network that maps (b, ...) images to (b, classes) logits.
        x: (b, ...) float images in [0, 1], on the network's device; not checked.
        y: (b,) int64 labels, on the same device.
        threat: Norm and radius in units of x, such as "Linf 8/255"; "clean" returns x itself.
        steps: Number of steps, at least 1.
        loss: Loss to maximise, a function (logits (b, classes), y (b,)) -> (b,).
        precision: "float32" or "bfloat16" (autocast).
        start: (b, ...) points in the ball and the box to start from; x by default.
        target: (b, ...) one row for each image; the loss is then called as
            loss(logits, y, target).

    Returns:
        (b, ...) images in [0, 1] and within eps of x.

    Raises:
        RequestError: If `steps` is below 1.
        ThreatError: If `threat` cannot be parsed, or its ball holds every image.

    Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208.
    """
    threat = ThreatModel.parse(threat)
    threat.check_shape(x.shape[1:])
    if threat.is_clean:
        return x
    if steps < 1:
        raise RequestError(f"attack steps: got {steps}, expected at least 1")
    schedule = StepSchedule.for_threat(threat, steps, staged=False)
    attack = partial(highest_loss_points, model, schedule=schedule, loss=loss, precision=precision)
    batch = [x, y, x if start is None else start, *([] if target is None else [target])]
    batch = [tensor.clone() if tensor.is_inference() else tensor for tensor in batch]
    parts = max(1, min(lane_count(x.device), len(x) // MIN_LANE_IMAGES))
    with frozen_eval(model):
        if parts == 1:
            return attack(*batch)
        shares = zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True)
        return torch.cat(run_in_lanes([partial(attack, *share) for share in shares], x.device))


@torch.no_grad()
def highest_loss_points(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    target: Tensor | None = None,
    *,
    schedule: StepSchedule,
    loss: Loss,
    precision: str,
) -> Tensor:
    """Return the point of highest loss that APGD visits, for each image, in one thread.

    Args:
        model: Network in eval mode; see `frozen_eval`.
        x: (b, ...) images.
        y: (b,) labels.
        start: (b, ...) points to start from.
        target: (b, ...) third argument of a targeted loss.
        schedule: A schedule of one stage.
        loss: Loss to maximise.
        precision: "float32" or "bfloat16".
    """
    ((eps, steps),) = schedule.stages
    stage = Stage(topk=TRAINING_TOPK)
    state = initial_state(x, y, eps, start, schedule, stage=stage)
    periods = _periods_on_device(schedule, x.device)
    for _ in range(steps):
        _, value, grad = input_gradient(model, state.x_adv, y, loss, precision, target=target)
        observe(state, value, grad, periods, schedule.norm)
        advance(state, schedule.norm)
    value = loss_without_gradient(model, state.x_adv, y, loss, precision, target=target)
    return torch.where(as_column(value > state.loss_best, x), state.x_adv, state.x_best)


@lru_cache(maxsize=16)
def _periods_on_device(schedule: StepSchedule, device: torch.device) -> Tensor:
    """Return the schedule's table of checks; cached, as copying it makes the host wait."""
    return schedule.check_periods().to(device)

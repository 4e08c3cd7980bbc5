"""Standard AutoAttack through pyautoattack (the official attack files), a chunk at a time.

This module runs the original attacks, contains their side effects and checks every point that
they return.

Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from robustsoup.attacks.forward import frozen_eval, pass_size, predict_logits
from robustsoup.attacks.projections import as_column, constraint_excess, project
from robustsoup.errors import RequestError
from robustsoup.settings import SEED_LIMIT
from robustsoup.threats import ThreatModel

STANDARD_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The four attacks of the standard version, in order."""
POINT_TOLERANCE = 1e-6
"""How far a point may leave the ball or the box, in float64."""
GRAPH_BYTES = 2 * 2**30
"""Most that the passes of a batch keep for its gradient; beyond it, passes are computed again."""
_MIN_CLASSES = 4
_MAX_TARGETS = 9


@dataclass(frozen=True)
class AutoAttackPlan:
    """The attacks that AutoAttack runs, and their budgets.

    Attributes:
        attacks: Some of STANDARD_ATTACKS, in order.
        targets: Number of other classes that apgd-t (in L1 at most 5, as in the standard) and
            fab-t try: classes - 1, at most 9.
        label: "standard" for 10 classes or more, else "non-standard (N targets)".
        queries: Number of queries of square; the standard's unless lowered for a test.
        steps: Number of steps of the other attacks; the standard's unless lowered for a test.
    """

    attacks: tuple[str, ...] = STANDARD_ATTACKS
    targets: int = _MAX_TARGETS
    label: str = "standard"
    queries: int = 5000
    steps: int = 100


def plan_autoattack(classes: int, threat: ThreatModel) -> AutoAttackPlan:
    """Plan AutoAttack for a network of `classes` classes.

    Args:
        classes: Number of classes.
        threat: Threat model, for error messages.

    Raises:
        RequestError: For fewer than 4 classes, or if pyautoattack is not installed.
    """
    if classes < _MIN_CLASSES:
        raise RequestError(
            f"autoattack on {threat}: got {classes} classes, expected at least {_MIN_CLASSES}, "
            "because its targeted DLR loss compares 4; use the attack strong"
        )
    _import_pyautoattack()
    targets = min(classes - 1, _MAX_TARGETS)
    is_standard = targets == _MAX_TARGETS
    label = "standard" if is_standard else f"non-standard ({targets} targets)"
    return AutoAttackPlan(targets=targets, label=label)


def attack_chunk(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    plan: AutoAttackPlan,
    seed: int,
    finished: int = 0,
    on_attack: Callable[[Tensor, Tensor, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attack images that the network classifies correctly.

    Each attack receives, as one batch, the images that no earlier attack broke. The noise depends
    only on (seed, attack); its effect on one image depends on the other images of the chunk.

    Args:
        model: Network; its state is restored. It is called with all unbroken images at once, so
            InPasses limits its memory.
        x: (n, c, h, w) float32 images in [0, 1], on the network's device.
        y: (n,) int64 labels, on the same device.
        threat: Threat model.
        plan: The attacks and their budgets.
        seed: Seed of the noise.
        finished: Number of attacks in `plan` that none of the images broke under before.
        on_attack: Called as on_attack(points, by, finished) after each attack, with what would be
            returned if it were the last.

    Returns:
        Points (n, c, h, w), and the index in `plan.attacks` of the attack that broke each image
        (n,) int64, on the device of x. An unbroken image has index -1 and is returned unchanged.
        The point of a broken image lies in the ball and the box (tolerance 1e-6, in float64) and
        is misclassified in float32.

    Raises:
        RequestError: Before any work, if pyautoattack is not installed or its Square attack
            cannot tile images of this size.
    """
    _import_pyautoattack()
    # NCHW, because pyautoattack reshapes tensors like x into rows.
    x_adv, by = x.clone(memory_format=torch.contiguous_format), torch.full_like(y, -1)
    if threat.is_clean or len(x) == 0:
        if on_attack:
            on_attack(x_adv, by, len(plan.attacks))
        return x_adv, by
    # FAB would accumulate gradients in the weights if they were not frozen.
    with _contained_side_effects(), frozen_eval(model):
        if "square" in plan.attacks:
            check_square_tiling(tuple(x.shape[1:]), threat)
        for index, name in list(enumerate(plan.attacks))[finished:]:
            unbroken = (by < 0).nonzero().flatten()
            if len(unbroken):
                attack_seed = _seed_of_attack(seed, name)
                runner = _make_runner(name, model, threat, plan, seed=attack_seed, device=x.device)
                clean, labels = x_adv[unbroken], y[unbroken]
                points, _ = runner.run_standard_evaluation(clean, labels, batch_size=len(unbroken))
                points, broken = _certify_points(model, points, clean, labels, threat)
                x_adv[unbroken[broken]], by[unbroken[broken]] = points[broken], index
            if on_attack:
                on_attack(x_adv, by, index + 1)
    return x_adv, by


class InPasses(nn.Module):
    """A network whose batches are computed in passes of at most `size` images.

    pyautoattack takes the gradient of a whole chunk at once. Small passes stay in the caches of a
    CPU. If all passes would keep more than GRAPH_BYTES for the gradient, all but the first are
    computed again when the gradient is taken.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes) of images (b, ...)."""
        first, *others = x.split(self.size)
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor.detach()  # the graph would never be freed if it held its own outputs

        with saved_tensors_hooks(count, lambda tensor: tensor):
            logits = [self.model(first)]
        if kept * len(others) > GRAPH_BYTES:
            logits += [checkpoint(self.model, part, use_reentrant=False) for part in others]
        else:
            logits += [self.model(part) for part in others]
        return torch.cat(logits)


def _import_pyautoattack() -> ModuleType:
    try:
        import pyautoattack
    except ImportError:
        raise RequestError(
            "autoattack: pyautoattack is not installed; pip install 'robustsoup[autoattack]'"
        ) from None
    return pyautoattack


def _seed_of_attack(seed: int, name: str) -> int:
    return (seed * 0x9E3779B97F4A7C15 + STANDARD_ATTACKS.index(name) + 1) % SEED_LIMIT


def _make_runner(
    name: str,
    model: nn.Module,
    threat: ThreatModel,
    plan: AutoAttackPlan,
    *,
    seed: int,
    device: torch.device,
) -> Any:
    """Return pyautoattack's standard version, narrowed to one attack."""
    make_autoattack: Any = _import_pyautoattack().AutoAttack  # its annotations are too narrow

    # version="custom" would take five restarts where the standard takes one.
    runner = make_autoattack(
        model, norm=threat.norm, eps=threat.eps, seed=seed, device=device, version="standard"
    )
    runner.attacks_to_run, runner.verbose = [name], False
    for attack in (runner.apgd_targeted, runner.fab):
        attack.n_target_classes = min(attack.n_target_classes, plan.targets)
    runner.square.n_queries = plan.queries
    runner.fab.n_iter = plan.steps
    for apgd in (runner.apgd, runner.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = plan.steps
        apgd.n_iter_2 = max(int(0.22 * plan.steps), 1)
        apgd.n_iter_min = max(int(0.06 * plan.steps), 1)
        apgd.size_decr = max(int(0.03 * plan.steps), 1)
    return runner


def _certify_points(
    model: nn.Module, points: Tensor, x: Tensor, y: Tensor, threat: ThreatModel
) -> tuple[Tensor, Tensor]:
    """Return the points (b, ...), and which are feasible and misclassified (b,) bool.

    The float32 sums of APGD leave an L1 ball of radius 12 by up to 1.3e-5, so points outside are
    projected first.
    """
    points = points.clamp(0.0, 1.0)
    outside = constraint_excess(points, x, threat) > POINT_TOLERANCE
    eps = torch.full((len(x),), threat.eps, device=x.device, dtype=x.dtype)
    points = torch.where(as_column(outside, x), project(points, x, eps, threat.norm), points)
    logits = predict_logits(
        model, lambda rows: points[rows.to(x.device)], len(x), pass_size(x.device), x.device
    )
    # NaN is never feasible, because every comparison with it is false.
    feasible = constraint_excess(points, x, threat) <= POINT_TOLERANCE
    return points, feasible & (logits.argmax(1).to(y.device) != y)


def check_square_tiling(shape: tuple[int, ...], threat: ThreatModel) -> None:
    """Check, without a query, that Square can start: in L2 and L1 its tiling fails on some sizes.

    Args:
        shape: Shape of an image, (c, h, w).
        threat: Threat model.

    Raises:
        RequestError: If Square cannot start. Without this check, the error would surface only after
            hours of other attacks.
    """
    from pyautoattack.square import SquareAttack

    def two_classes(x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)

    square = SquareAttack(
        two_classes,
        norm=threat.norm,
        eps=threat.eps,
        n_queries=0,
        device="cpu",
    )
    try:
        with _contained_side_effects():
            square.perturb(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long))
    except (RuntimeError, ZeroDivisionError):
        raise RequestError(
            f"autoattack on {threat}: pyautoattack's Square cannot tile images of "
            f"{shape[1]} x {shape[2]} in {threat.norm}; resize the images (8, 16, 28, 32, 64 and "
            "224 square work) or use the attack apgd"
        ) from None


@contextlib.contextmanager
def _contained_side_effects() -> Generator[None, None, None]:
    """Restore the global random state and the trace function, and keep warnings off the screen.

    pyautoattack reseeds the global generators and drops the trace function of coverage tools and
    debuggers. Without a handler its warnings would be printed into the progress display; handlers
    that the user has added still receive them.
    """
    logger, handler, trace = logging.getLogger("auto-attack"), logging.NullHandler(), sys.gettrace()
    logger.addHandler(handler)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        logger.removeHandler(handler)
        sys.settrace(trace)

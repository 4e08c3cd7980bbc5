"""Standard AutoAttack, by PyPI's `pyautoattack` (the official attack files), one chunk of samples at a time.

Nothing of it is rewritten. This module only keeps its side effects in, and believes no point that it has not checked.
Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from robustsoup.attacks.engine import excess_of
from robustsoup.attacks.forward import frozen_eval, pass_rows, predict
from robustsoup.attacks.projections import project
from robustsoup.errors import RequestError
from robustsoup.threats import ThreatModel

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The standard's four, in order."""

TOLERANCE = 1e-6
_LEAST_CLASSES = 4
_MOST_TARGETS = 9
_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class Standard:
    """What can be run for a number of classes.

    attacks: of ATTACKS, in order; targets: how many other classes apgd-t (in L1 at most 5, as in the standard) and fab-t
    try, classes - 1 and at most 9; label: "standard" for 10 classes or more, else "non-standard (N targets)".
    """

    attacks: tuple[str, ...]
    targets: int
    label: str


def plan_autoattack(classes: int, threat: ThreatModel) -> Standard:
    """What AutoAttack runs against `threat` on a network of `classes` classes.

    Raises RequestError for under 4 classes, or if pyautoattack is not installed.
    """
    if classes < _LEAST_CLASSES:
        raise RequestError(
            f"autoattack on {threat}: got {classes} classes, expected at least {_LEAST_CLASSES}, "
            "which its targeted DLR loss compares; take the attack apgd"
        )
    _load()
    targets = min(classes - 1, _MOST_TARGETS)
    return Standard(
        ATTACKS,
        targets,
        "standard" if targets == _MOST_TARGETS else f"non-standard ({targets} targets)",
    )


def attack_chunk(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    standard: Standard,
    seed: int,
    queries: int = 5000,
    steps: int = 100,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attack samples that the network gets right: (x_adv (n, c, h, w), by (n,) int64) on the device of x.

    x: (n, c, h, w) float32 in [0,1], on the network's device; y: (n,) int64. Each attack is given, as one batch, what
    those before it left unbroken. by: which of standard.attacks broke the sample; -1 where none did, and x_adv is x.
    Every broken sample's point lies in the box and the ball (atol 1e-6, in float64) and is misclassified in float32.
    Noise comes from (seed, attack) alone; what it does to one sample depends on the others of the chunk.
    queries (of Square) and steps (of the others): the standard's, unless lowered for a test. on_progress(done, total)
    counts samples times attacks.

    Raises RequestError, before any work, if pyautoattack is not installed or its Square cannot start on h x w images.
    """
    _load()
    # NCHW: pyautoattack views tensors like x as rows.
    x_adv, by = x.clone(memory_format=torch.contiguous_format), torch.full_like(y, -1)
    if threat.is_clean or len(x) == 0:
        return x_adv, by
    attacks, total = standard.attacks, len(x) * len(standard.attacks)
    with (
        _side_effects_undone(),
        frozen_eval(model),
    ):  # frozen: FAB would add to the gradients of the weights
        if "square" in attacks:
            _check_square(tuple(x.shape[1:]), threat)
        for number, name in enumerate(attacks):
            left = (by < 0).nonzero().flatten()
            if len(left):
                runner = _runner(
                    name, model, x.device, threat, standard, _seed(seed, name), queries, steps
                )
                clean, labels = x_adv[left], y[left]
                points, _ = runner.run_standard_evaluation(clean, labels, batch_size=len(left))
                points, broken = _check_points(model, points, clean, labels, threat)
                x_adv[left[broken]], by[left[broken]] = points[broken], number
            if on_progress:
                on_progress(total - int((by < 0).sum()) * (len(attacks) - number - 1), total)
    return x_adv, by


def _load() -> ModuleType:
    try:
        import pyautoattack
    except ImportError:
        raise RequestError(
            "autoattack: pyautoattack is not installed; pip install 'robustsoup[autoattack]'"
        ) from None
    return pyautoattack


def _seed(seed: int, name: str) -> int:
    return (seed * 0x9E3779B97F4A7C15 + ATTACKS.index(name) + 1) & _MASK


def _runner(
    name: str,
    model: nn.Module,
    device: torch.device,
    threat: ThreatModel,
    standard: Standard,
    seed: int,
    queries: int,
    steps: int,
):
    """pyautoattack's AutoAttack with the parameters of its standard version, narrowed to one attack."""
    # Not version="custom", which takes five restarts where the standard takes one.
    runner = _load().AutoAttack(
        model, norm=threat.norm, eps=threat.eps, seed=seed, device=device, version="standard"
    )
    runner.attacks_to_run, runner.verbose = [name], False
    runner.apgd_targeted.n_target_classes = min(
        runner.apgd_targeted.n_target_classes, standard.targets
    )
    runner.fab.n_target_classes = min(runner.fab.n_target_classes, standard.targets)
    runner.square.n_queries = queries
    runner.fab.n_iter = steps
    for apgd in (runner.apgd, runner.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = steps
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (
            max(int(part * steps), 1) for part in (0.22, 0.06, 0.03)
        )
    return runner


def _check_points(
    model: nn.Module, points: Tensor, x: Tensor, y: Tensor, threat: ThreatModel
) -> tuple[Tensor, Tensor]:
    """The points (b, ...) and which of them (b,) bool are feasible and misclassified.

    APGD's float32 sums leave an L1 ball of radius 12 by up to 1.3e-5: points outside are first brought back.
    """
    points = points.clamp(0.0, 1.0)
    outside = excess_of(points, x, threat) > TOLERANCE
    eps = torch.full((len(x),), threat.eps, device=x.device, dtype=x.dtype)
    points = torch.where(
        outside.view(-1, *[1] * (x.dim() - 1)), project(points, x, eps, threat.norm), points
    )
    logits = predict(
        model, lambda at: points[at.to(x.device)], len(x), pass_rows(x.device), x.device
    )
    # NaN is in no ball: both comparisons with it are false.
    return points, (excess_of(points, x, threat) <= TOLERANCE) & (
        logits.argmax(1).to(y.device) != y
    )


def _check_square(shape: tuple[int, ...], threat: ThreatModel) -> None:
    """Raises RequestError if Square fails on images of `shape`: in L2 and L1 its first tiling overruns some sizes.

    No query is spent. Found out first, and not after the hours of the attacks before it.
    """
    from pyautoattack.square import SquareAttack

    square = SquareAttack(
        lambda x: torch.tensor([[1.0, 0.0]]).repeat(len(x), 1),
        norm=threat.norm,
        eps=threat.eps,
        n_queries=0,
        device="cpu",
    )
    try:
        square.perturb(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long))
    except (RuntimeError, ZeroDivisionError):
        raise RequestError(
            f"autoattack on {threat}: pyautoattack's Square cannot tile images of {shape[1]} x {shape[2]} in "
            f"{threat.norm}; take another size (8, 16, 28, 32, 64 and 224 square work), or the attack apgd"
        ) from None


@contextlib.contextmanager
def _side_effects_undone() -> Iterator[None]:
    """Give back the global random state, which is reseeded, and the trace function (coverage, debuggers), which is dropped.

    Without a handler its warnings would be printed into the display of progress; handlers of the user's still get them.
    """
    logger, silent, trace = logging.getLogger("auto-attack"), logging.NullHandler(), sys.gettrace()
    logger.addHandler(silent)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        logger.removeHandler(silent)
        sys.settrace(trace)

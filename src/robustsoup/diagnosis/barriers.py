"""Loss and accuracy on the straight line between two networks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from robustsoup.attacks.forward import frozen_eval
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split
from robustsoup.progress import Progress
from robustsoup.soups.mixing import mix
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.adversarial_loss import measure_robust_loss

LINE_POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The points t of the line (1 - t) a + t b at which the mixed network is evaluated."""
MIN_LOSS_RANGE = 0.1
"""Lower bound on the denominator of `Curve.relative_barrier`, as a fraction of log(classes).

Prevents spurious barriers between barely trained networks.
"""
ATTACK_STEPS = 10

LinePoint = tuple[int, int, float]
"""(a, b, t): the mix (1 - t) a + t b of checkpoints number a and b; (a, a, 0) is a itself."""


@dataclass(frozen=True)
class Curve:
    """Cross-entropy and accuracy along the line between two networks.

    Attributes:
        loss: Mean cross-entropy in nats at each of LINE_POINTS.
        accuracy: Accuracy in [0, 1] at each of LINE_POINTS.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """Compute max_t [L(t) - ((1 - t) L(0) + t L(1))].

        At least 0; infinite where a loss is not finite.

        Source: Frankle et al. 2020, arXiv:1912.05671, section 2 (which subtracts the mean of the
        ends instead).
        """
        if not all(map(math.isfinite, self.loss)):
            return math.inf
        return max(_excess_over_chord(self.loss))

    @property
    def drop(self) -> float:
        """Compute the largest drop of accuracy below the chord; 0.1 is ten points."""
        return max(0.0 - excess for excess in _excess_over_chord(self.accuracy))

    def relative_barrier(self, classes: int) -> float:
        """Divide the barrier by the loss range: log(classes) less the mean loss of the ends.

        The loss range counts as at least MIN_LOSS_RANGE * log(classes).
        """
        if math.isinf(self.barrier):
            return math.inf
        guessing_loss = math.log(classes)
        loss_range = guessing_loss - (self.loss[0] + self.loss[-1]) / 2
        return self.barrier / max(loss_range, MIN_LOSS_RANGE * guessing_loss)


@dataclass(frozen=True)
class Pair:
    """Two checkpoints, their distance, and the curves between them.

    Attributes:
        a: Number of the first checkpoint.
        b: Number of the second checkpoint.
        distance: Euclidean norm of the difference of the parameters.
        relative: The distance divided by the norm of the base or, without a base, by the root mean
            square of the two norms.
        cosine: Cosine of the task vectors theta - theta_base or, without a base, of the weights;
            None where one of them is zero.
        curves: Threat (as text) -> curve; empty where the pair was not measured.
    """

    a: int
    b: int
    distance: float
    relative: float
    cosine: float | None
    curves: dict[str, Curve]


def measure_curves(
    checkpoints: Sequence[Checkpoint],
    pairs: Sequence[Pair],
    *,
    limit: int,
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    on_progress: Progress | None = None,
) -> list[Pair]:
    """Measure loss and accuracy along the lines of the `limit` most distant pairs.

    Args:
        checkpoints: Checkpoints of one network.
        pairs: Pairs of their numbers.
        limit: Number of pairs to measure.
        model: The network, on its device; its weights are overwritten.
        data: Samples to evaluate on.
        threat: Threat to evaluate under, besides clean inputs.
        on_progress: Receives the number of evaluated networks and their total.

    Returns:
        All pairs in the same order; the measured ones have curves.
    """
    farthest = sorted(range(len(pairs)), key=lambda i: -pairs[i].distance)[:limit]
    lines = {i: _points_of_line(pairs[i]) for i in farthest}
    ends = sorted({end for line in lines.values() for end in (line[0], line[-1])})
    points = [*ends, *(point for line in lines.values() for point in line[1:-1])]
    threats = list(dict.fromkeys((CLEAN, threat)))
    data = data.to(next(model.parameters()).device)
    results: dict[LinePoint, list[tuple[float, float]]] = {}
    for a, b, t in points:
        soup = checkpoints[a] if a == b else _mix_pair(checkpoints[a], checkpoints[b], t, model)
        soup.load_into(model)
        results[a, b, t] = measure_losses(model, data, threats)
        if on_progress:
            on_progress(len(results), len(points), "")
    measured = list(pairs)
    for i, line in lines.items():
        curves = {}
        for number, key in enumerate(map(str, threats)):
            losses, accuracies = zip(*(results[point][number] for point in line), strict=True)
            curves[key] = Curve(losses, accuracies)
        measured[i] = replace(pairs[i], curves=curves)
    return measured


def measure_losses(
    model: nn.Module, data: Split, threats: Sequence[ThreatModel]
) -> list[tuple[float, float]]:
    """Measure the mean cross-entropy in nats and the accuracy under each threat."""
    with frozen_eval(model):
        return [measure_robust_loss(model, data, threat, steps=ATTACK_STEPS) for threat in threats]


def _points_of_line(pair: Pair) -> list[LinePoint]:
    inside = [(pair.a, pair.b, t) for t in LINE_POINTS[1:-1]]
    return [(pair.a, pair.a, 0.0), *inside, (pair.b, pair.b, 0.0)]


def _mix_pair(first: Checkpoint, second: Checkpoint, t: float, model: nn.Module) -> Checkpoint:
    return mix([first, second], [1 - t, t], buffers="average", network=model)


def _excess_over_chord(values: Sequence[float]) -> list[float]:
    """Subtract the line between the first and last value; the result is exactly 0 at both ends."""
    return [
        0.0 if t in (0, 1) else value - ((1 - t) * values[0] + t * values[-1])
        for t, value in zip(LINE_POINTS, values, strict=True)
    ]

"""Barriers: what lies on the straight line between two networks."""

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
from robustsoup.training.adversarial_loss import robust_loss

ALONG = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The points t of the line (1 - t) a + t b that are judged."""
LEAST_ROOM = 0.1
"""The least that this way counts for, as a share of log(classes), so that noise does not part networks that hardly learned."""
ATTACK_STEPS = 10


@dataclass(frozen=True)
class Curve:
    """Mean cross-entropy (nats) and accuracy (0 to 1) at the points ALONG the line between two networks."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """max_t [L(t) - ((1 - t) L(0) + t L(1))], at least 0; infinite where a loss is not finite.

        Source: Frankle et al. 2020, arXiv:1912.05671, section 2 (there against the mean of the ends).
        """
        return max(_above_line(self.loss)) if all(map(math.isfinite, self.loss)) else math.inf

    @property
    def drop(self) -> float:
        """How far accuracy falls below the line between the ends at the worst point: 0.1 is ten points."""
        return max(0.0 - above for above in _above_line(self.accuracy))

    def share(self, classes: int) -> float:
        """The barrier as a share of log(classes) - (mean loss of the ends), or of a tenth of log(classes) if that is more."""
        if math.isinf(self.barrier):
            return math.inf
        guessing = math.log(classes)
        room = guessing - (self.loss[0] + self.loss[-1]) / 2
        return self.barrier / max(room, LEAST_ROOM * guessing)


@dataclass(frozen=True)
class Pair:
    """Two files, by their number; their distance and cosine, and what lies between them under each threat (as text).

    distance: the Euclidean norm of the difference of the parameters; relative: over the norm of the base, or, without
    one, over the root mean square of the two norms. cosine: of the task vectors theta - theta_base, or, without a base,
    of the weights; None where one is zero. curves: empty where the pair was not measured.
    """

    a: int
    b: int
    distance: float
    relative: float
    cosine: float | None
    curves: dict[str, Curve]


def walk(
    files: Sequence[Checkpoint],
    pairs: list[Pair],
    most: int,
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    on_progress: Progress | None,
) -> tuple[list[Pair], int]:
    """The pairs with the curves of the `most` that are farthest apart, and how many those are. Changes `model`."""
    chosen = sorted(range(len(pairs)), key=lambda i: -pairs[i].distance)[:most]
    ends = sorted({number for i in chosen for number in (pairs[i].a, pairs[i].b)})
    total, done = len(ends) + len(chosen) * (len(ALONG) - 2), 0
    data = data.to(next(model.parameters()).device)

    def judged(soup: Checkpoint) -> dict[str, tuple[float, float]]:
        nonlocal done
        soup.load_into(model)
        with frozen_eval(model):
            found = {
                str(t): robust_loss(model, data, t, steps=ATTACK_STEPS)
                for t in dict.fromkeys((CLEAN, threat))
            }
        done += 1
        if on_progress:
            on_progress(done, total, "")
        return found

    at = {number: judged(files[number]) for number in ends}
    pairs = list(pairs)
    for i in chosen:
        a, b = pairs[i].a, pairs[i].b
        inside = [
            judged(mix([files[a], files[b]], [1 - t, t], buffers="average", network=model))
            for t in ALONG[1:-1]
        ]
        points = [at[a], *inside, at[b]]
        curves = {
            key: Curve(*(tuple(part) for part in zip(*(p[key] for p in points), strict=True)))
            for key in at[a]
        }
        pairs[i] = replace(pairs[i], curves=curves)
    return pairs, len(chosen)


def _above_line(values: Sequence[float]) -> list[float]:
    """values less the line between the first and the last, at the points ALONG; exactly 0 at both ends."""
    return [
        0.0 if t in (0, 1) else value - ((1 - t) * values[0] + t * values[-1])
        for t, value in zip(ALONG, values, strict=True)
    ]

"""What an evaluation reuses: the verdicts of an earlier one, and points found on other networks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustsoup.attacks.attempts import check_points
from robustsoup.attacks.outcome import Outcome
from robustsoup.data import Split
from robustsoup.errors import RequestError
from robustsoup.evaluation.attackers import CHUNK_SAMPLES, Target
from robustsoup.evaluation.verdicts import Evaluation, Record
from robustsoup.threats import ThreatModel

POOL = "pool"
"""The name, among what can break a sample, of points that were found on other networks."""

SAME_ATTACK_KEYS = (
    "attack",
    "version",
    "loss",
    "steps",
    "restarts",
    "targets",
    "eot",
    "seed",
    "search_precision",
    "rows",
    "chunk",
    "stopped",
)
"""Keys whose values are equal in the records of two evaluations by the same attack."""


@dataclass(frozen=True)
class Reuse:
    """How an evaluation shares work with others; see the arguments of `evaluate`."""

    keep_points: bool
    pool: tuple[Evaluation, ...]
    after: Evaluation | None
    stop_below: int | None


def check_same_samples(evaluations: Sequence[Evaluation], data: Split) -> None:
    """Check that earlier evaluations begin with the samples of `data`.

    Raises:
        RequestError: if one of them does not.
    """
    for evaluation in evaluations:
        ids = evaluation.ids[: len(data)]
        if len(ids) < len(data) or not torch.equal(ids, data.ids.cpu()):
            raise RequestError(
                "evaluate: pool and after must be evaluations of the same samples; "
                "evaluate them on this split again"
            )


def pool_points(pool: Sequence[Evaluation], threat: ThreatModel) -> list[Tensor]:
    """Return the adversarial points of each evaluation of a pool, each (n, c, h, w).

    Raises:
        RequestError: if an evaluation has none for this threat.
    """
    points = []
    for evaluation in pool:
        verdicts = evaluation.threats.get(str(threat))
        if verdicts is None or verdicts.x_adv is None:
            raise RequestError(
                f"pool: an evaluation kept no points for {threat}; "
                "evaluate it again with keep_points=True"
            )
        points.append(verdicts.x_adv)
    return points


def try_pool(
    target: Target,
    threat: ThreatModel,
    pool: Sequence[Tensor],
    outcome: Outcome,
    *,
    attempts: int,
    by: int,
) -> None:
    """Try points that were found on other networks; samples that they break are settled.

    Args:
        target: the network and its samples.
        threat: threat model of the points.
        pool: tensors (n, c, h, w) of points, tried in order.
        outcome: where to record broken samples.
        attempts: number of attempts of the attack that follows.
        by: index of the pool among what can break a sample.
    """
    for points in pool:
        waiting = (target.samples.correct & ~outcome.broken).nonzero().flatten()

        def fetch(at: Tensor, points: Tensor = points) -> Tensor:
            on_device = points[at].to(target.device)
            return on_device.contiguous(memory_format=torch.channels_last)

        broken, margin = check_points(
            target.model, target.samples, fetch, waiting, size=target.rows, device=target.device
        )
        for part in waiting[broken].split(CHUNK_SAMPLES):
            outcome.record_points(part, fetch(part), target.samples.fetch(part), threat)
        at = waiting[broken]
        outcome.margin[at] = margin[broken]
        outcome.by[at], outcome.broken[at], outcome.settled[at] = by, True, attempts


def copy_verdicts(
    after: Evaluation,
    threat: ThreatModel,
    outcome: Outcome,
    *,
    protocol: Record,
    attempts: int,
) -> None:
    """Copy the verdicts of an earlier evaluation of the same network.

    Samples that it broke stay broken. Samples that survived the very same attack are settled.

    Args:
        after: the earlier evaluation.
        threat: threat model to copy.
        outcome: the outcome to write to, for the first n samples of `after`.
        protocol: what decides the new verdicts; its "broken_by" names what can break a sample.
        attempts: number of attempts of the new attack.
    """
    verdicts = after.threats.get(str(threat))
    if verdicts is None:
        return
    n = len(outcome.by)
    same_attack = all(after.record.get(key) == protocol.get(key) for key in SAME_ATTACK_KEYS)
    names = protocol["broken_by"]
    renumbered = torch.tensor([names.index(name) - 1 for name in after.record["broken_by"]])
    by = verdicts.by[:n]
    broken = by > 0
    settled = broken | (same_attack & (by == -1))
    outcome.by[broken] = renumbered[by[broken]]
    outcome.broken[broken], outcome.settled[settled] = True, attempts
    outcome.step[settled] = verdicts.step[:n][settled]
    outcome.norm[settled] = verdicts.norm[:n][settled]
    outcome.margin[by != 0] = verdicts.margin[:n][by != 0]
    if outcome.x_adv is not None and verdicts.x_adv is not None:
        outcome.x_adv[settled] = verdicts.x_adv[:n][settled]

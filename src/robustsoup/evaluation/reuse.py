"""Reuse the verdicts of an earlier evaluation, and adversarial points of other networks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustsoup.attacks.attempts import check_points
from robustsoup.attacks.outcome import Outcome
from robustsoup.data import Split
from robustsoup.errors import RequestError
from robustsoup.evaluation.attackers import CHUNK_SAMPLES, Target
from robustsoup.evaluation.comparison import ATTACK_KEYS
from robustsoup.evaluation.two_phase import attacked_rows
from robustsoup.evaluation.verdicts import Evaluation, Record
from robustsoup.threats import ThreatModel

POOL = "pool"
"""Name of the adversarial points of other networks in the record's "broken_by"."""

SAME_ATTACK_KEYS = (*ATTACK_KEYS, "rows", "chunk")
"""Keys whose values are equal in the records of two evaluations by the same attack."""


@dataclass(frozen=True)
class Reuse:
    """The work that an evaluation shares with others; see the arguments of `evaluate`."""

    keep_points: bool
    pool: tuple[Evaluation, ...]
    after: Evaluation | None
    subset: int | None
    others: tuple[Evaluation, ...] = ()


def check_same_samples(evaluations: Sequence[Evaluation], data: Split) -> None:
    """Check that earlier evaluations begin with the samples of `data`.

    Raises:
        RequestError: If an evaluation begins with other samples.
    """
    for evaluation in evaluations:
        if not _begins_with(evaluation, data):
            raise RequestError(
                "evaluate: pool, after and others must be evaluations of the same samples; "
                "evaluate them on this split again"
            )


def _begins_with(evaluation: Evaluation, data: Split) -> bool:
    """Compare ids and labels, and the data and the split where the record names them."""
    n, record = len(data), evaluation.record
    digest, split = record.get("data", {}).get("digest"), record.get("split")
    return (
        torch.equal(evaluation.ids[:n], data.ids.cpu())
        and torch.equal(evaluation.labels[:n], data.labels.cpu())
        and digest in (None, data.record.get("digest"))
        and split in (None, data.name)
    )


def check_same_network(after: Evaluation | None, digest: str | None) -> None:
    """Check that an earlier evaluation is of the network with this digest; modules have none.

    Raises:
        RequestError: If both digests are known and differ.
    """
    earlier = None if after is None else after.record.get("checkpoint")
    if earlier is not None and digest is not None and earlier != digest:
        raise RequestError(
            f"evaluate: after is an evaluation of checkpoint {earlier[:12]}, expected one of the "
            f"same network, checkpoint {digest[:12]}"
        )


def lacks_points(after: Evaluation, threats: Iterable[ThreatModel]) -> bool:
    """Return whether an evaluation has verdicts for some threat model without their points."""
    verdicts = [after.threats.get(str(threat)) for threat in threats]
    return any(item is not None and item.x_adv is None for item in verdicts)


def pool_points(pool: Sequence[Evaluation], threat: ThreatModel) -> list[Tensor]:
    """Return the adversarial points of each evaluation of a pool, each (n, c, h, w).

    Raises:
        RequestError: If an evaluation has no points for this threat.
    """
    points = []
    for evaluation in pool:
        verdicts = evaluation.threats.get(str(threat))
        if verdicts is None or verdicts.x_adv is None:
            raise RequestError(
                f"pool, others: an evaluation kept no points for {threat}; "
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
    """Try adversarial points of other networks; samples that they break are settled.

    Args:
        target: The network and its samples.
        threat: Threat model of the points.
        pool: Tensors (n, c, h, w) of points, tried in order.
        outcome: Receives the broken samples.
        attempts: Number of attempts of the attack that follows.
        by: Index of the pool in "broken_by", less 1.
    """
    for points in pool:
        waiting = (target.samples.correct & ~outcome.broken).nonzero().flatten()

        def fetch(samples: Tensor, points: Tensor = points) -> Tensor:
            on_device = points[samples].to(target.device)
            return on_device.contiguous(memory_format=torch.channels_last)

        broken, margin = check_points(
            target.model,
            target.samples,
            fetch,
            waiting,
            size=target.pass_size,
            device=target.device,
        )
        settled = waiting[broken]
        for chunk in settled.split(CHUNK_SAMPLES):
            outcome.record_points(chunk, fetch(chunk), target.samples.fetch(chunk), threat)
        outcome.margin[settled] = margin[broken]
        outcome.by[settled], outcome.broken[settled] = by, True
        outcome.settled[settled] = attempts


def is_same_attack(earlier: Evaluation, protocol: Record) -> bool:
    """Return whether an earlier evaluation used the attack of a protocol."""
    return all(earlier.record.get(key) == protocol.get(key) for key in SAME_ATTACK_KEYS)


def find_masking_check(
    after: Evaluation | None, threat: ThreatModel, *, protocol: Record, n: int
) -> Record | None:
    """Return the masking check of an identical attack on the same n samples; None if none."""
    if after is None or len(after.ids) != n or not is_same_attack(after, protocol):
        return None
    findings: Record | None = after.record.get("masking_check", {}).get(str(threat))
    return findings


def copy_verdicts(
    after: Evaluation,
    threat: ThreatModel,
    outcome: Outcome,
    *,
    protocol: Record,
    attempts: int,
) -> None:
    """Copy the verdicts of an earlier evaluation of the same network.

    Samples that it broke stay broken. Samples that it attacked by an identical attack, and that
    survived, are settled.

    Args:
        after: The earlier evaluation.
        threat: Threat model to copy.
        outcome: The outcome to write to, for the first n samples of `after`.
        protocol: Settings that decide the new verdicts, with "broken_by".
        attempts: Number of attempts of the new attack.
    """
    verdicts = after.threats.get(str(threat))
    if verdicts is None:
        return
    n = len(outcome.by)
    attacked = attacked_rows(after.ids, after.record)[:n] & is_same_attack(after, protocol)
    names = protocol["broken_by"]
    renumbered = torch.tensor([names.index(name) - 1 for name in after.record["broken_by"]])
    by = verdicts.by[:n]
    broken = by > 0
    settled = broken | (attacked & (by == -1))
    outcome.by[broken] = renumbered[by[broken]]
    outcome.broken[broken], outcome.settled[settled] = True, attempts
    outcome.step[settled] = verdicts.step[:n][settled]
    outcome.norm[settled] = verdicts.norm[:n][settled]
    outcome.margin[by != 0] = verdicts.margin[:n][by != 0]
    if outcome.x_adv is not None and verdicts.x_adv is not None:
        outcome.x_adv[settled] = verdicts.x_adv[:n][settled]

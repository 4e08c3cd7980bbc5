"""Racing: candidates that can no longer win leave early, by paired tests in rounds.

The samples have one random order, the same for all candidates, and form rounds of 512. After each
round the candidate with the most hits so far leads. Another candidate leaves when a test shows that
the leader has more hits on all samples, not only on those of the rounds so far. The test may be
looked at after every sample and compares the same samples, so neither the number of rounds nor the
luck of an easy round counts for it. Its level is alpha / (K - 1) for K candidates, so the best
candidate of all samples leaves with a probability of at most alpha, whichever candidate leads.

The leader runs all rounds, so its accuracy is that of a full evaluation. The verdict of a round
on the rounds up to it alone. Work may run ahead; neither its timing nor the number of processes
enters a verdict or a record.

The test bets against the hypothesis that the leader is not ahead on all n samples (Waudby-Smith and
Ramdas 2020, arXiv:2006.04347, section 4: sampling without replacement). Its target is the answer of
a full evaluation of these samples. Whether the winner meets a requirement on other samples is
another question.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hits = NDArray[np.bool_]
"""(t,) verdicts of the first t samples in the order of the race."""

ROUND = 512
"""Samples of a round."""
BETS = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
"""Shares of the largest stake that the test bets; their average is a test too."""


def race_order(ids: Sequence[int], *, seed: int) -> NDArray[np.int64]:
    """Return the order of the samples of a race, which depends on their ids and the seed alone."""

    def draw(row: int) -> bytes:
        return hashlib.sha256(f"race:{seed}:{ids[row]}".encode()).digest()

    return np.array(sorted(range(len(ids)), key=draw), dtype=np.int64)


def lead_evidence(leader: Hits, other: Hits, n: int) -> float:
    """Return the evidence that one candidate has more hits on all n samples than another.

    If it has not, the evidence ever reaches 1 / level with a probability of at most `level`,
    however often it is looked at.

    Args:
        leader: (t,) verdicts on the first t of n samples in random order.
        other: (t,) verdicts of the other candidate on the same samples.
        n: Number of samples.

    Returns:
        The largest capital so far of bets on the lead, from a capital of 1; infinite if the samples
        that are left cannot change the lead.
    """
    x = (1.0 + leader.astype(np.float64) - other) / 2
    t = np.arange(len(x))
    total = np.concatenate([[0.0], np.cumsum(x)])
    if total[-1] > n / 2:  # even if the other alone is right on all samples that are left
        return math.inf
    # The mean of the samples that are left if the two candidates tie on all n.
    mean = np.clip((n / 2 - total[:-1]) / (n - t), 1e-12, 1)
    stakes = BETS[:, None] * np.minimum(1 / mean, 2.0)
    capital = np.exp(np.cumsum(np.log1p(stakes * (x - mean)), axis=1)).mean(0)
    return float(capital.max(initial=1.0))


@dataclass(frozen=True)
class Standing:
    """Where a race stands after its last complete round.

    Attributes:
        rounds: Number of complete rounds.
        leader: The candidate with the most hits; None before the first round.
        left_after: For each candidate that left, the number of rounds that it ran.
        waiting: Pairs (candidate, round) that the next round needs; empty at the end.
    """

    rounds: int
    leader: str | None
    left_after: Mapping[str, int]
    waiting: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Race:
    """A race of candidates for the most hits on n samples.

    Attributes:
        names: The candidates; of a tie the earlier leads.
        n: Number of samples.
        alpha: Probability with which the best candidate may leave.
        length: Samples of a round.
    """

    names: tuple[str, ...]
    n: int
    alpha: float = 0.05
    length: int = ROUND

    @property
    def rounds(self) -> int:
        """The number of rounds of a candidate that never leaves."""
        return -(-self.n // self.length)

    def samples(self, number: int) -> slice:
        """Return the places of round `number`, from 0, in the order of the race."""
        return slice(number * self.length, min((number + 1) * self.length, self.n))

    def standing(self, hits: Mapping[str, Sequence[Hits]]) -> Standing:
        """Return where the race stands.

        Args:
            hits: For each candidate, the verdicts of its rounds so far, in their order; those of
                rounds that the race has not reached are ignored.
        """
        left: dict[str, int] = {}
        leader: str | None = None
        for number in range(self.rounds):
            running = [name for name in self.names if name not in left]
            waiting = tuple((name, number) for name in running if len(hits[name]) <= number)
            if waiting:
                return Standing(number, leader, left, waiting)
            so_far = {name: np.concatenate(hits[name][: number + 1]) for name in running}
            leader = max(running, key=lambda name: int(so_far[name].sum()))
            for name in running:
                if name != leader and self._has_lost(so_far[leader], so_far[name]):
                    left[name] = number + 1
        return Standing(self.rounds, leader, left, ())

    def _has_lost(self, leader: Hits, other: Hits) -> bool:
        return lead_evidence(leader, other, self.n) >= (len(self.names) - 1) / self.alpha

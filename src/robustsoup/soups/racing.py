"""Racing: screened soups that can no longer win leave early, by tests in rounds.

The samples have one random order, the same for all soups (`robustsoup.evaluation.two_phase`), and
form rounds: a short first one, then one at each multiple of 512 samples. A soup that was attacked
briefly on all samples is attacked in full round after round. After each of its rounds a test shows,
or does not show, that it will have fewer hits on all samples than the leader, the soup with the
most hits among those that ran all rounds. If it does, the soup leaves the race.

The test knows the survivors of the brief attack. The soup stays level with the leader only if the
full attack breaks at most survivors - hits(leader) of them, so the test is about the number of
misses among the survivors. It compares counts on the same samples: what the brief attack settles
for a soup adds no sampling error. It may be looked at after each round (`miss_evidence`), and its
level is alpha / (K - 1) for K soups, so the best soup leaves with a probability of at most alpha,
whichever soups lead. Its target is the answer of a full evaluation of these samples; whether the
winner meets a requirement on other samples is another question.

The verdict of a round depends on the counts of the rounds up to it alone. Neither the timing of the
work nor the number of processes enters a verdict or a record.
"""

from dataclasses import dataclass

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.two_phase import miss_evidence

ROUND = 512
"""Samples of a round, but for the first and the last."""
FIRST_SHARE = 16
"""The first round has one in this many samples: the second phase of the screening."""
FEWEST = 32
"""Samples of the first round, at least."""


def round_ends(n: int) -> tuple[int, ...]:
    """Return how many of n samples have been attacked at the end of each round.

    Fewer samples than two rounds of 512 have are one round: a soup is attacked on all or on none.
    """
    if n < 2 * ROUND:
        return (n,)
    first = min(max(-(-n // FIRST_SHARE), FEWEST), ROUND)
    return (first, *(end for end in range(ROUND, n, ROUND) if end > first), n)


@dataclass(frozen=True)
class Race:
    """A race of soups for the most hits.

    Attributes:
        runners: Number of soups that can win.
        leading: Hits of the leader; None while no soup ran all rounds.
        alpha: Probability with which the best soup may leave.
    """

    runners: int
    leading: int | None
    alpha: float

    def has_lost(self, accuracy: Accuracy) -> bool:
        """Return whether a soup leaves, by its counts after a round."""
        if self.leading is None:
            return False
        drawn = 0 if accuracy.drawn is None else accuracy.drawn
        allowed = accuracy.hits - self.leading
        evidence = miss_evidence(accuracy.missed, drawn, accuracy.hits, allowed)
        return evidence >= max(self.runners - 1, 1) / self.alpha

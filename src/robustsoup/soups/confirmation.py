"""Confirm finalists on a part of the samples that the search did not look at.

Where most candidates are never attacked in full (screening, surrogates, racing), the attacked
samples steer the search, and a test on the same samples would be biased. So a fixed random third of
the split that selects, the confirm part, is kept aside: the search attacks the other two thirds,
fixes an order of a few finalists, and these are attacked on the confirm part and tested in that
order.

    aside = confirm_part(split.ids, seed=seed)
    search, confirm = split.take(~aside), split.take(aside)
    ...                                          # attack on `search` alone
    ordered = order_finalists(candidates, goal, confirm_samples=len(confirm), seed=seed)
    attacked = [...]                             # the finalists, evaluated in full on `confirm`
    confirmation = confirm_finalists(attacked, goal)
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.simultaneous import (
    Z_ERROR,
    clopper_pearson_lower,
    fewest_hits,
    fixed_sequence,
)
from robustsoup.evaluation.verdicts import CLEAN_KEY
from robustsoup.soups.goal import Goal, Requirement
from robustsoup.soups.selection import (
    Candidate,
    Judgement,
    RequirementCheck,
    judge,
    rank_by,
    target_score,
)

MOST_FINALISTS = 5
"""Most finalists that are attacked on the confirm part."""


def confirm_part(ids: Tensor, *, seed: int) -> Tensor:
    """Return which samples are kept aside to confirm finalists: a random third.

    The part depends on the seed and the ids alone, so it is the same for all candidates, and the
    same on every machine.

    Args:
        ids: (n,) ids of the samples of the split that selects.
        seed: Seed of the part.

    Returns:
        (n,) bool, on the CPU; n // 3 samples are True.
    """

    def draw(sample: int) -> bytes:
        return hashlib.sha256(f"confirm:{seed}:{sample}".encode()).digest()

    values = ids.tolist()
    order = sorted(range(len(values)), key=lambda row: draw(values[row]))
    aside = torch.zeros(len(values), dtype=torch.bool)
    aside[order[: len(values) // 3]] = True
    return aside


def order_finalists(
    candidates: Sequence[Candidate],
    goal: Goal,
    *,
    confirm_samples: int,
    most: int = MOST_FINALISTS,
    seed: int = 0,
) -> tuple[Candidate, ...]:
    """Choose the finalists and the order in which the confirm part tests them.

    Requirements on clean accuracy are judged first, simultaneously over all candidates. Without a
    requirement on attacked accuracy the best candidate is the only finalist that matters, and it
    comes first. With one, a candidate is put forward if it is more likely than not to pass the test
    on the confirm part, and no other has both a larger margin and a higher score; the test runs
    from the largest margin to the highest score, so that each step gains something and risks
    something.

    Args:
        candidates: All candidates, evaluated on the samples that steered the search.
        goal: What is maximised and required.
        confirm_samples: Number of samples in the confirm part.
        most: Most finalists.
        seed: Seed of the bounds on clean accuracy.

    Returns:
        The finalists in the order of their tests, at least one.
    """
    clean = [item for item in goal.require if item.key == CLEAN_KEY]
    attacked = [item for item in goal.require if item.key != CLEAN_KEY]
    judgement = judge(candidates, Goal(goal.maximise, tuple(clean), goal.point), seed=seed)
    eligible = judgement.eligible(candidates)
    ranked = rank_by(target_score(goal, eligible), eligible)
    if not attacked:
        return tuple(ranked[:most])
    margins = {item.name: _margin(item, attacked, confirm_samples) for item in ranked}
    chain: list[Candidate] = []  # from the highest score to the largest margin
    for candidate in ranked:
        if not chain or margins[candidate.name] > margins[chain[-1].name]:
            chain.append(candidate)
    likely = [item for item in chain if margins[item.name] >= Z_ERROR]
    return tuple(reversed((likely or chain[-1:])[:most]))


def _margin(candidate: Candidate, require: Sequence[Requirement], samples: int) -> float:
    """Return the least distance from a threshold in standard errors of the confirm part."""
    accuracy = candidate.evaluation.accuracy
    return min(
        (accuracy[item.key].value - item.threshold)
        / max(math.sqrt(item.threshold * (1 - item.threshold) / samples), 1e-9)
        for item in require
    )


@dataclass(frozen=True)
class Confirmation:
    """What the confirm part showed.

    Attributes:
        winner: The last finalist that passed, or the first one if none did.
        met: Whether the winner meets every requirement that was tested.
        passed: Number of finalists that passed.
        judgement: The checks of the finalists; those behind the first failure were not tested.
    """

    winner: Candidate
    met: bool
    passed: int
    judgement: Judgement

    @property
    def accuracy(self) -> dict[str, Accuracy]:
        """The winner's accuracies on samples that did not choose it."""
        return dict(self.winner.evaluation.accuracy)


def confirm_finalists(finalists: Sequence[Candidate], goal: Goal) -> Confirmation:
    """Test finalists in their order by exact binomial tests at 5 %, and stop at the first failure.

    All requirements on attacked accuracies are tested; those on clean accuracy are not, because
    `judge` bounds it for all candidates on all samples. Without requirements on attacked accuracies
    the first finalist wins.

    Args:
        finalists: Candidates in the order of `order_finalists`, evaluated on the confirm part.
        goal: What is maximised and required.
    """
    require = [item for item in goal.require if item.key != CLEAN_KEY]
    scores = [item.evaluation.accuracy for item in finalists]
    samples = scores[0][CLEAN_KEY].n
    if goal.point:
        reached = [all(s[r.key].value >= r.threshold for r in require) for s in scores]
        passed = [*reached, False].index(False)
    else:
        hits = [[s[item.key].hits for item in require] for s in scores]
        passed = fixed_sequence(hits, samples, [item.threshold for item in require])
    checks: dict[str, tuple[RequirementCheck, ...]] = {}
    for number, (finalist, accuracy) in enumerate(zip(finalists, scores, strict=True)):
        checks[finalist.name] = tuple(
            _check(item, accuracy[item.key], tested=number <= passed, point=goal.point)
            for item in require
        )
    winner = finalists[max(passed - 1, 0)] if require else finalists[0]
    judgement = Judgement(checks, "fixed sequence" if require else "none")
    return Confirmation(winner, passed > 0 or not require, passed, judgement)


def _check(
    requirement: Requirement, estimate: Accuracy, *, tested: bool, point: bool
) -> RequirementCheck:
    value, threshold = estimate.value, requirement.threshold
    if point:
        return RequirementCheck(requirement, estimate, value, tested and value >= threshold)
    met = tested and estimate.hits >= fewest_hits(estimate.n, threshold)
    low = clopper_pearson_lower(estimate.hits, estimate.n)
    return RequirementCheck(requirement, estimate, max(low, threshold) if met else low, met)

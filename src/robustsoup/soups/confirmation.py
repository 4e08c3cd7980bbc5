"""Confirm finalists on a part of the samples that the search did not look at.

Where most candidates are never attacked in full (screening, surrogates, racing), the attacked
samples steer the search, and a test on the same samples would be biased. So a fixed random third of
the split that selects, the confirm part, is kept aside: the search attacks the other two thirds,
fixes an order of a few finalists, and these are attacked on the confirm part and tested in that
order. Clean accuracy is measured for all candidates on all samples.

    aside = confirm_part(split.ids, seed=seed)
    search, confirm = split.take(~aside), split.take(aside)
    clean = [...]                                # every candidate, not attacked, on `split`
    tried = [...]                                # what was attacked, on `search` alone
    judgement = judge_unattacked(clean, goal, seed=seed)
    ordered = order_finalists(tried, goal, judgement, confirm_samples=len(confirm))
    finalists = [...]                            # `ordered`, evaluated in full on `confirm`
    selection = confirm_finalists(finalists, goal, judgement)
    answer = explain(selection, Explained(ingredients=..., fresh_split="confirm"))
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from robustsoup.data import Split
from robustsoup.evaluation.simultaneous import (
    Z_ERROR,
    Hits,
    clopper_pearson_lower,
    fewest_hits,
    fixed_sequence,
)
from robustsoup.evaluation.two_phase import sample_order
from robustsoup.evaluation.verdicts import CLEAN_KEY
from robustsoup.soups.goal import Goal, Requirement
from robustsoup.soups.selection import (
    FIXED_SEQUENCE,
    Candidate,
    Judgement,
    RequirementCheck,
    Selection,
    judge,
    rank_by,
    target_score,
)

ADAPTIVE_METHODS = ("surrogate", "greedy")
"""Methods whose soups, or which of them are attacked, depend on attacks that came before."""
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
    aside = torch.zeros(len(ids), dtype=torch.bool)
    aside[sample_order(ids, seed=seed, purpose="confirm")[: len(ids) // 3]] = True
    return aside


Part = Literal["all", "search", "confirm"]
"""Part of the samples that select: all, those that steer the search, or those kept aside."""


def part_rows(ids: Tensor, part: Part, *, seed: int) -> Tensor:
    """Return (n,) bool, which samples are in a part."""
    if part == "all":
        return torch.ones(len(ids), dtype=torch.bool)
    aside = confirm_part(ids, seed=seed)
    return aside if part == "confirm" else ~aside


def take_part(split: Split, part: Part, *, seed: int) -> Split:
    """Return a part of the samples of a split; `seed` decides which samples are in which part."""
    return split if part == "all" else split.take(part_rows(split.ids, part, seed=seed))


def requires_confirmation(goal: Goal) -> bool:
    """Return whether a goal needs samples that did not steer the search, if attacks steer it.

    It does if a bound on an accuracy under attack is required. Clean accuracy is measured for all
    candidates and bounded without such samples, and estimates guarantee nothing.
    """
    return goal.requires_attacked and not goal.point


def judge_unattacked(
    candidates: Sequence[Candidate], goal: Goal, *, seed: int = 0, looked_at: Hits | None = None
) -> Judgement:
    """Judge the requirements that need no attack, simultaneously over all candidates.

    Args:
        candidates: All candidates, with clean verdicts (and natural shift) on the same samples.
        goal: The requirements.
        seed: Seed of the bounds.
        looked_at: (n, k) clean hits of further soups, as in `judge`.
    """
    unattacked = tuple(item for item in goal.require if not item.is_attacked)
    reduced = Goal(goal.maximise, unattacked, goal.point)
    return judge(candidates, reduced, seed=seed, looked_at=looked_at)


def order_finalists(
    tried: Sequence[Candidate],
    goal: Goal,
    clean: Judgement,
    *,
    confirm_samples: int,
    most: int = MOST_FINALISTS,
) -> tuple[Candidate, ...]:
    """Choose the finalists and the order in which the confirm part tests them.

    Only candidates that meet the requirements without attack take part. Without a requirement on
    attacked accuracy the best of them comes first and will win; the others are runners-up. With
    one, a candidate is put forward if it is more likely than not to pass its test on the confirm
    part, and no other has both a larger margin and a higher score. The test then runs from the
    largest margin to the highest score, so each step gains something and risks something.

    Args:
        tried: The candidates that were attacked, on the samples that steered the search.
        goal: What is maximised and required.
        clean: What `judge_unattacked` returned.
        confirm_samples: Number of samples in the confirm part.
        most: Most finalists.

    Returns:
        The finalists in the order of their tests, at least one.
    """
    attacked = goal.attacked
    eligible = clean.eligible(tried)
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
        (accuracy[item.key].value - item.threshold) / standard_error(item.threshold, samples)
        for item in require
    )


def standard_error(threshold: float, samples: int) -> float:
    """Return the standard error of an accuracy of `threshold` on samples of the confirm part."""
    return max(math.sqrt(threshold * (1 - threshold) / samples), 1e-9)


def likely_to_pass(threshold: float, samples: int) -> float:
    """Return the least accuracy that is more likely than not to pass a test on so many samples."""
    return min(threshold + Z_ERROR * standard_error(threshold, samples), 1.0)


def confirm_finalists(finalists: Sequence[Candidate], goal: Goal, clean: Judgement) -> Selection:
    """Test finalists in their order by exact binomial tests at 5 %, and stop at the first failure.

    All requirements on attacked accuracies are tested. The others are not tested again:
    `judge_unattacked` bounds them for all candidates on all samples. The last finalist that passes
    is chosen; without requirements on attacked accuracies it is the first. The two guarantees hold
    separately: each is wrong with a probability of at most 5 %.

    Args:
        finalists: Candidates in the order of `order_finalists`, evaluated on the confirm part.
        goal: What is maximised and required.
        clean: What `judge_unattacked` returned.
    """
    require = goal.attacked
    passed = _count_passed(finalists, require, point=goal.point)
    winner = finalists[max(passed - 1, 0)] if require else finalists[0]
    checks: dict[str, tuple[RequirementCheck, ...]] = {}
    for number, finalist in enumerate(finalists):
        tested = {
            item.key: _check(item, finalist, tested=number <= passed, point=goal.point)
            for item in require
        }
        known = {check.requirement.key: check for check in clean.checks[finalist.name]}
        checks[finalist.name] = tuple((known | tested)[item.key] for item in goal.require)
    methods = [clean.method, *([FIXED_SEQUENCE] if require else [])]
    judgement = Judgement(
        {**clean.checks, **checks},
        " and ".join(method for method in methods if method != "none") or "none",
        clean.critical,
        clean.others,
        clean.ingredients,
    )
    score = target_score(goal, finalists)
    others = [item for item in finalists if item.name != winner.name]
    return Selection(
        winner, judgement.met(winner), goal, judgement, (winner, *rank_by(score, others)), score
    )


def _count_passed(
    finalists: Sequence[Candidate], require: Sequence[Requirement], *, point: bool
) -> int:
    scores = [item.evaluation.accuracy for item in finalists]
    if point:
        reached = [all(s[r.key].value >= r.threshold for r in require) for s in scores]
        return [*reached, False].index(False)
    hits = [[s[item.key].hits for item in require] for s in scores]
    samples = scores[0][CLEAN_KEY].n
    return fixed_sequence(hits, samples, [item.threshold for item in require])


def _check(
    requirement: Requirement, finalist: Candidate, *, tested: bool, point: bool
) -> RequirementCheck:
    estimate, threshold = finalist.evaluation.accuracy[requirement.key], requirement.threshold
    if point:
        value = estimate.value
        return RequirementCheck(requirement, estimate, value, tested and value >= threshold)
    low = clopper_pearson_lower(estimate.hits, estimate.n)
    if estimate.hits < fewest_hits(estimate.n, threshold):
        return RequirementCheck(requirement, estimate, low, met=False)
    # Of a finalist that was not tested, nothing beyond the threshold is known.
    return RequirementCheck(
        requirement, estimate, max(low, threshold) if tested else threshold, tested
    )

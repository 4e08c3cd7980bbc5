"""Two-phase sampling: a brief attack on all samples, the full one on a random part of them.

The brief attack leaves a share s of survivors. Of the survivors in the part, the full attack breaks
a share m, the miss rate of the brief attack. Then s (1 - m) estimates without bias what a full
attack on all samples would find. Most of the sampling error of a small part is gone, because s is
known from all samples and m is small.

The part holds the first samples of a random order that depends on their ids and a seed alone, so it
is the same for all networks, on every machine, and a larger part contains a smaller one.
"""

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustsoup.evaluation.intervals import Accuracy

SUBSET_KEY = "subset"
"""Entry of a record: how many samples the last attack attacked, and what it added."""


def sample_order(ids: Tensor, *, seed: int, purpose: str = "subset") -> Tensor:
    """Return the rows of samples in a random order, the same on every machine.

    Args:
        ids: (n,) int64 ids of the samples.
        seed: Seed of the order.
        purpose: What the order is for; another purpose has another order.

    Returns:
        (n,) int64.
    """
    return _draw_order(ids.cpu().to(torch.int64).numpy().tobytes(), f"{purpose}:{seed}")


@lru_cache(maxsize=4)  # a screened search asks for few orders, and for each many times
def _draw_order(ids: bytes, key: str) -> Tensor:
    """Return the order for the bytes of int64 ids."""
    values = np.frombuffer(ids, dtype=np.int64).tolist()

    def draw(row: int) -> bytes:
        return hashlib.sha256(f"{key}:{values[row]}".encode()).digest()

    return torch.tensor(sorted(range(len(values)), key=draw), dtype=torch.int64)


def subset_rows(ids: Tensor, samples: int, *, seed: int) -> Tensor:
    """Return (n,) bool, which samples are among the first ones of the order."""
    rows = torch.zeros(len(ids), dtype=torch.bool)
    rows[sample_order(ids, seed=seed)[:samples]] = True
    return rows


def attacked_rows(ids: Tensor, record: Mapping[str, Any]) -> Tensor:
    """Return (n,) bool, which samples the attack of a record attacked: all, or its subset."""
    part = record.get(SUBSET_KEY)
    if part is None:
        return torch.ones(len(ids), dtype=torch.bool)
    return subset_rows(ids, part["samples"], seed=part["seed"])


def estimate_accuracy(hits: Tensor, attacked: Tensor, missed: int) -> Accuracy:
    """Return the estimate of an accuracy under attack.

    Args:
        hits: (n,) bool, survivors of the full attack where it ran, else of the brief one.
        attacked: (n,) bool, where the full attack ran.
        missed: Survivors of the brief attack that the full one broke.
    """
    drawn = int(hits[attacked].sum()) + missed
    return Accuracy(int(hits.sum()) + missed, len(hits), drawn, missed)


def miss_evidence(missed: int, drawn: int, survivors: int, allowed: int) -> float:
    """Return the evidence that the full attack breaks over `allowed` of all survivors.

    If it does not, the evidence ever reaches 1 / level with a probability of at most `level`,
    however often it is looked at as more of the survivors are drawn: it is the least likelihood
    ratio, over all numbers of misses up to `allowed`, of a beta-binomial mixture against that
    number, and each of these ratios is a martingale under its number.

    Args:
        missed: Survivors among the drawn ones that the full attack broke.
        drawn: Survivors that were attacked in full.
        survivors: Survivors of the brief attack among all samples.
        allowed: Number of misses that is to be exceeded.

    Returns:
        The evidence; infinite once it is certain, 1 before any draw.

    Source: Waudby-Smith and Ramdas 2020, arXiv:2006.04347, section 2.
    """
    if missed > allowed:
        return math.inf
    if drawn == 0 or allowed >= survivors:
        return 1.0
    # The likelihood of the counts grows in the number of misses up to its mode.
    mode = missed * (survivors + 1) // drawn
    misses = max(missed, min(allowed, mode, survivors - (drawn - missed)))
    likelihood = (
        _log_choose(misses, missed)
        + _log_choose(survivors - misses, drawn - missed)
        - _log_choose(survivors, drawn)
    )
    mixture = (
        _log_choose(drawn, missed)
        + _log_beta(missed + 1, drawn - missed + USUAL_RATE)
        - _log_beta(1, USUAL_RATE)
    )
    return math.exp(mixture - likelihood)


USUAL_RATE = 20
"""Second parameter of the mixture's beta distribution: miss rates around 1 in 20."""


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_beta(a: int, b: int) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

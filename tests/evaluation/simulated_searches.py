"""Simulated searches with known true accuracies: how often is a statement wrong?"""

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from robustsoup.evaluation.intervals import tango
from robustsoup.evaluation.simultaneous import difference_quantile, prove_accuracies
from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.soups.confirmation import confirm_finalists, judge_unattacked, order_finalists
from robustsoup.soups.goal import Goal, Requirement
from robustsoup.soups.grid import grid
from robustsoup.soups.selection import Candidate

SIMULATIONS = 2000
THREAT = "Linf 8/255"
BARELY = 1e-6
"""How far below a threshold accuracies lie that just miss it."""


def limit(simulations, error_rate=0.05):
    """Return the allowed share of wrong searches: 5 % and two standard errors of the simulation."""
    return error_rate + 2 * math.sqrt(error_rate * (1 - error_rate) / simulations)


def quantile(shares):
    """Return the normal quantile of each share."""
    return np.array([NormalDist().inv_cdf(share) for share in shares])


@dataclass(frozen=True)
class Population:
    """k candidates whose hits on a sample are correlated normal scores below a cut.

    Attributes:
        shares: (k,) true accuracies.
        loadings: (f, k) loadings of the scores on f factors that a sample has.
        noise: Standard deviation of what a score has on its own.
    """

    shares: np.ndarray
    loadings: np.ndarray
    noise: np.ndarray

    @classmethod
    def equicorrelated(cls, shares, correlation):
        """Every pair of scores has the same correlation."""
        k = len(shares)
        loadings = np.full((1, k), math.sqrt(correlation))
        return cls(np.asarray(shares), loadings, np.full(k, math.sqrt(1 - correlation)))

    @classmethod
    def soups(cls, ingredients, step, share):
        """A fine grid of soups: the score of a soup mixes those of its ingredients, near 0.94."""
        alphas = np.array(grid(ingredients, step)).T
        loadings = np.concatenate([0.9 * alphas, np.full((1, alphas.shape[1]), 1.5)])
        noise = np.full(alphas.shape[1], 0.2)
        scale = np.sqrt((loadings**2).sum(0) + noise**2)
        return cls(np.full(alphas.shape[1], share), loadings / scale, noise / scale)

    def draw(self, n, generator):
        """Return (n, k) hits of n samples."""
        common = generator.standard_normal((n, len(self.loadings)))
        own = generator.standard_normal((n, len(self.shares)))
        return common @ self.loadings + own * self.noise < quantile(self.shares)


def layout(name, threshold, k=21):
    """Return k true accuracies around a threshold: flat, crowded or spread."""
    match name:
        case "flat":
            return np.full(k, threshold - BARELY)
        case "crowded":
            return np.linspace(threshold - 0.01, threshold + 0.005, k)
        case "spread":
            return np.linspace(threshold - 0.1, min(threshold + 0.1, 0.995), k)
    raise ValueError(name)


@dataclass(frozen=True)
class Outcome:
    """Shares of simulated searches.

    Attributes:
        wrong: A candidate was said to meet the threshold and misses it.
        alone: The same if each candidate is judged by its own two-sided 95 % interval.
        overstated: Any of the bounds that are shown lies above the true accuracy.
        power: Mean share of the candidates above the threshold that are shown to be.
    """

    wrong: float
    alone: float
    overstated: float
    power: float


def simulate_requirement(
    population, threshold, n, *, simulations=SIMULATIONS, draws=10_000, seed=0
):
    """Simulate searches with one threshold, or one for each column, and count wrong ones."""
    generator = np.random.default_rng(seed)
    misses = population.shares < threshold
    wanted = np.broadcast_to(threshold, misses.shape).astype(float)
    counts = np.zeros(3)
    shown = 0.0
    for _ in range(simulations):
        hits = population.draw(n, generator)
        proof = prove_accuracies(hits, wanted, seed=seed, draws=draws)
        alone = wilson_two_sided(hits.mean(0), n) >= threshold
        counts += [
            (proof.met & misses).any(),
            (alone & misses).any(),
            (proof.low > population.shares).any(),
        ]
        shown += proof.met[~misses].mean() if not misses.all() else 0.0
    return Outcome(*(counts / simulations), shown / simulations)


def wilson_two_sided(share, n, z=1.959963984540054):
    """Return lower ends of two-sided 95 % intervals."""
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (share + z * z / (2 * n) - half) / (1 + z * z / n)


def simulate_gains(population, n, *, simulations=SIMULATIONS, draws=10_000, seed=0):
    """Simulate searches that compare each candidate with the first two, which are ingredients.

    Returns:
        The share of searches in which any interval misses the true difference.
    """
    generator = np.random.default_rng(seed)
    pairs = [(i, j) for i in range(len(population.shares)) for j in range(2) if i != j]
    truth = [population.shares[i] - population.shares[j] for i, j in pairs]
    wrong = 0
    for _ in range(simulations):
        hits = population.draw(n, generator).astype(float)
        z = difference_quantile(hits, hits[:, :2], seed=seed, draws=draws)
        ends = [_paired_interval(hits[:, j], hits[:, i], z) for i, j in pairs]
        wrong += any(not low <= true <= high for true, (low, high) in zip(truth, ends, strict=True))
    return wrong / simulations


def _paired_interval(a, b, z):
    n = len(a)
    return tango(int(((a == 1) & (b == 0)).sum()), int(((b == 1) & (a == 0)).sum()), n, z)


def simulate_confirmation(
    population, threshold, n, *, simulations=SIMULATIONS, seed=0, finalists=5
):
    """Simulate searches for the cleanest candidate with a robust accuracy of at least a threshold.

    Two thirds of the samples choose and order the finalists, one third tests them. The more robust
    a candidate, the less clean it is, so that the choice is tempted.

    Returns:
        The share of searches that return a candidate which misses the threshold, and the share that
        return one at all.
    """
    generator = np.random.default_rng(seed)
    goal = Goal("clean", (Requirement(THREAT, threshold),))
    order = np.argsort(np.argsort(population.shares, kind="stable"))
    clean = np.linspace(0.95, 0.85, len(order))[order]
    names = [f"soup {i}" for i in range(len(order))]
    wrong = answered = 0
    for _ in range(simulations):
        hits = population.draw(n, generator)
        right = hits | (generator.random((n, 1)) < clean)
        split = n // 3
        tried, kept = (
            {
                name: Candidate(name, (), evaluation_of(right[rows, i], hits[rows, i]))
                for i, name in enumerate(names)
            }
            for rows in (slice(split, None), slice(split))
        )
        unattacked = judge_unattacked(list(tried.values()), goal)
        ordered = order_finalists(
            list(tried.values()), goal, unattacked, confirm_samples=split, most=finalists
        )
        selection = confirm_finalists([kept[item.name] for item in ordered], goal, unattacked)
        answered += selection.met
        chosen = population.shares[names.index(selection.best.name)]
        wrong += selection.met and chosen < threshold
    return wrong / simulations, answered / simulations


def evaluation_of(clean, robust):
    """Return an evaluation with the given hits (n,)."""
    n = len(clean)
    zeros = torch.zeros(n)
    verdicts = Verdicts(torch.from_numpy(robust), *[zeros.long()] * 2, *[zeros] * 2)
    prediction = torch.from_numpy(~clean).long()
    return Evaluation(torch.arange(n), zeros.long(), prediction, zeros, {THREAT: verdicts})


def list_cells():
    """Return the cells of the full table: layout, correlation and number of samples."""
    return list(
        itertools.product(("flat", "crowded", "spread"), (0.0, 0.9), (500, 1000, 2000, 5000))
    )

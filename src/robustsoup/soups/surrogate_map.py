"""The soups of a search by surrogate, and which are attacked before any verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import CLEAN_KEY
from robustsoup.soups.goal import Goal, Requirement, Score
from robustsoup.soups.grid import Alpha
from robustsoup.soups.surrogate import Model, Places, spread_rows, to_logit

TESTS = 2
"""Soups that test the fit."""


@dataclass(frozen=True, eq=False)
class SoupMap:
    """The soups of a search by surrogate, and what is known of them before any attack.

    Attributes:
        names: Names of the N soups.
        alphas: Their coefficients, or (t, 1 - t) for positions on a dial.
        clean_hits: (N, n) whether each of n samples is right without an attack.
        goal: What is maximised, and the requirements.
        part: (n,) bool, the samples that most soups are attacked on; all of them if None.
        shortfall: (N,) by how much each soup misses the requirements on clean accuracy.
        tolerance: Accuracy that the answer may lose to the best soup.
        seed: Seed of the test soups and of the refits.
        grid: Names of the soups that are all attacked if the model fails; all of them if empty.
        model: The Gaussian process, or the quadratic.
    """

    names: tuple[str, ...]
    alphas: tuple[Alpha, ...]
    clean_hits: NDArray[np.bool_]
    goal: Goal
    part: NDArray[np.bool_] | None = None
    shortfall: tuple[float, ...] = ()
    tolerance: float = 0.005
    seed: int = 0
    grid: frozenset[str] = frozenset()
    model: Model = "gaussian-process"

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.clean_hits.shape[1]

    @cached_property
    def clean(self) -> tuple[Accuracy, ...]:
        """The clean accuracies of all soups."""
        return tuple(Accuracy(int(row.sum()), len(row)) for row in self.clean_hits)

    @cached_property
    def places(self) -> Places:
        """The coefficients of all soups, and their clean accuracies as a covariate."""
        return Places.of(self.alphas, to_logit(self.clean_hits.sum(1).astype(float), self.samples))

    @cached_property
    def score(self) -> Score:
        """What is maximised, as a sum of measures."""
        return Score.parse(self.goal.maximise or CLEAN_KEY)

    @cached_property
    def attacked_requirements(self) -> tuple[Requirement, ...]:
        """The requirements on accuracies under attack, which are predicted."""
        return tuple(item for item in self.goal.require if item.key != CLEAN_KEY)

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The attacked measures that the goal needs."""
        keys = [*self.score.keys, *(item.key for item in self.attacked_requirements)]
        return tuple(dict.fromkeys(key for key in keys if key != CLEAN_KEY))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Rows of the soups with the largest coefficient of each ingredient."""
        return end_rows(self.alphas)

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """Rows of the first soups that the model is fitted to, the ends before the others."""
        return spread_first(self.alphas, self.model)

    @cached_property
    def test_rows(self) -> tuple[int, ...]:
        """Rows of the soups that test the fit at first; empty for tiny grids."""
        return self.test_order[:TESTS]

    @cached_property
    def test_order(self) -> tuple[int, ...]:
        """Rows of all soups that may test the fit, in the order in which they do."""
        return order_tests(len(self.names), self.first_rows, seed=self.seed)

    def is_in_full(self, hits: Mapping[str, NDArray[np.bool_]]) -> bool:
        """Return whether the hits of a soup, by measure, are those of all samples."""
        return all(len(item) == self.samples for item in hits.values())

    @property
    def part_size(self) -> int | None:
        """Number of samples of the part; None where all are attacked."""
        return None if self.part is None else int(self.part.sum())


def spread_first(alphas: Sequence[Alpha], model: Model = "gaussian-process") -> tuple[int, ...]:
    """Return the rows of the first soups: the ends, then those where the model knows least.

    They depend on the coefficients alone, so a plan can list them before any work.
    """
    places, ends = Places.of(alphas), end_rows(alphas)
    return (*ends, *spread_rows(places, ends, max(2, places.coefficients.shape[1] - 1), model))


def end_rows(alphas: Sequence[Alpha]) -> tuple[int, ...]:
    """Return the rows with the largest coefficient of each ingredient, each once."""
    columns = np.asarray(alphas).T
    return tuple(dict.fromkeys(int(np.argmax(column)) for column in columns))


def order_tests(count: int, first: Sequence[int], *, seed: int) -> tuple[int, ...]:
    """Return the rows of `count` soups without the first in a random order: the first two test.

    Empty for grids that have hardly more soups.
    """
    others = [row for row in range(count) if row not in first]
    if len(others) <= TESTS:
        return ()
    return tuple(others[i] for i in np.random.default_rng([seed, 1]).permutation(len(others)))

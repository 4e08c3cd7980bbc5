"""What the verdicts so far say about all soups of a search by surrogate, and how surely.

Accuracies of soups that were attacked on a part of the samples are estimated for all samples, a
model is fitted to the estimates, and both are refitted to bootstrap resamples of the part.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from robustsoup.evaluation.verdicts import CLEAN_KEY
from robustsoup.soups.confirmation import likely_to_pass
from robustsoup.soups.surrogate import FittedMap, Floats, fit_map, fit_p_value, to_logit, to_share
from robustsoup.soups.surrogate_map import TESTS, SoupMap

Hits = NDArray[np.bool_]
"""(n,) whether each of n samples is right; of a soup attacked on the part, (m,) of its samples."""
HitsByName = Mapping[str, Mapping[str, Hits]]
"""For each attacked soup, its hits by measure."""
Rows = NDArray[np.int64]
"""(r,) rows of soups."""

REFITS = 400
CHANCE = 0.05
"""Share of refits in which a soup may beat the answer, and level of the test of the fit."""
MOST_ROWS = 300
"""Soups that a refit looks at: the ones that are most likely to win."""


class Refits:
    """The model fitted to the verdicts so far, with and without the test soups, and its refits.

    Args:
        search: The search.
        attacked: The verdicts; of the first soups at least.
    """

    def __init__(self, search: SoupMap, attacked: HitsByName) -> None:
        self.search, self.attacked = search, attacked
        self.samples = search.samples
        self.rows = sorted(search.names.index(name) for name in attacked)
        self.hits = {
            measure: [attacked[search.names[row]][measure] for row in self.rows]
            for measure in search.measures
        }
        part = np.ones(self.samples, bool) if search.part is None else search.part
        self.estimates = {
            measure: Estimates(search, self.rows, hits, part) for measure, hits in self.hits.items()
        }
        self.values = {
            measure: estimates.to_logits(np.ones((1, int(part.sum()))))[0]
            for measure, estimates in self.estimates.items()
        }
        self.fitted = self._fit(self.rows)
        self.shares: dict[str, Floats] = {
            CLEAN_KEY: np.array([accuracy.value for accuracy in search.clean]),
            **{name: to_share(fitted.predict()) for name, fitted in self.fitted.items()},
        }
        self.chosen = int(np.argmax(np.round(self.utility(self.shares), 12)))

    def _fit(self, rows: Sequence[int]) -> dict[str, FittedMap]:
        """Return the model of each measure, fitted to some of the attacked soups."""
        places = [self.rows.index(row) for row in rows]
        return {
            measure: fit_map(self.search.places, rows, values[places], self.search.model)
            for measure, values in self.values.items()
        }

    def is_attacked(self, row: int) -> bool:
        """Return whether the soup of a row was attacked, on the part at least."""
        return self.search.names[row] in self.attacked

    @cached_property
    def in_full(self) -> list[int]:
        """Rows of the soups that were attacked on all samples."""
        return [
            row
            for row in self.rows
            if self.search.is_in_full(self.attacked[self.search.names[row]])
        ]

    @property
    def best_in_full(self) -> int:
        """Row of the best soup of those that were attacked on all samples."""
        rows = np.array(self.in_full)
        places = [self.rows.index(row) for row in self.in_full]
        shares = {name: to_share(values[places]) for name, values in self.values.items()}
        clean = {CLEAN_KEY: self.shares[CLEAN_KEY][rows]}
        return int(rows[np.argmax(self.utility(clean | shares, rows))])

    def utility(self, shares: Mapping[str, Floats], rows: Rows | slice = slice(None)) -> Floats:
        """Return what the goal maximises at some rows, the last axis of the shares.

        Soups that miss a requirement are below all that meet them, by their shortfall.
        """
        search = self.search
        value = sum(weight * shares[key] for weight, key in search.score.terms)
        shortfall = np.zeros_like(value)
        if search.shortfall:
            shortfall = shortfall + np.asarray(search.shortfall)[rows]
        for item in search.attacked_requirements:
            if search.goal.point:  # half a sample undoes the rounding of `to_logit`
                needed = item.threshold - 0.5 / self.samples
            else:  # the confirm part has half as many samples as those that steer the search
                needed = likely_to_pass(item.threshold, max(self.samples // 2, 1))
            shortfall = shortfall + np.clip(needed - shares[item.key], 0, None)
        return np.where(shortfall > 0, -1 - shortfall, value)

    @cached_property
    def test_pairs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows of the two soups that test the fit now, and of the two that would be next.

        The pairs have one order. Of those that are attacked without a gap, the last one tests.
        """
        order = self.search.test_order
        pairs = [order[i : i + TESTS] for i in range(0, len(order) - TESTS + 1, TESTS)]
        attacked = itertools.takewhile(lambda pair: all(map(self.is_attacked, pair)), pairs)
        count = sum(1 for _ in attacked)
        return pairs[count - 1], pairs[count] if count < len(pairs) else ()

    @property
    def tests(self) -> tuple[int, ...]:
        """Rows of the soups that test the fit now."""
        return self.test_pairs[0]

    @cached_property
    def tested(self) -> dict[str, FittedMap]:
        """The model of each measure without the soups that test it now."""
        return self._fit([row for row in self.rows if row not in self.tests])

    @cached_property
    def fits_hold(self) -> bool:
        """Whether the model predicts the test soups, or misses them by less than the tolerance."""
        if self.p_value > CHANCE:
            return True
        return all(
            abs(self._measured(measure, row) - to_share(fitted.predict())[row])
            <= self.search.tolerance
            for measure, fitted in self.tested.items()
            for row in self.tests
        )

    @cached_property
    def p_value(self) -> float:
        """The least p-value of the test of the fit, over the measures, times their number."""
        values = [
            fit_p_value(fitted, self.tests, [self._value(measure, row) for row in self.tests])
            for measure, fitted in self.tested.items()
        ]
        return min(1.0, min(values, default=1.0) * max(len(values), 1))

    def _value(self, measure: str, row: int) -> float:
        """Return the estimate of an attacked soup in logits."""
        return float(self.values[measure][self.rows.index(row)])

    def _measured(self, measure: str, row: int) -> float:
        """Return the estimate of an attacked soup as a share."""
        return float(to_share(self.values[measure])[self.rows.index(row)])

    @cached_property
    def candidates(self) -> Rows:
        """Rows that the refits look at: attacked ones, and those that are likeliest to win."""
        if len(self.search.names) <= MOST_ROWS:
            return np.arange(len(self.search.names))
        spread = sum(np.sqrt(fitted.variance) for fitted in self.fitted.values())
        hopeful = self.utility(
            {
                name: share if name == CLEAN_KEY else np.clip(share + spread, 0, 1)
                for name, share in self.shares.items()
            }
        )
        order = np.argsort(-hopeful, kind="stable")[:MOST_ROWS]
        return np.unique(np.concatenate([order, [self.chosen], self.rows]))

    def _draw_utility(self) -> Floats:
        """Return the utility (REFITS, candidates) of each candidate in each refit.

        The estimates of the attacked soups stand for themselves, predictions for the others.
        """
        rng = np.random.default_rng([self.search.seed, 2])
        rows = self.candidates
        clean = self.shares[CLEAN_KEY][rows]
        shares: dict[str, Floats] = {CLEAN_KEY: np.broadcast_to(clean, (REFITS, len(rows)))}
        for measure, fitted in self.fitted.items():
            values = self.resampled[measure]
            errors = fitted.draw(rows, rng.standard_normal((REFITS, len(rows))))
            logits = fitted.predict(values)[:, rows] + errors
            logits[:, np.searchsorted(rows, self.rows)] = values
            shares[measure] = to_share(logits)
        return self.utility(shares, rows)

    @cached_property
    def resampled(self) -> dict[str, Floats]:
        """The estimates (REFITS, r) of the attacked soups from resamples of the part, in logits.

        They vary as much as estimates of all n samples from m random ones do.
        """
        rng = np.random.default_rng([self.search.seed, 3])
        part = self.search.part
        m = self.samples if part is None else int(part.sum())
        drawn = rng.multinomial(m, np.full(m, 1 / m), size=REFITS).astype(np.float64)
        weights = 1 + math.sqrt(1 - m / self.samples) * (drawn - 1)
        return {name: estimates.to_logits(weights) for name, estimates in self.estimates.items()}

    def find_finalists(self, *, predicted: bool) -> tuple[tuple[int, ...], float]:
        """Return the soups to attack on all samples, and the chance that a better one is left.

        Args:
            predicted: Whether soups that were not attacked can be the answer.

        Returns:
            The fewest rows, the likeliest first, such that in all but CHANCE of the refits one of
            them, or of the soups that were attacked on all samples, is as good as the best soup
            less the tolerance; and the share of refits in which this is not so without them.
        """
        rows, utility = self.candidates, self._draw_utility()
        if not predicted:
            attacked = np.isin(rows, self.rows)
            rows, utility = rows[attacked], utility[:, attacked]
        best = utility.max(1, keepdims=True)
        # Where no soup meets what is required of clean accuracy, which is known, the closest wins.
        exact = (best <= -1) & (not self.search.attacked_requirements)
        close = utility >= best - np.where(exact, 0, self.search.tolerance)
        reached = close[:, np.isin(rows, self.in_full)].any(1)
        chance = float(1 - reached.mean())
        finalists: list[int] = []
        while 1 - reached.mean() > CHANCE:
            likeliest = int(np.argmax((close & ~reached[:, None]).sum(0)))
            finalists.append(int(rows[likeliest]))
            reached = reached | close[:, likeliest]
        return tuple(finalists), chance

    def least_known_row(self) -> tuple[int, ...]:
        """Return the soup that is not attacked and whose prediction is least certain."""
        spread = np.asarray(sum(fitted.variance for fitted in self.fitted.values())).copy()
        spread[[row for row in range(len(spread)) if self.is_attacked(row)]] = -1
        row = int(np.argmax(np.round(spread, 9)))
        return () if spread[row] < 0 else (row,)


class Estimates:
    """Estimates, under one measure, of the accuracies of attacked soups on all n samples.

    A soup that was attacked on the part alone has a sampling error there. It is predicted, by
    linear regression over the samples of the part, from the errors of what is known of all
    samples: the hits of the soups that were attacked on all of them, and the soup's clean hits.

    Args:
        search: The search.
        rows: (r,) rows of the attacked soups.
        hits: Their hits, (n,) of the soups that were attacked on all samples, else (m,).
        part: (n,) bool, the m samples of the part.

    Source: Cochran 1977, Sampling Techniques, section 7 (regression estimators).
    """

    def __init__(self, search: SoupMap, rows: list[int], hits: Sequence[Hits], part: Hits) -> None:
        self.n = len(part)
        self.in_full = np.array([len(item) == self.n for item in hits])
        self.right = np.array([item[part] if len(item) == self.n else item for item in hits], float)
        clean = search.clean_hits[rows]
        self.clean_right, self.clean = clean[:, part].astype(float), clean.mean(1)
        self.exact = np.array([item.mean() for item in hits if len(item) == self.n])
        self.slopes, self.clean_slopes = self._regress()

    def _regress(self) -> tuple[Floats, Floats]:
        """Return the slopes of each soup on the hits of the f known ones, and on its clean hits.

        Returns:
            (f, r) and (r,); those of the known soups are 0.
        """
        known = self.right[self.in_full]
        slopes, clean_slopes = np.zeros((len(known), len(self.right))), np.zeros(len(self.right))
        for row in np.flatnonzero(~self.in_full):
            errors = np.stack([*known, self.clean_right[row], self.right[row]])
            errors -= errors.mean(1, keepdims=True)
            gram = errors @ errors.T
            ridge = np.eye(len(gram) - 1) * (1e-3 * np.trace(gram) / len(gram) + 1e-9)
            solved = np.linalg.solve(gram[:-1, :-1] + ridge, gram[:-1, -1])
            slopes[:, row], clean_slopes[row] = solved[:-1], solved[-1]
        return slopes, clean_slopes

    def to_logits(self, weights: Floats) -> Floats:
        """Return the estimates (b, r) in logits where the part's samples have weights (b, m)."""
        total = weights.sum(1, keepdims=True)
        share, clean = (weights @ hits.T / total for hits in (self.right, self.clean_right))
        missed = (self.exact - share[:, self.in_full]) @ self.slopes
        estimate = share + missed + (self.clean - clean) * self.clean_slopes
        estimate[:, self.in_full] = self.exact
        return to_logit(np.clip(estimate, 0, 1) * self.n, self.n)

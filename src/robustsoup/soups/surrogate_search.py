"""The surrogate's search: which soups to attack next, and when the answer is settled.

The engine attacks nothing. It names soups, and its decisions depend only on the verdicts that its
caller returns, so that `search`, a recipe's run and a replay of stored verdicts drive the same
engine, and a resumed run names the same soups:

    engine = SurrogateSearch(...)
    attacked = {}
    while names := engine.next_soups(attacked):
        attacked |= {name: attack_it(name) for name in names}

Clean verdicts of every soup are measured before. The first soups are the ingredients, a few where
the model knows least, and two soups drawn by the seed: the model without them is tested on them,
and then fitted to all. While it fails, the soup that the model knows least is attacked and two new
ones that test the model, which then knows all others. Then follows, one at a time, the soup with
the largest chance to change the answer. The search ends when, in 95 % of refits, no eligible soup
beats the chosen one of the same refit by more than the tolerance. Each refit takes one bootstrap
resample of the samples, which all soups share, and a draw of the model's error. It also ends when
this holds of the draws alone, without the resamples: what is left then is the error of the samples,
which attacking more soups does not reduce. Where two thirds of the grid are attacked without an
answer, the rest of the grid is attacked too, less the soups that miss a requirement on clean
accuracy.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Z95, Accuracy
from robustsoup.evaluation.simultaneous import prove_accuracies
from robustsoup.evaluation.verdicts import CLEAN_KEY, SHIFT_KEY, Evaluation
from robustsoup.soups.goal import KNEE, Goal, Requirement, Score
from robustsoup.soups.grid import Alpha
from robustsoup.soups.surrogate import (
    FittedMap,
    Floats,
    Model,
    Places,
    fit_map,
    fit_p_value,
    spread_rows,
    to_logit,
    to_share,
)

Hits = NDArray[np.bool_]
"""(n,) whether each of n samples is right."""
Rows = NDArray[np.int64]
"""(r,) rows of soups."""

REFITS = 400
TESTS = 2
"""Soups that test the fit."""
CHANCE = 0.05
"""Share of refits in which a soup may beat the chosen one, and level of the test of the fit."""
MOST_OF_GRID = 2 / 3
"""Share of the grid that is attacked without an answer before the rest is attacked too."""
MOST_ROWS = 300
"""Soups that a refit looks at: the ones that are most likely to win."""

Stage = Literal["begin", "search", "misfit", "grid", "settled"]


@dataclass(frozen=True)
class PredictedSoup:
    """What the surrogate says about one soup.

    Attributes:
        name: Name of the soup.
        alpha: (n,) coefficients.
        clean: Measured clean accuracy.
        attacked: Whether the soup was attacked.
        accuracy: For each attacked measure of the goal, the prediction and the ends of its 95 %
            band, which holds the sampling error.
    """

    name: str
    alpha: Alpha
    clean: Accuracy
    attacked: bool
    accuracy: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class SurrogateState:
    """Where a search stands.

    Attributes:
        stage: "begin" before the first soups are attacked, "search", "misfit" while the model fails
            its test, "grid" once the rest of the grid is attacked, "settled" at the end.
        chosen: Row of the soup that the model chooses, or the verdicts of the whole grid;
            None at the beginning.
        chance: Share of refits in which an eligible soup beats it by more than the tolerance.
        map_chance: The same for draws of the model's error alone, on the samples as they are.
        p_value: p-value of the test of the fit; the least of all measures.
        next_rows: Rows to attack next; empty at the end.
    """

    stage: Stage
    chosen: int | None
    chance: float
    map_chance: float
    p_value: float
    next_rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SurrogateSearch:
    """Decides which soups a search by surrogate attacks.

    Attributes:
        names: Names of the N soups.
        alphas: Their coefficients, or (t, 1 - t) for positions on a dial.
        clean: Their measured clean accuracies, on the samples that are attacked.
        goal: What is maximised, and the requirements.
        shortfall: (N,) by how much each soup misses the requirements on clean accuracy.
        tolerance: Accuracy that the answer may lose to the best soup.
        seed: Seed of the test soups and of the refits.
        grid: Names of the soups that are all attacked if the model fails; all of them if empty.
        screened: Survivors of a short attack on each soup, if there was one.
        model: The Gaussian process, or the quadratic.
    """

    names: tuple[str, ...]
    alphas: tuple[Alpha, ...]
    clean: tuple[Accuracy, ...]
    goal: Goal
    shortfall: tuple[float, ...] = ()
    tolerance: float = 0.005
    seed: int = 0
    grid: frozenset[str] = frozenset()
    screened: tuple[Accuracy, ...] = ()
    model: Model = "gaussian-process"

    @cached_property
    def places(self) -> Places:
        """The coefficients and the covariates of all soups."""
        measured = [self.clean, *([self.screened] if self.screened else [])]
        logits = [
            to_logit(np.array([a.hits for a in column], float), column[0].n) for column in measured
        ]
        return Places.of(self.alphas, *logits)

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
    def first_rows(self) -> tuple[int, ...]:
        """Rows of the first soups that the model is fitted to."""
        return spread_first(self.alphas, self.model)

    @cached_property
    def test_rows(self) -> tuple[int, ...]:
        """Rows of the soups that test the fit at first; empty for tiny grids."""
        return self.test_order[:TESTS]

    @cached_property
    def test_order(self) -> tuple[int, ...]:
        """Rows of all soups that may test the fit, in the order in which they do."""
        return order_tests(len(self.names), self.first_rows, seed=self.seed)

    @property
    def grid_rows(self) -> tuple[int, ...]:
        """Rows of the soups that are all attacked if the model fails.

        Soups that miss a requirement on clean accuracy are left out, unless all do.
        """
        rows = [row for row, name in enumerate(self.names) if not self.grid or name in self.grid]
        meeting = [row for row in rows if not (self.shortfall and self.shortfall[row])]
        return tuple(meeting or rows)

    @property
    def most_attacks(self) -> int:
        """Number of attacked soups without an answer after which the grid is attacked."""
        first = len(self.first_rows) + len(self.test_rows)
        grid = len(self.grid) or len(self.names)
        return max(first + 1, math.ceil(grid * MOST_OF_GRID))

    def first_soups(self) -> tuple[str, ...]:
        """Return the names of the first soups, which depend on no verdict."""
        rows = (*self.first_rows, *self.test_rows) if self.test_rows else self.grid_rows
        return tuple(self.names[row] for row in rows)

    def next_soups(self, attacked: Mapping[str, Mapping[str, Hits]]) -> tuple[str, ...]:
        """Return the names of the soups to attack next; empty at the end.

        Args:
            attacked: For each attacked soup, its hits (n,) by measure.
        """
        return tuple(self.names[row] for row in self.state(attacked).next_rows)

    def state(self, attacked: Mapping[str, Mapping[str, Hits]]) -> SurrogateState:
        """Return where the search stands, given the verdicts so far."""
        if not self.measures:
            chosen = _Refits(self, attacked).chosen
            rest = () if self.names[chosen] in attacked else (chosen,)
            return SurrogateState("settled", chosen, 0.0, 0.0, 1.0, rest)
        waiting = tuple(
            self.names.index(name) for name in self.first_soups() if name not in attacked
        )
        if waiting:
            return SurrogateState("begin", None, 1.0, 1.0, 1.0, waiting)
        if not self.test_rows:
            return SurrogateState("grid", None, 1.0, 1.0, 1.0, ())
        return self._next_state(_Refits(self, attacked))

    def _next_state(self, refits: "_Refits") -> SurrogateState:
        """Return where the search stands once the first soups are attacked."""
        fits = refits.fits_hold
        if fits and min(refits.chance, refits.map_chance) <= CHANCE:
            if refits.is_attacked(refits.chosen):
                return refits.state("settled", ())
            return refits.state("search", (refits.chosen,))
        rows = tuple(row for row in self.grid_rows if not refits.is_attacked(row))
        if not rows or len(refits.attacked) >= self.most_attacks:
            return refits.state("grid", rows)
        if fits:
            return refits.state("search", refits.likeliest_row())
        more = dict.fromkeys((*refits.least_known_row(), *refits.test_pairs[1]))
        return refits.state("misfit", tuple(row for row in more if not refits.is_attacked(row)))

    def predict(self, attacked: Mapping[str, Mapping[str, Hits]]) -> list[PredictedSoup]:
        """Return what the model says about every soup, fitted to all attacked ones.

        Args:
            attacked: For each attacked soup, its hits (n,) by measure.

        Returns:
            The prediction for each soup; empty while the first soups are not attacked yet.
        """
        if self.measures and self.state(attacked).chosen is None:
            return []
        refits = _Refits(self, attacked)
        n = refits.samples
        bands: list[dict[str, tuple[float, float, float]]] = [{} for _ in self.names]
        for measure, fitted in refits.fitted.items():
            logits = fitted.predict()
            share = to_share(logits)
            half = Z95 * np.sqrt(fitted.variance + 1 / (n * share * (1 - share)))
            ends = zip(share, to_share(logits - half), to_share(logits + half), strict=True)
            for band, (value, low, high) in zip(bands, ends, strict=True):
                band[measure] = (float(value), float(low), float(high))
        return [
            PredictedSoup(name, alpha, clean, name in attacked, band)
            for name, alpha, clean, band in zip(
                self.names, self.alphas, self.clean, bands, strict=True
            )
        ]


class _Refits:
    """The model fitted to the verdicts so far, with and without the test soups, and its refits.

    Args:
        search: The search.
        attacked: For each attacked soup, its hits by measure; the first soups at least.
    """

    def __init__(self, search: SurrogateSearch, attacked: Mapping[str, Mapping[str, Hits]]) -> None:
        self.search, self.attacked = search, attacked
        self.samples = search.clean[0].n
        self.rows = sorted(search.names.index(name) for name in attacked)
        self.hits = {
            measure: np.stack([attacked[search.names[row]][measure] for row in self.rows])
            for measure in search.measures
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
            measure: fit_map(
                self.search.places,
                rows,
                to_logit(hits[places].sum(1).astype(float), self.samples),
                self.search.model,
            )
            for measure, hits in self.hits.items()
        }

    def is_attacked(self, row: int) -> bool:
        """Return whether the soup of a row was attacked."""
        return self.search.names[row] in self.attacked

    def state(self, stage: Stage, next_rows: tuple[int, ...]) -> SurrogateState:
        """Return the state of the search; the verdicts of a whole grid choose, not the model."""
        chosen = self.most_robust_row if stage == "grid" and not next_rows else self.chosen
        return SurrogateState(stage, chosen, self.chance, self.map_chance, self.p_value, next_rows)

    @property
    def most_robust_row(self) -> int:
        """Row of the best attacked soup by its measured accuracies."""
        rows = np.array(self.rows)
        measured = {name: hits.mean(1) for name, hits in self.hits.items()}
        clean = {CLEAN_KEY: self.shares[CLEAN_KEY][rows]}
        return int(rows[np.argmax(self.utility(clean | measured, rows))])

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
            share = shares[item.key]
            bound = share if search.goal.point else lower_bounds(share, self.samples)
            shortfall = shortfall + np.clip(item.threshold - bound, 0, None)
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
            abs(float(to_share(fitted.predict())[row]) - self._measured(measure, row))
            <= self.search.tolerance
            for measure, fitted in self.tested.items()
            for row in self.tests
        )

    @cached_property
    def p_value(self) -> float:
        """The least p-value of the test of the fit, over the measures, times their number."""
        values = [
            fit_p_value(
                fitted,
                self.tests,
                [self._measured_logit(measure, row) for row in self.tests],
            )
            for measure, fitted in self.tested.items()
        ]
        return min(1.0, min(values, default=1.0) * max(len(values), 1))

    def _measured(self, measure: str, row: int) -> float:
        return float(self.attacked[self.search.names[row]][measure].mean())

    def _measured_logit(self, measure: str, row: int) -> float:
        hits = self.attacked[self.search.names[row]][measure]
        return float(to_logit(np.array([hits.sum()], dtype=np.float64), len(hits))[0])

    @cached_property
    def candidates(self) -> Rows:
        """Rows that the refits look at: the chosen one, and those that are likeliest to win."""
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
        return np.unique(np.append(order, self.chosen))

    def draw_gains(self, *, resample: bool) -> Floats:
        """Return by how much each candidate beats the chosen soup in each refit.

        Args:
            resample: Whether each refit takes a bootstrap resample of the samples.

        Returns:
            Gains (refits, candidates) in accuracy.
        """
        rng = np.random.default_rng([self.search.seed, 2])
        rows, chosen = self.candidates, int(np.searchsorted(self.candidates, self.chosen))
        weights = _bootstrap_weights(rng, self.samples) if resample else np.ones((1, self.samples))
        shares: dict[str, Floats] = {
            CLEAN_KEY: np.broadcast_to(self.shares[CLEAN_KEY][rows], (REFITS, len(rows)))
        }
        for measure, fitted in self.fitted.items():
            values = to_logit(weights @ self.hits[measure].T.astype(float), self.samples)
            errors = fitted.draw(rows, rng.standard_normal((REFITS, len(rows))))
            share = to_share(fitted.predict(values)[:, rows] + errors)
            # Only differences from the chosen soup count: the samples are the same for all.
            shares[measure] = share - share[:, [chosen]] + self.shares[measure][self.chosen]
        utility = self.utility(shares, rows)
        return utility - utility[:, [chosen]]

    @cached_property
    def map_gains(self) -> Floats:
        """The gains by the model's error alone."""
        return self.draw_gains(resample=False)

    @cached_property
    def map_chance(self) -> float:
        """The share of draws of the model's error in which a soup beats the chosen one."""
        return float((self.map_gains.max(1) > self.search.tolerance).mean())

    @cached_property
    def chance(self) -> float:
        """The share of refits in which a soup beats the chosen one by more than the tolerance."""
        return float((self.draw_gains(resample=True).max(1) > self.search.tolerance).mean())

    def likeliest_row(self) -> tuple[int, ...]:
        """Return the soup that is not attacked and has the largest chance to change the answer."""
        gains = self.map_gains
        best = gains.argmax(1)
        beats = gains.max(1) > self.search.tolerance
        wins = np.bincount(best[beats], minlength=len(self.candidates)).astype(float)
        spread = sum(fitted.variance[self.candidates] for fitted in self.fitted.values())
        order = np.lexsort((-np.round(spread, 9), -wins))
        for i in order:
            if not self.is_attacked(int(self.candidates[i])):
                return (int(self.candidates[i]),)
        return self.least_known_row()

    def least_known_row(self) -> tuple[int, ...]:
        """Return the soup that is not attacked and whose prediction is least certain."""
        spread = np.asarray(sum(fitted.variance for fitted in self.fitted.values())).copy()
        spread[[row for row in range(len(spread)) if self.is_attacked(row)]] = -1
        row = int(np.argmax(np.round(spread, 9)))
        return () if spread[row] < 0 else (row,)


def lower_bounds(share: Floats, n: int) -> Floats:
    """Return the lower ends of the 95 % Wilson intervals of shares of n samples."""
    centre = share + Z95**2 / (2 * n)
    half = Z95 * np.sqrt(np.clip(share * (1 - share), 0, None) / n + Z95**2 / (4 * n * n))
    return (centre - half) / (1 + Z95**2 / n)


def _bootstrap_weights(rng: np.random.Generator, n: int) -> Floats:
    """Return how often each resample draws each of n samples: (REFITS, n)."""
    return rng.multinomial(n, np.full(n, 1 / n), size=REFITS).astype(np.float64)


def hits_by_name(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Hits]]:
    """Return the hits (n,) of evaluations by name and measure."""
    return {
        name: {measure: hits.numpy() for measure, hits in evaluation.hits().items()}
        for name, evaluation in evaluations.items()
    }


def spread_first(alphas: Sequence[Alpha], model: Model = "gaussian-process") -> tuple[int, ...]:
    """Return the rows of the first soups: the corners, then those where the model knows least.

    They depend on the coefficients alone, so a plan can list them before any work.
    """
    places = Places.of(alphas)
    n = places.coefficients.shape[1]
    corners = list(dict.fromkeys(int(np.argmax(places.coefficients[:, i])) for i in range(n)))
    return (*corners, *spread_rows(places, corners, max(2, n - 1), model))


def order_tests(count: int, first: Sequence[int], *, seed: int) -> tuple[int, ...]:
    """Return the rows of `count` soups without the first in a random order: the first two test.

    Empty for grids that have hardly more soups.
    """
    others = [row for row in range(count) if row not in first]
    if len(others) <= TESTS:
        return ()
    return tuple(others[i] for i in np.random.default_rng([seed, 1]).permutation(len(others)))


def make_search(
    names: Sequence[str],
    alphas: Sequence[Alpha],
    clean_hits: NDArray[np.bool_],
    goal: Goal,
    *,
    step: float,
    tolerance: float,
    seed: int,
) -> SurrogateSearch:
    """Return the search among the soups of a grid.

    Args:
        names: Names of the N soups.
        alphas: Their coefficients.
        clean_hits: (N, n) whether each of n samples is right without an attack.
        goal: What is maximised, and the requirements.
        step: Step of the grid; of a finer one than 0.2, a coarser part is the fallback.
        tolerance: Accuracy that the answer may lose to the best soup.
        seed: Seed of the test soups and of the refits.
    """
    clean = tuple(Accuracy(int(row.sum()), len(row)) for row in clean_hits)
    return SurrogateSearch(
        tuple(names),
        tuple(alphas),
        clean,
        goal,
        shortfall=clean_shortfall(clean_hits, goal, seed=seed),
        tolerance=tolerance,
        seed=seed,
        grid=coarse_names(names, alphas, coarse_step(step)),
    )


def check_modelled(goal: Goal) -> None:
    """Raise RequestError if a surrogate cannot predict what the goal needs."""
    if SHIFT_KEY in goal.measures:
        raise RequestError(
            "shift: a surrogate predicts accuracies under attack alone; leave shift out of the "
            'goal, or search with method "grid"'
        )
    if goal.maximise == KNEE:
        raise RequestError(
            "maximise: the knee depends on the whole front, which a surrogate does not attack; "
            'choose a measure or a sum of measures, or search with method "grid"'
        )


def clean_shortfall(hits: NDArray[np.bool_], goal: Goal, *, seed: int) -> tuple[float, ...]:
    """Return by how much each soup misses the requirements on clean accuracy.

    Without `point`, bounds are compared that hold for all soups at once.

    Args:
        hits: (N, n) whether each sample is right without an attack.
        goal: The requirements.
        seed: Seed of the bootstrap behind the bounds.
    """
    shortfall = np.zeros(len(hits))
    for item in goal.require:
        if item.key == CLEAN_KEY and goal.point:
            shortfall += np.clip(item.threshold - hits.mean(1), 0, None)
        elif item.key == CLEAN_KEY:
            thresholds = np.full(len(hits), item.threshold)
            proof = prove_accuracies(hits.T, thresholds, seed=seed)
            shortfall += np.where(proof.met, 0, item.threshold - proof.low)
    return tuple(map(float, shortfall))


def coarse_step(step: float) -> float:
    """Return the step of the coarse grid that is attacked whole if the model fails.

    It is the finest multiple of the step with 3 to 5 parts; the step itself where there is none.
    """
    parts = round(1 / step)
    return 1 / max((count for count in range(3, 6) if parts % count == 0), default=parts)


def coarse_names(names: Sequence[str], alphas: Sequence[Alpha], step: float) -> frozenset[str]:
    """Return the names of the soups whose coefficients are multiples of a step."""
    return frozenset(
        name
        for name, alpha in zip(names, alphas, strict=True)
        if all(abs(value / step - round(value / step)) < 1e-6 for value in alpha)
    )

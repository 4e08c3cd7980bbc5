"""The surrogate's search: which soups to attack next, and when the answer is settled.

The engine attacks nothing. It requests evaluations, and its decisions depend only on the verdicts
that its caller returns, so that `search`, a recipe's run and a replay of stored verdicts drive the
same engine, and a resumed run gets the same requests:

    engine = SurrogateSearch(...)
    attacked = {}
    while requests := engine.next_requests(attacked):
        attacked |= {request.candidate: hits_of(request) for request in requests}

Clean verdicts of every soup are measured before. The ends (the ingredients) are attacked on all
samples; every other soup on a part of them, the first samples of a random order, and the few that
can be the answer then on the rest. The accuracy of a soup that was attacked on the part is
estimated for all samples: its clean accuracy times the share of its hits that the attack left in
the part, plus what the same estimate misses of the ends, weighted by the soup's coefficients.

The first soups are the ends, a few where the model knows least, and two soups drawn by the seed:
the model without them is tested on them, and then fitted to all. While it fails, the soup that the
model knows least is attacked and two new ones that test the model, which then knows all others.
Then the likeliest finalist is attacked, one at a time: on the part first, and on the rest of the
samples if it is one still. The search ends once, in 95 % of refits, no eligible soup beats all
those that were attacked on all samples by more than the tolerance. Each refit takes one bootstrap
resample of the part, which all soups share, and a draw of the model's error. Where two thirds of
the grid are attacked without an answer, the rest of the grid is attacked on the part too, less the
soups that miss a requirement on clean accuracy, and the finalists come from the attacked soups.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Z95, Accuracy
from robustsoup.evaluation.simultaneous import prove_accuracies
from robustsoup.evaluation.two_phase import attacked_rows, subset_rows
from robustsoup.evaluation.verdicts import CLEAN_KEY, SHIFT_KEY, Evaluation
from robustsoup.settings import AttackSettings
from robustsoup.soups.goal import KNEE, Goal, Requirement, Score
from robustsoup.soups.grid import Alpha
from robustsoup.soups.screening import EvaluationRequest
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
from robustsoup.soups.time_limit import TimeLimit

Hits = NDArray[np.bool_]
"""(n,) whether each of n samples is right; of a soup attacked on the part, (m,) of its samples."""
Rows = NDArray[np.int64]
"""(r,) rows of soups."""

REFITS = 400
TESTS = 2
"""Soups that test the fit."""
CHANCE = 0.05
"""Share of refits in which a soup may beat the answer, and level of the test of the fit."""
MOST_OF_GRID = 2 / 3
"""Share of the grid that is attacked without an answer before the rest is attacked too."""
MOST_ROWS = 300
"""Soups that a refit looks at: the ones that are most likely to win."""
PART_SHARE = 3
"""The part has one in this many samples."""
SMALLEST_PART = 256
"""Samples of the part, at least; of fewer than twice as many samples, all are attacked at once."""

Stage = Literal["begin", "search", "misfit", "grid", "settled"]


def count_part(n: int, attack: AttackSettings, *, shift: bool = False) -> int | None:
    """Return how many of n samples most soups are attacked on; None for all of them.

    Args:
        n: Number of samples.
        attack: The attack; one that takes many samples together cannot attack a part.
        shift: Whether natural shift is measured too, which each evaluation would repeat.
    """
    if n < 2 * SMALLEST_PART or not attack.attacks_each_alone or shift:
        return None
    return max(SMALLEST_PART, n // PART_SHARE)


@dataclass(frozen=True)
class PredictedSoup:
    """What the surrogate says about one soup.

    Attributes:
        name: Name of the soup.
        alpha: (n,) coefficients.
        clean: Measured clean accuracy.
        attacked: Whether the soup was attacked, on all samples or on the part.
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
        chosen: Row of the soup with the best estimate; None at the beginning.
        chance: Share of refits in which a soup beats all that were attacked on all samples by more
            than the tolerance.
        p_value: p-value of the test of the fit; the least of all measures.
        next: What to attack next; empty at the end.
    """

    stage: Stage
    chosen: int | None
    chance: float
    p_value: float
    next: tuple[EvaluationRequest, ...]


@dataclass(frozen=True, eq=False)
class SurrogateSearch:
    """Decides which soups a search by surrogate attacks.

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
        screened: Survivors of a short attack on each soup, if there was one.
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
    screened: tuple[Accuracy, ...] = ()
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

    def first_requests(self) -> tuple[EvaluationRequest, ...]:
        """Return the first requests, which depend on no verdict."""
        if not self.test_rows:
            return tuple(EvaluationRequest(self.names[row]) for row in self.grid_rows)
        return first_requests(
            self.names, self.alphas, self.part_size, seed=self.seed, model=self.model
        )

    @property
    def part_size(self) -> int | None:
        """Number of samples of the part; None where all are attacked."""
        return None if self.part is None else int(self.part.sum())

    def next_requests(
        self, attacked: Mapping[str, Mapping[str, Hits]]
    ) -> tuple[EvaluationRequest, ...]:
        """Return what to attack next; empty at the end.

        A request has a `subset` if it is about the part, and an `after` if the soup was attacked on
        the part before.

        Args:
            attacked: For each attacked soup, its hits by measure.
        """
        return self.state(attacked).next

    def count_in_full(self, attacked: Mapping[str, Mapping[str, Hits]]) -> int:
        """Return how many soups were attacked on all samples."""
        return sum(
            all(len(hits) == self.samples for hits in by_measure.values())
            for by_measure in attacked.values()
        )

    def state(self, attacked: Mapping[str, Mapping[str, Hits]]) -> SurrogateState:
        """Return where the search stands, given the verdicts so far."""
        if not self.measures:
            chosen = _Refits(self, attacked).chosen
            rest = (
                () if self.names[chosen] in attacked else (EvaluationRequest(self.names[chosen]),)
            )
            return SurrogateState("settled", chosen, 0.0, 1.0, rest)
        waiting = tuple(item for item in self.first_requests() if item.candidate not in attacked)
        if waiting:
            return SurrogateState("begin", None, 1.0, 1.0, waiting)
        if not self.test_rows:
            return SurrogateState("grid", None, 1.0, 1.0, ())
        return self._next_state(_Refits(self, attacked))

    def _next_state(self, refits: "_Refits") -> SurrogateState:
        """Return where the search stands once the first soups are attacked."""
        fits = refits.fits_hold
        rest = tuple(row for row in self.grid_rows if not refits.is_attacked(row))
        finalists, chance = refits.find_finalists(predicted=bool(rest))
        many = len(refits.attacked) >= self.most_attacks
        whole = not rest and (many or not fits)
        if fits and not finalists and not whole:
            stage, rows = "settled", ()
        elif rest and many:
            stage, rows = "grid", rest
        elif fits or not rest:
            stage, rows = "grid" if whole else "search", finalists[:1]
        else:
            more = dict.fromkeys((*refits.least_known_row(), *refits.test_pairs[1]))
            stage, rows = "misfit", tuple(row for row in more if not refits.is_attacked(row))
        return refits.state(stage, chance, self._requests(refits, rows))

    def _requests(
        self, refits: "_Refits", rows: Sequence[int], *, in_full: bool = False
    ) -> tuple[EvaluationRequest, ...]:
        """Return the next attack on each of some soups: on the part, then on all samples.

        Args:
            refits: The refits.
            rows: Rows of the soups.
            in_full: Whether soups that were not attacked are attacked on all samples at once.
        """
        requests: list[EvaluationRequest] = []
        for row in rows:
            part = EvaluationRequest(self.names[row], subset=self.part_size)
            if refits.is_attacked(row):
                requests.append(EvaluationRequest(self.names[row], after=part))
            else:
                requests.append(replace(part, subset=None) if in_full else part)
        return tuple(requests)

    def last_requests(
        self, attacked: Mapping[str, Mapping[str, Hits]]
    ) -> tuple[EvaluationRequest, ...]:
        """Return the finalists as they stand, the likeliest first, where time allows for no more.

        Args:
            attacked: For each attacked soup, its hits by measure.
        """
        if self.state(attacked).chosen is None or not self.measures:
            return ()
        refits = _Refits(self, attacked)
        return self._requests(refits, refits.find_finalists(predicted=True)[0], in_full=True)

    def predict(self, attacked: Mapping[str, Mapping[str, Hits]]) -> list[PredictedSoup]:
        """Return what the model says about every soup, fitted to all attacked ones.

        Args:
            attacked: For each attacked soup, its hits by measure.

        Returns:
            The prediction for each soup; empty while the first soups are not attacked yet.
        """
        if self.measures and self.state(attacked).chosen is None:
            return []
        refits = _Refits(self, attacked)
        bands: list[dict[str, tuple[float, float, float]]] = [{} for _ in self.names]
        for measure, fitted in refits.fitted.items():
            logits = fitted.predict()
            share = to_share(logits)
            of_part = fitted.predict(refits.resampled[measure]).var(0)
            sampling = 1 / (self.samples * share * (1 - share))
            half = Z95 * np.sqrt(fitted.variance + of_part + sampling)
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
        self.samples = search.samples
        self.rows = sorted(search.names.index(name) for name in attacked)
        self.hits = {
            measure: [attacked[search.names[row]][measure] for row in self.rows]
            for measure in search.measures
        }
        part = np.ones(self.samples, bool) if search.part is None else search.part
        self.estimates = {
            measure: _Estimates(search, self.rows, hits, part)
            for measure, hits in self.hits.items()
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
            for row, *hits in zip(self.rows, *self.hits.values(), strict=True)
            if all(len(item) == self.samples for item in hits)
        ]

    def state(
        self, stage: Stage, chance: float, requests: tuple[EvaluationRequest, ...]
    ) -> SurrogateState:
        """Return the state of the search; at the end, verdicts on all samples choose."""
        chosen = self.chosen if requests else self.best_in_full
        return SurrogateState(stage, chosen, chance, self.p_value, requests)

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


class _Estimates:
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

    def __init__(
        self, search: SurrogateSearch, rows: list[int], hits: Sequence[Hits], part: Hits
    ) -> None:
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


def lower_bounds(share: Floats, n: int) -> Floats:
    """Return the lower ends of the 95 % Wilson intervals of shares of n samples."""
    centre = share + Z95**2 / (2 * n)
    half = Z95 * np.sqrt(np.clip(share * (1 - share), 0, None) / n + Z95**2 / (4 * n * n))
    return (centre - half) / (1 + Z95**2 / n)


def hits_by_name(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Hits]]:
    """Return the hits of evaluations by name and measure, on the samples that were attacked."""
    hits: dict[str, dict[str, Hits]] = {}
    for name, evaluation in evaluations.items():
        attacked = attacked_rows(evaluation.ids, evaluation.record)
        hits[name] = {key: mask[attacked].numpy() for key, mask in evaluation.hits().items()}
    return hits


def requests_in_time(
    search: SurrogateSearch, attacked: Mapping[str, Mapping[str, Hits]], limit: TimeLimit
) -> tuple[tuple[EvaluationRequest, ...], bool]:
    """Return what to attack next, one soup at a time with a limit, and whether the limit decided.

    An attack on the part leaves time for one on all samples; without that time the finalists as
    they stand are attacked on all samples, so that the answer is among them.

    Args:
        search: The search.
        attacked: For each attacked soup, its hits by measure.
        limit: The time limit.
    """
    requests = search.next_requests(attacked)
    if limit.seconds is None or not requests:
        return requests, False
    if limit.begin_soup(1 if requests[0].subset is None else 2) or not attacked:
        return requests[:1], False
    last = search.last_requests(attacked)
    return (last[:1] if last and limit.begin_soup() else ()), True


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


def first_requests(
    names: Sequence[str],
    alphas: Sequence[Alpha],
    part: int | None,
    *,
    seed: int,
    model: Model = "gaussian-process",
) -> tuple[EvaluationRequest, ...]:
    """Return the first requests of a search, which depend on no verdict.

    Args:
        names: Names of the soups.
        alphas: Their coefficients.
        part: Samples that all but the ends are attacked on; all of them if None.
        seed: Seed of the soups that test the fit.
        model: The model.
    """
    first, ends = spread_first(alphas, model), end_rows(alphas)
    tests = order_tests(len(names), first, seed=seed)[:TESTS]
    if not tests:
        return tuple(map(EvaluationRequest, names))
    return tuple(
        EvaluationRequest(names[row], subset=None if row in ends else part)
        for row in (*first, *tests)
    )


def make_search(
    names: Sequence[str],
    alphas: Sequence[Alpha],
    clean_hits: NDArray[np.bool_],
    goal: Goal,
    *,
    part: NDArray[np.bool_] | None,
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
        part: (n,) bool, the samples that most soups are attacked on; all of them if None.
        step: Step of the grid; of a finer one than 0.2, a coarser part is the fallback.
        tolerance: Accuracy that the answer may lose to the best soup.
        seed: Seed of the test soups and of the refits.
    """
    return SurrogateSearch(
        tuple(names),
        tuple(alphas),
        clean_hits,
        goal,
        part,
        shortfall=clean_shortfall(clean_hits, goal, seed=seed),
        tolerance=tolerance,
        seed=seed,
        grid=coarse_names(names, alphas, coarse_step(step)),
    )


def choose_part(
    ids: Tensor, attack: AttackSettings, *, shift: bool = False
) -> NDArray[np.bool_] | None:
    """Return the samples that most soups are attacked on, (n,) bool; None for all of them.

    Args:
        ids: (n,) ids of the samples.
        attack: The attack.
        shift: Whether natural shift is measured too; see `count_part`.
    """
    count = count_part(len(ids), attack, shift=shift)
    return None if count is None else subset_rows(ids, count, seed=attack.seed).numpy()


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

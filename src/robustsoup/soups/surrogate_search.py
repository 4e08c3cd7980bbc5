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
estimated for all samples by linear regression on the hits of the soups that were attacked in full
and on its own clean hits.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from robustsoup.soups.goal import KNEE, Goal
from robustsoup.soups.grid import Alpha
from robustsoup.soups.screening import EvaluationRequest
from robustsoup.soups.surrogate import Model, to_share
from robustsoup.soups.surrogate_map import TESTS, SoupMap, end_rows, order_tests, spread_first
from robustsoup.soups.surrogate_refits import Hits, HitsByName, Refits
from robustsoup.soups.time_limit import Late, TimeLimit

MOST_OF_GRID = 2 / 3
"""Share of the grid that is attacked without an answer before the rest is attacked too."""
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


class SurrogateSearch(SoupMap):
    """Decides which soups a search by surrogate attacks."""

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

    def next_requests(self, attacked: HitsByName) -> tuple[EvaluationRequest, ...]:
        """Return what to attack next; empty at the end.

        A request has a `subset` if it is about the part, and an `after` if the soup was attacked on
        the part before.
        """
        return self.state(attacked).next

    def _is_begun(self, attacked: HitsByName) -> bool:
        """Return whether the model can be fitted: some soups test it, the first are attacked."""
        first = (request.candidate for request in self.first_requests())
        return bool(self.test_rows) and all(name in attacked for name in first)

    def state(self, attacked: HitsByName) -> SurrogateState:
        """Return where the search stands, given the verdicts so far."""
        if not self.measures:
            refits = Refits(self, attacked)
            rows = () if refits.chosen in refits.in_full else (refits.chosen,)
            rest = self._requests(refits, rows, in_full=True)
            return SurrogateState("settled", refits.chosen, 0.0, 1.0, rest)
        waiting = tuple(item for item in self.first_requests() if item.candidate not in attacked)
        if waiting:
            return SurrogateState("begin", None, 1.0, 1.0, waiting)
        if not self.test_rows:
            return SurrogateState("grid", None, 1.0, 1.0, ())
        return self._next_state(Refits(self, attacked))

    def _next_state(self, refits: Refits) -> SurrogateState:
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
        requests = self._requests(refits, rows)
        chosen = refits.chosen if requests else refits.best_in_full
        return SurrogateState(stage, chosen, chance, refits.p_value, requests)

    def _requests(
        self, refits: Refits, rows: Sequence[int], *, in_full: bool = False
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

    def last_requests(self, attacked: HitsByName) -> tuple[EvaluationRequest, ...]:
        """Return the finalists as they stand, the likeliest first, if time allows for no more."""
        if not (self.measures and self._is_begun(attacked)):
            return ()
        refits = Refits(self, attacked)
        return self._requests(refits, refits.find_finalists(predicted=True)[0], in_full=True)

    def predict(self, attacked: HitsByName) -> list[PredictedSoup]:
        """Return what the model says about every soup, fitted to all attacked ones.

        Returns:
            The prediction for each soup; empty while the first soups are not attacked yet.
        """
        if self.measures and not self._is_begun(attacked):
            return []
        refits = Refits(self, attacked)
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


def hits_by_name(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Hits]]:
    """Return the hits of evaluations by name and measure, on the samples that were attacked."""
    hits: dict[str, dict[str, Hits]] = {}
    for name, evaluation in evaluations.items():
        attacked = attacked_rows(evaluation.ids, evaluation.record)
        hits[name] = {key: mask[attacked].numpy() for key, mask in evaluation.hits().items()}
    return hits


def requests_in_time(
    search: SurrogateSearch, attacked: HitsByName, limit: TimeLimit
) -> tuple[tuple[EvaluationRequest, ...], bool]:
    """Return what to attack next, one soup at a time with a limit, and whether the limit decided.

    An attack on the part leaves time for one on all samples; without that time the finalists as
    they stand are attacked on all samples, so that the answer is among them.

    Args:
        search: The search.
        attacked: The verdicts so far.
        limit: The time limit.
    """
    requests = search.next_requests(attacked)
    if limit.seconds is None or not requests:
        return requests, False
    if limit.begin_soup(1 if requests[0].subset is None else 2) or not attacked:
        return requests[:1], False
    last = search.last_requests(attacked)
    return (last[:1] if last and limit.begin_soup() else ()), True


def count_late(search: SurrogateSearch, attacked: HitsByName) -> Late:
    """Return what a search that the time limit ended did not attack."""
    begun = [request for request in search.last_requests(attacked) if request.after is not None]
    return Late(len(search.names) - len(attacked), len(begun))


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

"""The screening engine: decide which soups to attack in full, and on how many samples.

The engine evaluates nothing. It names evaluations as `EvaluationRequest`s, and its decisions depend
only on the evaluations that its caller returns. `search` runs the requests in process; a recipe's
run turns each of them into a stored step. A caller works as follows:

    screening = Screening(ingredients, contenders, goal, samples=len(split))
    results = {request: evaluate_it(request) for request in screening.first_requests()}
    while batch := screening.next_requests(results):
        results |= {request: evaluate_it(request) for request in batch}
    final = screening.final_evaluations(results)

`run_screening` is this loop, with a time limit. `first_requests` depends on no result, so a planner
can list these evaluations (and price them) before any work; the requests of one batch do not depend
on each other, except that an evaluation needs those of its `pool` and `after`. `next_requests` is a
pure function of `results`: a resumed run that reloads the same evaluations gets the same requests.

A request is evaluated with these arguments of `evaluate`:

- the attack of the full protocol, or for `mode == "short"` the one of `short_attack`;
- `keep_points=request.keep_points`;
- `pool=[results[item] for item in request.pool]`;
- `after=results[request.after]` unless that is None;
- `subset=request.subset`;

and the evaluation of a short request is passed through `mark_screened` before it is stored.

The short attack on all samples is the first phase of two-phase sampling, the full attack on the
first round of the race (`round_ends`) the second one: every contender gets an estimate without bias
(`robustsoup.evaluation.two_phase`). Its later evaluations continue in the same order of samples. On
fewer samples than two rounds have there is no such part, and what the short attack leaves is an
upper bound.

A request with `keep_points` evaluates an ingredient. Its adversarial points are then tried on every
contender, so that no contender looks stronger only because it faced fewer points.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.settings import AttackSettings
from robustsoup.soups.goal import Goal
from robustsoup.soups.racing import Race, round_ends
from robustsoup.soups.selection import Candidate, judge, select, worth_confirming
from robustsoup.soups.time_limit import Late, TimeLimit


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation that a screening needs.

    Attributes:
        candidate: Name of the ingredient (with `keep_points`) or of the contender.
        mode: "full" runs the whole protocol, "short" a brief attack.
        keep_points: Whether to keep the adversarial points for the pool.
        pool: Requests whose adversarial points are tried before the attack.
        after: Request for the same network whose verdicts this evaluation starts from.
        subset: Number of samples to attack, the first ones of the race; None for all.
    """

    candidate: str
    mode: Literal["full", "short"] = "full"
    keep_points: bool = False
    pool: "tuple[EvaluationRequest, ...]" = ()
    after: "EvaluationRequest | None" = None
    subset: int | None = None


EvaluationsByRequest = Mapping[EvaluationRequest, Evaluation]


@dataclass(frozen=True)
class Contender:
    """A soup that takes part in a screening.

    Attributes:
        name: Unique among the contenders.
        ingredient: Name of the ingredient with the same weights and buffers, whose evaluation is
            reused; None if there is none.
        mode: How the soup is evaluated first. "short" suits large families such as grids; a "full"
            contender is never confirmed again.
    """

    name: str
    ingredient: str | None = None
    mode: Literal["full", "short"] = "short"


@dataclass(frozen=True)
class Screening:
    """Decides which evaluations a screened search needs.

    Every ingredient is attacked in full and keeps its adversarial points. Every contender is then
    attacked with these points and, unless it is evaluated in full, a short attack on all samples
    and the full attack on the first round of them. Two rules decide which screened contenders are
    attacked further:

    - If the goal maximises accuracy under the one threat that is evaluated, and requires nothing
      but clean accuracy, the contenders that can still win race (`Race`), the most promising
      first, until each has run all rounds or has left. If no contender meets the requirements, the
      contenders closest to meeting them compete.
    - Otherwise the contenders of `worth_confirming` are attacked in full, and the contender that
      the goal would choose by what is known of all, one after the other, until it would choose one
      that was attacked in full.

    Attributes:
        ingredients: Names of the ingredients.
        contenders: The soups, in the order that breaks ties.
        goal: What is chosen at the end; `Goal()` if no soup is chosen.
        samples: Number of samples of the evaluations.
        alpha: Probability with which the best contender may leave the race.
        seed: Seed of the bounds by which the requirements are judged; that of the final choice.
    """

    ingredients: tuple[str, ...]
    contenders: tuple[Contender, ...]
    goal: Goal
    samples: int
    alpha: float = 0.05
    seed: int = 0

    @cached_property
    def pool(self) -> tuple[EvaluationRequest, ...]:
        """The full evaluations of the ingredients, which keep their adversarial points."""
        return tuple(EvaluationRequest(name, keep_points=True) for name in self.ingredients)

    def first_request(self, contender: Contender) -> EvaluationRequest:
        """Return the first evaluation of a contender, which depends on those of the pool alone."""
        if contender.ingredient is None:
            return EvaluationRequest(contender.name, contender.mode, pool=self.pool)
        ingredient = self.pool[self.ingredients.index(contender.ingredient)]
        return EvaluationRequest(contender.name, pool=self.pool, after=ingredient)

    def opening_request(self, contender: Contender) -> EvaluationRequest:
        """Return the last evaluation of a contender that depends on those of the pool alone."""
        first = self.first_request(contender)
        if first.mode == "full" or len(self.ends) == 1:
            return first
        return self._continue(first, self.ends[0])

    def first_requests(self) -> tuple[EvaluationRequest, ...]:
        """Return the evaluations that depend on no result: the pool, then those of contenders."""
        firsts = map(self.first_request, self.contenders)
        openings = map(self.opening_request, self.contenders)
        return tuple(dict.fromkeys([*self.pool, *firsts, *openings]))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """How many samples have been attacked at the end of each round."""
        return round_ends(self.samples)

    def next_requests(self, results: EvaluationsByRequest) -> tuple[EvaluationRequest, ...]:
        """Return the next confirmations, given all evaluations so far; empty if there are none.

        Args:
            results: The evaluations of all first requests and of all earlier confirmations.

        Returns:
            Requests that do not depend on each other.
        """
        screened = self._screened_candidates(results)
        if not screened:
            return ()
        measure = decisive_measure(self.goal, list(screened[0].evaluation.threats))
        if measure is not None:
            return self._next_round(measure, results)
        names = {c.name for c in (*worth_confirming(screened), *self._list_ahead(results)[:1])}
        return tuple(
            self._continue(opening, None)
            for contender in self.contenders
            if contender.name in names
            and (opening := self.opening_request(contender)) == self._latest(contender, results)
        )

    def pending(self, results: EvaluationsByRequest) -> tuple[str, ...]:
        """Return the contenders that can still win and are not attacked in full yet."""
        screened = self._screened_candidates(results)
        if not screened:
            return ()
        measure = decisive_measure(self.goal, list(screened[0].evaluation.threats))
        if measure is not None:
            return tuple(self._run_race(measure, results).running)
        names = [request.candidate for request in self.next_requests(results)]
        return tuple(dict.fromkeys([*names, *(c.name for c in self._list_ahead(results))]))

    def final_evaluations(self, results: EvaluationsByRequest) -> dict[str, Evaluation]:
        """Return the last evaluation of each contender, by name, in the contenders' order."""
        return {item.name: results[self._latest(item, results)] for item in self.contenders}

    def _latest_candidates(self, results: EvaluationsByRequest) -> list[Candidate]:
        latest = self.final_evaluations(results)
        return [Candidate(name, (), evaluation) for name, evaluation in latest.items()]

    def _screened_candidates(self, results: EvaluationsByRequest) -> list[Candidate]:
        return [
            Candidate(item.name, (), results[self.first_request(item)]) for item in self.contenders
        ]

    def _latest(self, contender: Contender, results: EvaluationsByRequest) -> EvaluationRequest:
        """Return the request of the last evaluation of a contender."""
        latest = self.opening_request(contender)
        while latest.mode == "short" or latest.subset is not None:
            following = [self._continue(latest, end) for end in self._further_ends(latest)]
            done = [request for request in following if request in results]
            if not done:
                break
            latest = done[0]
        return latest

    def _further_ends(self, request: EvaluationRequest) -> tuple[int | None, ...]:
        """Return the sizes that may follow a subset: that of the next round, and all samples."""
        after = [end for end in self.ends[:-1] if end > (request.subset or 0)]
        return (*after[:1], None)

    def _continue(self, request: EvaluationRequest, subset: int | None) -> EvaluationRequest:
        """Return the full attack that follows; the points of the pool were tried before."""
        return EvaluationRequest(request.candidate, after=request, subset=subset)

    def _list_ahead(self, results: EvaluationsByRequest) -> list[Candidate]:
        """Return the contenders that the goal ranks above all that were attacked in full."""
        goal = self.goal
        if goal.maximise is None:
            return []
        ranking = select(
            self._latest_candidates(results),
            maximise=goal.maximise,
            require=goal.require,
            point=goal.point,
            seed=self.seed,
            unconfirmed=True,
        ).ranking
        return list(itertools.takewhile(lambda item: not item.confirmed, ranking))

    def _next_round(
        self, measure: str, results: EvaluationsByRequest
    ) -> tuple[EvaluationRequest, ...]:
        """Attack the contender with the highest estimate that is still in the race once more.

        It runs its next round; without a leader it runs all, as it will lead.
        """
        standing = self._run_race(measure, results)
        if not standing.running:
            return ()
        favourite = standing.running[0]
        contender = next(item for item in self.contenders if item.name == favourite)
        request = self._latest(contender, results)
        subset = None if standing.leading is None else self._further_ends(request)[0]
        return (self._continue(request, subset),)

    def _run_race(self, measure: str, results: EvaluationsByRequest) -> "_Standing":
        candidates = self._latest_candidates(results)
        eligible = judge(candidates, self.goal, seed=self.seed).eligible(candidates)
        scores = {c.name: c.evaluation.accuracy[measure] for c in eligible}
        leading = max((scores[c.name].hits for c in eligible if c.confirmed), default=None)
        race = Race(len(eligible), leading, self.alpha)
        running = [
            c.name for c in eligible if not c.confirmed and not race.has_lost(scores[c.name])
        ]
        running.sort(key=lambda name: (-scores[name].value, -scores[name].hits))
        return _Standing(leading, running)


@dataclass(frozen=True)
class _Standing:
    """A race after some rounds.

    Attributes:
        leading: Hits of the leader; None while no soup ran all rounds.
        running: The soups that can still win, the most promising first.
    """

    leading: int | None
    running: list[str]


def run_screening(
    screening: Screening,
    evaluate: Callable[[EvaluationRequest, EvaluationsByRequest], Evaluation],
    *,
    limit: TimeLimit | None = None,
    order: Sequence[int] | None = None,
) -> tuple[dict[str, Evaluation], Late]:
    """Run a screening to its end, or until the time is over.

    Args:
        screening: The screening.
        evaluate: Evaluates one request; its second argument holds all earlier evaluations, those
            of the request's `pool` and `after` among them.
        limit: Decides whether another contender or another round is begun; the first contender is.
        order: Positions of the contenders in the order in which they begin; by default their own.

    Returns:
        The last evaluation of each contender that began, by name, and what came too late.
    """
    limit = limit or TimeLimit(None)
    results: dict[EvaluationRequest, Evaluation] = {}

    def run(requests: Iterable[EvaluationRequest]) -> None:
        for request in requests:
            if request not in results:
                results[request] = evaluate(request, results)

    run(screening.pool)
    begun: set[Contender] = set()
    for position in order or range(len(screening.contenders)):
        if not limit.begin_soup() and begun:
            break
        contender = screening.contenders[position]
        run([screening.first_request(contender), screening.opening_request(contender)])
        begun.add(contender)
        limit.end_soup()
    left_out = len(screening.contenders) - len(begun)
    rest = replace(screening, contenders=tuple(c for c in screening.contenders if c in begun))
    while batch := rest.next_requests(results):
        if not limit.begin_soup():
            return rest.final_evaluations(results), Late(left_out, len(rest.pending(results)))
        run(batch)
        limit.end_soup()
    return rest.final_evaluations(results), Late(left_out)


def short_attack(
    settings: AttackSettings, screen_steps: int, *, precision: str = "auto"
) -> AttackSettings:
    """Return the brief attack of a screening.

    Args:
        settings: The attack of the full protocol.
        screen_steps: Steps of the brief attack; at most those of the full one.
        precision: Arithmetic of the search; "auto" is bfloat16 where the device supports it
            natively.

    Returns:
        The same attack with one restart and without the masking check, which the evaluations that
        follow make.
    """
    return replace(
        settings,
        steps=min(screen_steps, settings.steps),
        restarts=1,
        precision=precision,
        masking_check=False,
    )


def decisive_measure(goal: Goal, attacked: Sequence[str]) -> str | None:
    """Return the attacked measure that alone decides a choice, by a race; None if others matter.

    Args:
        goal: What is chosen.
        attacked: The threats that are attacked.
    """
    alone = list(attacked) == [goal.maximise] and not goal.requires_attacked
    return goal.maximise if alone else None


def mark_screened(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation, with its attack recorded as a brief one."""
    return replace(evaluation, record={**evaluation.record, "screened": True})

"""What each method of a search tries: one function for each way to evaluate soups."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from robustsoup.evaluation.masking import MOST_OTHERS
from robustsoup.evaluation.simultaneous import Hits
from robustsoup.evaluation.two_phase import SUBSET_KEY
from robustsoup.evaluation.verdicts import CLEAN_KEY, Evaluation
from robustsoup.progress import Progress
from robustsoup.settings import ALL_METHODS, LearnSettings, SearchSettings
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.explanation import describe_soup
from robustsoup.soups.goal import KNEE, Goal, Score, default_measure
from robustsoup.soups.greedy import greedy
from robustsoup.soups.grid import Alpha, alpha_name, corners, list_alphas, spread_order
from robustsoup.soups.learned_search import (
    LEARNING,
    TOGETHER,
    LearnedFamily,
    name_learned,
    name_positions,
)
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.screening import (
    Contender,
    EvaluationRequest,
    EvaluationsByRequest,
    Screening,
    run_screening,
)
from robustsoup.soups.selection import Candidate
from robustsoup.soups.soup_evaluator import SoupEvaluator
from robustsoup.soups.surrogate_search import (
    PredictedSoup,
    check_modelled,
    choose_part,
    count_late,
    hits_by_name,
    make_search,
    requests_in_time,
)
from robustsoup.soups.time_limit import Late, TimeLimit
from robustsoup.threats import parse_threats

SearchMethod = str | Callable[..., Any]
"""A name of `catalog.SOUP_METHODS`, "all", or a function that lists coefficients."""


class SearchProgress:
    """Reports how many soups are evaluated."""

    def __init__(self, on_progress: Progress | None, total: int) -> None:
        self.on_progress, self.done, self.total = on_progress, 0, total

    def report(self, name: str, evaluation: Evaluation) -> Evaluation:
        """Count an evaluation, report it and return it."""
        self.done += 1
        if self.on_progress is not None:
            clean = evaluation.accuracy[CLEAN_KEY].value
            self.on_progress(self.done, self.total, f"{name} clean {clean:.1%}")
        return evaluation

    def of_learning(self, name: str) -> Progress | None:
        """Return what reports the steps of learning, without counting a soup."""
        report = self.on_progress
        if report is None:
            return None

        def report_step(done: int, total: int, figures: str) -> None:
            report(self.done, self.total, f"learning {name}: {done} of {total}, {figures}")

        return report_step


@dataclass(frozen=True)
class Tried:
    """What a method tried.

    Attributes:
        candidates: The evaluated soups.
        looked_at: (n, k) clean hits of soups that were measured without an attack.
        predicted: What the surrogate says about every soup.
        ingredients: Evaluations of ingredients that are known, by name.
        late: What the time limit left out.
        dropped: Number of soups that the greedy search attacked and that are no candidates.
    """

    candidates: list[Candidate]
    looked_at: Hits | None = None
    predicted: tuple[PredictedSoup, ...] = ()
    ingredients: Mapping[str, Evaluation] = field(default_factory=dict)
    late: Late = field(default_factory=Late)
    dropped: int = 0


@dataclass(frozen=True)
class MethodRun:
    """What the functions that run a method share.

    Attributes:
        evaluator: Mixes and evaluates soups.
        settings: The settings of the search.
        aim: The goal with the default of what is maximised.
        progress: Receives progress.
        limit: Decides whether another soup is begun.
    """

    evaluator: SoupEvaluator
    settings: SearchSettings
    aim: Goal
    progress: SearchProgress
    limit: TimeLimit


def methods_of(settings: SearchSettings) -> tuple[SearchMethod, ...]:
    """Return the method of a search, or those that "all" joins."""
    return TOGETHER if settings.method == ALL_METHODS else (settings.method,)


def count_soups(evaluator: SoupEvaluator, method: SearchMethod, settings: SearchSettings) -> int:
    """Return the most soups that a method may try."""
    n = len(evaluator.ingredients)
    if method == "greedy":
        return 2 * n - 1
    if method in LEARNING:
        return LearnedFamily.of(str(method), parse_threats(evaluator.threats), settings.sweep).size
    return len(list_alphas(method, settings, n))


def search_by(
    run: MethodRun,
    method: SearchMethod,
    known: Mapping[Alpha, Evaluation] = MappingProxyType({}),
) -> Tried:
    """Evaluate the soups of one method; `known` are not attacked again by the surrogate."""
    evaluator, settings = run.evaluator, run.settings
    if method == "greedy":
        tried = [evaluator.describe(item) for item in _search_greedily(run, {})]
        ingredients = {item.ingredient: item.evaluation for item in tried if item.ingredient}
        soup = replace(tried[-1], name="greedy")
        return Tried([soup], ingredients=ingredients, dropped=len(tried) - 1)
    if method in LEARNING:
        return _search_among_learned(run, str(method), _evaluate_ingredients_first(evaluator))
    alphas = list_alphas(method, settings, len(evaluator.ingredients))
    named = {alpha_name(alpha): alpha for alpha in alphas}
    if method == "surrogate":
        check_modelled(run.aim)
        return _search_by_surrogate(run, named, known)
    if settings.screen:
        return _search_screened(run, named)
    return _search_in_full(run, named)


def _search_in_full(run: MethodRun, alphas: Mapping[str, Alpha]) -> Tried:
    """Evaluate the ingredients among the soups first: the masking check tries their points.

    With a time limit the order of the others is such that each is far from those before it.
    """
    evaluator, limit = run.evaluator, run.limit
    keep_points = evaluator.tries_points_of_others
    ingredients = set(corners(len(evaluator.ingredients)))
    items = sorted(alphas.items(), key=lambda item: item[1] not in ingredients)
    if limit.seconds is not None:
        items = [items[row] for row in spread_order([alpha for _, alpha in items])]
    others: list[Evaluation] = []
    evaluations: dict[str, Evaluation] = {}
    for name, alpha in items:
        if not limit.begin_soup() and evaluations:
            break
        if alpha in ingredients:
            evaluation = evaluator.evaluate(alpha, keep_points=keep_points)
            if keep_points and len(others) < MOST_OTHERS:
                others.append(evaluation)
        else:
            evaluation = evaluator.evaluate(alpha, others=others)
        evaluations[name] = run.progress.report(name, evaluation.without_points())
        limit.end_soup()
    candidates = _list_candidates(alphas, evaluations)
    return Tried(candidates, late=Late(left_out=len(alphas) - len(candidates)))


def _evaluate_ingredients_first(evaluator: SoupEvaluator) -> dict[str, Evaluation]:
    """Evaluate the ingredients, with their points if the masking check of soups tries them."""
    return evaluator.evaluate_ingredients(keep_points=evaluator.tries_points_of_others)


def _list_candidates(
    alphas: Mapping[str, Alpha], evaluations: Mapping[str, Evaluation]
) -> list[Candidate]:
    """Return a candidate for each soup that was evaluated, in the order of `alphas`."""
    return [
        Candidate(name, alpha, evaluations[name])
        for name, alpha in alphas.items()
        if name in evaluations
    ]


def _search_among_learned(
    run: MethodRun, method: str, ingredients: Mapping[str, Evaluation]
) -> Tried:
    """Learn soups, or a dial, and evaluate them.

    Args:
        run: The search.
        method: "learned" or "dial".
        ingredients: The ingredients with their points, by name.
    """
    evaluator, limit = run.evaluator, run.limit
    family = LearnedFamily.of(method, parse_threats(evaluator.threats), run.settings.sweep)
    others = list(ingredients.values()) if evaluator.tries_points_of_others else []
    candidates: list[Candidate] = []
    for name, words, learn_soup in _list_learned(run, method, family):
        if not limit.begin_soup() and candidates:
            break
        coefficients = learn_soup()
        evaluation = evaluator.evaluate(coefficients, others=others[:MOST_OTHERS])
        evaluation = run.progress.report(name, evaluation.without_points())
        candidates.append(Candidate(name, (), evaluation, words, coefficients=coefficients))
        limit.end_soup()
    known = {name: evaluation.without_points() for name, evaluation in ingredients.items()}
    late = Late(left_out=family.size - len(candidates))
    return Tried(candidates, ingredients=known, late=late)


def _list_learned(
    run: MethodRun, method: str, family: LearnedFamily
) -> Iterator[tuple[str, str, Callable[[], Coefficients]]]:
    """Yield name, description and a function that learns, for each soup of a family."""
    names, describe = run.evaluator.names, partial(describe_soup, (), method=method)
    each = family.list_settings(run.evaluator.learn)
    if method == "dial":
        make_dial = cache(lambda: _learn_dial(run, each[0]))
        soups = name_positions(method, family.threats, family.positions)
        for name, t in zip(soups, family.positions, strict=True):
            yield name, describe(names, at=t), lambda t=t: make_dial().at(t)
        return
    soups = name_learned(method, family.threats, family.objectives)
    pairs = itertools.product(family.threats, family.objectives)
    for name, (_, objective), settings in zip(soups, pairs, each, strict=True):
        words = describe(names, threats=settings.threats, objective=objective)
        yield name, words, partial(_learn_soup, run, name, settings)


def _learn_soup(run: MethodRun, name: str, settings: LearnSettings) -> Coefficients:
    evaluator = run.evaluator
    return learn(
        evaluator.ingredients,
        evaluator.training_data,
        settings,
        val=evaluator.data if settings.early_stop else None,
        network=evaluator.network,
        allow_leakage=evaluator.allow_leakage,
        device=evaluator.device,
        on_progress=run.progress.of_learning(name),
    )


def _learn_dial(run: MethodRun, settings: LearnSettings) -> Dial:
    """Learn a dial; the time limit does not take its time for that of a position."""
    evaluator = run.evaluator
    dial = learn_dial(
        evaluator.ingredients,
        evaluator.training_data,
        settings,
        network=evaluator.network,
        allow_leakage=evaluator.allow_leakage,
        device=evaluator.device,
        on_progress=run.progress.of_learning("dial"),
    )
    run.limit.begin_soup()
    return dial


def search_by_all(run: MethodRun) -> Tried:
    """Try the surrogate's, the learned, the dial's and the greedy soups.

    Names begin with the method. A soup that the surrogate attacked is not attacked again.
    """
    check_modelled(run.aim)
    ingredients = _evaluate_ingredients_first(run.evaluator)
    evaluations = {name: item.without_points() for name, item in ingredients.items()}
    known = dict(zip(corners(len(evaluations)), evaluations.values(), strict=True))
    if not run.evaluator.averages:
        known.clear()  # a one-hot soup is then no ingredient
    mapped = search_by(run, "surrogate", known)
    known |= {item.alpha: item.evaluation for item in mapped.candidates}
    learned = [_search_among_learned(run, method, ingredients) for method in LEARNING]
    greedy_soups: list[Candidate] = []
    dropped = 0
    if run.limit.begin_soup():
        *others, best = _search_greedily(run, known)
        greedy_soups = [replace(best, name="greedy")]
        dropped = sum(item.alpha not in known for item in others)
    left_out = sum(part.late.left_out for part in (mapped, *learned)) + 1 - len(greedy_soups)
    return Tried(
        [
            *(replace(item, name=f"surrogate-{item.name}") for item in mapped.candidates),
            *(item for part in learned for item in part.candidates),
            *greedy_soups,
        ],
        mapped.looked_at,
        tuple(replace(item, name=f"surrogate-{item.name}") for item in mapped.predicted),
        evaluations,
        Late(left_out, mapped.late.unfinished),
        dropped,
    )


def _search_greedily(run: MethodRun, known: Mapping[Alpha, Evaluation]) -> list[Candidate]:
    """Build the greedy soup; of `known` soups, attacks are completed and not repeated."""
    evaluator, n = run.evaluator, len(run.evaluator.ingredients)
    maximised = default_measure(evaluator.threats) if run.aim.maximise == KNEE else run.aim.maximise
    score = Score.parse(run.settings.score or str(maximised))

    def evaluate_alpha(alpha: Alpha) -> Evaluation:
        evaluation = known.get(alpha)
        if evaluation is None or SUBSET_KEY in evaluation.record:
            evaluation = evaluator.evaluate(alpha, after=evaluation)
        return run.progress.report(alpha_name(alpha), evaluation)

    return greedy([evaluate_alpha(alpha) for alpha in corners(n)], evaluate_alpha, score)


def _search_by_surrogate(
    run: MethodRun, alphas: Mapping[str, Alpha], known: Mapping[Alpha, Evaluation]
) -> Tried:
    """Measure clean accuracies, and attack the soups that the surrogate names."""
    evaluator, progress, limit = run.evaluator, run.progress, run.limit
    clean = [
        progress.report(name, evaluator.evaluate_clean(alpha)).hits()[CLEAN_KEY]
        for name, alpha in alphas.items()
    ]
    clean_hits = torch.stack(clean).numpy()
    engine = make_search(
        list(alphas),
        list(alphas.values()),
        clean_hits,
        run.aim,
        part=choose_part(evaluator.data.ids, evaluator.attack, shift=evaluator.shift is not None),
        step=run.settings.step,
        tolerance=run.settings.tolerance,
        seed=evaluator.attack.seed,
    )
    evaluations: dict[str, Evaluation] = {}
    while True:
        requests, is_late = requests_in_time(engine, hits_by_name(evaluations), limit)
        if not requests:
            break
        progress.total += len(requests)
        for request in requests:  # all before the model is fitted again, as in a recipe's run
            name = request.candidate
            evaluation = known.get(alphas[name]) or evaluator.evaluate(
                alphas[name], after=evaluations.get(name), subset=request.subset
            )
            evaluations[name] = progress.report(name, evaluation)
            limit.end_soup()
    attacked = [name in evaluations for name in alphas]
    hits = hits_by_name(evaluations)
    return Tried(
        _list_candidates(alphas, evaluations),
        clean_hits[~np.array(attacked)].T,
        tuple(engine.predict(hits)),
        late=count_late(engine, hits) if is_late else Late(),
    )


def _search_screened(run: MethodRun, alphas: Mapping[str, Alpha]) -> Tried:
    """Try a short attack on all soups, and the full one on those that can win.

    The points of the ingredients are tried on the ingredients too, so that their differences from
    soups are fair. With a time limit, soups are begun in an order in which each is far from those
    before it, and the screening is among those that were.
    """
    evaluator, progress, limit = run.evaluator, run.progress, run.limit
    ingredients = {alpha_name(alpha): alpha for alpha in corners(len(evaluator.ingredients))}
    equal = ingredients if evaluator.averages else {}
    contenders = [Contender(name, name if name in equal else None) for name in alphas]
    screening = Screening(
        tuple(ingredients),
        tuple(contenders),
        run.aim,
        len(evaluator.data),
        seed=evaluator.attack.seed,
    )
    first_requests = set(screening.first_requests())
    progress.total = len(first_requests)
    all_alphas = {**alphas, **ingredients}
    pool: dict[str, Evaluation] = {}

    def run_request(request: EvaluationRequest, results: EvaluationsByRequest) -> Evaluation:
        alpha, steps = all_alphas[request.candidate], run.settings.screen_steps
        mixer = evaluator.unmixed if request.keep_points else evaluator
        evaluation = mixer.evaluate_request(alpha, request, results, steps)
        if request.keep_points:
            pool[request.candidate] = evaluation
        if request in first_requests:  # the number of confirmations is not known beforehand
            progress.report(request.candidate, evaluation)
        return evaluation

    order = None if limit.seconds is None else spread_order(list(alphas.values()))
    final, late = run_screening(screening, run_request, limit=limit, order=order)
    points = list(pool.values())
    known = {
        name: final[corner]
        if corner in equal and corner in final
        else evaluator.unmixed.evaluate(alpha, pool=points, after=pool[corner])
        for name, (corner, alpha) in zip(evaluator.names, ingredients.items(), strict=True)
    }
    return Tried(_list_candidates(alphas, final), ingredients=known, late=late)

"""Search: evaluate the soups of a method on one split."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from robustsoup.attacks.adaptation import copy_network
from robustsoup.catalog import SOUP_METHODS
from robustsoup.checkpoints.checkpoint import Checkpoint, open_all
from robustsoup.checkpoints.provenance import check_leakage
from robustsoup.data import Split, SplitLike, as_optional_split, as_split
from robustsoup.data.corruptions import CorruptionPart, open_corruptions
from robustsoup.display import svg_points
from robustsoup.errors import RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.masking import MOST_OTHERS, MOST_POINT_BYTES
from robustsoup.evaluation.simultaneous import Hits
from robustsoup.evaluation.verdicts import CLEAN_KEY, SHIFT_KEY, UNION_KEY, Evaluation
from robustsoup.printable import make_printable
from robustsoup.progress import Progress
from robustsoup.settings import (
    ALL_METHODS,
    QUEUED_ATTACKS,
    AttackSettings,
    MergeSettings,
    SearchSettings,
    accepts_settings,
    make_settings,
)
from robustsoup.soups.answer import Answer
from robustsoup.soups.confirmation import (
    confirm_finalists,
    judge_unattacked,
    order_finalists,
    requires_confirmation,
    take_part,
)
from robustsoup.soups.explanation import Explained, describe_gaps, describe_soup, explain, with_test
from robustsoup.soups.goal import Goal, Score, check_goal
from robustsoup.soups.greedy import greedy
from robustsoup.soups.grid import Alpha, alpha_name, candidates, corners, merging_weights
from robustsoup.soups.merging import check_merge, is_merge, merge
from robustsoup.soups.mixing import mix
from robustsoup.soups.screening import (
    Contender,
    EvaluationRequest,
    EvaluationsByRequest,
    Screening,
    mark_screened,
    run_screening,
    short_attack,
)
from robustsoup.soups.selection import Candidate, Selection, select, tabulate_candidates
from robustsoup.soups.surrogate_search import (
    PredictedSoup,
    check_modelled,
    hits_by_name,
    make_search,
)
from robustsoup.soups.time_limit import TimeLimit
from robustsoup.threats import CLEAN, ThreatModel, parse_threats


@dataclass(frozen=True, repr=False)
class SearchResult:
    """What a search found.

    Attributes:
        candidates: All soups that were tried, in the order of the method.
        answer: Which one to use, what is proven about it, and what it costs.
        predicted: What the surrogate says about every soup; empty for other methods.
    """

    candidates: tuple[Candidate, ...]
    answer: Answer
    predicted: tuple[PredictedSoup, ...] = ()

    def __repr__(self) -> str:
        """Return one line: the number of candidates and the choice."""
        text = f"SearchResult({len(self.candidates)} candidates; {self.answer.message})"
        return make_printable(text)

    def _repr_html_(self) -> str:
        answer, table = self.answer, tabulate_candidates("all candidates", self.candidates)
        measure = next((key for key in answer.accuracy if key != CLEAN_KEY), None)
        if measure is None:
            return answer._repr_html_() + table
        accuracies = [(item.name, item.evaluation.accuracy) for item in self.candidates]
        points = [
            (name, scores[CLEAN_KEY].value, scores[measure].value) for name, scores in accuracies
        ]
        picture = svg_points(points, chosen=answer.chosen, x=CLEAN_KEY, y=measure)
        return answer._repr_html_() + picture + table


@accepts_settings(AttackSettings)
@accepts_settings(SearchSettings)
@accepts_settings(MergeSettings)
def search(
    ingredients: Sequence[Checkpoint | str | os.PathLike[str]],
    data: SplitLike,
    threats: Sequence[ThreatModel | str],
    settings: SearchSettings | None = None,
    attack_settings: AttackSettings | None = None,
    *,
    buffers: str = "average",
    calibrate_on: SplitLike | None = None,
    base: Checkpoint | str | os.PathLike[str] | None = None,
    samples: int | None = None,
    shift: str | os.PathLike[str] | None = None,
    allow_leakage: bool = False,
    network: nn.Module | None = None,
    device: str = "auto",
    on_progress: Progress | None = None,
    report_on: SplitLike | None = None,
    **changes: Any,
) -> SearchResult:
    """Evaluate every soup of a method on one split, and answer which one to use.

    With `screen`, the ingredients are attacked in full; their adversarial points and a short attack
    (`screen_steps`, in bfloat16 where the device supports it) are tried on every soup, and the
    full attack on a random part of the samples; then the soups that can still win race, see
    `Screening`. The accuracies of those that leave are estimates with their intervals, and their
    `Candidate.confirmed` is False.

    With method "surrogate", the clean accuracy of every soup of the grid is measured, few soups are
    attacked, and only those are candidates; `predicted` holds all, see `SurrogateSearch`.

    Args:
        ingredients: N checkpoints or paths of one network.
        data: The split to select on, usually `val`.
        threats: Threat models to attack with.
        settings: The soups to try, and what to maximise (the first threat if None) and require;
            SearchSettings() if None. `score` applies only to the greedy method (the first threat if
            None).
        attack_settings: The attack; AttackSettings() if None. Its seed also seeds the mixing.
        buffers: Policy for BatchNorm's running statistics, as in `mix`.
        calibrate_on: Training split, required by the recalibrating policies and by methods that
            measure, which attack its samples under the first threat.
        base: The checkpoint that the ingredients were fine-tuned from, for methods that merge
            differences from it; by default the common ancestor.
        samples: Evaluate on the first `samples` samples; on all if None.
        shift: Folder of corrupted copies of the test set, as in `evaluate`; adds the measure
            "shift" on copies of every second image, and limits `samples` to their number. On
            `report_on`, the copies of the other images are evaluated.
        allow_leakage: Accept ingredients that were trained on samples of `data`.
        network: The network, if the ingredients do not record it; left unchanged.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        on_progress: Called as on_progress(done, total, figures) after each soup.
        report_on: Split that chooses nothing, usually `test`; the chosen soup is evaluated on it.
        **changes: Fields of SearchSettings and AttackSettings, which override both, and of
            MergeSettings, the numbers of a merging method.

    Returns:
        All candidates, in the order of the method (the greedy soup is the last of its method), and
        the answer.

    Raises:
        RequestError: For invalid settings, before any work.
        LeakageError: If an ingredient was trained on samples of `data`.
    """
    data = as_split(data, "search")
    calibrate_on = as_optional_split(calibrate_on, "search: calibrate_on")
    search_changes, others = _split_changes(SearchSettings, changes)
    merge_changes, attack_changes = _split_changes(MergeSettings, others)
    settings = make_settings(SearchSettings, settings, search_changes)
    attack = make_settings(AttackSettings, attack_settings, attack_changes)
    _check_combination(settings, attack)
    goal = Goal.parse(settings.maximise, settings.require, point=settings.point)
    parsed = parse_threats(threats)
    opened = tuple(open_all(ingredients))
    check_leakage(opened, data, allow=allow_leakage)
    split = data.first(samples)
    if shift is not None:
        split = split.first(open_corruptions(shift, split, "select").count_images(split))
    report_on = as_optional_split(report_on, "search: report_on")
    if report_on is not None:
        check_leakage(opened, report_on, allow=allow_leakage)
    merging = _describe_merging(settings, merge_changes, base, parsed)
    _check_merging(merging, len(opened), calibrate_on)
    adaptive = settings.screen or settings.method in ("greedy", "surrogate")
    confirms = adaptive and requires_confirmation(goal)
    steering = take_part(split, "search" if confirms else "all", seed=attack.seed)
    evaluator = _SoupEvaluator(
        opened,
        steering,
        parsed,
        attack,
        buffers,
        calibrate_on,
        network,
        device,
        shift,
        "search" if confirms else "select",
        merging=merging,
    )
    aim = replace(goal, maximise=goal.maximise or _default_measure(parsed))
    tried = _try_soups(evaluator, settings, goal, aim, _SearchProgress(on_progress))
    choice = (
        _choose_among_finalists(evaluator, tried, aim, split)
        if confirms
        else _choose(evaluator, tried, aim)
    )
    context = Explained(
        ingredients=choice.ingredients,
        seed=attack.seed,
        selected_on=split.name,
        fresh_split=f"a part of {split.name} kept aside" if confirms else None,
        leaves_out=tuple(_list_gaps(evaluator, settings, aim, confirmed=confirms)),
    )
    answer = explain(choice.selection, context)
    if report_on is not None:
        reporting = replace(evaluator, data=report_on, shift_part="report")
        evaluation = reporting.evaluate(choice.selection.best.alpha)
        answer = with_test(answer, evaluation, split=report_on.name)
    return SearchResult(tuple(tried.candidates), answer, tried.predicted)


def _try_soups(
    evaluator: "_SoupEvaluator",
    settings: SearchSettings,
    goal: Goal,
    aim: Goal,
    progress: "_SearchProgress",
) -> "_Tried":
    """Evaluate the soups of a method, after a check that the goal can be decided at all.

    Args:
        evaluator: Mixes and evaluates soups.
        settings: The method and its settings.
        goal: The goal as it was given, which screening confirms soups for.
        aim: The goal with the default of what is maximised.
        progress: Receives progress.
    """
    n = len(evaluator.ingredients)
    measures = _measures_of(evaluator.threats, shift=evaluator.shift is not None)
    samples = len(evaluator.data)
    if settings.method == "greedy":
        check_goal(goal, measures, samples=samples, candidates=2 * n - 1)
        score = Score.parse(settings.score or _default_measure(evaluator.threats))
        return _describe(evaluator, _Tried(_search_greedily(evaluator, score, progress)))
    alphas = _list_alphas(settings, n)
    check_goal(goal, measures, samples=samples, candidates=len(alphas))
    named = {alpha_name(alpha): alpha for alpha in alphas}
    if settings.method == "surrogate":
        check_modelled(aim)
        tried = _search_by_surrogate(evaluator, named, aim, settings, progress)
    elif settings.screen:
        tried = _Tried(_search_screened(evaluator, named, goal, settings.screen_steps, progress))
    else:
        tried = _Tried(_search_in_full(evaluator, named, progress))
    return _describe(evaluator, tried)


def _describe(evaluator: "_SoupEvaluator", tried: "_Tried") -> "_Tried":
    return replace(tried, candidates=[evaluator.describe(item) for item in tried.candidates])


def _default_measure(threats: Sequence[ThreatModel | str]) -> str:
    return str(next(iter(threats), CLEAN_KEY))


def _measures_of(threats: Sequence[ThreatModel | str], *, shift: bool) -> list[str]:
    names = dict.fromkeys(str(t) for t in map(ThreatModel.parse, threats) if not t.is_clean)
    union = [UNION_KEY] if len(names) > 1 else []
    return [CLEAN_KEY, *names, *union, *([SHIFT_KEY] if shift else [])]


@dataclass(frozen=True)
class _Choice:
    """A selection, and the evaluations of the ingredients on the same samples, by name."""

    selection: Selection
    ingredients: Mapping[str, Evaluation]


def _choose(evaluator: "_SoupEvaluator", tried: "_Tried", goal: Goal) -> _Choice:
    """Choose on the samples of the search."""
    selection = select(
        tried.candidates,
        maximise=str(goal.maximise),
        require=goal.require,
        point=goal.point,
        seed=evaluator.attack.seed,
        looked_at=tried.looked_at,
    )
    known = {item.ingredient: item.evaluation for item in tried.candidates if item.ingredient}
    return _Choice(selection, evaluator.evaluate_ingredients(known))


def _choose_among_finalists(
    evaluator: "_SoupEvaluator", tried: "_Tried", goal: Goal, split: Split
) -> _Choice:
    """Evaluate all soups without an attack and a few finalists on the confirm part, and choose."""
    seed = evaluator.attack.seed
    unattacked = replace(evaluator, data=split, threats=(), shift_part="select")
    others = [
        unattacked.evaluate(item.alpha).hits()[CLEAN_KEY].numpy()
        for item in tried.predicted
        if not item.attacked
    ]
    clean = judge_unattacked(
        [replace(item, evaluation=unattacked.evaluate(item.alpha)) for item in tried.candidates],
        goal,
        seed=seed,
        looked_at=np.stack(others, axis=1) if others else None,
    )
    aside = take_part(split, "confirm", seed=seed)
    confirm = replace(evaluator, data=aside, shift_part="confirm")
    attacked = [item for item in tried.candidates if item.confirmed]
    ordered = order_finalists(attacked, goal, clean, confirm_samples=len(confirm.data))
    finalists = [replace(item, evaluation=confirm.evaluate(item.alpha)) for item in ordered]
    known = {item.ingredient: item.evaluation for item in finalists if item.ingredient}
    ingredients = confirm.evaluate_ingredients(known)
    return _Choice(confirm_finalists(finalists, goal, clean), ingredients)


def name_ingredients(ingredients: Sequence[Checkpoint]) -> list[str]:
    """Return a short unique name for each ingredient: its file's stem, else a number."""
    names: list[str] = []
    for number, item in enumerate(ingredients, 1):
        name = item.path.stem if item.path else f"ingredient {number}"
        names.append(f"{name} ({number})" if name in names else name)
    return names


def _list_gaps(
    evaluator: "_SoupEvaluator", settings: SearchSettings, goal: Goal, *, confirmed: bool
) -> Iterator[str]:
    """Yield what the guarantee leaves out."""
    split = evaluator.data.name
    stopped = [
        name
        for name, item in zip(evaluator.names, evaluator.ingredients, strict=True)
        if item.provenance.get("early_stopped_at") is not None
    ]
    yield from describe_gaps(
        split,
        stopped=stopped,
        greedy=["the greedy soup"] if settings.method == "greedy" and not confirmed else [],
        screened=(settings.screen or (settings.method == "surrogate" and goal.requires_attacked))
        and not confirmed,
        shifted=confirmed and evaluator.shift is not None and split == "test",
        fresh=check_leakage(evaluator.ingredients, evaluator.data, allow=True).status == "known",
    )


def _split_changes(
    settings_type: type, changes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split changes into those of a settings class and all others."""
    names = {field.name for field in dataclasses.fields(settings_type)}
    own_changes = {name: value for name, value in changes.items() if name in names}
    return own_changes, {k: v for k, v in changes.items() if k not in names}


@dataclass(frozen=True)
class _Merging:
    """How a search merges: the method, its numbers, the base, and the threat to measure under."""

    method: str
    settings: MergeSettings
    base: Checkpoint | str | os.PathLike[str] | None
    threat: ThreatModel | str


def _describe_merging(
    settings: SearchSettings,
    changes: Mapping[str, Any],
    base: Checkpoint | str | os.PathLike[str] | None,
    threats: Sequence[ThreatModel | str],
) -> _Merging | None:
    """Return how the method merges; None for a method that lists or learns coefficients."""
    method = settings.method
    if not isinstance(method, str) or not is_merge(method):
        if given := [*changes, *(["base"] if base is not None else [])]:
            raise RequestError(f'search: {given[0]}: has no meaning with method "{method}"')
        return None
    attacked = [threat for threat in threats if not ThreatModel.parse(threat).is_clean]
    threat = attacked[0] if attacked else CLEAN
    return _Merging(method, make_settings(MergeSettings, None, changes), base, threat)


def _check_merging(merging: _Merging | None, n: int, data: Split | None) -> None:
    """Raise RequestError if a merging method lacks what it requires."""
    if merging is not None:
        entry, threat = SOUP_METHODS.get_entry(merging.method), ThreatModel.parse(merging.threat)
        check_merge(entry, n, merging.settings, data=data, threat=threat)


def _list_alphas(settings: SearchSettings, n: int) -> list[Alpha]:
    """Return the coefficients that the method tries, or the weights of a merging method."""
    method = settings.method
    if isinstance(method, str) and is_merge(method):
        entry = SOUP_METHODS.get_entry(method)
        return merging_weights(entry, settings.weights, n, settings.step, settings.max_soups)
    method = "grid" if method == "surrogate" else method
    return candidates(method, n, settings.step, settings.max_soups)


def _check_combination(settings: SearchSettings, attack: AttackSettings) -> None:
    if settings.screen and not attack.is_queued:
        raise RequestError(
            f"search: screen requires an attack that can be shortened "
            f'({", ".join(QUEUED_ATTACKS)}); got "{attack.attack}"'
        )
    if settings.screen and settings.method == "surrogate":
        raise RequestError("search: the surrogate attacks few soups, in full; leave out screen")
    if settings.screen and settings.method == "greedy":
        raise RequestError(
            "search: the greedy method evaluates every soup in full; leave out screen"
        )
    method = settings.method
    if method == ALL_METHODS:
        raise RequestError(
            'search: method "all" runs from the command line; in Python, search method by method'
        )
    if settings.screen and isinstance(method, str) and is_merge(method):
        raise RequestError(f'search: method "{method}" is evaluated in full; leave out screen')
    if isinstance(method, str) and SOUP_METHODS.get_entry(method).facts.get("needs") == "training":
        raise RequestError(
            f'search: method "{method}" learns its coefficients; use learn or learn_dial'
        )


@dataclass(frozen=True)
class _Tried:
    """What a method tried.

    Attributes:
        candidates: The evaluated soups.
        looked_at: (n, k) clean hits of soups that were measured without an attack.
        predicted: What the surrogate says about every soup.
    """

    candidates: list[Candidate]
    looked_at: Hits | None = None
    predicted: tuple[PredictedSoup, ...] = ()


class _SearchProgress:
    """Reports how many soups are evaluated."""

    def __init__(self, on_progress: Progress | None) -> None:
        self.on_progress, self.done, self.total = on_progress, 0, 0

    def report(self, name: str, evaluation: Evaluation) -> Evaluation:
        """Count an evaluation, report it and return it."""
        self.done += 1
        if self.on_progress is not None:
            clean = evaluation.accuracy[CLEAN_KEY].value
            self.on_progress(self.done, self.total, f"{name} clean {clean:.1%}")
        return evaluation


@dataclass(frozen=True)
class _SoupEvaluator:
    """Mixes and evaluates soups; the attributes are the arguments of `search`."""

    ingredients: tuple[Checkpoint, ...]
    data: Split
    threats: tuple[ThreatModel | str, ...]
    attack: AttackSettings
    buffers: str
    calibrate_on: Split | None
    network: nn.Module | None
    device: str
    shift: str | os.PathLike[str] | None
    shift_part: CorruptionPart = "select"
    merging: _Merging | None = None

    def mix_network(self, alpha: Alpha) -> nn.Module:
        """Return the network with the weights of a soup."""
        soup = self._make_soup(alpha)
        model = soup.network() if self.network is None else copy_network(self.network)
        soup.load_into(model)
        return model

    @property
    def names(self) -> list[str]:
        """Names of the ingredients."""
        return name_ingredients(self.ingredients)

    def describe(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its description in words."""
        averages = self.buffers == "average" and self.merging is None
        equals = averages and 1.0 in candidate.alpha
        ingredient = self.names[candidate.alpha.index(1.0)] if equals else None
        description = describe_soup(candidate.alpha, self.names, ingredient=ingredient)
        if self.merging is not None:
            description = f"{self.merging.method} of {description}"
        return replace(candidate, description=description, ingredient=ingredient)

    def evaluate_ingredients(self, known: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
        """Return the evaluation of each ingredient by name; `known` are not made again."""
        unmixed = replace(self, buffers="average", merging=None)  # mixing one ingredient returns it
        alphas = zip(self.names, corners(len(self.ingredients)), strict=True)
        return {
            name: known[name] if name in known else unmixed.evaluate(alpha)
            for name, alpha in alphas
        }

    def _make_soup(self, alpha: Alpha) -> Checkpoint:
        """Mix or merge a soup."""
        merging = self.merging
        if merging is None:
            return mix(
                self.ingredients,
                alpha,
                buffers=self.buffers,
                calibrate_on=self.calibrate_on,
                network=self.network,
                device=self.device,
                seed=self.attack.seed,
            )
        return merge(
            self.ingredients,
            merging.method,
            alpha,
            merging.settings,
            base=merging.base,
            data=self.calibrate_on,
            threat=merging.threat,
            buffers=self.buffers,
            network=self.network,
            device=self.device,
            seed=self.attack.seed,
        )

    def evaluate(
        self, alpha: Alpha, *, keep_points: bool = False, others: Sequence[Evaluation] = ()
    ) -> Evaluation:
        """Evaluate a soup in full."""
        return evaluate(
            self.mix_network(alpha),
            self.data,
            self.threats,
            self.attack,
            device=self.device,
            keep_points=keep_points,
            others=others,
            shift=self.shift,
            shift_part=self.shift_part,
        )

    def evaluate_clean(self, alpha: Alpha) -> Evaluation:
        """Evaluate a soup without an attack."""
        return evaluate(self.mix_network(alpha), self.data, device=self.device)

    @property
    def tries_points_of_others(self) -> bool:
        """Whether the masking check of a soup tries the points of the ingredients."""
        attacked = sum(not threat.is_clean for threat in parse_threats(self.threats))
        size = attacked * self.data.images.numel() * torch.float32.itemsize
        return self.attack.masking_check and 0 < size <= MOST_POINT_BYTES

    def evaluate_request(
        self,
        alpha: Alpha,
        request: EvaluationRequest,
        results: EvaluationsByRequest,
        screen_steps: int,
    ) -> Evaluation:
        """Evaluate a soup with the attack that a screening requests."""
        short = request.mode == "short"
        evaluation = evaluate(
            self.mix_network(alpha),
            self.data,
            self.threats,
            short_attack(self.attack, screen_steps) if short else self.attack,
            device=self.device,
            keep_points=request.keep_points,
            pool=[results[item] for item in request.pool],
            after=None if request.after is None else results[request.after],
            subset=request.subset,
            shift=self.shift,
            shift_part=self.shift_part,
        )
        return mark_screened(evaluation) if short else evaluation


def _search_in_full(
    evaluator: _SoupEvaluator, alphas: Mapping[str, Alpha], progress: _SearchProgress
) -> list[Candidate]:
    """Evaluate the ingredients among the soups first: the masking check tries their points."""
    progress.total = len(alphas)
    keep_points = evaluator.tries_points_of_others
    ingredients = set(corners(len(evaluator.ingredients)))
    others: list[Evaluation] = []
    evaluations: dict[str, Evaluation] = {}
    for name, alpha in sorted(alphas.items(), key=lambda item: item[1] not in ingredients):
        if alpha in ingredients:
            evaluation = evaluator.evaluate(alpha, keep_points=keep_points)
            if keep_points and len(others) < MOST_OTHERS:
                others.append(evaluation)
        else:
            evaluation = evaluator.evaluate(alpha, others=others)
        evaluations[name] = progress.report(name, evaluation.without_points())
    return [Candidate(name, alpha, evaluations[name]) for name, alpha in alphas.items()]


def _search_greedily(
    evaluator: _SoupEvaluator, score: Score, progress: _SearchProgress
) -> list[Candidate]:
    n = len(evaluator.ingredients)
    progress.total = 2 * n - 1

    def evaluate_alpha(alpha: Alpha) -> Evaluation:
        return progress.report(alpha_name(alpha), evaluator.evaluate(alpha))

    return greedy([evaluate_alpha(alpha) for alpha in corners(n)], evaluate_alpha, score)


def _search_by_surrogate(
    evaluator: _SoupEvaluator,
    alphas: Mapping[str, Alpha],
    goal: Goal,
    settings: SearchSettings,
    progress: _SearchProgress,
) -> _Tried:
    """Measure clean accuracies, and attack the soups that the surrogate names."""
    limit = TimeLimit(settings.time_limit)
    progress.total = len(alphas)
    clean = [
        progress.report(name, evaluator.evaluate_clean(alpha)).hits()[CLEAN_KEY]
        for name, alpha in alphas.items()
    ]
    clean_hits = torch.stack(clean).numpy()
    engine = make_search(
        list(alphas),
        list(alphas.values()),
        clean_hits,
        goal,
        step=settings.step,
        tolerance=settings.tolerance,
        seed=evaluator.attack.seed,
    )
    evaluations: dict[str, Evaluation] = {}
    while names := engine.next_soups(hits_by_name(evaluations)):
        if not limit.begin_soup() and evaluations:
            break
        progress.total += 1
        evaluations[names[0]] = progress.report(names[0], evaluator.evaluate(alphas[names[0]]))
        limit.end_soup()
    attacked = [name in evaluations for name in alphas]
    candidates = [
        Candidate(name, alpha, evaluations[name])
        for name, alpha in alphas.items()
        if name in evaluations
    ]
    hits = hits_by_name(evaluations)
    return _Tried(
        candidates,
        clean_hits[~np.array(attacked)].T,
        tuple(engine.predict(hits)),
    )


def _search_screened(
    evaluator: _SoupEvaluator,
    alphas: Mapping[str, Alpha],
    goal: Goal,
    screen_steps: int,
    progress: _SearchProgress,
) -> list[Candidate]:
    ingredients = {alpha_name(alpha): alpha for alpha in corners(len(evaluator.ingredients))}
    contenders = [Contender(name, name if name in ingredients else None) for name in alphas]
    screening = Screening(tuple(ingredients), tuple(contenders), goal, len(evaluator.data))
    first_requests = set(screening.first_requests())
    progress.total = len(first_requests)
    all_alphas = {**alphas, **ingredients}

    def run_request(request: EvaluationRequest, results: EvaluationsByRequest) -> Evaluation:
        alpha = all_alphas[request.candidate]
        evaluation = evaluator.evaluate_request(alpha, request, results, screen_steps)
        if request in first_requests:  # the number of confirmations is not known beforehand
            progress.report(request.candidate, evaluation)
        return evaluation

    final = run_screening(screening, run_request)
    return [Candidate(name, alpha, final[name]) for name, alpha in alphas.items()]

"""Search: evaluate the soups of a method on one split."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from robustsoup.catalog import BUFFER_POLICIES, SOUP_METHODS
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike, open_all
from robustsoup.checkpoints.provenance import check_leakage, stopped_early_on
from robustsoup.data import Split, SplitLike, as_optional_split, as_split
from robustsoup.data.corruptions import open_corruptions
from robustsoup.display import html_table, svg_points
from robustsoup.errors import LeakageError, RequestError
from robustsoup.evaluation.verdicts import CLEAN_KEY, Evaluation
from robustsoup.gradients import gradients_enabled
from robustsoup.printable import make_printable
from robustsoup.progress import Progress
from robustsoup.settings import (
    ALL_METHODS,
    QUEUED_ATTACKS,
    AttackSettings,
    LearnSettings,
    MergeSettings,
    SearchSettings,
    accepts_settings,
    make_settings,
)
from robustsoup.soups.answer import Answer
from robustsoup.soups.confirmation import (
    ADAPTIVE_METHODS,
    confirm_finalists,
    judge_unattacked,
    order_finalists,
    requires_confirmation,
    take_part,
)
from robustsoup.soups.constants import describe_differing_constants
from robustsoup.soups.explanation import Explained, describe_gaps, explain, with_test
from robustsoup.soups.goal import (
    Goal,
    Score,
    check_goal,
    default_measure,
    list_measures,
    require_measures,
)
from robustsoup.soups.learned_search import LEARNING, LearnedFamily, why_not_screened
from robustsoup.soups.learning import check_learning
from robustsoup.soups.merging import check_merge
from robustsoup.soups.method_keys import find_unread, is_merge
from robustsoup.soups.mixing import fit_to_own_network, open_ingredients
from robustsoup.soups.search_methods import (
    MethodRun,
    SearchProgress,
    Tried,
    count_soups,
    methods_of,
    search_by,
    search_by_all,
)
from robustsoup.soups.selection import (
    Candidate,
    Selection,
    prefer_confirmed,
    select,
    tabulate_candidates,
)
from robustsoup.soups.soup_evaluator import Merging, SoupEvaluator, describe_merging
from robustsoup.soups.surrogate_search import (
    PredictedSoup,
)
from robustsoup.soups.time_limit import TimeLimit
from robustsoup.threats import ThreatModel, first_attacked, parse_threats


@dataclass(frozen=True, repr=False)
class SearchResult:
    """What a search found.

    Attributes:
        candidates: The soups that could be chosen, in the order of the method.
        answer: Which one to use, what is proven about it, and what it costs.
        predicted: What the surrogate says about every soup; empty for other methods.
        warnings: Doubts about the ingredients, such as constants that differ.
        evaluator: Mixes and merges soups as the search did; holds the ingredients and the data.
    """

    candidates: tuple[Candidate, ...]
    answer: Answer
    predicted: tuple[PredictedSoup, ...] = ()
    warnings: tuple[str, ...] = ()
    evaluator: SoupEvaluator = field(kw_only=True, compare=False)

    @property
    def chosen(self) -> Candidate:
        """The candidate that the answer names; `make_soup()` makes it."""
        return next(item for item in self.candidates if item.name == self.answer.chosen)

    def make_soup(self, candidate: Candidate | None = None) -> Checkpoint:
        """Make a soup by the method and the buffer policy of the search.

        Args:
            candidate: One of the candidates; the chosen one if None.

        Returns:
            The checkpoint that the search evaluated.

        Raises:
            CheckpointError: If the file of an ingredient is gone or was changed.
        """
        return self.evaluator.make_soup((candidate or self.chosen).mixed_by)

    def __repr__(self) -> str:
        """Return one line: the number of candidates and the choice."""
        text = f"SearchResult({len(self.candidates)} candidates; {self.answer.message})"
        return make_printable(text)

    def _repr_html_(self) -> str:
        answer, table = self.answer, tabulate_candidates("all candidates", self.candidates)
        if self.warnings:
            table += html_table("ingredients", ("warning",), [(text,) for text in self.warnings])
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
@gradients_enabled()
def search(
    ingredients: Sequence[CheckpointLike],
    data: SplitLike,
    threats: Sequence[ThreatModel | str],
    settings: SearchSettings | None = None,
    attack_settings: AttackSettings | None = None,
    *,
    learn_settings: LearnSettings | None = None,
    buffers: str | None = None,
    calibrate_on: SplitLike | None = None,
    base: CheckpointLike | None = None,
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

    Method "learned" learns soups on `calibrate_on`, against several radii of the first threat or
    with several weights of the clean loss (`sweep`). "dial" learns one dial against it and
    evaluates eleven positions. "all" joins the surrogate's, the learned, the dial's and the greedy
    soups, as `robustsoup search --method all` does.

    Args:
        ingredients: N checkpoints or paths of one network.
        data: The split to select on, usually `val`.
        threats: Threat models to attack with.
        settings: The soups to try, and what to maximise (the first threat if None) and require;
            SearchSettings() if None. `score` applies only to the greedy method (what is maximised
            if None; the first threat for the knee).
        attack_settings: The attack; AttackSettings() if None. Its seed also seeds the mixing.
        learn_settings: Settings of methods that learn; LearnSettings() if None. The search sets
            threats, objectives and the dial itself.
        buffers: Policy for BatchNorm's running statistics, as in `mix`.
        calibrate_on: Training split, required by the recalibrating policies, by methods that
            learn, and by methods that measure, which attack its samples under the first threat.
        base: The checkpoint that the ingredients were fine-tuned from, for methods that merge
            differences from it; by default the common ancestor.
        samples: Evaluate on the first `samples` samples (see `Split.first`); on all if None.
        shift: Folder of corrupted copies of the test set, as in `evaluate`; adds the measure
            "shift" on copies of every second image, and limits `samples` to their number. On
            `report_on`, the copies of the other images are evaluated.
        allow_leakage: Accept ingredients that were trained on samples of `data`, and a
            `calibrate_on` that shares samples with it.
        network: The network, if the ingredients do not record it; left unchanged.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        on_progress: Called as on_progress(done, total, figures) after each soup.
        report_on: Split that chooses nothing, usually `test`; the chosen soup is evaluated on it.
        **changes: Fields of SearchSettings and AttackSettings, which override both, and of
            MergeSettings, the numbers of a merging method.

    Returns:
        All candidates, in the order of the method (of the greedy method, the soup that it built),
        and the answer.

    Raises:
        RequestError: Before any work: for invalid settings, a `step`, `tolerance`, `score`,
            `weights` or `learn_settings` that the method does not read, and a `report_on` that
            shares samples with `data`.
        LeakageError: If an ingredient was trained on samples of `data`, or a method or policy would
            learn or measure on them.
    """
    data = as_split(data, "search")
    calibrate_on = as_optional_split(calibrate_on, "search: calibrate_on")
    search_changes, others = _split_changes(SearchSettings, changes)
    merge_changes, attack_changes = _split_changes(MergeSettings, others)
    settings = make_settings(SearchSettings, settings, search_changes)
    attack = make_settings(AttackSettings, attack_settings, attack_changes)
    _check_combination(settings, attack, calibrate_on)
    learn = make_settings(LearnSettings, learn_settings, {})
    _check_meanings(settings, search_changes, learns=learn_settings is not None)
    goal = Goal.parse(settings.maximise, settings.require, point=settings.point)
    parsed = parse_threats(threats)
    opened = _open(ingredients, network)
    check_leakage(opened, data, allow=allow_leakage)
    split = data.first(samples)
    if shift is not None:
        split = split.first(open_corruptions(shift, split, "select").count_images(split))
    report_on = as_optional_split(report_on, "search: report_on")
    if report_on is not None:
        _check_report(report_on, split, opened, allow=allow_leakage)
    measure_under = first_attacked(parsed)
    merging = describe_merging(settings, merge_changes, base)
    _check_merging(merging, len(opened), calibrate_on, measure_under)
    if not allow_leakage:
        _check_fitting(settings, buffers, calibrate_on, [split, report_on])
    confirms = _confirms(settings, goal)
    steering = take_part(split, "search" if confirms else "all", seed=attack.seed)
    evaluator = SoupEvaluator(
        opened,
        steering,
        parsed,
        measure_under,
        attack,
        buffers,
        calibrate_on,
        network,
        device,
        shift,
        "search" if confirms else "select",
        merging=merging,
        learn=learn,
        allow_leakage=allow_leakage,
    )
    _check_learning(evaluator, settings)
    aim = replace(goal, maximise=goal.maximise or default_measure(parsed))
    count = _check_goal(evaluator, settings, goal, samples=len(split), confirms=confirms)
    tried = _try_soups(evaluator, settings, aim, SearchProgress(on_progress, count))
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
        late=tried.late,
    )
    answer = explain(choice.selection, context)
    if report_on is not None:
        reporting = replace(evaluator, data=report_on, shift_part="report")
        evaluation = reporting.evaluate(choice.selection.best.mixed_by)
        answer = with_test(answer, evaluation, split=report_on.name)
    doubts = tuple(describe_differing_constants(open_ingredients(opened, network)))
    return SearchResult(
        tuple(tried.candidates), answer, tried.predicted, doubts, evaluator=evaluator
    )


def _open(
    ingredients: Sequence[CheckpointLike], network: nn.Module | None
) -> tuple[Checkpoint, ...]:
    """Open the checkpoints, in the names of the network that they name themselves.

    Raises:
        RequestError: If there are none.
    """
    opened = open_all(ingredients)
    if not opened:
        raise RequestError("search: got no checkpoints, expected one or more")
    return tuple(fit_to_own_network(opened) if network is None else opened)


def _confirms(settings: SearchSettings, goal: Goal) -> bool:
    """Return whether finalists are confirmed on samples that no attack of the search looked at."""
    adaptive = settings.screen or any(m in ADAPTIVE_METHODS for m in methods_of(settings))
    return adaptive and requires_confirmation(goal)


def _check_report(
    report_on: Split, data: Split, ingredients: Sequence[Checkpoint], *, allow: bool
) -> None:
    """Check the split that reports.

    Raises:
        RequestError: If samples that choose a soup would also report it.
        LeakageError: If an ingredient was trained on samples of it, unless `allow`.
    """
    if shared := _count_shared(report_on, data):
        raise RequestError(
            f"search: report_on: got {shared} samples of {data.name} that choose the soup, "
            "expected others, such as data.test"
        )
    check_leakage(ingredients, report_on, allow=allow)


def _check_fitting(
    settings: SearchSettings,
    buffers: str | None,
    calibrate_on: Split | None,
    others: Sequence[Split | None],
) -> None:
    """Raise LeakageError if soups would be fitted to samples that choose or report one."""
    methods = [method for method in methods_of(settings) if isinstance(method, str)]
    fits = any(method in LEARNING or is_merge(method) for method in methods)
    if buffers is not None:
        fits |= "data" in BUFFER_POLICIES.get_entry(buffers).facts.get("needs", ())
    if calibrate_on is None or not fits:
        return
    for data in filter(None, others):
        if shared := _count_shared(calibrate_on, data):
            raise LeakageError(
                f"search: calibrate_on: got {shared} samples of {data.name} that choose or report "
                "a soup, expected training samples, such as data.train; or pass allow_leakage=True"
            )


def _count_shared(a: Split, b: Split) -> int:
    """Return the number of samples that two splits of one data set share.

    Splits may divide train and val differently, or join them; the ids of test are its own.
    """
    same_ids = (a.name == "test") == (b.name == "test")
    same = same_ids and a.record["digest"] == b.record["digest"]
    return len(set(a.ids.tolist()) & set(b.ids.tolist())) if same else 0


def _check_learning(evaluator: SoupEvaluator, settings: SearchSettings) -> None:
    """Check the settings of each soup to learn before any work.

    Raises:
        RequestError: A setting does not go with a method that learns, or there is no threat.
        DataError: Early stopping measures more samples than the search looks at.
    """
    methods = [method for method in methods_of(settings) if method in LEARNING]
    if not methods:
        return
    network = evaluator.network or evaluator.ingredients[0].network()
    for method in methods:
        family = LearnedFamily.of(str(method), parse_threats(evaluator.threats), settings.sweep)
        for item in family.list_settings(evaluator.learn):
            check_learning(
                item,
                len(evaluator.ingredients),
                evaluator.training_data,
                val=evaluator.data,
                network=network,
            )


def _check_goal(
    evaluator: SoupEvaluator, settings: SearchSettings, goal: Goal, *, samples: int, confirms: bool
) -> int:
    """Return the number of soups that are tried.

    Raises:
        RequestError: The samples that select cannot show a requirement for so many soups, or a
            measure of the goal or of the greedy score is not evaluated.
    """
    methods = methods_of(settings)
    counts = [count_soups(evaluator, method, settings) for method in methods]
    pairs = zip(methods, counts, strict=True)
    candidates = sum(1 if method == "greedy" else count for method, count in pairs)
    measures = list_measures(evaluator.threats, shift=evaluator.shift is not None)
    check_goal(goal, measures, samples=samples, candidates=candidates, confirms=confirms)
    if settings.score and "greedy" in methods:
        require_measures("score", Score.parse(settings.score).keys, measures)
    return sum(counts)


def _try_soups(
    evaluator: SoupEvaluator,
    settings: SearchSettings,
    aim: Goal,
    progress: SearchProgress,
) -> Tried:
    """Evaluate the soups of the method.

    Args:
        evaluator: Mixes and evaluates soups.
        settings: The method and its settings.
        aim: The goal with the default of what is maximised.
        progress: Receives progress.
    """
    run = MethodRun(evaluator, settings, aim, progress, TimeLimit(settings.time_limit))
    if settings.method == ALL_METHODS:
        return _describe(evaluator, search_by_all(run))
    return _describe(evaluator, search_by(run, settings.method))


def _describe(evaluator: SoupEvaluator, tried: Tried) -> Tried:
    described = [
        item if item.description else evaluator.describe(item) for item in tried.candidates
    ]
    return replace(tried, candidates=described)


@dataclass(frozen=True)
class _Choice:
    """A selection, and the evaluations of the ingredients on the same samples, by name."""

    selection: Selection
    ingredients: Mapping[str, Evaluation]


def _choose(evaluator: SoupEvaluator, tried: Tried, goal: Goal) -> _Choice:
    """Choose on the samples of the search."""
    selection = select(
        tried.candidates,
        maximise=str(goal.maximise),
        require=goal.require,
        point=goal.point,
        seed=evaluator.attack.seed,
        looked_at=tried.looked_at,
        dropped=tried.dropped,
    )
    known = {item.ingredient: item.evaluation for item in tried.candidates if item.ingredient}
    return _Choice(selection, evaluator.evaluate_ingredients({**tried.ingredients, **known}))


def _choose_among_finalists(
    evaluator: SoupEvaluator, tried: Tried, goal: Goal, split: Split
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
        [replace(item, evaluation=unattacked.evaluate(item.mixed_by)) for item in tried.candidates],
        goal,
        seed=seed,
        looked_at=np.stack(others, axis=1) if others else None,
    )
    aside = take_part(split, "confirm", seed=seed)
    confirm = replace(evaluator, data=aside, shift_part="confirm")
    attacked = prefer_confirmed(tried.candidates)
    ordered = order_finalists(attacked, goal, clean, confirm_samples=len(confirm.data))
    finalists = [replace(item, evaluation=confirm.evaluate(item.mixed_by)) for item in ordered]
    known = {item.ingredient: item.evaluation for item in finalists if item.ingredient}
    ingredients = confirm.evaluate_ingredients(known)
    return _Choice(confirm_finalists(finalists, goal, clean), ingredients)


def _list_gaps(
    evaluator: SoupEvaluator, settings: SearchSettings, goal: Goal, *, confirmed: bool
) -> Iterator[str]:
    """Yield what the guarantee leaves out."""
    split, methods = evaluator.data.name, methods_of(settings)
    stops = "learned" in methods and evaluator.learn.early_stop is not None  # a dial never stops
    stopped = [
        name
        for name, item in zip(evaluator.names, evaluator.ingredients, strict=True)
        if stopped_early_on(item, evaluator.data)
    ]
    # Other samples decide than those that built a greedy soup or stopped learning.
    holds = confirmed and not goal.requires_unattacked
    yield from describe_gaps(
        split,
        stopped=stopped,
        learned=["learned soups"] if stops and not holds else [],
        greedy=["the greedy soup"] if "greedy" in methods and not holds else [],
        screened=(settings.screen or ("surrogate" in methods and goal.requires_attacked))
        and not confirmed,
        separate=confirmed and goal.requires_unattacked,
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


def _check_merging(
    merging: Merging | None, n: int, data: Split | None, threat: ThreatModel
) -> None:
    """Raise RequestError if a merging method lacks what it requires."""
    if merging is not None:
        entry = SOUP_METHODS.get_entry(merging.method)
        check_merge(entry, n, merging.settings, data=data, threat=threat)


def _check_meanings(settings: SearchSettings, changes: Mapping[str, Any], *, learns: bool) -> None:
    """Raise RequestError if a setting is given that the method does not read."""
    names = [name for name in ("step", "tolerance", "score", "weights") if name in changes]
    unread = find_unread(names, methods_of(settings))
    if learns and not any(item in LEARNING for item in methods_of(settings)):
        unread = "learn_settings"
    if unread is not None:
        raise RequestError(f'search: {unread}: has no meaning with method "{settings.method}"')


def _check_combination(
    settings: SearchSettings, attack: AttackSettings, calibrate_on: Split | None
) -> None:
    method = settings.method
    reason = why_not_screened(method) if isinstance(method, str) else None
    if settings.screen and reason is not None:
        raise RequestError(
            f'search: screen does not apply to method "{method}", {reason}; leave out screen'
        )
    if settings.screen and not attack.is_queued:
        raise RequestError(
            f"search: screen requires an attack that can be shortened "
            f'({", ".join(QUEUED_ATTACKS)}); got "{attack.attack}"'
        )
    learns = any(item in LEARNING for item in methods_of(settings))
    if learns and calibrate_on is None:
        raise RequestError(
            f'search: method "{method}" learns on training samples; give calibrate_on, such as '
            "calibrate_on=data.train"
        )

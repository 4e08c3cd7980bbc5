"""Explain a selection: build the `Answer` from the evaluations of a search."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.simultaneous import (
    Z_ERROR,
    clopper_pearson_lower,
    fewest_hits,
    samples_to_prove,
    samples_to_separate,
)
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.soups.answer import AgainstIngredient, Answer, Gain, Guarantee, OtherCandidate
from robustsoup.soups.comparisons import Comparisons, measure_gain
from robustsoup.soups.goal import KNEE, Requirement
from robustsoup.soups.grid import Alpha
from robustsoup.soups.selection import (
    FIXED_SEQUENCE,
    Candidate,
    RequirementCheck,
    Selection,
    judge,
    rank_by,
    sample_scores,
)
from robustsoup.soups.time_limit import Late


def describe_soup(
    alpha: Alpha,
    ingredients: Sequence[str],
    *,
    ingredient: str | None = None,
    method: str = "",
    at: float | None = None,
    threats: Sequence[object] = (),
    objective: str | None = None,
    merged_by: str | None = None,
) -> str:
    """Describe a soup in words.

    Args:
        alpha: (n,) coefficients; empty where no single vector describes the soup.
        ingredients: Names of the n ingredients.
        ingredient: Name of the ingredient that the soup equals, if it is one.
        method: Method of a soup without a single vector, such as "learned".
        at: Position on a dial.
        threats: Threat models that the coefficients were learned against.
        objective: Objective that they were learned with.
        merged_by: Method that merged the ingredients, if they were not averaged.
    """
    if ingredient is not None:
        return f"{ingredient} itself"
    if at is not None:
        return f"the dial of {_join(ingredients)} at t = {at:g} (0 is robust, 1 is clean)"
    if not alpha:
        learned = describe_fitting("learned", threats, objective)
        return f"a {method or 'layer-wise'} soup of {_join(ingredients)}{learned}"
    if merged_by is not None:
        return f"{merged_by} of {_describe_shares(alpha, ingredients)}"
    if sum(map(bool, alpha)) == 1:
        return f"{_describe_shares(alpha, ingredients)} with the soup's BatchNorm statistics"
    return _describe_shares(alpha, ingredients)


def describe_fitting(verb: str, threats: Sequence[object], objective: str | None) -> str:
    """Say against which threats, and with which objective unless it is "ce", weights were fitted.

    Args:
        verb: "learned" or "trained".
        threats: Threat models; a union has several.
        objective: Objective; None if it is not known.
    """
    against = f", {verb} against {' and '.join(map(str, threats))}" if threats else ""
    return against if objective in (None, "ce") else f"{against} with {objective}"


def _describe_shares(alpha: Alpha, ingredients: Sequence[str]) -> str:
    """Name the ingredients that have a share, with it unless all have the same."""
    parts = [(share, name) for share, name in zip(alpha, ingredients, strict=True) if share]
    if len(parts) == 1:
        return parts[0][1]
    if len({share for share, _ in parts}) == 1:
        return f"equal parts of {_join([name for _, name in parts])}"
    return _join([f"{share:.3g} of {name}" for share, name in parts])


def _join(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def describe_gaps(
    split: str,
    *,
    stopped: Sequence[str] = (),
    learned: Sequence[str] = (),
    greedy: Sequence[str] = (),
    screened: bool = False,
    shifted: bool = False,
    separate: bool = False,
    fresh: bool = True,
) -> Iterator[str]:
    """Yield what a guarantee leaves out, one sentence each.

    Args:
        split: Name of the split that selects.
        stopped: Ingredients that stopped training early by the loss on that split.
        learned: Soups that stopped learning early by the loss on that split.
        greedy: Soups that were built by the score on that split.
        screened: Whether attacks on that split decided which soups are attacked in full.
        shifted: Whether corrupted copies of images that confirm finalists may have steered the
            search.
        separate: Whether requirements with and without an attack have a guarantee each.
        fresh: Whether it is known that no ingredient was trained on samples of that split.
    """
    if stopped:
        yield f"{_join(stopped)} stopped training early by the loss on {split}"
    if learned:
        yield f"{_join(learned)} stopped learning early by the loss on {split}"
    if greedy:
        yield f"{_join(greedy)} was built by the score on {split}"
    if screened:
        yield f"attacks on {split} decided which soups were attacked in full"
    if shifted:
        yield f"corrupted copies of images of {split} steered the search"
    if separate:
        yield (
            "that all requirements hold together: those with an attack do with 95 %, and so do the "
            "others"
        )
    if not fresh:
        yield f"the ingredients may have been trained on samples of {split}"


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What an explanation needs beside the selection.

    Attributes:
        ingredients: The ingredients by name, evaluated on the samples that select.
        seed: Seed of the bounds.
        selected_on: Name of the split that selects.
        fresh_split: Name of the part that all evaluations are from, if it did not steer the search.
        leaves_out: What the guarantee leaves out, one sentence each.
        late: What a time limit left out.
    """

    ingredients: Mapping[str, Evaluation]
    seed: int = 0
    selected_on: str = "val"
    fresh_split: str | None = None
    leaves_out: tuple[str, ...] = ()
    late: Late = field(default_factory=Late)


def explain(selection: Selection, context: Explained) -> Answer:
    """Explain a selection; `with_test` adds what `test` says.

    Args:
        selection: The choice, and which candidates meet the requirements.
        context: The ingredients, the seed and the split.
    """
    best, goal, judgement = selection.best, selection.goal, selection.judgement
    standing = _judge_ingredients(selection, context)
    best_ingredient = _find_best_ingredient(selection, context.ingredients, standing)
    meeting = [name for name, meets in standing.items() if meets]
    # A part of an attack says nothing about differences from networks that were attacked in full.
    compared = selection.ranking if best.confirmed else ()
    ingredients = context.ingredients if best.confirmed else {}
    comparisons = Comparisons(compared, ingredients, context.seed, selection.looked_at)
    better = _find_better_soup(selection, comparisons, meeting) if best.confirmed else None
    method = "point" if goal.point and goal.require else judgement.method
    return Answer(
        chosen=best.name,
        description=best.description,
        maximise=selection.maximise,
        require=tuple(map(str, goal.require)),
        met=selection.met,
        meeting_unconfirmed=selection.meeting_unconfirmed,
        point=goal.point,
        selected_on=context.fresh_split or context.selected_on,
        best_ingredient=best_ingredient,
        distinguishable=better is not None if meeting and best.confirmed else None,
        better_soup=None if better is None else better.words,
        unbeaten=_find_unbeaten(selection, comparisons, meeting, best_ingredient),
        comparisons=comparisons.count,
        left_out=context.late.left_out,
        unfinished=context.late.unfinished,
        checks=selection.checks,
        accuracy=dict(best.evaluation.accuracy),
        fresh_accuracy=dict(best.evaluation.accuracy) if context.fresh_split else None,
        fresh_split=context.fresh_split,
        against=tuple(
            AgainstIngredient(ingredient=name, meets=standing[name], differences=differences)
            for name, differences in comparisons.differences(best.evaluation).items()
            if name != best.ingredient
        ),
        runner_up=_find_runner_up(selection) if best.confirmed else None,
        refused=_find_refused(selection) if best.confirmed else None,
        doubt=None if best.confirmed else best.doubt,
        samples_to_prove=None if selection.met else _count_samples_to_prove(selection),
        obstacle=None if selection.met else _describe_obstacle(selection),
        guarantee=Guarantee(
            method=method,
            candidates=len(judgement.checks) + judgement.others,
            samples=len(best.evaluation.ids),
            seed=context.seed,
            critical=judgement.critical if method == "max-t" else None,
            leaves_out=context.leaves_out,
        ),
    )


def with_test(answer: Answer, evaluation: Evaluation, *, split: str = "test") -> Answer:
    """Return the answer with what a split says that chose nothing.

    Each requirement gets an exact one-sided 95 % bound for the chosen candidate alone.

    Args:
        answer: The answer.
        evaluation: The chosen candidate on that split.
        split: Name of the split.
    """
    accuracy = dict(evaluation.accuracy)
    checks = tuple(
        _check_alone(requirement, accuracy[requirement.key])
        for requirement in map(Requirement.parse, answer.require)
    )
    return replace(answer, test=checks, fresh_accuracy=accuracy, fresh_split=split)


def _check_alone(requirement: Requirement, estimate: Accuracy) -> RequirementCheck:
    met = estimate.hits >= fewest_hits(estimate.n, requirement.threshold)
    low = clopper_pearson_lower(estimate.hits, estimate.n)
    return RequirementCheck(requirement, estimate, low, met)


def _judge_ingredients(selection: Selection, context: Explained) -> dict[str, bool]:
    """Return whether each ingredient was shown to meet the requirements.

    An ingredient among the candidates keeps its verdicts there. What is not known of an ingredient,
    such as verdicts under attack of one that is no finalist, is judged together.
    """
    judgement, require = selection.judgement, selection.require
    tried = {item.ingredient: item.name for item in selection.ranking if item.ingredient}
    names = {**judgement.ingredients, **tried}
    known: dict[str, dict[Requirement, bool]] = {}
    for name in context.ingredients:
        checks = judgement.checks.get(names.get(name, ""), ())
        known[name] = {check.requirement: check.met for check in checks}
    unknown = tuple(item for item in require if any(item not in met for met in known.values()))
    others = [
        Candidate(name, (), context.ingredients[name])
        for name, met in known.items()
        if len(met) < len(require)
    ]
    if others:
        judged = judge(others, replace(selection.goal, require=unknown), seed=context.seed)
        for name, checks in judged.checks.items():
            known[name] = {check.requirement: check.met for check in checks} | known[name]
    return {name: all(met.values()) for name, met in known.items()}


def _find_best_ingredient(
    selection: Selection, ingredients: Mapping[str, Evaluation], meets: Mapping[str, bool]
) -> str | None:
    """Return the best ingredient that meets the requirements; of equal ones the chosen one."""
    meeting = [Candidate(name, (), item) for name, item in ingredients.items() if meets[name]]
    meeting.sort(key=lambda item: item.name != selection.best.ingredient)
    return rank_by(selection.score, meeting)[0].name if meeting else None


def _find_better_soup(
    selection: Selection, comparisons: Comparisons, ingredients: Sequence[str]
) -> Candidate | None:
    """Return a soup that meets the requirements and beats the given ingredients, the best first."""
    soups = [
        item
        for item in selection.ranking
        if item.ingredient is None and selection.judgement.met(item)
    ]
    better = comparisons.better_than_all(selection.score, soups, ingredients)
    return better[0] if better else None


def _find_unbeaten(
    selection: Selection,
    comparisons: Comparisons,
    ingredients: Sequence[str],
    best_ingredient: str | None,
) -> tuple[str, ...]:
    """Return the given ingredients that the choice does not beat, if it beats the best of them."""
    best = selection.best
    if not best.confirmed:
        return ()
    unbeaten = comparisons.unbeaten(selection.score, best, ingredients)
    return () if best_ingredient in unbeaten else tuple(unbeaten)


def _describe_other(selection: Selection, other: Candidate, why: str) -> OtherCandidate:
    best, score = selection.best.evaluation, selection.score
    differences = sample_scores(score, best) - sample_scores(score, other.evaluation)
    return OtherCandidate(
        name=other.name,
        description=other.words,
        gain=measure_gain(score, best, other.evaluation),
        why=why,
        samples_to_separate=samples_to_separate(differences),
    )


def _describe_gain(maximise: str, gain: Gain) -> str:
    """Return a difference of what is maximised; the score of the knee has no points."""
    if maximise != KNEE:
        return f"{maximise} {gain}"
    value, low, high = (f"{part:+z.2f}" for part in (gain.value, gain.low, gain.high))
    return f"the knee's score {value} [{low}, {high}] (1 is the range of an accuracy)"


def _find_runner_up(selection: Selection) -> OtherCandidate | None:
    judgement = selection.judgement
    second = next(
        (item for item in selection.ranking[1:] if judgement.met(item) or not selection.met), None
    )
    if second is None:
        return None
    gain = measure_gain(selection.score, selection.best.evaluation, second.evaluation)
    if gain.value == 0:
        why = "the same estimate; the higher clean accuracy, then the earlier soup is chosen"
    else:
        told = "" if gain.distinguishable else ", not distinguishable"
        other = "chosen" if selection.met else "closest"
        figures = _describe_gain(selection.maximise, gain.reversed())
        why = f"{figures} from the {other} one (this pair alone){told}"
    return _describe_other(selection, second, why)


def _find_refused(selection: Selection) -> OtherCandidate | None:
    """Return the best candidate that fails a requirement, if its score is above the choice's."""
    judgement, score = selection.judgement, selection.score
    failing = [item for item in selection.ranking if not judgement.met(item)]
    if not selection.met or not failing:
        return None
    first = rank_by(score, failing)[0]
    if score.of(first.evaluation.accuracy) <= score.of(selection.best.evaluation.accuracy):
        return None
    unmet = [check for check in judgement.checks[first.name] if not check.met]
    reasons = " and ".join(map(_describe_unmet, unmet))
    gain = measure_gain(score, first.evaluation, selection.best.evaluation)
    figures = _describe_gain(selection.maximise, gain)
    why = f"{figures} from the chosen one (this pair alone), but {reasons}"
    return _describe_other(selection, first, why)


def _describe_unmet(check: RequirementCheck) -> str:
    if check.low >= check.requirement.threshold:  # its bound, if it had been tested
        return f"not tested for {check.requirement}, as a safer finalist failed before it"
    return (
        f"not shown to meet {check.requirement}: {check.estimate.value:.1%}, "
        f"at least {check.low:.1%}"
    )


def _count_samples_to_prove(selection: Selection) -> int | None:
    judgement = selection.judgement
    confirms = FIXED_SEQUENCE in judgement.method
    counts: list[int | None] = []
    for check in selection.checks:
        is_confirmed = confirms and check.requirement.is_attacked
        critical = Z_ERROR if is_confirmed else judgement.critical
        count = samples_to_prove(check.estimate.value, check.requirement.threshold, critical)
        if not check.met:
            # The confirm part is a third of the samples.
            counts.append(3 * count if is_confirmed and count is not None else count)
    numbers = [count for count in counts if count is not None]
    return max(numbers) if numbers and len(numbers) == len(counts) else None


def _describe_obstacle(selection: Selection) -> str:
    """Say how many candidates meet each requirement, and whether only all together are too much.

    Requirements on attacked accuracies may have been tested on a few finalists alone.
    """
    checks = [check for row in selection.judgement.checks.values() for check in row]
    tested = {item: [c.met for c in checks if c.requirement == item] for item in selection.require}
    candidates = len(selection.judgement.checks)
    parts: list[str] = []
    for number, (requirement, met) in enumerate(tested.items()):
        is_like_before = number and len(met) == len(tested[selection.require[number - 1]])
        kind = "candidates" if len(met) == candidates else "finalists"
        start = "" if is_like_before else f"of {len(met)} {kind}, "
        parts.append(f"{start}{requirement} is met by {sum(met) or 'none'}")
    shown = len(tested) > 1 and all(map(any, tested.values()))
    conflict = shown and not selection.meeting_unconfirmed
    end = "; none meets all: the requirements conflict here" if conflict else ""
    return ", ".join(parts) + end

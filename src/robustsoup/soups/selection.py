"""Select among evaluated soups: which meet the requirements, the Pareto front and the choice.

The rule for "best", everywhere: among the candidates that meet every requirement, the one with the
highest estimate of what the goal maximises; ties go to the higher clean accuracy, then to the
earlier candidate. If no candidate meets the requirements, the rule applies to those with the least
total shortfall.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from robustsoup.display import html_table
from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.simultaneous import Z_ERROR, Floats, Hits, prove_accuracies
from robustsoup.evaluation.two_phase import SUBSET_KEY
from robustsoup.evaluation.verdicts import CLEAN_KEY, UNION_KEY, Evaluation, parse_measure
from robustsoup.printable import make_printable
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.goal import (
    KNEE,
    UNATTACKED,
    Goal,
    Requirement,
    Requirements,
    Score,
    require_measures,
)
from robustsoup.soups.grid import Alpha
from robustsoup.threats import ThreatModel


@dataclass(frozen=True, repr=False)
class Candidate:
    """An evaluated soup.

    Attributes:
        name: Unique name among the candidates.
        alpha: (n,) coefficients of the n ingredients; empty where no single vector describes them.
        evaluation: Verdicts on the split that selects.
        description: What the soup is, in words: "0.4 of eps4 and 0.6 of eps16".
        ingredient: Name of the ingredient that the candidate equals bit for bit, if it is one.
        coefficients: Coefficients by layer of a soup that a search learned.
    """

    name: str
    alpha: Alpha
    evaluation: Evaluation
    description: str = ""
    ingredient: str | None = None
    coefficients: Coefficients | None = None

    @property
    def mixed_by(self) -> Alpha | Coefficients:
        """Coefficients by layer, else `alpha`: what `mix` takes, or the weights of a merge."""
        return self.alpha if self.coefficients is None else self.coefficients

    @property
    def words(self) -> str:
        """The description, else the name."""
        return self.description or self.name

    def __repr__(self) -> str:
        """Return one line: the name and the accuracies."""
        note = "" if self.confirmed else f", {self.doubt}"
        return make_printable(f"Candidate({self.name}: {self.evaluation.accuracy}{note})")

    def _repr_html_(self) -> str:
        return tabulate_candidates(self.name, [self])

    @property
    def doubt(self) -> str:
        """What robust accuracies are that are not confirmed."""
        return "estimates" if SUBSET_KEY in self.evaluation.record else "upper bounds"

    @property
    def confirmed(self) -> bool:
        """Whether all samples were attacked in full; else accuracies are estimates or bounds."""
        record = self.evaluation.record
        return not (record.get("screened") or SUBSET_KEY in record)


@dataclass(frozen=True)
class RequirementCheck:
    """Whether one candidate meets one requirement.

    Attributes:
        requirement: The requirement.
        estimate: The accuracy on the samples that test it.
        low: One-sided 95 % lower bound, simultaneous over all candidates and requirements.
        met: Whether the bound (for `--point`, the estimate) reaches the threshold.
    """

    requirement: Requirement
    estimate: Accuracy
    low: float
    met: bool

    def to_json(self) -> dict[str, Any]:
        """Return the requirement, the estimate, the bound and the verdict, for json.dumps."""
        return {
            "require": str(self.requirement),
            "estimate": self.estimate.to_json(),
            "low": self.low,
            "met": self.met,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RequirementCheck":
        """Read what `to_json` returned."""
        requirement = Requirement.parse(content["require"])
        estimate = Accuracy.from_json(content["estimate"])
        return cls(requirement, estimate, content["low"], content["met"])

    @property
    def shortfall(self) -> float:
        """How far the bound is below the threshold, 0 where the requirement is met."""
        return 0.0 if self.met else self.requirement.threshold - self.low


FIXED_SEQUENCE = "fixed sequence"
"""Method of bounds that test finalists in a fixed order, on samples kept aside."""


@dataclass(frozen=True)
class Judgement:
    """Which candidates meet the requirements.

    Attributes:
        checks: One check for each requirement, by name of the candidate.
        method: How the bounds were computed: "max-t", "exact", "fixed sequence", two of them joined
            by "and", or "none" without requirements.
        critical: Quantile in the place of 1.645 of a single bound.
        others: Number of further soups that the bounds on clean accuracy hold for.
        ingredients: Names of the candidates that equal an ingredient, by its name.
    """

    checks: Mapping[str, tuple[RequirementCheck, ...]]
    method: str = "none"
    critical: float = Z_ERROR
    others: int = 0
    ingredients: Mapping[str, str] = field(default_factory=dict)

    def met(self, candidate: Candidate) -> bool:
        """Return whether the candidate meets every requirement."""
        return all(check.met for check in self.checks[candidate.name])

    def shortfall(self, candidate: Candidate) -> float:
        """Return the total shortfall of the candidate over all requirements."""
        return sum(check.shortfall for check in self.checks[candidate.name])

    def eligible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that meet the requirements, else those with the least shortfall."""
        meeting = [candidate for candidate in candidates if self.met(candidate)]
        if meeting or not candidates:
            return meeting
        least = min(map(self.shortfall, candidates))
        return [candidate for candidate in candidates if self.shortfall(candidate) == least]


def judge(
    candidates: Sequence[Candidate],
    goal: Goal,
    *,
    seed: int = 0,
    looked_at: Hits | None = None,
    unconfirmed: bool = False,
) -> Judgement:
    """Decide which candidates meet the requirements, simultaneously over all of them.

    Each pair of a candidate and a requirement is one statement, and all statements hold together
    with a probability of 95 %; a candidate meets the requirements if all of its statements are
    shown. With several requirements this is conservative: a wrong choice needs one wrong statement
    about the chosen candidate, whereas the bounds allow for all of them.

    Args:
        candidates: All candidates that were looked at, evaluated on the same samples; one that is
            left out is one that the guarantee leaves out.
        goal: The requirements.
        seed: Seed of the multiplier bootstrap.
        looked_at: (n, k) clean hits of further soups, whose clean accuracies were looked at too;
            the bounds on clean accuracy hold for them as well.
        unconfirmed: Whether candidates that were not attacked in full may meet requirements under
            attack by their upper bounds; without it, their bounds are 0.

    Raises:
        RequestError: If a measure was not evaluated, the samples differ, or a name is repeated.
    """
    _check_candidates("select", candidates)
    names = {item.ingredient: item.name for item in candidates if item.ingredient is not None}
    if not goal.require:
        return Judgement({item.name: () for item in candidates}, ingredients=names)
    keys = [requirement.key for requirement in goal.require]
    hits = {key: stack_hits(candidates, key, unconfirmed=unconfirmed) for key in keys}
    count = len(keys) * len(candidates)
    columns = np.concatenate([hits[key] for key in keys], axis=1)
    thresholds = np.repeat([item.threshold for item in goal.require], len(candidates))
    for item in goal.require:
        if item.key == CLEAN_KEY and looked_at is not None:
            columns = np.concatenate([columns, looked_at], axis=1)
            thresholds = np.append(thresholds, np.full(looked_at.shape[1], item.threshold))
    proof = prove_accuracies(columns, thresholds, seed=seed)
    low, met = (part[:count].reshape(len(keys), -1) for part in (proof.low, proof.met))
    checks: dict[str, tuple[RequirementCheck, ...]] = {}
    for number, candidate in enumerate(candidates):
        accuracy = candidate.evaluation.accuracy
        checks[candidate.name] = tuple(
            RequirementCheck(item, estimate, estimate.value, estimate.value >= item.threshold)
            if goal.point
            else RequirementCheck(item, estimate, float(bounds[number]), bool(shown[number]))
            for item, bounds, shown in zip(goal.require, low, met, strict=True)
            for estimate in [accuracy[item.key]]
        )
    others = len(thresholds) - count
    return Judgement(checks, proof.method, proof.critical, others, names)


def _check_candidates(caller: str, candidates: Sequence[Candidate]) -> None:
    """Raise RequestError if candidates share a name, or were evaluated on different samples."""
    names = [candidate.name for candidate in candidates]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RequestError(
            f"{caller}: several candidates are named {repeated[0]}; give each a name of its own"
        )
    for candidate in candidates[1:]:
        if not _share_samples(candidate.evaluation, candidates[0].evaluation):
            raise RequestError(
                f"{caller}: {candidate.name} and {candidates[0].name} were evaluated on different "
                "samples; evaluate all candidates on the same ones"
            )


def _share_samples(a: Evaluation, b: Evaluation) -> bool:
    """Compare ids and labels, and the data and the split that the records name."""
    named = [(e.record.get("data", {}).get("digest"), e.record.get("split")) for e in (a, b)]
    return torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) and named[0] == named[1]


def stack_hits(candidates: Sequence[Candidate], key: str, *, unconfirmed: bool = False) -> Hits:
    """Return (n, k) hits of k candidates on the same n samples under one measure.

    Candidates that were not attacked in full have no hits under attack, unless `unconfirmed`.

    Raises:
        RequestError: If the measure was not evaluated.
    """
    columns = []
    for candidate in candidates:
        hits = candidate.evaluation.hits()
        require_measures("select", [key], hits)
        shown = unconfirmed or candidate.confirmed or key in UNATTACKED
        columns.append(hits[key].numpy() & shown)
    return np.stack(columns, axis=1)


@dataclass(frozen=True, repr=False)
class Selection:
    """The chosen candidate.

    Attributes:
        best: The choice, or the closest candidate if none meets the requirements.
        met: Whether `best` meets every requirement.
        goal: What was maximised and required.
        judgement: Which candidates meet the requirements.
        ranking: The confirmed candidates in the order of the rule for "best": those that meet the
            requirements first.
        score: What the goal maximises, as a weighted sum of accuracies.
        looked_at: Number of soups that were measured, with or without an attack, on the samples
            that choose; 0 if other samples steered the search.
    """

    best: Candidate
    met: bool
    goal: Goal
    judgement: Judgement
    ranking: tuple[Candidate, ...]
    score: Score
    looked_at: int = 0

    @property
    def maximise(self) -> str:
        """What was maximised, as text."""
        return str(self.goal.maximise)

    @property
    def require(self) -> tuple[Requirement, ...]:
        """The requirements."""
        return self.goal.require

    @property
    def meeting_unconfirmed(self) -> int:
        """Number of candidates that meet the requirements but were not attacked in full.

        They are not in the ranking; 0 if the choice meets the requirements.
        """
        if self.met:
            return 0
        ranked = {item.name for item in self.ranking}
        others = [row for name, row in self.judgement.checks.items() if name not in ranked]
        return sum(len(row) == len(self.require) and all(c.met for c in row) for row in others)

    @property
    def checks(self) -> tuple[RequirementCheck, ...]:
        """Whether the choice meets each requirement."""
        return self.judgement.checks[self.best.name]

    def __repr__(self) -> str:
        """Return one line: the message."""
        return make_printable(f"Selection({self.message})")

    def _repr_html_(self) -> str:
        return tabulate_candidates(self.message, [self.best])

    @property
    def message(self) -> str:
        """One line that names the choice, or says that no candidate meets the requirements."""
        scores = self.best.evaluation.accuracy
        keys = dict.fromkeys([CLEAN_KEY, *self.score.keys, *(r.key for r in self.require)])
        figures = ", ".join(f"{key} {scores[key]}" for key in keys)
        if self.met:
            return f"chosen: {self.best.name} ({figures})"
        unmet = describe_unmet(
            [str(item) for item in self.require],
            point=self.goal.point,
            unconfirmed=self.meeting_unconfirmed,
        )
        return f"{unmet}; the closest is {self.best.name} ({figures})"


def describe_unmet(require: Sequence[str], *, point: bool, unconfirmed: int) -> str:
    """Say that no candidate meets the requirements.

    Args:
        require: The requirements.
        point: Whether estimates were compared with the thresholds.
        unconfirmed: Number of candidates that meet them but were not attacked in full.
    """
    whose = "no candidate that was attacked in full" if unconfirmed else "no candidate"
    bound = "estimate" if point else "95 % lower bound"
    do = "1 other does" if unconfirmed == 1 else f"{unconfirmed:,} others do"
    text = f"{whose} meets {' and '.join(require)} by its {bound}"
    return f"{text} ({do})" if unconfirmed else text


def tabulate_candidates(title: str, candidates: Sequence[Candidate]) -> str:
    """Return the accuracies of candidates as an HTML table for notebooks.

    Args:
        title: Caption.
        candidates: At least one, all evaluated under the same measures.
    """
    measures = list(candidates[0].evaluation.accuracy)
    rows = (
        (item.name, *(str(item.evaluation.accuracy[measure]) for measure in measures))
        for item in candidates
    )
    doubts: dict[str, list[str]] = {}
    for item in candidates:
        if not item.confirmed:
            doubts.setdefault(item.doubt, []).append(item.name)
    notes = [f"{doubt}: {', '.join(names)}" for doubt, names in doubts.items()]
    return html_table(title, ("soup", *measures), rows, notes)


def select(
    tried: Sequence[Candidate],
    *,
    maximise: ThreatModel | Score | str,
    require: Requirements = (),
    point: bool = False,
    unconfirmed: bool = False,
    seed: int = 0,
    looked_at: Hits | None = None,
    dropped: int = 0,
) -> Selection:
    """Select the candidate that maximises the goal among those that meet the requirements.

    The rule for "best" is that of this module: the highest estimate; ties go to the higher clean
    accuracy, then to the earlier candidate. If no candidate meets the requirements, the candidate
    with the least total shortfall is returned with `met = False`.

    Args:
        tried: Evaluated candidates, all on the same samples. All of them count for the guarantee.
        maximise: "clean", "union", a threat model, a weighted sum of them such as
            "0.3 clean + 0.7 Linf 8/255", or "knee".
        require: {"clean": 0.85} or ["clean>=0.85"]; met if a one-sided 95 % lower bound reaches the
            threshold simultaneously over all candidates and requirements.
        point: Compare the estimate, not the lower bound, with the thresholds.
        unconfirmed: Also consider candidates whose robust accuracies are upper bounds; without it,
            they are considered only if there are no others.
        seed: Seed of the bootstrap behind the bounds.
        looked_at: (n, k) clean hits of soups that were measured without an attack and are no
            candidates; the bounds on clean accuracy hold for them too.
        dropped: Number of soups that greedy searches attacked and that are no candidates.

    Returns:
        The choice, and whether it meets the requirements.

    Raises:
        RequestError: If there are no candidates, two share a name, the samples differ, or a measure
            was not evaluated.
    """
    tried = list(tried)
    if not tried:
        raise RequestError("select: no candidates")
    goal = Goal.parse(maximise, require, point=point)
    for candidate in tried:
        require_measures("select", goal.measures, candidate.evaluation.accuracy)
    judgement = judge(tried, goal, seed=seed, looked_at=looked_at, unconfirmed=unconfirmed)
    considered = list(tried)
    if not unconfirmed:
        considered = prefer_confirmed(tried)
    eligible = judgement.eligible(considered)
    names = {candidate.name for candidate in eligible}
    score = target_score(goal, eligible)
    best, *others = rank_by(score, eligible)
    rest = rank_by(score, [item for item in considered if item.name not in names])
    if not judgement.met(best):
        rest.sort(key=judgement.shortfall)
    ranking = (best, *others, *rest)
    count = len(tried) + (0 if looked_at is None else looked_at.shape[1]) + dropped
    return Selection(best, judgement.met(best), goal, judgement, ranking, score, count)


def prefer_confirmed(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that were attacked in full; all of them if none was."""
    return [item for item in candidates if item.confirmed] or list(candidates)


def rank_by(score: Score, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates by the rule for "best", without regard to requirements."""

    def rank(candidate: Candidate) -> tuple[float, float]:
        scores = candidate.evaluation.accuracy
        return -score.of(scores), -scores[CLEAN_KEY].value

    return sorted(candidates, key=rank)


def target_score(goal: Goal, eligible: Sequence[Candidate]) -> Score:
    """Return what a goal maximises as a weighted sum of accuracies.

    For "knee", clean accuracy and accuracy under the threat (with several threats, their union)
    are weighted by the inverse of their range on the Pareto front of the eligible candidates, so
    the candidate farthest above the straight line between the ends of the front wins.
    """
    if goal.maximise != KNEE:
        return Score.parse(str(goal.maximise))
    measures = list(eligible[0].evaluation.accuracy)
    if measures == [CLEAN_KEY]:
        return Score.parse(CLEAN_KEY)
    keys = [CLEAN_KEY, UNION_KEY if UNION_KEY in measures else measures[1]]
    front = pareto_front(eligible, keys)
    terms: list[tuple[float, str]] = []
    for key in keys:
        values = [candidate.evaluation.accuracy[key].value for candidate in front]
        span = max(values) - min(values)
        terms.append((1 / span if span > 0 else 1.0, key))
    return Score(tuple(terms))


def sample_scores(score: Score, evaluation: Evaluation) -> Floats:
    """Return (n,) what each sample adds to a score: the weighted sum of its hits."""
    hits = evaluation.hits()
    parts = [weight * hits[key].double() for weight, key in score.terms]
    return torch.stack(parts).sum(0).numpy()


def pareto_front(tried: Sequence[Candidate], keys: Sequence[str | ThreatModel]) -> list[Candidate]:
    """Return the candidates that no other candidate dominates.

    A candidate dominates another if it is at least as accurate under every measure and more
    accurate under one of them.

    Args:
        tried: Evaluated candidates, all on the same samples.
        keys: measures: "clean", "union" or threat models.

    Returns:
        The front, in the order of `tried`.

    Raises:
        RequestError: If two candidates share a name, the samples differ, or a measure was not
            evaluated.
        ThreatError: If a key is not a measure.
    """
    tried = list(tried)
    several = [keys] if isinstance(keys, (str, ThreatModel)) else keys
    measures = [parse_measure(key) for key in several]
    _check_candidates("pareto_front", tried)
    for candidate in tried:
        require_measures("pareto_front", measures, candidate.evaluation.accuracy)

    def values(candidate: Candidate) -> tuple[float, ...]:
        scores = candidate.evaluation.accuracy
        return tuple(scores[measure].value for measure in measures)

    front = find_front([values(candidate) for candidate in tried])
    return [tried[position] for position in front]


def find_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the positions of the points that no other point dominates, in order."""
    return [
        position
        for position, point in enumerate(points)
        if not any(_dominates(other, point) for other in points)
    ]


def worth_confirming(tried: Sequence[Candidate]) -> list[Candidate]:
    """Return the screened candidates that a full evaluation could add to the Pareto front.

    Together with the confirmed candidates, the result covers the front: for every candidate of the
    front, it contains one that is as accurate under every measure, up to 0.5 / sqrt(n), which is
    half the half-width of a 95 % interval at n samples. The accuracies of screened candidates are
    upper bounds; a full evaluation may lower them by more than this margin.

    Args:
        tried: Screened and confirmed candidates, all on the same n samples; at least one.

    Returns:
        Unconfirmed candidates of the front.
    """
    measures = list(tried[0].evaluation.accuracy)
    noise = 0.5 / math.sqrt(tried[0].evaluation.accuracy[CLEAN_KEY].n)

    def covers(candidate: Candidate, other: Candidate) -> bool:
        a, b = candidate.evaluation.accuracy, other.evaluation.accuracy
        return all(a[measure].value >= b[measure].value - noise for measure in measures)

    front = sorted(
        pareto_front(tried, measures), key=lambda c: -c.evaluation.accuracy[CLEAN_KEY].value
    )
    cover = [candidate for candidate in tried if candidate.confirmed]
    for candidate in front:
        if not any(covers(member, candidate) for member in cover):
            cover.append([member for member in front if covers(member, candidate)][-1])
    return [candidate for candidate in cover if not candidate.confirmed]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))

"""Select among evaluated soups: requirements, scores, the Pareto front and the choice."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from robustsoup.display import html_table
from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import CLEAN_KEY, Evaluation, parse_measure
from robustsoup.printable import make_printable
from robustsoup.soups.grid import Alpha
from robustsoup.threats import ThreatModel

AccuracyByMeasure = Mapping[str, Accuracy]
"""Accuracies by measure: "clean", "union" or a threat model as text."""

Requirements = Mapping[str | ThreatModel, float] | Sequence["str | Requirement"]
"""Requirements as callers write them: {"clean": 0.85} or ["clean>=0.85"]."""


@dataclass(frozen=True, repr=False)
class Candidate:
    """An evaluated soup.

    Attributes:
        name: Unique name among the candidates.
        alpha: (n,) coefficients of the n ingredients; empty where no single vector describes them.
        evaluation: Verdicts on the split that selects.
    """

    name: str
    alpha: Alpha
    evaluation: Evaluation

    def __repr__(self) -> str:
        """Return one line: the name and the accuracies."""
        bounds = "" if self.confirmed else ", upper bounds"
        return make_printable(f"Candidate({self.name}: {self.evaluation.accuracy}{bounds})")

    def _repr_html_(self) -> str:
        return tabulate_candidates(self.name, [self])

    @property
    def confirmed(self) -> bool:
        """Whether the full protocol ran to its end; else robust accuracies are upper bounds."""
        record = self.evaluation.record
        return not (record.get("screened") or record.get("stopped"))


@dataclass(frozen=True)
class Requirement:
    """Lower limit on one accuracy.

    Attributes:
        key: "clean", "union" or a threat model as text.
        threshold: Minimum accuracy, in [0, 1].
    """

    key: str
    threshold: float

    @classmethod
    def parse(cls, text: "str | Requirement") -> "Requirement":
        """Parse "clean>=0.85" or "Linf 8/255 >= 40%"; a Requirement is returned unchanged.

        Raises:
            RequestError: For any other form, and for a threshold outside [0, 1].
        """
        if isinstance(text, Requirement):
            return text
        wrong_form = f'require: got "{text}", expected a form such as "clean>=0.85"'
        match = re.fullmatch(r"\s*(.+?)\s*>=\s*([0-9.eE+-]+)\s*(%?)\s*", text)
        if match is None:
            raise RequestError(wrong_form)
        key, number, percent = match.groups()
        try:
            threshold = float(number) / (100 if percent else 1)
        except ValueError:
            raise RequestError(wrong_form) from None
        if not 0 <= threshold <= 1:
            raise RequestError(f'require: got "{text}", expected an accuracy between 0 and 1')
        return cls(parse_measure(key), threshold)

    @classmethod
    def parse_all(cls, requirements: Requirements) -> tuple["Requirement", ...]:
        """Parse a mapping or a sequence of requirements, in order."""
        if isinstance(requirements, Mapping):
            return tuple(cls.parse(f"{key}>={value}") for key, value in requirements.items())
        return tuple(cls.parse(item) for item in requirements)

    def shortfall(self, scores: AccuracyByMeasure, *, point: bool = False) -> float:
        """Return how far the lower bound (with `point`, the estimate) is below the threshold."""
        accuracy = scores[self.key]
        return max(self.threshold - (accuracy.value if point else accuracy.low), 0.0)

    def met_by(self, scores: AccuracyByMeasure, *, point: bool = False) -> bool:
        """Return whether the 95 % lower bound (with `point`, the estimate) meets the threshold."""
        accuracy = scores[self.key]
        return (accuracy.value if point else accuracy.low) >= self.threshold

    def __str__(self) -> str:
        """Return the requirement as `parse` reads it."""
        return f"{self.key}>={self.threshold:g}"


@dataclass(frozen=True)
class Score:
    """A weighted sum of accuracies.

    Attributes:
        terms: Pairs (weight, measure); a measure is "clean", "union" or a threat model as text.
    """

    terms: tuple[tuple[float, str], ...]

    @classmethod
    def parse(cls, text: "str | ThreatModel | Score") -> "Score":
        """Parse "clean", "Linf 8/255" or "0.3 clean + 0.7 Linf 8/255"; a Score is unchanged.

        Raises:
            RequestError: For any other form, and if every weight is 0.
        """
        if isinstance(text, Score):
            return text
        try:
            terms = tuple(_parse_score_term(part) for part in str(text).split(" + "))
        except (ValueError, RequestError):
            raise RequestError(
                f"score: got {str(text)!r}, expected a threat model, clean, or a sum such as "
                '"0.3 clean + 0.7 Linf 8/255"'
            ) from None
        if not any(weight for weight, _ in terms):
            raise RequestError(f"score: got {str(text)!r}, expected a weight above 0")
        return cls(terms)

    @property
    def keys(self) -> list[str]:
        """The measures in the sum."""
        return [key for _, key in self.terms]

    def of(self, scores: AccuracyByMeasure) -> float:
        """Return the weighted sum.

        Raises:
            RequestError: If a measure was not evaluated.
        """
        _require_measures("score", self.keys, scores)
        return sum(weight * scores[key].value for weight, key in self.terms)

    def __str__(self) -> str:
        """Return the score as `parse` reads it."""
        if len(self.terms) == 1:
            return self.terms[0][1]
        return " + ".join(f"{weight:g} {key}" for weight, key in self.terms)


def _parse_score_term(text: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*([0-9.]*)\s*(.*?)\s*", text)
    if match is None:
        raise ValueError(text)
    weight, key = match.groups()
    return float(weight or 1), parse_measure(key)


@dataclass(frozen=True)
class Goal:
    """The measure that a selection maximises, and its requirements.

    Attributes:
        maximise: "clean", "union" or a threat model as text; None to choose nothing.
        require: Requirements that the choice must meet.
        point: Whether estimates, not 95 % lower bounds, are compared with the thresholds.
    """

    maximise: str | None = None
    require: tuple[Requirement, ...] = ()
    point: bool = False

    @classmethod
    def parse(
        cls,
        maximise: str | ThreatModel | None = None,
        require: Requirements = (),
        *,
        point: bool = False,
    ) -> Self:
        """Parse the measure and the requirements.

        Raises:
            RequestError: If one of them cannot be parsed.
        """
        measure = None if maximise is None else parse_measure(maximise)
        return cls(measure, Requirement.parse_all(require), point)

    def met_by(self, candidate: Candidate) -> bool:
        """Return whether the candidate meets every requirement."""
        scores = candidate.evaluation.accuracy
        return all(requirement.met_by(scores, point=self.point) for requirement in self.require)

    def shortfall(self, candidate: Candidate) -> float:
        """Return the total shortfall of the candidate over all requirements."""
        scores = candidate.evaluation.accuracy
        return sum(item.shortfall(scores, point=self.point) for item in self.require)

    def eligible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that meet the requirements, else those with the least shortfall."""
        meeting = [candidate for candidate in candidates if self.met_by(candidate)]
        if meeting or not candidates:
            return meeting
        least = min(map(self.shortfall, candidates))
        return [candidate for candidate in candidates if self.shortfall(candidate) == least]


@dataclass(frozen=True, repr=False)
class Selection:
    """The chosen candidate.

    Attributes:
        best: The choice, or the closest candidate if none meets the requirements.
        met: Whether `best` meets every requirement.
        maximise: The maximised measure.
        require: The requirements.
        point: Whether estimates, not 95 % lower bounds, were compared with the thresholds.
    """

    best: Candidate
    met: bool
    maximise: str
    require: tuple[Requirement, ...]
    point: bool

    def __repr__(self) -> str:
        """Return one line: the message."""
        return make_printable(f"Selection({self.message})")

    def _repr_html_(self) -> str:
        return tabulate_candidates(self.message, [self.best])

    @property
    def message(self) -> str:
        """One line that names the choice, or says that no candidate meets the requirements."""
        scores = self.best.evaluation.accuracy
        keys = dict.fromkeys([CLEAN_KEY, self.maximise, *(r.key for r in self.require)])
        figures = ", ".join(f"{key} {scores[key]}" for key in keys)
        if self.met:
            return f"chosen: {self.best.name} ({figures})"
        requirements = " and ".join(map(str, self.require))
        bound = "estimate" if self.point else "95 % lower bound"
        return (
            f"no candidate meets {requirements} by its {bound}; "
            f"the closest is {self.best.name} ({figures})"
        )


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
    bounds = [item.name for item in candidates if not item.confirmed]
    notes = [f"upper bounds: {', '.join(bounds)}"] if bounds else []
    return html_table(title, ("soup", *measures), rows, notes)


def select(
    tried: Sequence[Candidate],
    *,
    maximise: ThreatModel | str,
    require: Requirements = (),
    point: bool = False,
    unconfirmed: bool = False,
) -> Selection:
    """Select the candidate with the highest accuracy under `maximise` that meets the requirements.

    Ties go to the higher clean accuracy, then to the earlier candidate. If no candidate meets the
    requirements, the candidate with the least total shortfall is returned with `met = False`.

    Args:
        tried: Evaluated candidates, all on the same samples.
        maximise: "clean", "union" or a threat model.
        require: {"clean": 0.85} or ["clean>=0.85"]; met if the lower end of the 95 % Wilson
            interval reaches the threshold.
        point: Compare the estimate, not the lower bound, with the thresholds.
        unconfirmed: Also consider candidates whose robust accuracies are upper bounds; without it,
            they are considered only if there are no others.

    Returns:
        The choice, and whether it meets the requirements.

    Raises:
        RequestError: If there are no candidates, or a measure was not evaluated.
    """
    if not tried:
        raise RequestError("select: no candidates")
    goal = Goal.parse(maximise, require, point=point)
    measure = parse_measure(maximise)
    keys = [measure, *(requirement.key for requirement in goal.require)]
    _require_measures("select", keys, tried[0].evaluation.accuracy)
    if not unconfirmed:
        tried = [candidate for candidate in tried if candidate.confirmed] or tried

    def rank(candidate: Candidate) -> tuple[float, float]:
        scores = candidate.evaluation.accuracy
        return scores[measure].value, scores[CLEAN_KEY].value

    best = max(goal.eligible(tried), key=rank)
    return Selection(best, goal.met_by(best), measure, goal.require, point)


def pareto_front(tried: Sequence[Candidate], keys: Sequence[str | ThreatModel]) -> list[Candidate]:
    """Return the candidates that no other candidate dominates.

    A candidate dominates another if it is at least as accurate under every measure and more
    accurate under one of them.

    Args:
        tried: Evaluated candidates.
        keys: measures: "clean", "union" or threat models.

    Returns:
        The front, in the order of `tried`.

    Raises:
        RequestError: If a measure was not evaluated.
    """
    measures = [str(key) for key in keys]
    if tried:
        _require_measures("pareto_front", measures, tried[0].evaluation.accuracy)

    def values(candidate: Candidate) -> tuple[float, ...]:
        scores = candidate.evaluation.accuracy
        return tuple(scores[measure].value for measure in measures)

    points = [values(candidate) for candidate in tried]
    return [
        candidate
        for candidate, point in zip(tried, points, strict=True)
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


def _require_measures(caller: str, keys: Sequence[str], scores: AccuracyByMeasure) -> None:
    for key in keys:
        if key not in scores:
            raise RequestError(
                f'{caller}: "{key}" was not evaluated; expected one of {", ".join(scores)}'
            )

"""Choosing among soups that were tried: the most robust one that meets the requirements, and the Pareto front."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.threats import ThreatModel

Alpha = tuple[float, ...]
Scores = Mapping[str, Accuracy]


@dataclass(frozen=True)
class Candidate:
    """A soup that was tried: its coefficients and what it scored."""

    name: str
    alpha: Alpha
    evaluation: Evaluation

    @property
    def confirmed(self) -> bool:
        """Whether the full protocol made its figures; those of a screened or stopped one are upper bounds."""
        return not (self.evaluation.record.get("screened") or self.evaluation.record.get("stopped"))


@dataclass(frozen=True)
class Requirement:
    """accuracy under `key` ("clean", "union" or a threat model as text) is at least `least`."""

    key: str
    least: float

    @classmethod
    def parse(cls, text: "str | Requirement") -> "Requirement":
        """Read "clean>=0.85", "Linf 8/255 >= 40%". Raises RequestError."""
        if isinstance(text, Requirement):
            return text
        match = re.fullmatch(r"\s*(.+?)\s*>=\s*([0-9.eE+-]+)\s*(%?)\s*", text)
        try:
            key, number, percent = match.groups()
            least = float(number) / (100 if percent else 1)
        except (AttributeError, ValueError):
            raise RequestError(
                f'require: got "{text}", expected something like "clean>=0.85"'
            ) from None
        if not 0 <= least <= 1:
            raise RequestError(f'require: got "{text}", expected an accuracy between 0 and 1')
        return cls(key if key in ("clean", "union") else str(ThreatModel.parse(key)), least)

    def met_by(self, scores: Scores, *, point: bool = False) -> bool:
        """Whether the lower end of the 95 % interval (the estimate, if `point`) is at least `least`."""
        accuracy = scores[self.key]
        return (accuracy.value if point else accuracy.low) >= self.least

    def __str__(self) -> str:
        return f"{self.key}>={self.least:g}"


@dataclass(frozen=True)
class Score:
    """A weighted sum of accuracies under "clean", "union" or threat models as text."""

    terms: tuple[tuple[float, str], ...]

    @classmethod
    def parse(cls, text: "str | Score") -> "Score":
        """Read "clean", "Linf 8/255", "0.3 clean + 0.7 Linf 8/255". Raises RequestError."""
        if isinstance(text, Score):
            return text
        terms = []
        for part in str(text).split(" + "):
            try:
                weight, key = re.fullmatch(r"\s*([0-9.]*)\s*(.*?)\s*", part).groups()
                number = float(weight or 1)
                name = key if key in ("clean", "union") else str(ThreatModel.parse(key))
            except (ValueError, AttributeError, RequestError):
                raise RequestError(
                    f'score: got {text!r}, expected a threat model, clean, or a sum as in "0.3 clean + 0.7 Linf 8/255"'
                ) from None
            terms.append((number, name))
        if not any(weight for weight, _ in terms):
            raise RequestError(f"score: got {text!r}, expected a weight above 0")
        return cls(tuple(terms))

    @property
    def keys(self) -> list[str]:
        """The accuracies that it needs."""
        return [key for _, key in self.terms]

    def of(self, scores: Scores) -> float:
        """The score. Raises RequestError for a key that was not evaluated."""
        for key in self.keys:
            if key not in scores:
                raise RequestError(
                    f'score: "{key}" was not evaluated; expected one of {", ".join(scores)}'
                )
        return sum(weight * scores[key].value for weight, key in self.terms)

    def __str__(self) -> str:
        if len(self.terms) == 1:
            return self.terms[0][1]
        return " + ".join(f"{weight:g} {key}" for weight, key in self.terms)


@dataclass(frozen=True)
class Selection:
    """The candidate to take. met: whether it meets every requirement; if none does, `best` is the closest one."""

    best: Candidate
    met: bool
    maximise: str
    require: tuple[Requirement, ...]
    point: bool

    @property
    def message(self) -> str:
        """One line that says what was chosen, or that nothing meets the requirements and what comes closest."""
        scores = self.best.evaluation.accuracy
        keys = dict.fromkeys(["clean", self.maximise, *(r.key for r in self.require)])
        shown = ", ".join(f"{key} {scores[key]}" for key in keys)
        if self.met:
            return f"chosen: {self.best.name} ({shown})"
        wanted = " and ".join(map(str, self.require))
        by = "estimate" if self.point else "lower end of the 95 % interval"
        return f"nothing meets {wanted} by its {by}; the closest is {self.best.name} ({shown})"


def select(
    tried: Sequence[Candidate],
    *,
    maximise: ThreatModel | str,
    require: Mapping[str | ThreatModel, float] | Sequence[str | Requirement] = (),
    point: bool = False,
    unconfirmed: bool = False,
) -> Selection:
    """The candidate with the highest accuracy under `maximise` among those that meet every requirement.

    require: {"clean": 0.85} or ["clean>=0.85"]; met when the lower end of the 95 % Wilson interval reaches it, or with
    `point` the estimate itself. Ties go to the higher clean accuracy, then to the earlier candidate. If none meets
    them, the one with the least total shortfall is returned with met = False.

    Raises RequestError for no candidates, or a key that was not evaluated.
    """
    if not tried:
        raise RequestError("select: no candidates")
    tried = tried if unconfirmed else [c for c in tried if c.confirmed] or tried
    key = str(maximise) if str(maximise) in ("clean", "union") else str(ThreatModel.parse(maximise))
    items = require.items() if isinstance(require, Mapping) else None
    wanted = (
        tuple(Requirement.parse(f"{name}>={least}") for name, least in items)
        if items is not None
        else tuple(map(Requirement.parse, require))
    )
    known = tried[0].evaluation.accuracy
    for name in [key, *(r.key for r in wanted)]:
        if name not in known:
            raise RequestError(
                f'select: "{name}" was not evaluated; expected one of {", ".join(known)}'
            )

    def rank(candidate: Candidate) -> tuple[float, float]:
        scores = candidate.evaluation.accuracy
        return scores[key].value, scores["clean"].value

    meeting = [
        c for c in tried if all(r.met_by(c.evaluation.accuracy, point=point) for r in wanted)
    ]
    if meeting:
        return Selection(max(meeting, key=rank), True, key, wanted, point)

    def shortfall(candidate: Candidate) -> float:
        scores = candidate.evaluation.accuracy
        return sum(
            max(r.least - (scores[r.key].value if point else scores[r.key].low), 0) for r in wanted
        )

    least = min(map(shortfall, tried))
    closest = [c for c in tried if shortfall(c) == least]
    return Selection(max(closest, key=rank), False, key, wanted, point)


def pareto_front(tried: Sequence[Candidate], keys: Sequence[str | ThreatModel]) -> list[Candidate]:
    """The candidates that no other one beats: at least as good under every key and better under one."""

    for key in keys:
        if tried and str(key) not in tried[0].evaluation.accuracy:
            known = ", ".join(tried[0].evaluation.accuracy)
            raise RequestError(f'pareto_front: "{key}" was not evaluated; expected one of {known}')

    def values(candidate: Candidate) -> tuple[float, ...]:
        return tuple(candidate.evaluation.accuracy[str(key)].value for key in keys)

    scores = [values(c) for c in tried]
    return [
        c
        for c, own in zip(tried, scores, strict=True)
        if not any(
            other != own and all(a >= b for a, b in zip(other, own, strict=True))
            for other in scores
        )
    ]


def worth_confirming(tried: Sequence[Candidate]) -> list[Candidate]:
    """Of a screened search, the soups to confirm: between them and those that are confirmed, every soup of the front has
    one that is as good under every measure, up to what n samples can tell: 0.5 / sqrt(n), half the reach of an interval.
    """
    keys = list(tried[0].evaluation.accuracy)
    noise = 0.5 / math.sqrt(tried[0].evaluation.accuracy["clean"].n)

    def covers(one: Candidate, other: Candidate) -> bool:
        a, b = one.evaluation.accuracy, other.evaluation.accuracy
        return all(a[key].value >= b[key].value - noise for key in keys)

    front = sorted(pareto_front(tried, keys), key=lambda c: -c.evaluation.accuracy["clean"].value)
    kept = [c for c in tried if c.confirmed]
    for candidate in front:
        if not any(covers(one, candidate) for one in kept):
            kept.append([c for c in front if covers(c, candidate)][-1])
    return [c for c in kept if not c.confirmed]

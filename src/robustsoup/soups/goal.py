"""What a selection maximises and requires."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.simultaneous import samples_that_can_show
from robustsoup.evaluation.verdicts import CLEAN_KEY, SHIFT_KEY, UNION_KEY, parse_measure
from robustsoup.threats import ThreatModel

AccuracyByMeasure = Mapping[str, Accuracy]
"""Accuracies by measure: "clean", "union", "shift" or a threat model as text."""

Requirements = Mapping[str | ThreatModel, float] | Sequence["str | Requirement"]
"""Requirements as callers write them: {"clean": 0.85} or ["clean>=0.85"]."""

UNATTACKED = (CLEAN_KEY, SHIFT_KEY)
"""Measures that need no attack, so they can be measured for all soups."""

KNEE = "knee"
"""Maximise clean and robust accuracy, each as a share of its range on the Pareto front."""


def list_measures(threats: Sequence[ThreatModel | str], *, shift: bool) -> list[str]:
    """Return the evaluated measures: "clean", each threat, "union" for several, and "shift"."""
    names = dict.fromkeys(str(t) for t in map(ThreatModel.parse, threats) if not t.is_clean)
    union = [UNION_KEY] if len(names) > 1 else []
    return [CLEAN_KEY, *names, *union, *([SHIFT_KEY] if shift else [])]


def default_measure(threats: Sequence[ThreatModel | str]) -> str:
    """Return what is maximised unless a goal says so: accuracy under the first threat."""
    return str(next(iter(threats), CLEAN_KEY))


@dataclass(frozen=True)
class Requirement:
    """Lower limit on one accuracy.

    Attributes:
        key: "clean", "union", "shift" or a threat model as text.
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
        wrong_form = f'require: got "{text}", expected a form such as "clean>=0.85" or "clean>=85%"'
        match = re.fullmatch(r"\s*(.+?)\s*>=\s*([0-9.eE+-]+)\s*(%?)\s*", str(text))
        if match is None:
            raise RequestError(wrong_form)
        key, number, percent = match.groups()
        try:
            threshold = float(number) / (100 if percent else 1)
        except ValueError:
            raise RequestError(wrong_form) from None
        hint = _suggest_threshold(key, float(number), percent=bool(percent))
        if hint or not 0 <= threshold <= 1:
            raise RequestError(
                f'require: got "{text}", expected a fraction in [0, 1] such as 0.85, or a '
                f"percentage such as 85%{hint}"
            )
        return cls(parse_measure(key), threshold)

    @classmethod
    def parse_all(cls, requirements: Requirements) -> tuple["Requirement", ...]:
        """Parse a mapping or a sequence of requirements, in order.

        Raises:
            RequestError: If one cannot be parsed, or two are about the same accuracy.
        """
        if isinstance(requirements, (str, Requirement)):
            requirements = [requirements]
        if isinstance(requirements, Mapping):
            requirements = [f"{key}>={value}" for key, value in requirements.items()]
        parsed = tuple(cls.parse(item) for item in requirements)
        for number, item in enumerate(parsed):
            for other in parsed[:number]:
                if item.key == other.key:
                    raise RequestError(
                        f'require: got "{other}" and "{item}", expected one requirement on '
                        f"{item.key}; keep the higher"
                    )
        return parsed

    @property
    def is_attacked(self) -> bool:
        """Whether the accuracy is one under attack."""
        return self.key not in UNATTACKED

    def __str__(self) -> str:
        """Return the requirement as `parse` reads it."""
        return f"{self.key}>={_spell_number(self.threshold)}"


def _spell_number(number: float) -> str:
    """Return all digits of a number, without an exponent, which a score cannot contain."""
    text = format(Decimal(repr(float(number))), "f")
    return text.removesuffix(".0")


def _suggest_threshold(key: str, number: float, *, percent: bool) -> str:
    """Return a hint for a fraction that is written as a percentage, or the reverse."""
    if percent and 0 < number < 1:
        return f'; did you mean "{key}>={number:g}"?'
    if not percent and 10 <= number <= 100:
        return f'; did you mean "{key}>={number:g}%"?'
    return ""


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
        require_measures("score", self.keys, scores)
        return sum(weight * scores[key].value for weight, key in self.terms)

    def __str__(self) -> str:
        """Return the score as `parse` reads it."""
        if len(self.terms) == 1:
            return self.terms[0][1]
        return " + ".join(f"{_spell_number(weight)} {key}" for weight, key in self.terms)


def _parse_score_term(text: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*([0-9.]*)\s*(.*?)\s*", text)
    if match is None:
        raise ValueError(text)
    weight, key = match.groups()
    return float(weight or 1), parse_measure(key)


@dataclass(frozen=True)
class Goal:
    """What a selection maximises, and its requirements.

    Attributes:
        maximise: A measure, a weighted sum of measures (see `Score`), or "knee"; None to choose
            nothing.
        require: Requirements that the choice must meet.
        point: Whether estimates, not lower bounds, are compared with the thresholds.
    """

    maximise: str | None = None
    require: tuple[Requirement, ...] = ()
    point: bool = False

    @classmethod
    def parse(
        cls,
        maximise: "str | ThreatModel | Score | None" = None,
        require: Requirements = (),
        *,
        point: bool = False,
    ) -> Self:
        """Parse what is maximised, and the requirements.

        Raises:
            RequestError: If one of them cannot be parsed.
        """
        target = None if maximise is None else parse_target(maximise)
        return cls(target, Requirement.parse_all(require), point)

    @property
    def attacked(self) -> tuple[Requirement, ...]:
        """The requirements on accuracies under attack."""
        return tuple(item for item in self.require if item.is_attacked)

    @property
    def requires_attacked(self) -> bool:
        """Whether a requirement is about an accuracy under attack."""
        return bool(self.attacked)

    @property
    def requires_unattacked(self) -> bool:
        """Whether a requirement is about an accuracy without an attack."""
        return any(not item.is_attacked for item in self.require)

    @property
    def measures(self) -> list[str]:
        """The measures that the goal names."""
        named = self.maximise not in (None, KNEE)
        maximised = Score.parse(str(self.maximise)).keys if named else []
        return list(dict.fromkeys([*maximised, *(item.key for item in self.require)]))


def parse_target(text: "str | ThreatModel | Score") -> str:
    """Return the canonical spelling of what a goal maximises: a measure, a score or "knee".

    Raises:
        RequestError: For any other text.
    """
    if str(text).strip() == KNEE:
        return KNEE
    try:
        return str(Score.parse(text))
    except RequestError:
        raise RequestError(
            f'maximise: got "{text}", expected clean, union, shift, a threat model, a sum such as '
            '"0.3 clean + 0.7 Linf 8/255", or knee'
        ) from None


def require_measures(caller: str, keys: Sequence[str], scores: Collection[str]) -> None:
    """Raise RequestError if a measure was not evaluated."""
    for key in keys:
        if key not in scores:
            raise RequestError(
                f'{caller}: "{key}" was not evaluated; expected one of {", ".join(scores)}'
            )


def check_goal(
    goal: Goal, measures: Sequence[str], *, samples: int, candidates: int, confirms: bool = False
) -> None:
    """Check before any work that a goal can be decided.

    Args:
        goal: The goal.
        measures: The measures that will be evaluated.
        samples: Number of samples that select, those of the confirm part among them.
        candidates: Number of candidates.
        confirms: Whether finalists are confirmed: requirements under attack are then tested on a
            third of the samples, each finalist alone.

    Raises:
        RequestError: A measure will not be evaluated, or so few samples cannot show a requirement
            even if all of them are hits.
    """
    require_measures("select", goal.measures, measures)
    if goal.point:
        return
    apart = len(goal.attacked) if confirms else 0
    for requirement in goal.require:
        alone = confirms and requirement.is_attacked
        statements = 1 if alone else candidates * (len(goal.require) - apart)
        needed = samples_that_can_show(requirement.threshold, statements)
        if needed is None:
            raise RequestError(
                f'require: no number of samples can show "{requirement}"; lower the threshold, or '
                "compare the estimate (--point)"
            )
        if samples < (needed := 3 * needed if alone else needed):
            whom = "a finalist on a third of them" if alone else f"{candidates} candidates"
            raise RequestError(
                f'require: {samples} samples cannot show "{requirement}" for {whom}, '
                f"even if all are correct; evaluate {needed:,} or more, lower the "
                "threshold, or compare the estimate (--point)"
            )

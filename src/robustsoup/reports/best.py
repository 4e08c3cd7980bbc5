"""The rule for "best" as the report states it, and what its slider needs to apply it.

`robustsoup.soups.selection` holds the rule; the report never chooses, but shows what the rule would
take at other thresholds.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from robustsoup.errors import RequestError
from robustsoup.evaluation.simultaneous import ERROR_RATE, wilson_lower
from robustsoup.reports.measures import CLEAN, UNION, list_compared_measures
from robustsoup.runs.results import ResultRow, Results
from robustsoup.soups.answer import Answer
from robustsoup.soups.goal import KNEE, Score

Terms = Sequence[tuple[float, str]]
"""Pairs (weight, measure) of a weighted sum of accuracies."""

_REQUIREMENT = re.compile(r"\s*(.+?)\s*>=\s*([0-9.]+)\s*")


def parse_requirements(selection: Answer | None) -> dict[str, float]:
    """Parse ["clean>=0.85"] into {"clean": 0.85}; other texts are ignored."""
    texts = selection.require if selection else ()
    matches = [_REQUIREMENT.fullmatch(text) for text in texts]
    return {match[1]: float(match[2]) for match in matches if match}


@dataclass(frozen=True)
class BestRule:
    """How a soup is chosen.

    Attributes:
        select_on: Split whose accuracies choose.
        maximise: What is maximised, as text.
        goals: The weighted sum of each text that can be maximised; of the knee the measures, as its
            weights depend on the soups that compete.
        require: Thresholds of the run by measure.
        point: Whether estimates, not lower bounds, are compared with the thresholds.
        chosen: The row that the run chose, or None.
        met: Whether it was shown to meet the requirements.
        soups: Number of soups that count.
        critical: Quantile of the bounds of measures that the run required; None if there is none.
    """

    select_on: str
    maximise: str
    goals: Mapping[str, Terms]
    require: Mapping[str, float]
    point: bool
    chosen: str | None
    met: bool
    soups: int
    critical: float | None

    @classmethod
    def of(cls, results: Results) -> "BestRule":
        """Return the rule of a run; without a selection, its first threat is maximised."""
        answer, split = results.selection, results.protocol.select_on
        measures = [CLEAN, *list_compared_measures(results)]
        soups = [row for row in results.rows if row.soup is not None and row.scores(split)]
        maximise = answer.maximise if answer else measures[min(1, len(measures) - 1)]
        goals: dict[str, Terms] = {measure: ((1.0, measure),) for measure in measures}
        if maximise not in goals:
            goals[maximise] = _parse_goal(maximise, measures)
        return cls(
            split,
            maximise,
            goals,
            parse_requirements(answer),
            point=answer is not None and answer.point,
            chosen=answer.chosen if answer else None,
            met=answer is None or answer.met,
            soups=len(soups),
            critical=answer.guarantee.critical if answer else None,
        )

    def is_candidate(self, row: ResultRow) -> bool:
        """Return whether the row can be chosen: a soup that was measured on the split."""
        return row.soup is not None and bool(row.scores(self.select_on))

    def bounds(self, row: ResultRow) -> dict[str, float]:
        """Return what is compared with a threshold, by measure.

        Lower bounds are Wilson's, one-sided, and hold for all soups at once: with the quantile of
        the run for what it required, with Bonferroni's for other measures.
        """
        scores = row.scores(self.select_on) or {}
        if self.point:
            return {measure: accuracy.value for measure, accuracy in scores.items()}
        bonferroni = NormalDist().inv_cdf(1 - ERROR_RATE / max(1, self.soups))
        bounds: dict[str, float] = {}
        for measure, accuracy in scores.items():
            hits, n = accuracy.effective_counts
            quantile = (measure in self.require and self.critical) or bonferroni
            bounds[measure] = float(wilson_lower(np.array([hits]), n, quantile)[0])
        return bounds

    @property
    def statement(self) -> str:
        """The rule in a few sentences."""
        split = self.select_on
        compared = (
            f"estimate on {split}, which guarantees nothing,"
            if self.point
            else f"one-sided 95 % lower bound on {split}, simultaneous over all {self.soups} soups,"
        )
        return (
            f"The best soup has the highest estimate of what is maximised on {split} among the "
            f"soups whose {compared} reaches every required threshold. Ties go to the higher clean "
            "accuracy, then to the earlier soup; soups whose full attack did not finish compete "
            "only if there are no others; if no soup meets the requirements, the one with the "
            "least total shortfall is taken. The run's own choice may use a sharper test (stepping "
            "down, or samples kept aside) than the slider."
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "maximise": self.maximise,
            "goals": {text: list(map(list, terms)) for text, terms in self.goals.items()},
            "require": dict(self.require),
            "chosen": self.chosen,
            "met": self.met,
        }


def _parse_goal(text: str, measures: Sequence[str]) -> Terms:
    """Return the terms of a weighted sum, or of the knee; of the first measure for other texts."""
    if text == KNEE:
        robust = UNION if UNION in measures else measures[min(1, len(measures) - 1)]
        return [(1.0, key) for key in dict.fromkeys((CLEAN, robust))]
    try:
        return Score.parse(text).terms
    except RequestError:
        return ((1.0, measures[0]),)

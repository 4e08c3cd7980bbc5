"""A stored run, and which of its accuracies figures and the report show."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.runs.results import EvaluationProtocol, ResultRow, Results
from robustsoup.soups.goal import Goal

CLEAN, UNION, SHIFT = "clean", "union", "shift"
LAYERWISE_ROLES = ("learned", "dial")
"""Roles of soups whose coefficients are in a file, one row for each layer."""


@dataclass(frozen=True)
class StoredRun:
    """The results of a run and the folder that holds its files."""

    results: Results
    folder: Path


@dataclass(frozen=True)
class PlotScale:
    """The split and the threat that an accuracy plot shows; coordinates are in percent."""

    split: str
    measure: str

    def coordinates(self, rows: Sequence[ResultRow]) -> np.ndarray:
        """Return (rows, 2): clean and robust accuracy."""
        pairs = [
            [require_accuracy(row, self.split, name).value for name in (CLEAN, self.measure)]
            for row in rows
        ]
        return 100 * np.array(pairs, dtype=float).reshape(-1, 2)

    def interval_lengths(self, rows: Sequence[ResultRow]) -> tuple[np.ndarray, np.ndarray]:
        """Return (2, rows) twice: distances from the values to the ends of their intervals.

        The first array is for clean, the second for robust accuracy.
        """
        lengths = []
        for measure in (CLEAN, self.measure):
            accuracies = [require_accuracy(row, self.split, measure) for row in rows]
            below = [accuracy.value - accuracy.low for accuracy in accuracies]
            above = [accuracy.high - accuracy.value for accuracy in accuracies]
            lengths.append(100 * np.maximum(np.array([below, above], dtype=float), 0))
        return lengths[0], lengths[1]


def require_accuracy(row: ResultRow, split: str, measure: str) -> Accuracy:
    """Return a measured accuracy of a row from `rows_with_measures`."""
    accuracy = row.accuracy(split, measure)
    if accuracy is None:
        raise LookupError(f"{row.name}: {measure} was not measured on {split}")
    return accuracy


def list_robust_measures(results: Results) -> list[str]:
    """List the threats of the protocol, then "union" if a row has it."""
    protocol = results.protocol
    threats = [threat for threat in protocol.threats if threat != CLEAN]
    has_union = any(
        row.accuracy(split, UNION)
        for row in results.rows
        for split in (protocol.select_on, protocol.report_on)
    )
    return [*threats, UNION] if has_union else threats


def list_compared_measures(results: Results) -> list[str]:
    """List the measures to set against clean accuracy: robust ones, then "shift" if measured."""
    has_shift = any(row.accuracy(split, SHIFT) for row in results.rows for split in ("val", "test"))
    return [*list_robust_measures(results), *([SHIFT] if has_shift else [])]


def choose_split(rows: Iterable[ResultRow], protocol: EvaluationProtocol) -> str:
    """Choose the split to show, so that one figure never mixes two.

    Returns report_on if all measured rows were measured there, else select_on.
    """
    select_on, report_on = protocol.select_on, protocol.report_on
    measured = [row for row in rows if row.scores(select_on) or row.scores(report_on)]
    return report_on if all(row.scores(report_on) for row in measured) else select_on


def rows_with_measures(rows: Iterable[ResultRow], split: str, *measures: str) -> list[ResultRow]:
    """Return the rows that have all of `measures` on `split`."""
    return [row for row in rows if all(row.accuracy(split, measure) for measure in measures)]


def group_by_section(rows: Iterable[ResultRow], *roles: str) -> dict[str, list[ResultRow]]:
    """Group the rows of some roles by their section of the recipe, in the order of the file."""
    sections: dict[str, list[ResultRow]] = {}
    for row in rows:
        if row.role in roles:
            sections.setdefault(row.soup or row.role, []).append(row)
    return sections


def find_two_best(
    rows: Iterable[ResultRow], measure: str, protocol: EvaluationProtocol
) -> tuple[ResultRow, ResultRow] | None:
    """Find the row with the best clean accuracy and the one with the best `measure`.

    Both are chosen on select_on if all rows were measured there, else on report_on. Choosing on
    select_on keeps the accuracies shown on report_on from being maxima of noise (unless both are
    one split; see `list_caveats`). A row whose robust accuracies are estimates or bounds is the
    best at `measure` only if all are. Ties go to the row that is better at the other measure, then
    to the first row.

    Returns:
        The two rows, which are the black squares of Fig. 5 in Huang 2023; None without rows.
    """
    rows = list(rows)
    select_on, report_on = protocol.select_on, protocol.report_on
    split = select_on if rows_with_measures(rows, select_on, CLEAN, measure) == rows else report_on
    rows = rows_with_measures(rows, split, CLEAN, measure)
    if not rows:
        return None

    def best_by(*measures: str) -> Callable[[ResultRow], list[float]]:
        return lambda row: [require_accuracy(row, split, name).value for name in measures]

    exact = prefer_exact(rows, split, measure, protocol)
    return max(rows, key=best_by(CLEAN, measure)), max(exact, key=best_by(measure, CLEAN))


def is_exact(row: ResultRow, split: str, measure: str, protocol: EvaluationProtocol) -> bool:
    """Return whether an accuracy was measured: it is no estimate and no upper bound."""
    return not row.screened or split != protocol.select_on or measure in (CLEAN, SHIFT)


def prefer_exact(
    rows: Sequence[ResultRow], split: str, measure: str, protocol: EvaluationProtocol
) -> list[ResultRow]:
    """Return the rows whose accuracy was measured; all of them if none was."""
    return [row for row in rows if is_exact(row, split, measure, protocol)] or list(rows)


def list_caveats(results: Results) -> list[str]:
    """List what biases the accuracies of a run upwards; all figures and the report show it."""
    protocol = results.protocol
    caveats = []
    if protocol.select_on == protocol.report_on:
        caveats.append(f"the paper's protocol: selected on {protocol.report_on}")
    if _selects_by_shift(results):
        caveats.append("selected by corrupted copies of half of the test images")
    if results.leakage and results.leakage.status == "violated":
        caveats.append("selected on samples that ingredients were trained on")
    return caveats


def _selects_by_shift(results: Results) -> bool:
    selection = results.selection
    if selection is None or results.protocol.select_on == results.protocol.report_on:
        return False
    return SHIFT in Goal.parse(selection.maximise, selection.require).measures


def count_samples(rows: Iterable[ResultRow], split: str) -> int:
    """Return the largest number of samples that a row was measured on."""
    return max(
        (accuracy.n for row in rows for accuracy in (row.scores(split) or {}).values()), default=0
    )

"""Curves of learned soups: which rows form a curve, in which order, and their labels."""

from collections.abc import Sequence
from dataclasses import dataclass

from robustsoup.reports.measures import CLEAN
from robustsoup.runs.results import ResultRow
from robustsoup.threats import ThreatModel
from robustsoup.training.objectives import clean_weight

CURVE_COLOURS = ("#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#8a6d00", "#7f3c8d")


@dataclass(frozen=True)
class LearnedCurve:
    """Learned soups that differ in one setting, in its order.

    Attributes:
        name: Name that distinguishes the curve in its section; "" for a single curve.
        labels: The value of the setting for each row.
        rows: The soups.
    """

    name: str
    labels: tuple[str, ...]
    rows: tuple[ResultRow, ...]


def group_into_curves(rows: Sequence[ResultRow]) -> list[LearnedCurve]:
    """Group the learned rows of one section into curves.

    Positions on a dial form one curve for each threat, in order of the position. Rows that differ
    in the objective alone form one curve in order of the clean weight, and one for each objective
    without a clean weight. Otherwise each objective and norm is one curve in order of eps, where
    "clean" is eps 0 of the first norm.
    """
    dial_rows = [row for row in rows if row.at is not None]
    return _dial_curves(dial_rows) + _objective_curves([row for row in rows if row.at is None])


def _dial_curves(rows: Sequence[ResultRow]) -> list[LearnedCurve]:
    positions = sorted(((row.at or 0.0, row) for row in rows), key=lambda item: item[0])
    groups: dict[str, list[ResultRow]] = {}
    for _, row in positions:
        groups.setdefault(row.threat or "", []).append(row)
    ordered = sorted(groups.items(), key=lambda group: rows.index(group[1][0]))
    return [
        LearnedCurve(
            "t" if len(groups) == 1 else f"t, {threat}",
            tuple(f"{row.at:g}" for row in group),
            tuple(group),
        )
        for threat, group in ordered
    ]


def _objective_curves(rows: Sequence[ResultRow]) -> list[LearnedCurve]:
    if len(rows) > 1 and len({ThreatModel.parse(row.threat or CLEAN) for row in rows}) == 1:
        return _curves_by_weight(rows)
    return _curves_by_eps(rows)


def _curves_by_weight(rows: Sequence[ResultRow]) -> list[LearnedCurve]:
    weighted: list[tuple[float, ResultRow]] = []
    curves: list[LearnedCurve] = []
    for row in rows:
        objective = _normalise_objective(row)
        weight = clean_weight(objective)
        if weight is None:
            curves.append(LearnedCurve(objective, (objective,), (row,)))
        else:
            weighted.append((weight, row))
    if weighted:
        weighted.sort(key=lambda item: item[0])
        labels = tuple(f"{weight:g}" for weight, _ in weighted)
        name = "mixed" if curves else ""
        curves.insert(0, LearnedCurve(name, labels, tuple(row for _, row in weighted)))
    return curves


def _curves_by_eps(rows: Sequence[ResultRow]) -> list[LearnedCurve]:
    parsed = [(ThreatModel.parse(row.threat or CLEAN), row) for row in rows]
    norms = list(dict.fromkeys(threat.norm for threat, _ in parsed if not threat.is_clean))
    norms = norms or ["Linf"]
    groups: dict[tuple[str, str], list[tuple[float, str, ResultRow]]] = {}
    for threat, row in parsed:
        norm = norms[0] if threat.is_clean else threat.norm
        label = str(threat).removeprefix(f"{norm} ")
        group = groups.setdefault((norm, _normalise_objective(row)), [])
        group.append((threat.eps, label, row))
    objectives = {objective for _, objective in groups}
    curves = []
    for (norm, objective), group in groups.items():
        group.sort(key=lambda item: item[0])
        name = [norm] * (len(norms) > 1) + [objective] * (len(objectives) > 1)
        labels = tuple(label for _, label, _ in group)
        curves.append(LearnedCurve(", ".join(name), labels, tuple(row for *_, row in group)))
    return curves


def _normalise_objective(row: ResultRow) -> str:
    """Return one spelling for equal objectives; a function that the text names is not imported."""
    text = row.objective or "ce"
    weight = clean_weight(text)
    if weight is None:
        return text
    return f"mixed {weight:g}" if weight else "ce"

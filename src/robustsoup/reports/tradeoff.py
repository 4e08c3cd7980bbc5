"""Clean against robust accuracy (the paper's Fig. 5): what each soup gains and what it gives up."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from robustsoup.reports.results import (
    BY_LAYER,
    CLEAN,
    Points,
    Row,
    robust_measures,
    sections,
    shown_split,
    two_best,
    with_measures,
)
from robustsoup.reports.style import (
    FAINT,
    INK,
    MUTED,
    Plot,
    attack_line,
    footer,
    new_figure,
    numbered,
    place_labels,
    plain,
)
from robustsoup.threats import ThreatModel
from robustsoup.training.objectives import clean_weight

CURVES = ("#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#8a6d00", "#7f3c8d")
INGREDIENT, UNIFORM, GREEDY = "#0072B2", "#009E73", "#000000"
Label = tuple[float, float, str, str]


def draw_tradeoff(results: dict[str, Any], folder: Path) -> tuple[list[Plot], str]:
    """One figure for each threat; or none, and the reason in one line. folder is not read."""
    plots = []
    for measure in robust_measures(results):
        split = shown_split(results["rows"], results["protocol"])
        rows = with_measures(results["rows"], split, CLEAN, measure)
        if rows:
            plots.append(_plot(results, rows, split, measure, numbered("tradeoff", len(plots))))
    return plots, "" if plots else "no row has both a clean and a robust accuracy"


def curves(rows: list[Row]) -> list[tuple[str, list[tuple[str, Row]]]]:
    """Learned rows of one section as [(what tells the curve apart, [(label, row), ...])], each in order of its strength.

    Rows of a dial, those with "at", are one curve for each threat, ordered by it. Rows that differ in the objective alone
    are one curve ordered by the clean weight, and one for each objective that has none; otherwise each objective and norm
    is one curve, ordered by eps, "clean" being eps 0 of the first norm.
    """
    turned = [row for row in rows if row.get("at") is not None]
    return _dial_curves(turned) + _learned_curves([row for row in rows if row.get("at") is None])


def _dial_curves(rows: list[Row]) -> list[tuple[str, list[tuple[str, Row]]]]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["at"]):
        groups.setdefault(row.get("threat") or "", []).append(row)
    return [
        ("t" if len(groups) == 1 else f"t, {threat}", [(f"{row['at']:g}", row) for row in group])
        for threat, group in sorted(groups.items(), key=lambda item: rows.index(item[1][0]))
    ]


def _learned_curves(rows: list[Row]) -> list[tuple[str, list[tuple[str, Row]]]]:
    parsed = [
        (
            ThreatModel.parse(row.get("threat") or CLEAN),
            _plain_objective(row.get("objective") or "ce"),
            row,
        )
        for row in rows
    ]
    if len({threat for threat, _, _ in parsed}) == 1 and len(parsed) > 1:
        weighted = sorted(
            (
                (weight, row)
                for _, objective, row in parsed
                if (weight := clean_weight(objective)) is not None
            ),
            key=lambda item: item[0],
        )
        others = [
            (objective, row) for _, objective, row in parsed if clean_weight(objective) is None
        ]
        alone = "" if not others else "mixed"
        found = [(alone, [(f"{weight:g}", row) for weight, row in weighted])] if weighted else []
        return found + [(objective, [(objective, row)]) for objective, row in others]
    norms = list(dict.fromkeys(threat.norm for threat, _, _ in parsed if not threat.is_clean)) or [
        "Linf"
    ]
    groups: dict[tuple[str, str], list[tuple[float, str, Row]]] = {}
    for threat, objective, row in parsed:
        norm = norms[0] if threat.is_clean else threat.norm
        label = str(threat).removeprefix(f"{norm} ")
        groups.setdefault((norm, objective), []).append((threat.eps, label, row))
    objectives = {objective for _, objective in groups}
    found = []
    for (norm, objective), group in groups.items():
        apart = [norm] * (len(norms) > 1) + [objective] * (len(objectives) > 1)
        found.append(
            (
                ", ".join(apart),
                [(label, row) for _, label, row in sorted(group, key=lambda item: item[0])],
            )
        )
    return found


def _plain_objective(text: str) -> str:
    """One spelling for one objective; a function that it may name is not looked for."""
    weight = clean_weight(text)
    return text if weight is None else f"mixed {weight:g}" if weight else "ce"


def requirements(results: dict[str, Any]) -> dict[str, float]:
    """{"clean": 0.85} from the selection's ["clean>=0.85"]."""
    texts = (results.get("selection") or {}).get("require") or []
    matches = [re.fullmatch(r"\s*(.+?)\s*>=\s*([0-9.]+)\s*", str(text)) for text in texts]
    return {match[1]: float(match[2]) for match in matches if match}


def _plot(results: dict[str, Any], rows: list[Row], split: str, measure: str, stem: str) -> Plot:
    figure = new_figure(7.4, 4.7)
    axes = figure.add_subplot()
    points = Points(split, measure)
    _scatter_soups(axes, rows, points)
    _square_best(axes, rows, results["protocol"], points)
    labels = _draw_learned(axes, rows, points) + _draw_ingredients(axes, rows, points)
    _mark_selection(axes, results, rows, points)
    axes.margins(0.09)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"clean accuracy on {plain(split)} (%)")
    axes.set_ylabel(f"robust accuracy, {plain(measure)} (%)")
    axes.set_title(
        f"{plain(results['name'])}: clean against robust accuracy", loc="left", weight="bold"
    )
    figure.legend(loc="outside right upper", handlelength=1.8, labelspacing=0.8)
    measured = attack_line(results["protocol"], split, rows)
    footer(figure, f"{measured} · bars: 95 % Wilson intervals", results)
    axes.autoscale_view()
    axes.autoscale(False)
    place_labels(axes, labels, _crowd(rows, points))
    caption = (
        f"Clean accuracy against robust accuracy at {measure} on {split}, for {len(rows)} networks."
    )
    return Plot(stem, figure, caption)


def _crowd(rows: list[Row], points: Points) -> np.ndarray:
    """What labels should keep clear of: every row, the intervals, and the lines between neighbours on a curve."""
    parts = [points.of(rows)]
    barred = [row for row in rows if row["role"] in ("ingredient", "pretrained", *BY_LAYER)]
    if barred:
        xy, bars = points.of(barred), points.bars(barred)
        for axis, key in enumerate(("xerr", "yerr")):
            for share in np.linspace(0.2, 1, 5):
                for sign, length in zip((-1, 1), bars[key], strict=True):
                    parts.append(xy + np.eye(2)[axis] * sign * share * length[:, None])
    for section in sections(rows, *BY_LAYER).values():
        for _, curve in curves(section):
            xy = points.of([row for _, row in curve])
            parts += [xy[:-1] + share * (xy[1:] - xy[:-1]) for share in np.linspace(0, 1, 20)] * 2
    return np.concatenate(parts)


def _scatter_soups(axes: Axes, rows: list[Row], points: Points) -> None:
    looks = {
        "grid": {"color": "#a3a8ae"},
        "line": {"facecolors": "none", "edgecolors": "#8a9097", "linewidths": 0.9},
    }
    for role, look in looks.items():
        found = [row for row in rows if row["role"] == role]
        if found:
            axes.scatter(
                *points.of(found).T, s=16, zorder=2, label=f"{role} ({len(found)} soups)", **look
            )
    for role, marker, size, colour in (("uniform", "D", 64, UNIFORM), ("greedy", "P", 90, GREEDY)):
        found = [row for row in rows if row["role"] == role]
        if found:
            axes.scatter(
                *points.of(found).T,
                s=size,
                marker=marker,
                color=colour,
                edgecolors="white",
                linewidths=0.8,
                zorder=5,
                label=f"{role} soup",
            )


def _square_best(axes: Axes, rows: list[Row], protocol: dict[str, Any], points: Points) -> None:
    label = "best clean and best robust\nof the grid"
    for grid in sections(rows, "grid").values():
        best = two_best(
            grid, points.measure, select_on=protocol["select_on"], report_on=protocol["report_on"]
        )
        if best:
            xy = points.of(list(best))
            axes.plot(
                *xy.T,
                "--",
                marker="s",
                color="black",
                markersize=9,
                linewidth=1,
                zorder=3,
                label=label,
            )
            label = None


def _draw_learned(axes: Axes, rows: list[Row], points: Points) -> list[Label]:
    labels, number = [], 0
    for name, section in sections(rows, *BY_LAYER).items():
        for apart, curve in curves(section):
            colour = CURVES[number % len(CURVES)]
            number += 1
            members = [row for _, row in curve]
            xy = points.of(members)
            axes.errorbar(
                *xy.T,
                **points.bars(members),
                fmt="none",
                ecolor=colour,
                alpha=0.4,
                elinewidth=0.7,
                zorder=3,
            )
            text = plain(name, 16) + (f" ({plain(apart, 20)})" if apart else "")
            axes.plot(
                *xy.T,
                "-o",
                color=colour,
                markersize=6,
                markeredgecolor="white",
                zorder=6,
                label=text,
            )
            labels += [
                (x, y, plain(label), colour) for (label, _), (x, y) in zip(curve, xy, strict=True)
            ]
    return labels


def _draw_ingredients(axes: Axes, rows: list[Row], points: Points) -> list[Label]:
    labels = []
    for role, marker, size, colour in (
        ("ingredient", "^", 62, INGREDIENT),
        ("pretrained", "*", 120, INK),
    ):
        found = [row for row in rows if row["role"] == role]
        if not found:
            continue
        xy = points.of(found)
        axes.errorbar(
            *xy.T,
            **points.bars(found),
            fmt="none",
            ecolor=colour,
            alpha=0.4,
            elinewidth=0.7,
            zorder=3,
        )
        axes.scatter(
            *xy.T,
            s=size,
            marker=marker,
            color=colour,
            edgecolors="white",
            linewidths=0.8,
            zorder=5,
            label=role,
        )
        labels += [
            (x, y, plain(row["name"], 20), colour) for row, (x, y) in zip(found, xy, strict=True)
        ]
    return labels


def _mark_selection(axes: Axes, results: dict[str, Any], rows: list[Row], points: Points) -> None:
    selection = results.get("selection") or {}
    wanted = requirements(results)
    line = {"color": MUTED, "linewidth": 1, "linestyle": ":", "zorder": 1}
    if CLEAN in wanted:
        axes.axvline(
            100 * wanted[CLEAN], label=f"required: clean ≥ {100 * wanted[CLEAN]:g} %", **line
        )
    if points.measure in wanted:
        share = 100 * wanted[points.measure]
        axes.axhline(share, label=f"required: {plain(points.measure)} ≥ {share:g} %", **line)
    chosen = [row for row in rows if row["name"] == selection.get("chosen")]
    if chosen:
        axes.plot(
            *points.of(chosen[:1]).T,
            "o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor="#B00020",
            markeredgewidth=1.6,
            zorder=7,
            label=f"selected: {plain(chosen[0]['name'], 22)}",
        )

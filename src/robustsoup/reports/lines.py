"""From one network to another (wise-ft, the paper's Fig. 4): clean against robust accuracy along the line between them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from robustsoup.reports.results import (
    CLEAN,
    Points,
    Row,
    robust_measures,
    sections,
    shown_split,
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
from robustsoup.reports.tables import Table

COLUMNS = 4
LEAST = 3  # points: fewer are no curve
LINE, END = "#0072B2", "#D55E00"
Lines = dict[str, list[Row]]


def draw_lines(results: dict[str, Any], folder: Path) -> tuple[list[Plot], str]:
    """One figure for each threat, with a panel for each line of soups of two networks. folder is not read.

    Also the reason, in one line, if there is none or a section had to be left out.
    """
    plots, reasons = [], []
    split = shown_split(results["rows"], results["protocol"])
    for measure in robust_measures(results):
        found: Lines = {}
        for section, rows in sections(results["rows"], "line").items():
            rows = _along(with_measures(rows, split, CLEAN, measure))
            if rows:
                found[section] = rows
            else:
                reasons.append(
                    f"{section}: needs both ends and a soup between them, measured on {split}"
                )
        if found:
            plots.append(
                _plot(results, found, Points(split, measure), numbered("lines", len(plots)))
            )
    return plots, "; ".join(dict.fromkeys(reasons)) or (
        "" if plots else "no line of soups of two networks was measured"
    )


def above_line(ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(k,): robust accuracy less that of the straight line between two ends at the same clean accuracy.

    ends: (2, 2), points: (k, 2), each (clean, robust). NaN for a point whose clean accuracy is not between those of the
    ends; for all of them where the ends have the same.
    """
    (clean_0, robust_0), (clean_1, robust_1) = ends
    if clean_0 == clean_1:
        return np.full(len(points), np.nan)
    share = (points[:, 0] - clean_0) / (clean_1 - clean_0)
    gaps = points[:, 1] - (robust_0 + share * (robust_1 - robust_0))
    return np.where((share >= 0) & (share <= 1), gaps, np.nan)


def gap_line(ends: np.ndarray, points: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """The cells of a table that say where points lie farthest above the line between two ends."""
    gaps = above_line(ends, points)
    between = np.isfinite(gaps)
    best = int(np.nanargmax(gaps)) if between.any() else None
    return {
        "largest gap": None if best is None else f"{gaps[best]:+.1f}",
        "at": None if best is None else labels[best],
        "above the line": f"{int((gaps[between] > 0).sum())} of {int(between.sum())}",
        "not comparable": int((~between).sum()),
    }


GAPS = (
    "largest gap: robust accuracy less that of the line at the same clean accuracy, in points, by the estimates alone (no "
    "interval); not comparable: soups whose clean accuracy is not between those of the line's ends"
)


def _along(rows: list[Row]) -> list[Row]:
    """The rows in order of the second network's weight; none unless both ends and a soup between them are there."""
    rows = [
        row
        for row in rows
        if len(row.get("ingredients") or []) == len(row.get("coefficients") or []) == 2
    ]
    rows = sorted(rows, key=_weight)
    whole = (
        len(rows) >= LEAST and abs(_weight(rows[0])) < 1e-9 and abs(_weight(rows[-1]) - 1) < 1e-9
    )
    return rows if whole else []


def _weight(row: Row) -> float:
    return row["coefficients"][1]


def _plot(results: dict[str, Any], found: Lines, points: Points, stem: str) -> Plot:
    columns = min(COLUMNS, len(found)) if len(found) != COLUMNS + 1 else 3
    lines = math.ceil(len(found) / columns)
    wide = {1: 4.6, 2: 3.8}.get(columns, 3.1)
    figure = new_figure(max(wide * columns, 5.4), 0.85 * wide * lines + 0.75)
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    panels = []
    for number, (section, rows) in enumerate(found.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        _panel(axes, rows, points)
        axes.set_title(plain(section, 34), loc="left")
        if number % columns == 0:
            axes.set_ylabel(f"robust accuracy, {plain(points.measure)} (%)")
        if number + columns >= len(found):
            axes.set_xlabel(f"clean accuracy on {plain(points.split)} (%)")
        panels.append((axes, rows))
    title = f"{plain(results['name'])}: from one network to another"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    every = [row for rows in found.values() for row in rows]
    measured = attack_line(results["protocol"], points.split, every)
    footer(
        figure,
        f"numbers: the weight of the second network · dashed: straight line between the ends · {measured} · bars: 95 % "
        "Wilson intervals",
        results,
    )
    for axes, rows in panels:
        axes.autoscale_view()
        axes.autoscale(False)
        _name(axes, rows, points)
    caption = (
        f"Clean accuracy against robust accuracy at {points.measure} on {points.split}, along {len(found)} line(s) "
        "between two networks."
    )
    return Plot(stem, figure, caption, (_table(found, points),))


def _panel(axes: Axes, rows: list[Row], points: Points) -> None:
    xy = points.of(rows)
    axes.errorbar(
        *xy.T, **points.bars(rows), fmt="none", ecolor=LINE, alpha=0.28, elinewidth=0.7, zorder=2
    )
    axes.plot(*xy[[0, -1]].T, "--", color=MUTED, linewidth=1, zorder=3)
    axes.plot(
        *xy.T, "-o", color=LINE, linewidth=1.3, markersize=4.5, markeredgecolor="white", zorder=5
    )
    axes.plot(*xy[[0, -1]].T, "s", color=END, markersize=6, markeredgecolor="white", zorder=6)
    axes.margins(0.1)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _name(axes: Axes, rows: list[Row], points: Points) -> None:
    xy = points.of(rows)
    first, second = (plain(name, 20) for name in rows[0]["ingredients"])
    texts = [f"0 ({first})", *[f"{_weight(row):.3g}" for row in rows[1:-1]], f"1 ({second})"]
    labels = [(*point, text, INK) for point, text in zip(xy, texts, strict=True)]
    order = [
        *range(1, len(labels) - 1),
        0,
        len(labels) - 1,
    ]  # the long ones have room outside the line
    shares = np.linspace(0, 1, 20)[:, None]
    pieces = [xy[i] + shares * (xy[i + 1] - xy[i]) for i in range(len(xy) - 1)]
    crowd = np.concatenate([np.repeat(xy, 5, axis=0), *pieces, xy[0] + shares * (xy[-1] - xy[0])])
    place_labels(axes, [labels[i] for i in order], crowd, size=7.5)


def _table(found: Lines, points: Points) -> Table:
    lines = []
    for section, rows in found.items():
        xy = points.of(rows)
        weights = [f"{_weight(row):.3g}" for row in rows[1:-1]]
        first, second = rows[0]["ingredients"]
        lines.append(
            {"line": section, "from": first, "to": second}
            | gap_line(xy[[0, -1]], xy[1:-1], weights)
        )
    return Table(f"Above the straight line, {points.measure}", GAPS, lines)

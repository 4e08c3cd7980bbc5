"""The curves of learned soups against the two best soups of a grid (the paper's Figs. 5 and 6), on axes that are shared."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustsoup.reports.lines import GAPS, gap_line
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
    Plot,
    attack_line,
    footer,
    new_figure,
    numbered,
    place_labels,
    plain,
)
from robustsoup.reports.tables import Table
from robustsoup.reports.tradeoff import CURVES, INGREDIENT, curves

COLUMNS = 3
LOOKS = (("-", "o"), ("-.", "D"), (":", "v"), ("-", "P"))
GRID = "best clean and best robust soup of the grid"


def draw_curves(results: dict[str, Any], folder: Path) -> tuple[list[Plot], str]:
    """One figure for each threat, with a panel for each section of two or more learned or dialled soups.

    Also the reason, in one line, if there is none or a section had to be left out. folder is not read.
    """
    plots, single = [], []
    split = shown_split(results["rows"], results["protocol"])
    for measure in robust_measures(results):
        measured = with_measures(results["rows"], split, CLEAN, measure)
        found = sections(measured, *BY_LAYER)
        shown = {
            section: rows
            for section, rows in found.items()
            if any(len(curve) > 1 for _, curve in curves(rows))
        }
        single += [section for section in found if section not in shown]
        if shown:
            panels = [
                _Panel.of(section, rows, measured, results["protocol"], measure)
                for section, rows in shown.items()
            ]
            plots.append(
                _plot(results, panels, Points(split, measure), numbered("curves", len(plots)))
            )
    if not plots:
        return [], "no section has two learned soups, which a curve needs"
    few = ", ".join(dict.fromkeys(single))
    return plots, f"{few}: one soup is not a curve" if few else ""


@dataclass(frozen=True)
class _Panel:
    """The rows of a section, those of its ingredients, and the two best soups of the largest grid of the same ones."""

    section: str
    rows: list[Row]
    ingredients: list[Row]
    best: tuple[Row, Row] | None

    @classmethod
    def of(
        cls, section: str, rows: list[Row], every: list[Row], protocol: dict[str, Any], measure: str
    ) -> "_Panel":
        names = set(rows[0].get("ingredients") or [])
        alone = [
            row
            for row in every
            if row["role"] in ("ingredient", "pretrained") and row["name"] in names
        ]
        grids = [
            grid
            for grid in sections(every, "grid").values()
            if names and names == set(grid[0].get("ingredients") or [])
        ]
        grid = max(grids, key=len, default=[])
        best = two_best(
            grid, measure, select_on=protocol["select_on"], report_on=protocol["report_on"]
        )
        return cls(section, rows, alone, best)

    @property
    def labels(self) -> str:
        """What the numbers on the curves are."""
        if any(row.get("at") is not None for row in self.rows):
            return "t"
        return "clean weight" if len({row.get("threat") for row in self.rows}) == 1 else "eps"


def _plot(results: dict[str, Any], panels: list[_Panel], points: Points, stem: str) -> Plot:
    columns = 2 if len(panels) in (2, 4) else min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    wide = 4.6 if columns == 1 else 3.6
    figure = new_figure(max(wide * columns, 5.4), 0.8 * wide * lines + 1.15)
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    drawn: list[Axes] = []
    for number, panel in enumerate(panels):
        first = drawn[0] if drawn else None
        axes = figure.add_subplot(lines, columns, number + 1, sharex=first, sharey=first)
        _draw(axes, panel, points)
        axes.set_title(f"{plain(panel.section, 24)}: {panel.labels}", loc="left")
        if number % columns == 0:
            axes.set_ylabel(f"robust accuracy, {plain(points.measure)} (%)")
        if number + columns >= len(panels):
            axes.set_xlabel(f"clean accuracy on {plain(points.split)} (%)")
        drawn.append(axes)
    _legend(figure, drawn, f"{plain(results['name'])}: learned soups against the grid")
    every = [row for panel in panels for row in panel.rows]
    measured = attack_line(results["protocol"], points.split, every)
    footer(figure, f"one scale for all panels · {measured} · bars: 95 % Wilson intervals", results)
    drawn[0].autoscale_view()
    drawn[0].autoscale(False)
    figure.draw_without_rendering()  # what marks cover is known only now
    for axes, panel in zip(drawn, panels, strict=True):
        _name(axes, panel, points)
    squares = "; the squares are the grid's best soups" * any(panel.best for panel in panels)
    caption = (
        f"Clean accuracy against robust accuracy at {points.measure} on {points.split} of {len(every)} learned soups, by "
        f"section{squares}."
    )
    return Plot(stem, figure, caption, _tables(panels, points))


def _draw(axes: Axes, panel: _Panel, points: Points) -> None:
    if panel.best:
        xy = points.of(list(panel.best))
        axes.plot(
            *xy.T, "--", marker="s", color="black", markersize=7, linewidth=1, zorder=3, label=GRID
        )
    if panel.ingredients:
        xy = points.of(panel.ingredients)
        axes.plot(
            *xy.T,
            "^",
            color=INGREDIENT,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=4,
            label="ingredient",
        )
    found = curves(panel.rows)
    handles: list[Line2D] = []
    for number, (apart, curve) in enumerate(found):
        colour, (line, marker) = CURVES[number % len(CURVES)], LOOKS[number % len(LOOKS)]
        members = [row for _, row in curve]
        xy = points.of(members)
        axes.errorbar(
            *xy.T,
            **points.bars(members),
            fmt="none",
            ecolor=colour,
            alpha=0.3,
            elinewidth=0.7,
            zorder=2,
        )
        label = "learned soup" if len(found) == 1 else plain(apart, 24)
        handles += axes.plot(
            *xy.T,
            line,
            marker=marker,
            color=colour,
            markersize=5.5,
            markeredgecolor="white",
            zorder=6,
            label=label,
        )
    if len(found) > 1:
        axes.legend(handles=handles, loc="lower left", fontsize=7)
    axes.margins(0.1)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, drawn: list[Axes], title: str) -> None:
    known = {"learned soup": None, GRID: None, "ingredient": None}
    for axes in drawn:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            if text in known:
                known[text] = known[text] or handle
    shown = {text: handle for text, handle in known.items() if handle}
    figure.legend(
        shown.values(),
        shown.keys(),
        loc="outside upper left",
        ncols=len(shown) if figure.get_figwidth() > 5.5 else 2,
        alignment="left",
        title=title,
        title_fontproperties={"weight": "bold", "size": 11},
    )


def _name(axes: Axes, panel: _Panel, points: Points) -> None:
    labels, crowd = [], []
    shares = np.linspace(0, 1, 20)[:, None]
    marks = [
        _around(axes, points.of(rows))
        for rows in (panel.ingredients, list(panel.best or ()))
        if rows
    ]
    for number, (_, curve) in enumerate(curves(panel.rows)):
        xy = points.of([row for _, row in curve])
        colour = CURVES[number % len(CURVES)]
        labels += [
            (*point, plain(label), colour) for (label, _), point in zip(curve, xy, strict=True)
        ]
        crowd += [np.repeat(xy, 5, axis=0), *[a + shares * (b - a) for a, b in pairwise(xy)]]
    if panel.best:
        first, second = points.of(list(panel.best))
        crowd.append(first + shares * (second - first))
    place_labels(axes, labels, np.concatenate([*crowd, *marks]), size=7.5)


def _around(axes: Axes, xy: np.ndarray) -> np.ndarray:
    """(9 k, 2): points spread over the marks at xy (k, 2)."""
    half = 4 * axes.figure.dpi / 72
    offsets = half * np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)])
    pixels = axes.transData.transform(xy)[:, None] + offsets
    return axes.transData.inverted().transform(pixels.reshape(-1, 2))


def _tables(panels: list[_Panel], points: Points) -> tuple[Table, ...]:
    lines = []
    for panel in panels:
        for apart, curve in curves(panel.rows) if panel.best else []:
            clean, robust = panel.best
            xy = points.of([row for _, row in curve])
            said = {
                "section": panel.section,
                "curve": apart or panel.labels,
                "from": clean["name"],
                "to": robust["name"],
            }
            lines.append(
                said | gap_line(points.of([clean, robust]), xy, [label for label, _ in curve])
            )
    if not lines:
        return ()
    return (
        Table(f"Above the line between the grid's two best soups, {points.measure}", GAPS, lines),
    )

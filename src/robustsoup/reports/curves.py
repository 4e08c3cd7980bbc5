"""Learned soups against the two best soups of a grid (Figs. 5 and 6 of Huang 2023)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustsoup.reports.labels import (
    Label,
    get_root_figure,
    place_labels,
    spread_over_line,
)
from robustsoup.reports.learned_curves import CURVE_COLOURS, LearnedCurve, group_into_curves
from robustsoup.reports.lines import GAP_SUMMARY, tabulate_gaps
from robustsoup.reports.measures import (
    CLEAN,
    LAYERWISE_ROLES,
    PlotScale,
    StoredRun,
    choose_split,
    find_two_best,
    group_by_section,
    list_robust_measures,
    rows_with_measures,
)
from robustsoup.reports.style import (
    Plot,
    add_accuracy_grid,
    add_footer,
    choose_columns,
    clean_text,
    draw_intervals,
    new_figure,
    number_stem,
    summarise_attack,
)
from robustsoup.reports.tables import Cell, Table
from robustsoup.reports.tradeoff import INGREDIENT_COLOUR
from robustsoup.runs.results import EvaluationProtocol, ResultRow, Results

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D

CURVE_LOOKS = (("-", "o"), ("-.", "D"), (":", "v"), ("-", "P"))
GRID_LABEL = "best clean and best robust soup of the grid"
LEARNED_LABEL, INGREDIENT_LABEL = "learned soup", "ingredient"


def draw_curves(run: StoredRun) -> tuple[list[Plot], str]:
    """Draw one figure for each threat, with a panel for each section of learned or dialled soups.

    Returns:
        The figures, and the reason if there is none or a section has a single soup.
    """
    results = run.results
    plots: list[Plot] = []
    single_soups: list[str] = []
    split = choose_split(results.rows, results.protocol)
    for measure in list_robust_measures(results):
        measured = rows_with_measures(results.rows, split, CLEAN, measure)
        panels = []
        for section, rows in group_by_section(measured, *LAYERWISE_ROLES).items():
            curves = group_into_curves(rows)
            if any(len(curve.rows) > 1 for curve in curves):
                panels.append(
                    _make_curve_panel(section, curves, measured, results.protocol, measure)
                )
            else:
                single_soups.append(section)
        if panels:
            stem = number_stem("curves", len(plots))
            plots.append(_plot_curves(results, panels, PlotScale(split, measure), stem))
    if not plots:
        return [], "a curve requires a section with two learned soups"
    names = ", ".join(dict.fromkeys(single_soups))
    return plots, f"{names}: one soup is not a curve" if names else ""


@dataclass(frozen=True)
class _CurvePanel:
    """One section of learned soups.

    Attributes:
        section: Name of the section.
        curves: Its curves.
        ingredients: Rows of its ingredients.
        two_best: The two best soups of the largest grid of the same ingredients.
    """

    section: str
    curves: list[LearnedCurve]
    ingredients: list[ResultRow]
    two_best: tuple[ResultRow, ResultRow] | None

    @property
    def rows(self) -> list[ResultRow]:
        """The learned soups."""
        return [row for curve in self.curves for row in curve.rows]

    @property
    def label_meaning(self) -> str:
        """Meaning of the numbers on the curves."""
        if any(row.at is not None for row in self.rows):
            return "t"
        return "clean weight" if len({row.threat for row in self.rows}) == 1 else "eps"


def _make_curve_panel(
    section: str,
    curves: list[LearnedCurve],
    measured: Sequence[ResultRow],
    protocol: EvaluationProtocol,
    measure: str,
) -> _CurvePanel:
    names = set(curves[0].rows[0].ingredients or ())
    ingredients = [
        row for row in measured if row.role in ("ingredient", "pretrained") and row.name in names
    ]
    grids = [
        grid
        for grid in group_by_section(measured, "grid").values()
        if names and names == set(grid[0].ingredients or ())
    ]
    largest = max(grids, key=len, default=[])
    return _CurvePanel(section, curves, ingredients, find_two_best(largest, measure, protocol))


def _plot_curves(
    results: Results, panels: Sequence[_CurvePanel], scale: PlotScale, stem: str
) -> Plot:
    columns = choose_columns(len(panels))
    lines = math.ceil(len(panels) / columns)
    width = 4.6 if columns == 1 else 3.6
    figure = new_figure(
        max(width * columns, 5.4), 0.8 * width * lines + 1.15, w_pad=0.07, h_pad=0.07
    )
    all_axes: list[Axes] = []
    for number, panel in enumerate(panels):
        first = all_axes[0] if all_axes else None
        axes = figure.add_subplot(lines, columns, number + 1, sharex=first, sharey=first)
        _draw_curve_panel(axes, panel, scale)
        axes.set_title(f"{clean_text(panel.section, 24)}: {panel.label_meaning}", loc="left")
        if number % columns == 0:
            axes.set_ylabel(f"robust accuracy, {clean_text(scale.measure)} (%)")
        if number + columns >= len(panels):
            axes.set_xlabel(f"clean accuracy on {clean_text(scale.split)} (%)")
        all_axes.append(axes)
    against = " against the grid" if any(panel.two_best for panel in panels) else ""
    _add_curve_legend(figure, all_axes, f"{clean_text(results.name)}: learned soups{against}")
    rows = [row for panel in panels for row in panel.rows]
    attack = summarise_attack(results.protocol, scale.split, rows)
    add_footer(
        figure, f"one scale for all panels · {attack} · bars: 95 % Wilson intervals", results
    )
    all_axes[0].autoscale_view()
    all_axes[0].autoscale(False)
    figure.draw_without_rendering()
    for axes, panel in zip(all_axes, panels, strict=True):
        _label_curve_panel(axes, panel, scale)
    squares = "; the squares are the grid's best soups" * any(panel.two_best for panel in panels)
    caption = (
        f"Clean accuracy against robust accuracy at {scale.measure} on {scale.split} of "
        f"{len(rows)} learned soups, by section{squares}."
    )
    return Plot(stem, figure, caption, _tabulate_curves(panels, scale, results.protocol))


def _draw_curve_panel(axes: Axes, panel: _CurvePanel, scale: PlotScale) -> None:
    if panel.two_best:
        axes.plot(
            *scale.coordinates(panel.two_best).T,
            "--",
            marker="s",
            color="black",
            markersize=7,
            linewidth=1,
            zorder=3,
            label=GRID_LABEL,
        )
    if panel.ingredients:
        axes.plot(
            *scale.coordinates(panel.ingredients).T,
            "^",
            color=INGREDIENT_COLOUR,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=4,
            label=INGREDIENT_LABEL,
        )
    handles: list[Line2D] = []
    for number, curve in enumerate(panel.curves):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        line, marker = CURVE_LOOKS[number % len(CURVE_LOOKS)]
        draw_intervals(axes, scale, curve.rows, colour=colour, opacity=0.3, zorder=2)
        handles += axes.plot(
            *scale.coordinates(curve.rows).T,
            line,
            marker=marker,
            color=colour,
            markersize=5.5,
            markeredgecolor="white",
            zorder=6,
            label=LEARNED_LABEL if len(panel.curves) == 1 else clean_text(curve.name, 24),
        )
    if len(panel.curves) > 1:
        axes.legend(handles=handles, loc="lower left", fontsize=7)
    add_accuracy_grid(axes, 0.1)


def _add_curve_legend(figure: Figure, all_axes: Sequence[Axes], title: str) -> None:
    handles: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [label for label in (LEARNED_LABEL, GRID_LABEL, INGREDIENT_LABEL) if label in handles]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside upper left",
        ncols=len(labels) if figure.get_figwidth() > 5.5 else 2,
        alignment="left",
        title=title,
        title_fontproperties={"weight": "bold", "size": 11},
    )


def _label_curve_panel(axes: Axes, panel: _CurvePanel, scale: PlotScale) -> None:
    labels: list[Label] = []
    obstacles: list[np.ndarray] = []
    for number, curve in enumerate(panel.curves):
        xy = scale.coordinates(curve.rows)
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        labels += [
            (*point, clean_text(label), colour)
            for label, point in zip(curve.labels, xy, strict=True)
        ]
        obstacles.append(np.repeat(xy, 5, axis=0))
        obstacles += [spread_over_line(start, end) for start, end in pairwise(xy)]
    if panel.two_best:
        obstacles.append(spread_over_line(*scale.coordinates(panel.two_best)))
    for rows in (panel.ingredients, panel.two_best):
        if rows:
            obstacles.append(_spread_over_markers(axes, scale.coordinates(rows)))
    place_labels(axes, labels, np.concatenate(obstacles), size=7.5)


def _spread_over_markers(axes: Axes, xy: np.ndarray) -> np.ndarray:
    """Return (9 k, 2) points spread over the markers at xy (k, 2)."""
    half = 4 * get_root_figure(axes).dpi / 72
    offsets = half * np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)])
    pixels = axes.transData.transform(xy)[:, None] + offsets
    return axes.transData.inverted().transform(pixels.reshape(-1, 2))


def _tabulate_curves(
    panels: Sequence[_CurvePanel], scale: PlotScale, protocol: EvaluationProtocol
) -> tuple[Table, ...]:
    lines: list[dict[str, Cell]] = []
    for panel in panels:
        if panel.two_best is None:
            continue
        clean, robust = panel.two_best
        for curve in panel.curves:
            ends: dict[str, Cell] = {
                "section": panel.section,
                "curve": curve.name or panel.label_meaning,
                "from": clean.name,
                "to": robust.name,
            }
            gaps = tabulate_gaps(panel.two_best, curve.rows, curve.labels, scale, protocol)
            lines.append(ends | gaps)
    if not lines:
        return ()
    title = f"Above the line between the grid's two best soups, {scale.measure}"
    return (Table(title, GAP_SUMMARY, lines),)

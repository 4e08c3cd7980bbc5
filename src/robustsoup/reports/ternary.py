"""Accuracy over a grid of soups of three ingredients (Fig. 2 of Huang 2023)."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpltern.ternary import TernaryAxes

from robustsoup.reports.labels import label_contour, place_labels, spread_over_box, spread_over_line
from robustsoup.reports.measures import (
    CLEAN,
    StoredRun,
    choose_split,
    group_by_section,
    list_compared_measures,
    prefer_exact,
    require_accuracy,
    rows_with_measures,
)
from robustsoup.reports.style import (
    INK,
    SEQUENTIAL_COLOURS,
    Plot,
    add_footer,
    choose_columns,
    clean_text,
    name_accuracy,
    new_figure,
    number_stem,
    settle_layout,
    summarise_attack,
)
from robustsoup.runs.results import ResultRow, Results

CONTOURS = 6
NO_GRID = "a ternary plot requires a measured grid of soups of three ingredients"


def draw_ternary(run: StoredRun) -> tuple[list[Plot], str]:
    """Draw one figure for each grid of three ingredients.

    Returns:
        The figures, and the reason if there is none.
    """
    results = run.results
    plots: list[Plot] = []
    for section, grid in group_by_section(results.rows, "grid").items():
        rows = [row for row in grid if _count_ingredients(row) == 3]
        split = choose_split(rows, results.protocol)
        measures = [CLEAN, *list_compared_measures(results)]
        rows = rows_with_measures(rows, split, *measures)
        if len(rows) >= 3 and np.linalg.matrix_rank(_stack_coefficients(rows)) == 3:
            stem = number_stem("ternary", len(plots))
            plots.append(
                _plot_ternary(results, section, rows, split=split, measures=measures, stem=stem)
            )
    return plots, "" if plots else NO_GRID


def _count_ingredients(row: ResultRow) -> int:
    """Return the number of ingredients, or 0 unless each has a coefficient."""
    ingredients, coefficients = row.ingredients or (), row.coefficients or ()
    return len(ingredients) if len(ingredients) == len(coefficients) else 0


def _stack_coefficients(rows: Sequence[ResultRow]) -> np.ndarray:
    return np.array([row.coefficients for row in rows], dtype=float)


def _plot_ternary(
    results: Results,
    section: str,
    rows: Sequence[ResultRow],
    *,
    split: str,
    measures: Sequence[str],
    stem: str,
) -> Plot:
    columns = choose_columns(len(measures))
    lines = math.ceil(len(measures) / columns)
    figure = new_figure(3.75 * columns, 3.35 * lines + 0.6, w_pad=0.1, h_pad=0.06)
    panels: list[tuple[TernaryAxes, list[float], list[int]]] = []
    for number, measure in enumerate(measures):
        axes = figure.add_subplot(lines, columns, number + 1, projection="ternary")
        if not isinstance(axes, TernaryAxes):
            raise TypeError(f"got {type(axes).__name__}, expected TernaryAxes")
        values = [100 * require_accuracy(row, split, measure).value for row in rows]
        exact = prefer_exact(rows, split, measure, results.protocol)
        top = max(require_accuracy(row, split, measure).value for row in exact)
        best = [k for k, row in enumerate(rows) if row in exact and values[k] == 100 * top]
        _draw_ternary_panel(figure, axes, rows, values, best)
        title = name_accuracy(measure)
        axes.set_title(title, pad=30, fontsize=10)
        panels.append((axes, values, best))
    figure.suptitle(
        f"{clean_text(results.name)}: {clean_text(section)}, on {clean_text(split)}",
        fontsize=11,
        weight="bold",
    )
    attack = summarise_attack(results.protocol, split, rows)
    footer = f"{len(rows)} soups (dots) · {attack} · ring: the best of the panel (each, if tied)"
    add_footer(figure, footer, results)
    settle_layout(figure)
    for axes, values, best in panels:
        _label_ternary_panel(axes, rows, values, best[0])
    caption = (
        f"Accuracy on {split} of {len(rows)} weighted averages ({section}) of "
        f"{', '.join(rows[0].ingredients or ())}; the best is ringed."
    )
    return Plot(stem, figure, caption)


def _draw_ternary_panel(
    figure: Figure,
    axes: TernaryAxes,
    rows: Sequence[ResultRow],
    values: Sequence[float],
    best: Sequence[int],
) -> None:
    alpha = _stack_coefficients(rows)
    low, high = min(values), max(values)
    low, high = (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)
    axes.tripcolor(
        *alpha.T,
        values,
        shading="gouraud",
        rasterized=True,
        zorder=1,
        cmap=SEQUENTIAL_COLOURS,
        vmin=low,
        vmax=high,
    )
    dots = axes.scatter(
        *alpha.T,
        c=values,
        s=float(np.clip(700 / len(rows), 5, 30)),
        edgecolors="white",
        linewidths=0.8,
        zorder=4,
        clip_on=False,
        cmap=SEQUENTIAL_COLOURS,
        vmin=low,
        vmax=high,
    )
    ringed = alpha[best].T
    axes.scatter(*ringed, s=190, color="white", linewidths=0, zorder=3, clip_on=False)
    axes.scatter(
        *ringed, s=120, facecolors="none", edgecolors=INK, linewidths=1.5, zorder=5, clip_on=False
    )
    _name_corners(axes, rows[0].ingredients or ())
    bar = figure.colorbar(dots, ax=axes, shrink=0.8, pad=0.06, aspect=20)
    bar.set_label("%", rotation=0, labelpad=6)
    bar.outline.set_visible(False)


def _name_corners(axes: TernaryAxes, names: Sequence[str]) -> None:
    axes.grid(False)
    for axis in (axes.taxis, axes.laxis, axes.raxis):
        axis.set_ticks([])
    corners = axes.transProjection.transform(np.eye(3))
    for name, corner, (gap, side) in zip(
        names, corners, ((11, "bottom"), (-11, "top"), (-11, "top")), strict=True
    ):
        axes.annotate(
            clean_text(name, 18),
            corner,
            xycoords=axes.transData,
            xytext=(0, gap),
            textcoords="offset points",
            ha="center",
            va=side,
            fontsize=9,
            annotation_clip=False,
        )


def _label_ternary_panel(
    axes: TernaryAxes, rows: Sequence[ResultRow], values: Sequence[float], best: int
) -> None:
    """Label the best value, then each contour where points and text are farthest away."""
    alpha = _stack_coefficients(rows)
    points = axes.transProjection.transform(alpha)
    label = (*points[best], f"{values[best]:.1f} %", INK)
    corners = axes.transProjection.transform(np.eye(3))
    boxes = place_labels(axes, [label], np.concatenate([points, corners]), size=9)
    low, high = min(values), max(values)
    levels = [level for level in MaxNLocator(CONTOURS).tick_values(low, high) if low < level < high]
    if not levels:
        return
    contours = axes.tricontour(
        *alpha.T, values, levels=levels, colors="white", linewidths=0.7, alpha=0.85, zorder=2
    )
    edge = np.concatenate([spread_over_line(corners[i], corners[i - 1], 40) for i in range(3)])
    obstacles = axes.transData.transform(np.concatenate([points, edge]))
    avoid = np.concatenate([obstacles, *[spread_over_box(box) for box in boxes]])
    for level, lines in zip(levels, contours.allsegs, strict=True):
        avoid = label_contour(axes, f"{level:g}", lines, avoid)

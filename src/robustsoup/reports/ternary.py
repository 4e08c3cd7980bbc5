"""Accuracy over a grid of soups of three ingredients (the paper's Fig. 2)."""

import math
from pathlib import Path
from typing import Any

import mpltern  # noqa: F401  (makes the "ternary" projection known to matplotlib)
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from robustsoup.reports.results import (
    CLEAN,
    Row,
    accuracy,
    robust_measures,
    sections,
    shown_split,
    with_measures,
)
from robustsoup.reports.style import (
    INK,
    Plot,
    attack_line,
    footer,
    label_contour,
    new_figure,
    numbered,
    outline,
    place_labels,
    plain,
)

COLOURS = "viridis"


def draw_ternary(results: dict[str, Any], folder: Path) -> tuple[list[Plot], str]:
    """One figure for each grid of three ingredients; or none, and the reason in one line. folder is not read."""
    plots = []
    for section, rows in sections(results["rows"], "grid").items():
        rows = [
            row
            for row in rows
            if len(row.get("ingredients") or []) == len(row.get("coefficients") or []) == 3
        ]
        split = shown_split(rows, results["protocol"])
        measures = [CLEAN, *robust_measures(results)]
        rows = with_measures(rows, split, *measures)
        if len(rows) >= 3 and np.linalg.matrix_rank([row["coefficients"] for row in rows]) == 3:
            plots.append(
                _plot(results, section, rows, split, measures, numbered("ternary", len(plots)))
            )
    return (
        plots,
        ""
        if plots
        else "no grid of soups of three ingredients was measured, which a ternary plot needs",
    )


def _plot(
    results: dict[str, Any],
    section: str,
    rows: list[Row],
    split: str,
    measures: list[str],
    stem: str,
) -> Plot:
    columns = 2 if len(measures) in (2, 4) else min(len(measures), 3)
    lines = math.ceil(len(measures) / columns)
    figure = new_figure(3.75 * columns, 3.35 * lines + 0.6)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    panels = []
    for number, measure in enumerate(measures):
        axes = figure.add_subplot(lines, columns, number + 1, projection="ternary")
        values = [100 * accuracy(row, split, measure)["value"] for row in rows]
        _panel(figure, axes, rows, values)
        title = "clean accuracy" if measure == CLEAN else f"robust accuracy, {plain(measure)}"
        axes.set_title(title, pad=30, fontsize=10)
        panels.append((axes, values))
    figure.suptitle(
        f"{plain(results['name'])}: {plain(section)}, on {plain(split)}", fontsize=11, weight="bold"
    )
    measured = attack_line(results["protocol"], split, rows)
    footer(
        figure,
        f"{len(rows)} soups (dots) · {measured} · ring: the best of the panel (each, if tied)",
        results,
    )
    for axes, values in panels:
        _annotate(axes, rows, values)
    names = ", ".join(rows[0]["ingredients"])
    caption = f"Accuracy on {split} of {len(rows)} weighted averages ({section}) of {names}; the best is ringed."
    return Plot(stem, figure, caption)


def _panel(figure: Figure, axes: Axes, rows: list[Row], values: list[float]) -> None:
    alpha = np.array([row["coefficients"] for row in rows], dtype=float)
    low, high = min(values), max(values)
    low, high = (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)
    colours = {"cmap": COLOURS, "vmin": low, "vmax": high}
    axes.tripcolor(*alpha.T, values, shading="gouraud", rasterized=True, zorder=1, **colours)
    size = float(np.clip(700 / len(rows), 5, 30))
    dots = axes.scatter(
        *alpha.T,
        c=values,
        s=size,
        edgecolors="white",
        linewidths=0.8,
        zorder=4,
        clip_on=False,
        **colours,
    )
    best = alpha[np.array(values) == max(values)].T
    axes.scatter(*best, s=190, color="white", linewidths=0, zorder=3, clip_on=False)
    axes.scatter(
        *best, s=120, facecolors="none", edgecolors=INK, linewidths=1.5, zorder=5, clip_on=False
    )
    _corners(axes, rows[0]["ingredients"])
    bar = figure.colorbar(dots, ax=axes, shrink=0.8, pad=0.06, aspect=20)
    bar.set_label("%", rotation=0, labelpad=6)
    bar.outline.set_visible(False)


def _corners(axes: Axes, names: list[str]) -> None:
    axes.grid(False)
    for axis in (axes.taxis, axes.laxis, axes.raxis):
        axis.set_ticks([])
    ends = axes.transProjection.transform(np.eye(3))
    for name, end, (gap, side) in zip(
        names, ends, ((11, "bottom"), (-11, "top"), (-11, "top")), strict=True
    ):
        axes.annotate(
            plain(name, 18),
            end,
            xycoords=axes.transData,
            xytext=(0, gap),
            textcoords="offset points",
            ha="center",
            va=side,
            fontsize=9,
            annotation_clip=False,
        )


def _annotate(axes: Axes, rows: list[Row], values: list[float]) -> None:
    """The best value beside its ring, then contour lines, each labelled where it is farthest from points and text."""
    alpha = np.array([row["coefficients"] for row in rows], dtype=float)
    points = axes.transProjection.transform(alpha)
    best = int(np.argmax(values))
    label = (*points[best], f"{values[best]:.1f} %", INK)
    corners = axes.transProjection.transform(np.eye(3))
    boxes = place_labels(axes, [label], np.concatenate([points, corners]), size=9)
    low, high = min(values), max(values)
    levels = [level for level in MaxNLocator(6).tick_values(low, high) if low < level < high]
    if not levels:
        return
    lines = axes.tricontour(
        *alpha.T, values, levels=levels, colors="white", linewidths=0.7, alpha=0.85, zorder=2
    )
    edge = np.concatenate([np.linspace(corners[i], corners[i - 1], 40) for i in range(3)])
    crowd = axes.transData.transform(np.concatenate([points, edge]))
    near = np.concatenate([crowd, *[outline(box) for box in boxes]])
    for level, pieces in zip(levels, lines.allsegs, strict=True):
        near = label_contour(axes, f"{level:g}", pieces, near)

"""Accuracy over a grid of soups of three ingredients (the paper's Fig. 2)."""

import math
from pathlib import Path
from typing import Any

import mpltern  # noqa: F401  (makes the "ternary" projection known to matplotlib)
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import TriContourSet

from robustsoup.reports.results import CLEAN, Row, accuracy, robust_measures, sections, shown_split, with_measures
from robustsoup.reports.style import FAINT, INK, MUTED, Plot, attack_line, footer, new_figure, numbered, plain

COLOURS = "viridis"
_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def draw_ternary(results: dict[str, Any], folder: Path) -> tuple[list[Plot], str]:
    """One figure for each grid of three ingredients; or none, and the reason in one line. folder is not read."""
    plots = []
    for section, rows in sections(results["rows"], "grid").items():
        rows = [row for row in rows if len(row.get("ingredients") or []) == len(row.get("coefficients") or []) == 3]
        split = shown_split(rows, results["protocol"])
        measures = [CLEAN, *robust_measures(results)]
        rows = with_measures(rows, split, *measures)
        if len(rows) >= 3 and np.linalg.matrix_rank([row["coefficients"] for row in rows]) == 3:
            plots.append(_plot(results, section, rows, split, measures, numbered("ternary", len(plots))))
    return plots, "" if plots else "no grid of soups of three ingredients was measured, which a ternary plot needs"


def _plot(
    results: dict[str, Any], section: str, rows: list[Row], split: str, measures: list[str], stem: str
) -> Plot:  # fmt: skip
    columns = min(len(measures), 3)
    lines = math.ceil(len(measures) / columns)
    figure = new_figure(3.75 * columns, 3.55 * lines + 0.5)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    for number, measure in enumerate(measures):
        axes = figure.add_subplot(lines, columns, number + 1, projection="ternary")
        _panel(figure, axes, rows, [100 * accuracy(row, split, measure)["value"] for row in rows])
        title = "clean accuracy" if measure == CLEAN else f"robust accuracy, {plain(measure)}"
        axes.set_title(title, pad=26, fontsize=10)
    figure.suptitle(f"{plain(results['name'])}: {plain(section)}, on {plain(split)}", fontsize=11, weight="bold")
    footer(
        figure, f"{len(rows)} soups · {attack_line(results['protocol'], split, rows)} · ring: best soup of the panel"
    )
    names = ", ".join(rows[0]["ingredients"])
    caption = f"Accuracy on {split} of {len(rows)} weighted averages ({section}) of {names}; the best is ringed."
    return Plot(stem, figure, caption)


def _panel(figure: Figure, axes: Axes, rows: list[Row], values: list[float]) -> None:
    alpha = np.array([row["coefficients"] for row in rows], dtype=float)
    low, high = min(values), max(values)
    low, high = (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)
    colours = {"cmap": COLOURS, "vmin": low, "vmax": high}
    axes.tripcolor(*alpha.T, values, shading="gouraud", rasterized=True, zorder=1, **colours)
    levels = [level for level in MaxNLocator(6).tick_values(low, high) if low < level < high]
    best = int(np.argmax(values))
    written = _write_best(axes, alpha[best], values[best])
    if max(values) > min(values) and levels:
        lines = axes.tricontour(*alpha.T, values, levels=levels, colors="white", linewidths=0.7, alpha=0.8, zorder=2)
        _label_lines(axes, lines, written)
    size = float(np.clip(600 / len(rows), 5, 26))
    dots = axes.scatter(
        *alpha.T, c=values, s=size, edgecolors="white", linewidths=0.8, zorder=4, clip_on=False, **colours
    )
    axes.scatter(
        *alpha[[best]].T, s=110, facecolors="none", edgecolors="white", linewidths=3.2, zorder=5, clip_on=False
    )
    axes.scatter(*alpha[[best]].T, s=110, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=6, clip_on=False)
    _corners(axes, rows[0]["ingredients"])
    bar = figure.colorbar(dots, ax=axes, shrink=0.62, pad=0.1, aspect=18)
    bar.set_label("%", rotation=0, labelpad=6)
    bar.outline.set_visible(False)


def _label_lines(axes: Axes, lines: TriContourSet, written: Text) -> None:
    """Label the contours, but none where the best value is written."""
    axes.figure.draw_without_rendering()
    taken = [written.get_window_extent().padded(2)]
    for text in axes.clabel(lines, fontsize=6.5, colors="white", inline=True, inline_spacing=2):
        text.set_zorder(3)
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            text.set_visible(False)
        taken.append(box)


def _write_best(axes: Axes, alpha: np.ndarray, value: float) -> Text:
    """The value beside the ring, on the side of the triangle's centre so that it stays clear of the corner's name."""
    at = axes.transProjection.transform(alpha[None])[0]
    centre = axes.transProjection.transform(np.full((1, 3), 1 / 3))[0]
    inward = centre - at
    length = float(np.hypot(*inward))
    shift = inward / length * 22 if length > 1e-6 else np.array([0.0, -16.0])
    return axes.annotate(
        f"{value:.1f} %", at, xycoords=axes.transData, xytext=tuple(shift), textcoords="offset points",
        ha="center", va="center", fontsize=9, weight="bold", color=INK, zorder=7, path_effects=_HALO,
    )  # fmt: skip


def _corners(axes: Axes, names: list[str]) -> None:
    axes.set_tlabel(plain(names[0], 18), fontsize=9)
    axes.set_llabel(plain(names[1], 18), fontsize=9)
    axes.set_rlabel(plain(names[2], 18), fontsize=9)
    for axis in (axes.taxis, axes.laxis, axes.raxis):
        axis.set_ticks([0.2, 0.4, 0.6, 0.8])
        axis.set_tick_params(labelsize=6.5, labelcolor=MUTED, color=FAINT, length=2)

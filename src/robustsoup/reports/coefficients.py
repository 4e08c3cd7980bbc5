"""What learned soups take from each ingredient, layer by layer."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustsoup.errors import RequestError
from robustsoup.reports.results import Row, sections
from robustsoup.reports.style import INK, MUTED, Plot, footer, new_figure, numbered, plain, shades
from robustsoup.reports.tradeoff import curves
from robustsoup.soups.coefficients import EVERY_LAYER, Coefficients

COLUMNS = 3
MOST_NAMES = 40


def draw_coefficients(results: dict[str, Any], folder: Path) -> tuple[list[Plot], str]:
    """One figure for each section of learned soups, from the files in `folder`; or none, and the reason in one line."""
    plots, reason = [], "no soup was learned"
    for section, rows in sections(results["rows"], "learned").items():
        try:
            learned = _load([row for _, curve in curves(rows) for _, row in curve], folder)
        except RequestError as error:
            reason = str(error)
            continue
        if learned:
            plots.append(_plot(results["name"], section, learned, numbered("coefficients", len(plots))))
    return plots, "" if plots else reason


def _load(rows: list[Row], folder: Path) -> list[tuple[Row, Coefficients]]:
    """Each row with its coefficients, those of one network: the first row's layers."""
    found = [
        (row, Coefficients.load(folder / row["coefficients_file"])) for row in rows if row.get("coefficients_file")
    ]
    return [item for item in found if item[1].layers == found[0][1].layers]


def _plot(name: str, section: str, learned: list[tuple[Row, Coefficients]], stem: str) -> Plot:
    columns = min(COLUMNS, len(learned))
    lines = math.ceil(len(learned) / columns)
    layers = learned[0][1].layers
    height = float(np.clip(0.15 * len(layers), 0.9, 7.5))
    figure = new_figure(1.7 + 2.3 * columns, lines * (height + 0.75) + 1.0)
    figure.get_layout_engine().set(w_pad=0.06, wspace=0.0)
    grid = figure.add_gridspec(lines, 2 * columns, width_ratios=[3, 1.15] * columns)
    for number, (row, coefficients) in enumerate(learned):
        line, column = divmod(number, columns)
        bars = figure.add_subplot(grid[line, 2 * column])
        entropy = figure.add_subplot(grid[line, 2 * column + 1])
        _bars(bars, coefficients, named=column == 0)
        _entropy(entropy, coefficients)
        bars.set_title(plain(_title(row), 26), loc="left", fontsize=9)
    _legend(figure, learned, f"{plain(name)}: coefficients by layer, {plain(section)}")
    footer(figure, "layers in the network's order · entropy in nats; the dotted line is the uniform soup's")
    caption = f"Share of each ingredient in every layer of {len(learned)} learned soups ({section}), and its entropy."
    return Plot(stem, figure, caption)


def _title(row: Row) -> str:
    objective = row.get("objective")
    return (row.get("threat") or row["name"]) + (f", {objective}" if objective and objective != "ce" else "")


def _legend(figure: Figure, learned: list[tuple[Row, Coefficients]], title: str) -> None:
    n = learned[0][1].alpha.shape[1]
    names = learned[0][0].get("ingredients") or []
    names = names if len(names) == n else [f"ingredient {i + 1}" for i in range(n)]
    handles = figure.axes[0].containers
    figure.legend(
        handles, [plain(name, 20) for name in names], loc="outside upper left", ncols=min(n, 5), alignment="left",
        title=title, title_fontproperties={"weight": "bold", "size": 11},
    )  # fmt: skip


def _bars(axes: Axes, coefficients: Coefficients, *, named: bool) -> None:
    alpha = coefficients.alpha.numpy()
    layers, n = alpha.shape
    left = np.zeros(layers)
    for i, colour in enumerate(shades(n)):
        axes.barh(range(layers), alpha[:, i], left=left, color=colour, height=0.86 if layers <= MOST_NAMES else 1.0)
        left += alpha[:, i]
    axes.set_xlim(0, 1)
    _layer_axis(axes, coefficients.layers, named=named)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("share", fontsize=8)


def _entropy(axes: Axes, coefficients: Coefficients) -> None:
    most = math.log(coefficients.alpha.shape[1])
    values = coefficients.entropy().numpy()
    size = 2.2 if len(values) <= MOST_NAMES else 1
    axes.plot(values, range(len(values)), "-o", color=INK, linewidth=0.8, markersize=size, clip_on=False)
    axes.axvline(most, color=MUTED, linestyle=":", linewidth=1)
    axes.set_xlim(0, 1.08 * most if most else 1)
    _layer_axis(axes, coefficients.layers, named=False)
    axes.set_xticks([0, 1], ["0", "1"])
    axes.set_xlabel("entropy", fontsize=8)


def _layer_axis(axes: Axes, layers: tuple[str, ...], *, named: bool) -> None:
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.tick_params(length=2, labelsize=7)
    step = math.ceil(len(layers) / MOST_NAMES)
    shown = range(0, len(layers), step)
    names = ["whole network" if layers[i] == EVERY_LAYER else plain(layers[i], 34) for i in shown] if named else []
    axes.set_yticks(shown if named else [], names)
    axes.tick_params(axis="y", labelsize=7 if len(layers) <= 20 else 6)

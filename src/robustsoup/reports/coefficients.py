"""What was learned, layer by layer: the share of each ingredient, the entropy, how far it moved, how steep the loss was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.image import AxesImage

from robustsoup.errors import CoefficientError, RequestError
from robustsoup.reports.results import BY_LAYER, Row, sections
from robustsoup.reports.style import (
    INK,
    MUTED,
    PALETTE,
    STYLE,
    Plot,
    footer,
    new_figure,
    numbered,
    plain,
    shades,
)
from robustsoup.reports.tables import ingredient_names, layer_name, soup_table
from robustsoup.reports.tradeoff import curves
from robustsoup.soups.coefficients import Coefficients

COLUMNS = 3
MOST_NAMES = 40
MOST_LETTERS = 34
WIDEST, MEASURE_WIDTH = 8.0, 0.5  # inches
MEASURES = {
    "entropy": "its entropy",
    "moved": "how far it moved from the start",
    "slope": "how steep the loss was",
}
MOVED_LIMITS = (0.1, 0.2, 0.5, 1.0)

Soups = Sequence[tuple[str, Coefficients]]


def draw_coefficients(results: dict[str, Any], folder: Path) -> tuple[list[Plot], str]:
    """One figure for each section of learned soups or of a dial's, from the files in `folder`.

    Also the reason, in one line, if there is none or a section had to be left out.
    """
    plots, reason = [], ""
    for section, rows in sections(results["rows"], *BY_LAYER).items():
        try:
            found = _load([row for _, curve in curves(rows) for _, row in curve], folder)
            if found:
                names = ingredient_names(*found[0])
                title = f"{plain(results['name'])}: coefficients by layer, {plain(section)}"
                soups = [(_label(row), coefficients) for row, coefficients in found]
                stem = numbered("coefficients", len(plots))
                plots.append(_plot(soups, names, title, stem, f" ({section})", results))
        except RequestError as error:
            reason = str(error)
    return plots, reason or ("" if plots else "no soup was learned")


@rc_context(STYLE)
def draw_learned(coefficients: Coefficients, names: Sequence[str], title: str) -> Plot:
    """The figure "coefficients" of one soup: what `style.save` writes as .png, .svg and .pdf.

    Raises CoefficientError unless there is a name for each ingredient.
    """
    return _plot([("", coefficients)], names, plain(title, 60))


@rc_context(STYLE)
def draw_dial(dials: Sequence[tuple[str, Coefficients]], names: Sequence[str], title: str) -> Plot:
    """The figure "coefficients" of several soups of one network and the same ingredients, each with its label.

    Raises CoefficientError unless there is a name for each ingredient, and at least one soup.
    """
    if not dials:
        raise CoefficientError("dials: got none, expected at least one soup to draw")
    return _plot(dials, names, plain(title, 60))


def _load(rows: list[Row], folder: Path) -> list[tuple[Row, Coefficients]]:
    """Each row with its coefficients, those of one network: the first row's layers and number of ingredients."""
    found = [
        (row, Coefficients.load(folder / row["coefficients_file"]))
        for row in rows
        if row.get("coefficients_file")
    ]
    return [item for item in found if _shape(item[1]) == _shape(found[0][1])]


def _shape(coefficients: Coefficients) -> tuple[tuple[str, ...], int]:
    return coefficients.layers, coefficients.alpha.shape[1]


def _label(row: Row) -> str:
    threat, objective, at = row.get("threat"), row.get("objective"), row.get("at")
    if at is not None:
        return f"t = {at:g}" + (f", {threat}" if threat else "")
    return (threat or row["name"]) + (f", {objective}" if objective and objective != "ce" else "")


def _plot(
    soups: Soups,
    names: Sequence[str],
    title: str,
    stem: str = "coefficients",
    of: str = "",
    results: dict[str, Any] | None = None,
) -> Plot:
    tables = tuple(soup_table(label, coefficients, names) for label, coefficients in soups)
    if len({_shape(coefficients) for _, coefficients in soups}) > 1:
        raise CoefficientError(
            "coefficients: soups of different layers or ingredients; expected those of one network"
        )
    frame = _Frame.around(soups)
    figure, blocks = _sheet(soups, frame)
    for (label, coefficients), block in zip(soups, blocks, strict=True):
        shares = figure.add_subplot(block[0])
        shares.set_title(plain(label, 26), loc="left", fontsize=9)
        image = _shares(shares, coefficients, names, frame)
        _layer_axis(shares, coefficients.layers, named=block[0].is_first_col())
        for measure, place in zip(frame.measures, block[1:], strict=True):
            values = _measured(coefficients, measure)
            if values is not None:
                axes = figure.add_subplot(place)
                frame.draw(axes, measure, values, len(names))
                _layer_axis(axes, coefficients.layers, named=False)
    if image is None:
        _legend(figure, names, title)
    else:
        _colour_bar(figure, image, len(names), title)
    footer(figure, frame.notes(), results)
    what = f"{len(soups)} learned soups" if len(soups) > 1 else "a learned soup"
    also = " and ".join(MEASURES[measure] for measure in frame.measures)
    return Plot(
        stem, figure, f"Share of each ingredient in every layer of {what}{of}, with {also}.", tables
    )


def _sheet(soups: Soups, frame: "_Frame") -> tuple[Figure, list[list[SubplotSpec]]]:
    """An empty figure, and the places of each soup in it: its shares, then its measures."""
    layers, n = _shape(soups[0][1])
    heat = n > len(PALETTE)
    widths = [
        float(np.clip(0.13 * n, 1.4, 5.4)) if heat else 1.15,
        *[MEASURE_WIDTH] * len(frame.measures),
    ]
    lines = math.ceil(len(soups) / max(1, min(COLUMNS, int(WIDEST / sum(widths)))))
    columns = math.ceil(len(soups) / lines)
    height = float(np.clip(0.15 * len(layers), 0.9, 7.5)) + (1.1 if heat else 0)
    letters = min(MOST_LETTERS, max(len(layer_name(layer)) for layer in layers))
    width = max(0.7 + 0.055 * letters + columns * sum(widths), 5.2)
    figure = new_figure(width, lines * (height + 0.8) + 1.4)
    figure.get_layout_engine().set(
        w_pad=0.04, wspace=0.0, rect=(0.1 / width, 0, 1 - 0.2 / width, 1)
    )
    grid = figure.add_gridspec(lines, columns * len(widths), width_ratios=widths * columns)
    firsts = [(i // columns, i % columns * len(widths)) for i in range(len(soups))]
    return figure, [[grid[line, first + k] for k in range(len(widths))] for line, first in firsts]


def _measured(coefficients: Coefficients, measure: str) -> np.ndarray | None:
    """(layers,): entropy, moved or slope; None where the file does not hold it."""
    held = {
        "entropy": coefficients.entropy(),
        "moved": coefficients.movement(),
        "slope": coefficients.slopes,
    }
    return None if held[measure] is None else held[measure].double().numpy()


@dataclass(frozen=True)
class _Frame:
    """The measures that a figure shows and the scales that its soups share, so that they can be compared."""

    measures: tuple[str, ...]
    most_share: float
    most_moved: float
    decades: tuple[int, int] | None
    same_slope: bool

    @classmethod
    def around(cls, soups: Soups) -> "_Frame":
        found = {
            measure: [values for _, c in soups if (values := _measured(c, measure)) is not None]
            for measure in MEASURES
        }
        moved = max((float(values.max()) for values in found["moved"]), default=0.0)
        slopes = np.concatenate([np.empty(0), *found["slope"]])
        return cls(
            tuple(measure for measure, values in found.items() if values),
            max(float(c.alpha.max()) for _, c in soups),
            next((limit for limit in MOVED_LIMITS if moved <= limit), 1.0),
            _decades(slopes[slopes > 0]),
            len(soups) == len(found["slope"]) > 1
            and all(np.array_equal(v, found["slope"][0]) for v in found["slope"]),
        )

    def draw(self, axes: Axes, measure: str, values: np.ndarray, n: int) -> None:
        """One of the narrow columns: a measure (layers,) of a soup of n ingredients."""
        {"entropy": self._entropy, "moved": self._moved, "slope": self._slope}[measure](
            axes, values, n
        )
        axes.set_xlabel(measure, fontsize=8)

    def _entropy(self, axes: Axes, values: np.ndarray, n: int) -> None:
        most = math.log(n)
        _trace(axes, values)
        axes.axvline(most, color=MUTED, linestyle=":", linewidth=1)
        axes.set_xlim(0, 1.08 * most if most else 1)
        _end_ticks(axes, 0, math.floor(2 * most) / 2 or 1)

    def _moved(self, axes: Axes, values: np.ndarray, n: int) -> None:
        _trace(axes, values)
        axes.set_xlim(0, self.most_moved)
        _end_ticks(axes, 0, self.most_moved)

    def _slope(self, axes: Axes, values: np.ndarray, n: int) -> None:
        low, high = self.decades or (0, 1)
        flat = values <= 0
        axes.set_xscale("log")
        axes.set_xlim(10.0**low, 10.0**high)
        _trace(axes, np.where(flat, 10.0**low, values))
        if flat.any():
            axes.plot(
                np.full(flat.sum(), 10.0**low),
                flat.nonzero()[0],
                "o",
                color=INK,
                markerfacecolor="white",
                markersize=2.8,
                markeredgewidth=0.7,
                clip_on=False,
                zorder=4,
            )
        axes.minorticks_off()
        labels = [f"1e{low}", f"1e{high}"] if self.decades else ["0", ""]
        _end_ticks(axes, 10.0**low, 10.0**high, labels)

    def notes(self) -> str:
        """The small print."""
        moved = "moved: share of the weight that changed ingredient"
        same = ", the same for all soups" * self.same_slope
        slope = f"slope: mean norm of dL/dlogits{same}, log scale; open dots: 0"
        said = [
            "layers in the network's order · entropy in nats; the dotted line is the uniform soup's"
        ]
        said += [f"{moved} while learning"] * ("moved" in self.measures) + [slope] * (
            "slope" in self.measures
        )
        return " · ".join(said)


def _decades(positive: np.ndarray) -> tuple[int, int] | None:
    if not positive.size:
        return None
    low, high = math.floor(np.log10(positive.min())), math.ceil(np.log10(positive.max()))
    return low, max(high, low + 1)


def _trace(axes: Axes, values: np.ndarray) -> None:
    size = 2.2 if len(values) <= MOST_NAMES else 1
    axes.plot(
        values, range(len(values)), "-o", color=INK, linewidth=0.8, markersize=size, clip_on=False
    )


def _end_ticks(axes: Axes, low: float, high: float, labels: Sequence[str] = ()) -> None:
    axes.set_xticks([low, high], labels or [f"{low:g}", f"{high:g}"])
    for text, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        text.set_horizontalalignment(side)


def _shares(
    axes: Axes, coefficients: Coefficients, names: Sequence[str], frame: _Frame
) -> AxesImage | None:
    if len(names) > len(PALETTE):
        return _heat(axes, coefficients, names, frame.most_share)
    _bars(axes, coefficients)
    return None


def _bars(axes: Axes, coefficients: Coefficients) -> None:
    alpha = coefficients.alpha.numpy()
    layers, n = alpha.shape
    left = np.zeros(layers)
    for i, colour in enumerate(shades(n)):
        axes.barh(
            range(layers),
            alpha[:, i],
            left=left,
            color=colour,
            height=0.86 if layers <= MOST_NAMES else 1.0,
        )
        left += alpha[:, i]
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("share", fontsize=8)


def _heat(axes: Axes, coefficients: Coefficients, names: Sequence[str], most: float) -> AxesImage:
    """One cell for each layer and ingredient, for more ingredients than there are colours to tell apart."""
    n = len(names)
    image = axes.imshow(
        coefficients.alpha.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        norm=PowerNorm(0.5, 0, most),
    )
    shown = range(0, n, math.ceil(n / MOST_NAMES))
    axes.set_xticks(shown, [plain(names[i], 18) for i in shown], rotation=90)
    axes.set_xlabel("ingredient", fontsize=8)
    return image


def _legend(figure: Figure, names: Sequence[str], title: str) -> None:
    shown = [plain(name, 20) for name in names]
    room = int(figure.get_figwidth() / (0.5 + 0.07 * max(map(len, shown))))
    figure.legend(
        figure.axes[0].containers,
        shown,
        loc="outside upper left",
        ncols=min(len(names), max(room, 1)),
        alignment="left",
        title=title,
        title_fontproperties={"weight": "bold", "size": 11},
    )


def _colour_bar(figure: Figure, image: AxesImage, n: int, title: str) -> None:
    figure.suptitle(title, x=0.1 / figure.get_figwidth(), ha="left", fontsize=11, weight="bold")
    bar = figure.colorbar(
        image, ax=figure.axes, location="top", shrink=0.4, aspect=30, anchor=(0.0, 0.5), pad=0.01
    )
    bar.set_label("share (square-root scale)", fontsize=8)
    ticks = {0.0: "0", 1 / n: f"1/{n}"}
    if (most := image.norm.vmax) > 4 / n:
        ticks[most] = f"{most:.2g}"
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(length=2, labelsize=7)
    bar.outline.set_visible(False)


def _layer_axis(axes: Axes, layers: tuple[str, ...], *, named: bool) -> None:
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.tick_params(length=2, labelsize=7)
    step = math.ceil(len(layers) / MOST_NAMES)
    shown = range(0, len(layers), step)
    axes.set_yticks(
        shown if named else [],
        [plain(layer_name(layers[i]), MOST_LETTERS) for i in shown] if named else [],
    )
    axes.tick_params(axis="y", labelsize=7 if len(layers) <= 20 else 6)

"""Coefficients by layer: shares of the ingredients, entropy, movement and slope of the loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.image import AxesImage

from robustsoup.errors import CoefficientError, RequestError
from robustsoup.reports.learned_curves import group_into_curves
from robustsoup.reports.measures import LAYERWISE_ROLES, StoredRun, group_by_section
from robustsoup.reports.style import (
    INK,
    MUTED,
    PALETTE,
    STYLE,
    Plot,
    add_footer,
    add_title,
    clean_text,
    new_figure,
    number_stem,
)
from robustsoup.reports.tables import Table, name_ingredients, name_layer, tabulate_soup
from robustsoup.runs.results import ResultRow, Results
from robustsoup.soups.coefficients import Coefficients

MAX_SOUP_COLUMNS = 3
MAX_NAMES = 40
MAX_LAYER_LETTERS = 34
MAX_WIDTH, MEASURE_WIDTH = 8.0, 0.5  # inches
MOVED_LIMITS = (0.1, 0.2, 0.5, 1.0)
MEASURES = {
    "entropy": "its entropy",
    "moved": "how far it moved from the start",
    "slope": "how steep the loss was",
}
"""Narrow columns next to the shares, and their names in captions."""

LabelledSoups = Sequence[tuple[str, Coefficients]]


def draw_coefficients(run: StoredRun) -> tuple[list[Plot], str]:
    """Draw one figure for each section of learned or dialled soups, from files of the run.

    Returns:
        The figures, and the reason if there is none or a section was left out.
    """
    plots: list[Plot] = []
    reason = ""
    results = run.results
    for section, rows in group_by_section(results.rows, *LAYERWISE_ROLES).items():
        ordered = [row for curve in group_into_curves(rows) for row in curve.rows]
        try:
            soups = _load_soups(ordered, run.folder)
            if soups:
                plot = _plot_coefficients(
                    [(_label_soup(row), coefficients) for row, coefficients in soups],
                    name_ingredients(*soups[0]),
                    f"{clean_text(results.name)}: coefficients by layer, {clean_text(section)}",
                    stem=number_stem("coefficients", len(plots)),
                    section=section,
                    results=results,
                )
                plots.append(plot)
        except RequestError as error:
            reason = str(error)
    return plots, reason or ("" if plots else "no soup was learned")


@rc_context(STYLE)
def draw_learned(coefficients: Coefficients, names: Sequence[str], title: str) -> Plot:
    """Draw the coefficients of one soup.

    Args:
        coefficients: The coefficients.
        names: One name for each ingredient.
        title: Title of the figure.

    Returns:
        The figure "coefficients", for `save_plot`.

    Raises:
        CoefficientError: The number of names differs from the number of ingredients.
    """
    return _plot_coefficients([("", coefficients)], names, clean_text(title, 60))


@rc_context(STYLE)
def draw_dial(dials: LabelledSoups, names: Sequence[str], title: str) -> Plot:
    """Draw the coefficients of several soups of one network and the same ingredients.

    Args:
        dials: (label, coefficients) of each soup.
        names: One name for each ingredient.
        title: Title of the figure.

    Returns:
        The figure "coefficients", for `save_plot`.

    Raises:
        CoefficientError: There is no soup, the number of names differs from the number of
            ingredients, or the soups are of different layers or ingredients.
    """
    if not dials:
        raise CoefficientError("dials: got none, expected at least one soup to draw")
    return _plot_coefficients(dials, names, clean_text(title, 60))


def tabulate_all_soups(run: StoredRun) -> list[Table]:
    """Tabulate the coefficients by layer of all soups whose files can be read."""
    tables: list[Table] = []
    for rows in group_by_section(run.results.rows, *LAYERWISE_ROLES).values():
        ordered = [row for curve in group_into_curves(rows) for row in curve.rows]
        for row in ordered:
            try:
                soups = _load_soups([row], run.folder)
            except RequestError:  # `write_coefficient_tables` reports it
                continue
            tables += [
                tabulate_soup(_label_soup(row), coefficients, name_ingredients(row, coefficients))
                for _, coefficients in soups
            ]
    return tables


def _load_soups(rows: Sequence[ResultRow], folder: Path) -> list[tuple[ResultRow, Coefficients]]:
    """Load the coefficients of the rows with the same layers and ingredients as the first row."""
    soups = [
        (row, Coefficients.load(folder / row.coefficients_file))
        for row in rows
        if row.coefficients_file
    ]
    return [soup for soup in soups if _layout_of(soup[1]) == _layout_of(soups[0][1])]


def _layout_of(coefficients: Coefficients) -> tuple[tuple[str, ...], int]:
    return coefficients.layers, coefficients.alpha.shape[1]


def _label_soup(row: ResultRow) -> str:
    if row.at is not None:
        return f"t = {row.at:g}" + (f", {row.threat}" if row.threat else "")
    objective = f", {row.objective}" if row.objective and row.objective != "ce" else ""
    return (row.threat or row.name) + objective


def _plot_coefficients(
    soups: LabelledSoups,
    names: Sequence[str],
    title: str,
    *,
    stem: str = "coefficients",
    section: str = "",
    results: Results | None = None,
) -> Plot:
    tables = tuple(tabulate_soup(label, coefficients, names) for label, coefficients in soups)
    if len({_layout_of(coefficients) for _, coefficients in soups}) > 1:
        raise CoefficientError(
            "coefficients: soups of different layers or ingredients; expected those of one network"
        )
    scales = _choose_scales(soups)
    figure, blocks = _new_coefficient_figure(soups, scales)
    image = None
    for (label, coefficients), block in zip(soups, blocks, strict=True):
        axes = figure.add_subplot(block[0])
        axes.set_title(clean_text(label, 26), loc="left", fontsize=9)
        image = _draw_shares(axes, coefficients, names, scales)
        _format_layer_axis(axes, coefficients.layers, named=block[0].is_first_col())
        for measure, place in zip(scales.measures, block[1:], strict=True):
            values = _measure_layers(coefficients, measure)
            if values is not None:
                axes = figure.add_subplot(place)
                _draw_measure(axes, measure, values, len(names), scales)
                _format_layer_axis(axes, coefficients.layers, named=False)
    if image is None:
        _add_share_legend(figure, names, title)
    else:
        _add_share_bar(figure, image, len(names), scales, title)
    add_footer(figure, _describe_columns(scales), results)
    subject = f"{len(soups)} learned soups" if len(soups) > 1 else "a learned soup"
    measures = " and ".join(MEASURES[measure] for measure in scales.measures)
    caption = (
        f"Share of each ingredient in every layer of {subject}"
        f"{f' ({section})' if section else ''}, with {measures}."
    )
    return Plot(stem, figure, caption, tables)


def _new_coefficient_figure(
    soups: LabelledSoups, scales: "_MeasureScales"
) -> tuple[Figure, list[list[SubplotSpec]]]:
    """Create an empty figure, and for each soup the places of its shares and measures."""
    layers, n = _layout_of(soups[0][1])
    is_heat_map = n > len(PALETTE)
    share_width = float(np.clip(0.13 * n, 1.4, 5.4)) if is_heat_map else 1.15
    widths = [share_width, *[MEASURE_WIDTH] * len(scales.measures)]
    lines = math.ceil(len(soups) / max(1, min(MAX_SOUP_COLUMNS, int(MAX_WIDTH / sum(widths)))))
    columns = math.ceil(len(soups) / lines)
    height = float(np.clip(0.15 * len(layers), 0.9, 7.5)) + (1.1 if is_heat_map else 0)
    letters = min(MAX_LAYER_LETTERS, max(len(name_layer(layer)) for layer in layers))
    width = max(0.7 + 0.055 * letters + columns * sum(widths), 5.2)
    figure = new_figure(
        width,
        lines * (height + 0.8) + 1.4,
        w_pad=0.04,
        wspace=0.0,
        rect=(0.1 / width, 0, 1 - 0.2 / width, 1),
    )
    grid = figure.add_gridspec(lines, columns * len(widths), width_ratios=widths * columns)
    starts = [(i // columns, i % columns * len(widths)) for i in range(len(soups))]
    return figure, [[grid[line, start + k] for k in range(len(widths))] for line, start in starts]


def _measure_layers(coefficients: Coefficients, measure: str) -> np.ndarray | None:
    """Return (layers,): entropy, moved or slope; None where the file does not hold it."""
    values = {
        "entropy": coefficients.entropy(),
        "moved": coefficients.movement(),
        "slope": coefficients.slopes,
    }[measure]
    return None if values is None else values.double().numpy()


@dataclass(frozen=True)
class _MeasureScales:
    """Scales that the soups of a figure share, so that they can be compared.

    Attributes:
        measures: The measures that at least one soup has.
        largest_share: The largest share of an ingredient, whatever its sign.
        signed: Whether some shares are negative.
        moved_limit: Right end of the axis "moved".
        slope_decades: Exponents of both ends of the axis "slope"; None if no slope is positive.
        equal_slopes: Whether several soups all have the same slopes.
    """

    measures: tuple[str, ...]
    largest_share: float
    signed: bool
    moved_limit: float
    slope_decades: tuple[int, int] | None
    equal_slopes: bool


def _choose_scales(soups: LabelledSoups) -> _MeasureScales:
    values = {
        measure: [
            layers
            for _, coefficients in soups
            if (layers := _measure_layers(coefficients, measure)) is not None
        ]
        for measure in MEASURES
    }
    largest_move = max((float(layers.max()) for layers in values["moved"]), default=0.0)
    slopes = np.concatenate([np.empty(0), *values["slope"]])
    return _MeasureScales(
        measures=tuple(measure for measure, layers in values.items() if layers),
        largest_share=max(float(coefficients.alpha.abs().max()) for _, coefficients in soups),
        signed=any(bool((coefficients.alpha < 0).any()) for _, coefficients in soups),
        moved_limit=next((limit for limit in MOVED_LIMITS if largest_move <= limit), 1.0),
        slope_decades=_find_decades(slopes[slopes > 0]),
        equal_slopes=len(soups) == len(values["slope"]) > 1
        and all(np.array_equal(layers, values["slope"][0]) for layers in values["slope"]),
    )


def _find_decades(positive: np.ndarray) -> tuple[int, int] | None:
    if not positive.size:
        return None
    low, high = math.floor(np.log10(positive.min())), math.ceil(np.log10(positive.max()))
    return low, max(high, low + 1)


def _draw_measure(
    axes: Axes, measure: str, values: np.ndarray, n: int, scales: _MeasureScales
) -> None:
    """Draw a narrow column: a measure (layers,) of a soup of n ingredients."""
    if measure == "entropy":
        _draw_entropy(axes, values, math.log(n))
    elif measure == "moved":
        _draw_layer_line(axes, values)
        axes.set_xlim(0, scales.moved_limit)
        _set_end_ticks(axes, 0, scales.moved_limit)
    else:
        _draw_slope(axes, values, scales.slope_decades)
    axes.set_xlabel(measure, fontsize=8)


def _draw_entropy(axes: Axes, values: np.ndarray, log_n: float) -> None:
    _draw_layer_line(axes, values)
    axes.axvline(log_n, color=MUTED, linestyle=":", linewidth=1)
    axes.set_xlim(0, 1.08 * log_n if log_n else 1)
    _set_end_ticks(axes, 0, math.floor(2 * log_n) / 2 or 1)


def _draw_slope(axes: Axes, values: np.ndarray, decades: tuple[int, int] | None) -> None:
    low, high = decades or (0, 1)
    zero = values <= 0
    axes.set_xscale("log")
    axes.set_xlim(10.0**low, 10.0**high)
    _draw_layer_line(axes, np.where(zero, 10.0**low, values))
    if zero.any():
        axes.plot(
            np.full(zero.sum(), 10.0**low),
            zero.nonzero()[0],
            "o",
            color=INK,
            markerfacecolor="white",
            markersize=2.8,
            markeredgewidth=0.7,
            clip_on=False,
            zorder=4,
        )
    axes.minorticks_off()
    labels = [f"1e{low}", f"1e{high}"] if decades else ["0", ""]
    _set_end_ticks(axes, 10.0**low, 10.0**high, labels)


def _describe_columns(scales: _MeasureScales) -> str:
    """Explain the columns, for the footer."""
    parts = [
        "layers in the network's order · entropy in nats; the dotted line is the uniform soup's"
    ]
    if "moved" in scales.measures:
        parts.append("moved: share of the weight that changed ingredient while learning")
    if "slope" in scales.measures:
        equal = ", the same for all soups" if scales.equal_slopes else ""
        parts.append(f"slope: mean norm of dL/dlogits{equal}, log scale; open dots: 0")
    return " · ".join(parts)


def _draw_layer_line(axes: Axes, values: np.ndarray) -> None:
    size = 2.2 if len(values) <= MAX_NAMES else 1
    axes.plot(
        values, range(len(values)), "-o", color=INK, linewidth=0.8, markersize=size, clip_on=False
    )


def _set_end_ticks(axes: Axes, low: float, high: float, labels: Sequence[str] = ()) -> None:
    axes.set_xticks([low, high], labels or [f"{low:g}", f"{high:g}"])
    left, right = axes.get_xticklabels()
    left.set_horizontalalignment("left")
    right.set_horizontalalignment("right")


def _draw_shares(
    axes: Axes, coefficients: Coefficients, names: Sequence[str], scales: _MeasureScales
) -> AxesImage | None:
    """Draw bars, or a heat map (returned) if there are more ingredients than colours."""
    if len(names) > len(PALETTE):
        return _draw_share_map(axes, coefficients, names, scales)
    _draw_share_bars(axes, coefficients)
    return None


def _draw_share_bars(axes: Axes, coefficients: Coefficients) -> None:
    alpha = coefficients.alpha.numpy()
    layers, n = alpha.shape
    left, right = np.zeros(layers), np.zeros(layers)
    for i, colour in enumerate(PALETTE[:n]):
        is_negative = alpha[:, i] < 0
        axes.barh(
            range(layers),
            alpha[:, i],
            left=np.where(is_negative, left, right),
            color=colour,
            height=0.86 if layers <= MAX_NAMES else 1.0,
        )
        left += np.where(is_negative, alpha[:, i], 0)
        right += np.where(is_negative, 0, alpha[:, i])
    if (alpha < 0).any():
        low, high = float(left.min()), float(right.max())
        axes.set_xlim(low, high)
        axes.set_xticks([low, 0, 1, high], [f"{low:.1f}", "0", "1", f"{high:.1f}"])
    else:
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("share", fontsize=8)


def _draw_share_map(
    axes: Axes, coefficients: Coefficients, names: Sequence[str], scales: _MeasureScales
) -> AxesImage:
    n, largest = len(names), scales.largest_share
    image = axes.imshow(
        coefficients.alpha.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu" if scales.signed else "Blues",
        norm=CenteredNorm(0, largest) if scales.signed else PowerNorm(0.5, 0, largest),
    )
    named = range(0, n, math.ceil(n / MAX_NAMES))
    axes.set_xticks(named, [clean_text(names[i], 18) for i in named], rotation=90)
    axes.set_xlabel("ingredient", fontsize=8)
    return image


def _add_share_legend(figure: Figure, names: Sequence[str], title: str) -> None:
    labels = [clean_text(name, 20) for name in names]
    columns = int(figure.get_figwidth() / (0.5 + 0.07 * max(map(len, labels))))
    figure.legend(
        [bars[0] for bars in figure.axes[0].containers],
        labels,
        loc="outside upper left",
        ncols=min(len(names), max(columns, 1)),
        alignment="left",
        title=title,
        title_fontproperties={"weight": "bold", "size": 11},
    )


def _add_share_bar(
    figure: Figure, image: AxesImage, n: int, scales: _MeasureScales, title: str
) -> None:
    add_title(figure, title, x=0.1 / figure.get_figwidth())
    bar = figure.colorbar(
        image, ax=figure.axes, location="top", shrink=0.4, aspect=30, anchor=(0.0, 0.5), pad=0.01
    )
    largest = scales.largest_share
    if scales.signed:
        bar.set_label("weight", fontsize=8)
        ticks = {-largest: f"{-largest:.2g}", 0.0: "0", largest: f"{largest:.2g}"}
    else:
        bar.set_label("share (square-root scale)", fontsize=8)
        ticks = {0.0: "0", 1 / n: f"1/{n}"}
        if largest > 4 / n:
            ticks[largest] = f"{largest:.2g}"
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(length=2, labelsize=7)
    bar.outline.set_visible(False)


def _format_layer_axis(axes: Axes, layers: tuple[str, ...], *, named: bool) -> None:
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.tick_params(length=2, labelsize=7)
    ticks = range(0, len(layers), math.ceil(len(layers) / MAX_NAMES)) if named else ()
    axes.set_yticks(
        list(ticks), [clean_text(name_layer(layers[i]), MAX_LAYER_LETTERS) for i in ticks]
    )
    axes.tick_params(axis="y", labelsize=7 if len(layers) <= 20 else 6)

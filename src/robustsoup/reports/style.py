"""The look that all figures share, and how figures are saved."""

import functools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from robustsoup.files import atomic_path
from robustsoup.reports.measures import CLEAN, SHIFT, PlotScale, count_samples, list_caveats
from robustsoup.reports.tables import Table
from robustsoup.runs.results import EvaluationProtocol, ResultRow, Results

FONT = "DejaVu Sans"
INK, MUTED, FAINT = "#1a1a1a", "#5f6368", "#d9dce0"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7f7f7f")
"""Eight colours that colour-blind readers can distinguish. Source: Okabe and Ito 2008."""
SEQUENTIAL_COLOURS = "viridis"
FOOTER_LETTERS_PER_INCH = 19
LAYOUT_PASSES = 2
STYLE: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 9,
    "text.usetex": False,
    "text.color": INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "robustsoup",
    "pdf.fonttype": 42,
}
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200},
    "svg": {"dpi": 200, "metadata": {"Date": None}},
    "pdf": {"dpi": 200, "metadata": {"CreationDate": None}},
}


@dataclass(frozen=True)
class Plot:
    """A figure for the report.

    Attributes:
        stem: Name of its files without the suffix.
        figure: The figure.
        caption: One sentence that describes the figure.
        tables: Tables to show with it.
    """

    stem: str
    figure: Figure
    caption: str
    tables: tuple[Table, ...] = ()


def new_figure(
    width: float,
    height: float,
    *,
    w_pad: float | None = None,
    h_pad: float | None = None,
    wspace: float | None = None,
    rect: tuple[float, float, float, float] = (0, 0, 1, 1),
) -> Figure:
    """Create an empty figure that needs no display and arranges its parts itself.

    Args:
        width: Width in inches.
        height: Height in inches.
        w_pad: Padding on the left and right of axes, in inches.
        h_pad: Padding above and below axes, in inches.
        wspace: Space between columns of axes, as a fraction of the width of the axes.
        rect: (left, bottom, width, height) of the used part, as fractions of the figure.
    """
    layout = ConstrainedLayoutEngine(w_pad=w_pad, h_pad=h_pad, wspace=wspace, rect=rect)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def settle_layout(figure: Figure) -> None:
    """Arrange the parts of a figure; axes of fixed aspect need several passes."""
    for _ in range(LAYOUT_PASSES):
        figure.draw_without_rendering()


def choose_columns(panels: int) -> int:
    """Choose the number of columns for panels side by side, at most three."""
    return 2 if panels in (2, 4) else min(panels, 3)


@rc_context(STYLE)
def save_plot(plot: Plot, folder: Path) -> None:
    """Write folder/<stem>.png, .svg and .pdf, each atomically.

    The parts are arranged once for all three formats.
    """
    plot.figure.draw_without_rendering()
    plot.figure.set_layout_engine("none")
    for axes in plot.figure.axes:
        # The layout's last bits differ from run to run and would enter the ids of the SVG.
        left, bottom, width, height = axes.get_position(original=True).bounds
        axes.set_position((round(left, 6), round(bottom, 6), round(width, 6), round(height, 6)))
    for ending, options in FORMATS.items():
        with atomic_path(folder / f"{plot.stem}.{ending}") as temporary:
            plot.figure.savefig(temporary, format=ending, **options)


def number_stem(stem: str, number: int) -> str:
    """Return `stem` for figure number 0, "stem-2" for number 1."""
    return stem if number == 0 else f"{stem}-{number + 1}"


@functools.cache
def _font_glyphs() -> frozenset[str]:
    return frozenset(map(chr, get_font(findfont(FONT)).get_charmap()))


def name_accuracy(measure: str) -> str:
    """Return what a measure is called in titles."""
    if measure == CLEAN:
        return "clean accuracy"
    if measure == SHIFT:
        return "accuracy under natural shift"
    return f"robust accuracy, {clean_text(measure)}"


def clean_text(text: object, limit: int = 30) -> str:
    """Prepare text for a figure.

    "Linf 8/255" becomes "L∞ 8/255", characters without a glyph in the font become "?", dollar signs
    are escaped, and text over `limit` letters is truncated.
    """
    letters = str(text).replace("Linf ", "L∞ ")
    letters = "".join(letter if letter in _font_glyphs() else "?" for letter in letters)
    letters = letters if len(letters) <= limit else letters[: limit - 1] + "…"
    return letters.replace("$", r"\$")


def format_percent(value: float) -> str:
    """Format 0.7132 as "71.3 %"."""
    return f"{100 * value:.1f} %"


def summarise_attack(protocol: EvaluationProtocol, split: str, rows: Sequence[ResultRow]) -> str:
    """Summarise the attack and the number of samples, for the footer of a figure."""
    attack = (
        protocol.attack
        + (f" on {protocol.loss}" if protocol.loss else "")
        + (f", {protocol.steps} {protocol.step_word}" if protocol.steps else "")
        + (f", {protocol.restarts} restarts" if protocol.restarts != 1 else "")
    )
    parts = [attack, f"{count_samples(rows, split)} {split} samples"]
    if protocol.precision:
        parts.append(protocol.precision)
    if split == protocol.select_on:
        if any(row.attacked is not None for row in rows):
            which = "screened soups" if protocol.screened else "soups attacked on a part"
            parts.append(f"accuracies of {which} are estimates")
        elif protocol.screened:
            parts.append("accuracies of screened soups are upper bounds")
    return clean_text(" · ".join(parts), 200)


def add_title(figure: Figure, title: str, x: float = 0.01) -> None:
    """Write the title at the upper left."""
    figure.suptitle(title, x=x, ha="left", fontsize=11, weight="bold")


def add_footer(figure: Figure, text: str, results: Results | None) -> None:
    """Write small print at the lower left, below the caveats of the run."""
    caveats = list_caveats(results) if results else []
    width = int(FOOTER_LETTERS_PER_INCH * figure.get_figwidth())
    lines = textwrap.wrap(" · ".join(caveats), width) + textwrap.wrap(text, width)
    figure.supxlabel(
        "\n".join(lines), x=0.01, ha="left", fontsize=7, color=INK if caveats else MUTED
    )


def add_accuracy_grid(axes: Axes, margin: float) -> None:
    """Set the margins and grid lines of an accuracy plot."""
    axes.margins(margin)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_intervals(
    axes: Axes,
    scale: PlotScale,
    rows: Sequence[ResultRow],
    *,
    colour: str,
    opacity: float,
    zorder: int,
) -> None:
    """Draw the confidence intervals of both accuracies of each row."""
    x, y = scale.coordinates(rows).T
    x_lengths, y_lengths = scale.interval_lengths(rows)
    axes.errorbar(
        x,
        y,
        xerr=x_lengths,
        yerr=y_lengths,
        fmt="none",
        ecolor=colour,
        alpha=opacity,
        elinewidth=0.7,
        zorder=zorder,
    )

"""The look that the figures share: type, colours, labels that keep out of each other's way, and how files are saved."""

import functools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.transforms import Bbox

from robustsoup.files import atomic_path
from robustsoup.reports.results import Row, caveats, samples
from robustsoup.reports.tables import Table

FONT = "DejaVu Sans"
INK, MUTED, FAINT = "#1a1a1a", "#5f6368", "#d9dce0"
# Okabe and Ito 2008: eight colours that the colour-blind tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7f7f7f")
LETTERS_PER_INCH = 19  # of the small print
HALO = [patheffects.withStroke(linewidth=2.2, foreground="white")]
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
    """A figure with the name of its files (without ending), a sentence that says what it shows, and tables beside it."""

    stem: str
    figure: Figure
    caption: str
    tables: tuple[Table, ...] = ()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches that needs no display and arranges its parts by itself."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@rc_context(STYLE)
def save(plot: Plot, folder: Path) -> None:
    """Write folder/<stem>.png, .svg and .pdf, each whole or not at all. The parts are arranged once for all three."""
    plot.figure.draw_without_rendering()
    plot.figure.set_layout_engine("none")
    for axes in (
        plot.figure.axes
    ):  # the solver's last bits differ from run to run, and would be in the ids of the SVG
        axes.set_position(np.round(axes.get_position(original=True).bounds, 6))
    for ending, options in FORMATS.items():
        with atomic_path(folder / f"{plot.stem}.{ending}") as temporary:
            plot.figure.savefig(temporary, format=ending, **options)


def numbered(stem: str, number: int) -> str:
    """stem for the first of several figures, stem-2 for the second."""
    return stem if number == 0 else f"{stem}-{number + 1}"


@functools.cache
def _glyphs() -> frozenset[str]:
    return frozenset(map(chr, get_font(findfont(FONT)).get_charmap()))


def plain(text: str, limit: int = 30) -> str:
    """`text` as a figure may show it: "Linf 8/255" as "L∞ 8/255", no mathematics, "?" for a glyph that the font lacks."""
    text = "".join(
        letter if letter in _glyphs() else "?" for letter in str(text).replace("Linf ", "L∞ ")
    )
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.replace("$", r"\$")


def percent(value: float) -> str:
    """0.7132 -> "71.3 %"."""
    return f"{100 * value:.1f} %"


def attack_line(protocol: dict[str, Any], split: str, rows: Sequence[Row]) -> str:
    """The attack and the number of samples, for the small print below a figure."""
    restarts = protocol.get("restarts", 1)
    bounded = protocol.get("screened") and split == protocol["select_on"]
    parts = [
        f"{protocol.get('attack', 'attack not recorded')}"
        + (f" on {protocol['loss']}" if protocol.get("loss") else "")
        + (f", {protocol['steps']} steps" if protocol.get("steps") else "")
        + (f", {restarts} restarts" if restarts != 1 else ""),
        f"{samples(rows, split)} {split} samples",
        *([protocol["precision"]] if protocol.get("precision") else []),
        *(["beaten soups were only screened: upper bounds"] if bounded else []),
    ]
    return plain(" · ".join(parts), 200)


def footer(figure: Figure, text: str, results: dict[str, Any] | None) -> None:
    """Small print at the lower left of the figure, below what flatters the run's numbers; results: None for no run."""
    warned = caveats(results) if results else []
    width = int(LETTERS_PER_INCH * figure.get_figwidth())
    lines = textwrap.wrap(" · ".join(warned), width) + textwrap.wrap(text, width)
    figure.supxlabel(
        "\n".join(lines), x=0.01, ha="left", fontsize=7, color=INK if warned else MUTED
    )


def shades(n: int) -> list[Any]:
    """n colours to tell parts apart, the first eight safe for the colour-blind."""
    return (
        list(PALETTE[:n]) if n <= len(PALETTE) else list(colormaps["viridis"](np.linspace(0, 1, n)))
    )


_SIDES = [(1, 0.7), (-1, 0.7), (1, -0.7), (-1, -0.7), (0, 1), (0, -1), (1, 0), (-1, 0)]


def place_labels(
    axes: Axes,
    labels: Sequence[tuple[float, float, str, str]],
    avoid: np.ndarray,
    *,
    size: float = 8,
) -> list[Bbox]:
    """Write each (x, y, text, colour) beside its point, where it covers least of `avoid` (k, 2) and of other labels.

    Limits and layout must be final: the sides are compared in pixels. Returns the box of each label, in pixels.
    """
    axes.figure.draw_without_rendering()
    pixels = axes.figure.dpi / 72
    obstacles = axes.transData.transform(avoid)
    taken: list[Bbox] = []
    for x, y, text, colour in labels:
        note = axes.annotate(
            text,
            (x, y),
            xycoords=axes.transData,
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            color=colour,
            zorder=8,
            annotation_clip=False,
            path_effects=HALO,
        )
        note.set_in_layout(False)
        box = note.get_window_extent()
        choices = []
        for order, (side_x, side_y, gap) in enumerate(
            (a, b, gap) for gap in (8, 15, 23) for a, b in _SIDES
        ):
            shift = (
                side_x * (gap * pixels + box.width / 2),
                side_y * (gap * pixels + box.height / 2),
            )
            choices.append(
                (_cost(box.translated(*shift), obstacles, taken, axes.bbox) + order / 100, shift)
            )
        _, shift = min(choices)
        note.set_position((shift[0] / pixels, shift[1] / pixels))
        taken.append(box.translated(*shift))
    return taken


def _cost(box: Bbox, obstacles: np.ndarray, taken: Sequence[Bbox], frame: Bbox) -> float:
    wide = box.padded(2)
    inside = (obstacles > (wide.x0, wide.y0)) & (obstacles < (wide.x1, wide.y1))
    outside = wide.x0 < frame.x0 or wide.x1 > frame.x1 or wide.y0 < frame.y0 or wide.y1 > frame.y1
    return (
        inside.all(axis=1).sum() + 50 * sum(wide.overlaps(other) for other in taken) + 20 * outside
    )


def outline(box: Bbox) -> np.ndarray:
    """(24, 2): points spread over a box, for other labels to keep clear of."""
    x, y = np.meshgrid(np.linspace(box.x0, box.x1, 8), np.linspace(box.y0, box.y1, 3))
    return np.column_stack([x.ravel(), y.ravel()])


def label_contour(axes: Axes, text: str, pieces: list[np.ndarray], near: np.ndarray) -> np.ndarray:
    """Write `text` on the contour at its widest gap, if there is room; returns `near` (k, 2), in pixels, with it added."""
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        return near
    shares = np.linspace(0, 1, 8)[:, None, None]
    spots = np.concatenate(
        [(piece[:-1] + shares * (piece[1:] - piece[:-1])).reshape(-1, 2) for piece in pieces]
    )
    pixels = axes.transData.transform(spots)
    room = np.linalg.norm(pixels[:, None] - near[None], axis=2).min(1)
    widest = int(room.argmax())
    if room[widest] < 9 * axes.figure.dpi / 72:
        return near
    note = axes.annotate(
        text,
        spots[widest],
        xycoords=axes.transData,
        ha="center",
        va="center",
        fontsize=7,
        color=INK,
        zorder=3,
        path_effects=HALO,
    )
    return np.concatenate([near, outline(note.get_window_extent())])

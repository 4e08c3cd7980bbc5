"""Robust loss on planes through three checkpoints (Fig. 7 of Huang 2023), as contour maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

from robustsoup.diagnosis.landscape import read_landscape
from robustsoup.errors import RequestError
from robustsoup.reports.convexity import mask_triangle, survey_loss
from robustsoup.reports.labels import (
    Label,
    label_contour,
    place_labels,
    spread_over_box,
    spread_over_line,
)
from robustsoup.reports.measures import StoredRun
from robustsoup.reports.style import (
    FAINT,
    INK,
    SEQUENTIAL_COLOURS,
    Plot,
    add_footer,
    add_title,
    choose_columns,
    clean_text,
    format_percent,
    new_figure,
    settle_layout,
)
from robustsoup.reports.tables import Cell, Table
from robustsoup.runs.results import Results
from robustsoup.schema import MisfitError

LEVELS = 16
LABELLED_STEP = 3
"""One in LABELLED_STEP levels is labelled with its value."""
DARK_SHARE = 0.55
"""Contour lines are white below this share of the scale."""
MARKERS = ("o", "s", "^")
MIN_RELATIVE_LOSS = 1e-4
"""Losses below this fraction of the largest loss are raised to it."""
LISTED_MINIMA = 6


@dataclass(frozen=True)
class LossPlane:
    """Losses on a plane through three checkpoints.

    Attributes:
        name: Name of the plane.
        checkpoints: Names of the three checkpoints.
        x: (columns,) coordinates in even steps.
        y: (rows,) coordinates in even steps.
        corners: (3, 2) positions of the checkpoints.
        loss: (rows, columns) robust loss in nats; NaN where not finite.
        accuracy: (rows, columns) robust accuracy, or None.
        clean_loss: (rows, columns) clean loss in nats, or None.
        settings: How the plane was measured, for the footer.
    """

    name: str
    checkpoints: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    corners: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray | None
    clean_loss: np.ndarray | None
    settings: str

    def __post_init__(self) -> None:
        """Check shapes and values; raises ValueError."""
        shape = (len(self.y), len(self.x))
        shapes = [
            values.shape
            for values in (self.loss, self.accuracy, self.clean_loss)
            if values is not None
        ]
        if min(shape) < 2 or any(other != shape for other in shapes):
            raise ValueError(f"got maps of {shapes}, expected (len(y), len(x)), each 2 or more")
        if (
            self.corners.shape != (3, 2)
            or len(self.checkpoints) != 3
            or not np.isfinite(self.corners).all()
        ):
            raise ValueError("expected three checkpoints, each with a position of two numbers")
        for steps in (np.diff(self.x), np.diff(self.y)):
            if not (steps > 0).all() or not np.allclose(steps, steps[0], rtol=1e-3):
                raise ValueError("x, y: expected to rise in even steps")
        if not (self.loss > 0).any():
            raise ValueError("loss: expected a number above 0")

    def find_nearest(self, place: np.ndarray) -> tuple[int, int]:
        """Return (row, column) of the point of the grid nearest to a place."""
        return int(np.abs(self.y - place[1]).argmin()), int(np.abs(self.x - place[0]).argmin())

    def losses_in_triangle(self) -> np.ndarray:
        """Return (k,): finite losses between the checkpoints and at the points nearest to them."""
        inside = mask_triangle(self.x, self.y, self.corners)
        for corner in self.corners:
            inside[self.find_nearest(corner)] = True
        return self.loss[inside & np.isfinite(self.loss)]


def draw_landscape(run: StoredRun) -> tuple[list[Plot], str]:
    """Draw one figure with a panel for each plane of the run.

    Returns:
        The figure, and the reason if there is none or a plane was left out.
    """
    planes, reasons = read_planes(run)
    if not planes and not reasons:
        reasons.append("no plane through three checkpoints was measured")
    plots = [_plot_planes(run.results, planes)] if planes else []
    return plots, "; ".join(reasons)


def read_planes(run: StoredRun) -> tuple[list[LossPlane], list[str]]:
    """Read the planes of a run; returns them, and why any cannot be read."""
    planes: list[LossPlane] = []
    reasons: list[str] = []
    for entry in run.results.planes:
        try:
            planes.append(load_plane(run.folder / entry.file, entry.name))
        except RequestError as error:
            reasons.append(str(error))
    return planes, reasons


def load_plane(path: Path, name: str) -> LossPlane:
    """Read a plane that a run wrote.

    Args:
        path: Its JSON file.
        name: Name of the plane in figures and tables.

    Raises:
        RequestError: The file is missing or broken.
    """
    hint = "expected a file that `robustsoup run` wrote; run the recipe again"
    try:
        content = read_landscape(path)
        return LossPlane(
            name=name,
            checkpoints=tuple(map(str, content["checkpoints"])),
            x=np.array(content["x"], dtype=float),
            y=np.array(content["y"], dtype=float),
            corners=np.array(content["positions"], dtype=float),
            loss=_parse_map(content["loss"]),
            accuracy=_parse_optional_map(content.get("accuracy")),
            clean_loss=_parse_optional_map(content.get("clean_loss")),
            settings=_describe_settings(content),
        )
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; {hint}") from None
    except (MisfitError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: not a plane ({reason}); {hint}") from None


def _parse_map(rows: Any) -> np.ndarray:
    values = np.array(rows, dtype=float)  # None becomes NaN
    return np.where(np.isfinite(values), values, np.nan)


def _parse_optional_map(rows: Any) -> np.ndarray | None:
    return None if rows is None else _parse_map(rows)


def _describe_settings(content: dict[str, Any]) -> str:
    parts = [
        content.get("threat"),
        content.get("attack_steps") and f"{content['attack_steps']} steps",
        content.get("samples") and f"{content['samples']} {content.get('split') or ''} samples",
        content.get("buffers") and f"buffers: {content['buffers']}",
        content.get("precision"),
    ]
    return " · ".join(clean_text(part, 60) for part in parts if part)


def _plot_planes(results: Results, planes: Sequence[LossPlane]) -> Plot:
    columns = choose_columns(len(planes))
    lines = math.ceil(len(planes) / columns)
    width = 4.2 if columns == 1 else 3.4
    ratio = float(np.clip(max(np.ptp(plane.y) / np.ptp(plane.x) for plane in planes), 0.4, 1.5))
    figure = new_figure(
        width * columns + 0.9, (0.88 * width * ratio + 0.4) * lines + 0.7, w_pad=0.06, h_pad=0.06
    )
    levels, exceeded = _choose_levels(planes)
    panels: list[tuple[LossPlane, Axes, ContourSet]] = []
    filled: list[ContourSet] = []
    for number, plane in enumerate(planes):
        axes = figure.add_subplot(lines, columns, number + 1)
        filled.append(_fill_contours(axes, plane, levels, exceeded))
        panels.append((plane, axes, _draw_contour_lines(axes, plane, levels)))
        _draw_corners(axes, plane)
        axes.set_title(clean_text(plane.name, 40), loc="left")
        if number % columns == 0:
            axes.set_ylabel("distance in weight space")
        if number + columns >= len(planes):
            axes.set_xlabel("distance in weight space")
    add_title(figure, f"{clean_text(results.name)}: robust loss on planes")
    _add_loss_bar(figure, filled[0], levels)
    gaps = " · grey: not finite" * any(np.isnan(plane.loss).any() for plane in planes)
    settings = " / ".join(dict.fromkeys(plane.settings for plane in planes))
    add_footer(figure, f"{settings} · levels spaced by a constant factor{gaps}", results)
    settle_layout(figure)
    for plane, axes, contours in panels:
        _label_plane(axes, plane, contours, levels)
    names = "; ".join(f"{plane.name}: {', '.join(plane.checkpoints)}" for plane in planes)
    caption = (
        "Robust loss (nats) of the weighted averages on planes through three checkpoints "
        f"({names}), on one scale."
    )
    return Plot("landscape", figure, caption, tuple(_tabulate_plane(plane) for plane in planes))


def _choose_levels(planes: Sequence[LossPlane]) -> tuple[np.ndarray, bool]:
    """Choose log-spaced levels from the least loss to the 95th percentile of all losses.

    The levels reach at least the greatest loss in a triangle.

    Returns:
        The levels, and whether a loss exceeds them.
    """
    losses = np.concatenate([plane.loss[np.isfinite(plane.loss)] for plane in planes])
    high = max(
        float(np.percentile(losses, 95)),
        *(float(plane.losses_in_triangle().max(initial=0)) for plane in planes),
        0.0,
    )
    high = high if high > 0 else float(losses.max())
    low = max(float(losses.min()), MIN_RELATIVE_LOSS * high)
    exceeded = bool(losses.max() > high)
    if high < 1.001 * low:
        low, high = 0.97 * low, 1.03 * high
    return np.geomspace(low, high, LEVELS), exceeded


def _clip_loss(plane: LossPlane, levels: np.ndarray) -> np.ma.MaskedArray[Any, Any]:
    return np.ma.masked_invalid(np.maximum(plane.loss, levels[0]))


def _fill_contours(axes: Axes, plane: LossPlane, levels: np.ndarray, exceeded: bool) -> ContourSet:
    axes.set_facecolor(FAINT)
    axes.set_aspect("equal")
    return axes.contourf(
        plane.x,
        plane.y,
        _clip_loss(plane, levels),
        levels=levels,
        norm=LogNorm(levels[0], levels[-1]),
        cmap=SEQUENTIAL_COLOURS,
        extend="max" if exceeded else "neither",
        zorder=1,
    )


def _draw_contour_lines(axes: Axes, plane: LossPlane, levels: np.ndarray) -> ContourSet:
    colours = ["white" if share < DARK_SHARE else INK for share in np.linspace(0, 1, LEVELS)]
    return axes.contour(
        plane.x,
        plane.y,
        _clip_loss(plane, levels),
        levels=levels,
        colors=colours,
        linewidths=0.5,
        alpha=0.8,
        zorder=2,
    )


def _draw_corners(axes: Axes, plane: LossPlane) -> None:
    axes.plot(
        *plane.corners[[0, 1, 2, 0]].T,
        "--",
        color=INK,
        linewidth=0.9,
        zorder=4,
        path_effects=[patheffects.withStroke(linewidth=2, foreground="white", alpha=0.7)],
    )
    for corner, marker in zip(plane.corners, MARKERS, strict=True):
        axes.plot(
            *corner,
            marker,
            color="white",
            markeredgecolor=INK,
            markeredgewidth=1.2,
            markersize=7.5,
            zorder=6,
            clip_on=False,
        )
    axes.set_xlim(plane.x[0], plane.x[-1])
    axes.set_ylim(plane.y[0], plane.y[-1])


def _add_loss_bar(figure: Figure, filled: ContourSet, levels: np.ndarray) -> None:
    bar = figure.colorbar(filled, ax=figure.axes, shrink=0.85, pad=0.02, aspect=25)
    bar.set_ticks(levels[::LABELLED_STEP].tolist(), labels=format_levels(levels)[::LABELLED_STEP])
    bar.ax.minorticks_off()
    bar.set_label("robust loss (nats, log scale)")
    bar.outline.set_visible(False)


def format_levels(levels: np.ndarray) -> list[str]:
    """Format levels with three digits, or with as many as it takes to distinguish all labels."""
    labelled = levels[::LABELLED_STEP]
    digits = next(
        (n for n in range(3, 9) if len({f"{level:.{n}g}" for level in labelled}) == len(labelled)),
        9,
    )
    return [f"{level:.{digits}g}" for level in levels]


def _label_plane(axes: Axes, plane: LossPlane, contours: ContourSet, levels: np.ndarray) -> None:
    edges = [
        spread_over_line(start, end, 30)
        for start, end in zip(plane.corners, np.roll(plane.corners, -1, axis=0), strict=True)
    ]
    obstacles = np.concatenate([*edges, np.repeat(plane.corners, 5, axis=0)])
    names: list[Label] = [
        (*corner, clean_text(name, 18), INK)
        for corner, name in zip(plane.corners, plane.checkpoints, strict=True)
    ]
    boxes = place_labels(axes, names, obstacles, size=8.5)
    frame = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])
    rim = np.concatenate(
        [
            spread_over_line(start, end, 30)
            for start, end in zip(frame, np.roll(frame, -1, axis=0), strict=True)
        ]
    )
    pixels = [axes.transData.transform(obstacles), axes.transAxes.transform(rim)]
    avoid = np.concatenate([*pixels, *[spread_over_box(box) for box in boxes]])
    texts = format_levels(levels)
    for number in range(LABELLED_STEP, LEVELS, LABELLED_STEP):  # level 0 is a single point
        avoid = label_contour(axes, texts[number], contours.allsegs[number], avoid)


def _tabulate_plane(plane: LossPlane) -> Table:
    lines: list[dict[str, Cell]] = []
    for name, corner in zip(plane.checkpoints, plane.corners, strict=True):
        row, column = plane.find_nearest(corner)
        distance = math.dist(corner, (plane.x[column], plane.y[row]))
        point: dict[str, Cell] = {"point": f"nearest to {name}", "distance to it": distance}
        lines.append(point | _tabulate_point(plane, row, column))
    least = int(np.nanargmin(plane.loss))
    row, column = divmod(least, len(plane.x))
    point = {"point": "least loss of the grid", "distance to it": None}
    lines.append(point | _tabulate_point(plane, row, column))
    return Table(plane.name, _summarise_shape(plane), lines)


def _tabulate_point(plane: LossPlane, row: int, column: int) -> dict[str, Cell]:
    def format_loss(values: np.ndarray | None) -> str | None:
        loss = None if values is None else values[row, column]
        return None if loss is None or np.isnan(loss) else f"{loss:.4f}"

    accuracy = None if plane.accuracy is None else plane.accuracy[row, column]
    measured = accuracy is not None and np.isfinite(accuracy)
    return {
        "x": float(plane.x[column]),
        "y": float(plane.y[row]),
        "robust loss": format_loss(plane.loss),
        "clean loss": format_loss(plane.clean_loss),
        "robust accuracy": format_percent(accuracy) if measured else None,
    }


def _summarise_shape(plane: LossPlane) -> str:
    shape = survey_loss(plane.x, plane.y, plane.loss, plane.corners)
    listed = ", ".join(
        f"({plane.x[column]:.3g}, {plane.y[row]:.3g})"
        for row, column in shape.minima[:LISTED_MINIMA]
    )
    rest = len(shape.minima) - LISTED_MINIMA
    places = (f" at {listed}" if listed else "") + (f" and {rest} more" if rest > 0 else "")
    rows, columns = plane.loss.shape
    return (
        f"robust loss on {columns} x {rows} points; strict local minima inside the grid: "
        f"{len(shape.minima)}{places}; between the checkpoints {shape.violations} of "
        f"{shape.triples} triples of neighbours violate convexity by more than {shape.margin:g} "
        f"nats, by {shape.worst:.3g} at most"
    )

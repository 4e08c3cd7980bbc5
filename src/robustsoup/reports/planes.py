"""The robust loss on planes through three checkpoints (the paper's Fig. 7): contour maps, and what they say of convexity."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

from robustsoup.errors import RequestError
from robustsoup.reports.style import (
    FAINT,
    INK,
    Plot,
    footer,
    label_contour,
    new_figure,
    numbered,
    outline,
    percent,
    place_labels,
    plain,
)
from robustsoup.reports.surface import Surface, in_triangle, survey
from robustsoup.reports.tables import Table

COLUMNS = 3
LEVELS, LABELLED = 16, 3  # contour lines, and every which of them has its number
COLOURS, DARK = "viridis", 0.55  # below this share of the scale lines are white
MARKERS = ("o", "s", "^")
DEEPEST = 1e-4  # the least loss that is told apart from 0, as a share of the greatest
_HINT = "expected what `robustsoup run` writes; run it again"


def draw_landscape(results: dict[str, Any], folder: Path) -> tuple[list[Plot], str]:
    """One figure with a panel for each plane of the run, from the files in `folder`.

    Also the reason, in one line, if there is none or a plane had to be left out.
    """
    planes, reasons = [], []
    for entry in results.get("planes") or []:
        try:
            planes.append(_Plane.load(folder, entry))
        except RequestError as error:
            reasons.append(str(error))
    plots = [_plot(results, planes, numbered("landscape", 0))] if planes else []
    return plots, "; ".join(reasons) or (
        "" if plots else "no plane through three checkpoints was measured"
    )


@dataclass(frozen=True)
class _Plane:
    """loss, accuracy, clean_loss: (rows, columns), NaN where not finite; corners: (3, 2); said: how it was measured."""

    name: str
    checkpoints: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    corners: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray | None
    clean_loss: np.ndarray | None
    said: str

    @classmethod
    def load(cls, folder: Path, entry: Any) -> "_Plane":
        """Raises RequestError, in one line, if the entry of results.json or its file is missing or broken."""
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            raise RequestError(f"planes: got {entry!r}, expected an object with a file; {_HINT}")
        path = folder / entry["file"]
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            plane = cls._of(held)
        except FileNotFoundError:
            raise RequestError(f"{path}: no such file; {_HINT}") from None
        except (OSError, LookupError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError(f"{path}: not a plane ({reason}); {_HINT}") from None
        return plane

    @classmethod
    def _of(cls, held: dict[str, Any]) -> "_Plane":
        x, y, corners = (np.array(held[key], dtype=float) for key in ("x", "y", "positions"))
        maps = {
            key: None if held.get(key) is None else _finite(held[key])
            for key in ("accuracy", "clean_loss")
        }
        plane = cls(
            str(held["name"]),
            tuple(map(str, held["checkpoints"])),
            x,
            y,
            corners,
            _finite(held["loss"]),
            **maps,
            said=_measured(held),
        )
        plane._check()
        return plane

    def _check(self) -> None:
        shape = (*self.y.shape, *self.x.shape)
        found = [
            self.loss,
            *(values for values in (self.accuracy, self.clean_loss) if values is not None),
        ]
        if len(shape) != 2 or min(shape) < 2 or any(values.shape != shape for values in found):
            raise ValueError(
                f"got maps of {[values.shape for values in found]}, expected (len(y), len(x)), each 2 or more"
            )
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

    def nearest(self, corner: np.ndarray) -> tuple[int, int]:
        """(row, column) of the grid's point nearest to a place."""
        return int(np.abs(self.y - corner[1]).argmin()), int(np.abs(self.x - corner[0]).argmin())

    @property
    def in_triangle(self) -> np.ndarray:
        """(k,): the finite losses in the triangle between the checkpoints, and at those."""
        kept = in_triangle(self.x, self.y, self.corners)
        for corner in self.corners:
            kept[self.nearest(corner)] = True
        return self.loss[kept & np.isfinite(self.loss)]


def _finite(rows: Any) -> np.ndarray:
    values = np.array(rows, dtype=float)  # None becomes NaN
    return np.where(np.isfinite(values), values, np.nan)


def _measured(held: dict[str, Any]) -> str:
    parts = [
        held.get("threat"),
        held.get("attack_steps") and f"{held['attack_steps']} steps",
        held.get("samples") and f"{held['samples']} {held.get('split') or ''} samples",
        held.get("buffers") and f"buffers: {held['buffers']}",
        held.get("precision"),
    ]
    return " · ".join(plain(part, 60) for part in parts if part)


def _plot(results: dict[str, Any], planes: list[_Plane], stem: str) -> Plot:
    columns = 2 if len(planes) in (2, 4) else min(COLUMNS, len(planes))
    lines = math.ceil(len(planes) / columns)
    wide = 4.2 if columns == 1 else 3.4
    ratio = float(np.clip(max(np.ptp(p.y) / np.ptp(p.x) for p in planes), 0.4, 1.5))
    figure = new_figure(wide * columns + 0.9, (0.88 * wide * ratio + 0.4) * lines + 0.7)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    levels, above = _levels(planes)
    drawn = []
    for number, plane in enumerate(planes):
        axes = figure.add_subplot(lines, columns, number + 1)
        drawn.append((plane, axes, *_panel(axes, plane, levels, above)))
        axes.set_title(plain(plane.name, 40), loc="left")
        if number % columns == 0:
            axes.set_ylabel("distance in weight space")
        if number + columns >= len(planes):
            axes.set_xlabel("distance in weight space")
    figure.suptitle(
        f"{plain(results['name'])}: robust loss on planes",
        x=0.01,
        ha="left",
        fontsize=11,
        weight="bold",
    )
    _colour_bar(figure, drawn[0][2], levels)
    gaps = " · grey: not finite" * any(np.isnan(plane.loss).any() for plane in planes)
    said = " / ".join(dict.fromkeys(plane.said for plane in planes))
    footer(figure, f"{said} · levels spaced by a constant factor{gaps}", results)
    for plane, axes, _, contours in drawn:
        _annotate(axes, plane, contours, levels)
    names = "; ".join(f"{plane.name}: {', '.join(plane.checkpoints)}" for plane in planes)
    caption = f"Robust loss (nats) of the weighted averages on planes through three checkpoints ({names}), on one scale."
    return Plot(stem, figure, caption, tuple(_table(plane) for plane in planes))


def _levels(planes: list[_Plane]) -> tuple[np.ndarray, bool]:
    """Log-spaced levels from the least loss to the 95th percentile or to what a triangle holds; whether any is above."""
    every = np.concatenate([plane.loss[np.isfinite(plane.loss)] for plane in planes])
    high = max(
        float(np.percentile(every, 95)), *(float(p.in_triangle.max(initial=0)) for p in planes), 0.0
    )
    high = high if high > 0 else float(every.max())
    low = max(float(every.min()), DEEPEST * high)
    above = bool(every.max() > high)
    if high < 1.001 * low:
        low, high = 0.97 * low, 1.03 * high
    return np.geomspace(low, high, LEVELS), above


def _panel(
    axes: Axes, plane: _Plane, levels: np.ndarray, above: bool
) -> tuple[ContourSet, ContourSet]:
    axes.set_facecolor(FAINT)
    axes.set_aspect("equal")
    loss = np.ma.masked_invalid(np.maximum(plane.loss, levels[0]))
    norm = LogNorm(levels[0], levels[-1])
    filled = axes.contourf(
        plane.x,
        plane.y,
        loss,
        levels=levels,
        norm=norm,
        cmap=COLOURS,
        extend="max" if above else "neither",
        zorder=1,
    )
    colours = ["white" if share < DARK else INK for share in np.linspace(0, 1, LEVELS)]
    lines = axes.contour(
        plane.x, plane.y, loss, levels=levels, colors=colours, linewidths=0.5, alpha=0.8, zorder=2
    )
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
    return filled, lines


def _colour_bar(figure: Figure, filled: ContourSet, levels: np.ndarray) -> None:
    bar = figure.colorbar(filled, ax=figure.axes, shrink=0.85, pad=0.02, aspect=25)
    bar.set_ticks(levels[::LABELLED], labels=_written(levels)[::LABELLED])
    bar.ax.minorticks_off()
    bar.set_label("robust loss (nats, log scale)")
    bar.outline.set_visible(False)


def _written(levels: np.ndarray) -> list[str]:
    """The levels with as many digits as it takes for no two of the labelled ones to read alike, three at least."""
    shown = levels[::LABELLED]
    digits = next(
        (d for d in range(3, 9) if len({f"{level:.{d}g}" for level in shown}) == len(shown)), 9
    )
    return [f"{level:.{digits}g}" for level in levels]


def _annotate(axes: Axes, plane: _Plane, contours: ContourSet, levels: np.ndarray) -> None:
    shares = np.linspace(0, 1, 30)[:, None]
    edges = [
        a + shares * (b - a)
        for a, b in zip(plane.corners, np.roll(plane.corners, -1, axis=0), strict=True)
    ]
    crowd = np.concatenate([*edges, *[np.repeat(plane.corners, 5, axis=0)]])
    names = [
        (*corner, plain(name, 18), INK)
        for corner, name in zip(plane.corners, plane.checkpoints, strict=True)
    ]
    boxes = place_labels(axes, names, crowd, size=8.5)
    ends = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])
    rim = np.concatenate(
        [a + shares * (b - a) for a, b in zip(ends, np.roll(ends, -1, axis=0), strict=True)]
    )
    pixels = [axes.transData.transform(crowd), axes.transAxes.transform(rim)]
    near = np.concatenate([*pixels, *[outline(box) for box in boxes]])
    for number, (text, pieces) in enumerate(zip(_written(levels), contours.allsegs, strict=True)):
        if number and number % LABELLED == 0:  # the first is a point, the least loss
            near = label_contour(axes, text, pieces, near)


def _table(plane: _Plane) -> Table:
    found = survey(plane.x, plane.y, plane.loss, plane.corners)
    lines = []
    for name, corner in zip(plane.checkpoints, plane.corners, strict=True):
        row, column = plane.nearest(corner)
        off = math.dist(corner, (plane.x[column], plane.y[row]))
        lines.append(
            {"point": f"nearest to {name}", "distance to it": off} | _cells(plane, row, column)
        )
    row, column = np.unravel_index(np.nanargmin(plane.loss), plane.loss.shape)
    lines.append(
        {"point": "least loss of the grid", "distance to it": None} | _cells(plane, row, column)
    )
    return Table(plane.name, _summary(plane, found), lines)


def _cells(plane: _Plane, row: int, column: int) -> dict[str, Any]:
    maps = {"robust loss": plane.loss, "clean loss": plane.clean_loss}
    cells: dict[str, Any] = {"x": float(plane.x[column]), "y": float(plane.y[row])}
    for name, values in maps.items():
        known = values is not None and np.isfinite(values[row, column])
        cells[name] = f"{values[row, column]:.4f}" if known else None
    known = plane.accuracy is not None and np.isfinite(plane.accuracy[row, column])
    return cells | {"robust accuracy": percent(plane.accuracy[row, column]) if known else None}


def _summary(plane: _Plane, found: Surface) -> str:
    places = ", ".join(
        f"({plane.x[column]:.3g}, {plane.y[row]:.3g})" for row, column in found.minima[:6]
    )
    places = f" at {places}" * bool(places) + f" and {len(found.minima) - 6} more" * (
        len(found.minima) > 6
    )
    rows, columns = plane.loss.shape
    return (
        f"robust loss on {columns} x {rows} points; strict local minima inside the grid: {len(found.minima)}{places}; between "
        f"the checkpoints {found.violations} of {found.triples} triples of neighbours bend against convexity by more than "
        f"{found.margin:g} nats, by {found.worst:.3g} at most"
    )

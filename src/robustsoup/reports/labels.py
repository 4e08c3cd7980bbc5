"""Labels in figures that avoid points, lines and each other."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

HALO = [patheffects.withStroke(linewidth=2.2, foreground="white")]
SIDES = [(1, 0.7), (-1, 0.7), (1, -0.7), (-1, -0.7), (0, 1), (0, -1), (1, 0), (-1, 0)]
GAPS_IN_POINTS = (8, 15, 23)
MIN_CONTOUR_GAP = 9  # points

Label = tuple[float, float, str, str]
"""(x, y, text, colour), in data coordinates."""


def place_labels(
    axes: Axes, labels: Sequence[Label], avoid: np.ndarray, *, size: float = 8
) -> list[Bbox]:
    """Write each label next to its point, where it hides the least.

    Positions are compared in pixels, so limits and layout must be final: call
    `figure.draw_without_rendering()` first. The labels do not take part in the layout.

    Args:
        axes: The axes to write in.
        labels: The labels, most important first.
        avoid: (k, 2) points to keep clear of, in data coordinates.
        size: Font size in points.

    Returns:
        The box of each label in pixels.
    """
    pixels_per_point = get_root_figure(axes).dpi / 72
    obstacles = axes.transData.transform(avoid)
    placed: list[Bbox] = []
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
        candidates = []
        for gap in GAPS_IN_POINTS:
            for side_x, side_y in SIDES:
                shift = (
                    side_x * (gap * pixels_per_point + box.width / 2),
                    side_y * (gap * pixels_per_point + box.height / 2),
                )
                hidden = _rate_position(box.translated(*shift), obstacles, placed, axes.bbox)
                candidates.append((hidden + len(candidates) / 100, shift))
        _, shift = min(candidates)
        note.set_position((shift[0] / pixels_per_point, shift[1] / pixels_per_point))
        placed.append(box.translated(*shift))
    return placed


def label_contour(
    axes: Axes, text: str, lines: Iterable[np.ndarray], avoid: np.ndarray
) -> np.ndarray:
    """Write `text` at the point of a contour that is farthest from `avoid`, if there is room.

    Args:
        axes: The axes to write in.
        text: The value of the contour.
        lines: (k, 2) points of each line of the contour, in data coordinates.
        avoid: (k, 2) points to keep clear of, in pixels.

    Returns:
        `avoid` with the outline of the new label.
    """
    lines = [line for line in lines if len(line) > 1]
    if not lines:
        return avoid
    shares = np.linspace(0, 1, 8)[:, None, None]
    spots = np.concatenate(
        [(line[:-1] + shares * (line[1:] - line[:-1])).reshape(-1, 2) for line in lines]
    )
    pixels = axes.transData.transform(spots)
    distances = np.linalg.norm(pixels[:, None] - avoid[None], axis=2).min(1)
    widest = int(distances.argmax())
    if distances[widest] < MIN_CONTOUR_GAP * get_root_figure(axes).dpi / 72:
        return avoid
    note = axes.annotate(
        text,
        spots[widest],
        xycoords=axes.transData,
        ha="center",
        va="center",
        fontsize=7,
        color="#1a1a1a",
        zorder=3,
        path_effects=HALO,
    )
    return np.concatenate([avoid, spread_over_box(note.get_window_extent())])


def spread_over_box(box: Bbox) -> np.ndarray:
    """Return (24, 2) points spread over a box, for labels to keep clear of."""
    x, y = np.meshgrid(np.linspace(box.x0, box.x1, 8), np.linspace(box.y0, box.y1, 3))
    return np.column_stack([x.ravel(), y.ravel()])


def spread_over_line(start: np.ndarray, end: np.ndarray, count: int = 20) -> np.ndarray:
    """Return (count, 2) points from `start` to `end`, for labels to keep clear of."""
    return start + np.linspace(0, 1, count)[:, None] * (end - start)


def get_root_figure(axes: Axes) -> Figure:
    """Return the figure that axes belong to."""
    figure = axes.get_figure()
    if not isinstance(figure, Figure):
        raise TypeError(f"axes: got {type(figure).__name__} around them, expected a Figure")
    return figure


def _rate_position(box: Bbox, obstacles: np.ndarray, placed: Sequence[Bbox], frame: Bbox) -> float:
    """Count the obstacles a label would hide; other labels and the frame's edge count more."""
    padded = box.padded(2)
    hidden = (obstacles > (padded.x0, padded.y0)) & (obstacles < (padded.x1, padded.y1))
    outside = (
        padded.x0 < frame.x0 or padded.x1 > frame.x1 or padded.y0 < frame.y0 or padded.y1 > frame.y1
    )
    overlaps = sum(padded.overlaps(other) for other in placed)
    return int(hidden.all(axis=1).sum()) + 50 * overlaps + 20 * outside

"""The shape of a loss on a plane: its minima, and where it violates convexity."""

from dataclasses import dataclass

import numpy as np

NOISE_MARGIN = 0.005
"""Violations below this many nats are noise of the attack and of rounding."""
_TRIPLE_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class LossShape:
    """The shape of a loss on a grid.

    Attributes:
        minima: (row, column) of each strict local minimum.
        triples: Number of triples of neighbours in the triangle.
        violations: Number of triples that violate convexity by more than `margin`.
        worst: The largest violation, in the unit of the loss; 0 if there is none.
        margin: Violations up to this value do not count.
    """

    minima: tuple[tuple[int, int], ...]
    triples: int
    violations: int
    worst: float
    margin: float


def survey_loss(
    x: np.ndarray,
    y: np.ndarray,
    loss: np.ndarray,
    triangle: np.ndarray,
    *,
    margin: float = NOISE_MARGIN,
) -> LossShape:
    """Count strict minima inside the grid, and violations of convexity inside the triangle.

    A minimum is finite, not on the border of the grid and less than its 8 neighbours; a neighbour
    that is not finite counts as greater. A triple is three neighbours in a row, a column or a
    diagonal, all finite and in the triangle or on its edge; it violates convexity if f(middle) >
    (f(first) + f(last)) / 2 + margin. The absence of violations does not prove convexity, because
    only neighbours are compared.

    Args:
        x: (columns,) coordinates in even steps.
        y: (rows,) coordinates in even steps.
        loss: (rows, columns).
        triangle: (3, 2) corners.
        margin: Smallest violation that counts.

    Returns:
        The minima and the counts of triples and violations.
    """
    inside = mask_triangle(x, y, triangle) & np.isfinite(loss)
    triples = violations = 0
    worst = 0.0
    for step in _TRIPLE_STEPS:
        complete = np.logical_and.reduce([_shift_grid(inside, step, k) for k in range(3)])
        first, middle, last = (_shift_grid(loss, step, k)[complete] for k in range(3))
        excess = middle - (first + last) / 2
        violating = excess[excess > margin]
        triples, violations = triples + excess.size, violations + violating.size
        worst = max(worst, float(violating.max(initial=0.0)))
    return LossShape(_find_minima(loss), triples, violations, worst, margin)


def mask_triangle(x: np.ndarray, y: np.ndarray, triangle: np.ndarray) -> np.ndarray:
    """Return (rows, columns): whether points are in the triangle (3, 2) or on its edge."""
    barycentric = np.linalg.pinv(np.column_stack([triangle, np.ones(3)]).T)
    grid = np.stack([*np.meshgrid(x, y), np.ones((len(y), len(x)))])
    return np.all(np.tensordot(barycentric, grid, 1) >= -1e-9, axis=0)


def _shift_grid(values: np.ndarray, step: tuple[int, int], k: int) -> np.ndarray:
    """Return neighbour k of each triple along `step` that fits the grid."""
    down, right = step
    rows, columns = values.shape
    top = k * down
    left = k * right if right >= 0 else 2 + k * right
    return values[top : rows - 2 * down + top, left : columns - 2 * abs(right) + left]


def _find_minima(loss: np.ndarray) -> tuple[tuple[int, int], ...]:
    finite = np.where(np.isfinite(loss), loss, np.inf)
    rows, columns = finite.shape
    if min(rows, columns) < 3:
        return ()
    middle = finite[1:-1, 1:-1]
    lowest = np.isfinite(middle)
    for down in range(3):
        for right in range(3):
            if (down, right) != (1, 1):
                neighbours = finite[down : rows - 2 + down, right : columns - 2 + right]
                lowest = lowest & (middle < neighbours)
    return tuple((int(row) + 1, int(column) + 1) for row, column in np.argwhere(lowest))

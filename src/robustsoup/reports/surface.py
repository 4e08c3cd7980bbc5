"""What the grid of a loss on a plane says of its shape: its minima, and where it bends the wrong way to be convex."""

from dataclasses import dataclass

import numpy as np

MARGIN = 0.005  # nats: less is noise of the attack and of rounding
_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class Surface:
    """minima: (row, column) of each; of `triples` of neighbours in the triangle `violations` are not convex by > margin.

    worst: the largest violation, in the loss's unit; 0 if there is none.
    """

    minima: tuple[tuple[int, int], ...]
    triples: int
    violations: int
    worst: float
    margin: float


def survey(
    x: np.ndarray, y: np.ndarray, loss: np.ndarray, triangle: np.ndarray, *, margin: float = MARGIN
) -> Surface:
    """Count the strict minima inside the grid, and the midpoints inside the triangle that lie above their chord.

    x (columns,) and y (rows,) with even steps, loss (rows, columns), triangle (3, 2). A minimum is finite, not on the
    border of the grid and less than its 8 neighbours; a neighbour that is not finite counts as greater. A triple is three
    neighbours in a row, a column or a diagonal, all finite and in the triangle or on its edge; it violates convexity if
    f(middle) > (f(a) + f(b)) / 2 + margin. No violation does not prove convexity: only neighbours are compared.
    """
    inside = in_triangle(x, y, triangle) & np.isfinite(loss)
    triples = violations = 0
    worst = 0.0
    for step in _STEPS:
        kept = np.logical_and.reduce([_moved(inside, step, k) for k in range(3)])
        first, middle, last = (_moved(loss, step, k)[kept] for k in range(3))
        excess = middle - (first + last) / 2
        wrong = excess[excess > margin]
        triples, violations = triples + excess.size, violations + wrong.size
        worst = max(worst, float(wrong.max(initial=0.0)))
    return Surface(_minima(loss), triples, violations, worst, margin)


def in_triangle(x: np.ndarray, y: np.ndarray, triangle: np.ndarray) -> np.ndarray:
    """(rows, columns): whether the grid's points are in the triangle (3, 2) or on its edge."""
    shares = np.linalg.pinv(np.column_stack([triangle, np.ones(3)]).T)
    grid = np.stack([*np.meshgrid(x, y), np.ones((len(y), len(x)))])
    return (np.tensordot(shares, grid, 1) >= -1e-9).all(axis=0)


def _moved(values: np.ndarray, step: tuple[int, int], k: int) -> np.ndarray:
    """The k-th of three neighbours along `step`, for every triple that fits the grid."""
    down, right = step
    rows, columns = values.shape
    top = k * down
    left = k * right if right >= 0 else 2 + k * right
    return values[top : rows - 2 * down + top, left : columns - 2 * abs(right) + left]


def _minima(loss: np.ndarray) -> tuple[tuple[int, int], ...]:
    known = np.where(np.isfinite(loss), loss, np.inf)
    rows, columns = known.shape
    if min(rows, columns) < 3:
        return ()
    middle = known[1:-1, 1:-1]
    lowest = np.isfinite(middle)
    for down in range(3):
        for right in range(3):
            if (down, right) != (1, 1):
                lowest = lowest & (
                    middle < known[down : rows - 2 + down, right : columns - 2 + right]
                )
    return tuple((int(i) + 1, int(j) + 1) for i, j in zip(*lowest.nonzero(), strict=True))

"""The coefficients that a soup method tries: uniform, grid and line."""

import itertools
import math
from collections.abc import Sequence

from robustsoup.errors import CoefficientError
from robustsoup.soups.selection import (
    Alpha,
)

MOST = 2000
"""How many soups of a grid are made without being asked for by number."""


def grid_size(n: int, step: float) -> int:
    """How many soups grid(n, step) has, without making them."""
    return math.comb(round(1 / step) + n - 1, n - 1)


def grid(n: int, step: float = 0.2, most: int = MOST) -> list[Alpha]:
    """Every (alpha_1..alpha_n) of multiples of `step` that sum to 1: 6, 21, 56, 126 of them for n = 2..5 at 0.2.

    Raises CoefficientError if `step` is not a fraction of 1, or for more than `most` candidates.
    """
    parts = round(1 / step) if step > 0 else 0
    if n < 1 or parts < 1 or abs(parts * step - 1) > 1e-9:
        raise CoefficientError(
            f"grid: got n {n} and step {step}, expected n of at least 1 and a step such as 0.2 or 0.25"
        )
    if (count := grid_size(n, step)) > most:
        raise CoefficientError(
            f"grid: {n} ingredients at step {step} are {count:,} soups, expected at most {most:,}"
        )
    bars = itertools.combinations(range(parts + n - 1), n - 1)
    points = []
    for bar in bars:
        edges = (-1, *bar, parts + n - 1)
        points.append(
            tuple((right - left - 1) / parts for left, right in itertools.pairwise(edges))
        )
    return points


def candidates(method: str, n: int, step: float = 0.2, most: int = MOST) -> list[Alpha]:
    """The coefficients that a method tries: "uniform", "grid", or "line" (wise-ft, n = 2). Raises CoefficientError."""
    if method == "uniform":
        return [(1 / n,) * n]
    if method == "line" and n != 2:
        raise CoefficientError(f"line: got {n} ingredients, expected 2")
    if method in ("grid", "line"):
        return grid(n, step, most)
    raise CoefficientError(
        f'method: got "{method}", expected "grid", "line", "uniform" or "greedy"'
    )


def alpha_name(alpha: Sequence[float]) -> str:
    """A name for files and tables: (0.2, 0.4, 0.4) -> "0.2-0.4-0.4"."""
    return "-".join(f"{value:.6g}" for value in alpha)


def corners(n: int) -> list[Alpha]:
    """The n one-hot coefficients: each ingredient by itself."""
    return [tuple(float(i == j) for j in range(n)) for i in range(n)]

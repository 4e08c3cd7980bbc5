"""Coefficients that the soup methods uniform, grid and line try."""

import itertools
import math
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np

from robustsoup.catalog import SOUP_METHODS, check_call
from robustsoup.errors import CoefficientError
from robustsoup.settings import SMALLEST_STEP, SearchSettings
from robustsoup.soups.coefficients import SUM_TOLERANCE
from robustsoup.soups.method_keys import is_merge

Alpha = tuple[float, ...]
"""(n,) coefficients of n ingredients."""

SoupMethod = Callable[[int, float, int], Sequence[Sequence[float]]]
"""method(n, step, max_soups) -> coefficients (n,) of each soup."""

MAX_SOUPS = 2000
"""Default limit on the number of soups of a grid."""


def grid_size(n: int, step: float) -> int:
    """Return the number of soups in `grid(n, step)` without listing them."""
    return math.comb(round(1 / step) + n - 1, n - 1)


def format_count(count: int) -> str:
    """Return a number of soups as text: 1,771 or, beyond 15 digits, 3.1e+26."""
    return f"{count:,}" if count < 10**15 else f"{Decimal(count):.1e}"


def grid(n: int, step: float = 0.2, max_soups: int = MAX_SOUPS) -> list[Alpha]:
    """Return all (alpha_1, ..., alpha_n) of multiples of `step` that sum to 1.

    At step 0.2 these are 6, 21, 56 and 126 soups for n = 2, 3, 4 and 5.

    Args:
        n: Number of ingredients, at least 1.
        step: A fraction of 1, such as 0.2 or 0.25.
        max_soups: Maximum number of soups.

    Raises:
        CoefficientError: If 1 is no multiple of `step`, or there are more than `max_soups` soups.
    """
    parts = round(1 / step) if step >= SMALLEST_STEP else 0
    if n < 1 or parts < 1 or abs(parts * step - 1) > 1e-9:
        raise CoefficientError(
            f"grid: got n {n} and step {step}, expected n >= 1 and a step such as 0.2 or 0.25"
        )
    if (count := grid_size(n, step)) > max_soups:
        raise CoefficientError(
            f"grid: {n} ingredients at step {step} make {format_count(count)} soups, "
            f"expected at most {max_soups:,}; take a larger step"
        )
    alphas = []
    for bars in itertools.combinations(range(parts + n - 1), n - 1):
        edges = (-1, *bars, parts + n - 1)
        alphas.append(
            tuple((right - left - 1) / parts for left, right in itertools.pairwise(edges))
        )
    return alphas


def line(n: int, step: float = 0.2, max_soups: int = MAX_SOUPS) -> list[Alpha]:
    """Return the grid of two ingredients (wise-ft).

    Args:
        n: Number of ingredients, which must be 2.
        step: A fraction of 1, such as 0.2 or 0.25.
        max_soups: Maximum number of soups.

    Raises:
        CoefficientError: For another number of ingredients, and as `grid`.

    Source: Wortsman et al. 2021, arXiv:2109.01903.
    """
    if n != 2:
        raise CoefficientError(f"line: got {n} ingredients, expected 2")
    return grid(n, step, max_soups)


def uniform(n: int, *_: float) -> list[Alpha]:
    """Return the average of n ingredients as the only soup; other arguments are ignored."""
    return [(1 / n,) * n]


def candidates(
    method: str | SoupMethod, n: int, step: float = 0.2, max_soups: int = MAX_SOUPS
) -> list[Alpha]:
    """Return the coefficients that a method tries.

    Args:
        method: A function, or an entry of `catalog.SOUP_METHODS` that needs neither evaluations
            nor training: "uniform", "grid", "line", "package.module:function", or the method of
            an installed package.
        n: Number of ingredients.
        step: Step of a grid or line.
        max_soups: Maximum number of soups.

    Raises:
        CoefficientError: For any other method, for values that the method rejects, and if it
            returns anything but rows of n finite numbers >= 0 that sum to 1.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    if isinstance(method, str):
        entry = SOUP_METHODS.get_entry(method, error=CoefficientError)
        if needs := entry.facts.get("needs"):
            raise CoefficientError(
                f'method "{method}" needs {needs}; it has no list of coefficients'
            )
        method = entry.load()
    label = f'method "{name}"'
    check_call(method, ["n", "step", "max_soups"], label=label, error=CoefficientError)
    rows = method(n, step, max_soups)
    try:
        alphas = [tuple(map(float, row)) for row in rows]
    except (TypeError, ValueError) as error:
        raise CoefficientError(
            f'method "{name}": got {rows!r:.200}, expected rows of {n} coefficients: {error}'
        ) from error
    for alpha in alphas:
        in_range = all(0 <= value <= 1 + SUM_TOLERANCE for value in alpha)
        if len(alpha) != n or not in_range or abs(sum(alpha) - 1) > SUM_TOLERANCE:
            raise CoefficientError(
                f'method "{name}": got the row {alpha}, expected {n} coefficients, one for each '
                "ingredient, none below 0 and with sum 1"
            )
    return alphas


def list_alphas(method: str | SoupMethod, settings: SearchSettings, n: int) -> list[Alpha]:
    """Return the coefficients that a method tries, or the weights of a merging method.

    Args:
        method: A method of `candidates`, "surrogate" or a method that merges.
        settings: The step and the size of the grid, and the weights of a merging method; one whose
            ingredients weigh the same always has uniform weights.
        n: Number of ingredients.

    Raises:
        CoefficientError: As `candidates`.
    """
    if isinstance(method, str) and is_merge(method):
        entry = SOUP_METHODS.get_entry(method)
        is_uniform = "uniform" in (settings.weights, entry.facts.get("weights"))
        method = "uniform" if is_uniform else "grid"
    elif method == "surrogate":
        method = "grid"
    return candidates(method, n, settings.step, settings.max_soups)


def alpha_name(alpha: Sequence[float]) -> str:
    """Return a name for files and tables: (0.2, 0.4, 0.4) -> "0.2-0.4-0.4"."""
    return "-".join(f"{value:.6g}" for value in alpha)


def corners(n: int) -> list[Alpha]:
    """Return the n one-hot coefficient vectors, one for each ingredient alone."""
    return [tuple(float(i == j) for j in range(n)) for i in range(n)]


def spread_order(alphas: Sequence[Alpha]) -> list[int]:
    """Return the positions of coefficients so that each is far from all before it.

    One-hot vectors come first. A search that ends early has then looked everywhere.
    """
    points = np.array(alphas, dtype=np.float64)
    first = [row for row in range(len(points)) if (points[row] == 1).any()] or [0]
    order: list[int] = []
    squared_distances = np.full(len(points), np.inf)  # from the nearest point of the order
    while len(order) < len(points):
        row = first[len(order)] if len(order) < len(first) else int(squared_distances.argmax())
        order.append(row)
        to_row = ((points - points[row]) ** 2).sum(1)
        squared_distances = np.minimum(squared_distances, to_row)
        squared_distances[row] = -1
    return order

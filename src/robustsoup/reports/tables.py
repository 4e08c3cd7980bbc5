"""What was learned as numbers: one line a layer, for a CSV file and for the report."""

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustsoup.errors import RequestError
from robustsoup.files import write_text
from robustsoup.reports.results import Row
from robustsoup.soups.coefficients import EVERY_LAYER, Coefficients

OWN = ("layer", "entropy", "moved", "slope")
FEW = 3


@dataclass(frozen=True)
class Table:
    """Lines with the same columns, a title, and one sentence that sums them up."""

    title: str
    summary: str
    lines: list[dict[str, Any]]


def coefficient_table(coefficients: Coefficients, names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a layer, in the network's order: layer, the share of each ingredient by name, entropy, moved, slope.

    entropy in nats; moved: the share that went from one ingredient to another while learning, 0 to 1; slope: the mean
    norm of dL/dlogits. None for what the file does not hold. An ingredient named like another column, or like another
    ingredient, has "ingredient" put before it.

    Raises CoefficientError unless there is a name for each ingredient.
    """
    coefficients.check(len(names), affine=True)
    columns = _columns(names)
    moved, slopes = coefficients.movement(), coefficients.slopes
    none = [None] * len(coefficients.layers)
    parts = zip(
        coefficients.layers,
        coefficients.alpha.tolist(),
        (coefficients.entropy() + 0.0).tolist(),  # no -0
        none if moved is None else moved.tolist(),
        none if slopes is None else slopes.tolist(),
        strict=True,
    )
    return [
        {
            "layer": layer,
            **dict(zip(columns, shares, strict=True)),
            "entropy": entropy,
            "moved": move,
            "slope": slope,
        }
        for layer, shares, entropy, move, slope in parts
    ]


def write_coefficient_csv(
    coefficients: Coefficients, names: Sequence[str], path: str | os.PathLike
) -> Path:
    """Write `coefficient_table` as CSV, 6 significant digits, an empty cell for None; whole or not at all."""
    lines = coefficient_table(coefficients, names)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: _digits(cell) for column, cell in line.items()} for line in lines)
    write_text(path, text.getvalue())
    return Path(path)


def write_coefficient_tables(rows: Iterable[Row], folder: Path) -> list[tuple[str, str]]:
    """Write folder/coefficients/NAME.csv for each row that has such a file; returns (file, reason) for what cannot be.

    Raises StorageError if a file cannot be written.
    """
    left_out = []
    for row in rows:
        if not row.get("coefficients_file"):
            continue
        name = f"coefficients/{Path(row['coefficients_file']).stem}.csv"
        try:
            coefficients = Coefficients.load(folder / row["coefficients_file"])
            write_coefficient_csv(coefficients, ingredient_names(row, coefficients), folder / name)
        except RequestError as error:
            left_out.append((name, str(error)))
    return left_out


def ingredient_names(row: Row, coefficients: Coefficients) -> list[str]:
    """The names that the row has for its ingredients, or "ingredient 1", ... where it has none."""
    n = coefficients.alpha.shape[1]
    names = list(row.get("ingredients") or [])
    return names if len(names) == n else [f"ingredient {i + 1}" for i in range(n)]


def layer_name(layer: str) -> str:
    """The name of a layer as people read it."""
    return "whole network" if layer == EVERY_LAYER else layer


def soup_table(title: str, coefficients: Coefficients, names: Sequence[str]) -> Table:
    """The table of one soup for the report."""
    lines = [
        line | {"layer": layer_name(line["layer"])}
        for line in coefficient_table(coefficients, names)
    ]
    return Table(title, _summary(coefficients), lines)


def _summary(coefficients: Coefficients) -> str:
    """Mean entropy, mean movement, and which layers moved least and most."""
    most, moved = math.log(coefficients.alpha.shape[1]), coefficients.movement()
    said = (
        [f"mean entropy {100 * float(coefficients.entropy().mean()) / most:.1f} % of log n"]
        if most
        else []
    )
    if moved is None:
        return "; ".join([*said, "movement not recorded"])
    said.append(f"mean movement {float(moved.mean()):.3g}")
    few = min(FEW, len(moved) // 2)
    order = moved.argsort(stable=True).tolist()
    for what, chosen in (("least", order[:few]), ("most", order[::-1][:few])):
        if chosen:
            layers = ", ".join(f"{coefficients.layers[i]} ({float(moved[i]):.2g})" for i in chosen)
            said.append(f"moved {what}: {layers}")
    return "; ".join(said)


def _columns(names: Sequence[str]) -> list[str]:
    taken = set(OWN)
    found = []
    for name in names:
        while name in taken:
            name = f"ingredient {name}"
        taken.add(name)
        found.append(name)
    return found


def _digits(cell: Any) -> Any:
    return f"{cell:.6g}" if isinstance(cell, float) else cell

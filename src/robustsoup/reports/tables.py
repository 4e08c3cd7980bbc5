"""Tables of coefficients by layer, for CSV files and for the report."""

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustsoup.errors import RequestError
from robustsoup.files import write_text
from robustsoup.paths import user_path
from robustsoup.printable import make_printable
from robustsoup.runs.results import ResultRow
from robustsoup.soups.coefficients import EVERY_LAYER, Coefficients

FIXED_COLUMNS = ("layer", "entropy", "moved", "slope")
LISTED_LAYERS = 3

Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: Title.
        summary: One sentence that summarises the table.
        lines: Cells by column; all lines have the same columns.
    """

    title: str
    summary: str
    lines: Sequence[dict[str, Cell]]


def coefficient_table(coefficients: Coefficients, names: Sequence[str]) -> list[dict[str, Cell]]:
    """Tabulate coefficients by layer.

    Args:
        coefficients: The coefficients of one soup.
        names: One name for each ingredient. A name that equals another column gets the prefix
            "ingredient".

    Returns:
        One dict for each layer in the network's order: its name ("layer"); the share of each
        ingredient by name; the entropy of the shares in nats; "moved", the share in [0, 1] that
        learning moved between ingredients; "slope", the mean norm of dL/dlogits. Values that were
        not recorded are None.

    Raises:
        CoefficientError: The number of names differs from the number of ingredients.
    """
    coefficients.check(len(names), affine=True)
    columns = _ingredient_columns(names)
    moved, slopes = coefficients.movement(), coefficients.slopes
    missing = [None] * len(coefficients.layers)
    parts = zip(
        coefficients.layers,
        coefficients.alpha.tolist(),
        (coefficients.entropy() + 0.0).tolist(),  # turns -0 into 0
        missing if moved is None else moved.tolist(),
        missing if slopes is None else slopes.tolist(),
        strict=True,
    )
    return [
        {
            "layer": layer,
            **dict(zip(columns, shares, strict=True)),
            "entropy": entropy,
            "moved": layer_moved,
            "slope": slope,
        }
        for layer, shares, entropy, layer_moved, slope in parts
    ]


def write_coefficient_csv(
    coefficients: Coefficients, names: Sequence[str], path: str | os.PathLike[str]
) -> Path:
    """Write `coefficient_table` atomically as CSV with 6 significant digits.

    Args:
        coefficients: The coefficients of one soup.
        names: One name for each ingredient.
        path: File to write; a missing value is an empty cell.

    Returns:
        The path.

    Raises:
        CoefficientError: The number of names differs from the number of ingredients.
        StorageError: The file cannot be written.
    """
    lines = coefficient_table(coefficients, names)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_format_csv_cell, lines[0]))
    for line in lines:
        writer.writerow(map(_format_csv_cell, line.values()))
    write_text(path, text.getvalue())
    return user_path(path)


def _format_csv_cell(cell: Cell) -> str:
    """Return a cell that a spreadsheet shows and does not run: text never starts a formula."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.6g}"
    text = make_printable(str(cell))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def write_coefficient_tables(rows: Iterable[ResultRow], folder: Path) -> list[tuple[str, str]]:
    """Write folder/coefficients/NAME.csv for each row that has a file of coefficients.

    Returns:
        (file, reason) for each table that could not be written.

    Raises:
        StorageError: A file cannot be written.
    """
    failures = []
    for row in rows:
        if not row.coefficients_file:
            continue
        name = name_coefficient_table(row.coefficients_file)
        try:
            coefficients = Coefficients.load(folder / row.coefficients_file)
            names = name_ingredients(row, coefficients)
            write_coefficient_csv(coefficients, names, folder / name)
        except RequestError as error:
            failures.append((name, str(error)))
    return failures


def name_coefficient_table(file: str) -> str:
    """Return the path of the table of a file of coefficients, relative to the run folder."""
    return f"coefficients/{Path(file).stem}.csv"


def name_ingredients(row: ResultRow, coefficients: Coefficients) -> list[str]:
    """Return the row's names of its ingredients, or "ingredient 1", ... if they do not fit."""
    n = coefficients.alpha.shape[1]
    names = list(row.ingredients or ())
    return names if len(names) == n else [f"ingredient {i + 1}" for i in range(n)]


def name_layer(layer: str) -> str:
    """Return the readable name of a layer."""
    return "whole network" if layer == EVERY_LAYER else layer


def tabulate_soup(title: str, coefficients: Coefficients, names: Sequence[str]) -> Table:
    """Make the table of one soup for the report."""
    lines = [
        line | {"layer": name_layer(layer)}
        for line, layer in zip(
            coefficient_table(coefficients, names), coefficients.layers, strict=True
        )
    ]
    return Table(title, _summarise_coefficients(coefficients), lines)


def _summarise_coefficients(coefficients: Coefficients) -> str:
    """State the mean entropy, the mean movement, and which layers moved least and most."""
    log_n, moved = math.log(coefficients.alpha.shape[1]), coefficients.movement()
    parts = []
    if log_n:
        share = 100 * float(coefficients.entropy().mean()) / log_n
        parts.append(f"mean entropy {share:.1f} % of log n")
    if moved is None:
        return "; ".join([*parts, "movement not recorded"])
    parts.append(f"mean movement {float(moved.mean()):.3g}")
    count = min(LISTED_LAYERS, len(moved) // 2)
    order = moved.argsort(stable=True).tolist()
    for word, numbers in (("least", order[:count]), ("most", order[::-1][:count])):
        if numbers:
            layers = ", ".join(f"{coefficients.layers[i]} ({float(moved[i]):.2g})" for i in numbers)
            parts.append(f"moved {word}: {layers}")
    return "; ".join(parts)


def _ingredient_columns(names: Sequence[str]) -> list[str]:
    """Make the names distinct from each other and from the fixed columns."""
    taken = set(FIXED_COLUMNS)
    columns = []
    for name in names:
        column = name
        while column in taken:
            column = f"ingredient {column}"
        taken.add(column)
        columns.append(column)
    return columns

"""Differences of soups from their ingredients, sample by sample, from stored verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustsoup.errors import RobustsoupError
from robustsoup.evaluation.comparison import compare
from robustsoup.evaluation.intervals import Difference
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.reports.tables import Cell, Table
from robustsoup.runs.results import ResultRow, Results

MOST_SOUPS = 300
"""Number of soups that are compared with their ingredients; the chosen soup comes first."""


@dataclass(frozen=True)
class PairedDifference:
    """A soup less one of its ingredients under one measure.

    Attributes:
        ingredient: Name of the ingredient.
        split: Split of the samples.
        measure: "clean", a threat model as text, or "union".
        difference: The difference on the common samples.
    """

    ingredient: str
    split: str
    measure: str
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values: shares rounded to 5 digits."""
        item = self.difference
        return {
            "ingredient": self.ingredient,
            "split": self.split,
            "measure": self.measure,
            "value": round(item.value, 5),
            "low": round(item.low, 5),
            "high": round(item.high, 5),
            "n": item.n,
        }


def compare_with_ingredients(results: Results, folder: Path) -> dict[str, list[PairedDifference]]:
    """Compare soups with their ingredients on the splits where both have stored verdicts.

    Args:
        results: The results of the run.
        folder: The run folder.

    Returns:
        Differences by name of the soup, for at most MOST_SOUPS soups; a soup without common
        samples is left out.
    """
    chosen = results.selection and results.selection.chosen
    soups = sorted((row for row in results.rows if row.soup), key=lambda row: row.name != chosen)
    verdicts = _StoredVerdicts(results, folder)
    compared = {row.name: verdicts.compare_soup(row) for row in soups[:MOST_SOUPS]}
    return {name: items for name, items in compared.items() if items}


def tabulate_differences(differences: Mapping[str, Sequence[PairedDifference]]) -> Table | None:
    """Tabulate the differences of the first soup, which is the chosen one if there is one."""
    if not differences:
        return None
    name, items = next(iter(differences.items()))
    lines: list[dict[str, Cell]] = [
        {
            "less": item.ingredient,
            "measure": item.measure,
            "split": item.split,
            "difference in points, 95 % interval and p-value": str(item.difference),
            "samples": str(item.difference.n),
        }
        for item in items
    ]
    summary = (
        "on the same samples, with Tango's interval and McNemar's test of each pair alone; the "
        "intervals of the answer hold for all pairs of the search at once"
    )
    return Table(f"{name} less its ingredients", summary, lines)


class _StoredVerdicts:
    """Reads the evaluations of a run folder, those of ingredients once."""

    def __init__(self, results: Results, folder: Path) -> None:
        self.folder = folder
        protocol = results.protocol
        self.splits: Sequence[str] = list(dict.fromkeys((protocol.report_on, protocol.select_on)))
        self.ingredients = {row.name: row for row in results.rows if row.soup is None}
        self.read: dict[tuple[str, str], Evaluation | None] = {}

    def load(self, row: ResultRow, split: str) -> Evaluation | None:
        """Return a stored evaluation; None without one, or if it cannot be read."""
        path = self.folder / "evaluations" / f"{row.name}.{split}.json"
        if row.scores(split) is None or Path(row.name).name != row.name or not path.is_file():
            return None
        try:
            return Evaluation.load(path)
        except RobustsoupError:
            return None

    def load_ingredient(self, name: str, split: str) -> Evaluation | None:
        """Return the stored evaluation of an ingredient."""
        if (name, split) not in self.read:
            row = self.ingredients.get(name)
            self.read[name, split] = None if row is None else self.load(row, split)
        return self.read[name, split]

    def compare_soup(self, row: ResultRow) -> list[PairedDifference]:
        """Compare one soup with its ingredients on every split."""
        items: list[PairedDifference] = []
        for split in self.splits:
            soup = self.load(row, split)
            if soup is None or row.screened:
                continue
            for name in row.ingredients or ():
                ingredient = self.load_ingredient(name, split)
                if ingredient is not None and name != row.ingredient:
                    items += _list_differences(name, split, ingredient, soup)
        return items


def _list_differences(
    name: str, split: str, ingredient: Evaluation, soup: Evaluation
) -> list[PairedDifference]:
    try:
        compared = compare(ingredient, soup)
    except RobustsoupError:
        return []
    return [PairedDifference(name, split, key, item) for key, item in compared.rows.items()]

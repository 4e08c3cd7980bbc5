"""Reading a run's results.json, and the few questions that every figure asks of it."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustsoup.errors import RequestError

Row = dict[str, Any]
ROLES = ("pretrained", "ingredient", "uniform", "greedy", "line", "grid", "learned", "dial")
BY_LAYER = (
    "learned",
    "dial",
)  # the soups whose coefficients are in a file, one row of them for each layer
CLEAN, UNION = "clean", "union"
_HINT = "expected what `robustsoup run` writes; run it again"
_EXPECTED = {"name": str, "protocol": dict, "rows": list}
_PROTOCOL = {"select_on": str, "report_on": str, "threats": list}


def read_results(path: Path) -> dict[str, Any]:
    """The checked content of a results.json. Raises RequestError, in one line, if it is missing or broken."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(
            f"{path}: no such file; expected a folder that `robustsoup run` made"
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"{path}: not readable as JSON ({reason}); {_HINT}") from None
    _expect(results, _EXPECTED, str(path))
    _expect(results["protocol"], _PROTOCOL, f"{path}: protocol")
    splits = results["protocol"]["select_on"], results["protocol"]["report_on"]
    for number, row in enumerate(results["rows"]):
        where = f"{path}: rows[{number}]"
        _expect(row, {"name": str, "role": str}, where)
        if row["role"] not in ROLES:
            raise RequestError(
                f'{where}: role: got "{row["role"]}", expected one of {", ".join(ROLES)}'
            )
        for split in splits:
            _check_accuracies(row.get(split) or {}, f"{where}: {split}")
    return results


def _expect(table: Any, kinds: dict[str, type], where: str) -> None:
    if not isinstance(table, dict):
        raise RequestError(f"{where}: got {type(table).__name__}, expected an object; {_HINT}")
    for key, kind in kinds.items():
        if not isinstance(table.get(key), kind):
            got = type(table[key]).__name__ if key in table else "nothing"
            raise RequestError(f"{where}: {key}: got {got}, expected {kind.__name__}; {_HINT}")


def _check_accuracies(accuracies: Any, where: str) -> None:
    if not isinstance(accuracies, dict):
        raise RequestError(
            f"{where}: got {type(accuracies).__name__}, expected accuracies by name; {_HINT}"
        )
    for measure, entry in accuracies.items():
        for key in ("value", "low", "high", "n"):
            number = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise RequestError(
                    f"{where}: {measure}: {key}: got {number!r}, expected a finite number; {_HINT}"
                )


def accuracy(row: Row, split: str, measure: str) -> dict[str, float] | None:
    """{"value", "low", "high", "n", ...} of `row` for "clean", a threat or "union" on `split`; None if not measured."""
    return (row.get(split) or {}).get(measure)


def robust_measures(results: dict[str, Any]) -> list[str]:
    """The threats of the protocol, then "union" where a row has it."""
    protocol = results["protocol"]
    threats = [threat for threat in protocol["threats"] if threat != CLEAN]
    splits = protocol["select_on"], protocol["report_on"]
    return threats + [UNION] * any(
        accuracy(row, split, UNION) for row in results["rows"] for split in splits
    )


def shown_split(rows: Iterable[Row], protocol: dict[str, Any]) -> str:
    """The split to show: report_on if every measured row has it, else select_on, so that one figure never mixes two."""
    select_on, report_on = protocol["select_on"], protocol["report_on"]
    measured = [row for row in rows if row.get(select_on) or row.get(report_on)]
    return report_on if all(row.get(report_on) for row in measured) else select_on


def with_measures(rows: Iterable[Row], split: str, *measures: str) -> list[Row]:
    """The rows that have all of `measures` on `split`."""
    return [row for row in rows if all(accuracy(row, split, measure) for measure in measures)]


def sections(rows: Iterable[Row], *roles: str) -> dict[str, list[Row]]:
    """The rows of these roles by the name of their section in the recipe, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["role"] in roles:
            found.setdefault(row.get("soup") or row["role"], []).append(row)
    return found


def two_best(
    rows: Iterable[Row], measure: str, *, select_on: str, report_on: str
) -> tuple[Row, Row] | None:
    """The row with the best clean accuracy and the one with the best `measure`: the black squares of the paper's Fig. 5.

    Both are chosen on select_on if every row has it, else on report_on, so that the numbers shown on report_on are not
    the maximum of noise, which they are where both are one split (see `caveats`). A tie goes to the row that is better
    at the other measure, then to the first. None for no row.
    """
    rows = list(rows)
    split = select_on if with_measures(rows, select_on, CLEAN, measure) == rows else report_on
    rows = with_measures(rows, split, CLEAN, measure)
    if not rows:
        return None

    def by(first: str, second: str) -> Row:
        return max(
            rows, key=lambda row: [accuracy(row, split, name)["value"] for name in (first, second)]
        )

    return by(CLEAN, measure), by(measure, CLEAN)


@dataclass(frozen=True)
class Points:
    """The coordinates of rows in percent, on one split and for one threat."""

    split: str
    measure: str

    def of(self, rows: list[Row]) -> np.ndarray:
        """(rows, 2): clean, robust."""
        pairs = [
            [accuracy(row, self.split, name)["value"] for name in (CLEAN, self.measure)]
            for row in rows
        ]
        return 100 * np.array(pairs, dtype=float).reshape(-1, 2)

    def bars(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """xerr and yerr (2, rows): the distance from the value to the ends of its interval."""
        sides = []
        for name in (CLEAN, self.measure):
            entries = [accuracy(row, self.split, name) for row in rows]
            ends = [
                [e["value"] - e["low"] for e in entries],
                [e["high"] - e["value"] for e in entries],
            ]
            sides.append(100 * np.maximum(np.array(ends, dtype=float), 0))
        return {"xerr": sides[0], "yerr": sides[1]}


def caveats(results: dict[str, Any]) -> list[str]:
    """What flatters every number of a run, in words: every figure and the head of the report must say it."""
    protocol, leakage = results["protocol"], results.get("leakage") or {}
    said = []
    if protocol["select_on"] == protocol["report_on"]:
        said.append(f"the paper's protocol: selected on {protocol['report_on']}")
    if leakage.get("status") == "violated":
        said.append("selected on samples that ingredients were trained on")
    return said


def samples(rows: Iterable[Row], split: str) -> int:
    """The largest number of samples that a row was measured on."""
    return max(
        (int(entry["n"]) for row in rows for entry in (row.get(split) or {}).values()), default=0
    )

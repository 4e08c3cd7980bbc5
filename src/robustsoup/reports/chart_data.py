"""The data of the interactive views: what report.html hands to report.js as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.reports.best import BestRule
from robustsoup.reports.differences import PairedDifference
from robustsoup.reports.file_names import hide_folders
from robustsoup.reports.learned_curves import group_into_curves
from robustsoup.reports.measures import (
    CLEAN,
    StoredRun,
    choose_split,
    group_by_section,
    list_compared_measures,
)
from robustsoup.reports.planes import LossPlane
from robustsoup.reports.tables import name_coefficient_table, name_ingredients, name_layer
from robustsoup.runs.results import ResultRow, Results
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.explanation import describe_fitting, describe_soup

MOST_SHARES = 60_000
"""Most coefficients by layer that a report holds; soups beyond them are left out."""


def make_chart_data(
    run: StoredRun,
    rule: BestRule,
    differences: Mapping[str, Sequence[PairedDifference]],
    planes: Sequence[LossPlane],
) -> dict[str, Any]:
    """Collect what the views of the report show.

    Args:
        run: The stored run.
        rule: The rule for the best soup.
        differences: Differences of soups from their ingredients, by name of the soup.
        planes: Planes of loss values.

    Returns:
        JSON-able values; shares are rounded to 5 digits.
    """
    results = run.results
    protocol = results.protocol
    return {
        "measures": [CLEAN, *list_compared_measures(results)],
        "splits": list(dict.fromkeys((protocol.report_on, protocol.select_on))),
        "shown": choose_split(results.rows, protocol),
        "selectOn": protocol.select_on,
        "rule": rule.to_json(),
        "rows": [_describe_row(row, results, rule) for row in results.rows],
        "ternaries": _list_ternaries(results),
        "dials": _list_dials(results),
        "layers": _list_layers(run),
        "lines": _list_lines(results),
        "differences": {
            name: [item.to_json() for item in items] for name, items in differences.items()
        },
        "planes": [_describe_plane(plane) for plane in planes],
    }


def describe_row(row: ResultRow, results: Results) -> str:
    """Say in words what a network is: "0.4 of eps4 and 0.6 of eps16", "eps2 itself"."""
    names, shares = row.ingredients or (), row.coefficients or ()
    threats = _list_threats(row, results)
    trained = describe_fitting("trained", threats, row.objective)
    if row.role == "pretrained":
        return f"the start of the ingredients{trained}"
    if row.role == "ingredient":
        return f"an ingredient{trained}"
    if not names or (shares and len(names) != len(shares)):
        return f"a soup, {row.role}"
    merged_by = _find_method(row, results) if row.role == "merge" else None
    return describe_soup(
        shares,
        names,
        ingredient=row.ingredient,
        method=row.role,
        at=row.at,
        threats=threats,
        objective=row.objective,
        merged_by=merged_by,
    )


def _find_method(row: ResultRow, results: Results) -> str:
    return str(_get_table(results.recipe, "soups", row.soup).get("method", row.role))


def _list_threats(row: ResultRow, results: Results) -> list[str]:
    """Return the threat models that a network, or its coefficients, was fitted against."""
    recipe = results.recipe
    if row.threat is None:
        return []
    if row.role == "pretrained":
        tables = [_get_table(recipe, "pretrain")]
    elif row.role == "ingredient":
        ingredient = _get_table(recipe, "ingredients", row.name)
        default = "finetune" if ingredient.get("subspace_end") is None else "subspace"
        tables = [ingredient, _get_table(recipe, default)]
    else:
        tables = [_get_table(recipe, "soups", row.soup)]
    also = next((table["also"] for table in tables if "also" in table), ())
    return [row.threat, *(map(str, also) if isinstance(also, list) else ())]


def _get_table(recipe: Mapping[str, Any], *keys: str | None) -> Mapping[str, Any]:
    """Return a table of a recipe; an empty one if there is none."""
    table: Any = recipe
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table if isinstance(table, Mapping) else {}


def _describe_row(row: ResultRow, results: Results, rule: BestRule) -> dict[str, Any]:
    protocol = results.protocol
    content: dict[str, Any] = {
        "name": row.name,
        "role": row.role,
        "section": row.soup or row.role,
        "what": describe_row(row, results),
        "ingredients": row.ingredients or (),
        "shares": row.coefficients or (),
        "table": row.coefficients_file and name_coefficient_table(row.coefficients_file),
        "at": row.at,
        "equals": row.ingredient,
        "candidate": rule.is_candidate(row),
        "screened": row.screened,
        "doubt": row.doubt,
        "bounds": rule.bounds(row),
        "scores": {},
    }
    for split in dict.fromkeys((protocol.select_on, protocol.report_on)):
        scores = row.scores(split)
        if scores:
            content["scores"][split] = {
                measure: _describe_accuracy(accuracy) for measure, accuracy in scores.items()
            }
    return content


def _describe_accuracy(accuracy: Accuracy) -> list[float]:
    """Return the share, its interval, hits and n."""
    shares = [round(value, 5) for value in (accuracy.value, accuracy.low, accuracy.high)]
    return [*shares, accuracy.hits, accuracy.n]


def _list_ternaries(results: Results) -> list[dict[str, Any]]:
    """List the grids of three ingredients."""
    groups = [
        (section, _mixtures_of(rows, 3))
        for section, rows in group_by_section(results.rows, "grid").items()
    ]
    return [
        _describe_group(section, rows, results) | {"surfaces": _list_surfaces(section, results)}
        for section, rows in groups
        if len(rows) >= 3 and _span_triangle(rows)
    ]


def _list_surfaces(section: str, results: Results) -> dict[str, list[dict[str, Any]]]:
    """List what a surrogate predicts for each soup of a section, by measure; {} without one."""
    surfaces: dict[str, list[dict[str, Any]]] = {}
    stored = [item for item in results.surrogates if item.get("section") == section]
    for row in (row for item in stored for row in item.get("rows") or ()):
        try:
            bands = {CLEAN: row[CLEAN], **row["predicted"]}
            for measure, band in bands.items():
                shares = [float(share) for share in row["coefficients"]]
                point = {
                    "name": str(row["name"]),
                    "shares": shares,
                    "attacked": bool(row["attacked"]),
                    **{key: round(float(band[key]), 5) for key in ("value", "low", "high")},
                }
                if len(shares) == 3:
                    surfaces.setdefault(measure, []).append(point)
        except (KeyError, TypeError, ValueError):  # another program wrote the file
            return {}
    return surfaces


def _list_dials(results: Results) -> list[dict[str, Any]]:
    """List the dials, the soups of each in the order of t."""
    return [
        _describe_group(section + curve.name.removeprefix("t"), curve.rows, results)
        for section, rows in group_by_section(results.rows, "dial").items()
        for curve in group_into_curves([row for row in rows if row.at is not None])
    ]


def _list_lines(results: Results) -> list[dict[str, Any]]:
    """List the lines and grids between two networks, in the order of the second one's weight."""
    groups = [
        (section, _mixtures_of(rows, 2))
        for section, rows in group_by_section(results.rows, "line", "grid").items()
    ]
    return [
        _describe_group(section, sorted(rows, key=_last_share), results)
        for section, rows in groups
        if len(rows) >= 2
    ]


def _mixtures_of(rows: Sequence[ResultRow], n: int) -> list[ResultRow]:
    """Return the rows that mix n ingredients with one coefficient each."""
    return [row for row in rows if len(row.ingredients or ()) == len(row.coefficients or ()) == n]


def _span_triangle(rows: Sequence[ResultRow]) -> bool:
    return np.linalg.matrix_rank(np.array([row.coefficients for row in rows], dtype=float)) == 3


def _last_share(row: ResultRow) -> float:
    return (row.coefficients or ())[-1]


def _describe_group(section: str, rows: Sequence[ResultRow], results: Results) -> dict[str, Any]:
    numbers = {row.name: number for number, row in enumerate(results.rows)}
    return {
        "section": section,
        "ingredients": rows[0].ingredients or (),
        "rows": [numbers[row.name] for row in rows],
    }


def _list_layers(run: StoredRun) -> list[dict[str, Any]]:
    """List the coefficients by layer of soups, the chosen one first, up to MOST_SHARES."""
    soups: list[dict[str, Any]] = []
    total = 0
    for number, coefficients in _read_coefficients(run.results, run.folder):
        total += coefficients.alpha.numel()
        if total > MOST_SHARES:
            break
        row = run.results.rows[number]
        soups.append(
            {
                "row": number,
                "ingredients": name_ingredients(row, coefficients),
                "layers": [name_layer(layer) for layer in coefficients.layers],
                "shares": [
                    [round(share, 4) for share in shares] for shares in coefficients.alpha.tolist()
                ],
            }
        )
    return soups


def _read_coefficients(results: Results, folder: Path) -> Iterator[tuple[int, Coefficients]]:
    """Read the files of coefficients that can be read: that of the chosen soup, then the others."""
    chosen = None if results.selection is None else results.selection.chosen
    for number, row in sorted(enumerate(results.rows), key=lambda item: item[1].name != chosen):
        if row.coefficients_file:
            try:
                yield number, Coefficients.load(folder / row.coefficients_file)
            except RequestError:  # `write_coefficient_tables` reports it
                continue


def _describe_plane(plane: LossPlane) -> dict[str, Any]:
    return {
        "name": plane.name,
        "settings": hide_folders(plane.settings),
        "checkpoints": plane.checkpoints,
        "corners": plane.corners.tolist(),
        "columns": len(plane.x),
        "rows": len(plane.y),
        "x": [float(plane.x[0]), float(plane.x[-1])],
        "y": [float(plane.y[0]), float(plane.y[-1])],
        "loss": [
            round(value, 4) if np.isfinite(value) else None for value in plane.loss.ravel().tolist()
        ],
    }

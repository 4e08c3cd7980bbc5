"""The report: one self-contained HTML file, rendered from templates/report.html."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.reports.best import BestRule
from robustsoup.reports.examples import ExamplePage
from robustsoup.reports.file_names import hide_all_folders, hide_folders
from robustsoup.reports.measures import CLEAN, LAYERWISE_ROLES, list_caveats, list_compared_measures
from robustsoup.reports.origins import Origin
from robustsoup.reports.summary import summarise_results
from robustsoup.reports.tables import Cell, Table
from robustsoup.runs.results import ROLES, ResultRow, Results

Fact = tuple[str, str]

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.min.js", "templates/report.js")
"""The scripts of the page, in order. vendor/LICENSES.txt says where the first two come from."""


@dataclass(frozen=True)
class PageParts:
    """What the report shows beside the results themselves.

    Attributes:
        rule: The rule for the best soup.
        chart_data: What report.js draws.
        coefficient_tables: Coefficients by layer.
        difference_table: Differences of the chosen soup from its ingredients, or None.
        figure_tables: Tables that belong to drawn figures.
        figures: Names of the drawn figures.
        left_out: (name, reason in one line) of each figure or table that was left out.
        examples: Adversarial images, or None.
        origins: Where the chosen soup comes from, or None.
        commands: (what it does, command) for the chosen soup.
        unfinished: What is missing from the run, in one line; "" if it is complete.
    """

    rule: BestRule
    chart_data: Mapping[str, Any]
    coefficient_tables: Sequence[Table]
    difference_table: Table | None
    figure_tables: Sequence[Table]
    figures: Sequence[str]
    left_out: Sequence[tuple[str, str]]
    examples: ExamplePage | None
    origins: Origin | None
    commands: Sequence[tuple[str, str]]
    unfinished: str


@dataclass(frozen=True)
class Banner:
    """A warning at the top of the report; `status` determines its colour."""

    status: str
    text: str
    reason: str


@dataclass(frozen=True)
class AccuracyCell:
    """An accuracy of the table of networks: the share, and texts in percent."""

    share: float
    value: str
    interval: str


@dataclass(frozen=True)
class NetworkLine:
    """A line of the table of networks: row `number` of the results; None was not measured."""

    number: int
    name: str
    role: str
    coefficients: str
    choice: str
    cells: list[AccuracyCell | None]


def render_report(results: Results, parts: PageParts) -> str:
    """Render the report.

    Args:
        results: The results of the run.
        parts: What else the page shows.

    Returns:
        The HTML page; equal results give equal text. It names files, and no folders.
    """
    environment = Environment(
        loader=PackageLoader("robustsoup.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell_text"] = format_cell
    scripts = [_read_script(name) for name in SCRIPTS]
    columns = _list_columns(results)
    return environment.get_template("report.html").render(
        vars(parts)
        | {
            "name": hide_folders(results.name),
            "subtitle": _format_subtitle(results),
            "banners": _make_banners(results, parts.unfinished),
            "is_fresh": results.leakage is not None and results.leakage.status == "known",
            "answer": summarise_results(results),
            "rule": parts.rule.statement,
            "left_out": [(name, hide_folders(reason)) for name, reason in parts.left_out],
            "columns": [f"{measure}, {split}" for split, measure in columns],
            "networks": _make_network_lines(results, columns),
            "masking": [(row.name, line) for row in results.rows for line in row.masking_check],
            "facts": _list_facts(results),
            "warnings": _list_warnings(results),
            "recipe": json.dumps(hide_all_folders(results.recipe), indent=2, ensure_ascii=False),
            "scripts": [Markup(script) for script in scripts],  # files of the package
            "script_hashes": " ".join(map(_hash_script, scripts)),
        }
    )


def _read_script(name: str) -> str:
    return (files("robustsoup.reports") / name).read_text(encoding="utf-8")


def _hash_script(script: str) -> str:
    """Return the source expression that lets a browser run this script and no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def format_cell(cell: Cell) -> str:
    """Format a cell of a table: three digits for a number, a dash for None."""
    if cell is None:
        return "–"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _format_subtitle(results: Results) -> str:
    data = results.data.get("name")
    parts = [results.model, f"on {data}" if data else None, results.created]
    return hide_folders(" · ".join(part for part in parts if part))


def _make_banners(results: Results, unfinished: str) -> list[Banner]:
    status = results.leakage.status if results.leakage else "unknown"
    reason = (results.leakage.why if results.leakage else "") or "no record of it"
    banners = []
    if caveats := list_caveats(results):
        text = f"{' · '.join(caveats)}: this biases the accuracies of selected networks upwards."
        text = text[0].upper() + text[1:]
        banners.append(Banner("violated", text, reason if status == "violated" else ""))
    if status == "unknown":
        text = "Unknown whether the selection data is fresh."
        banners.append(Banner(status, text, reason))
    elif status not in ("known", "violated"):
        banners.append(Banner(status, status, reason))
    if unfinished:
        banners.append(Banner("unknown", unfinished, ""))
    return [
        Banner(item.status, hide_folders(item.text), hide_folders(item.reason)) for item in banners
    ]


def _list_columns(results: Results) -> list[tuple[str, str]]:
    """List the (split, measure) pairs that were measured for any network."""
    protocol = results.protocol
    return [
        (split, measure)
        for split in dict.fromkeys((protocol.select_on, protocol.report_on))
        for measure in (CLEAN, *list_compared_measures(results))
        if any(row.accuracy(split, measure) for row in results.rows)
    ]


def _make_network_lines(results: Results, columns: Sequence[tuple[str, str]]) -> list[NetworkLine]:
    selection = results.selection
    chosen, word = (selection.chosen, selection.choice_word) if selection else ("", "")
    numbers = {row.name: number for number, row in enumerate(results.rows)}
    return [
        NetworkLine(
            number=numbers[row.name],
            name=row.name,
            role=row.role,
            coefficients=_format_coefficients(row),
            choice=word if row.name == chosen else "",
            cells=[_make_cell(row.accuracy(*column)) for column in columns],
        )
        for row in sorted(results.rows, key=lambda row: (ROLES.index(row.role), row.name))
    ]


def _make_cell(accuracy: Accuracy | None) -> AccuracyCell | None:
    if accuracy is None:
        return None
    return AccuracyCell(
        share=accuracy.value,
        value=f"{100 * accuracy.value:.1f}",
        interval=f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]",
    )


def _format_coefficients(row: ResultRow) -> str:
    if row.coefficients:
        return " / ".join(f"{weight:.3g}" for weight in row.coefficients)
    if row.role not in LAYERWISE_ROLES:
        return "–"
    return "by layer" + (f", t = {row.at:g}" if row.at is not None else "")


def _list_facts(results: Results) -> list[Fact]:
    """List facts about the run for the report; facts that are not recorded are left out."""
    protocol, data, versions = results.protocol, results.data, results.versions
    facts = [
        ("attack", _format_attack(results)),
        ("threats", ", ".join(protocol.threats)),
        (
            "samples",
            ", ".join(f"{count} {split}" for split, count in protocol.samples.items() if count),
        ),
        ("selected on", protocol.select_on),
        ("reported on", protocol.report_on),
        ("precision", protocol.precision),
        ("searched in", protocol.search_precision),
        ("not attacked in full", _format_screened(results)),
        (
            "seeds",
            _join_known(
                {
                    "recipe": results.recipe.get("seed"),
                    "attack": protocol.seed,
                    "split": data.get("seed"),
                }
            ),
        ),
        ("data", ", ".join(str(data[key]) for key in ("name", "split_digest") if data.get(key))),
        (
            "versions",
            _join_known(
                {name: versions[name] for name in versions if name not in ("device", "threads")}
            ),
        ),
        ("device", str(versions.get("device") or "")),
        ("threads", str(versions.get("threads") or "")),
        ("seconds", "" if results.seconds is None else f"{results.seconds:.0f}"),
    ]
    return [(name, hide_folders(value)) for name, value in facts if value]


def _list_warnings(results: Results) -> list[str]:
    """List what makes accuracies doubtful, one line each."""
    warnings = list(results.warnings)
    warnings += [f"{row.name}: {text}" for row in results.rows for text in row.warnings]
    for overlap in results.duplicates:
        found = ", ".join(f"{key} {value}" for key, value in overlap.items())
        warnings.append(f"samples that are in two splits: {found}")
    return [hide_folders(text) for text in warnings]


def _format_attack(results: Results) -> str:
    protocol = results.protocol
    parts = [
        protocol.attack,
        f"{protocol.loss} loss" if protocol.loss else "",
        f"{protocol.steps} {protocol.step_word}" if protocol.steps else "",
        f"{protocol.restarts} restart{'' if protocol.restarts == 1 else 's'}",
    ]
    return ", ".join(filter(None, parts))


def _format_screened(results: Results) -> str:
    split = results.protocol.select_on
    return "; ".join(f"{row.name}: {split} {row.doubt}" for row in results.rows if row.screened)


def _join_known(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)

"""The report: one self-contained HTML file, rendered from templates/report.html."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.reports.measures import CLEAN, LAYERWISE_ROLES, list_caveats, list_compared_measures
from robustsoup.reports.summary import summarise_results
from robustsoup.reports.tables import Cell, Table
from robustsoup.runs.results import ROLES, ResultRow, Results

Fact = tuple[str, str]


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report.

    Attributes:
        name: Id on the page.
        svg: The picture.
        caption: One sentence that describes the figure.
        tables: Collapsed tables below it.
    """

    name: str
    svg: bytes
    caption: str
    tables: Sequence[Table]

    @property
    def svg_base64(self) -> str:
        """The picture for a data URL."""
        return base64.b64encode(self.svg).decode("ascii")


@dataclass(frozen=True)
class Banner:
    """A warning at the top of the report; `status` determines its colour."""

    status: str
    text: str
    reason: str


@dataclass(frozen=True)
class AccuracyCell:
    """An accuracy of the table of networks, in percent."""

    value: str
    interval: str
    is_best: bool


@dataclass(frozen=True)
class NetworkLine:
    """A line of the table of networks; a cell is None where nothing was measured."""

    name: str
    role: str
    coefficients: str
    is_selected: bool
    cells: list[AccuracyCell | None]


def render_report(
    results: Results, figures: Sequence[ReportFigure], left_out: Sequence[tuple[str, str]]
) -> str:
    """Render the report.

    Args:
        results: The results of the run.
        figures: The figures in order.
        left_out: (name, reason in one line) of each figure or table that was left out.

    Returns:
        The HTML page; equal results give equal text.
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
    columns = _list_columns(results)
    return environment.get_template("report.html").render(
        name=results.name,
        subtitle=_format_subtitle(results),
        banners=_make_banners(results),
        is_fresh=results.leakage is not None and results.leakage.status == "known",
        summary=summarise_results(results),
        figures=figures,
        left_out=left_out,
        columns=[f"{measure}, {split}" for split, measure in columns],
        networks=_make_network_lines(results, columns),
        masking=[(row.name, line) for row in results.rows for line in row.masking_check],
        facts=_list_facts(results),
        recipe=json.dumps(results.recipe, indent=2, ensure_ascii=False),
    )


def format_cell(cell: Cell) -> str:
    """Format a cell of a table: three digits for a number, a dash for None."""
    if cell is None:
        return "–"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _format_subtitle(results: Results) -> str:
    data = results.data.get("name")
    parts = [results.model, f"on {data}" if data else None, results.created]
    return " · ".join(part for part in parts if part)


def _make_banners(results: Results) -> list[Banner]:
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
    return banners


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
    best = {
        column: max(accuracy.value for row in results.rows if (accuracy := row.accuracy(*column)))
        for column in columns
    }
    chosen = results.selection and results.selection.chosen
    return [
        NetworkLine(
            name=row.name,
            role=row.role,
            coefficients=_format_coefficients(row),
            is_selected=row.name == chosen,
            cells=[_make_cell(row.accuracy(*column), best[column]) for column in columns],
        )
        for row in sorted(results.rows, key=lambda row: (ROLES.index(row.role), row.name))
    ]


def _make_cell(accuracy: Accuracy | None, best: float) -> AccuracyCell | None:
    if accuracy is None:
        return None
    return AccuracyCell(
        value=f"{100 * accuracy.value:.1f}",
        interval=f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]",
        is_best=accuracy.value == best,
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
        ("samples", ", ".join(f"{count} {split}" for split, count in protocol.samples.items())),
        ("selected on", protocol.select_on),
        ("reported on", protocol.report_on),
        ("precision", protocol.precision),
        ("searched in", protocol.search_precision),
        ("screened", _format_screened(results)),
        (
            "warnings",
            "; ".join(f"{row.name}: {text}" for row in results.rows for text in row.warnings),
        ),
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
    return [(name, value) for name, value in facts if value]


def _format_attack(results: Results) -> str:
    protocol = results.protocol
    return (
        f"{protocol.attack}, {protocol.loss} loss, {protocol.steps} {protocol.step_word}, "
        f"{protocol.restarts} restart(s)"
    )


def _format_screened(results: Results) -> str:
    names = ", ".join(row.name for row in results.rows if row.screened)
    return f"{names} ({results.protocol.select_on} figures are upper bounds)" if names else ""


def _join_known(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)

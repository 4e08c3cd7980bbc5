"""Figures and the HTML report of a run, drawn from stored results alone."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib import rc_context

from robustsoup.errors import RequestError, RobustsoupError
from robustsoup.files import remove_file, write_text
from robustsoup.paths import user_path
from robustsoup.reports.best import BestRule
from robustsoup.reports.card import CARD, write_run_card
from robustsoup.reports.chart_data import make_chart_data
from robustsoup.reports.coefficients import (
    draw_coefficients,
    draw_dial,
    draw_learned,
    tabulate_all_soups,
)
from robustsoup.reports.commands import list_commands
from robustsoup.reports.curves import draw_curves
from robustsoup.reports.differences import compare_with_ingredients, tabulate_differences
from robustsoup.reports.examples import read_examples
from robustsoup.reports.lines import draw_lines
from robustsoup.reports.measures import StoredRun
from robustsoup.reports.origins import describe_soup_of, trace_origins
from robustsoup.reports.page import PageParts, render_report
from robustsoup.reports.planes import draw_landscape, read_planes
from robustsoup.reports.style import STYLE, Plot, save_plot
from robustsoup.reports.tables import (
    coefficient_table,
    write_coefficient_csv,
    write_coefficient_tables,
)
from robustsoup.reports.ternary import draw_ternary
from robustsoup.reports.tradeoff import draw_tradeoff
from robustsoup.reports.unfinished import describe_progress, describe_unfinished
from robustsoup.runs.description import Description
from robustsoup.runs.results import Results
from robustsoup.runs.staging import PAGE

__all__ = [
    "FIGURES",
    "StoredRun",
    "check_finished",
    "coefficient_table",
    "draw_dial",
    "draw_learned",
    "save_plot",
    "write_coefficient_csv",
    "write_report",
]

FIGURES: dict[str, Callable[[StoredRun], tuple[list[Plot], str]]] = {
    "ternary": draw_ternary,
    "lines": draw_lines,
    "tradeoff": draw_tradeoff,
    "curves": draw_curves,
    "landscape": draw_landscape,
    "coefficients": draw_coefficients,
}
"""Functions that draw the figures of a recipe; each returns its plots, and why any is left out."""

_FIGURE_FILE = re.compile(rf"({'|'.join(FIGURES)})(-\d+)?\.(png|svg|pdf)")


def write_report(folder: Path) -> Path:
    """Draw the figures that folder/results.json requests; write folder/report.html and the card.

    Each figure is saved in folder/figures as .png (200 dpi), .svg and .pdf, and the coefficients of
    each soup with a coefficients file in folder/coefficients as .csv. Figures that do not apply are
    left out, and the report states the reason. README.md is the card of the chosen soup; a card
    that was edited stays. Requires no display and no network access, and leaves matplotlib's
    settings unchanged.

    Args:
        folder: A folder that `robustsoup run` wrote.

    Returns:
        The path of the report.

    Raises:
        RequestError: results.json is missing or broken, or requests an unknown figure.
        StorageError: A file cannot be written.
    """
    folder = user_path(folder)
    check_finished(folder)
    run = StoredRun(Results.load(folder / "results.json"), folder)
    run.results.check_files(folder)
    requested = list(FIGURES) if run.results.figures is None else run.results.figures
    for name in requested:
        if name not in FIGURES:
            raise RequestError(
                f'{folder / "results.json"}: figures: got "{name}", expected {", ".join(FIGURES)}'
            )
    plots, left_out = _draw_figures(run, requested)
    _remove_old_figures(folder / "figures", {plot.stem for plot in plots})
    left_out += write_coefficient_tables(run.results.rows, folder)
    if reason := write_run_card(run.results, folder):
        left_out.append((CARD, reason))
    target = folder / PAGE
    write_text(target, render_report(run.results, collect_parts(run, plots, left_out)))
    return target


def check_finished(folder: Path) -> None:
    """Raise RequestError if a run in the folder has not come to its results."""
    if not (folder / "results.json").exists() and (progress := describe_progress(folder)):
        raise RequestError(progress)


def collect_parts(
    run: StoredRun, plots: Sequence[Plot], left_out: list[tuple[str, str]]
) -> PageParts:
    """Collect what the page shows beside the results themselves."""
    rule = BestRule.of(run.results)
    differences = compare_with_ingredients(run.results, run.folder)
    planes, _ = read_planes(run)
    examples, no_examples = read_examples(run)
    soup, no_origins = _describe_soup(run)
    reasons = (("adversarial images", no_examples), ("origins", no_origins))
    return PageParts(
        rule=rule,
        chart_data=make_chart_data(run, rule, differences, planes),
        coefficient_tables=tabulate_all_soups(run),
        difference_table=tabulate_differences(differences),
        figure_tables=[
            table
            for plot in plots
            if not plot.stem.startswith("coefficients")
            for table in plot.tables
        ],
        figures=[plot.stem for plot in plots],
        left_out=[*left_out, *(item for item in reasons if item[1])],
        examples=examples,
        origins=None if soup is None else trace_origins(soup.tree),
        commands=list_commands(run.results, None if soup is None else soup.network),
        unfinished=describe_unfinished(run.results, run.folder),
    )


def _describe_soup(run: StoredRun) -> tuple[Description | None, str]:
    """Describe the chosen soup; None and why, if there is one that cannot be read."""
    if run.results.soup is None:
        return None, ""
    try:
        return describe_soup_of(run.results, run.folder), ""
    except RobustsoupError as error:
        return None, str(error)


def _draw_figures(run: StoredRun, names: Iterable[str]) -> tuple[list[Plot], list[tuple[str, str]]]:
    """Draw and save figures.

    Returns:
        The plots, and (name, reason) of what was left out.
    """
    plots: list[Plot] = []
    left_out: list[tuple[str, str]] = []
    with rc_context(STYLE):
        for name in names:
            drawn, reason = FIGURES[name](run)
            for plot in drawn:
                save_plot(plot, run.folder / "figures")
            plots += drawn
            if reason:
                left_out.append((name, reason))
    return plots, left_out


def _remove_old_figures(folder: Path, stems: set[str]) -> None:
    """Remove figures that earlier reports drew; other files stay."""
    for path in folder.glob("*.*"):
        if _FIGURE_FILE.fullmatch(path.name) and path.stem not in stems:
            remove_file(path)

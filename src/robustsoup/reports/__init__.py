"""Figures and the HTML report of a run, drawn from stored results alone."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib import rc_context

from robustsoup.errors import RequestError
from robustsoup.files import remove_file, write_text
from robustsoup.paths import user_path
from robustsoup.reports.card import CARD, write_run_card
from robustsoup.reports.coefficients import draw_coefficients, draw_dial, draw_learned
from robustsoup.reports.curves import draw_curves
from robustsoup.reports.lines import draw_lines
from robustsoup.reports.measures import StoredRun
from robustsoup.reports.page import ReportFigure, render_report
from robustsoup.reports.planes import draw_landscape
from robustsoup.reports.style import STYLE, Plot, save_plot
from robustsoup.reports.tables import (
    coefficient_table,
    write_coefficient_csv,
    write_coefficient_tables,
)
from robustsoup.reports.ternary import draw_ternary
from robustsoup.reports.tradeoff import draw_tradeoff
from robustsoup.runs.results import Results

__all__ = [
    "FIGURES",
    "StoredRun",
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
    figures = [
        ReportFigure(
            plot.stem,
            (folder / "figures" / f"{plot.stem}.svg").read_bytes(),
            plot.caption,
            plot.tables,
        )
        for plot in plots
    ]
    if reason := write_run_card(run.results, folder):
        left_out.append((CARD, reason))
    target = folder / "report.html"
    write_text(target, render_report(run.results, figures, left_out))
    return target


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

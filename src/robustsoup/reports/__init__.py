"""Figures and the HTML report of a run. They read stored results and never run a model."""

import re
from pathlib import Path

import matplotlib

from robustsoup.errors import RequestError
from robustsoup.files import remove_file, write_text
from robustsoup.reports.coefficients import draw_coefficients, draw_dial, draw_learned
from robustsoup.reports.curves import draw_curves
from robustsoup.reports.html import page
from robustsoup.reports.lines import draw_lines
from robustsoup.reports.planes import draw_landscape
from robustsoup.reports.results import read_results
from robustsoup.reports.style import STYLE, save
from robustsoup.reports.tables import (
    coefficient_table,
    write_coefficient_csv,
    write_coefficient_tables,
)
from robustsoup.reports.ternary import draw_ternary
from robustsoup.reports.tradeoff import draw_tradeoff

__all__ = [
    "FIGURES",
    "coefficient_table",
    "draw_dial",
    "draw_learned",
    "save",
    "write_coefficient_csv",
    "write_report",
]

FIGURES = {
    "ternary": draw_ternary,
    "lines": draw_lines,
    "tradeoff": draw_tradeoff,
    "curves": draw_curves,
    "landscape": draw_landscape,
    "coefficients": draw_coefficients,
}


def write_report(folder: Path) -> Path:
    """Draw the figures that folder/results.json asks for and write folder/report.html; returns its path.

    Each figure goes to folder/figures as .png (200 dpi), .svg and .pdf, and the coefficients of each soup that has a
    file of them to folder/coefficients as .csv. What does not apply is left out, and the report says why. Needs no
    display and no network, and touches no matplotlib settings of the caller.

    Raises RequestError for a missing or broken results.json or an unknown figure, StorageError if a file cannot be
    written.
    """
    folder = Path(folder)
    results = read_results(folder / "results.json")
    wanted = results.get("figures")
    wanted = list(FIGURES) if wanted is None else wanted
    for name in wanted:
        if name not in FIGURES:
            raise RequestError(
                f'{folder / "results.json"}: figures: got "{name}", expected {", ".join(FIGURES)}'
            )
    plots, left_out = [], []
    with matplotlib.rc_context(STYLE):
        for name in wanted:
            drawn, reason = FIGURES[name](results, folder)
            for plot in drawn:
                save(plot, folder / "figures")
            plots += drawn
            left_out += [(name, reason)] if reason else []
    ours, stems = (
        re.compile(rf"({'|'.join(FIGURES)})(-\d+)?\.(png|svg|pdf)"),
        {plot.stem for plot in plots},
    )
    for old in (folder / "figures").glob("*.*"):  # of other settings
        if ours.fullmatch(old.name) and old.stem not in stems:
            remove_file(old)
    left_out += write_coefficient_tables(results["rows"], folder)
    pictures = [
        (
            plot.stem,
            (folder / "figures" / f"{plot.stem}.svg").read_bytes(),
            plot.caption,
            plot.tables,
        )
        for plot in plots
    ]
    target = folder / "report.html"
    write_text(target, page(results, pictures, left_out))
    return target

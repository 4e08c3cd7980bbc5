"""Accuracy on lines between two networks (WiSE-FT; Fig. 4 of Huang 2023)."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from robustsoup.reports.labels import Label, place_labels, spread_over_line
from robustsoup.reports.measures import (
    CLEAN,
    PlotScale,
    StoredRun,
    choose_split,
    group_by_section,
    is_exact,
    list_robust_measures,
    rows_with_measures,
)
from robustsoup.reports.style import (
    INK,
    MUTED,
    Plot,
    add_accuracy_grid,
    add_footer,
    add_title,
    clean_text,
    draw_intervals,
    new_figure,
    number_stem,
    summarise_attack,
)
from robustsoup.reports.tables import Cell, Table
from robustsoup.runs.results import EvaluationProtocol, ResultRow, Results

MAX_LINE_COLUMNS = 4
MIN_POINTS = 3
LINE_COLOUR, END_COLOUR = "#0072B2", "#D55E00"
GAP_SUMMARY = (
    "largest gap: robust accuracy less that of the line at the same clean accuracy, in points, by "
    "the estimates alone (no interval); not comparable: soups whose clean accuracy is not between "
    "those of the line's ends, or that were not attacked in full"
)

Lines = dict[str, list[ResultRow]]


def draw_lines(run: StoredRun) -> tuple[list[Plot], str]:
    """Draw one figure for each threat, with a panel for each line of soups of two networks.

    Returns:
        The figures, and the reason if there is none or a line was left out.
    """
    results = run.results
    plots: list[Plot] = []
    reasons: list[str] = []
    split = choose_split(results.rows, results.protocol)
    for measure in list_robust_measures(results):
        lines: Lines = {}
        for section, section_rows in group_by_section(results.rows, "line").items():
            rows = _order_along_line(rows_with_measures(section_rows, split, CLEAN, measure))
            if rows:
                lines[section] = rows
            else:
                reasons.append(
                    f"{section}: requires both ends and a soup between them, measured on {split}"
                )
        if lines:
            scale = PlotScale(split, measure)
            plots.append(_plot_lines(results, lines, scale, number_stem("lines", len(plots))))
    if not plots and not reasons:
        reasons.append("no line of soups of two networks was measured")
    return plots, "; ".join(dict.fromkeys(reasons))


def gaps_above_chord(ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Subtract the robust accuracy of the line between two ends at the same clean accuracy.

    Args:
        ends: (2, 2), each (clean, robust).
        points: (k, 2), each (clean, robust).

    Returns:
        (k,); NaN for a point whose clean accuracy is not between those of the ends, and for all
        points if the ends are equally clean.
    """
    (clean_0, robust_0), (clean_1, robust_1) = ends
    if clean_0 == clean_1:
        return np.full(len(points), np.nan)
    share = (points[:, 0] - clean_0) / (clean_1 - clean_0)
    gaps = points[:, 1] - (robust_0 + share * (robust_1 - robust_0))
    return np.where((share >= 0) & (share <= 1), gaps, np.nan)


def tabulate_gaps(
    ends: Sequence[ResultRow],
    points: Sequence[ResultRow],
    labels: Sequence[str],
    scale: PlotScale,
    protocol: EvaluationProtocol,
) -> dict[str, Cell]:
    """Tabulate how far points lie above the line between two ends, as cells of one line.

    Points whose accuracy is an estimate or a bound are not comparable, nor is any with such an end.
    """
    exact = [
        all(is_exact(row, scale.split, scale.measure, protocol) for row in (*ends, point))
        for point in points
    ]
    gaps = gaps_above_chord(scale.coordinates(ends), scale.coordinates(points))
    gaps = np.where(exact, gaps, np.nan)
    comparable = np.isfinite(gaps)
    best = int(np.nanargmax(gaps)) if comparable.any() else None
    return {
        "largest gap": None if best is None else f"{gaps[best]:+.1f}",
        "at": None if best is None else labels[best],
        "above the line": f"{int((gaps[comparable] > 0).sum())} of {int(comparable.sum())}",
        "not comparable": int((~comparable).sum()),
    }


def _order_along_line(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Order rows by the second network's weight; empty without both ends and a soup between."""
    rows = [
        row for row in rows if len(row.ingredients or ()) == 2 and len(row.coefficients or ()) == 2
    ]
    rows = sorted(rows, key=_second_weight)
    complete = (
        len(rows) >= MIN_POINTS
        and abs(_second_weight(rows[0])) < 1e-9
        and abs(_second_weight(rows[-1]) - 1) < 1e-9
    )
    return rows if complete else []


def _second_weight(row: ResultRow) -> float:
    return (row.coefficients or ())[1]


def _plot_lines(results: Results, lines: Lines, scale: PlotScale, stem: str) -> Plot:
    columns = 3 if len(lines) == MAX_LINE_COLUMNS + 1 else min(MAX_LINE_COLUMNS, len(lines))
    panel_rows = math.ceil(len(lines) / columns)
    width = {1: 4.6, 2: 3.8}.get(columns, 3.1)
    figure = new_figure(
        max(width * columns, 5.4), 0.85 * width * panel_rows + 0.75, w_pad=0.07, h_pad=0.07
    )
    panels: list[tuple[Axes, list[ResultRow]]] = []
    for number, (section, rows) in enumerate(lines.items()):
        axes = figure.add_subplot(panel_rows, columns, number + 1)
        _draw_line_panel(axes, rows, scale)
        axes.set_title(clean_text(section, 34), loc="left")
        if number % columns == 0:
            axes.set_ylabel(f"robust accuracy, {clean_text(scale.measure)} (%)")
        if number + columns >= len(lines):
            axes.set_xlabel(f"clean accuracy on {clean_text(scale.split)} (%)")
        panels.append((axes, rows))
    add_title(figure, f"{clean_text(results.name)}: from one network to another")
    all_rows = [row for rows in lines.values() for row in rows]
    attack = summarise_attack(results.protocol, scale.split, all_rows)
    add_footer(
        figure,
        "numbers: the weight of the second network · dashed: straight line between the ends · "
        f"{attack} · bars: 95 % Wilson intervals",
        results,
    )
    for axes, _ in panels:
        axes.autoscale_view()
        axes.autoscale(False)
    figure.draw_without_rendering()
    for axes, rows in panels:
        _label_line_panel(axes, rows, scale)
    caption = (
        f"Clean accuracy against robust accuracy at {scale.measure} on {scale.split}, along "
        f"{len(lines)} line(s) between two networks."
    )
    return Plot(stem, figure, caption, (_tabulate_lines(lines, scale, results.protocol),))


def _draw_line_panel(axes: Axes, rows: Sequence[ResultRow], scale: PlotScale) -> None:
    xy = scale.coordinates(rows)
    draw_intervals(axes, scale, rows, colour=LINE_COLOUR, opacity=0.28, zorder=2)
    axes.plot(*xy[[0, -1]].T, "--", color=MUTED, linewidth=1, zorder=3)
    axes.plot(
        *xy.T,
        "-o",
        color=LINE_COLOUR,
        linewidth=1.3,
        markersize=4.5,
        markeredgecolor="white",
        zorder=5,
    )
    axes.plot(
        *xy[[0, -1]].T, "s", color=END_COLOUR, markersize=6, markeredgecolor="white", zorder=6
    )
    add_accuracy_grid(axes, 0.1)


def _label_line_panel(axes: Axes, rows: Sequence[ResultRow], scale: PlotScale) -> None:
    xy = scale.coordinates(rows)
    first, second = (clean_text(name, 20) for name in rows[0].ingredients or ())
    texts = [
        f"0 ({first})",
        *[f"{_second_weight(row):.3g}" for row in rows[1:-1]],
        f"1 ({second})",
    ]
    labels: list[Label] = [(*point, text, INK) for point, text in zip(xy, texts, strict=True)]
    # The long labels of the ends come last: they have room outside the line.
    labels = [*labels[1:-1], labels[0], labels[-1]]
    pieces = [spread_over_line(xy[i], xy[i + 1]) for i in range(len(xy) - 1)]
    avoid = np.concatenate([np.repeat(xy, 5, axis=0), *pieces, spread_over_line(xy[0], xy[-1])])
    place_labels(axes, labels, avoid, size=7.5)


def _tabulate_lines(lines: Lines, scale: PlotScale, protocol: EvaluationProtocol) -> Table:
    table_lines: list[dict[str, Cell]] = []
    for section, rows in lines.items():
        ends, between = (rows[0], rows[-1]), rows[1:-1]
        weights = [f"{_second_weight(row):.3g}" for row in between]
        first, second = rows[0].ingredients or ()
        names: dict[str, Cell] = {"line": section, "from": first, "to": second}
        table_lines.append(names | tabulate_gaps(ends, between, weights, scale, protocol))
    return Table(f"Above the straight line, {scale.measure}", GAP_SUMMARY, table_lines)

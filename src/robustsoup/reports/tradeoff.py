"""The trade-off figure: clean against robust accuracy (Fig. 5 of Huang 2023)."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes

from robustsoup.reports.best import parse_requirements
from robustsoup.reports.labels import Label, place_labels, spread_over_line
from robustsoup.reports.learned_curves import CURVE_COLOURS, group_into_curves
from robustsoup.reports.measures import (
    CLEAN,
    LAYERWISE_ROLES,
    PlotScale,
    StoredRun,
    choose_split,
    find_two_best,
    group_by_section,
    list_compared_measures,
    rows_with_measures,
)
from robustsoup.reports.style import (
    INK,
    MUTED,
    Plot,
    add_accuracy_grid,
    add_footer,
    clean_text,
    draw_intervals,
    name_accuracy,
    new_figure,
    number_stem,
    summarise_attack,
)
from robustsoup.runs.results import EvaluationProtocol, ResultRow, Results
from robustsoup.soups.answer import Answer

INGREDIENT_COLOUR, UNIFORM_COLOUR, GREEDY_COLOUR = "#0072B2", "#009E73", "#000000"
MERGE_COLOUR = "#CC79A7"
SELECTED_COLOUR = "#B00020"


def draw_tradeoff(run: StoredRun) -> tuple[list[Plot], str]:
    """Draw one figure for each threat.

    Returns:
        The figures, and the reason if there is none.
    """
    results = run.results
    plots: list[Plot] = []
    split = choose_split(results.rows, results.protocol)
    for measure in list_compared_measures(results):
        rows = rows_with_measures(results.rows, split, CLEAN, measure)
        if rows:
            stem = number_stem("tradeoff", len(plots))
            plots.append(_plot_tradeoff(results, rows, PlotScale(split, measure), stem))
    return plots, "" if plots else "no row has both a clean and a robust accuracy"


def _plot_tradeoff(
    results: Results, rows: Sequence[ResultRow], scale: PlotScale, stem: str
) -> Plot:
    figure = new_figure(7.4, 4.7)
    axes = figure.add_subplot()
    _draw_grid_soups(axes, rows, scale)
    _draw_uniform_and_greedy_soups(axes, rows, scale)
    _draw_two_best(axes, rows, results.protocol, scale)
    labels = _draw_learned_soups(axes, rows, scale) + _draw_ingredients(axes, rows, scale)
    _draw_requirements(axes, results.selection, scale)
    _draw_selected_soup(axes, results.selection, rows, scale)
    add_accuracy_grid(axes, 0.09)
    axes.set_xlabel(f"clean accuracy on {clean_text(scale.split)} (%)")
    axes.set_ylabel(f"{name_accuracy(scale.measure)} (%)")
    title = f"{clean_text(results.name)}: clean against robust accuracy"
    axes.set_title(title, loc="left", weight="bold")
    figure.legend(loc="outside right upper", handlelength=1.8, labelspacing=0.8)
    attack = summarise_attack(results.protocol, scale.split, rows)
    add_footer(figure, f"{attack} · bars: 95 % Wilson intervals", results)
    axes.autoscale_view()
    axes.autoscale(False)
    figure.draw_without_rendering()
    place_labels(axes, labels, _list_obstacles(rows, scale))
    caption = (
        f"Clean accuracy against {name_accuracy(scale.measure)} on {scale.split}, for "
        f"{len(rows)} networks."
    )
    return Plot(stem, figure, caption)


def _list_obstacles(rows: Sequence[ResultRow], scale: PlotScale) -> np.ndarray:
    """Return (k, 2) points that labels must avoid: rows, intervals, and lines of curves."""
    parts = [scale.coordinates(rows)]
    with_bars = [row for row in rows if row.role in ("ingredient", "pretrained", *LAYERWISE_ROLES)]
    if with_bars:
        xy = scale.coordinates(with_bars)
        for axis, lengths in enumerate(scale.interval_lengths(with_bars)):
            for share in np.linspace(0.2, 1, 5):
                for sign, length in zip((-1, 1), lengths, strict=True):
                    parts.append(xy + np.eye(2)[axis] * sign * share * length[:, None])
    for section in group_by_section(rows, *LAYERWISE_ROLES).values():
        for curve in group_into_curves(section):
            xy = scale.coordinates(curve.rows)
            # Count curves twice: a label that hides a curve is worse than one that hides a point.
            parts += [spread_over_line(start, end) for start, end in pairwise(xy)] * 2
    return np.concatenate(parts)


def _draw_grid_soups(axes: Axes, rows: Sequence[ResultRow], scale: PlotScale) -> None:
    grid = [row for row in rows if row.role == "grid"]
    if grid:
        label = f"grid ({len(grid)} soups)"
        axes.scatter(*scale.coordinates(grid).T, s=16, zorder=2, label=label, color="#a3a8ae")
    line = [row for row in rows if row.role == "line"]
    if line:
        axes.scatter(
            *scale.coordinates(line).T,
            s=16,
            zorder=2,
            label=f"line ({len(line)} soups)",
            facecolors="none",
            edgecolors="#8a9097",
            linewidths=0.9,
        )


def _draw_uniform_and_greedy_soups(axes: Axes, rows: Sequence[ResultRow], scale: PlotScale) -> None:
    for role, marker, size, colour in (
        ("uniform", "D", 64, UNIFORM_COLOUR),
        ("greedy", "P", 90, GREEDY_COLOUR),
        ("merge", "^", 36, MERGE_COLOUR),
    ):
        members = [row for row in rows if row.role == role]
        if members:
            axes.scatter(
                *scale.coordinates(members).T,
                s=size,
                marker=marker,
                color=colour,
                edgecolors="white",
                linewidths=0.8,
                zorder=5,
                label=f"{role} soup",
            )


def _draw_two_best(
    axes: Axes, rows: Sequence[ResultRow], protocol: EvaluationProtocol, scale: PlotScale
) -> None:
    label = "best clean and best robust\nof the grid"
    for grid in group_by_section(rows, "grid").values():
        best = find_two_best(grid, scale.measure, protocol)
        if best:
            axes.plot(
                *scale.coordinates(best).T,
                "--",
                marker="s",
                color="black",
                markersize=9,
                linewidth=1,
                zorder=3,
                label=label,
            )
            label = "_nolegend_"


def _draw_learned_soups(axes: Axes, rows: Sequence[ResultRow], scale: PlotScale) -> list[Label]:
    labels: list[Label] = []
    curves = [
        (section, curve)
        for section, members in group_by_section(rows, *LAYERWISE_ROLES).items()
        for curve in group_into_curves(members)
    ]
    for number, (section, curve) in enumerate(curves):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        xy = scale.coordinates(curve.rows)
        draw_intervals(axes, scale, curve.rows, colour=colour, opacity=0.4, zorder=3)
        name = clean_text(section, 16)
        axes.plot(
            *xy.T,
            "-o",
            color=colour,
            markersize=6,
            markeredgecolor="white",
            zorder=6,
            label=f"{name} ({clean_text(curve.name, 20)})" if curve.name else name,
        )
        labels += [
            (x, y, clean_text(label), colour)
            for label, (x, y) in zip(curve.labels, xy, strict=True)
        ]
    return labels


def _draw_ingredients(axes: Axes, rows: Sequence[ResultRow], scale: PlotScale) -> list[Label]:
    labels: list[Label] = []
    for role, marker, size, colour in (
        ("ingredient", "^", 62, INGREDIENT_COLOUR),
        ("pretrained", "*", 120, INK),
    ):
        members = [row for row in rows if row.role == role]
        if not members:
            continue
        xy = scale.coordinates(members)
        draw_intervals(axes, scale, members, colour=colour, opacity=0.4, zorder=3)
        axes.scatter(
            *xy.T,
            s=size,
            marker=marker,
            color=colour,
            edgecolors="white",
            linewidths=0.8,
            zorder=5,
            label=role,
        )
        labels += [
            (x, y, clean_text(row.name, 20), colour)
            for row, (x, y) in zip(members, xy, strict=True)
        ]
    return labels


def _draw_requirements(axes: Axes, selection: Answer | None, scale: PlotScale) -> None:
    required = parse_requirements(selection)
    for measure, draw_line, name in (
        (CLEAN, axes.axvline, CLEAN),
        (scale.measure, axes.axhline, clean_text(scale.measure)),
    ):
        if measure in required:
            percent = 100 * required[measure]
            draw_line(
                percent,
                label=f"required: {name} ≥ {percent:g} %",
                color=MUTED,
                linewidth=1,
                linestyle=":",
                zorder=1,
            )


def _draw_selected_soup(
    axes: Axes,
    selection: Answer | None,
    rows: Sequence[ResultRow],
    scale: PlotScale,
) -> None:
    chosen = [row for row in rows if selection and row.name == selection.chosen]
    if selection and chosen:
        axes.plot(
            *scale.coordinates(chosen[:1]).T,
            "o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor=SELECTED_COLOUR,
            markeredgewidth=1.6,
            zorder=7,
            label=f"{selection.choice_word}: {clean_text(chosen[0].name, 22)}",
        )

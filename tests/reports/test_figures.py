"""Ternary maps, trade-offs, lines, curves and planes, from synthetic results."""

import json
from itertools import product
from typing import get_args

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from synthetic_results import (
    CORNERS,
    NAMES,
    THREAT,
    add_dial_and_greedy,
    assert_inside_figure,
    make_accuracies,
    make_line_rows,
    make_results,
    make_row,
    small_print,
    stored_run,
    write_and_read_report,
    write_plane,
)

from robustsoup.recipes import Figure
from robustsoup.reports import FIGURES, planes
from robustsoup.reports.lines import gaps_above_chord
from robustsoup.reports.style import add_footer, new_figure, save_plot

PAPER = "the paper's protocol: selected on test"
LEAKED = "selected on samples that ingredients were trained on"


def draw(name, folder, results):
    return FIGURES[name](stored_run(folder, results))


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_a_recipe_may_request_exactly_the_figures():
    assert get_args(Figure) == tuple(FIGURES)


# Caveats


@pytest.mark.parametrize("selected_on_test", [False, True])
@pytest.mark.parametrize("leaked", [False, True])
def test_the_footer_states_what_biases_the_accuracies(results, tmp_path, selected_on_test, leaked):
    if selected_on_test:
        results["protocol"]["select_on"] = "test"
    if leaked:
        results["leakage"] = {"status": "violated", "why": "eps4 was trained on them"}
    figure = new_figure(9, 3)
    add_footer(figure, "other text", stored_run(tmp_path, results).results)
    caveats = [PAPER] * selected_on_test + [LEAKED] * leaked
    expected = " ".join([" · ".join(caveats), "other text"]).strip()
    assert figure.get_supxlabel().replace("\n", " ") == expected


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_states_what_biases_its_accuracies(tmp_path, all_results, draw_shared, name):
    text = small_print(draw_shared(name))
    assert not any(caveat in text for caveat in (PAPER, LEAKED))
    all_results["protocol"]["select_on"] = "test"
    all_results["leakage"] = {"status": "violated", "why": "eps4 was trained on them"}
    for row in all_results["rows"]:
        row["val"] = None
    (plot,), reason = draw(name, tmp_path, all_results)
    assert reason == ""
    assert small_print(plot).startswith(f"{PAPER} · {LEAKED}")


@pytest.mark.parametrize(
    ("screened", "attacked", "text"),
    [
        (True, None, "accuracies of screened soups are upper bounds"),
        (True, 128, "accuracies of screened soups are estimates"),
        (False, 600, "accuracies of soups attacked on a part are estimates"),
    ],
)
def test_doubtful_accuracies_are_marked(tmp_path, results, screened, attacked, text):
    results["protocol"] |= {"select_on": "test", "screened": screened}
    (plot,), _ = draw("tradeoff", tmp_path, results)
    assert text not in small_print(plot)
    results["rows"][-1] |= {"screened": True} | ({"attacked": attacked} if attacked else {})
    (plot,), _ = draw("tradeoff", tmp_path, results)
    assert text in small_print(plot)


@pytest.mark.usefixtures("small_formats")
@pytest.mark.parametrize("name", ["lines", "curves", "landscape"])
def test_figures_are_saved_in_three_formats_with_everything_inside(tmp_path, draw_shared, name):
    plot = draw_shared(name)
    plot.figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in plot.figure.axes]
    assert_inside_figure(plot.figure, [*boxes, plot.figure._supxlabel.get_window_extent()])
    save_plot(plot, tmp_path)
    for ending in ("png", "svg", "pdf"):
        assert (tmp_path / f"{name}.{ending}").stat().st_size > 1000


# Ternary maps


def test_soups_of_a_ternary_map_are_where_their_coefficients_say(all_results, draw_shared):
    rows = [row for row in all_results["rows"] if row["role"] == "grid"]
    panels = [axes for axes in draw_shared("ternary").figure.axes if axes.get_title()]
    for axes, measure in zip(panels, ("clean", THREAT), strict=True):
        corners = {
            text.get_text(): np.array(text.xy) for text in axes.texts if text.get_text() in NAMES
        }
        (dots,) = [
            collection
            for collection in axes.collections
            if len(collection.get_offsets()) == len(rows) and collection.get_array() is not None
        ]
        spots = np.asarray(dots.get_offsets(), dtype=float).round(6)
        values = {tuple(spot): value for spot, value in zip(spots, dots.get_array(), strict=True)}
        for row in rows:
            spot = sum(
                share * corners[name]
                for share, name in zip(row["coefficients"], NAMES, strict=True)
            )
            expected = 100 * row["test"][measure]["value"]
            assert values[tuple(np.round(spot, 6))] == pytest.approx(expected)


def test_an_upper_bound_is_not_ringed_as_the_best(tmp_path, results):
    grid = [row for row in results["rows"] if row["role"] == "grid"]
    for row in grid:
        row["test"] = None
    bound, *rest = sorted(grid, key=lambda row: row["coefficients"])
    bound["val"], bound["screened"] = make_accuracies(0.99, 0.9), True
    ((plot,), _) = draw("ternary", tmp_path, results)
    panels = [axes for axes in plot.figure.axes if axes.get_title()]
    for axes, measure, rows in zip(panels, ("clean", THREAT), (grid, rest), strict=True):
        highest = 100 * max(row["val"][measure]["value"] for row in rows)
        scatters = [item for item in axes.collections if isinstance(item, PathCollection)]
        (dots,) = [item for item in scatters if len(item.get_offsets()) == len(grid)]
        (rings,) = [item for item in scatters if item.get_sizes()[0] == 120]
        spots = np.asarray(dots.get_offsets(), dtype=float).round(6).tolist()
        ringed = np.asarray(rings.get_offsets(), dtype=float).round(6).tolist()
        values = [dots.get_array()[spots.index(spot)] for spot in ringed]
        assert values == pytest.approx([highest] * len(values))
        assert f"{highest:.1f} %" in {text.get_text() for text in axes.texts}


def make_grid_of_five():
    names = ["e10", "e20", "e30", "e40", "e50"]
    alphas = [np.eye(5)[i] / 2 + np.eye(5)[j] / 2 for i in range(5) for j in range(i, 5)]
    fields = {"soup": "continuous", "ingredients": names}
    return [
        make_row(f"continuous-{k}", "grid", 0.7, 0.3, coefficients=alpha.tolist(), **fields)
        for k, alpha in enumerate(alphas)
    ]


def test_only_grids_of_three_ingredients_are_ternary_maps(tmp_path, results):
    five = make_grid_of_five()
    second = [
        row | {"name": f"second-{row['name']}", "soup": "second"}
        for row in results["rows"]
        if row["role"] == "grid"
    ]
    plots, reason = draw("ternary", tmp_path, results | {"rows": results["rows"] + five + second})
    assert ([plot.stem for plot in plots], reason) == (["ternary", "ternary-2"], "")
    assert draw("ternary", tmp_path, results | {"rows": five}) == (
        [],
        "a ternary plot requires a measured grid of soups of three ingredients",
    )


# Trade-offs


def test_each_threat_and_the_union_have_a_tradeoff_and_a_ternary_panel(tmp_path, results):
    results["protocol"]["threats"] = [THREAT, "L2 0.5"]
    for row in results["rows"]:
        for split in ("val", "test"):
            row[split] |= {"L2 0.5": row[split][THREAT], "union": row[split][THREAT]}
    plots, _ = draw("tradeoff", tmp_path, results)
    assert [plot.stem for plot in plots] == ["tradeoff", "tradeoff-2", "tradeoff-3"]
    (plot,), _ = draw("ternary", tmp_path, results)
    assert [title for axes in plot.figure.axes if (title := axes.get_title())] == [
        "clean accuracy",
        "robust accuracy, L∞ 8/255",
        "robust accuracy, L2 0.5",
        "robust accuracy, union",
    ]
    text = write_and_read_report(tmp_path, results | {"figures": []})
    assert "L2 0.5, test" in text
    assert "union, test" in text


def test_dial_and_greedy_soups_are_in_the_tradeoff(tmp_path, results):
    add_dial_and_greedy(tmp_path, results)
    (plot,), _ = draw("tradeoff", tmp_path, results)
    axes = plot.figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    assert {"dial (t)", "greedy soup", "uniform soup"} <= set(labels)
    assert np.allclose(handles[labels.index("dial (t)")].get_xdata(), [62, 77, 80])
    assert np.allclose(handles[labels.index("greedy soup")].get_offsets(), [[76, 29]])
    assert {"0", "0.7", "1"} <= {text.get_text() for text in axes.texts}


# Lines


def test_gaps_are_measured_at_equal_clean_accuracy():
    ends = np.array([[60.0, 40.0], [80.0, 20.0]])
    points = np.array([[70.0, 33.0], [75.0, 24.0], [80.0, 21.0], [81.0, 30.0], [59.0, 45.0]])
    gaps = gaps_above_chord(ends, points)
    assert np.allclose(gaps, [3, -1, 1, np.nan, np.nan], equal_nan=True)
    assert np.allclose(gaps_above_chord(ends[::-1], points), gaps, equal_nan=True)
    assert np.isnan(gaps_above_chord(np.array([[70.0, 40.0], [70.0, 20.0]]), points)).all()


def test_each_line_is_a_panel_in_order_of_the_second_weight(tmp_path, all_results):
    rows = {row["name"]: row for row in all_results["rows"]}
    rows["line-eps4-0.4-0.6"]["test"] = make_accuracies(0.76, 0.294)
    (plot,), reason = draw("lines", tmp_path, all_results)
    assert reason == ""
    assert titles(plot.figure) == ["line-eps4", "line-eps8", "line-eps16"]
    first = plot.figure.axes[0]
    straight, line, ends = (
        artist
        for artist in first.lines
        if artist.get_linestyle() != "None" or artist.get_marker() == "s"
    )
    assert straight.get_linestyle() == "--"
    assert list(straight.get_xdata()) == list(ends.get_xdata()) == [70, 78]
    assert np.allclose(line.get_xdata(), [70, 72.4, 74.4, 76, 77.2, 78])
    texts = {text.get_text() for text in first.texts}
    assert texts == {"0 (pretrained)", "0.2", "0.4", "0.6", "0.8", "1 (eps4)"}
    cells = plot.tables[0].lines[0]
    assert (cells["from"], cells["to"]) == ("pretrained", "eps4")
    assert cells["largest gap"] == "+3.4"  # 29.4 less 32 - 8 * (76 - 70) / (78 - 70)
    assert (cells["at"], cells["above the line"], cells["not comparable"]) == ("0.6", "4 of 4", 0)


def test_gaps_leave_out_soups_that_were_not_attacked_in_full(tmp_path, all_results):
    rows = [row for row in all_results["rows"] if row["name"].startswith("line-")]
    for row in all_results["rows"]:
        row["test"] = None
    bound = next(row for row in rows if row["name"] == "line-eps4-0.4-0.6")
    bound["val"], bound["screened"] = make_accuracies(0.76, 0.9), True
    ((plot,), _) = draw("lines", tmp_path, all_results)
    cells = plot.tables[0].lines[0]
    assert (cells["above the line"], cells["not comparable"]) == ("3 of 3", 1)
    assert cells["at"] != "0.6"


def test_lines_between_equally_clean_ends_have_no_gap_and_incomplete_lines_are_left_out(
    tmp_path, results
):
    results["rows"] += make_line_rows("flat", "eps4", "eps8", [(0.7, 0.3), (0.7, 0.34)], 0.05)
    results["rows"] += make_line_rows("short", "eps4", "eps8", [(0.7, 0.3), (0.8, 0.2)], 0)[1:]
    (plot,), reason = draw("lines", tmp_path, results)
    assert titles(plot.figure) == ["flat"]
    assert reason == "short: requires both ends and a soup between them, measured on test"
    (cells,) = plot.tables[0].lines
    assert (cells["largest gap"], cells["at"], cells["not comparable"]) == (None, None, 4)


def test_each_threat_has_a_figure_with_up_to_four_panels_in_a_row(tmp_path, all_results):
    all_results["protocol"]["threats"] = [THREAT, "L2 0.5"]
    for row, split in product(all_results["rows"], ("val", "test")):
        row[split] |= {"L2 0.5": row[split][THREAT]}
    all_results["rows"] += [
        row | {"name": f"more-{row['name']}", "soup": f"more-{row['soup']}"}
        for row in all_results["rows"]
        if row["role"] == "line"
    ]
    plots, _ = draw("curves", tmp_path, all_results)
    assert [plot.stem for plot in plots] == ["curves", "curves-2"]
    plots, _ = draw("lines", tmp_path, all_results)
    assert [plot.stem for plot in plots] == ["lines", "lines-2"]
    columns = [axes.get_subplotspec().colspan.start for axes in plots[0].figure.axes]
    assert columns == [0, 1, 2, 3, 0, 1]


# Curves


def make_curve_results(folder):
    """Make sections of the same and of other ingredients, a single soup, and three grids."""
    results = make_results(folder)
    grid = [row for row in results["rows"] if row["role"] == "grid"]
    other_grid = [
        row
        | {
            "soup": "other grid",
            "ingredients": ["eps4", "eps8", "l2"],
            "test": make_accuracies(0.9, 0.5),
        }
        for row in grid
    ]
    small_grid = [
        row | {"soup": "small grid", "test": make_accuracies(0.85, 0.4)} for row in grid[:6]
    ]
    fields = {"soup": "mixed", "ingredients": ["eps16", "eps8", "eps4"], "threat": THREAT}
    mixed = [
        make_row(
            f"mixed-{weight}",
            "learned",
            0.62 + 0.1 * weight,
            0.35 - 0.05 * weight,
            objective=f"mixed {weight}",
            **fields,
        )
        for weight in (1, 0.5, 0.2)
    ]
    fields = {"ingredients": ["eps4", "l1"], "threat": THREAT}
    single = make_row("single", "learned", 0.7, 0.3, soup="single", **fields)
    other = [
        make_row(f"other-{t}", "dial", 0.7 + 0.02 * t, 0.3, soup="other", at=t, **fields)
        for t in (0, 1)
    ]
    results["rows"] = [*other_grid, *small_grid, *results["rows"], *mixed, single, *other]
    return results


def lines_by_label(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_each_section_is_a_panel_on_one_scale_with_the_two_best_soups_of_its_own_grid(tmp_path):
    (plot,), reason = draw("curves", tmp_path, make_curve_results(tmp_path))
    assert reason == "single: one soup is not a curve"
    panels = {axes.get_title(loc="left"): axes for axes in plot.figure.axes}
    assert list(panels) == ["learned: eps", "mixed: clean weight", "other: t"]
    assert len({axes.get_xlim() for axes in plot.figure.axes}) == 1
    assert len({axes.get_ylim() for axes in plot.figure.axes}) == 1
    squares = "best clean and best robust soup of the grid"
    for title in ("learned: eps", "mixed: clean weight"):
        lines = lines_by_label(panels[title])
        assert np.allclose(lines[squares].get_xydata(), [[78, 24], [60, 34.5]])
        assert len(lines["ingredient"].get_xdata()) == 3
    assert squares not in lines_by_label(panels["other: t"])
    assert len(lines_by_label(panels["other: t"])["ingredient"].get_xdata()) == 1
    mixed = panels["mixed: clean weight"]
    assert np.allclose(lines_by_label(mixed)["learned soup"].get_xdata(), [64, 67, 72])
    assert [text.get_text() for text in mixed.texts] == ["0.2", "0.5", "1"]
    assert [line["section"] for line in plot.tables[0].lines] == ["learned", "mixed"]


def test_curves_need_no_grid(tmp_path, results):
    results["rows"] = [row for row in results["rows"] if row["role"] != "grid"]
    (plot,), _ = draw("curves", tmp_path, results)
    assert set(lines_by_label(plot.figure.axes[0])) == {"learned soup", "ingredient"}
    assert plot.tables == ()
    results["rows"] = [row for row in results["rows"] if row["role"] != "learned"]
    reason = "a curve requires a section with two learned soups"
    assert draw("curves", tmp_path, results) == ([], reason)


# Planes


def test_each_plane_is_a_panel_with_its_checkpoints_and_shared_levels(draw_shared):
    plot = draw_shared("landscape")
    assert plot.stem == "landscape"
    *panels, bar = plot.figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "plane-eps4",
        "plane-eps16",
        "plane-l2",
    ]
    assert "nats" in bar.get_ylabel()
    levels = [axes.collections[0].levels for axes in panels]
    assert all(np.array_equal(other, levels[0]) for other in levels)
    assert np.allclose(np.diff(np.log(levels[0])), np.diff(np.log(levels[0]))[0])
    for axes in panels:
        assert axes.get_aspect() == 1
        markers = [line for line in axes.lines if line.get_marker() in "os^"]
        assert np.allclose(np.concatenate([line.get_xydata() for line in markers]), CORNERS)
    assert {"pretrained", "eps8", "eps16"} <= {text.get_text() for text in panels[1].texts}
    settings = "10 steps · 2000 test samples · buffers: recalibrate · float32"
    assert settings in small_print(plot)


def test_the_table_of_a_plane_has_its_losses_and_violations_of_convexity(
    tmp_path, all_results, draw_shared
):
    first, second, _ = draw_shared("landscape").tables
    assert [line["point"] for line in first.lines] == [
        "nearest to pretrained",
        "nearest to eps8",
        "nearest to eps4",
        "least loss of the grid",
    ]
    file = all_results["planes"][0]["file"]
    plane = json.loads((tmp_path / file).read_text(encoding="utf-8"))
    x, y, loss = (np.array(plane[key]) for key in ("x", "y", "loss"))
    assert first.lines[-1]["robust loss"] == f"{loss.min():.4f}"
    row, column = np.abs(y).argmin(), np.abs(x).argmin()
    assert first.lines[0]["robust loss"] == f"{loss[row, column]:.4f}"
    assert first.lines[0]["distance to it"] == pytest.approx(np.hypot(x[column], y[row]))
    assert first.lines[0]["clean loss"] is None
    assert "strict local minima inside the grid: 1 at (2, 1.08)" in first.summary
    assert " 0 of 298 triples of neighbours violate convexity by more than 0.005" in first.summary
    assert " 0 of 298" not in second.summary


def test_planes_with_gaps_are_drawn_and_broken_planes_are_named(tmp_path, results):
    bowl = write_plane(tmp_path, "bowl", ["a", "b", "c"])
    plane = json.loads((tmp_path / bowl["file"]).read_text(encoding="utf-8"))
    loss = np.array(plane["loss"], dtype=object)
    loss[-4:, -4:] = None
    loss[0, 0] = 1e9
    gaps, names = loss.tolist(), ["a", "b", "c"]
    results["planes"] = [
        write_plane(tmp_path, "gaps", names, loss=gaps, clean_loss=gaps),
        write_plane(tmp_path, "small", names, loss=gaps[:3]),
        write_plane(tmp_path, "uneven", names, x=(np.arange(21.0) ** 2).tolist()),
        write_plane(tmp_path, "two", ["a", "b"]),
        {"name": "x", "file": "landscapes/none.json"},
    ]
    (plot,), reason = draw("landscape", tmp_path, results)
    assert "grey: not finite" in small_print(plot)
    assert plot.figure.axes[0].collections[0].levels[-1] < 100
    for message in (
        "small.json: not a plane (got maps",
        "uneven.json: not a plane (x, y: expected to rise in even steps)",
        "two.json: not a plane (expected three checkpoints",
        "none.json: no such file",
    ):
        assert message in reason
    text = write_and_read_report(tmp_path, results | {"figures": ["landscape"]})
    assert text.count("Left out: landscape:") == 1
    assert (tmp_path / "figures" / "landscape.svg").exists()


def test_a_constant_plane_is_drawn(tmp_path, results):
    loss = np.full((21, 21), 2.3).tolist()
    results["planes"] = [write_plane(tmp_path, "flat", ["a", "b", "c"], loss=loss)]
    (plot,), _ = draw("landscape", tmp_path, results)
    assert "strict local minima inside the grid: 0;" in plot.tables[0].summary


@pytest.mark.parametrize(
    ("low", "high", "digits"), [(1.6, 1.9, 3), (2.340, 2.349, 4), (1e-3, 10, 3)]
)
def test_no_two_labels_of_levels_are_equal(low, high, digits):
    levels = np.geomspace(low, high, planes.LEVELS)
    labels = planes.format_levels(levels)[:: planes.LABELLED_STEP]
    assert len(set(labels)) == len(labels)
    assert max(len(label.replace(".", "").lstrip("0")) for label in labels) <= digits

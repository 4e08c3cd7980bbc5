"""The paper's figures 4 to 7, and the words that no figure may forget, from synthetic results: no network is run here."""

import json
from itertools import product
from typing import get_args

import numpy as np
import pytest
from test_reports import THREAT, accuracies, make_results, make_row, report

from robustsoup.recipes import Figure
from robustsoup.reports import FIGURES, planes
from robustsoup.reports.lines import above_line

PAPER = "the paper's protocol: selected on test"
LEAKED = "selected on samples that ingredients were trained on"
CORNERS = np.array([[0.0, 0.0], [1.6, 3.0], [4.0, 0.0]])


def synthetic_line(section, first, second, ends, bend):
    """Six rows from one network to another, bent outward by `bend`; no network was run for them."""
    rows = []
    for k in range(6):
        a = k / 5
        clean, robust = (1 - a) * np.array(ends[0]) + a * np.array(ends[1]) + bend * a * (1 - a)
        more = {"soup": section, "ingredients": [first, second], "coefficients": [1 - a, a]}
        rows.append(make_row(f"{section}-{1 - a:.1f}-{a:.1f}", "line", clean, robust, **more))
    return rows[::-1]  # grids count down


def synthetic_lines():
    """A line from the base to each ingredient."""
    base = (0.70, 0.32)
    ends = {"eps4": (0.78, 0.24), "eps8": (0.72, 0.31), "eps16": (0.60, 0.345)}
    return [
        row
        for name, end in ends.items()
        for row in synthetic_line(f"line-{name}", "pretrained", name, (base, end), 0.05)
    ]


def synthetic_plane(folder, name, checkpoints, *, wells=1, **more):
    """Write a plane whose loss is a bowl, with one more well if wells is 2; no network was run for it."""
    x, y = np.linspace(-0.2, 1.2, 21) * 4.0, np.linspace(-0.2, 1.2, 21) * 3.0
    xx, yy = np.meshgrid(x, y)
    loss = 1.45 + 0.04 * ((xx - 1.9) ** 2 + (yy - 1) ** 2) + 0.02 * np.maximum(xx + yy - 5, 0) ** 3
    if wells == 2:
        loss -= 0.3 * np.exp(-3 * ((xx - 3.1) ** 2 + (yy - 0.4) ** 2))
    held = {
        "name": name,
        "checkpoints": checkpoints,
        "x": x.tolist(),
        "y": y.tolist(),
        "positions": CORNERS.tolist(),
        "loss": loss.tolist(),
        "accuracy": np.exp(-loss).tolist(),
        "threat": THREAT,
        "attack_steps": 10,
        "samples": 2000,
        "split": "test",
        "buffers": "recalibrate",
        "seed": 0,
        "precision": "float32",
    }
    file = f"landscapes/{name}.json"
    (folder / "landscapes").mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(held | more), encoding="utf-8")
    return {"name": name, "checkpoints": checkpoints, "file": file}


def synthetic_planes(folder):
    """Three planes, one of them with two wells."""
    others = {"eps4": 1, "eps16": 2, "l2": 1}
    return [
        synthetic_plane(folder, f"plane-{name}", ["pretrained", "eps8", name], wells=wells)
        for name, wells in others.items()
    ]


@pytest.fixture
def results(tmp_path):
    found = make_results(tmp_path)
    found["rows"] += synthetic_lines()
    found["planes"] = synthetic_planes(tmp_path)
    return found


def draw(name, results, folder):
    return FIGURES[name](results, folder)


def small_print(plot):
    return plot.figure.get_supxlabel().replace("\n", " ")


def test_a_recipe_may_ask_for_every_figure_and_no_other():
    assert get_args(Figure) == tuple(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_no_figure_forgets_what_flatters_its_numbers(tmp_path, results, name):
    plots, reason = draw(name, results, tmp_path)
    assert (len(plots), reason) == (1, "")
    assert not any(words in small_print(plots[0]) for words in (PAPER, LEAKED))
    results["protocol"]["select_on"] = "test"
    (plot,), _ = draw(name, results, tmp_path)
    assert small_print(plot).startswith(PAPER)
    assert LEAKED not in small_print(plot)
    results["leakage"] = {"status": "violated", "why": "eps4 was trained on them"}
    (plot,), _ = draw(name, results, tmp_path)
    assert small_print(plot).startswith(f"{PAPER} · {LEAKED}")
    results["protocol"]["select_on"] = "val"
    (plot,), _ = draw(name, results, tmp_path)
    assert small_print(plot).startswith(LEAKED)


def test_the_head_of_the_report_says_what_flatters_its_numbers(tmp_path, results):
    results["figures"] = []
    assert "flatters" not in report(tmp_path, results)
    results["leakage"] = {"status": "violated", "why": "eps4 was trained on them"}
    head = report(tmp_path, results).split("<h2>")[0]
    assert (
        f"S{LEAKED[1:]}: this flatters the numbers of what was selected.</strong> eps4 was trained on them"
        in head
    )
    results["leakage"] = {"status": "known", "why": ""}
    results["protocol"]["select_on"] = "test"
    head = report(tmp_path, results).split("<h2>")[0]
    assert "The paper&#x27;s protocol: selected on test: this flatters" in head


def test_a_run_that_selects_where_it_reports_says_each_number_once(tmp_path, results):
    results["figures"] = list(FIGURES)
    results["protocol"] |= {"select_on": "test", "screened": True}
    for row in results["rows"]:
        row["val"] = None
    results["rows"][5]["screened"] = True
    text = report(tmp_path, results)
    assert "Left out" not in text
    assert text.count('<th scope="col">clean, test</th>') == 1
    assert "clean, val" not in text
    assert "These were picked on" not in text
    assert "was met at the lower end of its 95 % interval on test.</p>" in text
    assert "(test figures are upper bounds)" in text
    (plot,), _ = draw("tradeoff", results, tmp_path)
    assert "only screened: upper bounds" in small_print(plot)


def test_the_gap_above_the_line_is_at_the_same_clean_accuracy():
    ends = np.array([[60.0, 40.0], [80.0, 20.0]])
    points = np.array([[70.0, 33.0], [75.0, 24.0], [80.0, 21.0], [81.0, 30.0], [59.0, 45.0]])
    assert np.allclose(above_line(ends, points), [3, -1, 1, np.nan, np.nan], equal_nan=True)
    assert np.allclose(above_line(ends[::-1], points), above_line(ends, points), equal_nan=True)
    assert np.isnan(above_line(np.array([[70.0, 40.0], [70.0, 20.0]]), points)).all()


def test_each_line_is_a_panel_in_order_of_the_weight_of_its_second_network(tmp_path, results):
    next(row for row in results["rows"] if row["name"] == "line-eps4-0.4-0.6")["test"] = accuracies(
        0.76, 0.294
    )
    (plot,), reason = draw("lines", results, tmp_path)
    assert reason == ""
    assert [axes.get_title(loc="left") for axes in plot.figure.axes] == [
        "line-eps4",
        "line-eps8",
        "line-eps16",
    ]
    first = plot.figure.axes[0]
    straight, line, ends = (
        found
        for found in first.lines
        if found.get_linestyle() != "None" or found.get_marker() == "s"
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


def test_a_line_whose_ends_are_as_clean_has_no_gap_and_one_without_an_end_is_left_out(
    tmp_path, results
):
    results["rows"] = [row for row in results["rows"] if row["role"] != "line"]
    results["rows"] += synthetic_line("flat", "eps4", "eps8", [(0.7, 0.3), (0.7, 0.34)], 0.05)
    results["rows"] += synthetic_line("short", "eps4", "eps8", [(0.7, 0.3), (0.8, 0.2)], 0)[1:]
    (plot,), reason = draw("lines", results, tmp_path)
    assert [axes.get_title(loc="left") for axes in plot.figure.axes] == ["flat"]
    assert reason == "short: needs both ends and a soup between them, measured on test"
    (cells,) = plot.tables[0].lines
    assert (cells["largest gap"], cells["at"], cells["not comparable"]) == (None, None, 4)


def test_there_are_as_many_figures_as_threats_and_up_to_four_panels_side_by_side(tmp_path, results):
    results["protocol"]["threats"] = [THREAT, "L2 0.5"]
    for row, split in product(results["rows"], ("val", "test")):
        row[split] |= {"L2 0.5": row[split][THREAT]}
    results["rows"] += [
        row | {"name": f"more-{row['name']}", "soup": f"more-{row['soup']}"}
        for row in results["rows"]
        if row["role"] == "line"
    ]
    for name in ("lines", "curves"):
        plots, _ = draw(name, results, tmp_path)
        assert [plot.stem for plot in plots] == [name, f"{name}-2"]
    (first, _), _ = draw("lines", results, tmp_path)
    assert [axes.get_subplotspec().colspan.start for axes in first.figure.axes] == [
        0,
        1,
        2,
        3,
        0,
        1,
    ]


def curve_results(folder):
    """Synthetic: two sections of the same ingredients, one of others, one soup alone, and three grids."""
    found = make_results(folder)
    grid = [row for row in found["rows"] if row["role"] == "grid"]
    wrong = [
        row | {"soup": "wrong", "ingredients": ["eps4", "eps8", "l2"], "test": accuracies(0.9, 0.5)}
        for row in grid
    ]
    few = [row | {"soup": "few", "test": accuracies(0.85, 0.4)} for row in grid[:6]]
    more = {"soup": "mixed", "ingredients": ["eps16", "eps8", "eps4"], "threat": THREAT}
    mixed = [
        make_row(
            f"mixed-{w}", "learned", 0.62 + 0.1 * w, 0.35 - 0.05 * w, **more, objective=f"mixed {w}"
        )
        for w in (1, 0.5, 0.2)
    ]
    alone = make_row(
        "alone", "learned", 0.7, 0.3, soup="alone", ingredients=["eps4", "l1"], threat=THREAT
    )
    other = [
        make_row(
            f"other-{t}",
            "dial",
            0.7 + 0.02 * t,
            0.3,
            soup="other",
            ingredients=["eps4", "l1"],
            threat=THREAT,
            at=t,
        )
        for t in (0, 1)
    ]
    found["rows"] = wrong + few + found["rows"] + mixed + [alone] + other
    return found


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_each_section_of_learned_soups_is_a_panel_on_one_scale_with_the_two_best_of_its_own_grid(
    tmp_path,
):
    results = curve_results(tmp_path)
    (plot,), reason = draw("curves", results, tmp_path)
    assert reason == "alone: one soup is not a curve"
    panels = {axes.get_title(loc="left"): axes for axes in plot.figure.axes}
    assert list(panels) == ["learned: eps", "mixed: clean weight", "other: t"]
    assert (
        len({axes.get_xlim() for axes in plot.figure.axes})
        == len({axes.get_ylim() for axes in plot.figure.axes})
        == 1
    )
    squares = "best clean and best robust soup of the grid"
    for title in ("learned: eps", "mixed: clean weight"):
        assert np.allclose(lines_of(panels[title])[squares].get_xydata(), [[78, 24], [60, 34.5]])
        assert len(lines_of(panels[title])["ingredient"].get_xdata()) == 3
    assert squares not in lines_of(panels["other: t"])
    assert len(lines_of(panels["other: t"])["ingredient"].get_xdata()) == 1
    assert np.allclose(
        lines_of(panels["mixed: clean weight"])["learned soup"].get_xdata(), [64, 67, 72]
    )
    assert [text.get_text() for text in panels["mixed: clean weight"].texts] == ["0.2", "0.5", "1"]
    assert [line["section"] for line in plot.tables[0].lines] == ["learned", "mixed"]


def test_curves_need_no_grid(tmp_path, results):
    results["rows"] = [row for row in results["rows"] if row["role"] != "grid"]
    (plot,), _ = draw("curves", results, tmp_path)
    assert set(lines_of(plot.figure.axes[0])) == {"learned soup", "ingredient"}
    assert plot.tables == ()
    results["rows"] = [row for row in results["rows"] if row["role"] != "learned"]
    assert draw("curves", results, tmp_path) == (
        [],
        "no section has two learned soups, which a curve needs",
    )


def test_each_plane_is_a_panel_with_its_checkpoints_and_levels_that_are_shared(tmp_path, results):
    (plot,), reason = draw("landscape", results, tmp_path)
    assert (plot.stem, reason) == ("landscape", "")
    *panels, bar = plot.figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "plane-eps4",
        "plane-eps16",
        "plane-l2",
    ]
    assert "nats" in bar.get_ylabel()
    filled = [axes.collections[0] for axes in panels]
    assert all(np.array_equal(found.levels, filled[0].levels) for found in filled)
    assert np.allclose(np.diff(np.log(filled[0].levels)), np.diff(np.log(filled[0].levels))[0])
    for axes in panels:
        assert axes.get_aspect() == 1
        marks = [line for line in axes.lines if line.get_marker() in "os^"]
        assert np.allclose(np.concatenate([mark.get_xydata() for mark in marks]), CORNERS)
    assert {"pretrained", "eps8", "eps16"} <= {text.get_text() for text in panels[1].texts}
    assert "10 steps · 2000 test samples · buffers: recalibrate · float32" in small_print(plot)


def test_the_table_of_a_plane_has_its_losses_and_what_bends_the_wrong_way(tmp_path, results):
    (plot,), _ = draw("landscape", results, tmp_path)
    first, second, _ = plot.tables
    assert [line["point"] for line in first.lines] == [
        "nearest to pretrained",
        "nearest to eps8",
        "nearest to eps4",
        "least loss of the grid",
    ]
    held = json.loads((tmp_path / "landscapes" / "plane-eps4.json").read_text())
    loss = np.array(held["loss"])
    assert first.lines[-1]["robust loss"] == f"{loss.min():.4f}"
    i, j = np.abs(np.array(held["y"])).argmin(), np.abs(np.array(held["x"])).argmin()
    assert first.lines[0]["robust loss"] == f"{loss[i, j]:.4f}"
    assert first.lines[0]["distance to it"] == pytest.approx(np.hypot(held["x"][j], held["y"][i]))
    assert first.lines[0]["clean loss"] is None
    assert "strict local minima inside the grid: 1 at (2, 1.08)" in first.summary
    assert (
        " 0 of 298 triples of neighbours bend against convexity by more than 0.005 nats"
        in first.summary
    )
    assert " 0 of 298" not in second.summary


def test_a_plane_with_gaps_is_drawn_and_a_broken_one_is_named(tmp_path, results):
    held = json.loads((tmp_path / "landscapes" / "plane-eps4.json").read_text())
    gaps = np.array(held["loss"], dtype=object)
    gaps[-4:, -4:] = None
    gaps[0, 0] = 1e9
    entries = [
        synthetic_plane(
            tmp_path, "gaps", ["a", "b", "c"], loss=gaps.tolist(), clean_loss=gaps.tolist()
        ),
        synthetic_plane(tmp_path, "small", ["a", "b", "c"], loss=gaps[:3].tolist()),
        synthetic_plane(tmp_path, "uneven", ["a", "b", "c"], x=(np.arange(21.0) ** 2).tolist()),
        synthetic_plane(tmp_path, "two", ["a", "b"]),
        {"name": "x", "file": "landscapes/none.json"},
        "y",
    ]
    (tmp_path / "landscapes" / "none.json").unlink(missing_ok=True)
    (plot,), reason = draw("landscape", results | {"planes": entries}, tmp_path)
    assert "grey: not finite" in small_print(plot)
    assert plot.figure.axes[0].collections[0].levels[-1] < 100
    for said in (
        "small.json: not a plane (got maps",
        "uneven.json: not a plane (x, y: expected to rise in even steps)",
        "two.json: not a plane (expected three checkpoints",
        "none.json: no such file",
        "planes: got 'y'",
    ):
        assert said in reason
    results |= {"planes": entries, "figures": ["landscape"]}
    text = report(tmp_path, results)
    assert text.count("Left out: landscape:") == 1
    assert (tmp_path / "figures" / "landscape.pdf").exists()


def test_a_plane_of_one_loss_everywhere_is_drawn(tmp_path, results):
    entry = synthetic_plane(tmp_path, "flat", ["a", "b", "c"], loss=np.full((21, 21), 2.3).tolist())
    (plot,), _ = draw("landscape", results | {"planes": [entry]}, tmp_path)
    assert "strict local minima inside the grid: 0;" in plot.tables[0].summary


def synthetic_grid_of_five():
    """Soups of five ingredients; no network was run for them."""
    names = ["e10", "e20", "e30", "e40", "e50"]
    alphas = [np.eye(5)[i] / 2 + np.eye(5)[j] / 2 for i in range(5) for j in range(i, 5)]
    more = {"soup": "continuous", "ingredients": names}
    return [
        make_row(f"continuous-{k}", "grid", 0.7, 0.3, coefficients=alpha.tolist(), **more)
        for k, alpha in enumerate(alphas)
    ]


def test_a_grid_of_five_ingredients_is_no_ternary_and_no_reason_beside_grids_of_three(
    tmp_path, results
):
    five = synthetic_grid_of_five()
    again = [
        row | {"name": f"again-{row['name']}", "soup": "again"}
        for row in results["rows"]
        if row["role"] == "grid"
    ]
    plots, reason = draw("ternary", results | {"rows": results["rows"] + five + again}, tmp_path)
    assert ([plot.stem for plot in plots], reason) == (["ternary", "ternary-2"], "")
    plots, reason = draw("ternary", results | {"rows": five}, tmp_path)
    assert plots == []
    assert (
        reason == "no grid of soups of three ingredients was measured, which a ternary plot needs"
    )


def test_the_papers_figures_are_saved_inside_their_borders(tmp_path, results):
    results["figures"] = ["lines", "curves", "landscape"]
    report(tmp_path, results)
    for name in results["figures"]:
        for ending in ("png", "svg", "pdf"):
            assert (tmp_path / "figures" / f"{name}.{ending}").stat().st_size > 1000
        (plot,), _ = draw(name, results, tmp_path)
        plot.figure.draw_without_rendering()
        width, height = plot.figure.bbox.size
        for box in [axes.get_tightbbox() for axes in plot.figure.axes] + [
            plot.figure._supxlabel.get_window_extent()
        ]:
            assert min(box.x0, box.y0) >= -1
            assert box.x1 <= width + 1
            assert box.y1 <= height + 1


@pytest.mark.parametrize(
    ("low", "high", "digits"), [(1.6, 1.9, 3), (2.340, 2.349, 4), (1e-3, 10, 3)]
)
def test_no_two_labels_of_a_plane_read_alike(low, high, digits):
    labels = planes._written(np.geomspace(low, high, planes.LEVELS))[:: planes.LABELLED]
    assert len(set(labels)) == len(labels)
    assert max(len(label.replace(".", "").lstrip("0")) for label in labels) <= digits

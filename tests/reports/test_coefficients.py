"""Figures, tables and CSV files of coefficients by layer."""

import csv
import math
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from synthetic_results import (
    LAYERS,
    NAMES,
    assert_inside_figure,
    axes_by_label,
    make_coefficients,
)

from robustsoup.errors import CoefficientError
from robustsoup.reports import (
    coefficient_table,
    draw_dial,
    draw_learned,
    save_plot,
    write_coefficient_csv,
)
from robustsoup.soups.coefficients import Coefficients

# Figures


def test_each_soup_has_shares_entropy_movement_and_slope_on_shared_scales(draw_shared):
    figure = draw_shared("coefficients").figure
    groups = axes_by_label(figure)
    assert {label: len(axes) for label, axes in groups.items()} == {
        "share": 3,
        "entropy": 3,
        "moved": 3,
        "slope": 3,
    }
    titles = [axes.get_title(loc="left") for axes in groups["share"]]
    assert titles == ["clean", "L∞ 8/255", "L∞ 16/255"]
    tilt = torch.linspace(-1, 1, 3, dtype=torch.float64) * 0
    clean = make_coefficients(LAYERS, 3, seed=1, tilt=tilt)
    assert np.allclose(groups["entropy"][0].lines[0].get_xdata(), clean.entropy())
    assert np.allclose(groups["moved"][0].lines[0].get_xdata(), clean.movement())
    for measure in ("moved", "slope"):
        assert len({axes.get_xlim() for axes in groups[measure]}) == 1
    assert all(axes.get_ylim() == (len(LAYERS) - 0.5, -0.5) for axes in figure.axes)
    assert "mean norm of dL/dlogits" in figure.get_supxlabel().replace("\n", " ")


def test_slopes_are_logarithmic_and_slopes_of_0_are_open_dots_at_the_left_end():
    coefficients = make_coefficients(LAYERS, 3)
    axes = axes_by_label(draw_learned(coefficients, NAMES, "x").figure)["slope"][0]
    line, zeros = axes.lines
    assert axes.get_xscale() == "log"
    assert np.allclose(line.get_xdata()[1:], coefficients.slopes[1:])
    assert list(zeros.get_ydata()) == [0]
    assert zeros.get_xdata()[0] == axes.get_xlim()[0] <= line.get_xdata()[1:].min()
    assert zeros.get_markerfacecolor() == "white"
    still = replace(coefficients, slopes=torch.zeros(len(LAYERS), dtype=torch.float64))
    _, zeros = axes_by_label(draw_learned(still, NAMES, "x").figure)["slope"][0].lines
    assert len(zeros.get_ydata()) == len(LAYERS)


def test_missing_measures_are_left_out():
    whole = make_coefficients(LAYERS, 3)
    partial = replace(whole, start=None, slopes=None)
    figure = draw_learned(partial, NAMES, "x").figure
    counts = {label: len(axes) for label, axes in axes_by_label(figure).items()}
    assert counts == {"share": 1, "entropy": 1}
    assert "moved" not in figure.get_supxlabel()
    assert "slope" not in figure.get_supxlabel()
    both = draw_dial([("partial", partial), ("whole", whole)], NAMES, "x")
    counts = {label: len(axes) for label, axes in axes_by_label(both.figure).items()}
    assert counts == {"share": 2, "entropy": 2, "moved": 1, "slope": 1}
    assert "movement not recorded" in both.tables[0].summary


@pytest.mark.parametrize(
    ("layers", "n", "soups"),
    [(1, 3, 1), (1, 2, 6), (1, 1, 1), (2, 8, 3), (25, 3, 5), (62, 72, 1), (170, 4, 1), (4, 9, 2)],
)
def test_any_number_of_layers_ingredients_and_soups_fits_its_figure(tmp_path, layers, n, soups):
    names = ["*"] if layers == 1 else [f"layer{i}.weight" for i in range(layers)]
    dials = [(f"t = {k}", make_coefficients(names, n, seed=k)) for k in range(soups)]
    positive = replace(dials[0][1], slopes=dials[0][1].slopes + 1e-4)
    dials[0] = ("t = 0", positive)
    plot = draw_dial(dials, [f"a-long-name-of-an-ingredient-{i}" for i in range(n)], "dial")
    save_plot(plot, tmp_path)  # a warning that the layout failed is an error here
    assert [path.name for path in tmp_path.glob("coefficients.*")] == ["coefficients.svg"]
    figure = plot.figure
    assert_inside_figure(figure, [axes.get_tightbbox() for axes in figure.axes])
    width, height = figure.bbox.size
    for axes in figure.axes:
        assert axes.get_position().width * width > 20
        assert axes.get_position().height * height > 4
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    if layers == 1:
        assert labels == ["whole network"]
    else:
        assert len(labels) in range(min(layers, 20), 41)


def test_more_ingredients_than_colours_are_a_heat_map():
    coefficients = make_coefficients(LAYERS, 9)
    names = [f"run{i}" for i in range(9)]
    axes = axes_by_label(draw_learned(coefficients, names, "x").figure)["ingredient"][0]
    assert np.array_equal(axes.images[0].get_array(), coefficients.alpha.numpy())
    assert [text.get_text() for text in axes.get_xticklabels()] == names
    figure = draw_learned(make_coefficients(LAYERS, 8), list("abcdefgh"), "x").figure
    assert not axes_by_label(figure)["share"][0].images


def test_bars_show_the_shares():
    coefficients = make_coefficients(LAYERS, 3)
    axes = axes_by_label(draw_learned(coefficients, NAMES, "x").figure)["share"][0]
    widths = [[bar.get_width() for bar in container] for container in axes.containers]
    assert np.allclose(np.transpose(widths), coefficients.alpha)
    lefts = [[bar.get_x() for bar in container] for container in axes.containers]
    assert np.allclose(np.transpose(lefts), coefficients.alpha.cumsum(1) - coefficients.alpha)


def test_negative_weights_are_bars_to_the_left_of_0():
    coefficients = make_coefficients(LAYERS, 3)
    alpha = coefficients.alpha.clone()
    alpha[0] = torch.tensor([1.3, -0.2, -0.1])
    coefficients = replace(coefficients, alpha=alpha)
    assert bool(coefficients.entropy().isfinite().all())
    axes = axes_by_label(draw_learned(coefficients, NAMES, "x").figure)["share"][0]
    first = [container[0] for container in axes.containers]
    assert np.allclose([bar.get_width() for bar in first], [1.3, -0.2, -0.1])
    assert np.allclose([bar.get_x() for bar in first], [0, 0, -0.2])
    assert axes.get_xlim() == pytest.approx((-0.3, 1.3))
    many = make_coefficients(LAYERS, 9)
    many = replace(many, alpha=many.alpha + torch.tensor([-1.0, 1.0] + [0.0] * 7).double())
    figure = draw_learned(many, [f"run{i}" for i in range(9)], "x").figure
    image = axes_by_label(figure)["ingredient"][0].images[0]
    assert image.norm(0.0) == pytest.approx(0.5)  # white between red and blue


@pytest.mark.usefixtures("small_formats")
def test_figures_do_not_depend_on_the_settings_of_matplotlib_nor_change_them(tmp_path):
    coefficients = make_coefficients(LAYERS, 3)
    save_plot(draw_learned(coefficients, NAMES, "x"), tmp_path / "default")
    with matplotlib.rc_context({"font.size": 30, "axes.spines.top": True, "svg.hashsalt": "other"}):
        before = dict(matplotlib.rcParams)
        save_plot(draw_learned(coefficients, NAMES, "x"), tmp_path / "changed")
        assert dict(matplotlib.rcParams) == before
    for ending in ("png", "svg", "pdf"):
        default, changed = (
            tmp_path / name / f"coefficients.{ending}" for name in ("default", "changed")
        )
        assert default.read_bytes() == changed.read_bytes()


def test_soups_of_different_networks_are_not_drawn_together():
    coefficients = make_coefficients(LAYERS, 3)
    with pytest.raises(CoefficientError, match="got 3, expected 2, one for each ingredient"):
        draw_learned(coefficients, NAMES[:2], "x")
    with pytest.raises(CoefficientError, match="got none, expected at least one soup"):
        draw_dial([], NAMES, "x")
    with pytest.raises(CoefficientError, match="expected those of one network"):
        draw_dial([("a", coefficients), ("b", make_coefficients(LAYERS[:4], 3))], NAMES, "x")


# Tables


@pytest.fixture
def known_coefficients():
    """Four layers whose measures can be computed by hand."""
    alpha = torch.tensor([[0.5, 0.5], [0.6, 0.4], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    start = torch.full((4, 2), 0.5, dtype=torch.float64)
    slopes = torch.tensor([0, 1e-5, 0.123456789, 2], dtype=torch.float64)
    return Coefficients(alpha, ("a", "b", "c", "d"), start=start, slopes=slopes)


def test_the_table_has_a_line_for_each_layer_and_a_column_for_each_ingredient(known_coefficients):
    lines = coefficient_table(known_coefficients, ["x", "y"])
    assert list(lines[0]) == ["layer", "x", "y", "entropy", "moved", "slope"]
    assert lines[1] | {"entropy": None, "moved": None} == {
        "layer": "b",
        "x": 0.6,
        "y": 0.4,
        "entropy": None,
        "moved": None,
        "slope": 1e-5,
    }
    assert [line["moved"] for line in lines] == pytest.approx([0, 0.1, 0.5, 0.25])
    assert [lines[0]["entropy"], lines[2]["entropy"]] == pytest.approx([math.log(2), 0])
    partial = replace(known_coefficients, start=None, slopes=None)
    lines = coefficient_table(partial, ["x", "y"])
    assert {(line["moved"], line["slope"]) for line in lines} == {(None, None)}


def test_an_ingredient_named_like_another_column_gets_its_own_column(known_coefficients):
    lines = coefficient_table(known_coefficients, ["moved", "moved"])
    assert list(lines[0]) == [
        "layer",
        "ingredient moved",
        "ingredient ingredient moved",
        "entropy",
        "moved",
        "slope",
    ]
    assert lines[2]["ingredient moved"] == 1
    with pytest.raises(CoefficientError, match="got 2, expected 1"):
        coefficient_table(known_coefficients, ["x"])


def test_the_csv_file_holds_the_table_with_six_digits(tmp_path, known_coefficients):
    path = write_coefficient_csv(known_coefficients, ['x,"1"', "y"], tmp_path / "new" / "a.csv")
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[2] == {
        "layer": "c",
        'x,"1"': "1",
        "y": "0",
        "entropy": "0",
        "moved": "0.5",
        "slope": "0.123457",
    }
    assert lines[0]["entropy"] == "0.693147"
    partial = replace(known_coefficients, start=None, slopes=None)
    written = write_coefficient_csv(partial, ["x", "y"], path)
    assert written.read_text(encoding="utf-8").splitlines()[:2] == [
        "layer,x,y,entropy,moved,slope",
        "a,0.5,0.5,0.693147,,",
    ]
    assert [item.name for item in path.parent.iterdir()] == ["a.csv"]


def test_the_summary_of_a_soup_states_its_entropy_and_which_layers_moved(known_coefficients):
    (table,) = draw_learned(known_coefficients, ["x", "y"], "x").tables
    assert table.summary == (
        "mean entropy 69.6 % of log n; mean movement 0.212; "
        "moved least: a (0), b (0.1); moved most: c (0.5), d (0.25)"
    )
    (table,) = draw_learned(make_coefficients(["*"], 1), ["x"], "x").tables
    assert table.summary == "mean movement 0"
    assert table.lines[0]["layer"] == "whole network"

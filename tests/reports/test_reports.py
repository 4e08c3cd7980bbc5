"""Figures and the report, from synthetic results: no network is trained or run here."""

import csv
import json
import math
import re
from dataclasses import replace
from html import escape

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from robustsoup.errors import CoefficientError, RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.reports import (
    FIGURES,
    coefficient_table,
    draw_dial,
    draw_learned,
    save,
    write_coefficient_csv,
    write_report,
)
from robustsoup.reports.results import shown_split, two_best
from robustsoup.reports.style import plain
from robustsoup.reports.ternary import draw_ternary
from robustsoup.reports.tradeoff import curves, draw_tradeoff
from robustsoup.soups.coefficients import Coefficients

THREAT = "Linf 8/255"
NAMES = ["eps4", "eps8", "eps16"]
LAYERS = tuple(
    f"block{i}.{j}.{kind}"
    for i in range(6)
    for j, kind in ((0, "weight"), (1, "weight"), (1, "bias"))
)


def accuracies(clean, robust, n=2000, **more):
    """Synthetic measurements, rounded to whole samples as real ones are."""
    found = {}
    for name, share in {"clean": clean, THREAT: robust, **more}.items():
        entry = Accuracy(round(share * n), n)
        found[name] = {
            "value": entry.value,
            "low": entry.low,
            "high": entry.high,
            "hits": entry.hits,
            "n": n,
        }
    return found


def make_row(name, role, clean, robust, **more):
    row = {
        "soup": None,
        "ingredients": None,
        "coefficients": None,
        "coefficients_file": None,
        "threat": None,
        "objective": None,
        "checkpoint": None,
    }
    measured = {"val": accuracies(clean + 0.004, robust - 0.003), "test": accuracies(clean, robust)}
    return {"name": name, "role": role, **row, **measured, **more}


def grid_rows(names):
    points = (
        [(i, j, 5 - i - j) for i in range(6) for j in range(6 - i)]
        if len(names) == 3
        else [(i, 5 - i) for i in range(6)]
    )
    clean, robust = np.array([0.78, 0.72, 0.60]), np.array([0.24, 0.31, 0.345])
    rows = []
    for point in points:
        alpha = np.array(point) / 5
        bend = 0.03 * (1 - (alpha**2).sum())
        rows.append(
            make_row(
                "grid-" + "-".join(f"{a:g}" for a in alpha),
                "grid",
                alpha @ clean[: len(names)] + bend,
                alpha @ robust[: len(names)] + bend / 3,
                soup="grid",
                ingredients=names,
                coefficients=alpha.tolist(),
            )
        )
    return rows


def learned(layers, n, *, seed=0, tilt=0.0):
    """Synthetic coefficients that moved more the deeper the layer; the first layer took part in no step."""
    draw = torch.Generator().manual_seed(seed)
    depth = torch.linspace(0, 1, len(layers), dtype=torch.float64)[:, None]
    start = 0.01 * torch.randn(len(layers), n, dtype=torch.float64, generator=draw)
    noise = torch.randn(len(layers), n, dtype=torch.float64, generator=draw)
    slopes = 10 ** (3 * depth[:, 0] - 4)
    slopes[0] = 0
    return Coefficients(
        torch.softmax(start + depth * (noise + tilt), 1),
        tuple(layers),
        start=torch.softmax(start, 1),
        slopes=slopes,
    )


def with_dial_and_greedy(folder, results):
    """Three soups of a dial, out of order, and a greedy soup."""
    for t, clean, robust in [(1, 0.80, 0.22), (0, 0.62, 0.35), (0.7, 0.77, 0.27)]:
        file = f"coefficients/dial-{t:g}.safetensors"
        learned(LAYERS, 3, seed=9, tilt=torch.tensor([t, 0, -t])).save(folder / file)
        more = {
            "soup": "dial",
            "ingredients": NAMES,
            "coefficients_file": file,
            "threat": THREAT,
            "at": t,
        }
        results["rows"].append(make_row(f"dial-{t:g}", "dial", clean, robust, **more))
    Coefficients.of([0.5, 0.5, 0]).save(folder / "coefficients" / "greedy.safetensors")
    more = {"soup": "greedy", "ingredients": NAMES, "coefficients": [0.5, 0.5, 0]}
    row = make_row(
        "greedy", "greedy", 0.76, 0.29, coefficients_file="coefficients/greedy.safetensors", **more
    )
    results["rows"].append(row)
    return results


def columns(figure):
    """The axes of a figure by what they show."""
    found = {}
    for axes in figure.axes:
        found.setdefault(axes.get_xlabel(), []).append(axes)
    return found


def learned_rows(folder):
    rows = []
    for k, (threat, clean, robust) in enumerate(
        [
            ("Linf 16/255", 0.61, 0.352),
            ("clean", 0.80, 0.21),
            ("Linf 2/255", 0.79, 0.245),
            ("Linf 4/255", 0.775, 0.28),
            ("Linf 8/255", 0.715, 0.33),
        ]
    ):
        file = f"coefficients/learned-{k}.safetensors"
        tilt = torch.linspace(-1, 1, 3, dtype=torch.float64) * (k - 2)
        (folder / "coefficients").mkdir(exist_ok=True)
        learned(LAYERS, 3, seed=k, tilt=tilt).save(folder / file)
        more = {
            "soup": "learned",
            "ingredients": NAMES,
            "coefficients_file": file,
            "threat": threat,
            "objective": "ce",
        }
        rows.append(
            make_row("learned-" + threat.replace(" ", "-"), "learned", clean, robust, **more)
        )
    return rows


def make_results(folder, names=NAMES):
    """A synthetic run folder: no network was trained for these numbers."""
    rows = [
        make_row("pretrained", "pretrained", 0.70, 0.32, threat=THREAT),
        make_row("eps4", "ingredient", 0.78, 0.24, threat="Linf 4/255"),
        make_row("eps8", "ingredient", 0.72, 0.31, threat="Linf 8/255"),
        make_row("eps16", "ingredient", 0.60, 0.345, threat="Linf 16/255"),
        *grid_rows(names),
        make_row(
            "uniform",
            "uniform",
            0.72,
            0.305,
            soup="uniform",
            ingredients=NAMES,
            coefficients=[1 / 3] * 3,
        ),
        *learned_rows(folder),
    ]
    return {
        "name": "eps-soups",
        "created": "2026-11-22T19:00:00Z",
        "recipe": {"name": "eps-soups", "seed": 0},
        "data": {"name": "synthetic", "classes": 10, "split_digest": "abc123", "seed": 3},
        "model": "resnet9:width=16",
        "leakage": {"status": "known", "why": ""},
        "figures": ["ternary", "tradeoff", "coefficients"],
        "protocol": {
            "attack": "apgd",
            "loss": "ce",
            "steps": 50,
            "restarts": 1,
            "precision": "float32",
            "seed": 0,
            "select_on": "val",
            "report_on": "test",
            "samples": {"val": 2000, "test": 2000},
            "threats": [THREAT],
        },
        "versions": {
            "robustsoup": "0.1.0",
            "torch": "2.13.0",
            "python": "3.11.7",
            "device": "cpu",
            "threads": 2,
        },
        "seconds": 1234.5,
        "rows": rows,
        "selection": {
            "maximise": THREAT,
            "require": ["clean>=0.7"],
            "met": True,
            "chosen": "learned-Linf-8/255",
            "point": False,
            "message": "",
            "held_on_test": True,
        },
    }


def report(folder, results):
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def results(tmp_path):
    return make_results(tmp_path)


def test_figures_and_a_self_contained_report_that_names_every_row(tmp_path, results):
    text = report(tmp_path, results)
    for stem in ("ternary", "tradeoff", "coefficients"):
        for ending in ("png", "svg", "pdf"):
            assert (tmp_path / "figures" / f"{stem}.{ending}").stat().st_size > 1000
        with Image.open(tmp_path / "figures" / f"{stem}.png") as image:
            assert min(image.size) > 500
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
    assert text.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert all(f">{row['name']}" in text for row in results["rows"])
    assert "Left out" not in text
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_results_give_the_same_bytes(tmp_path, results):
    first = report(tmp_path, results)
    images = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert report(tmp_path, results) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == images


def test_settings_of_matplotlib_are_left_alone(tmp_path, results):
    before = dict(matplotlib.rcParams)
    report(tmp_path, results)
    assert dict(matplotlib.rcParams) == before


def test_names_are_escaped_in_the_page_and_are_not_mathematics_in_a_figure(tmp_path, results):
    name = 'a<script>alert("x")</script>$\\frac$ 鍋'
    results["name"] = results["rows"][1]["name"] = name
    results["rows"][4]["ingredients"] = [name, "b", "c"]
    results["leakage"] = {"status": "violated", "why": name}
    results["recipe"] = {"name": name}
    text = report(tmp_path, results)
    assert "<script" not in text
    assert text.count(escape(name)) >= 4
    assert plain("a$b鍋") == "a\\$b?"
    assert len(plain("x" * 99, 12)) == 12


@pytest.mark.parametrize("status", ["unknown", "violated"])
def test_leakage_that_is_not_known_to_be_absent_is_a_banner(tmp_path, results, status):
    results["figures"] = []
    results["leakage"] = {"status": status, "why": "eps4: no record"}
    text = report(tmp_path, results)
    assert f'class="banner {status}"' in text
    assert "eps4: no record" in text


def test_known_leakage_has_no_banner(tmp_path, results):
    results["figures"] = []
    assert 'class="banner' not in report(tmp_path, results)


def test_two_best_are_chosen_on_val_even_where_test_says_otherwise():
    rows = [
        make_row("a", "grid", 0.80, 0.20),
        make_row("b", "grid", 0.70, 0.30),
        make_row("c", "grid", 0.75, 0.25),
    ]
    rows[2]["test"] = accuracies(0.95, 0.60)
    chosen = two_best(rows, THREAT, select_on="val", report_on="test")
    assert [row["name"] for row in chosen] == ["a", "b"]
    rows[0]["val"] = None
    chosen = two_best(rows, THREAT, select_on="val", report_on="test")
    assert [row["name"] for row in chosen] == ["c", "c"]
    assert two_best([], THREAT, select_on="val", report_on="test") is None


def test_two_best_breaks_a_tie_by_the_other_accuracy():
    rows = [
        make_row("a", "grid", 0.80, 0.20),
        make_row("b", "grid", 0.80, 0.25),
        make_row("c", "grid", 0.70, 0.25),
    ]
    chosen = two_best(rows, THREAT, select_on="val", report_on="test")
    assert [row["name"] for row in chosen] == ["b", "b"]


def test_figures_of_other_settings_go_and_what_is_not_ours_stays(tmp_path, results):
    report(tmp_path, results)
    for name in ("lines.png", "ternary-9.svg", "mine.png", "ternary-of-mine.pdf"):
        (tmp_path / "figures" / name).write_text("before")
    report(tmp_path, results | {"figures": ["ternary"]})
    left = {file.name for file in (tmp_path / "figures").iterdir()}
    assert left == {"ternary.png", "ternary.svg", "ternary.pdf", "mine.png", "ternary-of-mine.pdf"}


def test_each_soup_of_a_ternary_map_stands_where_its_coefficients_say(tmp_path, results):
    (plot,), _ = draw_ternary(results, tmp_path)
    rows = [row for row in results["rows"] if row["role"] == "grid"]
    panels = [axes for axes in plot.figure.axes if axes.get_title()]
    for axes, measure in zip(panels, ("clean", THREAT), strict=True):
        corners = {
            text.get_text(): np.array(text.xy) for text in axes.texts if text.get_text() in NAMES
        }
        (dots,) = [
            c
            for c in axes.collections
            if len(c.get_offsets()) == len(rows) and c.get_array() is not None
        ]
        spots = np.asarray(dots.get_offsets(), dtype=float).round(6)
        shown = {tuple(at): value for at, value in zip(spots, dots.get_array(), strict=True)}
        for row in rows:
            at = sum(
                share * corners[name]
                for share, name in zip(row["coefficients"], NAMES, strict=True)
            )
            assert shown[tuple(np.round(at, 6))] == pytest.approx(
                100 * row["test"][measure]["value"]
            )


def test_a_grid_of_two_ingredients_leaves_the_ternary_out_and_says_why(tmp_path):
    text = report(tmp_path, make_results(tmp_path, NAMES[:2]))
    assert "Left out: ternary: no grid of soups of three ingredients was measured" in text
    assert not (tmp_path / "figures" / "ternary.png").exists()
    assert (tmp_path / "figures" / "tradeoff.png").exists()


def test_nothing_learned_and_a_missing_coefficients_file_are_told_apart(tmp_path, results):
    (tmp_path / results["rows"][-1]["coefficients_file"]).unlink()
    results["figures"] = ["coefficients"]
    assert "no such file" in report(tmp_path, results)
    results["rows"] = [row for row in results["rows"] if row["role"] != "learned"]
    assert "Left out: coefficients: no soup was learned." in report(tmp_path, results)


def test_one_figure_never_mixes_splits(tmp_path, results):
    for row in results["rows"][5:]:
        row["test"] = None
    assert shown_split(results["rows"], results["protocol"]) == "val"
    text = report(tmp_path, results)
    assert "on val of 21 weighted averages" in text
    assert (
        "the soup selected on val is learned-Linf-8/255: 32.7 % Linf 8/255, 71.9 % clean on val"
        in text
    )


def test_each_threat_has_its_tradeoff_and_the_union_too(tmp_path, results):
    results["protocol"]["threats"] = [THREAT, "L2 0.5"]
    for row in results["rows"]:
        for split in ("val", "test"):
            row[split] |= {"L2 0.5": row[split][THREAT], "union": row[split][THREAT]}
    results["figures"] = ["ternary", "tradeoff"]
    text = report(tmp_path, results)
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {
        "ternary",
        "tradeoff",
        "tradeoff-2",
        "tradeoff-3",
    }
    assert "L2 0.5, test" in text


def test_equal_accuracies_and_nothing_measured_are_drawn_or_left_out_without_a_warning(
    tmp_path, results
):
    for row in results["rows"]:
        row["test"] = row["val"] = accuracies(0.5, 0.0)
    assert "Left out" not in report(tmp_path, results)
    for row in results["rows"]:
        row["test"] = row["val"] = None
    text = report(tmp_path, results)
    assert "Left out: tradeoff" in text
    assert "Left out: ternary" in text


def test_learned_soups_are_one_curve_in_order_of_eps_or_of_the_clean_weight():
    def learned(threat, objective="ce"):
        return {"name": f"{threat} {objective}", "threat": threat, "objective": objective}

    by_eps = curves([learned("Linf 16/255"), learned("clean"), learned("Linf 4/255")])
    assert [(apart, [label for label, _ in curve]) for apart, curve in by_eps] == [
        ("", ["clean", "4/255", "16/255"])
    ]
    by_weight = curves([learned(THREAT, "mixed 0.4"), learned(THREAT), learned(THREAT, "mixed 1")])
    assert [[label for label, _ in curve] for _, curve in by_weight] == [["0", "0.4", "1"]]
    apart = curves(
        [
            learned(THREAT, "trades 5"),
            learned(THREAT, "mixed 0.4"),
            learned(THREAT),
            learned(THREAT, "no.such:fn"),
        ]
    )
    assert [(name, [label for label, _ in curve]) for name, curve in apart] == [
        ("mixed", ["0", "0.4"]),
        ("trades 5", ["trades 5"]),
        ("no.such:fn", ["no.such:fn"]),
    ]
    by_norm = curves([learned("L2 0.5"), learned("Linf 8/255"), learned("L2 0.25")])
    assert [(apart, [label for label, _ in curve]) for apart, curve in by_norm] == [
        ("L2", ["0.25", "0.5"]),
        ("Linf", ["8/255"]),
    ]


def test_the_summary_says_whether_the_requirement_was_met_and_held(tmp_path, results):
    results["figures"] = []
    text = report(tmp_path, results)
    assert "was met at the lower end of its 95 % interval on val; on test it held." in text
    results["selection"] |= {"met": False, "held_on_test": False, "point": True}
    assert "was NOT met by its estimate on val; on test it did NOT hold." in report(
        tmp_path, results
    )
    results["selection"] = None
    assert "No soup was selected." in report(tmp_path, results)


def test_the_table_marks_the_best_of_each_column(tmp_path, results):
    results["figures"] = []
    text = report(tmp_path, results)
    line = next(line for line in text.splitlines() if ">learned-Linf-16/255<" in line)
    assert "<strong>35.2</strong> <small>[33.1, 37.3]</small>" in line
    assert "<strong>61.0</strong>" not in line


def test_a_missing_or_broken_results_file_is_one_line_that_names_it(tmp_path, results):
    target = tmp_path / "results.json"
    with pytest.raises(RequestError, match=r"results\.json: no such file"):
        write_report(tmp_path)
    for text, said in [
        ("{", "not readable as JSON"),
        ("[]", "got list, expected an object"),
        ('{"name": "x"}', "protocol: got nothing, expected dict"),
    ]:
        target.write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=said) as caught:
            write_report(tmp_path)
        assert str(target) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: r["rows"][3].pop("role"), r"rows\[3\]: role: got nothing"),
        (
            lambda r: r["rows"][3].update(role="x"),
            r'rows\[3\]: role: got "x", expected one of pretrained',
        ),
        (
            lambda r: r["rows"][3]["test"]["clean"].update(value=math.nan),
            r"rows\[3\]: test: clean: value: got nan",
        ),
        (
            lambda r: r.update(figures=["pie"]),
            'figures: got "pie", expected ternary, lines, tradeoff, curves, landscape, coefficients',
        ),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, results, spoil, said):
    spoil(results)
    with pytest.raises(RequestError, match=said):
        report(tmp_path, results)


def test_figures_default_to_all_that_apply(tmp_path, results):
    del results["figures"]
    text = report(tmp_path, results)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {"ternary", "tradeoff", "curves", "coefficients"}
    assert "Left out: lines: no line of soups of two networks was measured." in text
    assert "Left out: landscape: no plane through three checkpoints was measured." in text


def test_each_soup_has_its_shares_entropy_movement_and_slope_on_scales_that_are_shared(
    tmp_path, results
):
    (plot,), reason = FIGURES["coefficients"](results, tmp_path)
    assert reason == ""
    shown = columns(plot.figure)
    assert {what: len(axes) for what, axes in shown.items()} == {
        "share": 5,
        "entropy": 5,
        "moved": 5,
        "slope": 5,
    }
    assert [axes.get_title(loc="left") for axes in shown["share"]] == [
        "clean",
        *(f"L∞ {eps}/255" for eps in (2, 4, 8, 16)),
    ]
    first = Coefficients.load(tmp_path / "coefficients" / "learned-1.safetensors")
    assert np.allclose(shown["entropy"][0].lines[0].get_xdata(), first.entropy())
    assert np.allclose(shown["moved"][0].lines[0].get_xdata(), first.movement())
    assert (
        len({axes.get_xlim() for axes in shown["moved"]})
        == len({axes.get_xlim() for axes in shown["slope"]})
        == 1
    )
    assert all(axes.get_ylim() == (len(LAYERS) - 0.5, -0.5) for axes in plot.figure.axes)
    assert "mean norm of dL/dlogits" in plot.figure.get_supxlabel().replace("\n", " ")


def test_the_slopes_axis_is_logarithmic_and_a_slope_of_0_is_an_open_dot_at_its_left_end():
    axes = columns(draw_learned(learned(LAYERS, 3), NAMES, "x").figure)["slope"][0]
    line, zeros = axes.lines
    assert axes.get_xscale() == "log"
    assert np.allclose(line.get_xdata()[1:], learned(LAYERS, 3).slopes[1:])
    assert list(zeros.get_ydata()) == [0]
    assert zeros.get_xdata()[0] == axes.get_xlim()[0] <= line.get_xdata()[1:].min()
    assert zeros.get_markerfacecolor() == "white"
    still = replace(learned(LAYERS, 3), slopes=torch.zeros(len(LAYERS), dtype=torch.float64))
    line, zeros = columns(draw_learned(still, NAMES, "x").figure)["slope"][0].lines
    assert len(zeros.get_ydata()) == len(LAYERS)


def test_old_files_are_drawn_without_what_they_do_not_hold(tmp_path):
    new = learned(LAYERS, 3)
    old = replace(new, start=None, slopes=None)
    figure = draw_learned(old, NAMES, "x").figure
    assert {what: len(axes) for what, axes in columns(figure).items()} == {"share": 1, "entropy": 1}
    assert "moved" not in figure.get_supxlabel()
    assert "slope" not in figure.get_supxlabel()
    both = draw_dial([("old", old), ("new", new)], NAMES, "x")
    assert {what: len(axes) for what, axes in columns(both.figure).items()} == {
        "share": 2,
        "entropy": 2,
        "moved": 1,
        "slope": 1,
    }
    assert "movement not recorded" in both.tables[0].summary


@pytest.mark.parametrize(
    ("layers", "n", "soups"),
    [(1, 3, 1), (1, 2, 6), (1, 1, 1), (2, 8, 3), (25, 3, 5), (62, 72, 1), (170, 4, 1), (4, 9, 2)],
)
def test_any_number_of_layers_ingredients_and_soups_fits_its_figure(tmp_path, layers, n, soups):
    names = ["*"] if layers == 1 else [f"layer{i}.weight" for i in range(layers)]
    found = [(f"t = {k}", learned(names, n, seed=k)) for k in range(soups)]
    found[0] = ("t = 0", replace(found[0][1], slopes=found[0][1].slopes + 1e-4))  # none of them 0
    plot = draw_dial(found, [f"a-long-name-of-an-ingredient-{i}" for i in range(n)], "dial")
    save(plot, tmp_path)  # a warning of a layout that failed is an error here
    assert sorted(path.name for path in tmp_path.glob("coefficients.*")) == [
        "coefficients.pdf",
        "coefficients.png",
        "coefficients.svg",
    ]
    width, height = plot.figure.bbox.size
    for axes in plot.figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
        assert axes.get_position().width * width > 20
        assert axes.get_position().height * height > 4
    named = [text.get_text() for text in plot.figure.axes[0].get_yticklabels()]
    assert named == ["whole network"] if layers == 1 else len(named) in range(min(layers, 20), 41)


def test_more_ingredients_than_colours_are_a_map_of_shares():
    found = learned(LAYERS, 9)
    axes = columns(draw_learned(found, [f"run{i}" for i in range(9)], "x").figure)["ingredient"][0]
    assert np.array_equal(axes.images[0].get_array(), found.alpha.numpy())
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"run{i}" for i in range(9)]
    assert not columns(draw_learned(learned(LAYERS, 8), list("abcdefgh"), "x").figure)["share"][
        0
    ].images


def test_the_bars_are_the_shares():
    found = learned(LAYERS, 3)
    axes = columns(draw_learned(found, NAMES, "x").figure)["share"][0]
    widths = [[bar.get_width() for bar in container] for container in axes.containers]
    assert np.allclose(np.transpose(widths), found.alpha)
    lefts = [[bar.get_x() for bar in container] for container in axes.containers]
    assert np.allclose(np.transpose(lefts), found.alpha.cumsum(1) - found.alpha)


def test_drawing_and_saving_leave_the_settings_of_matplotlib_alone_and_do_not_depend_on_them(
    tmp_path,
):
    save(draw_learned(learned(LAYERS, 3), NAMES, "x"), tmp_path / "one")
    with matplotlib.rc_context({"font.size": 30, "axes.spines.top": True, "svg.hashsalt": "other"}):
        before = dict(matplotlib.rcParams)
        save(draw_learned(learned(LAYERS, 3), NAMES, "x"), tmp_path / "two")
        assert dict(matplotlib.rcParams) == before
    for ending in ("png", "svg", "pdf"):
        one, two = (tmp_path / name / f"coefficients.{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_a_figure_of_what_does_not_belong_together_is_refused():
    found = learned(LAYERS, 3)
    with pytest.raises(CoefficientError, match="got 3, expected 2, one for each ingredient"):
        draw_learned(found, NAMES[:2], "x")
    with pytest.raises(CoefficientError, match="got none, expected at least one soup"):
        draw_dial([], NAMES, "x")
    with pytest.raises(CoefficientError, match="expected those of one network"):
        draw_dial([("a", found), ("b", learned(LAYERS[:4], 3))], NAMES, "x")


def small():
    """Four layers whose numbers can be worked out in the head."""
    alpha = torch.tensor([[0.5, 0.5], [0.6, 0.4], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    start = torch.full((4, 2), 0.5, dtype=torch.float64)
    slopes = torch.tensor([0, 1e-5, 0.123456789, 2], dtype=torch.float64)
    return Coefficients(alpha, ("a", "b", "c", "d"), start=start, slopes=slopes)


def test_the_table_has_a_line_for_each_layer_and_a_column_for_each_ingredient():
    lines = coefficient_table(small(), ["x", "y"])
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
    old = coefficient_table(replace(small(), start=None, slopes=None), ["x", "y"])
    assert {(line["moved"], line["slope"]) for line in old} == {(None, None)}


def test_an_ingredient_named_like_another_column_keeps_a_column_of_its_own():
    lines = coefficient_table(small(), ["moved", "moved"])
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
        coefficient_table(small(), ["x"])


def test_the_csv_file_holds_the_table_to_six_digits(tmp_path):
    path = write_coefficient_csv(small(), ['x,"1"', "y"], tmp_path / "new" / "a.csv")
    with open(path, encoding="utf-8", newline="") as file:
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
    old = write_coefficient_csv(replace(small(), start=None, slopes=None), ["x", "y"], path)
    assert old.read_text(encoding="utf-8").splitlines()[:2] == [
        "layer,x,y,entropy,moved,slope",
        "a,0.5,0.5,0.693147,,",
    ]
    assert [item.name for item in path.parent.iterdir()] == ["a.csv"]


def test_the_summary_of_a_soup_says_how_uniform_it_is_and_what_moved(tmp_path):
    (table,) = draw_learned(small(), ["x", "y"], "x").tables
    assert table.summary == (
        "mean entropy 69.6 % of log n; mean movement 0.212; moved least: a (0), b (0.1); moved most: c (0.5), d (0.25)"
    )
    (table,) = draw_learned(learned(["*"], 1), ["x"], "x").tables
    assert table.summary == "mean movement 0"
    assert table.lines[0]["layer"] == "whole network"


def test_the_report_has_a_table_for_each_learned_soup_and_a_csv_file_for_each_file(
    tmp_path, results
):
    with_dial_and_greedy(tmp_path, results)
    results["figures"] = ["coefficients"]
    for row in results["rows"]:
        if row["coefficients_file"]:
            row["ingredients"] = ["a<b>", "b", "c"]
    text = report(tmp_path, results)
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == {
        "coefficients",
        "coefficients-2",
    }
    names = {f"learned-{k}" for k in range(5)} | {"dial-0", "dial-0.7", "dial-1", "greedy"}
    assert {path.stem for path in (tmp_path / "coefficients").glob("*.csv")} == names
    assert text.count("<details>") == text.count("</details>") == 8
    assert "<b>" not in text
    assert text.index("<strong>t = 0, Linf 8/255</strong> mean entropy") < text.index(
        "<strong>t = 1, Linf 8/255</strong>"
    )
    fold = next(
        part for part in text.split("<details>") if part.startswith("<summary><strong>t = 0.7")
    )
    fold = fold[: fold.index("</details>")]
    assert fold.count("<tr>") == 1 + len(LAYERS)
    assert '<th scope="col">a&lt;b&gt;</th>' in fold
    with open(tmp_path / "coefficients" / "dial-0.7.csv", encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    cells = "".join(
        f"<td>{float(last[key]):.3g}</td>"
        for key in ("a<b>", "b", "c", "entropy", "moved", "slope")
    )
    assert f'<th scope="row">{LAYERS[-1]}</th>{cells}' in fold
    assert "Left out" not in text


def test_a_file_of_coefficients_that_is_missing_is_named_and_the_other_sections_are_drawn(
    tmp_path, results
):
    with_dial_and_greedy(tmp_path, results)
    results["figures"] = ["coefficients"]
    (tmp_path / "coefficients" / "dial-1.safetensors").unlink()
    text = report(tmp_path, results)
    assert [path.stem for path in (tmp_path / "figures").glob("*.svg")] == ["coefficients"]
    assert text.count("Left out: coefficients:") == 1
    assert text.count("Left out: coefficients/dial-1.csv:") == 1
    assert (tmp_path / "coefficients" / "dial-0.csv").exists()


def test_a_table_is_never_written_outside_the_run_folder(tmp_path, results):
    learned(LAYERS, 3).save(tmp_path / "elsewhere.safetensors")
    (tmp_path / "run").mkdir()
    results["rows"] = [
        make_row("a", "learned", 0.7, 0.3, coefficients_file="../elsewhere.safetensors")
    ]
    results["figures"] = []
    report(tmp_path / "run", results)
    assert not (tmp_path / "elsewhere.csv").exists()
    assert (tmp_path / "run" / "coefficients" / "elsewhere.csv").exists()


def test_a_dial_is_one_curve_for_each_threat_in_order_of_t():
    def turned(t, threat=THREAT):
        return {"name": f"{t}", "threat": threat, "objective": None, "at": t}

    (curve,) = curves([turned(1.0), turned(0.0), turned(0.25)])
    assert (curve[0], [label for label, _ in curve[1]]) == ("t", ["0", "0.25", "1"])
    two = curves([turned(1, "Linf 16/255"), turned(0.5), turned(0, "Linf 16/255"), turned(0)])
    assert [(apart, [label for label, _ in curve]) for apart, curve in two] == [
        ("t, Linf 16/255", ["0", "1"]),
        (f"t, {THREAT}", ["0", "0.5"]),
    ]
    mixed = curves([turned(0), {"name": "x", "threat": "clean", "objective": "ce", "at": None}])
    assert [label for _, curve in mixed for label, _ in curve] == ["0", "clean"]


def test_dial_and_greedy_soups_are_in_the_tradeoff_and_in_the_table(tmp_path, results):
    with_dial_and_greedy(tmp_path, results)
    (plot,), _ = draw_tradeoff(results, tmp_path)
    axes = plot.figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    assert {"dial (t)", "greedy soup", "uniform soup"} <= set(labels)
    assert np.allclose(handles[labels.index("dial (t)")].get_xdata(), [62, 77, 80])
    assert np.allclose(handles[labels.index("greedy soup")].get_offsets(), [[76, 29]])
    assert {"0", "0.7", "1"} <= {text.get_text() for text in axes.texts}
    results["figures"] = []
    text = report(tmp_path, results)
    assert ">dial-0.7</th><td>dial</td><td>by layer, t = 0.7</td>" in text
    assert ">greedy</th><td>greedy</td><td>0.5 / 0.5 / 0</td>" in text
    assert ">learned-clean</th><td>learned</td><td>by layer</td>" in text

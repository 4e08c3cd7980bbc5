"""Figures and the report, from synthetic results: no network is trained or run here."""

import json
import math
import re
from html import escape

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from robustsoup.errors import RequestError
from robustsoup.reports import FIGURES, write_report
from robustsoup.reports.results import shown_split, two_best
from robustsoup.reports.style import plain
from robustsoup.reports.tradeoff import curves
from robustsoup.soups.coefficients import Coefficients
from robustsoup.statistics import Accuracy

THREAT = "Linf 8/255"
NAMES = ["eps4", "eps8", "eps16"]
LAYERS = tuple(f"block{i}.{j}.{kind}" for i in range(6) for j, kind in ((0, "weight"), (1, "weight"), (1, "bias")))


def accuracies(clean, robust, n=2000, **more):
    """Synthetic measurements, rounded to whole samples as real ones are."""
    found = {}
    for name, share in {"clean": clean, THREAT: robust, **more}.items():
        entry = Accuracy(round(share * n), n)
        found[name] = {"value": entry.value, "low": entry.low, "high": entry.high, "hits": entry.hits, "n": n}
    return found


def make_row(name, role, clean, robust, **more):
    row = {"soup": None, "ingredients": None, "coefficients": None, "coefficients_file": None, "threat": None,
           "objective": None, "checkpoint": None}  # fmt: skip
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
        rows.append(make_row(
            "grid-" + "-".join(f"{a:g}" for a in alpha), "grid", alpha @ clean[: len(names)] + bend,
            alpha @ robust[: len(names)] + bend / 3, soup="grid", ingredients=names, coefficients=alpha.tolist(),
        ))  # fmt: skip
    return rows


def learned_rows(folder):
    rows = []
    for k, (threat, clean, robust) in enumerate([
        ("Linf 16/255", 0.61, 0.352), ("clean", 0.80, 0.21), ("Linf 2/255", 0.79, 0.245), ("Linf 4/255", 0.775, 0.28),
        ("Linf 8/255", 0.715, 0.33),
    ]):  # fmt: skip
        file = f"coefficients/learned-{k}.safetensors"
        tilt = torch.linspace(-1, 1, 3, dtype=torch.float64) * (k - 2)
        noise = torch.randn(len(LAYERS), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        (folder / "coefficients").mkdir(exist_ok=True)
        Coefficients(torch.softmax(noise + tilt, 1), LAYERS).save(folder / file)
        more = {"soup": "learned", "ingredients": NAMES, "coefficients_file": file, "threat": threat, "objective": "ce"}
        rows.append(make_row("learned-" + threat.replace(" ", "-"), "learned", clean, robust, **more))
    return rows


def make_results(folder, names=NAMES):
    """A synthetic run folder: no network was trained for these numbers."""
    rows = [
        make_row("pretrained", "pretrained", 0.70, 0.32, threat=THREAT),
        make_row("eps4", "ingredient", 0.78, 0.24, threat="Linf 4/255"),
        make_row("eps8", "ingredient", 0.72, 0.31, threat="Linf 8/255"),
        make_row("eps16", "ingredient", 0.60, 0.345, threat="Linf 16/255"),
        *grid_rows(names),
        make_row("uniform", "uniform", 0.72, 0.305, soup="uniform", ingredients=NAMES, coefficients=[1 / 3] * 3),
        *learned_rows(folder),
    ]
    return {
        "name": "eps-soups", "created": "2026-11-22T19:00:00Z", "recipe": {"name": "eps-soups", "seed": 0},
        "data": {"name": "synthetic", "classes": 10, "split_digest": "abc123", "seed": 3}, "model": "resnet9:width=16",
        "leakage": {"status": "known", "why": ""}, "figures": ["ternary", "tradeoff", "coefficients"],
        "protocol": {
            "attack": "apgd", "loss": "ce", "steps": 50, "restarts": 1, "precision": "float32", "seed": 0,
            "select_on": "val", "report_on": "test", "samples": {"val": 2000, "test": 2000}, "threats": [THREAT],
        },
        "versions": {"robustsoup": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "device": "cpu", "threads": 2},
        "seconds": 1234.5, "rows": rows,
        "selection": {
            "maximise": THREAT, "require": ["clean>=0.7"], "met": True, "chosen": "learned-Linf-8/255", "point": False,
            "message": "", "held_on_test": True,
        },
    }  # fmt: skip


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
    rows = [make_row("a", "grid", 0.80, 0.20), make_row("b", "grid", 0.70, 0.30), make_row("c", "grid", 0.75, 0.25)]
    rows[2]["test"] = accuracies(0.95, 0.60)
    chosen = two_best(rows, THREAT, select_on="val", report_on="test")
    assert [row["name"] for row in chosen] == ["a", "b"]
    rows[0]["val"] = None
    chosen = two_best(rows, THREAT, select_on="val", report_on="test")
    assert [row["name"] for row in chosen] == ["c", "c"]
    assert two_best([], THREAT, select_on="val", report_on="test") is None


def test_two_best_breaks_a_tie_by_the_other_accuracy():
    rows = [make_row("a", "grid", 0.80, 0.20), make_row("b", "grid", 0.80, 0.25), make_row("c", "grid", 0.70, 0.25)]
    chosen = two_best(rows, THREAT, select_on="val", report_on="test")
    assert [row["name"] for row in chosen] == ["b", "b"]


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
    assert "the soup selected on val is learned-Linf-8/255: 32.7 % Linf 8/255, 71.9 % clean on val" in text


def test_each_threat_has_its_tradeoff_and_the_union_too(tmp_path, results):
    results["protocol"]["threats"] = [THREAT, "L2 0.5"]
    for row in results["rows"]:
        for split in ("val", "test"):
            row[split] |= {"L2 0.5": row[split][THREAT], "union": row[split][THREAT]}
    results["figures"] = ["ternary", "tradeoff"]
    text = report(tmp_path, results)
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {
        "ternary", "tradeoff", "tradeoff-2", "tradeoff-3",
    }  # fmt: skip
    assert "L2 0.5, test" in text


def test_equal_accuracies_and_nothing_measured_are_drawn_or_left_out_without_a_warning(tmp_path, results):
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
    assert [(apart, [label for label, _ in curve]) for apart, curve in by_eps] == [("", ["clean", "4/255", "16/255"])]
    by_weight = curves([learned(THREAT, "mixed 0.4"), learned(THREAT), learned(THREAT, "mixed 1")])
    assert [[label for label, _ in curve] for _, curve in by_weight] == [["0", "0.4", "1"]]
    by_norm = curves([learned("L2 0.5"), learned("Linf 8/255"), learned("L2 0.25")])
    assert [(apart, [label for label, _ in curve]) for apart, curve in by_norm] == [
        ("L2", ["0.25", "0.5"]), ("Linf", ["8/255"]),
    ]  # fmt: skip


def test_the_summary_says_whether_the_requirement_was_met_and_held(tmp_path, results):
    results["figures"] = []
    text = report(tmp_path, results)
    assert "was met at the lower end of its 95 % interval on val; on test it held." in text
    results["selection"] |= {"met": False, "held_on_test": False, "point": True}
    assert "was NOT met by its estimate on val; on test it did NOT hold." in report(tmp_path, results)
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
        (lambda r: r["rows"][3].update(role="x"), r'rows\[3\]: role: got "x", expected one of pretrained'),
        (lambda r: r["rows"][3]["test"]["clean"].update(value=math.nan), r"rows\[3\]: test: clean: value: got nan"),
        (lambda r: r.update(figures=["pie"]), 'figures: got "pie", expected ternary, tradeoff, coefficients'),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, results, spoil, said):
    spoil(results)
    with pytest.raises(RequestError, match=said):
        report(tmp_path, results)


def test_figures_default_to_all_three(tmp_path, results):
    del results["figures"]
    report(tmp_path, results)
    assert sorted(path.stem for path in (tmp_path / "figures").glob("*.svg")) == sorted(FIGURES)

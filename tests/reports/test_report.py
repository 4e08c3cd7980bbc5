"""The report as one HTML page, from synthetic results."""

import csv
import importlib.resources
import json
import math
import re
import shutil

import matplotlib
import pytest
from markupsafe import escape
from PIL import Image
from synthetic_results import (
    LAYERS,
    NAMES,
    add_dial_and_greedy,
    make_accuracies,
    make_check,
    make_coefficients,
    make_results,
    make_row,
    write_and_read_report,
)

from robustsoup.errors import RequestError
from robustsoup.reports import style, write_report
from robustsoup.reports.style import clean_text

ALL_FORMATS = dict(style.FORMATS)
BIAS = "this biases the accuracies of selected networks upwards."


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a report in all formats, and matplotlib's settings before and after."""
    folder = tmp_path_factory.mktemp("report")
    before = dict(matplotlib.rcParams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "FORMATS", ALL_FORMATS)
        write_and_read_report(folder, make_results(folder))
    return folder, before, dict(matplotlib.rcParams)


def test_the_report_is_self_contained_and_names_every_row(written):
    folder, _, _ = written
    for stem in ("ternary", "tradeoff", "coefficients"):
        for ending in ("png", "svg", "pdf"):
            assert (folder / "figures" / f"{stem}.{ending}").stat().st_size > 1000
        with Image.open(folder / "figures" / f"{stem}.png") as image:
            assert min(image.size) > 500
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
    text = (folder / "report.html").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert text.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert all(f">{row['name']}" in text for row in results["rows"])
    assert "Left out" not in text
    assert not list(folder.rglob("*.tmp"))


def test_the_report_leaves_the_settings_of_matplotlib_alone(written):
    _, before, after = written
    assert before == after


def test_equal_results_give_equal_bytes(tmp_path):
    figures = ["ternary", "tradeoff", "coefficients"]
    if matplotlib.__version_info__ < (3, 10):
        figures.remove("ternary")  # matplotlib 3.9 puts memory addresses into its clip paths
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_and_read_report(folder, make_results(folder) | {"figures": figures})
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert {file.stem for file in files} >= {"report", "learned-0", *figures}
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_figures_of_other_settings_are_removed_and_other_files_stay(written, tmp_path):
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    for name in ("lines.png", "ternary-9.svg", "mine.png", "ternary-of-mine.pdf"):
        (tmp_path / "figures" / name).write_text("before")
    write_and_read_report(tmp_path, make_results(tmp_path) | {"figures": ["ternary"]})
    left = {file.name for file in (tmp_path / "figures").iterdir()}
    assert left == {"ternary.png", "ternary.svg", "ternary.pdf", "mine.png", "ternary-of-mine.pdf"}


def test_the_templates_are_files_of_the_package():
    templates = importlib.resources.files("robustsoup.reports") / "templates"
    assert "{% for figure in figures %}" in (templates / "report.html").read_text(encoding="utf-8")
    css = (templates / "report.css").read_text(encoding="utf-8")
    assert css.count("{") == css.count("}") > 20
    assert "{%" not in css


def test_the_findings_of_the_masking_check_are_listed(tmp_path, results):
    text = write_and_read_report(tmp_path, results)
    assert "Masking check" not in text
    finding = "test, Linf 8/255: Square further breaks 1 of 9 survivors [2.0, 43.5] %"
    results["rows"][0]["masking_check"] = [finding]
    text = write_and_read_report(tmp_path, results)
    assert f"<td>{finding}</td>" in text
    results["rows"][0]["masking_check"] = ["<script>"]
    assert "<td>&lt;script&gt;</td>" in write_and_read_report(tmp_path, results)


def test_names_are_escaped_in_the_page_and_start_no_mathematics_in_figures(tmp_path, results):
    name = 'a<script>alert("x")</script>$\\frac$ 鍋'
    results["name"] = results["rows"][1]["name"] = name
    results["rows"][4]["ingredients"] = [name, "b", "c"]
    results["leakage"] = {"status": "violated", "why": name}
    results["recipe"] = {"name": name}
    results["figures"] = ["ternary", "tradeoff"]
    text = write_and_read_report(tmp_path, results)
    assert "<script" not in text
    assert text.count(str(escape(name))) >= 4
    assert clean_text("a$b鍋") == "a\\$b?"
    assert len(clean_text("x" * 99, 12)) == 12


@pytest.mark.parametrize("status", ["unknown", "violated"])
def test_leakage_that_is_not_ruled_out_is_a_banner(tmp_path, results, status):
    results["figures"] = []
    results["leakage"] = {"status": status, "why": "eps4: no record"}
    text = write_and_read_report(tmp_path, results)
    assert f'class="banner {status}"' in text
    assert "eps4: no record" in text


def test_fresh_data_has_no_banner(tmp_path, results):
    results["figures"] = []
    text = write_and_read_report(tmp_path, results)
    assert 'class="banner' not in text
    assert "No ingredient was trained on the samples that select and report." in text


def test_the_head_of_the_report_states_what_biases_its_accuracies(tmp_path, results):
    results["figures"] = []
    assert "biases" not in write_and_read_report(tmp_path, results)
    results["leakage"] = {"status": "violated", "why": "eps4 was trained on them"}
    head = write_and_read_report(tmp_path, results).split("<h2>")[0]
    leaked = "Selected on samples that ingredients were trained on"
    assert f"{leaked}: {BIAS}</strong> eps4 was trained on them" in head
    results["leakage"] = {"status": "known", "why": ""}
    results["protocol"]["select_on"] = "test"
    head = write_and_read_report(tmp_path, results).split("<h2>")[0]
    assert f"The paper&#39;s protocol: selected on test: {BIAS}" in head


def test_a_grid_of_two_ingredients_has_no_ternary_figure(tmp_path):
    results = make_results(tmp_path, NAMES[:2]) | {"figures": ["ternary", "tradeoff"]}
    text = write_and_read_report(tmp_path, results)
    assert "Left out: ternary: a ternary plot requires a measured grid" in text
    assert not (tmp_path / "figures" / "ternary.svg").exists()
    assert (tmp_path / "figures" / "tradeoff.svg").exists()


def test_a_missing_coefficients_file_and_no_learned_soup_have_different_reasons(tmp_path, results):
    (tmp_path / results["rows"][-1]["coefficients_file"]).unlink()
    results["figures"] = ["coefficients"]
    assert "no such file" in write_and_read_report(tmp_path, results)
    results["rows"] = [row for row in results["rows"] if row["role"] != "learned"]
    text = write_and_read_report(tmp_path, results)
    assert "Left out: coefficients: no soup was learned." in text


def test_a_figure_never_mixes_splits(tmp_path, results):
    for row in results["rows"][5:]:
        row["test"] = None
    results["figures"] = ["ternary"]
    text = write_and_read_report(tmp_path, results)
    assert "on val of 21 weighted averages" in text
    selected = "the soup selected on val is learned-Linf-8/255: 32.7 % Linf 8/255, 71.9 % clean"
    assert f"{selected} on val" in text


def test_equal_accuracies_are_drawn_and_missing_ones_left_out_without_a_warning(tmp_path, results):
    for row in results["rows"]:
        row["test"] = row["val"] = make_accuracies(0.5, 0.0)
    results["figures"] = ["ternary", "tradeoff"]
    assert "Left out" not in write_and_read_report(tmp_path, results)
    for row in results["rows"]:
        row["test"] = row["val"] = None
    text = write_and_read_report(tmp_path, results)
    assert "Left out: tradeoff" in text
    assert "Left out: ternary" in text


def test_the_summary_states_whether_the_requirement_was_met_and_held(tmp_path, results):
    results["figures"] = []
    text = write_and_read_report(tmp_path, results)
    assert "was met by its 95 % lower bound on val; on test it held." in text
    failed = [make_check("clean>=0.7", 0.69, 2000)]
    results["selection"] |= {"met": False, "test": failed, "point": True}
    text = write_and_read_report(tmp_path, results)
    assert "was NOT met by its estimate on val; on test it did NOT hold." in text
    results["selection"] = None
    assert "No soup was selected." in write_and_read_report(tmp_path, results)


def test_the_table_marks_the_best_of_each_column(tmp_path, results):
    results["figures"] = []
    text = write_and_read_report(tmp_path, results)
    line = next(line for line in text.splitlines() if ">learned-Linf-16/255<" in line)
    assert "<strong>35.2</strong> <small>[33.1, 37.3]</small>" in line
    assert "<strong>61.0</strong>" not in line


def test_a_missing_or_broken_results_file_is_named_in_one_line(tmp_path, results):
    target = tmp_path / "results.json"
    with pytest.raises(RequestError, match=r"results\.json: no such file"):
        write_report(tmp_path)
    for text, message in [
        ("{", "not JSON"),
        ("[]", "got list, expected an object"),
        ('{"name": "x", "rows": []}', "expected the keys name, protocol, rows"),
    ]:
        target.write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=message) as caught:
            write_report(tmp_path)
        assert str(target) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r["rows"][3].pop("role"), r"rows\[3\]: got .*, expected the keys name, role"),
        (
            lambda r: r["rows"][3].update(role="x"),
            r"rows\[3\]\.role: got 'x', expected one of pretrained",
        ),
        (
            lambda r: r["rows"][3]["test"]["clean"].update(value=math.nan),
            "NaN is not a JSON number",
        ),
        (lambda r: r.update(planes=["y"]), r"planes\[0\]: got 'y', expected a table"),
        (
            lambda r: r.update(figures=["pie"]),
            'figures: got "pie", expected ternary, lines, tradeoff, curves, landscape, coeff',
        ),
    ],
)
def test_an_invalid_entry_is_named(tmp_path, results, spoil, message):
    spoil(results)
    with pytest.raises(RequestError, match=message):
        write_and_read_report(tmp_path, results)


def test_by_default_all_figures_that_apply_are_drawn(tmp_path, results):
    del results["figures"]
    text = write_and_read_report(tmp_path, results)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {"ternary", "tradeoff", "curves", "coefficients"}
    assert "Left out: lines: no line of soups of two networks was measured." in text
    assert "Left out: landscape: no plane through three checkpoints was measured." in text


def test_a_run_that_selects_where_it_reports_shows_each_number_once(tmp_path, all_results):
    all_results["figures"] = []
    all_results["protocol"] |= {"select_on": "test", "screened": True}
    for row in all_results["rows"]:
        row["val"] = None
    all_results["rows"][5]["screened"] = True
    text = write_and_read_report(tmp_path, all_results)
    assert text.count('<th scope="col">clean, test</th>') == 1
    assert "clean, val" not in text
    assert "Both were chosen on" not in text
    assert "was met at the lower end of its 95 % interval on test.</p>" in text
    assert "(test figures are upper bounds)" in text


def test_each_learned_soup_has_a_table_and_each_coefficients_file_a_csv_file(tmp_path, results):
    add_dial_and_greedy(tmp_path, results)
    results["figures"] = ["coefficients"]
    for row in results["rows"]:
        if row.get("coefficients_file"):
            row["ingredients"] = ["a<b>", "b", "c"]
    text = write_and_read_report(tmp_path, results)
    stems = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert stems == {"coefficients", "coefficients-2"}
    names = {f"learned-{k}" for k in range(3)} | {"dial-0", "dial-0.7", "dial-1", "greedy"}
    assert {path.stem for path in (tmp_path / "coefficients").glob("*.csv")} == names
    assert text.count("<details>") == text.count("</details>") == 6
    assert "<b>" not in text
    first = text.index("<strong>t = 0, Linf 8/255</strong> mean entropy")
    assert first < text.index("<strong>t = 1, Linf 8/255</strong>")
    parts = text.split("<details>")
    fold = next(part for part in parts if part.startswith("<summary><strong>t = 0.7"))
    fold = fold[: fold.index("</details>")]
    assert fold.count("<tr>") == 1 + len(LAYERS)
    assert '<th scope="col">a&lt;b&gt;</th>' in fold
    path = tmp_path / "coefficients" / "dial-0.7.csv"
    with path.open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    columns = ("a<b>", "b", "c", "entropy", "moved", "slope")
    cells = "".join(f"<td>{float(last[column]):.3g}</td>" for column in columns)
    assert f'<th scope="row">{LAYERS[-1]}</th>{cells}' in fold
    assert "Left out" not in text


def test_a_missing_coefficients_file_leaves_out_its_section_alone(tmp_path, results):
    add_dial_and_greedy(tmp_path, results)
    results["figures"] = ["coefficients"]
    (tmp_path / "coefficients" / "dial-1.safetensors").unlink()
    text = write_and_read_report(tmp_path, results)
    assert [path.stem for path in (tmp_path / "figures").glob("*.svg")] == ["coefficients"]
    assert text.count("Left out: coefficients:") == 1
    assert text.count("Left out: coefficients/dial-1.csv:") == 1
    assert (tmp_path / "coefficients" / "dial-0.csv").exists()


def test_a_table_is_never_written_outside_the_run_folder(tmp_path, results):
    make_coefficients(LAYERS, 3).save(tmp_path / "elsewhere.safetensors")
    (tmp_path / "run").mkdir()
    file = "../elsewhere.safetensors"
    results["rows"] = [make_row("a", "learned", 0.7, 0.3, coefficients_file=file)]
    results["figures"] = []
    write_and_read_report(tmp_path / "run", results)
    assert not (tmp_path / "elsewhere.csv").exists()
    assert (tmp_path / "run" / "coefficients" / "elsewhere.csv").exists()


def test_dial_and_greedy_soups_are_in_the_table(tmp_path, results):
    add_dial_and_greedy(tmp_path, results)
    results["figures"] = []
    text = write_and_read_report(tmp_path, results)
    assert ">dial-0.7</th><td>dial</td><td>by layer, t = 0.7</td>" in text
    assert ">greedy</th><td>greedy</td><td>0.5 / 0.5 / 0</td>" in text
    assert ">learned-clean</th><td>learned</td><td>by layer</td>" in text

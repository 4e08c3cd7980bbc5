"""The report as one HTML page, from synthetic results."""

import csv
import hashlib
import importlib.resources
import json
import math
import os
import re
import shutil
from pathlib import Path

import matplotlib
import pytest
from markupsafe import escape
from PIL import Image
from synthetic_results import (
    LAYERS,
    NAMES,
    add_dial_and_greedy,
    make_accuracies,
    make_coefficients,
    make_results,
    make_row,
    write_and_read_report,
    write_evaluations,
    write_examples,
)

from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.reports import chart_data, style, write_report
from robustsoup.reports.best import BestRule
from robustsoup.reports.chart_data import describe_row
from robustsoup.reports.commands import list_commands
from robustsoup.reports.file_names import hide_folders
from robustsoup.reports.markup import quote_code
from robustsoup.reports.style import clean_text
from robustsoup.runs.result_checks import ROLES
from robustsoup.runs.results import Results

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
    assert "In the folder figures, each as .png, .svg and .pdf: ternary, tradeoff" in text
    assert len(text) < 1_000_000
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
    assert "{% for line in networks %}" in (templates / "report.html").read_text(encoding="utf-8")
    css = (templates / "report.css").read_text(encoding="utf-8")
    assert css.count("{") == css.count("}") > 20
    assert "{%" not in css


@pytest.mark.usefixtures("blank_figures")
def test_the_findings_of_the_masking_check_are_listed(tmp_path, results):
    text = write_and_read_report(tmp_path, results)
    assert "Does a gradient mislead the attack?" not in text
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
    assert text.count("<script") == 4
    assert "<script>alert" not in text
    assert text.count(str(escape(name))) >= 4
    assert clean_text("a$b鍋") == "a\\$b?"
    assert len(clean_text("x" * 99, 12)) == 12


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("status", ["unknown", "violated"])
def test_leakage_that_is_not_ruled_out_is_a_banner(tmp_path, results, status):
    results["figures"] = []
    results["leakage"] = {"status": status, "why": "eps4: no record"}
    text = write_and_read_report(tmp_path, results)
    assert f'class="banner {status}"' in text
    assert "eps4: no record" in text


@pytest.mark.usefixtures("blank_figures")
def test_fresh_data_has_no_banner(tmp_path, results):
    results["figures"] = []
    text = write_and_read_report(tmp_path, results)
    assert 'class="banner' not in text
    assert "No ingredient was trained on the samples that select and report." in text


@pytest.mark.usefixtures("blank_figures")
def test_the_head_of_the_report_states_what_biases_its_accuracies(tmp_path, results):
    results["figures"] = []
    assert "biases" not in write_and_read_report(tmp_path, results)
    results["leakage"] = {"status": "violated", "why": "eps4 was trained on them"}
    head = write_and_read_report(tmp_path, results).split("<h2")[0]
    leaked = "Selected on samples that ingredients were trained on"
    assert f"{leaked}: {BIAS}</strong> eps4 was trained on them" in head
    results["leakage"] = {"status": "known", "why": ""}
    results["protocol"]["select_on"] = "test"
    head = write_and_read_report(tmp_path, results).split("<h2")[0]
    assert f"The paper&#39;s protocol: selected on test: {BIAS}" in head


def test_a_grid_of_two_ingredients_has_no_ternary_figure(tmp_path):
    results = make_results(tmp_path, NAMES[:2]) | {"figures": ["ternary", "tradeoff"]}
    text = write_and_read_report(tmp_path, results)
    assert "Left out: ternary: a ternary plot requires a measured grid" in text
    assert not (tmp_path / "figures" / "ternary.svg").exists()
    assert (tmp_path / "figures" / "tradeoff.svg").exists()


@pytest.mark.usefixtures("blank_figures")
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
    assert '"shown": "val"' in text
    assert "On val: chosen: learned-Linf-8/255" in text


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


@pytest.mark.usefixtures("blank_figures")
def test_an_ingredient_is_not_compared_with_itself(tmp_path, results):
    results["figures"] = []
    results["selection"] |= {"chosen": "grid-1-0-0", "comparisons": 3}
    results["selection"]["against"] = [{"ingredient": "eps8", "meets": True, "differences": {}}]
    write_evaluations(tmp_path, results)
    page = write_and_read_report(tmp_path, results)
    table = page.partition("grid-1-0-0 less its ingredients")[2].partition("</table>")[0]
    assert ">eps8<" in table
    assert ">eps4<" not in table
    assert "at once (95 %):<" in page
    assert '"what": "eps4 itself"' in page
    corner = next(row for row in results["rows"] if row["name"] == "grid-1-0-0")
    corner["ingredient"] = None  # such as a soup with statistics of its own
    page = write_and_read_report(tmp_path, results)
    table = page.partition("grid-1-0-0 less its ingredients")[2].partition("</table>")[0]
    assert ">eps4<" in table
    assert '"what": "eps4 with the soup' in page


@pytest.mark.usefixtures("blank_figures")
def test_each_network_counts_once_and_only_where_it_was_measured(tmp_path, results):
    results["figures"] = []
    rows = results["rows"]
    corners = [row["name"] for row in rows if row.get("ingredient")]
    assert len(corners) == 3
    page = write_and_read_report(tmp_path, results)
    assert f"{len(rows) - 3} networks were compared on 2000 test samples." in page
    rows[1]["val"] = rows[1]["test"] = None
    page = write_and_read_report(tmp_path, results)
    assert f"{len(rows) - 4} networks were compared on 2000 test samples." in page


@pytest.mark.usefixtures("blank_figures")
def test_the_answer_stands_at_the_top_in_words(tmp_path, results):
    results["figures"] = []
    top = write_and_read_report(tmp_path, results).split("<noscript")[0]
    assert "On val: chosen: learned-Linf-8/255" in top
    assert "clean&gt;=0.7 held on test: 75.0%, at least" in top
    assert "The best soup has the highest estimate of what is maximised on val among" in top
    assert "simultaneous over all 25 soups" in top
    results["selection"] |= {"met": False, "point": True}
    top = write_and_read_report(tmp_path, results).split("<noscript")[0]
    assert "no candidate meets clean&gt;=0.7 by its estimate; the closest is" in top
    assert "estimate on val, which guarantees nothing," in top
    assert "(closest)" in write_and_read_report(tmp_path, results)
    results["selection"] = None
    assert "No soup was selected." in write_and_read_report(tmp_path, results)


@pytest.mark.usefixtures("blank_figures")
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


@pytest.mark.usefixtures("blank_figures")
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


@pytest.mark.usefixtures("blank_figures")
def test_by_default_all_figures_that_apply_are_drawn(tmp_path, results):
    del results["figures"]
    text = write_and_read_report(tmp_path, results)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {"ternary", "tradeoff", "curves", "coefficients"}
    assert "Left out: lines: no line of soups of two networks was measured." in text
    assert "Left out: landscape: no plane through three checkpoints was measured." in text


@pytest.mark.usefixtures("blank_figures")
def test_a_run_that_selects_where_it_reports_shows_each_number_once(tmp_path, all_results):
    all_results["figures"] = []
    all_results["protocol"] |= {"select_on": "test", "screened": True}
    for row in all_results["rows"]:
        row["val"] = None
    all_results["rows"][5]["screened"] = True
    text = write_and_read_report(tmp_path, all_results)
    assert text.count('<th scope="col">clean, test</th>') == 1
    assert "clean, val" not in text
    assert '"splits": ["test"]' in text
    assert "test robust accuracies are upper bounds" in text


@pytest.mark.usefixtures("blank_figures")
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
    assert text.count("<details>") == text.count("</details>") == 7
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


@pytest.mark.usefixtures("blank_figures")
def test_a_missing_coefficients_file_leaves_out_its_section_alone(tmp_path, results):
    add_dial_and_greedy(tmp_path, results)
    results["figures"] = ["coefficients"]
    (tmp_path / "coefficients" / "dial-1.safetensors").unlink()
    text = write_and_read_report(tmp_path, results)
    assert [path.stem for path in (tmp_path / "figures").glob("*.svg")] == ["coefficients"]
    assert text.count("Left out: coefficients:") == 1
    assert text.count("Left out: coefficients/dial-1.csv:") == 1
    assert (tmp_path / "coefficients" / "dial-0.csv").exists()


@pytest.mark.usefixtures("blank_figures")
def test_the_coefficients_of_the_chosen_soup_are_drawn_first(tmp_path, results, monkeypatch):
    add_dial_and_greedy(tmp_path, results)
    results["figures"] = []
    results["selection"]["chosen"] = "dial-0.7"
    monkeypatch.setattr(chart_data, "MOST_SHARES", 3 * len(LAYERS))
    text = write_and_read_report(tmp_path, results)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    rows = data["rows"]
    assert [rows[item["row"]]["name"] for item in data["layers"]] == ["dial-0.7"]
    tables = {row["name"]: row["table"] for row in rows if row["table"]}
    assert tables["dial-0"] == "coefficients/dial-0.csv"
    assert all((tmp_path / table).exists() for table in tables.values())


@pytest.mark.usefixtures("blank_figures")
def test_a_table_is_never_written_outside_the_run_folder(tmp_path, results):
    make_coefficients(LAYERS, 3).save(tmp_path / "elsewhere.safetensors")
    (tmp_path / "run").mkdir()
    file = "../elsewhere.safetensors"
    results["rows"] = [make_row("a", "learned", 0.7, 0.3, coefficients_file=file)]
    results["figures"] = []
    write_and_read_report(tmp_path / "run", results)
    assert not (tmp_path / "elsewhere.csv").exists()
    assert (tmp_path / "run" / "coefficients" / "elsewhere.csv").exists()


@pytest.mark.usefixtures("blank_figures")
def test_dial_and_greedy_soups_are_in_the_table(tmp_path, results):
    add_dial_and_greedy(tmp_path, results)
    results["figures"] = []
    text = write_and_read_report(tmp_path, results)
    assert ">dial-0.7</th><td>dial</td><td>by layer, t = 0.7</td>" in text
    assert ">greedy</th><td>greedy</td><td>0.5 / 0.5 / 0</td>" in text
    assert ">learned-clean</th><td>learned</td><td>by layer</td>" in text


@pytest.mark.usefixtures("blank_figures")
def test_a_report_of_a_run_that_is_half_done_says_so_in_one_line(tmp_path, results):
    results["figures"] = []
    assert 'class="banner' not in write_and_read_report(tmp_path, results)
    log = tmp_path / "log.txt"
    log.write_text("2026-11-22T18:59:00Z 1/1 mix a: (1 s)\n", encoding="utf-8")
    assert "has not finished" not in write_and_read_report(tmp_path, results)
    with log.open("a", encoding="utf-8") as file:
        file.write("2026-11-23T10:00:00Z eps-soups: 9 steps to do\n")
    text = write_and_read_report(tmp_path, results)
    assert text.count("A later run in this folder has not finished") == 1
    log.unlink()
    results["rows"][7]["val"] = results["rows"][7]["test"] = None
    text = write_and_read_report(tmp_path, results)
    assert "This run is not complete: 1 of 29 networks were not evaluated." in text


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices are files on POSIX systems")
@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_a_log_that_is_no_regular_file_counts_as_none(tmp_path, kind):
    log = tmp_path / "log.txt"
    os.mkfifo(log) if kind == "FIFO" else log.symlink_to("/dev/zero")
    with pytest.raises(RequestError, match=r"results\.json"):
        write_report(tmp_path)


def test_a_folder_without_results_is_refused_with_the_last_line_of_its_log(tmp_path):
    (tmp_path / "log.txt").write_text("2026-11-22T18:59:00Z 3/9 finetune eps4: done\n")
    with pytest.raises(RequestError, match=r'not finished \(its log ends with "3/9 finetune eps4'):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("blank_figures")
def test_no_folder_of_the_machine_is_named(tmp_path, results):
    results["figures"] = []
    results["recipe"] = {"data": "folder:/home/ann/Secret data/x", "file": "/home/ann/a.pth"}
    results["data"]["name"] = "folder:/home/ann/Secret data/x"
    results["rows"][0]["warnings"] = ["/home/ann/runs/b.pth: odd", "C:\\Users\\ann\\c.pth: odd"]
    results["leakage"] = {"status": "unknown", "why": "/home/ann/d.pth has no record"}
    text = write_and_read_report(tmp_path, results)
    assert "/home" not in text
    assert "Users" not in text
    assert "Secret" not in text
    for name in ("a.pth", "b.pth: odd", "c.pth: odd", "d.pth has no record"):
        assert name in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "text",
    [
        "Linf 8/255 and/or L2 0.5",
        "https://x.invalid/a b/c.pth",
        "hf://org/name/file",
        "hf:org/name",
        "runs/a b/low.pth",
        "clean / robust / both",
        "</b> a/b",
    ],
)
def test_texts_without_folders_are_left_alone(text):
    assert hide_folders(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("folder:/data/images", "folder:images"),
        ("folder:/home/ann/Secret Client/images", "folder:images"),
        ("npz:/home/ann/Ann's Secret, Client/a b.npz", "npz:a b.npz"),
        ("/home/ann/Secret Client/low.pth: was trained", "low.pth: was trained"),
        ("/home/ann/J.Secret Client/low.pth is not / was", "low.pth is not / was"),
        ("/home/ann/low.pth and /home/ann/Secret Client/b.pth", "low.pth and b.pth"),
        ("'/home/ann/Secret Client/b' is a / b", "'b' is a / b"),
        ("low.pth at /home/ann/low.pth, not runs/low.pth", "low.pth at low.pth, not runs/low.pth"),
        ("folder:/data/Secret Client/birds, Linf 8/255", "folder:birds, Linf 8/255"),
        (r"C:\users\Secret Client\low.pth is", "low.pth is"),
        (r"\\Secret\Client\low.pth is", "low.pth is"),
    ],
)
def test_absolute_paths_are_file_names(text, shown):
    assert hide_folders(text) == shown
    assert quote_code(text) == f"`{shown}`"


@pytest.mark.usefixtures("blank_figures")
def test_pictures_show_the_original_the_attacked_image_and_the_difference(tmp_path, results):
    results["figures"] = []
    write_examples(tmp_path, results)
    text = write_and_read_report(tmp_path, results)
    assert text.count("<img ") == 12
    for caption in ("0, Linf 8/255: classified as 3", "1, Linf 8/255: robust"):
        assert f"<figcaption>{caption}</figcaption>" in text
    assert "2, Linf 8/255: wrong without an attack: 7" in text
    (tmp_path / "examples.npz").write_bytes(b"broken")
    assert "Left out: adversarial images:" in write_and_read_report(tmp_path, results)


def test_equal_grids_of_any_size_stay_below_five_megabytes(tmp_path, results):
    results["figures"] = []
    row = results["rows"][10]
    results["rows"] += [row | {"name": f"grid-{number}"} for number in range(2000)]
    assert len(write_and_read_report(tmp_path, results)) < 5_000_000


def test_the_vendored_scripts_are_the_published_files():
    folder = importlib.resources.files("robustsoup.reports") / "vendor"
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("d3.min.js", "plot.min.js")
    }
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    assert all(f"`{digest}`" in page for digest in digests.values())
    licences = (folder / "LICENSES.txt").read_text(encoding="utf-8")
    for name in ("d3.min.js", "plot.min.js"):
        head = (folder / name).read_text(encoding="utf-8")[:80]
        version = re.search(r"v(\d+\.\d+\.\d+)", head)[1]
        assert re.search(rf"{name}: .* {re.escape(version)}", licences)


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        ({}, "--steps 50"),
        ({"attack": "pgd", "loss": "dlr", "restarts": 2}, "--attack pgd --loss dlr --steps 50"),
        ({"attack": "square", "loss": "margin", "steps": 900}, "--attack square --n-queries 900"),
        ({"attack": "autoattack", "loss": "", "steps": 0}, "--attack autoattack"),
        (
            {"attack": "strong", "loss": "", "steps": 20},
            "--attack strong --steps 20 --n-queries 700 --targets 3 --eot 3",
        ),
        ({"search_precision": "bfloat16"}, "--steps 50 --precision bfloat16"),
        ({"report_on": "val", "samples": {"val": 500}}, "--split val --samples 500 --steps 50"),
        ({"samples": {"val": 500, "test": 300}}, "8/255' --samples 300 --steps 50"),
    ],
)
def test_the_command_that_judges_the_soup_runs_the_attack_of_the_run(tmp_path, attack, options):
    content = make_results(tmp_path)
    content["protocol"] |= attack
    if attack.get("attack") == "strong":
        content["recipe"]["evaluate"] = {"n_queries": 700, "targets": 3, "eot": 3}
    content["soup"] = "soup.safetensors"
    results = Results.from_json(content, "results.json")
    (command,) = [text for name, text in list_commands(results) if name == "Judge"]
    assert options in command
    assert command.endswith("--restarts 2" if attack.get("restarts") else options)


def test_the_commands_name_a_network_that_the_soup_does_not(tmp_path):
    content = make_results(tmp_path)
    content["recipe"] |= {"seed": 3, "image_size": 40}

    def commands(soup, spec):
        content["soup"] = soup
        record = {"spec": spec, "classes": 7, "normalize": [[0.5, 0.4, 0.3], [0.25, 0.2, 0.1]]}
        found = dict(list_commands(Results.from_json(content, "results.json"), record))
        return found["Load"].rpartition(".network")[2], found["Judge"]

    load, judge = commands("soup.safetensors", "resnet9")
    assert load == "()"
    assert "--seed 3 --image-size 40 --threat" in judge
    load, judge = commands("soup.safetensors", "my_code:make")
    assert load == '("my_code:make")'
    assert "--image-size 40 --model my_code:make --threat" in judge
    load, judge = commands("soup.pth", "resnet9")
    constants = "normalize=((0.5, 0.4, 0.3), (0.25, 0.2, 0.1))"
    assert load == f'("resnet9", classes=7, channels=3, {constants})'
    assert "--model resnet9 --normalize 0.5,0.4,0.3 0.25,0.2,0.1 --threat" in judge


@pytest.mark.usefixtures("blank_figures")
def test_a_split_without_a_number_of_samples_is_not_listed(tmp_path, results):
    results["protocol"]["samples"] = {"val": None, "test": 2000}
    text = write_and_read_report(tmp_path, results)
    assert "2000 test" in text
    assert "None" not in text.partition("2000 test")[0][-30:]


def test_bounds_of_estimates_are_below_them(tmp_path):
    """The hits of an estimate count what was not attacked as surviving."""
    content = make_results(tmp_path)
    row = next(row for row in content["rows"] if row.get("soup"))
    threat = content["protocol"]["threats"][0]
    estimate = Accuracy(900, 2000, 300, 120)
    row["val"][threat] = estimate.to_json()
    row |= {"screened": True, "attacked": 600}
    results = Results.from_json(content, "results.json")
    (changed,) = [item for item in results.rows if item.name == row["name"]]
    bound = BestRule.of(results).bounds(changed)[threat]
    assert bound < estimate.value == 0.27


def test_the_page_draws_every_role():
    folder = Path(style.__file__).parent / "templates"
    script, sheet = (folder / f"report.{kind}" for kind in ("js", "css"))
    roles = script.read_text("utf-8").partition("const ROLES = {")[2].partition("}")[0]
    for role in ROLES:
        assert re.search(rf"\b{role}: ", roles), role
        assert f"--c-{role}: " in sheet.read_text("utf-8"), role


def test_a_merged_soup_is_described_by_its_method(results):
    results["recipe"]["soups"] = {"ties": {"method": "ties"}}
    shares = {"soup": "ties", "ingredients": NAMES[:2], "coefficients": [0.4, 0.6]}
    results["rows"].append(make_row("ties-0.4-0.6", "merge", 0.7, 0.3, **shares))
    parsed = Results.from_json(results, "results")
    assert describe_row(parsed.rows[-1], parsed) == "ties of 0.4 of eps4 and 0.6 of eps8"


@pytest.mark.parametrize(
    ("name", "role", "fields", "words"),
    [
        (
            "pretrained",
            "pretrained",
            {},
            "the start of the ingredients, trained against Linf 8/255",
        ),
        (
            "a",
            "ingredient",
            {"objective": "ce"},
            "an ingredient, trained against Linf 8/255 and L2 0.5",
        ),
        (
            "b",
            "ingredient",
            {"objective": "trades 6"},
            "an ingredient, trained against Linf 8/255 with trades 6",
        ),
        ("end1", "ingredient", {}, "an ingredient, trained against Linf 8/255 and L1 12.0"),
        (
            "learned",
            "learned",
            {"soup": "union", "ingredients": NAMES[:2], "objective": "mixed 0.2"},
            "a learned soup of eps4 and eps8, learned against Linf 8/255 and L2 1.0 with mixed 0.2",
        ),
    ],
)
def test_every_threat_of_a_union_and_the_objective_are_named(results, name, role, fields, words):
    results["recipe"] |= {
        "pretrain": {"also": []},
        "finetune": {"also": ["L2 0.5"]},
        "subspace": {"also": ["L1 12.0"]},
        "ingredients": {"a": {}, "b": {"also": []}, "end1": {"subspace_end": 1}},
        "soups": {"union": {"method": "learned", "also": ["L2 1.0"]}},
    }
    results["rows"] = [make_row(name, role, 0.7, 0.3, threat="Linf 8/255", **fields)]
    parsed = Results.from_json(results, "results")
    assert describe_row(parsed.rows[0], parsed) == words

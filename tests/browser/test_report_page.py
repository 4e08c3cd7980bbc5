"""report.html in a real Chromium: what is clicked, moved and pressed does what the page says."""

import json
from types import SimpleNamespace

import pytest
import torch
from synthetic_results import THREAT, make_results, write_and_read_report

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.soups.goal import Goal
from robustsoup.soups.selection import Candidate, rank_by, target_score

pytestmark = pytest.mark.browser
expect = pytest.importorskip("playwright.sync_api").expect


def read_data(page):
    return json.loads(page.locator("#data").text_content())


def move_slider(page, percent):
    """Move the slider as a user's script would: the value, then the event of the browser."""
    page.locator("#threshold").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }",
        str(percent),
    )


def centre_of(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_the_page_starts_with_the_choice_of_the_run(open_page, report):
    page = open_page(report)
    chosen = read_data(page)["rule"]["chosen"]
    expect(page.locator("#choice")).to_have_attribute("data-name", chosen)
    assert page.locator("#selected").get_attribute("data-name") == chosen
    assert chosen in page.locator("#answer-title ~ p").first.text_content()
    expect(page.locator("#threshold-text")).to_have_text("70.0 %")
    assert page.locator("#networks tr.choice th button").text_content().startswith(chosen)
    for view in ("front", "ternary", "coefficients", "differences", "lines", "planes"):
        assert page.locator(f"#{view} svg[role=img]").count() >= 1, view
        labels = page.locator(f"#{view} svg[role=img]").evaluate_all(
            "all => all.map((svg) => svg.getAttribute('aria-label'))"
        )
        assert all(len(label) > 20 for label in labels)
    assert page.locator(".examples img").count() == 12


def test_the_colours_of_a_plane_have_no_hole_at_its_minimum(open_page, report):
    page = open_page(report)
    lowest = page.locator("#planes svg .levels path:first-child")
    assert lowest.count() == 3
    for path in lowest.evaluate_all("all => all.map((path) => path.getAttribute('d'))"):
        assert path.count("M") == 1  # one ring around all


def test_a_network_counts_once_in_the_caption(open_page, report):
    page = open_page(report)
    rows = read_data(page)["rows"]
    copies = [row for row in rows if row["equals"]]
    assert len(copies) == 3
    count = f"{len(rows) - len(copies)} networks"
    assert f"{count} on test." in page.locator("#front-caption").text_content()
    assert page.get_by_text(f"{count} were compared on 2000 test samples.").count() == 1


def test_a_click_on_a_name_highlights_the_network_in_every_view(open_page, report):
    page = open_page(report)
    before = page.locator("#front .ring-selected circle").get_attribute("cx")
    page.get_by_role("button", name="grid-0.2-0.4-0.4").click()
    expect(page.locator("#selected h3")).to_have_text("grid-0.2-0.4-0.4")
    assert "0.2 of eps4, 0.4 of eps8 and 0.4 of eps16" in page.locator("#selected").text_content()
    assert page.locator("#front .ring-selected circle").get_attribute("cx") != before
    assert page.locator("#ternary .ring-selected circle").count() == 2
    assert page.locator("#networks tr[aria-current=true]").count() == 1
    assert "grid-0.2-0.4-0.4" in page.locator("#coefficients-caption").text_content()
    assert page.locator("#choice").get_attribute("data-name") != "grid-0.2-0.4-0.4"


@pytest.mark.parametrize(("view", "rings"), [("front", 1), ("ternary", 2)])
def test_a_click_on_a_point_selects_it_and_hovering_shows_its_numbers(
    open_page, report, view, rings
):
    page = open_page(report)
    page.get_by_role("button", name="grid-0.8-0.2-0").click()
    ring = page.locator(f"#{view} .ring-selected circle").first
    ring.scroll_into_view_if_needed()
    x, y = centre_of(ring)
    page.get_by_role("button", name="grid-0-0-1").evaluate("button => button.click()")
    expect(page.locator("#selected h3")).to_have_text("grid-0-0-1")
    page.mouse.move(x + 40, y + 40)
    page.mouse.move(x, y)
    tip = page.locator(f"#{view} text", has_text="grid-0.8-0.2-0")
    for part in (
        "0.8 of eps4 and 0.2 of eps8",
        "clean 77.8 % [",
        "Linf 8/255 25.7 %",
        "2000 samples",
    ):
        expect(tip).to_contain_text(part)
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#selected h3")).to_have_text("grid-0.8-0.2-0")
    assert page.locator(f"#{view} .ring-selected circle").count() == rings


def apply_rule(data, threshold):
    """Apply the rule that the page states; returns the name, and whether the threshold is met."""
    soups = [row for row in data["rows"] if row["candidate"] and not row["screened"]]
    lowest = min(max(threshold - row["bounds"]["clean"], 0) for row in soups)
    eligible = [row for row in soups if max(threshold - row["bounds"]["clean"], 0) == lowest]

    def rank(row):
        scores = row["scores"]["val"]
        return scores[data["rule"]["maximise"]][0], scores["clean"][0]

    return max(eligible, key=rank)["name"], lowest == 0


def test_the_slider_moves_the_choice_by_the_stated_rule(open_page, report):
    page = open_page(report)
    data = read_data(page)
    names = set()
    for percent in (0, 55, 71, 75, 79, 85, 100):
        move_slider(page, percent)
        name, met = apply_rule(data, percent / 100)
        expect(page.locator("#choice")).to_have_attribute("data-name", name)
        assert ("no soup meets" in page.locator("#choice").text_content()) is not met
        expect(page.locator("#selected h3")).to_have_text(name)
        names.add(name)
    assert len(names) >= 4
    page.locator("#reset").click()
    expect(page.locator("#choice")).to_have_attribute("data-name", data["rule"]["chosen"])


def find_knee(data, threshold):
    """Return the soup at the knee of those that reach the threshold, as a search chooses it."""
    soups = [row for row in data["rows"] if row["candidate"] and not row["screened"]]
    samples = {"ids": torch.arange(1), "labels": torch.zeros(1), "record": {}}
    tried = []
    for row in soups:
        if row["bounds"]["clean"] >= threshold:
            scores = row["scores"]["val"]
            accuracy = {key: Accuracy(*scores[key][-2:]) for key in ("clean", THREAT)}
            evaluation = SimpleNamespace(accuracy=accuracy, **samples)
            tried.append(Candidate(row["name"], (), evaluation))
    return rank_by(target_score(Goal("knee"), tried), tried)[0].name


def test_the_slider_weighs_the_knee_by_the_soups_that_compete(open_page, tmp_path):
    results = make_results(tmp_path) | {"figures": []}
    results["selection"] |= {"maximise": "knee", "require": [], "test": None}
    write_and_read_report(tmp_path, results)
    page = open_page(tmp_path / "report.html")
    data = read_data(page)
    names = set()
    for percent in (55, 65, 71, 75):
        move_slider(page, percent)
        name = find_knee(data, percent / 100)
        expect(page.locator("#choice")).to_have_attribute("data-name", name)
        names.add(name)
    assert len(names) >= 2


def test_the_slider_works_by_the_keyboard(open_page, report):
    page = open_page(report)
    page.locator("#threshold").focus()
    page.keyboard.press("End")
    expect(page.locator("#threshold-text")).to_have_text("100.0 %")
    assert "no soup meets that" in page.locator("#choice").text_content()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#threshold-text")).to_have_text("99.9 %")


def test_the_arrow_keys_move_the_selection_along_the_front(open_page, report):
    page = open_page(report)
    page.locator("#front").focus()
    page.keyboard.press("Home")
    first = page.locator("#selected h3").text_content()
    page.keyboard.press("ArrowRight")
    second = page.locator("#selected h3").text_content()
    assert second != first
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#selected h3")).to_have_text(first)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#selected h3")).to_have_text(first)
    clean = {row["name"]: row["scores"]["test"]["clean"][0] for row in read_data(page)["rows"]}
    assert clean[first] == min(clean.values())


def test_a_click_on_a_heading_sorts_the_table_both_ways(open_page, report):
    page = open_page(report)

    def read_column():
        return page.locator("#networks tbody tr").evaluate_all(
            "lines => lines.map((line) => Number(line.cells[5].dataset.value))"
        )

    heading = page.locator("#networks thead th").nth(5)
    assert heading.get_attribute("aria-sort") is None
    before = read_column()
    for order in ("descending", "ascending"):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == order
        assert read_column() == sorted(before, reverse=order == "descending") != before
    page.locator("#networks thead th").first.get_by_role("button").click()
    assert page.locator("#networks [aria-sort]").count() == 1
    assert "dial" in page.locator("#networks tbody th").first.text_content()


def test_the_dial_turns_through_its_soups(open_page, report):
    page = open_page(report)
    dial = page.locator("#dials input")
    dial.focus()
    for key, name, value in (("End", "dial-1", "1"), ("ArrowLeft", "dial-0.7", "0.7")):
        page.keyboard.press(key)
        expect(page.locator("#selected h3")).to_have_text(name)
        expect(page.locator("#dials output")).to_have_text(value)
        assert (
            f"{name}: the dial of"
            in page.locator("#coefficients").locator("xpath=../figcaption").text_content()
        )
    page.get_by_role("button", name="dial-0", exact=True).click()
    assert dial.input_value() == "0"


def test_the_split_and_the_soup_can_be_changed(open_page, report):
    page = open_page(report)
    assert "on test" in page.locator("#front-caption").text_content()
    page.locator("#split").select_option("val")
    assert "on val" in page.locator("#front-caption").text_content()
    assert "samples of val" in page.locator("#differences-caption").text_content()
    page.locator("#soup").select_option(label="learned-clean")
    expect(page.locator("#selected h3")).to_have_text("learned-clean")
    assert "6 layers" in page.locator("#coefficients-caption").text_content()


def test_the_theme_follows_the_system_until_it_is_chosen(open_page, report):
    read = "() => getComputedStyle(document.body).backgroundColor"
    light, dark = open_page(report), open_page(report, scheme="dark")
    paper, night = light.evaluate(read), dark.evaluate(read)
    assert paper != night
    dark.locator("#theme").select_option("light")
    light.locator("#theme").select_option("dark")
    assert (dark.evaluate(read), light.evaluate(read)) == (paper, night)
    light.locator("#theme").select_option("")
    assert light.evaluate(read) == paper


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_does_not_scroll_sideways(open_page, report, width):
    page = open_page(report, width=width)
    for part in page.locator("details").all():
        part.evaluate("part => { part.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 700, "height": 800})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 700


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_no_serious_fault(open_page, report, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(report, width=width, scheme=scheme)
    found = Axe().run(page).response
    assert len(found["passes"]) > 20
    serious = [
        (item["id"], [node["html"][:200] for node in item["nodes"][:3]])
        for item in found["violations"]
        if item["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_axe_would_find_a_fault(open_page, report):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(report)
    page.locator("#front").evaluate("node => node.append(document.createElement('img'))")
    assert "image-alt" in {item["id"] for item in Axe().run(page).response["violations"]}


def test_the_page_prints(open_page, report):
    page = open_page(report, scheme="dark")
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator(".controls").first.is_visible()
    assert page.locator("#front svg[role=img]").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_every_number_is_in_a_table(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".notice").is_visible()
    assert not page.locator("#front").is_visible()
    assert page.locator("#networks tbody tr").count() > 40
    assert page.locator("#networks tbody td.number").first.is_visible()
    context.close()


def test_a_run_without_soups_or_attacks_is_shown(open_page, tmp_path):
    results = make_results(tmp_path) | {"figures": [], "selection": None}
    results["rows"] = results["rows"][:3]
    results["protocol"]["threats"] = ["clean"]
    for row in results["rows"]:
        for split in ("val", "test"):
            row[split] = {"clean": row[split]["clean"]}
    write_and_read_report(tmp_path, results)
    page = open_page(tmp_path / "report.html")
    assert "No soup was measured" in page.locator("#choice").text_content()
    page.get_by_role("button", name="eps8").click()
    expect(page.locator("#selected h3")).to_have_text("eps8")
    assert not page.locator("#ternary-section").is_visible()
    assert not page.locator("#coefficients-section").is_visible()

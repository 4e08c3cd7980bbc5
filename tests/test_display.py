"""How objects look in a notebook: a repr of one line, and tables whose text is escaped."""

import re
from html.parser import HTMLParser

import pytest
import torch
from ingredients import perturbed
from soup_candidates import candidate

import robustsoup as rs
from robustsoup.diagnosis.landscape import Landscape
from robustsoup.display import MAX_ROWS, html_table, svg_points
from robustsoup.evaluation.verdicts import Verdicts
from robustsoup.soups.explanation import Explained, explain
from robustsoup.soups.search import SearchResult

NASTY = "<script>alert('x')</script>\n\u202e&amp;"


class Tags(HTMLParser):
    """Collects the names of the tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.names, self.open, self.text = set(), [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert not attrs or tag in ("svg", "path", "circle", "text")
        self.names.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def shown():
    """One object of each public class that notebooks show, with odd names where users name it."""
    data = rs.load_data("digits")
    network = rs.load_model("resnet9:width=2", channels=1)
    items = [perturbed(network, seed, 0.01) for seed in (1, 2)]
    record = {"data": {"name": NASTY, "digest": "d"}, "split": "val", "samples": 200}
    first = candidate(NASTY, 180, 90, 80, **record)
    second = candidate("b", 170, 100, 60, screened=True, **record)
    answer = explain(
        rs.select([first, second], maximise="clean", require=["clean>=0.5"]),
        Explained(ingredients={NASTY: second.evaluation}),
    )
    layers = ("*",), tuple(f"layer {i}" for i in range(50))
    own = rs.Data.from_tensors(torch.rand(40, 1, 4, 4), torch.arange(40) % 2, name=NASTY)
    plane = ((0.5, None), (0.25, 1.0))
    settings = ("clean", 1, 8, "test", "average", 0, "float32")
    return {
        "checkpoint": items[0],
        "soup": rs.mix(items, [0.5, 0.5]),
        "named checkpoint": rs.Checkpoint(
            items[0].tensors, {"kind": "x", "data": {"name": NASTY}}, notes=(NASTY,)
        ),
        "evaluation": first.evaluation,
        "accuracies": first.evaluation.accuracy,
        "candidate": first,
        "screened": second,
        "selection": rs.select([first, second], maximise="clean"),
        "answer": answer,
        "search result": SearchResult((first, second), answer, evaluator=None),
        "comparison": rs.compare(first.evaluation, second.evaluation),
        "coefficients": rs.Coefficients.of([0.25, 0.75]),
        "by layer": rs.Coefficients(torch.full((50, 2), 0.5), layers[1], ("0" * 64, "1" * 64)),
        "dial": rs.Dial(torch.zeros(2, 1, 2), layers[0], ("0" * 64, "1" * 64)),
        "data": own,
        "split": own.test,
        "digits": data,
        "check": rs.check(items),
        "landscape": Landscape(
            ("a", "b", NASTY), (0.0, 1.0), (0.0, 1.0), ((0.0, 0.0),) * 3, *((plane,) * 4), *settings
        ),
        "threat": rs.ThreatModel("Linf", 8 / 255),
        "verdicts": first.evaluation.threats["Linf 8/255"],
    }


def test_every_repr_is_one_short_line(shown):
    for name, item in shown.items():
        text = repr(item)
        assert text.isprintable(), name
        assert len(text) < 300, name


def test_every_table_is_well_formed_and_escapes_what_users_named(shown):
    shows_tables = {name for name, item in shown.items() if hasattr(item, "_repr_html_")}
    assert set(shown) - shows_tables == {"landscape", "threat", "verdicts"}
    for name in shows_tables:
        tags = Tags(shown[name]._repr_html_())
        assert not tags.open, name
        expected = {"table", "caption", "thead", "tbody", "tr", "th", "td", "div"}
        pictures = {"svg", "path", "text", "circle", "title"} if name == "search result" else set()
        assert tags.names <= expected | pictures, name
        assert "\u202e" not in tags.text


@pytest.mark.parametrize(
    "name", ["candidate", "selection", "answer", "data", "split", "named checkpoint"]
)
def test_a_name_of_the_user_is_shown_as_it_is_but_for_what_is_not_printable(shown, name):
    text = Tags(shown[name]._repr_html_()).text
    assert r"<script>alert('x')</script>\n\u202e&amp;" in text


def test_tables_show_the_numbers(shown):
    clean = shown["evaluation"].accuracy["clean"]
    assert str(clean) == "90.0% [85.1, 93.4]"
    assert str(clean) in Tags(shown["evaluation"]._repr_html_()).text
    assert str(clean) in repr(shown["evaluation"])
    assert "upper bounds" in repr(shown["screened"])
    assert "0.750" in Tags(shown["coefficients"]._repr_html_()).text
    digits = Tags(shown["digits"]._repr_html_()).text
    assert str(len(rs.load_data("digits").test)) in digits
    assert "1 x 8 x 8" in digits


def test_a_long_table_says_how_many_rows_it_leaves_out(shown):
    assert f"and {50 - MAX_ROWS} more" in Tags(shown["by layer"]._repr_html_()).text
    assert "more" not in html_table("t", (), [("a", 1)] * MAX_ROWS)


def test_warnings_are_shown_with_the_numbers():
    warned = candidate("a", 100, 50, warnings=["the gradient is zero"]).evaluation
    assert "warning: the gradient is zero" in warned._repr_html_()


def test_verdicts_count_the_robust_samples():
    verdicts = Verdicts(torch.tensor([True, False]), *[torch.zeros(2)] * 4)
    assert repr(verdicts) == "Verdicts(1 of 2 samples robust)"


def test_a_search_shows_its_answer_a_picture_and_all_candidates():
    data = rs.load_data("digits")
    network = rs.load_model("resnet9:width=2", channels=1)
    items = [perturbed(network, seed, 0.01) for seed in (1, 2)]
    result = rs.search(items, data.val, ["Linf 8/255"], step=0.5, samples=20, steps=1)
    shown = Tags(result._repr_html_())
    assert {"table", "svg", "circle", "title"} <= shown.names
    assert not shown.open
    assert all(item.name in shown.text for item in result.candidates)
    clean_alone = rs.search(items, data.val, [], step=0.5, samples=20)
    assert "<svg" not in clean_alone._repr_html_()


@pytest.mark.parametrize("value", [0.0, 0.05, 0.5, 1.0])
def test_points_lie_within_their_picture_and_names_are_escaped(value):
    picture = svg_points([(NASTY, value, value), ("b", 0.5, 1.0)], chosen="b", x="clean", y="<y>")
    shown = Tags(picture)
    assert shown.names == {"svg", "path", "text", "circle", "title"}
    assert r"<script>alert('x')</script>\n\u202e&amp;" in shown.text
    places = [float(number) for number in re.findall(r'c[xy]="([\d.]+)"', picture)]
    assert len(places) == 4
    assert all(40 <= place <= 280 for place in places)

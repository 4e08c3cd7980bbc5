"""report.html loads nothing: no address in it is followed by a browser on its own."""

import base64
import hashlib
import importlib.resources
import re
from html.parser import HTMLParser

import pytest
from synthetic_results import NAMES, make_all_results, write_and_read_report

from robustsoup.reports.page import SCRIPTS

LOADING_TAGS = frozenset(
    [
        "applet",
        "audio",
        "base",
        "embed",
        "form",
        "frame",
        "iframe",
        "link",
        "object",
        "source",
        "track",
        "video",
    ]
)
ADDRESSES = frozenset(
    [
        "action",
        "archive",
        "background",
        "cite",
        "classid",
        "codebase",
        "data",
        "formaction",
        "href",
        "icon",
        "manifest",
        "ping",
        "poster",
        "profile",
        "src",
        "srcdoc",
        "srcset",
        "xlink:href",
    ]
)
HOSTILE = (
    '"><script src="http://example.invalid/a.js"></script>',
    "<img src=http://example.invalid/b.png onerror=alert(1)>",
    "</style><link rel=stylesheet href=//example.invalid/c.css>",
)


class PageReader(HTMLParser):
    """Collects what a browser would act on.

    Attributes:
        tags: Names of all elements.
        attributes: (element, attribute, value) of all attributes.
        styles: Content of style elements and attributes.
        scripts: Content of script elements.
    """

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.styles, self.scripts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "style":
                self.styles.append(value)

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "style":
            self.styles.append(data)
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)


def assert_loads_nothing(page):
    """Check a page, and the pictures inside it; return the number of pictures."""
    reader = PageReader(page)
    assert not LOADING_TAGS & set(reader.tags)
    assert reader.tags.count("style") == 1
    pictures = 0
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        if tag == "meta" and name == "http-equiv":
            assert value == "Content-Security-Policy"
        if name in ADDRESSES:
            assert (tag, name) == ("img", "src")
            assert value.startswith("data:image/png;base64,")
            picture = base64.b64decode(value.partition(",")[2], validate=True)
            assert picture.startswith(b"\x89PNG")
            pictures += 1
    for style in reader.styles:
        assert not re.search(r"url\s*\(|@import|image-set|\\", style, re.IGNORECASE)
    return pictures


def assert_scripts_are_known(page):
    """Check that a browser runs the three scripts of the package, and no other."""
    reader = PageReader(page)
    policy = next(
        value for tag, name, value in reader.attributes if (tag, name) == ("meta", "content")
    )
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert {(n, v) for t, n, v in reader.attributes if t == "script"} == {
        ("type", "application/json"),
        ("id", "data"),
    }
    package = importlib.resources.files("robustsoup.reports")
    texts = [(package / name).read_text(encoding="utf-8") for name in SCRIPTS]
    assert [text for text in reader.scripts if not text.startswith("{")] == texts
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    script_sources = policy.split("script-src ")[1].split(";")[0]
    assert script_sources == " ".join(f"'sha256-{digest}'" for digest in digests)


@pytest.fixture
def all_results(tmp_path, quick_figures):
    return make_all_results(tmp_path)


def test_a_report_with_every_figure_loads_nothing(tmp_path, all_results):
    page = write_and_read_report(tmp_path, all_results)
    assert assert_loads_nothing(page) == 12
    assert_scripts_are_known(page)


def test_names_from_files_load_nothing(tmp_path, all_results):
    hostile = dict(zip(NAMES, HOSTILE, strict=True))
    all_results["name"] = "".join(HOSTILE)
    for row in all_results["rows"]:
        row["name"] = hostile.get(row["name"], row["name"])
        if "ingredients" in row:
            row["ingredients"] = [hostile.get(name, name) for name in row["ingredients"]]
    page = write_and_read_report(tmp_path, all_results)
    assert page.count("example.invalid") > len(HOSTILE)
    assert_loads_nothing(page)
    assert_scripts_are_known(page)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_check_finds_what_is_not_escaped(text):
    page = f'<html><style>p {{}}</style><p title="">{text}</p></html>'
    with pytest.raises(AssertionError):
        assert_loads_nothing(page)

"""report.html loads nothing: no address in it is followed by a browser on its own."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from synthetic_results import make_all_results, write_and_read_report

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
        "script",
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
SVG_NAMES = frozenset(
    [
        "svg",
        "metadata",
        "RDF",
        "Work",
        "type",
        "date",
        "format",
        "creator",
        "Agent",
        "title",
        "defs",
        "style",
        "g",
        "path",
        "use",
        "text",
        "tspan",
        "rect",
        "circle",
        "clipPath",
        "image",
        "mask",
        "linearGradient",
        "stop",
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
    """

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.styles = [], [], []
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


def assert_loads_nothing(page):
    """Check a page, and the pictures inside it; return the number of pictures."""
    reader = PageReader(page)
    assert not LOADING_TAGS & set(reader.tags)
    assert reader.tags.count("style") == 1
    pictures = []
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        assert (tag, name) != ("meta", "http-equiv")
        if name in ADDRESSES:
            assert (tag, name) == ("img", "src")
            assert value.startswith("data:image/svg+xml;base64,")
            pictures.append(base64.b64decode(value.partition(",")[2], validate=True))
    for style in reader.styles:
        assert not re.search(r"url\s*\(|@import|image-set|\\", style, re.IGNORECASE)
    for picture in pictures:
        assert_picture_loads_nothing(picture)
    return len(pictures)


def assert_picture_loads_nothing(svg):
    for element in ElementTree.fromstring(svg).iter():
        assert element.tag.rpartition("}")[2] in SVG_NAMES, element.tag
        for name, value in element.attrib.items():
            local = name.rpartition("}")[2]
            assert not local.startswith("on"), name
            if local in ("href", "src"):
                assert value.startswith(("#", "data:image/png;base64,")), value
            for target in re.findall(r"url\(([^)]*)", value):
                assert target.startswith("#"), value
        if element.tag.endswith("}style"):
            assert not re.search(r"url\s*\(|@import", element.text or "")


@pytest.fixture
def all_results(tmp_path, quick_figures):
    return make_all_results(tmp_path)


def test_a_report_with_every_figure_loads_nothing(tmp_path, all_results):
    assert assert_loads_nothing(write_and_read_report(tmp_path, all_results)) >= 3


@pytest.mark.parametrize("text", HOSTILE)
def test_names_from_files_load_nothing(tmp_path, all_results, text):
    all_results["name"] = text
    for row in all_results["rows"]:
        if row["name"] == "eps4":
            row["name"] = text
        if "ingredients" in row:
            row["ingredients"] = [text if name == "eps4" else name for name in row["ingredients"]]
    page = write_and_read_report(tmp_path, all_results)
    assert "example.invalid" in page
    assert_loads_nothing(page)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_check_finds_what_is_not_escaped(text):
    page = f'<html><style>p {{}}</style><p title="">{text}</p></html>'
    with pytest.raises(AssertionError):
        assert_loads_nothing(page)

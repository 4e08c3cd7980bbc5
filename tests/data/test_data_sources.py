"""Data sources: built-in and user-defined sources, and invalid requests."""

from functools import partial
from pathlib import Path

import pytest
from plugins import write_plugin

from robustsoup.catalog import DATA_SOURCES
from robustsoup.data import DataRequest, load_data
from robustsoup.data.digits import load_digits
from robustsoup.errors import DataError


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        (
            "digitz",
            {},
            'cifar10, cifar100, folder, npz, hf, wds; did you mean "digits"?',
        ),
        ("zzz", {}, 'data: got "zzz", expected one of digits, cifar10, cifar100, folder'),
        ("", {}, 'data: got ""'),
        ("folder:", {}, 'data "folder:": got no path, expected folder:PATH'),
        (None, {}, 'data: got NoneType, expected a name such as "digits"'),
        (([1], [0]), {}, "data: got tuple, expected a name"),
        (Path(__file__).parent, {}, "expected how it is read; try folder:"),
        ("digits:7", {}, 'data "digits:7": got "7" after the name, expected "digits" alone'),
        ("digits", {"seed": -1}, "got seed -1, expected an integer of at least 0"),
        ("digits", {"seed": True}, "got seed True"),
        ("digits", {"seed": 1.0}, "got seed 1.0"),
        (
            "digits",
            {"image_size": 32},
            "got image_size 32, which only folder:PATH, hf",
        ),
        ("no_such:load", {}, 'data: got "no_such", expected one of'),
        ("json:no_such", {}, 'module "json" has no function "no_such"'),
        ("no_such.module:load", {}, 'module "no_such" cannot be found; is it on the Python path?'),
        ("json.tool:load", {}, 'module "json.tool" has no function "load"'),
        ("json.tool:main", {"seed": -1}, "got seed -1"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(spec, options, text):
    with pytest.raises(DataError) as caught:
        load_data(spec, **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_error_for_an_unknown_name_lists_every_source():
    with pytest.raises(DataError) as caught:
        load_data("?")
    assert all(name in str(caught.value) for name in DATA_SOURCES)


@pytest.mark.parametrize("name", DATA_SOURCES)
def test_every_source_in_the_catalog_can_be_imported(name):
    assert callable(DATA_SOURCES[name].load())


def test_a_partial_function_is_a_source():
    assert load_data(partial(load_digits)).record["name"]


def test_a_function_is_a_source():
    requests = []

    def load_own(request):
        requests.append(request)
        return load_digits(request)

    data = load_data(load_own, seed=3, image_size=8)
    assert data.record == load_data("digits", seed=3).record
    assert requests[0].spec.endswith("load_own")
    assert (requests[0].seed, requests[0].image_size, requests[0].place) == (3, 8, "")


def test_a_source_that_returns_something_else_is_refused():
    with pytest.raises(DataError, match=r"the source returned list, expected robustsoup\.Data"):
        load_data(lambda request: [])


OWN_SOURCE = """
from robustsoup.data.digits import load_digits

received = []

def load(request):
    received.append(request)
    return load_digits(request)
"""


def test_a_function_in_a_module_is_a_source(tmp_path, monkeypatch):
    package = tmp_path / "own_sources"
    package.mkdir()
    write_plugin(package, "digits_again", OWN_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    spec = "own_sources.digits_again:load"
    for place in ("", "some/place"):
        data = load_data(f"{spec}:{place}" if place else spec, seed=2)
        assert data.record == load_data("digits", seed=2).record
    from own_sources.digits_again import received

    assert received == [
        DataRequest(spec, seed=2),
        DataRequest(f"{spec}:some/place", "some/place", seed=2),
    ]


def test_an_entry_point_of_an_installed_package_is_a_source(tmp_path, monkeypatch):
    write_plugin(tmp_path, "own_data_plugin", OWN_SOURCE, "robustsoup.data", "own-digits")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_data("own-digits").record == load_data("digits").record
    assert load_data("own-digits:place", image_size=4).record == load_data("digits").record
    from own_data_plugin import received

    assert [request.place for request in received] == ["", "place"]
    with pytest.raises(DataError, match='did you mean "own-digits"'):
        load_data("own-digit")

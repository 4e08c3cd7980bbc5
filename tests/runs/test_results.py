"""The typed records of results.json: they survive a file, and errors name the place."""

import json

import pytest

from robustsoup.checkpoints.provenance import Leakage
from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.runs.results import (
    EvaluationProtocol,
    PlaneResult,
    ResultRow,
    Results,
)
from robustsoup.soups.answer import Answer

ROW = ResultRow(
    name="grid-0.5-0.5",
    role="grid",
    soup="grid",
    ingredients=("low", "high"),
    coefficients=(0.5, 0.5),
    checkpoint="checkpoints/grid-0.5-0.5.safetensors",
    val={"clean": Accuracy(60, 64), "Linf 8/255": Accuracy(30, 64)},
    screened=True,
    warnings=("the gradient is zero",),
    masking_check=("val, Linf 8/255: Square further breaks 0 of 9 survivors [0.0, 29.9] %",),
)
PROTOCOL = EvaluationProtocol(
    select_on="val",
    report_on="test",
    samples={"val": 64, "test": None},
    threats=("Linf 8/255",),
)
RESULTS = Results(
    name="a",
    created="2026-01-01T00:00:00Z",
    recipe={"name": "a"},
    data={"name": "digits"},
    model="resnet9",
    leakage=Leakage("unknown", "low: no record"),
    figures=("ternary",),
    protocol=PROTOCOL,
    versions={"torch": "2.6"},
    seconds=1.5,
    rows=(ROW, ResultRow(name="low", role="ingredient")),
    planes=(PlaneResult(name="p", checkpoints=("a", "b", "c"), file="landscapes/p.json"),),
    selection=Answer(maximise="Linf 8/255", require=("clean>=0.5",), chosen=ROW.name),
    soup="soup.safetensors",
)


def test_reading_returns_what_was_written(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS.to_json()))
    assert Results.load(path) == RESULTS


def test_results_are_read_beyond_the_limits_of_other_json(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS.to_json() | {"other": "," * 700_000 + " " * 2**24}))
    assert Results.load(path) == RESULTS


def test_a_row_names_screening_and_warnings_only_if_there_are_any():
    optional = {"screened", "warnings", "masking_check"}
    assert optional <= ROW.to_json().keys()
    assert not optional & RESULTS.rows[1].to_json().keys()


def test_accuracies_are_found_by_split_and_measure():
    assert ROW.accuracy("val", "clean") == Accuracy(60, 64)
    assert ROW.accuracy("val", "union") is None
    assert ROW.accuracy("test", "clean") is None
    assert RESULTS.row("low").scores("val") is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["name"], None, "name: got None, expected text"),
        (["rows"], {}, "rows: got {}, expected a list"),
        (["rows"], 5, "rows: got 5, expected a list"),
        (["protocol"], [], r"protocol: got \[\], expected a table"),
        (["protocol", "threats"], "Linf", "protocol.threats: got 'Linf', expected a list"),
        (["protocol", "steps"], 1.5, "protocol.steps: got 1.5, expected an integer"),
        (["protocol", "select_on"], "x", "protocol.select_on: got 'x', expected one of val, test"),
        (["rows", 0, "role"], "stew", r"rows\[0\].role: got 'stew', expected one of pretrained"),
        (["rows", 0, "role"], ["line"], r"rows\[0\].role: got \['line'\], expected one of"),
        (["rows", 0, "val"], [1], r"rows\[0\].val: got \[1\], expected a table"),
        (["rows", 0, "val", "clean"], {}, r"rows\[0\].val\['clean'\]: got \[\], expected the keys"),
        (
            ["rows", 0, "val", "clean", "n"],
            0,
            r"rows\[0\].val\['clean'\].n: got 0, expected an int",
        ),
        (["rows", 0, "val", "clean", "hits"], 99, r"rows\[0\].val\['clean'\].hits: got 99"),
        (
            ["rows", 0, "val", "clean", "value"],
            2,
            r"rows\[0\].val\['clean'\].value: got 2, expected",
        ),
        (["rows", 0, "ingredients"], 5, r"rows\[0\].ingredients: got 5, expected a list"),
        (["rows", 0, "coefficients"], ["x"], r"rows\[0\].coefficients\[0\]: got 'x', expected a f"),
        (["rows", 0, "warnings"], None, r"rows\[0\].warnings: got None, expected a list"),
        (["leakage"], "known", "leakage: got 'known', expected a table"),
        (["recipe"], [1], r"recipe: got \[1\], expected a table"),
        (["seconds"], "long", "seconds: got 'long', expected a finite number"),
        (["planes", 0, "file"], 3, r"planes\[0\].file: got 3, expected text"),
        (["selection", "chosen"], 3, "selection.chosen: got 3, expected text"),
        (["selection", "require"], 3, "selection.require: got 3, expected a list"),
    ],
)
def test_a_wrong_entry_is_named(place, value, message):
    content = RESULTS.to_json()
    *tables, last = place
    table = content
    for key in tables:
        table = table[key]
    table[last] = value
    with pytest.raises(RequestError, match=rf"^results\.json\.{message}"):
        Results.from_json(content, "results.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"results\.json: not JSON \("):
        Results.load(path)
    with pytest.raises(RequestError, match=r"absent\.json: no such file; expected a folder"):
        Results.load(tmp_path / "absent.json")

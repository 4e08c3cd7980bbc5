"""Files of coefficients and dials that claim what they do not hold: one line that says so."""

import pytest
import torch

from robustsoup.checkpoints.formats import write_tensors
from robustsoup.errors import CoefficientError
from robustsoup.soups.coefficients import Coefficients, Dial

RECORD = {"layers": ["a", "b"], "ingredients": ["x", "y", "z"], "of_parameters": {"a.weight": "a"}}
HALF = torch.full((2, 3), 1 / 3, dtype=torch.float64)
LINE = torch.zeros(2, 2, 3, dtype=torch.float64)

RECORDS = {
    "no layers": ({"layers": None}, "list of texts layers"),
    "layers as text": ({"layers": "ab"}, "list of texts layers"),
    "layers that are numbers": ({"layers": [1, 2]}, "list of texts layers"),
    "a layer that stands twice": ({"layers": ["a", "a"]}, "a layer stands twice"),
    "more layers than rows": ({"layers": ["a", "b", "c"]}, "got shape"),
    "no layer": ({"layers": []}, "got shape"),
    "ingredients as a table": ({"ingredients": {"x": 1}}, "list of texts ingredients"),
    "more ingredients than columns": ({"ingredients": ["x"] * 4}, "got shape"),
    "parameters as a list": ({"of_parameters": ["a"]}, "of_parameters"),
    "parameters of unknown layers": ({"of_parameters": {"a.weight": "q"}}, "of_parameters"),
    "parameters of a list": ({"of_parameters": {"a.weight": ["a"]}}, "of_parameters"),
}
TENSORS = {
    "one dimension": ({"values": torch.ones(3).double()}, "got shape"),
    "four dimensions": ({"values": torch.ones(2, 2, 3, 1).double()}, "got shape"),
    "no dimension": ({"values": torch.tensor(1.0)}, "got shape"),
    "integers": ({"values": "integers"}, "expected float64"),
    "NaN": ({"values": "nan"}, "NaN or infinity"),
    "a start of another shape": ({"start": torch.ones(2, 2)}, "start: got shape"),
    "slopes of another shape": ({"slopes": torch.ones(3)}, "slopes: got shape"),
    "infinite statistics": ({"tracked.bn.running_var": torch.tensor([torch.inf])}, "tracked"),
}


def check_refused(path, load, reason):
    with pytest.raises(CoefficientError, match=reason) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["coefficients", "dial"])
@pytest.mark.parametrize("change", RECORDS)
def test_a_malformed_record_is_refused(tmp_path, kind, change):
    path, (entries, reason) = tmp_path / "a.safetensors", RECORDS[change]
    tensors = {"alpha": HALF} if kind == "coefficients" else {"line": LINE}
    write_tensors(path, tensors, {"kind": kind, **RECORD, **entries})
    check_refused(path, Coefficients.load if kind == "coefficients" else Dial.load, reason)


@pytest.mark.parametrize("kind", ["coefficients", "dial"])
@pytest.mark.parametrize("change", TENSORS)
def test_malformed_tensors_are_refused(tmp_path, kind, change):
    path, (changes, reason) = tmp_path / "a.safetensors", TENSORS[change]
    name, good = ("alpha", HALF) if kind == "coefficients" else ("line", LINE)
    values = changes.get("values", good)
    if isinstance(values, str) and values == "integers":
        values = good.long()
    elif isinstance(values, str):
        values = good * torch.nan
    others = {key: tensor for key, tensor in changes.items() if key != "values"}
    write_tensors(path, {name: values, **others}, {"kind": kind, **RECORD})
    check_refused(path, Coefficients.load if kind == "coefficients" else Dial.load, reason)


@pytest.mark.parametrize("kind", ["network", 5, ["dial"], None])
def test_another_kind_of_file_is_refused(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"alpha": HALF}, {"kind": kind, **RECORD})
    check_refused(path, Coefficients.load, "not a coefficients file")
    check_refused(path, Dial.load, "not a dial file")


def test_the_files_of_these_tests_are_read_without_their_faults(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"alpha": HALF}, {"kind": "coefficients", **RECORD})
    assert Coefficients.load(path).row("a.weight") == [1 / 3] * 3
    write_tensors(path, {"line": LINE}, {"kind": "dial", **RECORD})
    assert Dial.load(path).at(0.5).row("b") == pytest.approx([1 / 3] * 3)

"""The stamp of files: each holds its format and release, and a newer format is refused."""

import importlib.metadata
import json
import os

import pytest
import torch
from safetensors import safe_open

from robustsoup import stamp
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import CheckpointError
from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.runs.results import EvaluationProtocol, Results
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.stamp import FORMAT, stamp_record, unstamp_record


def read_record(path):
    """Return the JSON record of a file as it is stored."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["robustsoup"])


def save_checkpoint(path):
    return Checkpoint({"weight": torch.ones(2)}, {"kind": "trained"}).save(path)


def save_coefficients(path):
    return Coefficients.of([0.5, 0.5]).save(path)


def save_dial(path):
    return Dial(torch.zeros(2, 1, 2), ("*",), ("a", "b")).save(path)


def save_evaluation(path):
    n = torch.zeros(3, dtype=torch.int64)
    verdicts = Verdicts(n == 0, n, n, n.float(), n.float())
    record = {"threats": ["Linf 8/255"], "broken_by": ["clean"]}
    return Evaluation(n, n, n, n.float(), {"Linf 8/255": verdicts}, record).save(path)


def save_results(path):
    protocol = EvaluationProtocol(select_on="val", report_on="test", threats=("Linf 8/255",))
    content = Results(name="a", protocol=protocol, rows=()).to_json()
    path.write_text(json.dumps(stamp_record(content)), encoding="utf-8")
    return path


def test_bytes_of_names_that_are_no_utf8_are_written_as_question_marks(tmp_path):
    name = os.fsdecode(b"r\xe9")
    checkpoint = Checkpoint({"w": torch.ones(2)}, {"parents": [{"digest": "a", "file": name}]})
    path = checkpoint.save(tmp_path / "a.safetensors")
    assert Checkpoint.load(path).provenance["parents"][0]["file"] == "r?"
    assert stamp_record({name: [(name, 1)]})["r?"] == [["r?", 1]]


KINDS = [
    ("a.safetensors", save_checkpoint, Checkpoint.load),
    ("a.safetensors", save_checkpoint, Checkpoint.open),
    ("a.safetensors", save_coefficients, Coefficients.load),
    ("a.safetensors", save_dial, Dial.load),
    ("a.json", save_evaluation, Evaluation.load),
    ("a.json", save_results, Results.load),
]


@pytest.mark.parametrize(("name", "save", "load"), KINDS)
def test_every_file_holds_its_format_and_the_release(name, save, load, tmp_path):
    path = save(tmp_path / name)
    stored = read_record(path)
    assert stored["format"] == FORMAT
    assert stored["robustsoup"] == importlib.metadata.version("robustsoup")
    loaded = load(path)
    record = getattr(loaded, "provenance", getattr(loaded, "record", {}))
    assert not {"format", "robustsoup"} & record.keys()


@pytest.mark.parametrize(("name", "save", "load"), KINDS)
def test_a_newer_format_is_refused(name, save, load, tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(stamp, "FORMAT", FORMAT + 1)
        path = save(tmp_path / name)
    message = f"written by a newer robustsoup (format {FORMAT + 1}); update robustsoup"
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(error.value) == f"{path}: {message}"


def test_records_without_a_format_are_read():
    for record in ({}, {"kind": "mixed"}, {"format": "pt"}, {"format": None}):
        read = unstamp_record(record, "a.safetensors")
        assert read == {key: value for key, value in record.items() if key != "format"}


def test_a_stamp_replaces_an_earlier_one():
    stamped = stamp_record({"format": FORMAT + 1, "robustsoup": "0", "kind": "mixed"})
    assert unstamp_record(stamped, "a.safetensors") == {"kind": "mixed"}

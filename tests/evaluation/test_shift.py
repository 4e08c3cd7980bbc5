"""Natural shift: accuracy on corrupted copies of the test set."""

import numpy
import pytest
import torch
from corruptions import write_corruptions

import robustsoup as rs
from robustsoup.errors import DataError


@pytest.fixture
def folder(tmp_path):
    return write_corruptions(tmp_path / "digits-c")


@pytest.fixture
def network():
    return rs.load_model("resnet9:width=2", channels=1).eval()


@pytest.mark.parametrize("samples", [None, 60])
def test_each_severity_is_judged_on_the_samples_of_the_evaluation(folder, network, samples):
    data = rs.load_data("digits").test
    evaluation = rs.evaluate(network, data, samples=samples, shift=folder)
    plain = rs.evaluate(network, data, samples=samples)
    shift, clean = evaluation.record["shift"], plain.accuracy["clean"]
    with torch.no_grad():
        answer = int(network(torch.zeros(1, 1, 8, 8)).argmax())
    black = float((data.first(samples).labels == answer).float().mean())
    assert shift["corruptions"]["none"] == pytest.approx([clean.value] * 5)
    assert shift["corruptions"]["black"] == pytest.approx([clean.value] * 2 + [black] * 3)
    mean = (7 * clean.value + 3 * black) / 10
    assert shift["accuracy"]["value"] == pytest.approx(mean)
    assert torch.equal(evaluation.prediction, plain.prediction)


def test_the_record_keeps_the_shift(folder, network, tmp_path):
    data = rs.load_data("digits").test
    evaluation = rs.evaluate(network, data, samples=20, shift=folder)
    path = evaluation.save(tmp_path / "verdicts.json")
    assert rs.Evaluation.load(path).record["shift"] == evaluation.record["shift"]


def write_wrong(folder, name, array):
    numpy.save(folder / f"{name}.npy", array)


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("labels", numpy.zeros(7, int), "got 7 labels of type int64, expected integers for 5 sev"),
        ("labels", numpy.full(2500, 10), "got labels 10..10, expected 0..9"),
        ("labels", numpy.zeros(2500), "got 2500 labels of type float64"),
        (
            "fog",
            numpy.zeros((2500, 1, 8, 8), numpy.uint8),
            "fog.npy: got uint8 (2500, 1, 8, 8)",
        ),
        ("fog", numpy.zeros((5, 8, 8, 1), numpy.uint8), "expected uint8 (2500, 8, 8, 1)"),
        ("fog", numpy.zeros((2500, 8, 8, 1)), "fog.npy: got float64"),
        ("fog", numpy.array([{}], object), "fog.npy: not a readable .npy file"),
    ],
)
def test_other_files_are_refused_before_any_work(folder, network, name, array, text):
    write_wrong(folder, name, array)
    with pytest.raises(DataError) as caught:
        rs.evaluate(network, rs.load_data("digits").test, samples=4, shift=folder)
    assert text in str(caught.value)


def test_a_folder_without_corruptions_is_refused(network, tmp_path):
    with pytest.raises(DataError, match=r"expected labels\.npy and one \.npy file"):
        rs.evaluate(network, rs.load_data("digits").test, samples=4, shift=tmp_path)

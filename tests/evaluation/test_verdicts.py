"""The record of an evaluation: consistent accuracies, and a round trip through files."""

import json

import numpy as np
import pytest
import torch
from evaluated_networks import LINF, NAMES, same_verdicts
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.errors import CheckpointError, ThreatError
from robustsoup.evaluation.verdicts import Evaluation, Verdicts, parse_measure
from robustsoup.stamp import stamp_record
from robustsoup.threats import ThreatModel

few_examples = settings(max_examples=30, deadline=None)


# accuracies


def check_accuracies(evaluation):
    """Check every accuracy against a count over the verdicts."""
    robust = {name: v.robust.tolist() for name, v in evaluation.threats.items()}
    expected = {"clean": (evaluation.prediction == evaluation.labels).tolist(), **robust}
    if len(robust) > 1:
        expected["union"] = [all(row) for row in zip(*robust.values(), strict=True)]
    counts = {name: (a.hits, a.n) for name, a in evaluation.accuracy.items()}
    assert counts == {name: (sum(hits), len(hits)) for name, hits in expected.items()}


def test_accuracies_are_counted_from_the_verdicts(evaluation):
    check_accuracies(evaluation)
    assert list(evaluation.threats) == NAMES
    assert evaluation.accuracy[LINF] == evaluation.accuracy["Linf 0.1"]
    assert repr(evaluation.accuracy) == repr(dict(evaluation.accuracy))
    with pytest.raises(KeyError):
        evaluation.accuracy[ThreatModel("L2", 0.6)]


@few_examples
@given(st.integers(0, 3), st.integers(1, 20), st.randoms(use_true_random=False))
def test_accuracies_of_any_verdicts(threats, n, chance):
    def draw(values):
        return torch.tensor([chance.choice(values) for _ in range(n)])

    def draw_verdicts():
        zeros = torch.zeros(n)
        return Verdicts(draw([True, False]), draw([-1, 0]), draw([-1, 0]), zeros, zeros)

    verdicts = {f"L2 {i + 1}.0": draw_verdicts() for i in range(threats)}
    evaluation = Evaluation(torch.arange(n), draw([0, 1]), draw([0, 1]), torch.zeros(n), verdicts)
    check_accuracies(evaluation)
    assert ("union" in evaluation.accuracy) == (threats > 1)


@pytest.mark.parametrize(
    ("text", "measure"),
    [
        ("clean", "clean"),
        ("union", "union"),
        ("linf 8/255", "Linf 8/255"),
        (ThreatModel("L2", 0.5), "L2 0.5"),
    ],
)
def test_a_measure_has_one_spelling(text, measure):
    assert parse_measure(text) == measure


def test_an_unknown_measure_is_refused():
    with pytest.raises(ThreatError, match='got "robust"'):
        parse_measure("robust")


# files


def test_an_evaluation_comes_back_from_its_files(evaluation, tmp_path):
    path = evaluation.save(tmp_path / "deep" / "eval.json")
    assert sorted(item.name for item in path.parent.iterdir()) == ["eval.json", "eval.npz"]
    loaded = Evaluation.load(path)
    assert same_verdicts(loaded, evaluation)
    for part in ("ids", "labels", "prediction", "margin"):
        assert torch.equal(getattr(loaded, part), getattr(evaluation, part))
        assert getattr(loaded, part).dtype == getattr(evaluation, part).dtype
    assert loaded.record == json.loads(json.dumps(evaluation.record))
    assert loaded.accuracy == evaluation.accuracy
    assert stamp_record(loaded.to_json()) == json.loads(path.read_text())


def test_kept_points_come_back_from_their_file(with_points, tmp_path):
    path = with_points.save(tmp_path / "eval.json")
    names = ["eval.json", "eval.npz", "eval.points.npz"]
    assert sorted(item.name for item in tmp_path.iterdir()) == names
    loaded = Evaluation.load(path)
    assert same_verdicts(loaded, with_points)
    for name, verdicts in with_points.threats.items():
        assert torch.equal(loaded.threats[name].x_adv, verdicts.x_adv)
        assert loaded.threats[name].x_adv.dtype == torch.float32
    assert loaded.record == json.loads(json.dumps(with_points.record))
    path.with_suffix(".points.npz").unlink()
    assert Evaluation.load(path).threats["L2 0.5"].x_adv is None
    path.with_suffix(".points.npz").write_bytes(b"text")
    with pytest.raises(CheckpointError, match=r"eval\.json"):
        Evaluation.load(path)


def test_saving_an_evaluation_without_points_removes_earlier_points(
    with_points, evaluation, tmp_path
):
    with_points.save(tmp_path / "eval.json")
    loaded = Evaluation.load(evaluation.save(tmp_path / "eval.json"))
    assert all(verdicts.x_adv is None for verdicts in loaded.threats.values())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".npz").unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text(path.read_text()[:200]),
        lambda path: path.write_text("[1, 2]"),
        lambda path: path.write_text("{}"),
        lambda path: path.with_suffix(".npz").write_bytes(b""),
        lambda path: path.with_suffix(".npz").write_bytes(
            path.with_suffix(".npz").read_bytes()[:300]
        ),
        lambda path: path.with_suffix(".npz").write_bytes(b"text"),
        lambda path: np.savez(path.with_suffix(".npz"), ids=np.arange(3)),
    ],
)
def test_broken_files_are_refused_by_name(evaluation, tmp_path, damage):
    path = evaluation.save(tmp_path / "eval.json")
    damage(path)
    with pytest.raises(CheckpointError, match=r"eval\.json") as error:
        Evaluation.load(path)
    assert "\n" not in str(error.value)

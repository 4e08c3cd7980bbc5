"""The record of an evaluation: consistent accuracies, and a round trip through files."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluated_networks import LINF, NAMES, same_verdicts
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import cut_short, flip_bits

from robustsoup.errors import CheckpointError, RequestError, ThreatError
from robustsoup.evaluation.verdicts import Evaluation, Verdicts, parse_measure
from robustsoup.soups.selection import Candidate, pareto_front
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
    for unknown in (ThreatModel("L2", 0.6), "Linf", "robust"):
        assert unknown not in evaluation.accuracy
        with pytest.raises(KeyError):
            evaluation.accuracy[unknown]


@pytest.mark.parametrize("spelling", ["L2 1", "l2 1.00", "L2 2/2", ThreatModel("L2", 1)])
def test_an_accuracy_is_found_by_every_spelling_of_its_threat(tmp_path, spelling):
    small = Evaluation.load(save_small_evaluation(tmp_path / "eval.json"))
    verdicts = small.threats["Linf 8/255"]
    evaluation = replace(small, threats={"L2 1.0": verdicts})
    assert evaluation.accuracy[spelling] == evaluation.accuracy["L2 1.0"]
    assert evaluation.after_each(spelling) == small.after_each("Linf 8/255")
    assert pareto_front([Candidate("a", (), evaluation)], ["clean", spelling])


@pytest.mark.parametrize("name", ["linf_0.03", "a", "a.npz"])
def test_another_ending_of_an_evaluation_is_refused(tmp_path, name):
    with pytest.raises(RequestError, match=r"got the ending .*, expected \.json"):
        save_small_evaluation(tmp_path / name)
    assert not list(tmp_path.iterdir())


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
    stored = json.loads(path.read_text())
    assert sorted(stored.pop("digests")) == ["arrays", "record"]
    assert stamp_record(loaded.to_json()) == stored


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


# damage


def describe(evaluation):
    """Return all values of an evaluation as text."""
    torch.set_printoptions(threshold=10**6)
    return repr(evaluation)


def save_small_evaluation(path, shift=0):
    """Save an evaluation of eight samples with kept points."""
    n = torch.arange(8) + shift
    points = torch.linspace(0, 1, 8 * 4).reshape(8, 1, 2, 2)
    verdicts = Verdicts(n % 2 == 0, -(n % 2), -(n % 2), n.float() / 8, n.float() - 4, points)
    record = {"threats": ["Linf 8/255"], "broken_by": ["clean"], "note": "grüße", "eps": 8 / 255}
    return Evaluation(n, n % 3, n % 2, n.float(), {"Linf 8/255": verdicts}, record).save(path)


def save_changed_evaluation(path, record=(), **arrays):
    """Save an evaluation with other content and valid digests."""
    small = Evaluation.load(save_small_evaluation(path))
    verdicts = {"by": arrays.pop("by")} if "by" in arrays else {}
    threats = {name: replace(item, **verdicts) for name, item in small.threats.items()}
    content = {key: value for key, value in (small.record | dict(record)).items() if value}
    return replace(small, **arrays, threats=threats, record=content).save(path)


NUMBERS = torch.zeros(8, dtype=torch.int64)
FINDING = {"hits": 1, "n": 4, "low": 0.1, "high": 0.6}
CLASSES = {"data": {"classes": ["a", "b", "c"]}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prediction": NUMBERS - 5}, "prediction holds -5 to -5, expected 0 to 99999"),
        (
            {"prediction": NUMBERS + 3, "record": CLASSES},
            "prediction holds 3 to 3, expected",
        ),
        ({"labels": NUMBERS + 10**6}, "labels holds 1000000 to 1000000, expected 0 to"),
        ({"by": NUMBERS + 1}, "by_0 holds 1 to 1, expected -1 to 0"),
        ({"by": NUMBERS - 2}, "by_0 holds -2 to -2, expected -1 to 0"),
        ({"record": {"broken_by": None}}, "expected the keys threats, broken_by, accuracy"),
        (
            {"record": {"masking_check": {"Linf 8/255": {"tied": FINDING}}}},
            "expected the keys hits, n, low, high, flagged",
        ),
        (
            {"record": {"masking_check": {"Linf 8/255": {"tied": FINDING | {"flagged": "no"}}}}},
            "flagged: got 'no', expected true or false",
        ),
    ],
)
def test_content_that_no_evaluation_has_is_refused(tmp_path, changes, reason):
    path = save_changed_evaluation(tmp_path / "eval.json", **changes)
    with pytest.raises(CheckpointError) as error:
        Evaluation.load(path)
    assert reason in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("ending", [".json", ".npz", ".points.npz"])
def test_flips_and_truncations_are_noticed_or_change_nothing(tmp_path, ending):
    path = save_small_evaluation(tmp_path / "eval.json")
    expected, noticed = describe(Evaluation.load(path)), 0
    damaged = path.with_suffix(ending)
    whole = damaged.read_bytes()
    copies = [*flip_bits(whole, 150), *cut_short(whole, 30)]
    for copy in copies:
        damaged.write_bytes(copy)
        try:
            found, message = describe(Evaluation.load(path)), ""
        except CheckpointError as error:
            found, message = None, str(error)
        if found is not None:
            assert found == expected
            continue
        noticed += 1
        assert message.startswith(f"{path}: ")
        assert message.isprintable()
    assert noticed > len(copies) / 2


@pytest.mark.parametrize("ending", [".npz", ".points.npz"])
def test_arrays_of_another_evaluation_are_refused(tmp_path, ending):
    path = save_small_evaluation(tmp_path / "eval.json")
    other = save_small_evaluation(tmp_path / "other.json", shift=1)
    other.with_suffix(ending).replace(path.with_suffix(ending))
    if ending == ".points.npz":  # the points are equal, so change them
        np.savez(path.with_suffix(ending), **{"0": np.zeros((8, 1, 2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=r"eval\.json.*belongs to another evaluation"):
        Evaluation.load(path)


def test_a_changed_record_is_refused(tmp_path):
    path = save_small_evaluation(tmp_path / "eval.json")
    path.write_text(path.read_text().replace("0.03137", "0.03138"))
    with pytest.raises(CheckpointError, match=r"eval\.json.*its record was changed"):
        Evaluation.load(path)


def test_an_evaluation_without_digests_is_read(tmp_path):
    path = save_small_evaluation(tmp_path / "eval.json")
    expected = describe(Evaluation.load(path))
    content = json.loads(path.read_text())
    del content["digests"], content["robustsoup"]
    path.write_text(json.dumps(content))
    assert describe(Evaluation.load(path)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"threats": None},
        {"threats": 5},
        {"threats": [5]},
        {"threats": ["Linf 8/255", "Linf 8/255"]},
        {"threats": ["Linf 8/255", "L2 0.5"]},
        {"broken_by": "clean"},
        {"warnings": [1]},
        {"digests": 5},
        {"digests": {}},
        {"format": [1]},
    ],
)
def test_a_malformed_record_is_refused(tmp_path, change):
    path = save_small_evaluation(tmp_path / "eval.json")
    content = json.loads(path.read_text())
    if "format" not in change:
        del content["digests"], content["robustsoup"]
    path.write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=r"eval\.json: not an evaluation") as caught:
        Evaluation.load(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.arange(7)},
        {"ids": np.arange(8.0)},
        {"ids": np.arange(8).reshape(8, 1)},
        {"labels": np.arange(8, dtype=np.int32)},
        {"robust_0": np.ones(8)},
        {"margin_0": np.ones(9, dtype=np.float32)},
        "empty",
    ],
)
def test_arrays_of_another_type_or_number_are_refused(tmp_path, change):
    path = save_small_evaluation(tmp_path / "eval.json")
    content = json.loads(path.read_text())
    del content["digests"], content["robustsoup"]
    path.write_text(json.dumps(content))
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = dict(stored)
    changed = {name: array[:0] for name, array in arrays.items()} if change == "empty" else change
    np.savez(path.with_suffix(".npz"), **(arrays | changed))
    with pytest.raises(CheckpointError, match=r"eval\.json: not an evaluation"):
        Evaluation.load(path)


def test_a_fifo_is_refused_without_waiting(tmp_path):
    path = save_small_evaluation(tmp_path / "eval.json")
    for name in ("eval.points.npz", "eval.npz", "eval.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(CheckpointError, match="got a FIFO, expected a regular file"):
            Evaluation.load(path)

"""Evaluation: verdicts per sample that add up, come back from their files, and depend on the seed alone."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from robustsoup.attacks import Settings, run_attack
from robustsoup.attacks.forward import predict
from robustsoup.checkpoints import Checkpoint
from robustsoup.data import Split, load_data, to_float
from robustsoup.errors import CheckpointError, DataError, Diverged, ModelError, RequestError
from robustsoup.evaluation import Evaluation, Verdicts, evaluate, refuse_chance
from robustsoup.models import load_model
from robustsoup.statistics import Accuracy, wilson
from robustsoup.threats import ThreatModel, norms

few = settings(max_examples=30, deadline=None)
LINF, L2, L1 = ThreatModel("Linf", 0.1), ThreatModel("L2", 0.5), ThreatModel("L1", 1.0)
NAMES = ["Linf 0.1", "L2 0.5", "L1 1.0"]


@pytest.fixture(scope="module")
def data():
    return load_data("digits").test.first(60)


@pytest.fixture(scope="module")
def model():
    """A small network that tells the digits apart."""
    train = load_data("digits").train
    network = load_model("resnet9:width=4", channels=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    x, y = to_float(train.images), train.labels
    for step in range(40):
        rows = slice(step % 10 * 100, step % 10 * 100 + 100)
        optimizer.zero_grad()
        functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def evaluation(model, data):
    return evaluate(model, data, [LINF, "L2 0.5", L1], steps=5, seed=3)


# intervals


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857
        (8500, 10_000, 0.8429, 0.8569),
    ],
)
def test_known_intervals(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)
    accuracy = Accuracy(hits, n)
    assert (accuracy.low, accuracy.high) == wilson(hits, n)
    assert float(accuracy) == accuracy.value == hits / n


@few
@given(n=st.integers(1, 10_000), share=st.floats(0, 1))
def test_an_interval_solves_its_equation_and_holds_the_estimate(n, share):
    hits = round(share * n)
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in (low, high):  # Wilson: the p whose distance from the estimate is z standard errors of p
        if 0 < end < 1:
            assert abs(hits / n - end) == pytest.approx(
                1.959963984540054 * (end * (1 - end) / n) ** 0.5, rel=1e-6, abs=1e-9
            )
    mirrored = wilson(n - hits, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


# accuracies


def check_accuracies(found):
    robust = {name: verdicts.robust for name, verdicts in found.threats.items()}
    expected = {"clean": (found.prediction == found.labels).tolist()}
    expected |= {name: mask.tolist() for name, mask in robust.items()}
    if len(robust) > 1:
        expected["union"] = [all(row) for row in zip(*(mask.tolist() for mask in robust.values()), strict=True)]
    assert {name: (a.hits, a.n) for name, a in found.accuracy.items()} == {
        name: (sum(mask), len(mask)) for name, mask in expected.items()
    }


def test_accuracies_are_counted_from_the_verdicts(evaluation):
    check_accuracies(evaluation)
    assert list(evaluation.threats) == NAMES
    hits = {name: accuracy.hits for name, accuracy in evaluation.accuracy.items()}
    assert 0 < hits["union"] < min(hits[name] for name in NAMES) < hits["clean"] < 60
    assert evaluation.accuracy[LINF] == evaluation.accuracy["Linf 0.1"]
    with pytest.raises(KeyError):
        evaluation.accuracy[ThreatModel("L2", 0.6)]


@few
@given(st.integers(0, 3), st.integers(1, 20), st.randoms(use_true_random=False))
def test_accuracies_of_any_verdicts(threats, n, chance):
    def drawn(values):
        return torch.tensor([chance.choice(values) for _ in range(n)])

    def made():
        return Verdicts(drawn([True, False]), drawn([-1, 0]), drawn([-1, 0]), torch.zeros(n), torch.zeros(n))

    verdicts = {f"L2 {i + 1}.0": made() for i in range(threats)}
    found = Evaluation(torch.arange(n), drawn([0, 1]), drawn([0, 1]), torch.zeros(n), verdicts)
    check_accuracies(found)
    assert ("union" in found.accuracy) == (threats > 1)


def test_verdicts_are_those_of_the_attack(evaluation, model, data):
    x = to_float(data.images)
    with torch.no_grad():
        logits = model(x)
    assert torch.equal(evaluation.ids, data.ids)
    assert torch.equal(evaluation.labels, data.labels)
    assert torch.equal(evaluation.prediction, logits.argmax(1))
    right = logits[torch.arange(60), data.labels]
    others = torch.stack([logits[i, [c for c in range(10) if c != data.labels[i]]].max() for i in range(60)])
    torch.testing.assert_close(evaluation.margin, right - others, rtol=1e-4, atol=1e-5)
    assert torch.equal(evaluation.margin > 0, evaluation.prediction == evaluation.labels)
    for threat in (LINF, L2, L1):
        result = run_attack(model, x, data.labels, threat, Settings(steps=5, seed=3), ids=data.ids)
        found = evaluation.threats[str(threat)]
        assert torch.equal(found.robust, ~result.broken)
        assert torch.equal(found.step, result.step)
        torch.testing.assert_close(found.norm, norms(result.x_adv - x, threat.norm), rtol=1e-3, atol=1e-3)


def test_what_is_wrong_clean_is_broken_at_step_0_by_nothing(evaluation):
    wrong = evaluation.prediction != evaluation.labels
    assert int(wrong.sum()) >= 1
    for name, verdicts in evaluation.threats.items():
        eps = ThreatModel.parse(name).eps
        assert not bool(verdicts.robust[wrong].any())
        assert bool((verdicts.step[wrong] == 0).all())
        assert bool((verdicts.norm[wrong] == 0).all())
        assert bool((verdicts.norm[~wrong] > 0).all())
        assert float(verdicts.norm.max()) <= eps + 1e-5
        assert verdicts.norm.dtype == torch.float32
        assert torch.equal(verdicts.step == -1, verdicts.robust)


def test_clean_threats_add_nothing(model, data):
    found = evaluate(model, data, ["clean", "Linf 0"], steps=2)
    assert list(found.accuracy) == ["clean"]
    assert evaluate(model, data).threats == {}


def test_samples_are_the_first_so_many(evaluation, model, data):
    found = evaluate(model, data, [LINF], steps=5, seed=3, samples=20)
    assert len(found.ids) == found.accuracy["clean"].n == found.record["samples"] == 20
    assert torch.equal(found.threats["Linf 0.1"].step, evaluation.threats["Linf 0.1"].step[:20])


# seeds, batches and what is left as it was


def same_verdicts(left, right):
    return list(left.threats) == list(right.threats) and all(
        torch.equal(getattr(left.threats[name], part), getattr(right.threats[name], part))
        for name in left.threats for part in ("robust", "step", "norm")
    )  # fmt: skip


def test_the_same_seed_gives_the_same_verdicts_and_another_does_not(evaluation, model, data):
    again = evaluate(model, data, [LINF, L2, L1], steps=5, seed=3)
    assert same_verdicts(again, evaluation)
    assert torch.equal(again.margin, evaluation.margin)
    assert not same_verdicts(evaluate(model, data, [LINF, L2, L1], steps=5, seed=4), evaluation)


def test_a_verdict_does_not_depend_on_the_threats_before_it(evaluation, model, data):
    alone = evaluate(model, data, [L2], steps=5, seed=3)
    assert torch.equal(alone.threats["L2 0.5"].step, evaluation.threats["L2 0.5"].step)


@pytest.mark.parametrize("batch_size", [1, 7, 30, 250])
def test_padding_does_not_change_predictions(evaluation, model, data, batch_size):
    found = evaluate(model, data, batch_size=batch_size)
    assert torch.equal(found.prediction, evaluation.prediction)
    torch.testing.assert_close(found.margin, evaluation.margin, rtol=1e-4, atol=1e-5)


def test_every_batch_has_one_shape():
    shapes = set()

    class Probe(nn.Module):
        def forward(self, x):
            shapes.add(tuple(x.shape))
            return x.flatten(1)

    x = torch.rand(10, 1, 2, 2)
    assert torch.equal(predict(Probe(), lambda at: x[at], 10, 4, x.device), x.flatten(1))
    assert shapes == {(4, 1, 2, 2)}


@pytest.mark.parametrize("training", [True, False])
def test_a_given_network_is_left_as_it_was(model, data, training):
    network = load_model("resnet9:width=4", channels=1)
    network.load_state_dict(model.state_dict())
    network.train(training)
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in network.state_dict().items()}
    randomness = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = evaluate(network, data, [LINF], steps=2)
    assert torch.equal(found.prediction, evaluate(model, data).prediction)
    assert [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.random.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert np.array_equal(np.random.get_state()[1], randomness[2])


def test_a_checkpoint_and_its_path_are_evaluated_and_recorded(evaluation, model, data, tmp_path):
    made = Checkpoint.of(model, {"network": {"spec": "resnet9:width=4", "channels": 1}})
    path = made.save(tmp_path / "a.safetensors")
    for network in (made, path, str(path)):
        found = evaluate(network, data, [LINF], steps=5, seed=3)
        assert torch.equal(found.threats["Linf 0.1"].robust, evaluation.threats["Linf 0.1"].robust)
        assert found.record["checkpoint"] == made.digest


def test_progress_counts_samples_times_threats_plus_1(model, data):
    told = []
    evaluate(model, data, [LINF, L2], steps=2, batch_size=16, on_progress=lambda *figures: told.append(figures))
    done = [step for step, _, _ in told]
    assert done == sorted(done)
    assert done[-1] == 180
    assert {total for _, total, _ in told} == {180}
    assert all("clean" in text for _, _, text in told)


# files


def test_an_evaluation_comes_back_from_its_files(evaluation, tmp_path):
    path = evaluation.save(tmp_path / "deep" / "eval.json")
    assert sorted(item.name for item in path.parent.iterdir()) == ["eval.json", "eval.npz"]
    read = Evaluation.load(path)
    assert same_verdicts(read, evaluation)
    for part in ("ids", "labels", "prediction", "margin"):
        assert torch.equal(getattr(read, part), getattr(evaluation, part))
        assert getattr(read, part).dtype == getattr(evaluation, part).dtype
    assert read.record == json.loads(json.dumps(evaluation.record))
    assert read.accuracy == evaluation.accuracy
    assert read.to_json() == json.loads(path.read_text())


def test_the_record_says_who_made_it_how(evaluation, data):
    told = evaluation.to_json()
    assert told["data"] == data.record
    expected = {
        "split": "test", "samples": 60, "threats": NAMES, "attack": "apgd", "steps": 5, "restarts": 1, "seed": 3,
        "precision": "float32", "loss": "ce", "device": "cpu", "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    assert {key: told[key] for key in expected} == expected
    clean = evaluation.accuracy["clean"]
    assert told["accuracy"]["clean"] == {
        "value": clean.value, "low": clean.low, "high": clean.high, "hits": clean.hits, "n": 60
    }  # fmt: skip


@pytest.mark.parametrize(
    "breaks",
    [
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".npz").unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text(path.read_text()[:200]),
        lambda path: path.write_text("[1, 2]"),
        lambda path: path.write_text("{}"),
        lambda path: path.with_suffix(".npz").write_bytes(b""),
        lambda path: path.with_suffix(".npz").write_bytes(path.with_suffix(".npz").read_bytes()[:300]),
        lambda path: path.with_suffix(".npz").write_bytes(b"text"),
        lambda path: np.savez(path.with_suffix(".npz"), ids=np.arange(3)),
    ],
)
def test_broken_files_are_refused_by_name(evaluation, tmp_path, breaks):
    path = evaluation.save(tmp_path / "eval.json")
    breaks(path)
    with pytest.raises(CheckpointError, match=r"eval\.json") as told:
        Evaluation.load(path)
    assert "\n" not in str(told.value)


# wrong requests


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (lambda: load_model("resnet9:width=2", channels=1, classes=7), r"\(2, 7\).*expected 10 classes"),
        (lambda: nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()), r"does not take images of shape \(1, 8, 8\)"),
        (lambda: nn.Conv2d(1, 10, 1), r"logits of shape \(2, 10, 8, 8\)"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(data, network, text):
    with pytest.raises(ModelError, match=text) as told:
        evaluate(network(), data, [LINF], steps=2)
    assert "\n" not in str(told.value)


def test_the_built_in_network_refuses_images_with_another_number_of_channels(data):
    """One grey channel less three means would be three channels."""
    with pytest.raises(ModelError, match=r"does not take images of shape \(1, 8, 8\)"):
        evaluate(load_model("resnet9:width=2", channels=3), data)


def test_a_broken_network_is_refused(model, data):
    broken = load_model("resnet9:width=4", channels=1)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.linear.weight[3, 2] = torch.nan
    with pytest.raises(Diverged, match="NaN or infinity"):
        evaluate(broken, data, [LINF], steps=2)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"steps": 0}, RequestError, "steps: got 0, expected at least 1"),
        ({"batch_size": 0}, RequestError, "batch_size: got 0"),
        ({"attack": "fgsm"}, RequestError, 'attack: got "fgsm", expected one of apgd, pgd, autoattack'),
        ({"threats": ["Linf"]}, RequestError, 'got "Linf"'),
        ({"samples": 0}, DataError, "asked for 0 samples"),
        ({"samples": 61}, DataError, "asked for 61 samples, expected 1 to 60"),
        ({"device": "toaster"}, RequestError, 'device: "toaster"'),
        ({"precision": "float8"}, RequestError, 'precision: got "float8"'),
    ],
)
def test_a_wrong_setting_is_refused(model, data, wrong, error, text):
    with pytest.raises(error, match=text):
        evaluate(model, data, **{"threats": [LINF], **wrong})


class Reads(nn.Module):
    """A network that answers the class that is written in the first pixel."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.scale = classes, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), self.classes)


def with_hits(hits, n, classes):
    """n samples of class 0; the first `hits` of them say so."""
    images = torch.ones(n, 1, 1, 1, dtype=torch.uint8)
    images[:hits] = 0
    record = {"name": "made", "split_digest": "made", "classes": [str(c) for c in range(classes)]}
    return Split(images, torch.zeros(n, dtype=torch.long), torch.arange(n), "val", record)


@pytest.mark.parametrize(
    ("hits", "n", "classes"),
    [(10, 100, 10), (0, 50, 10), (15, 100, 10), (55, 100, 2), (100, 1000, 10), (100, 4000, 10)],
)
def test_clean_accuracy_near_chance_is_refused(hits, n, classes):
    with pytest.raises(ModelError, match=r"mine\.pth: clean accuracy .* near chance .*--normalize MEAN STD") as told:
        refuse_chance(Reads(classes), with_hits(hits, n, classes), "mine.pth")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("hits", "n", "classes"), [(20, 100, 10), (5, 49, 10), (65, 100, 2), (30, 50, 100), (130, 1000, 10)]
)
def test_clean_accuracy_above_chance_or_of_too_few_samples_passes(hits, n, classes):
    refuse_chance(Reads(classes), with_hits(hits, n, classes), "mine.pth")


def test_chance_is_judged_on_a_thousand_samples_at_most():
    refuse_chance(Reads(10), with_hits(1000, 20_000, 10), "mine.pth")

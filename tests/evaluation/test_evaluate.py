"""evaluate: verdicts equal the attack's and depend only on the seed; inputs are unchanged."""

import random
import re

import numpy as np
import pytest
import torch
from evaluated_networks import L1, L2, LINF, NAMES, WRONG, N, same_verdicts
from torch import nn
from torch.nn import functional

from robustsoup.attacks import run_attack
from robustsoup.attacks.forward import pass_size, predict_logits
from robustsoup.attacks.projections import norms
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split, to_float
from robustsoup.errors import DataError, Diverged, ModelError, RequestError
from robustsoup.evaluation.evaluate import check_above_chance, evaluate
from robustsoup.models import load_model
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel


def copy_of(model):
    network = load_model("resnet9:width=4", channels=1)
    network.load_state_dict(model.state_dict())
    return network


# verdicts


def test_verdicts_are_those_of_the_attack(evaluation, model, data):
    x = to_float(data.images)
    with torch.no_grad():
        logits = model(x)
    assert torch.equal(evaluation.ids, data.ids)
    assert torch.equal(evaluation.labels, data.labels)
    assert torch.equal(evaluation.prediction, logits.argmax(1))
    correct = logits[torch.arange(N), data.labels]
    others = logits.scatter(1, data.labels.view(-1, 1), -torch.inf).amax(1)
    torch.testing.assert_close(evaluation.margin, correct - others, rtol=1e-4, atol=1e-5)
    assert torch.equal(evaluation.margin > 0, evaluation.prediction == evaluation.labels)
    settings = AttackSettings(steps=5, seed=3)
    for threat in (LINF, L2, L1):
        result = run_attack(model, x, data.labels, threat, settings, ids=data.ids)
        verdicts = evaluation.threats[str(threat)]
        assert torch.equal(verdicts.robust, ~result.broken)
        assert torch.equal(verdicts.step, result.step)
        assert torch.equal(verdicts.by[result.by >= 0], result.by[result.by >= 0] + 1)
        norm = norms(result.x_adv - x, threat.norm)
        torch.testing.assert_close(verdicts.norm, norm, rtol=1e-3, atol=1e-3)


def test_robust_accuracies_are_ordered(evaluation):
    hits = {name: accuracy.hits for name, accuracy in evaluation.accuracy.items()}
    assert hits["clean"] == N - WRONG
    assert 0 < hits["union"] <= min(hits[name] for name in NAMES)
    assert max(hits[name] for name in NAMES) < hits["clean"]


def test_samples_that_are_wrong_clean_are_broken_at_step_0(evaluation):
    wrong = evaluation.prediction != evaluation.labels
    assert int(wrong.sum()) == WRONG
    for name, verdicts in evaluation.threats.items():
        assert not bool(verdicts.robust[wrong].any())
        assert bool((verdicts.step[wrong] == 0).all())
        assert bool((verdicts.norm[wrong] == 0).all())
        assert bool((verdicts.norm[~wrong] > 0).all())
        assert float(verdicts.norm.max()) <= ThreatModel.parse(name).eps + 1e-5
        assert verdicts.norm.dtype == torch.float32
        assert torch.equal(verdicts.step == -1, verdicts.robust)
        assert torch.equal(verdicts.by == -1, verdicts.robust)
        assert torch.equal(verdicts.by == 0, wrong)
        assert torch.equal(verdicts.margin < 0, ~verdicts.robust)
        assert torch.equal(verdicts.margin[wrong], evaluation.margin[wrong])


def test_clean_threats_add_nothing(model, data):
    assert list(evaluate(model, data, ["clean", "Linf 0"], steps=2).accuracy) == ["clean"]
    assert evaluate(model, data).threats == {}


def test_the_first_samples_are_evaluated(evaluation, model, data):
    first = evaluate(model, data, [LINF], steps=5, seed=3, samples=20)
    assert len(first.ids) == first.accuracy["clean"].n == first.record["samples"] == 20
    assert torch.equal(first.threats["Linf 0.1"].step, evaluation.threats["Linf 0.1"].step[:20])


def test_other_attacks_are_evaluated(evaluation, model, data):
    hits = {}
    for key, value in (
        ("attack", "pgd"),
        ("loss", "dlr"),
        ("precision", "bfloat16"),
        ("restarts", 3),
        ("eot", 2),
    ):
        other = evaluate(model, data, [LINF], steps=5, seed=3, **{key: value})
        assert other.record["search_precision" if key == "precision" else key] == value
        assert other.record["precision"] == "float32"
        assert other.record["certificate"]["Linf 0.1"]["outside"] == 0
        hits[value] = other.accuracy[LINF].hits
    plain = evaluation.accuracy[LINF].hits
    assert hits[3] <= plain == hits[2]  # the network is deterministic: averaging changes nothing
    assert max(hits.values()) < N - WRONG


def test_settings_and_keywords_say_the_same(evaluation, model, data):
    settings = AttackSettings(steps=5, seed=7)
    by_settings = evaluate(model, data, [LINF, L2, L1], settings, seed=3)
    assert same_verdicts(by_settings, evaluation)
    assert by_settings.record.keys() == evaluation.record.keys()


def test_each_attempt_is_named(model, data):
    settings = {"steps": 3, "loss": "targeted dlr", "targets": 2, "restarts": 2}
    evaluation = evaluate(model, data, [LINF, L2], **settings)
    names = [
        "clean",
        "apgd-t target 1",
        "apgd-t target 2",
        "apgd-t target 1 restart 2",
        "apgd-t target 2 restart 2",
    ]
    assert evaluation.record["broken_by"] == names
    for key in ("loss", "targets", "restarts"):
        assert evaluation.record[key] == settings[key]
    for threat in (LINF, L2):
        by = evaluation.threats[str(threat)].by
        remaining = evaluation.after_each(threat)
        assert list(remaining) == names
        for number, name in enumerate(names):
            broken = int(((by >= 0) & (by <= number)).sum())
            assert (remaining[name].hits, remaining[name].n) == (N - broken, N)
        assert remaining["clean"] == evaluation.accuracy["clean"]
        assert remaining[names[-1]] == evaluation.accuracy[threat]
    assert {1, 2} <= set(evaluation.threats["Linf 0.1"].by.tolist())


# kept points and the certificate


def test_kept_points_are_what_the_verdicts_say(with_points, evaluation, model, data):
    assert same_verdicts(with_points, evaluation)
    assert evaluation.threats["L1 1.0"].x_adv is None
    x = to_float(data.images)
    for name, verdicts in with_points.threats.items():
        threat, points, wrong = ThreatModel.parse(name), verdicts.x_adv, verdicts.by == 0
        logits = predict_logits(model, lambda at, p=points: p[at], N, pass_size(x.device), x.device)
        assert torch.equal(logits.argmax(1) != data.labels, ~verdicts.robust)
        assert torch.equal(points[wrong], x[wrong])
        length = norms(points.double() - x.double(), threat.norm)
        torch.testing.assert_close(verdicts.norm.double(), length, rtol=1e-5, atol=1e-6)
        certificate = with_points.record["certificate"][name]
        assert certificate["points"] == N - WRONG
        assert certificate["outside"] == 0
        assert certificate["largest_excess"] <= certificate["tolerance"] == 1e-6
        flat = points.flatten(1)
        excess = torch.stack([length - threat.eps, -flat.amin(1), flat.amax(1) - 1]).amax(0)
        largest = float(excess[~wrong].max())
        assert certificate["largest_excess"] == pytest.approx(largest, abs=1e-12)


# seeds, batches, progress and what is left unchanged


def test_the_seed_decides_the_verdicts(evaluation, model, data):
    repeated = evaluate(model, data, [LINF, L2, L1], steps=5, seed=3)
    assert same_verdicts(repeated, evaluation)
    assert torch.equal(repeated.margin, evaluation.margin)
    assert not same_verdicts(evaluate(model, data, [LINF, L2, L1], steps=5, seed=4), evaluation)


def test_a_verdict_does_not_depend_on_the_threats_before_it(evaluation, model, data):
    alone = evaluate(model, data, [L2], steps=5, seed=3)
    assert torch.equal(alone.threats["L2 0.5"].step, evaluation.threats["L2 0.5"].step)


@pytest.mark.parametrize("batch_size", [1, 7, 30, 250])
def test_padding_does_not_change_predictions(evaluation, model, data, batch_size):
    clean = evaluate(model, data, batch_size=batch_size)
    assert torch.equal(clean.prediction, evaluation.prediction)
    torch.testing.assert_close(clean.margin, evaluation.margin, rtol=1e-4, atol=1e-5)


def test_every_pass_has_one_shape():
    shapes = set()

    class Probe(nn.Module):
        def forward(self, x):
            shapes.add(tuple(x.shape))
            return x.flatten(1)

    x = torch.rand(10, 1, 2, 2)
    assert torch.equal(predict_logits(Probe(), lambda at: x[at], 10, 4, x.device), x.flatten(1))
    assert shapes == {(4, 1, 2, 2)}


@pytest.mark.parametrize("training", [True, False])
def test_a_given_network_is_left_unchanged(model, data, training):
    network = copy_of(model).train(training)
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    before = {
        name: (tensor.clone(), tensor.stride()) for name, tensor in network.state_dict().items()
    }
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    evaluation = evaluate(network, data, [LINF], steps=2)
    assert torch.equal(evaluation.prediction, evaluate(model, data).prediction)
    assert [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_a_checkpoint_and_its_path_are_evaluated_and_recorded(evaluation, model, data, tmp_path):
    network = {"spec": "resnet9:width=4", "channels": 1}
    checkpoint = Checkpoint.of(model, {"network": network})
    path = checkpoint.save(tmp_path / "a.safetensors")
    for source in (checkpoint, path, str(path)):
        same = evaluate(source, data, [LINF], steps=5, seed=3)
        assert torch.equal(same.threats["Linf 0.1"].robust, evaluation.threats["Linf 0.1"].robust)
        assert same.record["checkpoint"] == checkpoint.digest


def test_progress_counts_samples_times_threats_plus_1(model, data):
    reports = []
    evaluate(
        model,
        data,
        [LINF, L2],
        steps=2,
        batch_size=16,
        on_progress=lambda *report: reports.append(report),
    )
    done = [count for count, _, _ in reports]
    assert done == sorted(done)
    assert done[-1] == 3 * N
    assert {total for _, total, _ in reports} == {3 * N}
    assert all("clean" in figures for _, _, figures in reports)


def test_the_record_says_how_the_evaluation_was_made(evaluation, data):
    record = evaluation.to_json()
    assert record["data"] == data.record
    expected = {
        "split": "test",
        "samples": N,
        "threats": NAMES,
        "attack": "apgd",
        "steps": 5,
        "restarts": 1,
        "seed": 3,
        "precision": "float32",
        "loss": "ce",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "eot": 1,
        "search_precision": "float32",
        "broken_by": ["clean", "apgd-ce"],
        "rows": 32,
        "warnings": [],
    }
    assert {key: record[key] for key in expected} == expected
    clean = evaluation.accuracy["clean"]
    assert record["accuracy"]["clean"] == {
        "value": clean.value,
        "low": clean.low,
        "high": clean.high,
        "hits": clean.hits,
        "n": N,
    }


# wrong requests


@pytest.mark.parametrize(
    ("make_network", "message"),
    [
        (
            lambda: load_model("resnet9:width=2", channels=1, classes=7),
            r"\(2, 7\).*expected 10 classes",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()),
            r"does not take images of shape \(1, 8, 8\)",
        ),
        (lambda: nn.Conv2d(1, 10, 1), r"logits of shape \(2, 10, 8, 8\)"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(data, make_network, message):
    with pytest.raises(ModelError, match=message) as error:
        evaluate(make_network(), data, [LINF], steps=2)
    assert "\n" not in str(error.value)


def test_a_built_in_network_refuses_images_with_another_number_of_channels(data):
    """One grey channel minus three means would broadcast to three channels."""
    with pytest.raises(ModelError, match=r"does not take images of shape \(1, 8, 8\)"):
        evaluate(load_model("resnet9:width=2", channels=3), data)


def test_a_broken_network_is_refused(model, data):
    broken = copy_of(model)
    with torch.no_grad():
        broken.linear.weight[3, 2] = torch.nan
    with pytest.raises(Diverged, match="NaN or infinity"):
        evaluate(broken, data, [LINF], steps=2)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"steps": 0}, RequestError, "steps: got 0, expected at least 1"),
        ({"batch_size": 0}, RequestError, "batch_size: got 0"),
        (
            {"attack": "fgsm"},
            RequestError,
            'attack: got "fgsm", expected one of apgd, pgd, pma, malt, strong, square, autoattack',
        ),
        ({"stepps": 3}, RequestError, 'unknown setting "stepps"; did you mean "steps"'),
        ({"threats": ["Linf"]}, RequestError, 'got "Linf"'),
        ({"samples": 0}, DataError, "requested 0 samples"),
        ({"samples": N + 1}, DataError, "requested 61 samples, expected 1 to 60"),
        ({"device": "toaster"}, RequestError, 'device: "toaster"'),
        ({"precision": "float8"}, RequestError, 'precision: got "float8"'),
    ],
)
def test_a_wrong_setting_is_refused(model, data, wrong, error, message):
    with pytest.raises(error, match=message):
        evaluate(model, data, **{"threats": [LINF], **wrong})


# accuracy at chance


class ClassInFirstPixel(nn.Module):
    """A network whose prediction is the value of the first pixel."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.scale = classes, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), self.classes)


def split_with_hits(hits, n, classes):
    """Return n samples of class 0, whose first pixel is right in the first `hits`."""
    images = torch.ones(n, 1, 1, 1, dtype=torch.uint8)
    images[:hits] = 0
    names = [str(c) for c in range(classes)]
    record = {"name": "made", "split_digest": "made", "classes": names}
    return Split(images, torch.zeros(n, dtype=torch.long), torch.arange(n), "val", record)


@pytest.mark.parametrize(
    ("hits", "n", "classes"),
    [(10, 100, 10), (5, 50, 10), (15, 100, 10), (55, 100, 2), (100, 1000, 10), (100, 4000, 10)],
)
def test_clean_accuracy_near_chance_is_refused(hits, n, classes):
    message = r"mine\.pth: clean accuracy .* near chance .*collapsed soup"
    with pytest.raises(ModelError, match=message) as error:
        check_above_chance(
            ClassInFirstPixel(classes), split_with_hits(hits, n, classes), "mine.pth"
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hits", "n", "classes"),
    [(20, 100, 10), (5, 49, 10), (65, 100, 2), (30, 50, 100), (130, 1000, 10)],
)
def test_clean_accuracy_above_chance_or_of_few_samples_passes(hits, n, classes):
    check_above_chance(ClassInFirstPixel(classes), split_with_hits(hits, n, classes), "mine.pth")


def test_the_check_uses_at_most_1000_samples():
    check_above_chance(ClassInFirstPixel(10), split_with_hits(1000, 20_000, 10), "mine.pth")


def test_labels_outside_the_classes_are_refused():
    split = split_with_hits(3, 5, 10)
    split.labels[2] = 10
    with pytest.raises(DataError, match=re.escape("labels: got 0..10, expected 0..9")):
        evaluate(ClassInFirstPixel(10), split)

"""Evaluation: verdicts per sample that add up, come back from their files, and depend on the seed alone."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from robustsoup.attacks import run_attack
from robustsoup.attacks.forward import pass_size, predict_logits
from robustsoup.attacks.outcome import Outcome
from robustsoup.attacks.projections import norms
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split, load_data, to_float
from robustsoup.errors import CheckpointError, DataError, Diverged, ModelError, RequestError
from robustsoup.evaluation import attackers
from robustsoup.evaluation.doubts import warn_above_clean
from robustsoup.evaluation.evaluate import check_above_chance, evaluate
from robustsoup.evaluation.intervals import Accuracy, wilson
from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.models import load_model
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

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
    for end in (
        low,
        high,
    ):  # Wilson: the p whose distance from the estimate is z standard errors of p
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
        expected["union"] = [
            all(row) for row in zip(*(mask.tolist() for mask in robust.values()), strict=True)
        ]
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
        return Verdicts(
            drawn([True, False]), drawn([-1, 0]), drawn([-1, 0]), torch.zeros(n), torch.zeros(n)
        )

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
    others = torch.stack(
        [logits[i, [c for c in range(10) if c != data.labels[i]]].max() for i in range(60)]
    )
    torch.testing.assert_close(evaluation.margin, right - others, rtol=1e-4, atol=1e-5)
    assert torch.equal(evaluation.margin > 0, evaluation.prediction == evaluation.labels)
    for threat in (LINF, L2, L1):
        result = run_attack(
            model, x, data.labels, threat, AttackSettings(steps=5, seed=3), ids=data.ids
        )
        found = evaluation.threats[str(threat)]
        assert torch.equal(found.robust, ~result.broken)
        assert torch.equal(found.step, result.step)
        assert torch.equal(found.by[result.by >= 0], result.by[result.by >= 0] + 1)
        torch.testing.assert_close(
            found.norm, norms(result.x_adv - x, threat.norm), rtol=1e-3, atol=1e-3
        )


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
        assert torch.equal(verdicts.by == -1, verdicts.robust)
        assert torch.equal(verdicts.by == 0, wrong)
        assert torch.equal(verdicts.margin < 0, ~verdicts.robust)
        assert torch.equal(verdicts.margin[wrong], evaluation.margin[wrong])


def test_clean_threats_add_nothing(model, data):
    found = evaluate(model, data, ["clean", "Linf 0"], steps=2)
    assert list(found.accuracy) == ["clean"]
    assert evaluate(model, data).threats == {}


def test_samples_are_the_first_so_many(evaluation, model, data):
    found = evaluate(model, data, [LINF], steps=5, seed=3, samples=20)
    assert len(found.ids) == found.accuracy["clean"].n == found.record["samples"] == 20
    assert torch.equal(found.threats["Linf 0.1"].step, evaluation.threats["Linf 0.1"].step[:20])


# seeds, batches and what is left as it was

PARTS = ("robust", "by", "step", "norm", "margin")


def same_verdicts(left, right):
    return list(left.threats) == list(right.threats) and all(
        torch.equal(getattr(left.threats[name], part), getattr(right.threats[name], part))
        for name in left.threats
        for part in PARTS
    )


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
    assert torch.equal(predict_logits(Probe(), lambda at: x[at], 10, 4, x.device), x.flatten(1))
    assert shapes == {(4, 1, 2, 2)}


@pytest.mark.parametrize("training", [True, False])
def test_a_given_network_is_left_as_it_was(model, data, training):
    network = load_model("resnet9:width=4", channels=1)
    network.load_state_dict(model.state_dict())
    network.train(training)
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    before = {
        name: (tensor.clone(), tensor.stride()) for name, tensor in network.state_dict().items()
    }
    randomness = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = evaluate(network, data, [LINF], steps=2)
    assert torch.equal(found.prediction, evaluate(model, data).prediction)
    assert [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in network.parameters()
    )
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
    evaluate(
        model,
        data,
        [LINF, L2],
        steps=2,
        batch_size=16,
        on_progress=lambda *figures: told.append(figures),
    )
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
        "split": "test",
        "samples": 60,
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
    assert {key: told[key] for key in expected} == expected
    clean = evaluation.accuracy["clean"]
    assert told["accuracy"]["clean"] == {
        "value": clean.value,
        "low": clean.low,
        "high": clean.high,
        "hits": clean.hits,
        "n": 60,
    }


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
        lambda path: path.with_suffix(".npz").write_bytes(
            path.with_suffix(".npz").read_bytes()[:300]
        ),
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


# what broke a sample, and what is left after each attempt


def test_what_broke_a_sample_is_told_by_name(model, data):
    found = evaluate(
        model, data, [LINF, L2], steps=3, loss="targeted dlr", targets=2, restarts=2, attack="apgd"
    )
    names = [
        "clean",
        "apgd-t target 1",
        "apgd-t target 2",
        "apgd-t target 1 restart 2",
        "apgd-t target 2 restart 2",
    ]
    assert found.record["broken_by"] == names
    assert {key: found.record[key] for key in ("loss", "targets", "restarts")} == {
        "loss": "targeted dlr",
        "targets": 2,
        "restarts": 2,
    }
    for threat in (LINF, L2):
        by = found.threats[str(threat)].by
        left = found.after_each(threat)
        assert list(left) == names
        gone = 0
        for number, name in enumerate(names):
            gone += int((by == number).sum())
            assert (left[name].hits, left[name].n) == (60 - gone, 60)
        assert left["clean"] == found.accuracy["clean"]
        assert left[names[-1]] == found.accuracy[threat]
    assert {1, 2} <= set(found.threats["Linf 0.1"].by.tolist())


def test_pgd_and_other_losses_are_evaluated(evaluation, model, data):
    scores = {}
    for asked in (
        {"attack": "pgd"},
        {"loss": "dlr"},
        {"precision": "bfloat16"},
        {"restarts": 3},
        {"eot": 2},
    ):
        found = evaluate(model, data, [LINF], steps=5, seed=3, **asked)
        key, value = next(iter(asked.items()))
        assert found.record["search_precision" if key == "precision" else key] == value
        assert found.record["precision"] == "float32"
        scores[value] = found.accuracy[LINF].hits
        assert found.record["certificate"]["Linf 0.1"]["outside"] == 0
    plain = evaluation.accuracy[LINF].hits
    assert scores[3] <= plain == scores[2]  # the network is not random: averaging changes nothing
    assert max(scores.values()) < evaluation.accuracy["clean"].hits
    assert scores["pgd"] >= scores[3]


# the certificate, and points that are kept


@pytest.fixture(scope="module")
def kept(model, data):
    return evaluate(model, data, [LINF, L2, L1], steps=5, seed=3, keep_points=True)


def test_kept_points_are_what_the_verdicts_say(kept, evaluation, model, data):
    assert same_verdicts(kept, evaluation)
    assert evaluation.threats["L1 1.0"].x_adv is None
    x = to_float(data.images)
    for name, verdicts in kept.threats.items():
        threat = ThreatModel.parse(name)
        fooled = (
            predict_logits(
                model, lambda at, v=verdicts: v.x_adv[at], 60, pass_size(x.device), x.device
            ).argmax(1)
            != data.labels
        )
        assert torch.equal(fooled, ~verdicts.robust)
        wrong = verdicts.by == 0
        assert torch.equal(verdicts.x_adv[wrong], x[wrong])
        length = norms(verdicts.x_adv.double() - x.double(), threat.norm)
        torch.testing.assert_close(verdicts.norm.double(), length, rtol=1e-5, atol=1e-6)
        told = kept.record["certificate"][name]
        assert told["points"] == int((~wrong).sum())
        assert told["outside"] == 0
        assert told["largest_excess"] <= told["tolerance"] == 1e-6
        excess = torch.stack(
            [
                length - threat.eps,
                -verdicts.x_adv.flatten(1).amin(1),
                verdicts.x_adv.flatten(1).amax(1) - 1,
            ]
        )
        assert told["largest_excess"] == pytest.approx(
            float(excess.amax(0)[~wrong].max()), abs=1e-12
        )


def test_kept_points_come_back_from_their_file(kept, tmp_path):
    path = kept.save(tmp_path / "eval.json")
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "eval.json",
        "eval.npz",
        "eval.points.npz",
    ]
    read = Evaluation.load(path)
    assert same_verdicts(read, kept)
    for name, verdicts in kept.threats.items():
        assert torch.equal(read.threats[name].x_adv, verdicts.x_adv)
        assert read.threats[name].x_adv.dtype == torch.float32
    assert read.record == json.loads(json.dumps(kept.record))
    path.with_suffix(".points.npz").unlink()
    assert Evaluation.load(path).threats["L2 0.5"].x_adv is None
    path.with_suffix(".points.npz").write_bytes(b"text")
    with pytest.raises(CheckpointError, match=r"eval\.json"):
        Evaluation.load(path)


def test_points_of_an_earlier_evaluation_do_not_pass_for_those_of_a_later_one(
    kept, evaluation, tmp_path
):
    kept.save(tmp_path / "eval.json")
    read = Evaluation.load(evaluation.save(tmp_path / "eval.json"))
    assert all(verdicts.x_adv is None for verdicts in read.threats.values())


# pools of points


@pytest.fixture(scope="module")
def other(model):
    """Another network, not far from the first."""
    network = load_model("resnet9:width=4", channels=1)
    network.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor += 0.1 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)
    return network.eval()


class Counted(nn.Module):
    """The same network; it counts its passes with and without a gradient, and may take its time."""

    passes = {True: 0, False: 0}  # noqa: RUF012  (outside of the instance: evaluate works on a copy)

    def __init__(self, network, seconds=0.0):
        super().__init__()
        self.network, self.seconds = network, seconds
        self.train(network.training)

    def forward(self, x):
        self.passes[x.requires_grad] += 1
        time.sleep(self.seconds)
        return self.network(x)


@pytest.fixture
def passes():
    Counted.passes.update({True: 0, False: 0})
    return Counted.passes


def test_points_of_one_network_are_tried_on_another(kept, other, data, passes):
    alone = evaluate(other, data, [LINF, L2], steps=5, seed=3)
    pooled = evaluate(
        Counted(other), data, [LINF, L2], steps=5, seed=3, pool=[kept], keep_points=True
    )
    assert pooled.record["broken_by"] == ["clean", "apgd-ce", "pool"]
    assert torch.equal(pooled.prediction, alone.prediction)
    x = to_float(data.images)
    for name, found in pooled.threats.items():
        points = kept.threats[name].x_adv
        transferred = (
            predict_logits(
                other, lambda at, p=points: p[at], 60, pass_size(x.device), x.device
            ).argmax(1)
            != data.labels
        )
        transferred &= pooled.prediction == data.labels
        assert 0 < int(transferred.sum()) < 60
        assert torch.equal(found.by == 2, transferred)
        assert bool((found.step[transferred] == -1).all())
        assert bool((found.margin[transferred] < 0).all())
        assert torch.equal(found.x_adv[transferred], points[transferred])
        assert torch.equal(found.norm[transferred], kept.threats[name].norm[transferred])
        for part in PARTS:  # what the pool did not break was attacked as if there were none
            assert torch.equal(
                getattr(found, part)[~transferred], getattr(alone.threats[name], part)[~transferred]
            )
        assert pooled.record["certificate"][name]["points"] == int(
            (pooled.prediction == data.labels).sum()
        )
        assert pooled.record["certificate"][name]["outside"] == 0
    assert passes[True] > 0


def test_points_that_are_not_in_the_ball_are_told(kept, other, data):
    far = {
        name: replace(v, x_adv=(v.x_adv + 0.5).clamp(max=1.0)) for name, v in kept.threats.items()
    }
    found = evaluate(other, data, [LINF], steps=2, pool=[replace(kept, threats=far)])
    told = found.record["certificate"]["Linf 0.1"]
    assert told["outside"] > 0
    assert told["largest_excess"] > 0.1
    assert f"{told['outside']} points lie outside the ball or the box of Linf 0.1" in found.warnings


def test_a_pool_must_have_points_of_the_same_samples_and_threats(kept, evaluation, model, data):
    for asked in (
        {"pool": [evaluation]},
        {"pool": [kept], "threats": ["Linf 0.2"]},
        {"pool": [kept, evaluation]},
    ):
        with pytest.raises(
            RequestError,
            match=r"pool: an evaluation kept no points for .*; evaluate it again with keep_points=True",
        ):
            evaluate(model, data, **{"threats": [LINF], **asked})
    shifted = replace(data, ids=data.ids + 1)
    for asked in ({"pool": [kept]}, {"after": kept}):
        with pytest.raises(
            RequestError, match="pool and after must be evaluations of the same samples"
        ):
            evaluate(model, shifted, [LINF], **asked)
        with pytest.raises(RequestError, match="the same samples"):
            evaluate(model, load_data("digits").test.first(61), [LINF], **asked)


# going on from an earlier evaluation


def test_after_the_very_same_attack_nothing_is_attacked_again(kept, model, data, passes):
    again = evaluate(
        Counted(model), data, [LINF, L2, L1], steps=5, seed=3, after=kept, keep_points=True
    )
    assert passes == {True: 0, False: 1}  # only the look whether the network fits
    assert same_verdicts(again, kept)
    assert torch.equal(again.prediction, kept.prediction)
    assert torch.equal(again.margin, kept.margin)
    assert all(torch.equal(v.x_adv, kept.threats[name].x_adv) for name, v in again.threats.items())
    assert again.record["after"]["steps"] == 5
    fewer = evaluate(Counted(model), data, [L2], steps=5, seed=3, samples=20, after=kept)
    assert torch.equal(fewer.threats["L2 0.5"].step, kept.threats["L2 0.5"].step[:20])
    assert passes[True] == 0


@pytest.mark.parametrize(
    "asked",
    [
        {"steps": 10},
        {"seed": 4},
        {"loss": "dlr"},
        {"attack": "pgd"},
        {"restarts": 2},
        {"eot": 2},
        {"batch_size": 16},
        {"precision": "bfloat16"},
        {"loss": "targeted dlr", "targets": 2},
    ],
    ids=str,
)
def test_after_another_attack_what_was_broken_stays_broken_and_the_rest_is_attacked(
    evaluation, model, data, passes, asked
):
    again = evaluate(
        Counted(model), data, [LINF], **{"steps": 5, "seed": 3, "after": evaluation, **asked}
    )
    alone = evaluate(model, data, [LINF], **{"steps": 5, "seed": 3, **asked})
    earlier, found = evaluation.threats["Linf 0.1"], again.threats["Linf 0.1"]
    assert passes[True] > 0
    assert torch.equal(found.robust, earlier.robust & alone.threats["Linf 0.1"].robust)
    gone = ~earlier.robust
    for part in ("step", "norm", "margin"):
        assert torch.equal(getattr(found, part)[gone], getattr(earlier, part)[gone])
        least = torch.minimum(
            getattr(earlier, part), getattr(alone.threats["Linf 0.1"], part)
        )  # of all that was seen
        expected = least if part == "margin" else getattr(alone.threats["Linf 0.1"], part)
        assert torch.equal(getattr(found, part)[~gone], expected[~gone])
    names = again.record["broken_by"]
    assert {names[by] for by in found.by[gone].tolist()} == {"clean", "apgd-ce"}
    assert torch.equal(again.prediction, evaluation.prediction)
    assert len(again.after_each(LINF)) == len(names) == len(set(names))


def test_after_another_threat_that_threat_is_attacked(evaluation, model, data):
    again = evaluate(model, data, ["Linf 0.05", L2], steps=5, seed=3, after=evaluation)
    alone = evaluate(model, data, ["Linf 0.05", L2], steps=5, seed=3)
    assert same_verdicts(again, alone)


def test_the_pools_name_stays_when_it_is_gone(kept, other, data):
    pooled = evaluate(other, data, [LINF], steps=5, seed=3, pool=[kept])
    again = evaluate(other, data, [LINF], steps=8, loss="dlr", after=pooled)
    assert again.record["broken_by"] == ["clean", "apgd-dlr", "apgd-ce", "pool"]
    was, now = pooled.threats["Linf 0.1"].by, again.threats["Linf 0.1"].by
    assert torch.equal(now == 3, was == 2)
    assert torch.equal(now == 2, was == 1)
    assert bool((was[now == 1] == -1).all())


def test_warnings_are_handed_on(kept, model, data):
    doubtful = replace(kept, record={**kept.record, "warnings": ["made on a Monday"]})
    assert evaluate(model, data, [LINF], steps=2, after=doubtful).warnings == ["made on a Monday"]


@pytest.fixture
def brief_autoattack(monkeypatch):
    """AutoAttack with fewer steps and queries than the standard has."""
    pytest.importorskip("pyautoattack")
    plan = attackers.plan_autoattack

    def plan_briefly(classes, threat):
        return replace(plan(classes, threat), queries=5, steps=2)

    monkeypatch.setattr(attackers, "plan_autoattack", plan_briefly)


def test_autoattack_goes_by_the_same_rules(model, data, passes, brief_autoattack):
    asked = {"threats": [ThreatModel("Linf", 0.03)], "attack": "autoattack"}
    found = evaluate(Counted(model), data, **asked, keep_points=True)
    assert found.record["broken_by"] == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    verdicts = found.threats["Linf 0.03"]
    assert torch.equal(verdicts.margin < 0, ~verdicts.robust)
    assert found.record["certificate"]["Linf 0.03"]["outside"] == 0
    assert 0 < found.accuracy["Linf 0.03"].hits < found.accuracy["clean"].hits
    passes[True] = 0
    again = evaluate(Counted(model), data, **asked, after=found)
    assert passes[True] == 0
    assert same_verdicts(again, found)


@pytest.mark.parametrize("before", ["pool", "after"])
def test_what_is_broken_before_autoattack_stays_broken(other, data, before, brief_autoattack):
    strong = evaluate(other, data, [LINF], steps=50, restarts=3, keep_points=True)
    given = {"pool": [strong]} if before == "pool" else {"after": strong}
    found = evaluate(other, data, [LINF], attack="autoattack", **given)
    assert not bool((found.threats["Linf 0.1"].robust & ~strong.threats["Linf 0.1"].robust).any())


# giving up early


def test_stop_below_gives_up_once_fewer_survive(evaluation, model, data, passes):
    whole = evaluate(Counted(model), data, [LINF], steps=5, seed=3, restarts=3)
    cost, left = passes[True], whole.accuracy[LINF].hits
    passes[True] = 0
    stopped = evaluate(Counted(model), data, [LINF], steps=5, seed=3, restarts=3, stop_below=50)
    assert passes[True] < cost
    assert stopped.record["stopped"] is True
    assert stopped.record["stop_below"] == 50
    assert left < stopped.accuracy[LINF].hits < 50
    assert bool((stopped.threats["Linf 0.1"].robust | ~whole.threats["Linf 0.1"].robust).all())
    for least in (left, left - 1, 1):  # never fewer than that: nothing changes
        found = evaluate(model, data, [LINF], steps=5, seed=3, restarts=3, stop_below=least)
        assert "stopped" not in found.record
        assert same_verdicts(found, whole)
    again = evaluate(model, data, [LINF], steps=5, seed=3, restarts=3, after=stopped)
    assert "stopped" not in again.record
    assert same_verdicts(again, whole)


@pytest.mark.parametrize("threats", [[], ["clean"], [LINF, L2]])
def test_stop_below_is_for_one_threat(model, data, threats):
    with pytest.raises(RequestError, match=r"stop_below: got \d threats, expected one"):
        evaluate(model, data, threats, stop_below=3)


# warnings


def scaled(model, factor):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model

        def forward(self, x):
            return factor * self.network(x)

    return Scaled().eval()


class Wrapped(nn.Module):
    """A network with something done to its inputs or answers."""

    def __init__(self, network, before=None, after=None):
        super().__init__()
        self.network, self.before, self.after = (
            network,
            before or (lambda x: x),
            after or (lambda logits: logits),
        )
        self.eval()

    def forward(self, x):
        return self.after(self.network(self.before(x)))


def test_zero_gradients_are_told_and_dlr_sees_through_them(model, data):
    """Logits times 10,000: cross-entropy is exactly 0 in float32, and so is its gradient."""
    masked = Wrapped(model, after=lambda logits: 10_000 * logits)
    blind, seeing = (
        evaluate(masked, data, ["Linf 0.05"], steps=5, loss=loss) for loss in ("ce", "dlr")
    )
    zero = re.search(
        r"the gradient is exactly zero at the start for (\d+) of (\d+) attacked samples",
        blind.warnings[0],
    )
    assert int(zero[2]) == blind.accuracy["clean"].hits
    assert 0 < int(zero[1]) <= int(zero[2])
    assert "try loss dlr" in blind.warnings[0]
    assert seeing.warnings == []
    assert seeing.accuracy["Linf 0.05"].hits < blind.accuracy["Linf 0.05"].hits


def test_a_network_that_rounds_its_inputs_is_told(model, data):
    found = evaluate(Wrapped(model, before=lambda x: (x * 8).round() / 8), data, [LINF], steps=2)
    n = found.accuracy["clean"].hits
    assert f"zero at the start for {n} of {n} attacked samples" in found.warnings[0]


def test_a_network_without_any_gradient_is_told_too(model, data):
    found = evaluate(Wrapped(model, before=lambda x: (x * 8).long() / 8), data, [LINF], steps=2)
    assert "the gradient is exactly zero" in found.warnings[0]


def test_random_answers_are_told(model, data):
    generator = torch.Generator().manual_seed(0)
    noisy = Wrapped(
        model, after=lambda logits: logits + 0.1 * torch.randn(logits.shape, generator=generator)
    )
    assert evaluate(noisy, data).warnings == [
        "the network's outputs differ between two calls; attack it with eot above 1"
    ]
    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    assert evaluate(dropping.eval(), data).warnings == []


def test_probabilities_are_told(model, data):
    sure = evaluate(Wrapped(model, after=lambda logits: logits.softmax(1)), data, [LINF], steps=2)
    assert [text for text in sure.warnings if "sum to 1: probabilities, not logits" in text]
    assert evaluate(Wrapped(model, after=lambda logits: logits.log_softmax(1)), data).warnings == []


def test_train_mode_is_told(model, data):
    network = load_model("resnet9:width=4", channels=1)
    network.load_state_dict(model.state_dict())
    assert evaluate(network.eval(), data).warnings == []
    network.layer1.train()
    found = evaluate(network, data, [LINF], steps=2)
    assert found.warnings == ["the network was in train mode; it was evaluated in eval mode"]
    assert torch.equal(found.prediction, evaluate(model, data).prediction)


class NotANumber(Wrapped):
    """NaN for class 3 at whatever is not a clean image."""

    def forward(self, x):
        attacked = ((x * 255).round() / 255 - x).abs().flatten(1).amax(1) > 1e-4
        return torch.where(attacked[:, None] & (torch.arange(10) == 3), torch.nan, self.network(x))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_nan_at_attacked_points_is_told(model, data, precision):
    threes = data.labels == 3
    others = replace(
        data, images=data.images[~threes], labels=data.labels[~threes], ids=data.ids[~threes]
    )
    found = evaluate(NotANumber(model), others, [LINF], steps=2, precision=precision)
    assert [
        text
        for text in found.warnings
        if re.fullmatch(r"the logits held NaN at \d+ attacked points", text)
    ]


def test_robust_accuracy_above_clean_is_told(evaluation):
    correct = evaluation.prediction == evaluation.labels
    assert warn_above_clean(correct, evaluation.threats) == []
    lucky = replace(evaluation.threats["L2 0.5"], robust=torch.ones(60, dtype=torch.bool))
    told = warn_above_clean(correct, {"L2 0.5": lucky, "Linf 0.1": evaluation.threats["Linf 0.1"]})
    assert len(told) == 1
    assert told[0].startswith("accuracy under L2 0.5 is above clean accuracy (100.0%, ")


def test_warnings_come_back_from_their_file(model, data, tmp_path):
    found = evaluate(Wrapped(model, before=lambda x: (x * 8).round() / 8), data, [LINF], steps=2)
    assert len(found.warnings) == 1
    read = Evaluation.load(found.save(tmp_path / "eval.json"))
    assert (
        read.warnings
        == found.warnings
        == json.loads((tmp_path / "eval.json").read_text())["warnings"]
    )


# cut off, and going on


@pytest.mark.parametrize(
    ("precision", "share", "left"),
    [("float32", 0.4, 1.0), ("bfloat16", 0.4, 1.0), ("float32", 0.8, 0.6)],
)
def test_interrupted_it_goes_on_sample_by_sample(
    model, data, tmp_path, passes, precision, share, left
):
    state, told = tmp_path / "deep" / "state.pt", []
    asked = {
        "threats": [LINF, L2],
        "steps": 20,
        "seed": 3,
        "restarts": 2,
        "batch_size": 8,
        "keep_points": True,
        "precision": precision,
    }
    whole = evaluate(Counted(model), data, **asked)
    cost = passes[True]

    def stop(done, total, figures):
        told.append(done)
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Counted(model, seconds=0.005), data, **asked, state_path=state, on_progress=stop)
    assert state.exists()
    reached = told[-1]
    passes[True] = 0
    found = evaluate(
        Counted(model),
        data,
        **asked,
        state_path=state,
        on_progress=lambda *said: told.append(said[0]),
    )
    assert 0 < passes[True] < left * cost
    assert same_verdicts(found, whole)
    assert all(torch.equal(v.x_adv, whole.threats[name].x_adv) for name, v in found.threats.items())
    assert found.record["certificate"] == whole.record["certificate"]
    assert max(told[told.index(reached) + 1 :]) == 180
    assert not state.exists()


def test_what_was_being_written_when_the_state_was_saved_is_dropped():
    """`settled` is written last and saved first: a sample that is not settled may be half written."""
    state = Outcome.blank(4).snapshot()
    state["settled"], state["broken"] = (
        torch.tensor([2, 0, 1, 2]),
        torch.tensor([True, True, False, False]),
    )
    state["by"], state["step"] = torch.tensor([1, 0, 0, -1]), torch.tensor([5, 3, 3, -1])
    outcome = Outcome.blank(4)
    outcome.restore(state, 2)
    assert outcome.broken.tolist() == [True, False, False, False]
    assert outcome.by.tolist() == [1, -1, -1, -1]
    assert outcome.step.tolist() == [5, -1, -1, -1]
    assert outcome.settled.tolist() == [2, 0, 1, 2]


def test_interrupted_it_remembers_what_to_warn_of(model, data, tmp_path):
    network = Counted(Wrapped(model, before=lambda x: (x * 8).round() / 8), seconds=0.01)
    asked = {"threats": [LINF], "steps": 20}

    def stop(done, total, figures):
        if done > 90:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(network, data, **asked, state_path=tmp_path / "state.pt", on_progress=stop)
    found = evaluate(network, data, **asked, state_path=tmp_path / "state.pt")
    assert found.warnings == evaluate(network, data, **asked).warnings


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from robustsoup import evaluate, load_data
from robustsoup.progress import SavedState

torch.set_num_threads(1)
SavedState.__init__.__defaults__ = (0.0,)  # saved whenever there is news, not every 30 s
network, state = sys.argv[1:]

def stop(done, total, figures):
    if done > 0.5 * total and Path(state).exists():
        os.kill(os.getpid(), signal.SIGKILL)

evaluate(network, load_data("digits").test.first(60), ["Linf 0.1", "L2 0.5"], steps=20, seed=3, restarts=8, state_path=state,
         on_progress=stop)
"""


def test_killed_it_goes_on(model, data, tmp_path):
    path = Checkpoint.of(model, {"network": {"spec": "resnet9:width=4", "channels": 1}}).save(
        tmp_path / "a.safetensors"
    )
    state = tmp_path / "state.pt"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(state)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("state")] == ["state.pt"]
    told, asked = [], {"threats": [LINF, L2], "steps": 20, "seed": 3, "restarts": 8}
    found = evaluate(
        path, data, **asked, state_path=state, on_progress=lambda *figures: told.append(figures[0])
    )
    assert same_verdicts(found, evaluate(path, data, **asked))
    assert told[1] >= 0.5 * told[-1]  # what was settled is not done again
    assert not state.exists()


def test_a_state_of_other_settings_or_another_network_is_refused(
    kept, model, other, data, tmp_path
):
    state = tmp_path / "state.pt"

    def stop(done, total, figures):
        if done > 60:
            raise KeyboardInterrupt

    asked = {"network": model, "data": data, "threats": [LINF], "steps": 5, "seed": 3}
    with pytest.raises(KeyboardInterrupt):
        evaluate(**asked, state_path=state, on_progress=stop)
    before = state.read_bytes()
    for change in (
        {"steps": 6},
        {"seed": 4},
        {"loss": "dlr"},
        {"attack": "pgd"},
        {"restarts": 2},
        {"eot": 2},
        {"network": other},
        {"precision": "bfloat16"},
        {"batch_size": 10},
        {"keep_points": True},
        {"pool": [kept]},
        {"after": kept},
        {"stop_below": 3},
        {"data": data.first(59)},
    ):
        with pytest.raises(CheckpointError, match=r"state\.pt: saved by work with other settings"):
            evaluate(**(asked | change), state_path=state)
        assert state.read_bytes() == before
    state.write_bytes(before[:100])
    with pytest.raises(
        CheckpointError,
        match=r"state\.pt: the saved state cannot be read .*; delete it to start again",
    ):
        evaluate(**asked, state_path=state)


# wrong requests


@pytest.mark.parametrize(
    ("network", "text"),
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
        (
            {"attack": "fgsm"},
            RequestError,
            'attack: got "fgsm", expected one of apgd, pgd, autoattack',
        ),
        ({"threats": ["Linf"]}, RequestError, 'got "Linf"'),
        ({"samples": 0}, DataError, "requested 0 samples"),
        ({"samples": 61}, DataError, "requested 61 samples, expected 1 to 60"),
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
    with pytest.raises(
        ModelError, match=r"mine\.pth: clean accuracy .* near chance .*--normalize MEAN STD"
    ) as told:
        check_above_chance(Reads(classes), with_hits(hits, n, classes), "mine.pth")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("hits", "n", "classes"),
    [(20, 100, 10), (5, 49, 10), (65, 100, 2), (30, 50, 100), (130, 1000, 10)],
)
def test_clean_accuracy_above_chance_or_of_too_few_samples_passes(hits, n, classes):
    check_above_chance(Reads(classes), with_hits(hits, n, classes), "mine.pth")


def test_chance_is_judged_on_a_thousand_samples_at_most():
    check_above_chance(Reads(10), with_hits(1000, 20_000, 10), "mine.pth")

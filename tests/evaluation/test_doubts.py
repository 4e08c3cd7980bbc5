"""Warnings: reasons to doubt an evaluation, which its record holds."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluated_networks import LINF, N, Wrapped, rounding
from torch import nn

from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.models import load_model


def test_zero_gradients_are_reported_and_dlr_sees_through_them(model, data):
    """With logits times 2^14, cross-entropy and its gradient are exactly 0 in float32.

    A power of two changes no bit of DLR and of its gradient.
    """
    masked = Wrapped(model, after=lambda logits: 2**14 * logits)
    by_ce, by_dlr = (
        evaluate(masked, data, ["Linf 0.05"], steps=5, loss=loss) for loss in ("ce", "dlr")
    )
    counts = re.search(
        r"the gradient is exactly zero at the start for (\d+) of (\d+) attacked samples",
        by_ce.warnings[0],
    )
    assert int(counts[2]) == by_ce.accuracy["clean"].hits
    assert 0 < int(counts[1]) <= int(counts[2])
    assert "try loss dlr" in by_ce.warnings[0]
    unmasked = evaluate(model, data, ["Linf 0.05"], steps=5, loss="dlr")
    assert by_dlr.warnings == unmasked.warnings
    for part in ("robust", "by", "step", "norm"):
        found, expected = (getattr(e.threats["Linf 0.05"], part) for e in (by_dlr, unmasked))
        assert torch.equal(found, expected), part
    assert by_dlr.accuracy["Linf 0.05"].hits < by_ce.accuracy["Linf 0.05"].hits


def test_a_network_that_rounds_its_inputs_is_reported(model, data):
    evaluation = evaluate(rounding(model), data, [LINF], steps=10)
    n = evaluation.accuracy["clean"].hits
    wrong_or_fooled_at_the_start = int((evaluation.threats["Linf 0.1"].step == 0).sum())
    zero = N - wrong_or_fooled_at_the_start
    assert f"zero at the start for {zero} of {n} attacked samples" in evaluation.warnings[0]
    assert evaluation.warnings[0].endswith("try attack square")


def test_a_network_without_any_gradient_is_reported(model, data):
    network = Wrapped(model, before=lambda x: (x * 8).long() / 8)
    evaluation = evaluate(network, data, [LINF], steps=2)
    assert "the gradient is exactly zero" in evaluation.warnings[0]


def test_flat_logits_are_reported_where_cross_entropy_attacks(model, data):
    flat = Wrapped(model, after=lambda logits: logits / 1e4)
    by_ce, by_dlr = (evaluate(flat, data, [LINF], steps=2, loss=loss) for loss in ("ce", "dlr"))
    told = [text for text in by_ce.warnings if "cross-entropy is almost flat" in text]
    assert len(told) == 1
    assert told[0].endswith("try loss dlr")
    for evaluation in (by_dlr, evaluate(model, data, [LINF], steps=2), evaluate(flat, data)):
        assert not any("almost flat" in text for text in evaluation.warnings)


def test_flat_logits_below_a_raised_highest_one_are_reported(model, data):
    def raise_highest(logits):
        return 1e-3 * logits + nn.functional.one_hot(logits.argmax(1), logits.shape[1])

    warnings = evaluate(Wrapped(model, after=raise_highest), data, [LINF], steps=2).warnings
    assert sum("cross-entropy is almost flat" in text for text in warnings) == 1


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: float(torch.rand(()))])
def test_a_network_that_draws_numbers_is_reported_though_two_calls_agree(model, data, draw):
    def keep(logits):
        draw()
        return logits

    (warning,) = evaluate(Wrapped(model, after=keep), data).warnings
    assert warning.startswith("the network draws random numbers")


def test_a_stochastic_network_is_reported(model, data):
    generator = torch.Generator().manual_seed(0)
    noisy = Wrapped(
        model, after=lambda logits: logits + 0.1 * torch.randn(logits.shape, generator=generator)
    )
    assert evaluate(noisy, data).warnings == [
        "the network's outputs differ between two calls; attack it with eot above 1"
    ]
    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    assert evaluate(dropping.eval(), data).warnings == []


def test_probabilities_are_reported(model, data):
    softmax = Wrapped(model, after=lambda logits: logits.softmax(1))
    warnings = evaluate(softmax, data, [LINF], steps=2).warnings
    assert [text for text in warnings if "sum to 1: probabilities, not logits" in text]
    log_softmax = Wrapped(model, after=lambda logits: logits.log_softmax(1))
    assert evaluate(log_softmax, data).warnings == []


def test_train_mode_is_reported(model, data):
    network = load_model("resnet9:width=4", channels=1)
    network.load_state_dict(model.state_dict())
    assert evaluate(network.eval(), data).warnings == []
    network.layer1.train()
    evaluation = evaluate(network, data, [LINF], steps=2)
    assert evaluation.warnings == ["the network was in train mode; it was evaluated in eval mode"]
    assert torch.equal(evaluation.prediction, evaluate(model, data).prediction)


class NanUnderAttack(Wrapped):
    """A network with NaN for class 3 at every input that is not a clean image."""

    def forward(self, x):
        attacked = ((x * 255).round() / 255 - x).abs().flatten(1).amax(1) > 1e-4
        return torch.where(attacked[:, None] & (torch.arange(10) == 3), torch.nan, self.network(x))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_nan_at_attacked_points_is_reported(model, data, precision):
    rows = data.labels != 3
    others = replace(data, images=data.images[rows], labels=data.labels[rows], ids=data.ids[rows])
    evaluation = evaluate(NanUnderAttack(model), others, [LINF], steps=2, precision=precision)
    pattern = r"the logits held NaN at \d+ attacked points"
    assert [text for text in evaluation.warnings if re.fullmatch(pattern, text)]


def test_warnings_come_back_from_their_file(model, data, tmp_path):
    evaluation = evaluate(rounding(model), data, [LINF], steps=10)
    assert len(evaluation.warnings) == 2
    loaded = Evaluation.load(evaluation.save(tmp_path / "eval.json"))
    record = json.loads((tmp_path / "eval.json").read_text())
    assert loaded.warnings == evaluation.warnings == record["warnings"]


def test_warnings_of_an_earlier_evaluation_are_kept(with_points, model, data):
    doubtful = replace(with_points, record={**with_points.record, "warnings": ["seen before"]})
    assert evaluate(model, data, [LINF], steps=2, after=doubtful).warnings == ["seen before"]


def test_points_outside_the_ball_are_reported(with_points, neighbour, data):
    far = {
        name: replace(v, x_adv=(v.x_adv + 0.5).clamp(max=1.0))
        for name, v in with_points.threats.items()
    }
    pool = [replace(with_points, threats=far)]
    evaluation = evaluate(neighbour, data, [LINF], steps=2, pool=pool)
    certificate = evaluation.record["certificate"]["Linf 0.1"]
    assert certificate["outside"] > 0
    assert certificate["largest_excess"] > 0.1
    warning = f"{certificate['outside']} points lie outside the ball or the box of Linf 0.1"
    assert warning in evaluation.warnings

"""The dial: a line of soups, learned in one run."""

import dataclasses

import pytest
import torch
from learning_helpers import LAYERS, learn_digits, resnet_ingredients
from torch import nn
from trained_seed import trained_seed
from training_helpers import DATA, DIGITS, LINF, VAL, interrupt_at

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data.splits import Augmentation
from robustsoup.errors import CoefficientError, RequestError
from robustsoup.settings import DialSettings, LearnSettings
from robustsoup.soups.coefficients import Coefficients, Dial, load_coefficients
from robustsoup.soups.learning import learn_dial
from robustsoup.soups.mixing import mix


def learn_digits_dial(items=None, **changes):
    """Learn a dial for two epochs of three steps; `changes` are arguments of `learn_dial`."""
    arguments = {
        "threat": LINF,
        "epochs": 2,
        "batch_size": 32,
        "device": "cpu",
        "precision": "float32",
        "detach": 0.3,
        "seed": trained_seed(),
    }
    return learn_dial(items or resnet_ingredients(), DATA, **(arguments | changes))


def test_a_dial_is_a_line_of_logits():
    dial = learn_digits_dial()
    robust, middle, clean = (dial.at(t) for t in (0.0, 0.5, 1.0))
    assert isinstance(robust, Coefficients)
    assert torch.allclose(middle.alpha, torch.softmax(dial.line[0], 1))
    for t in (0.0, 0.25, 0.9):
        logits = dial.line[0] + (2 * t - 1) * dial.line[1]
        assert torch.allclose(dial.at(t).alpha, torch.softmax(logits, 1))
    assert not torch.equal(robust.alpha, clean.alpha)
    assert torch.equal(dial.start[1], torch.zeros(LAYERS, 3, dtype=torch.float64))
    assert robust.record["at"] == 0.0
    robust.check(3)


def test_a_dial_that_stays_at_one_half_learns_the_soup_of_mixed_one_half(monkeypatch):
    real = torch.rand

    def draw_one_half(*size, **options):
        drawn = real(*size, **options)
        return torch.full_like(drawn, 0.5) if size == ((),) else drawn

    monkeypatch.setattr(torch, "rand", draw_one_half)
    dial, soup = learn_digits_dial(), learn_digits(objective="mixed 0.5", detach=0.3)
    assert float(dial.line[1].abs().max()) == 0
    assert torch.equal(dial.at(0.5).alpha, soup.alpha)


@pytest.mark.parametrize("by", ["objective", "eps"])
@pytest.mark.parametrize("kills", [[2], [3, 5]])
def test_a_killed_dial_resumes_bit_for_bit(save_every_step, tmp_path, by, kills):
    path = tmp_path / "state.pt"
    for step in kills:
        with pytest.raises(KeyboardInterrupt):
            learn_digits_dial(by=by, turn_every=2, state_path=path, on_progress=interrupt_at(step))
    resumed = learn_digits_dial(by=by, turn_every=2, state_path=path)
    whole = learn_digits_dial(by=by, turn_every=2)
    assert torch.equal(resumed.line, whole.line)
    assert resumed.record == whole.record


def test_what_the_dial_controls_changes_the_line():
    by_objective, by_eps = learn_digits_dial(by="objective"), learn_digits_dial(by="eps")
    assert not torch.equal(by_objective.line, by_eps.line)
    assert by_eps.record["learning"]["dial"] == {"by": "eps", "turn_every": 4}


def test_the_dial_takes_its_settings_from_an_object_or_by_name():
    dial = DialSettings(by="eps", turn_every=2)
    chosen = LearnSettings(threat=LINF, epochs=1, batch_size=32, seed=trained_seed(), dial=dial)
    by_object = learn_dial(resnet_ingredients(), DATA, chosen, device="cpu", precision="float32")
    by_name = learn_digits_dial(by="eps", turn_every=2, epochs=1, detach=0.8)
    assert torch.equal(by_object.line, by_name.line)


def test_a_dial_survives_a_file_and_follows_a_permutation(tmp_path):
    items = resnet_ingredients()
    dial = learn_digits_dial(items, granularity="module")
    path = dial.save(tmp_path / "dial.safetensors")
    loaded = Dial.load(path)
    assert torch.equal(loaded.line, dial.line)
    for name in ("layers", "ingredients", "parameters", "record"):
        assert getattr(loaded, name) == getattr(dial, name)
    assert torch.equal(load_coefficients(path, 0.7).alpha, dial.at(0.7).alpha)
    reversed_dial = learn_digits_dial(items[::-1], granularity="module")
    assert torch.equal(reversed_dial.at(0.3).alpha, dial.at(0.3).alpha[:, [2, 1, 0]])
    soups = [mix(items, c.at(0.3), buffers="average").digest for c in (dial, reversed_dial)]
    assert soups[0] == soups[1]


def test_files_of_dials_and_of_coefficients_are_told_apart(tmp_path):
    dial = learn_digits_dial(epochs=1)
    path = dial.save(tmp_path / "dial.safetensors")
    with pytest.raises(CoefficientError, match=r"dial\.safetensors: a dial.*--at"):
        Coefficients.load(path)
    alpha = dial.at(0.2).save(tmp_path / "alpha.safetensors")
    with pytest.raises(
        CoefficientError, match=r"alpha\.safetensors: not a dial file.*learn --dial"
    ):
        load_coefficients(alpha, 0.2)


class TwoFeatures(nn.Module):
    """A linear network of two classes on 64 pixels."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 2, bias=False)

    def forward(self, x):
        return self.linear(x.flatten(1) - 0.5)


def fragile_and_robust_features():
    """Return data with two kinds of features, and an ingredient that uses each.

    Pixel 0 differs from grey by 100/255 and has the right sign for 3 images of 5. All others differ
    by 10/255 and always have the right sign, until an attack of 20/255 flips it. So one linear
    network is right on every clean image and wrong on every attacked one; the other is right on
    three fifths of both.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (256,), generator=generator)
    sign = 2 * labels - 1
    images = (128 + 10 * sign).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    correct = torch.rand(256, generator=generator) < 0.6
    images[:, 0, 0, 0] = torch.where(correct, 128 + 100 * sign, 128 - 100 * sign)
    data = dataclasses.replace(
        DIGITS.train.first(256),
        images=images.to(torch.uint8),
        labels=labels,
        record=DIGITS.record | {"classes": ["dark", "bright"]},
        augmentation=Augmentation(),
    )
    fragile, robust = torch.full((64,), 0.2), torch.zeros(64)
    fragile[0], robust[0] = 0.0, 1.9
    items = [
        Checkpoint({"linear.weight": torch.stack([-w, w])}, {"parameters": ["linear.weight"]})
        for w in (fragile, robust)
    ]
    return data, items


@pytest.mark.parametrize("by", ["objective", "eps"])
def test_a_dial_learns_to_trade(by):
    data, items = fragile_and_robust_features()
    dial = learn_dial(
        items,
        data,
        network=TwoFeatures(),
        threat="Linf 20/255",
        by=by,
        turn_every=1,
        epochs=20,
        batch_size=32,
        lr=10.0,
        momentum=0.0,
        init="zeros",
        detach=0.0,
        device="cpu",
        precision="float32",
    )
    fragile = [float(dial.at(t).alpha[0, 0]) for t in (0.0, 0.5, 1.0)]
    assert fragile[0] < fragile[1] < fragile[2]
    assert fragile[0] < 0.2
    assert fragile[2] > 0.8


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"by": "alpha"}, 'by: got "alpha", expected one of objective, eps'),
        ({"turn_every": 0}, "turn_every: got 0, expected at least 1"),
        ({"threat": "clean"}, "threat: a dial runs from robust to clean; got clean"),
        ({"objective": "trades"}, "objective: got trades, expected none for a dial"),
        ({"early_stop": True}, "early_stop: a dial has no single soup to measure"),
        ({"detach": 2.0}, "detach"),
        ({"granularity": "row"}, "granularity"),
        ({"val": VAL}, 'unknown setting "val"'),
    ],
)
def test_settings_that_do_not_fit_a_dial_are_refused(wrong, text):
    with pytest.raises(RequestError) as caught:
        learn_digits_dial(**wrong)
    assert text in str(caught.value)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_a_dial_ranges_from_0_to_1(t):
    dial = Dial(torch.zeros(2, 1, 2, dtype=torch.float64), ("*",), ("a", "b"))
    with pytest.raises(CoefficientError, match="--at: got"):
        dial.at(t)

"""User-defined attacks: `evaluate` calls them, checks their points and records them."""

import re

import pytest
import torch
from evaluated_networks import LINF, N
from torch.nn import functional

from robustsoup.data import to_float
from robustsoup.errors import RequestError
from robustsoup.evaluation.comparison import compare
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.threats import ThreatModel


def fgsm(model, x, y, threat, *, seed):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(functional.cross_entropy(model(x), y), x)
    return (x + threat.eps * grad.sign()).clamp(0, 1)


def test_verdicts_are_those_of_the_points_that_the_function_returns(model, data):
    evaluation = evaluate(model, data, [LINF], attack=fgsm, keep_points=True)
    verdicts = evaluation.threats[str(LINF)]
    attacked = evaluation.prediction == evaluation.labels
    points = verdicts.x_adv
    expected = fgsm(model, to_float(data.images[attacked]), data.labels[attacked], LINF, seed=0)
    assert torch.equal(points[attacked], expected.detach())
    with torch.no_grad():
        survives = model(points).argmax(1) == evaluation.labels
    assert torch.equal(verdicts.robust, attacked & survives)
    assert torch.equal(verdicts.by >= 0, ~verdicts.robust)
    record = evaluation.record
    assert record["attack"] == "fgsm"
    assert record["broken_by"][1:] == ["fgsm"]
    assert len(record["code"]) == 32


def test_samples_that_another_evaluation_broke_stay_broken(model, data):
    def stay(model, x, y, threat, *, seed):
        return x

    earlier = evaluate(model, data, [LINF], steps=5, keep_points=True)
    broken = ~earlier.threats[str(LINF)].robust
    assert bool(broken.any())
    assert not bool(broken.all())
    for reuse in ({"pool": [earlier]}, {"after": earlier}):
        again = evaluate(model, data, [LINF], attack=stay, **reuse)
        assert torch.equal(again.threats[str(LINF)].robust, ~broken)


def test_it_receives_the_correct_samples_and_the_seed(model, data):
    calls = []

    def stay(model, x, y, threat, *, seed):
        calls.append((len(x), seed, threat))
        return x

    evaluation = evaluate(model, data, [LINF], attack=stay, seed=7)
    correct = evaluation.accuracy["clean"].hits
    assert evaluation.accuracy[LINF].hits == correct
    first = int(data.ids[evaluation.prediction == evaluation.labels][0])
    assert calls == [(correct, 7 + first, LINF)]
    assert correct <= N


def test_its_name_may_be_text(model, data, tmp_path, monkeypatch):
    code = "def stay(model, x, y, threat, *, seed):\n    return x\n"
    (tmp_path / "standing_attacks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    evaluation = evaluate(model, data, [LINF], attack="standing_attacks:stay")
    assert evaluation.record["attack"] == "standing_attacks:stay"
    assert evaluation.accuracy[LINF].hits == evaluation.accuracy["clean"].hits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 1, f"outside the ball or the box of {LINF}; project the points"),
        (lambda x: x[:, :, :4], "returned ("),
        (lambda x: (x * 255).round().to(torch.uint8), "torch.uint8, expected ("),
        (lambda x: torch.where(x > x.mean(), torch.nan, x), "a point holds NaN"),
        (lambda x: x.numpy(), "returned ndarray, expected a tensor of shape ("),
    ],
)
def test_impossible_points_are_errors(model, data, change, message):
    def leave(model, x, y, threat, *, seed):
        return change(x)

    with pytest.raises(RequestError, match=re.escape('attack "leave": ') + ".*"):
        evaluate(model, data, [LINF], attack=leave)
    with pytest.raises(RequestError, match=re.escape(message)):
        evaluate(model, data, [LINF], attack=leave)


def test_an_attack_may_change_its_images_in_place(model, data, tmp_path):
    def move(model, x, y, threat, *, seed):
        y.fill_(0)
        return x.sub_(threat.eps).clamp_(0, 1).requires_grad_()

    def leave(model, x, y, threat, *, seed):
        return x.add_(0.5).clamp_(0, 1)

    evaluation = evaluate(model, data, [LINF], attack=move)
    attacked = evaluation.prediction == evaluation.labels
    assert bool((evaluation.threats[str(LINF)].norm[attacked] > 0.9 * LINF.eps).all())
    evaluation.save(tmp_path / "moved.json")
    with pytest.raises(RequestError, match="outside the ball or the box"):
        evaluate(model, data, [LINF], attack=leave)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_tolerated_as_by_the_certificate(model, data, dtype):
    def move(model, x, y, threat, *, seed):
        up = x.to(dtype).flatten(1)
        radius = threat.eps * (1 + 5e-7)
        for column in range(up.shape[1]):  # the first pixels take the radius
            step = (1 - up[:, column]).clamp(max=radius)
            up[:, column] += step
            radius = radius - step
        return up.view_as(x)

    threat = ThreatModel("L1", 12)
    evaluation = evaluate(model, data, [threat], attack=move)
    certificate = evaluation.record["certificate"][str(threat)]
    assert certificate["outside"] == 0
    assert certificate["largest_excess"] > 1e-6


def test_an_unknown_module_is_named(model, data):
    with pytest.raises(RequestError, match=re.escape('attack "nowhere:stay"')):
        evaluate(model, data, [LINF], attack="nowhere:stay")


def name_attack(attack):
    def mine(model, x, y, threat, *, seed):
        return attack(model, x, y, threat, seed=seed)

    return mine


def name_loss(sign):
    def mine(logits, y):
        return sign * torch.nn.functional.cross_entropy(logits, y, reduction="none")

    return mine


@pytest.mark.parametrize(
    ("setting", "weak", "other"),
    [
        ("attack", name_attack(lambda _, x, *args, seed: x), name_attack(fgsm)),
        ("loss", name_loss(-1), name_loss(1)),
    ],
)
def test_another_attack_or_loss_of_the_same_name_is_another_attack(
    model, data, setting, weak, other
):
    settings = {} if setting == "attack" else {"steps": 3}
    earlier = evaluate(model, data, [LINF], **{setting: weak}, **settings)
    alone = evaluate(model, data, [LINF], **{setting: other}, **settings)
    after = evaluate(model, data, [LINF], after=earlier, **{setting: other}, **settings)
    expected = earlier.threats[str(LINF)].robust & alone.threats[str(LINF)].robust
    assert torch.equal(after.threats[str(LINF)].robust, expected)
    assert not torch.equal(expected, earlier.threats[str(LINF)].robust)
    assert any(note.startswith("different code") for note in compare(earlier, alone).notes)

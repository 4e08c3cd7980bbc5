"""User-defined attacks: `evaluate` calls them, checks their points and records them."""

import re

import pytest
import torch
from evaluated_networks import LINF, N
from torch.nn import functional

from robustsoup.data import to_float
from robustsoup.errors import RequestError
from robustsoup.evaluation.evaluate import evaluate


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
    ],
)
def test_impossible_points_are_errors(model, data, change, message):
    def leave(model, x, y, threat, *, seed):
        return change(x)

    with pytest.raises(RequestError, match=re.escape('attack "leave": ') + ".*"):
        evaluate(model, data, [LINF], attack=leave)
    with pytest.raises(RequestError, match=re.escape(message)):
        evaluate(model, data, [LINF], attack=leave)


def test_an_unknown_module_is_named(model, data):
    with pytest.raises(RequestError, match=re.escape('attack "nowhere:stay"')):
        evaluate(model, data, [LINF], attack="nowhere:stay")

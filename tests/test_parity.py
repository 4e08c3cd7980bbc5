"""APGD against the public implementation (pyautoattack, the official attack files), from the same start."""

import pytest
import torch

from robustsoup.attacks.apgd import _checks, _move, _new_rows, _observe, _propose, apgd_train
from robustsoup.attacks.forward import frozen_eval, gradient
from robustsoup.losses import ce
from robustsoup.models import load_model
from robustsoup.threats import ThreatModel, random_start

autopgd = pytest.importorskip("pyautoattack.autopgd_base")


@pytest.fixture(scope="module")
def problem():
    model = load_model("resnet9:width=4", seed=3).eval()
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(24, 3, 16, 16, generator=generator)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % 10
    return model, x, y


def ours(model, x, y, threat, steps, start):
    eps = torch.full((len(x),), threat.eps)
    rows = _new_rows(x, y, eps, start, threat.norm, 0.2)
    ever = torch.zeros(len(x), dtype=torch.bool)
    with frozen_eval(model):
        for step in range(steps + 1):
            logits, loss, grad = gradient(model, rows.x_adv, y, ce, "float32")
            ever |= logits.argmax(1) != y
            _observe(rows, loss, grad, _checks(steps, threat.norm), threat.norm)
            if step < steps:
                _move(rows, _propose(rows, threat.norm))
    return rows.x_best, rows.loss_best, ~ever


def theirs(model, x, y, threat, steps, start):
    attack = autopgd.APGDAttack(model, n_iter=steps, norm=threat.norm, eps=threat.eps, loss="ce", device="cpu")
    attack.init_hyperparam(x)
    attack.n_iter_2, attack.n_iter_min, attack.size_decr = (max(int(p * steps), 1) for p in (0.22, 0.06, 0.03))
    best, robust, loss, _ = attack.attack_single_run(x, y, x_init=start)
    return best, loss, robust


@pytest.mark.parametrize("norm", ["Linf 8/255", "L2 0.5"])
@pytest.mark.parametrize("steps", [2, 10, 100])
def test_bit_parity_with_the_reference(problem, norm, steps):
    model, x, y = problem
    threat = ThreatModel.parse(norm)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    start = random_start(x, noise, torch.full((len(x),), threat.eps), threat.norm)
    for mine, reference in zip(
        ours(model, x, y, threat, steps, start), theirs(model, x, y, threat, steps, start), strict=True
    ):
        assert torch.equal(mine.float(), reference.float())


def test_training_form_is_the_references_best_loss_point_from_x(problem):
    model, x, y = problem
    threat = ThreatModel.parse("Linf 8/255")
    best, _, _ = theirs(model, x, y, threat, 2, x.clone())
    assert torch.equal(apgd_train(model, x, y, threat, steps=2), best)


def test_l1_is_as_strong_as_the_reference(problem):
    model, x, y = problem
    threat = ThreatModel.parse("L1 6")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    start = random_start(x, noise, torch.full((len(x),), threat.eps), "L1")
    _, _, mine = ours(model, x, y, threat, 100, start)
    _, _, reference = theirs(model, x, y, threat, 100, start)
    assert abs(float(mine.float().mean() - reference.float().mean())) <= 2 / len(x)

"""APGD against the public implementation (pyautoattack, the official attack files), from the same start."""

import pytest
import torch

from robustsoup.attacks.apgd import apgd_train
from robustsoup.attacks.forward import frozen_eval, input_gradient
from robustsoup.attacks.projections import random_start
from robustsoup.attacks.steps import StepSchedule, advance, initial_state, observe
from robustsoup.catalog import LOSSES
from robustsoup.data import load_data, to_float
from robustsoup.models import load_model
from robustsoup.threats import ThreatModel

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


def target_of(model, x, y, rank):
    with torch.no_grad():
        return model(x).sort(dim=1)[1][:, -1 - rank]


def ours(model, x, y, threat, steps, start, loss="ce", rank=0):
    schedule = StepSchedule.for_threat(threat, steps, staged=False)
    target = target_of(model, x, y, rank) if rank else None
    rows = initial_state(x, y, threat.eps, start, schedule, target=target)
    ever = torch.zeros(len(x), dtype=torch.bool)
    with frozen_eval(model):
        for step in range(steps + 1):
            logits, value, grad = input_gradient(
                model, rows.x_adv, y, LOSSES[loss].load(), "float32", target=target
            )
            ever |= logits.argmax(1) != y
            observe(rows, value, grad, schedule.check_periods(), threat.norm)
            if step < steps:
                advance(rows, threat.norm)
    return rows.x_best, rows.loss_best, ~ever


def theirs(model, x, y, threat, steps, start, loss="ce", rank=0):
    kind = autopgd.APGDAttack_targeted if rank else autopgd.APGDAttack
    attack = kind(model, n_iter=steps, norm=threat.norm, eps=threat.eps, device="cpu")
    attack.loss = {"ce": "ce", "dlr": "dlr", "targeted dlr": "dlr-targeted"}[loss]
    attack.init_hyperparam(x)
    attack.n_iter_2, attack.n_iter_min, attack.size_decr = (
        max(int(p * steps), 1) for p in (0.22, 0.06, 0.03)
    )
    if rank:
        attack.y_target = target_of(model, x, y, rank)
    best, robust, value, _ = attack.attack_single_run(x, y, x_init=start)
    return best, value, robust


def start_of(x, threat, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(x.shape, generator=generator) * 2 - 1
    if threat.norm != "Linf":
        noise = torch.randn(x.shape, generator=generator)
    return random_start(x, noise, torch.full((len(x),), threat.eps), threat.norm)


@pytest.mark.parametrize(
    ("loss", "rank"), [("ce", 0), ("dlr", 0), ("targeted dlr", 1), ("targeted dlr", 9)]
)
@pytest.mark.parametrize("norm", ["Linf 8/255", "L2 0.5"])
@pytest.mark.parametrize("steps", [2, 10, 100])
def test_bit_parity_with_the_reference(problem, norm, steps, loss, rank):
    model, x, y = problem
    if steps == 100:  # one in two of them, for time's sake
        x, y = x[::2], y[::2]
    if rank:  # a target is another class than the label
        with torch.no_grad():
            y = model(x).argmax(1)
    threat = ThreatModel.parse(norm)
    start = start_of(x, threat)
    for mine, reference in zip(
        ours(model, x, y, threat, steps, start, loss, rank),
        theirs(model, x, y, threat, steps, start, loss, rank),
        strict=True,
    ):
        assert torch.equal(mine.float(), reference.float())


def test_training_form_is_the_references_best_loss_point_from_x(problem):
    model, x, y = problem
    threat = ThreatModel.parse("Linf 8/255")
    best, _, _ = theirs(model, x, y, threat, 2, x.clone())
    assert torch.equal(apgd_train(model, x, y, threat, steps=2), best)


@pytest.fixture(scope="module")
def digits():
    """A small network that tells the digits apart, and 1,000 of them that it gets right."""
    data = load_data("digits")
    model = load_model("resnet9:width=4", channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    x, y = to_float(data.train.images), data.train.labels
    for step in range(60):
        rows = slice(step % 10 * 100, step % 10 * 100 + 100)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    x, y = (
        torch.cat([getattr(split, part) for split in (data.train, data.val, data.test)])
        for part in ("images", "labels")
    )
    x = to_float(x)
    right = model(x).argmax(1) == y
    return model, x[right][:1000], y[right][:1000]


@pytest.mark.parametrize("eps", [1.5, 2.0])
def test_l1_leaves_as_many_of_1000_samples_as_the_reference_from_the_same_noise(digits, eps):
    model, x, y = digits
    assert len(x) == 1000
    threat = ThreatModel("L1", eps)
    torch.manual_seed(1)
    noise = torch.randn(x.shape)
    start = random_start(x, noise, torch.full((len(x),), threat.eps), "L1")
    _, _, mine = ours(model, x, y, threat, 100, start)
    torch.manual_seed(1)  # given a start, the reference would take its support for the first topk
    _, _, reference = theirs(model, x, y, threat, 100, None)
    assert 40 < int(reference.sum()) < 900
    assert abs(int(mine.sum()) - int(reference.sum())) <= 2

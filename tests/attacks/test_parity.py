"""APGD against pyautoattack (the official attack files), from the same starting points."""

import pytest
import torch
from torch.nn import functional

from robustsoup.attacks.apgd import apgd_train
from robustsoup.attacks.forward import frozen_eval, input_gradient
from robustsoup.attacks.losses import ce, dlr
from robustsoup.attacks.projections import random_start
from robustsoup.attacks.steps import (
    StepSchedule,
    advance,
    initial_state,
    observe,
    start_first_stage,
    start_next_stage,
)
from robustsoup.catalog import LOSSES
from robustsoup.data import load_data, to_float
from robustsoup.models import load_model
from robustsoup.threats import ThreatModel

autopgd = pytest.importorskip("pyautoattack.autopgd_base")


@pytest.fixture(scope="module")
def problem():
    """A random network, 24 images, and its predictions with every sixth label changed."""
    model = load_model("resnet9:width=4", seed=3).eval()
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(24, 3, 16, 16, generator=generator)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % 10
    return model, x, y


def target_classes(model, x, rank):
    with torch.no_grad():
        return model(x).sort(dim=1)[1][:, -1 - rank]


def run_ours(model, x, y, threat, steps, start, loss="ce", rank=0):
    """Return the best points, their losses, and whether each sample was never misclassified."""
    schedule = StepSchedule.for_threat(threat, steps, staged=False)
    target = target_classes(model, x, rank) if rank else None
    state = initial_state(x, y, threat.eps, start, schedule, target=target)
    misclassified = torch.zeros(len(x), dtype=torch.bool)
    with frozen_eval(model):
        for step in range(steps + 1):
            logits, value, grad = input_gradient(
                model, state.x_adv, y, LOSSES[loss].load(), "float32", target=target
            )
            misclassified |= logits.argmax(1) != y
            observe(state, value, grad, schedule.check_periods(), threat.norm)
            if step < steps:
                advance(state, threat.norm)
    return state.x_best, state.loss_best, ~misclassified


def run_reference(model, x, y, threat, steps, start, loss="ce", rank=0):
    """Return the same as `run_ours`, from pyautoattack."""
    kind = autopgd.APGDAttack_targeted if rank else autopgd.APGDAttack
    attack = kind(model, n_iter=steps, norm=threat.norm, eps=threat.eps, device="cpu")
    attack.loss = {"ce": "ce", "dlr": "dlr", "targeted dlr": "dlr-targeted"}[loss]
    attack.init_hyperparam(x)
    attack.n_iter_2, attack.n_iter_min, attack.size_decr = (
        max(int(p * steps), 1) for p in (0.22, 0.06, 0.03)
    )
    if rank:
        attack.y_target = target_classes(model, x, rank)
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
    if steps == 100:  # half of the images, to save time
        x, y = x[::2], y[::2]
    if rank:  # a target must not be the label
        with torch.no_grad():
            y = model(x).argmax(1)
    threat = ThreatModel.parse(norm)
    start = start_of(x, threat)
    ours = run_ours(model, x, y, threat, steps, start, loss, rank)
    reference = run_reference(model, x, y, threat, steps, start, loss, rank)
    for value, expected in zip(ours, reference, strict=True):
        assert torch.equal(value.float(), expected.float())


def test_the_training_form_is_the_references_point_of_highest_loss_from_x(problem):
    model, x, y = problem
    threat = ThreatModel.parse("Linf 8/255")
    best, _, _ = run_reference(model, x, y, threat, 2, x.clone())
    assert torch.equal(apgd_train(model, x, y, threat, steps=2), best)


@pytest.fixture(scope="module")
def digits():
    """A small network that classifies digits, and 1,000 digits that it classifies correctly."""
    data = load_data("digits")
    model = load_model("resnet9:width=4", channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    x, y = to_float(data.train.images), data.train.labels
    for step in range(60):
        rows = slice(step % 10 * 100, step % 10 * 100 + 100)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    splits = (data.train, data.val, data.test)
    x = to_float(torch.cat([split.images for split in splits]))
    y = torch.cat([split.labels for split in splits])
    correct = model(x).argmax(1) == y
    return model, x[correct][:1000], y[correct][:1000]


@pytest.mark.slow
def test_l1_leaves_as_many_of_1000_samples_as_the_reference_from_the_same_noise(digits):
    """Half of the samples at each radius; in L1, projections differ by rounding."""
    model, x, y = digits
    assert len(x) == 1000
    survivors, differences = 0, 0
    for eps, half in ((1.5, slice(0, 500)), (2.0, slice(500, 1000))):
        threat = ThreatModel("L1", eps)
        torch.manual_seed(1)
        noise = torch.randn(x[half].shape)
        start = random_start(x[half], noise, torch.full((500,), eps), "L1")
        _, _, ours = run_ours(model, x[half], y[half], threat, 100, start)
        # From a given start, the reference would take its support for the first topk.
        torch.manual_seed(1)
        _, _, reference = run_reference(model, x[half], y[half], threat, 100, None)
        survivors += int(reference.sum())
        differences += abs(int(ours.sum()) - int(reference.sum()))
    assert 0 < survivors < 1000
    assert differences <= 2


def run_stages_ours(model, x, y, threat, steps, noise):
    """Return the best points of the last stage, and whether it never fooled the network."""
    schedule = StepSchedule.for_threat(threat, steps)
    state = start_first_stage(x, y, noise, schedule)
    for number, (_, count) in enumerate(schedule.stages):
        if number:
            state = start_next_stage(state, torch.full((len(x),), number), schedule)
        misclassified = torch.zeros(len(x), dtype=torch.bool)
        for step in range(count + 1):
            logits, value, grad = input_gradient(model, state.x_adv, y, ce, "float32")
            misclassified |= logits.argmax(1) != y
            observe(state, value, grad, schedule.check_periods(), "L1")
            if step < count:
                advance(state, "L1")
    return state.x_best, ~misclassified


def run_stages_of_reference(model, x, y, threat, steps, noise):
    """Return the same, from pyautoattack.

    Its decr_eps_pgd projects the start twice. Whether the second time changes the support depends
    on the rounding of a sum, so the first projection is passed to the first stage.
    """
    attack = autopgd.APGDAttack(model, n_iter=steps, norm="L1", eps=threat.eps, device="cpu")
    attack.init_hyperparam(x)
    points = None
    for attack.eps, attack.n_iter in StepSchedule.for_threat(threat, steps).stages:
        if points is None:
            points = reference_start(x, noise, attack.eps)
        else:
            points += autopgd.L1_projection(x, points - x, attack.eps)
        points, robust, _, _ = attack.attack_single_run(x, y, x_init=points)
    return points, robust


def reference_start(x, noise, eps):
    """Return the random start of the reference's first stage."""
    start = x + noise
    start += autopgd.L1_projection(x, start - x, eps)
    return start


@pytest.mark.parametrize(("shape", "eps"), [((1, 8, 8), 2.0), ((3, 32, 32), 12.0)])
def test_the_first_of_three_l1_stages_takes_its_support_from_the_start(shape, eps):
    threat, y = ThreatModel("L1", eps), torch.zeros(100, dtype=torch.long)
    pixels = torch.randint(256, (100, *shape), generator=torch.Generator().manual_seed(0))
    x, d = to_float(pixels), pixels[0].numel()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    staged, plain = (StepSchedule.for_threat(threat, 100, staged=s) for s in (True, False))
    expected = autopgd.L0_norm(reference_start(x, noise, 3 * eps) - x).float()
    state = start_first_stage(x, y, noise, staged)
    assert torch.equal(state.support, expected)
    assert torch.equal(state.topk, expected / d / 1.5)
    assert not state.final_stage.any()
    state = start_first_stage(x, y, noise, plain)
    assert torch.equal(state.topk, torch.full((100,), 0.2))
    assert torch.equal(state.support, torch.full((100,), float(d)))
    assert state.final_stage.all()


@pytest.mark.parametrize("eps", [1.0, 1.5])
def test_three_l1_stages_agree_with_the_reference_from_the_same_noise(digits, eps):
    """In L1, projections differ by rounding, so a few samples may take another way."""
    model, x, y = digits
    x, y, threat = x[:200], y[:200], ThreatModel("L1", eps)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    best, ours = run_stages_ours(model, x, y, threat, 50, noise)
    expected_best, expected = run_stages_of_reference(model, x, y, threat, 50, noise)
    assert 0 < int(expected.sum()) < 200
    assert int((ours != expected).sum()) <= 6
    distance = (best - expected_best).abs().flatten(1).amax(1)
    assert float(distance.median()) < 1e-4


@pytest.mark.parametrize("label", [0, 2])
def test_dlr_has_a_gradient_where_the_label_ties_with_another_class(label):
    logits = torch.tensor([[2.0, 0.0, 2.0, 1.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(dlr(logits, torch.tensor([label])).sum(), logits)
    assert grad[0, label] == -1
    assert grad[0, 2 - label] == 1

"""APGD in both forms: feasible, as strong as the closed form where there is one, and leaving everything as it was."""

import math
import random

import numpy as np
import pytest
import torch
from digits import digits_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustsoup.attacks import apgd, apgd_train, run_attack
from robustsoup.attacks.losses import ce
from robustsoup.attacks.steps import StepSchedule
from robustsoup.data import load_data, to_float
from robustsoup.errors import DataError, Diverged, ModelError, RequestError
from robustsoup.models import load_model
from robustsoup.settings import AttackSettings
from robustsoup.threats import CLEAN, NORMS, ThreatModel

few = settings(max_examples=20, deadline=None)
ORD = {"Linf": torch.inf, "L2": 2, "L1": 1}
THREATS = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.7), ThreatModel("L1", 1.0)]
by_threat = pytest.mark.parametrize("threat", THREATS, ids=str)


def run(model, x, y, threat, *, ids=None, known_correct=None, on_progress=None, **settings):
    settings = AttackSettings(**settings)
    return run_attack(
        model, x, y, threat, settings, ids=ids, known_correct=known_correct, on_progress=on_progress
    )


def check_feasible(x_adv, x, threat):
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    length = torch.linalg.vector_norm(
        (x_adv.double() - x.double()).flatten(1), ORD[threat.norm], dim=1
    )
    assert float(length.max()) <= threat.eps + 1e-6 * max(1, threat.eps)


class Spy(nn.Module):
    """A network that keeps every input it is asked about and counts the gradients by the input that are asked for."""

    def __init__(self, network):
        super().__init__()
        self.network, self.inputs, self.gradients = network, [], 0

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        if x.requires_grad:
            x.register_hook(self._count)
        return self.network(x)

    def _count(self, _):
        self.gradients += 1


@pytest.fixture(scope="module")
def trained():
    """A small network that tells the digits apart, and 60 of them; every tenth label is wrong. In float64, so that
    another batch size changes no verdict by rounding."""
    data = load_data("digits")
    model = digits_network(4).double()
    x, y = to_float(data.test.images[:60]).double(), data.test.labels[:60].clone()
    with torch.no_grad():
        clean = model(x).argmax(1)
    assert float((clean == y).double().mean()) > 0.8
    y = torch.where(torch.arange(60) % 10 == 0, (clean + 1) % 10, y)
    return model, x, y


def small(seed=0):
    """A network, 6 images of which half are at the edge of the box, and labels of which some are wrong."""
    model = load_model("resnet9:width=2", channels=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.rand(6, 1, 8, 8, generator=generator) - 1).clamp(0, 1)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    return model, x, torch.where(torch.arange(6) % 3 == 0, (y + 1) % 10, y)


# in the ball and the box


@few
@given(
    norm=st.sampled_from(NORMS),
    eps=st.sampled_from([0.0, 0.01, 8 / 255, 0.5, 3.0]),
    steps=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_both_forms_stay_in_the_ball_and_the_box(norm, eps, steps, seed):
    model, x, y = small(seed)
    threat = ThreatModel(norm, eps)
    check_feasible(apgd_train(model, x, y, threat, steps=steps), x, threat)
    check_feasible(apgd(model, x, y, threat, steps=steps, seed=seed, batch_size=4), x, threat)


@pytest.mark.parametrize("threat", [CLEAN, ThreatModel("L2", 0.0), ThreatModel("L1", 0.0)])
def test_eps_0_is_the_identity(threat):
    model, x, y = small()
    assert torch.equal(apgd_train(model, x, y, threat), x)
    result = run(model, x, y, threat)
    assert torch.equal(result.x_adv, x)


# a linear network, where the best perturbation is known


class Linear(nn.Module):
    """Two classes; class 1 gains w . x over class 0, less `bias`."""

    def __init__(self, w, bias):
        super().__init__()
        self.w, self.bias = nn.Parameter(w), bias

    def forward(self, x):
        gain = (x * self.w).flatten(1).sum(1) - self.bias
        return torch.stack([torch.zeros_like(gain), gain], 1)


def best_gain(w, threat):
    """max of w . delta over the ball: eps times the dual norm of w."""
    dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[threat.norm]
    return threat.eps * torch.linalg.vector_norm(w.double().flatten(), dual)


def best_delta(w, threat):
    if threat.norm == "Linf":
        return threat.eps * w.sign()
    if threat.norm == "L2":
        return threat.eps * w / w.norm()
    flat = torch.zeros(w.numel())
    at = w.flatten().abs().argmax()
    flat[at] = threat.eps * w.flatten()[at].sign()
    return flat.view_as(w)


def linear_problem(threat, w):
    """A linear network whose label 0 survives even the best perturbation, by 0.5, so that no form stops early."""
    x = torch.full((4, *w.shape), 0.5)
    bias = float((x[0] * w).sum() + best_gain(w, threat) + 0.5)
    return Linear(w, bias), x, torch.zeros(4, dtype=torch.long)


def check_loss(threat, w, delta, rtol):
    """Both forms reach the loss at x + delta."""
    model, x, y = linear_problem(threat, w)
    with torch.no_grad():
        clean, aim = ce(model(x), y).double(), ce(model(x + delta), y).double()
    found = {
        "evaluation": apgd(model, x, y, threat, steps=100),
        "training": apgd_train(model, x, y, threat, steps=100),
    }
    for form, x_adv in found.items():
        check_feasible(x_adv, x, threat)
        with torch.no_grad():
            loss = ce(model(x_adv), y).double()
        assert float(((loss - clean) / (aim - clean)).min()) >= 1 - rtol, form
        assert bool((loss <= math.log1p(math.exp(-0.5)) * 1.001).all()), form


@pytest.mark.parametrize(
    "threat", [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.45), ThreatModel("L1", 0.45)], ids=str
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_apgd_finds_the_best_perturbation_of_a_linear_network(threat, seed):
    w = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(seed))
    if (
        threat.norm == "L1"
    ):  # two largest weights: APGD in L1 never moves fewer than two pixels, see below
        w[0, 0, 0], w[0, 3, 1] = -3.5, 3.5
    model, x, y = linear_problem(threat, w)
    with torch.no_grad():
        best = ce(model(x + best_delta(w, threat)), y)
    torch.testing.assert_close(
        best, torch.full((4,), math.log1p(math.exp(-0.5))), rtol=1e-4, atol=0
    )
    check_loss(threat, w, best_delta(w, threat), rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_apgd_in_l1_is_as_good_as_the_two_best_pixels(seed):
    """With two pixels moved, topk keeps two: here, as in the reference, the search stops one pixel short of the best."""
    w, threat = (
        torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(seed)),
        ThreatModel("L1", 0.45),
    )
    two = w.flatten().abs().topk(2).indices
    delta = torch.zeros(25).index_put((two,), threat.eps / 2 * w.flatten()[two].sign()).view_as(w)
    check_loss(threat, w, delta, rtol=1e-3)


def test_two_training_steps_in_linf_are_already_the_best_on_a_linear_network():
    w = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(3))
    x, threat = torch.full((2, 1, 5, 5), 0.5), ThreatModel("Linf", 0.1)
    model = Linear(w, 0.0)
    for label, sign in ((0, 1), (1, -1)):
        x_adv = apgd_train(model, x, torch.full((2,), label), threat, steps=2)
        torch.testing.assert_close(x_adv, x + sign * best_delta(w, threat))


# the evaluation form


@by_threat
def test_broken_is_misclassified_at_x_adv_and_robust_is_step_minus_1(trained, threat):
    model, x, y = trained
    result = run(model, x, y, threat, steps=10, batch_size=16)
    check_feasible(result.x_adv, x, threat)
    with torch.no_grad():
        wrong_clean, wrong = model(x).argmax(1) != y, model(result.x_adv).argmax(1) != y
    assert 0 < int((result.broken & ~wrong_clean).sum()) < int((~wrong_clean).sum())
    assert torch.equal(result.broken, wrong)
    assert torch.equal(result.step == -1, ~result.broken)
    assert int(result.step.max()) <= 10


@by_threat
def test_what_is_wrong_clean_is_returned_unchanged(trained, threat):
    model, x, y = trained
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
    assert int(wrong.sum()) >= 6
    result = run(model, x, y, threat, steps=3, batch_size=16)
    assert torch.equal(result.x_adv[wrong], x[wrong])
    assert bool(result.broken[wrong].all())
    assert bool((result.step[wrong] == 0).all())
    assert bool((result.x_adv[~wrong] != x[~wrong]).flatten(1).any(1).all())


@by_threat
def test_a_verdict_depends_neither_on_the_batch_size_nor_on_order_nor_on_the_others(
    trained, threat
):
    model, x, y = trained
    ids = torch.arange(60) * 7 + 3
    whole = run(model, x, y, threat, steps=10, ids=ids, batch_size=60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    some = order[:17]
    for rows, batch_size in (
        (torch.arange(60), 7),
        (torch.arange(60), 250),
        (order, 60),
        (order, 16),
        (some, 60),
        (some, 4),
    ):
        again = run(model, x[rows], y[rows], threat, steps=10, ids=ids[rows], batch_size=batch_size)
        assert torch.equal(again.broken, whole.broken[rows])
        assert torch.equal(again.step, whole.step[rows])
        torch.testing.assert_close(again.x_adv, whole.x_adv[rows], rtol=0, atol=1e-6)


def test_ids_default_to_the_position(trained):
    model, x, y = trained
    results = [
        apgd(model, x[:20], y[:20], THREATS[0], steps=2, ids=ids)
        for ids in (None, torch.arange(20), torch.arange(20) + 1)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@by_threat
def test_the_seed_decides_the_start(trained, threat):
    model, x, y = trained
    first, same, other = (
        apgd(model, x[:20], y[:20], threat, steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    with torch.no_grad():
        attacked = model(x[:20]).argmax(1) == y[:20]
    assert bool((first != other).flatten(1).any(1)[attacked].all())


def losses_along(model, points, y):
    with torch.no_grad():
        logits = torch.cat([model(point) for point in points])
    y = y.expand(len(points))
    return ce(logits, y), logits.argmax(1) != y


@by_threat
def test_a_broken_sample_is_returned_at_its_first_misclassified_point(trained, threat):
    model, x, y = trained
    broken = run(model, x, y, threat, steps=20)
    late = int(broken.step.argmax())
    assert int(broken.step[late]) >= 1
    spy = Spy(model)
    result = run(
        spy, x[[late]], y[[late]], threat, steps=20, ids=torch.tensor([late]), batch_size=1
    )
    points = spy.inputs[2:]  # after the probe of the network and the clean pass
    _, wrong = losses_along(model, points, y[late])
    if threat.norm != "L1":  # there only points of the last stage are inside eps
        assert int(wrong.nonzero()[0]) == int(result.step[0]) == int(broken.step[late])
        assert len(points) == int(result.step[0]) + 1
    assert torch.equal(result.x_adv, points[-1])
    assert bool(wrong[-1])


@pytest.mark.parametrize("threat", [ThreatModel("Linf", 0.04), ThreatModel("L2", 0.2)], ids=str)
def test_a_robust_sample_is_returned_at_its_point_of_highest_loss(trained, threat):
    model, x, y = trained
    row = int((run(model, x, y, threat, steps=10).step == -1).nonzero()[0])
    spy = Spy(model)
    x_adv = apgd(spy, x[[row]], y[[row]], threat, steps=10, ids=torch.tensor([row]), batch_size=1)
    points = spy.inputs[2:]
    assert (len(points), spy.gradients) == (11, 10)  # the last point needs no gradient
    loss, wrong = losses_along(model, points, y[row])
    assert not bool(wrong.any())
    assert torch.equal(x_adv, points[int(loss.argmax())])
    assert int(loss.argmax()) > 0


def test_known_verdicts_save_the_clean_pass(trained):
    model, x, y = trained
    known = torch.ones(60, dtype=torch.bool)
    known[:30] = False
    with torch.no_grad():
        known[30:] = model(x[30:]).argmax(1) == y[30:]
    spy = Spy(model)
    result = run(spy, x, y, THREATS[0], steps=1, known_correct=known, batch_size=60)
    assert len(spy.inputs) == 3  # a probe, the start and the step
    assert bool(result.broken[:30].all())
    assert torch.equal(result.x_adv[:30], x[:30])


@by_threat
def test_progress_counts_up_to_the_number_of_attacked_samples(trained, threat):
    model, x, y = trained
    with torch.no_grad():
        attacked = int((model(x).argmax(1) == y).sum())
    told = []
    run(
        model,
        x,
        y,
        threat,
        steps=5,
        batch_size=8,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == sorted(told)
    assert told[-1] == (attacked, attacked)
    assert {total for _, total in told} == {attacked}


def test_no_samples_are_no_work():
    model, x, y = small()
    result = run(model, x[:0], y[:0], THREATS[0])
    assert result.x_adv.shape == (0, 1, 8, 8)
    assert len(result.broken) == len(result.step) == 0


# the evaluation form in L1


@pytest.mark.parametrize("steps", [3, 5, 10, 33, 100])
def test_l1_spends_the_steps_at_3_2_and_1_eps(steps):
    stages = StepSchedule.for_threat(ThreatModel("L1", 4.0), steps).stages
    assert [eps for eps, _ in stages] == [12.0, 8.0, 4.0]
    assert sum(count for _, count in stages) == steps
    assert stages[0][1] == stages[1][1] == math.ceil(0.3 * steps)
    assert StepSchedule.for_threat(ThreatModel("L2", 4.0), steps).stages == ((4.0, steps),)


@pytest.mark.parametrize("eps", [0.5, 1.0])
def test_l1_in_stages_breaks_at_least_as_much_as_plain_l1(trained, monkeypatch, eps):
    model, x, y = trained
    staged = run(model, x, y, ThreatModel("L1", eps), steps=40)
    whole = StepSchedule.for_threat
    monkeypatch.setattr(
        StepSchedule,
        "for_threat",
        lambda threat, steps, adaptive: whole(threat, steps, staged=False),
    )
    plain = run(model, x, y, ThreatModel("L1", eps), steps=40)
    assert not torch.equal(staged.x_adv, plain.x_adv)
    assert 10 < int(plain.broken.sum()) < 60
    assert int(staged.broken.sum()) >= int(plain.broken.sum())


# the training form


@by_threat
def test_training_perturbs_every_sample_and_climbs(trained, threat):
    model, x, y = trained
    if (
        threat.norm == "L1"
    ):  # which moves the pixels of largest gradient alone, and those may be at the edge of the box
        x = 0.3 + 0.4 * x
    x_adv = apgd_train(model, x, y, threat, steps=2)
    check_feasible(x_adv, x, threat)
    assert bool((x_adv != x).flatten(1).any(1).all())
    with torch.no_grad():
        before, after = ce(model(x), y), ce(model(x_adv), y)
        wrong, still_right = model(x).argmax(1) != y, model(x_adv).argmax(1) == y
    assert bool((after > before).all())
    assert (
        int(wrong.sum()) >= 6
    )  # so that the line above is also about samples that need no attack,
    assert int(still_right.sum()) >= 3  # and about samples that are not fooled


@by_threat
def test_training_returns_the_highest_loss_it_saw_with_3_passes_and_2_gradients(trained, threat):
    model, x, y = trained
    spy = Spy(model)
    x_adv = apgd_train(spy, x, y, threat, steps=2)
    assert len(spy.inputs) == 3
    assert spy.gradients == 2
    assert torch.equal(spy.inputs[0], x)
    with torch.no_grad():
        losses = torch.stack([ce(model(point), y) for point in spy.inputs])
        assert torch.equal(ce(model(x_adv), y), losses.amax(0))
    assert torch.equal(x_adv, torch.stack(spy.inputs)[losses.argmax(0), torch.arange(60)])


@pytest.mark.parametrize("steps", [1, 5])
def test_training_takes_steps_plus_1_passes(trained, steps):
    model, x, y = trained
    spy = Spy(model)
    apgd_train(spy, x[:4], y[:4], THREATS[0], steps=steps)
    assert (len(spy.inputs), spy.gradients) == (steps + 1, steps)


@by_threat
def test_training_has_no_randomness_and_no_memory_of_the_batch(trained, threat):
    model, x, y = trained
    x_adv = apgd_train(model, x, y, threat, steps=4)
    assert torch.equal(apgd_train(model, x, y, threat, steps=4), x_adv)
    torch.testing.assert_close(
        apgd_train(model, x[20:33], y[20:33], threat, steps=4), x_adv[20:33], rtol=0, atol=1e-9
    )


# what is left as it was


@pytest.mark.parametrize("form", [apgd_train, apgd])
@pytest.mark.parametrize("fails", [False, True])
def test_the_network_and_the_randomness_are_left_as_they_were(form, fails):
    model, x, y = small()
    model.train()
    model.layer1.eval()
    model.linear.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = x.clone(), y.clone()
    randomness = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    seen = []

    def loss(logits, labels):
        seen.append([module.training for module in model.modules()])
        if fails:
            raise ZeroDivisionError
        return ce(logits, labels)

    if fails:
        with pytest.raises(ZeroDivisionError):
            form(model, x, y, THREATS[0], steps=2, loss=loss)
    else:
        form(model, x, y, THREATS[0], steps=2, loss=loss)
    assert not any(map(any, seen))
    assert seen
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    assert not x.requires_grad
    assert torch.equal(torch.random.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert np.array_equal(np.random.get_state()[1], randomness[2])


@pytest.mark.parametrize("form", [apgd_train, apgd])
def test_an_attack_works_where_gradients_are_off(form):
    model, x, y = small()
    expected = form(model, x, y, THREATS[0], steps=2)
    with torch.no_grad():
        assert torch.equal(form(model, x, y, THREATS[0], steps=2), expected)
    assert not expected.requires_grad


# wrong requests


class Answers(nn.Module):
    """A network that gives the same answer to anything, as often as there are images."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.passes = answer, 0

    def forward(self, x):
        self.passes += 1
        return self.answer(x)


TEN = {"x": torch.full((4, 1, 2, 2), 0.5), "y": torch.arange(4)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": TEN["x"] * 255}, DataError, r"\[127\.5, 127\.5\].*\[0, 1\]"),
        ({"x": TEN["x"] - 0.6}, DataError, r"expected floats in \[0, 1\]"),
        ({"x": torch.full((4, 1, 2, 2), 1)}, DataError, "torch.int64"),
        ({"x": TEN["x"].index_fill(0, torch.tensor([3]), torch.nan)}, DataError, "nan"),
        ({"y": torch.arange(3)}, DataError, "4 images and 3 labels"),
        ({"steps": 0}, RequestError, "steps: got 0, expected at least 1"),
        ({"steps": -3}, RequestError, "steps: got -3"),
        ({"batch_size": 0}, RequestError, "batch_size.*0"),
        ({"ids": torch.arange(3)}, RequestError, "ids.*3"),
    ],
)
def test_a_wrong_request_is_refused_before_the_network_is_asked(change, error, text):
    model = Answers(lambda x: x.flatten(1).sum(1, keepdim=True) * torch.arange(10.0))
    arguments = {**TEN, "threat": THREATS[0], "steps": 2, **change}
    with pytest.raises(error, match=text):
        apgd(model, **arguments)
    assert model.passes == 0


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (lambda x: torch.zeros(len(x), 3) * x.sum(), ModelError, r"0\.\.3.*3 classes"),
        (lambda x: torch.zeros(len(x), 10, 2), ModelError, r"shape \(2, 10, 2\)"),
        (lambda x: torch.zeros(10), ModelError, r"shape \(10,\)"),
        (lambda x: torch.zeros(1, 10), ModelError, r"shape \(1, 10\)"),
        (lambda x: {"logits": x}, ModelError, "shape dict"),
        (lambda x: torch.full((len(x), 10), torch.nan), Diverged, "NaN"),
        (lambda x: torch.full((len(x), 10), torch.inf), Diverged, "infinity"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_after_one_pass(answer, error, text):
    model = Answers(answer)
    with pytest.raises(error, match=text):
        apgd(model, **TEN, threat=THREATS[0], steps=2)
    assert model.passes == 1


def test_labels_below_0_are_refused():
    model, x, y = small()
    with pytest.raises(ModelError, match=r"labels: got -1\.\."):
        apgd(model, x, y.index_fill(0, torch.tensor([2]), -1), THREATS[0], steps=2)


@pytest.mark.parametrize("steps", [0, -1])
def test_training_without_steps_is_refused(steps):
    model, x, y = small()
    spy = Spy(model)
    with pytest.raises(RequestError, match=f"steps: got {steps}, expected at least 1"):
        apgd_train(spy, x, y, THREATS[0], steps=steps)
    assert not spy.inputs

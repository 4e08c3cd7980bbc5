"""apgd, pgd and apgd_train: feasible, as strong as closed forms, and without side effects."""

import math
import random

import numpy as np
import pytest
import torch
from digits import check_inside, digits_network
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import LINEAR_THREATS, LinearNetwork, best_gain, linear_problem, weights
from torch import nn

from robustsoup.attacks import apgd, apgd_train, pgd, run_attack
from robustsoup.attacks.losses import ce
from robustsoup.attacks.projections import move_inside, project, random_start
from robustsoup.attacks.steps import StepSchedule, advance, cold_noise, copy_rows, initial_state
from robustsoup.data import load_data, to_float
from robustsoup.errors import DataError, Diverged, ModelError, RequestError
from robustsoup.models import load_model
from robustsoup.settings import AttackSettings
from robustsoup.threats import CLEAN, NORMS, ThreatModel

few_examples = settings(max_examples=20, deadline=None)
THREATS = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.7), ThreatModel("L1", 1.0)]
by_threat = pytest.mark.parametrize("threat", THREATS, ids=str)


def attack(model, x, y, threat, *, ids=None, on_progress=None, **changes):
    return run_attack(
        model,
        x,
        y,
        threat,
        AttackSettings(**changes),
        ids=ids,
        on_progress=on_progress,
    )


def check_feasible(x_adv, x, threat):
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    check_inside(x_adv, x, threat)


class Spy(nn.Module):
    """Records every input, and counts the gradients with respect to it."""

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
    """A small network that classifies digits, and 60 digits; every tenth label is wrong.

    In float64, so that no verdict changes through the rounding of another batch size.
    """
    data = load_data("digits")
    model = digits_network(4).double()
    x, y = to_float(data.test.images[:60]).double(), data.test.labels[:60].clone()
    with torch.no_grad():
        clean = model(x).argmax(1)
    assert float((clean == y).double().mean()) > 0.8
    y = torch.where(torch.arange(60) % 10 == 0, (clean + 1) % 10, y)
    return model, x, y


def small_problem(seed=0):
    """A random network, 6 images with pixels on the edge of the box, and some wrong labels."""
    model = load_model("resnet9:width=2", channels=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.rand(6, 1, 8, 8, generator=generator) - 1).clamp(0, 1)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    return model, x, torch.where(torch.arange(6) % 3 == 0, (y + 1) % 10, y)


# the ball and the box


@few_examples
@given(
    norm=st.sampled_from(NORMS),
    eps=st.sampled_from([0.0, 0.01, 8 / 255, 0.5, 3.0]),
    steps=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_both_forms_stay_in_the_ball_and_the_box(norm, eps, steps, seed):
    model, x, y = small_problem(seed)
    threat = ThreatModel(norm, min(eps, 1.0) if norm == "Linf" else eps)
    check_feasible(apgd_train(model, x, y, threat, steps=steps), x, threat)
    check_feasible(apgd(model, x, y, threat, steps=steps, seed=seed, batch_size=4), x, threat)


@pytest.mark.parametrize("threat", [CLEAN, ThreatModel("L2", 0.0), ThreatModel("L1", 0.0)])
def test_eps_0_returns_the_images(threat):
    model, x, y = small_problem()
    assert torch.equal(apgd_train(model, x, y, threat), x)
    result = attack(model, x, y, threat)
    assert torch.equal(result.x_adv, x)


def test_a_threat_model_may_be_given_as_text():
    model, x, y = small_problem()
    expected = apgd_train(model, x, y, ThreatModel("L2", 0.5))
    assert torch.equal(apgd_train(model, x, y, "L2 0.5"), expected)
    assert torch.equal(apgd_train(model, x, y, "clean"), x)


# linear networks, for which the best perturbation is known


def best_delta(w, threat):
    if threat.norm == "Linf":
        return threat.eps * w.sign()
    if threat.norm == "L2":
        return threat.eps * w / w.norm()
    delta, largest = torch.zeros(w.numel()), w.flatten().abs().argmax()
    delta[largest] = threat.eps * w.flatten()[largest].sign()
    return delta.view_as(w)


def check_loss(threat, w, delta, rtol):
    """Check that both forms reach the loss at x + delta; no perturbation fools the network."""
    model, x, y = linear_problem(threat, w, n=4, gap=0.5)
    with torch.no_grad():
        clean, goal = ce(model(x), y).double(), ce(model(x + delta), y).double()
    found = {
        "evaluation": apgd(model, x, y, threat, steps=100),
        "training": apgd_train(model, x, y, threat, steps=100),
    }
    for form, x_adv in found.items():
        check_feasible(x_adv, x, threat)
        with torch.no_grad():
            loss = ce(model(x_adv), y).double()
        assert float(((loss - clean) / (goal - clean)).min()) >= 1 - rtol, form
        assert bool((loss <= math.log1p(math.exp(-0.5)) * 1.001).all()), form


@pytest.mark.parametrize("threat", LINEAR_THREATS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_apgd_finds_the_best_perturbation_of_a_linear_network(threat, seed):
    w = weights(seed, two_largest=threat.norm == "L1")
    model, x, y = linear_problem(threat, w, n=4, gap=0.5)
    with torch.no_grad():
        best = ce(model(x + best_delta(w, threat)), y)
    expected = torch.full((4,), math.log1p(math.exp(-0.5)))
    torch.testing.assert_close(best, expected, rtol=1e-4, atol=0)
    check_loss(threat, w, best_delta(w, threat), rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_apgd_in_l1_is_as_good_as_the_two_best_pixels(seed):
    """After two pixels moved, topk keeps two, so the search ends one pixel short of the best."""
    w, threat = weights(seed), ThreatModel("L1", 0.45)
    two = w.flatten().abs().topk(2).indices
    delta = torch.zeros(25).index_put((two,), threat.eps / 2 * w.flatten()[two].sign()).view_as(w)
    check_loss(threat, w, delta, rtol=1e-3)


def test_two_training_steps_in_linf_suffice_on_a_linear_network():
    w, threat = weights(3), ThreatModel("Linf", 0.1)
    x, model = torch.full((2, 1, 5, 5), 0.5), LinearNetwork(w, 0.0)
    for label, sign in ((0, 1), (1, -1)):
        x_adv = apgd_train(model, x, torch.full((2,), label), threat, steps=2)
        torch.testing.assert_close(x_adv, x + sign * best_delta(w, threat))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("threat", "share"), [(ThreatModel("Linf", 0.1), 1 - 1e-5), (ThreatModel("L2", 0.45), 0.96)]
)
def test_pgd_finds_the_best_perturbation_of_a_linear_network(threat, share, seed):
    """In L2 the angle to the best shrinks by 2.5 radii in all, so a few percent remain."""
    w = weights(seed)
    model, x, y = linear_problem(threat, w, n=20, gap=0.5)
    delta = (pgd(model, x, y, threat, steps=40) - x).double()
    gain, best = (delta * w).flatten(1).sum(1), best_gain(w, threat)
    assert bool((gain <= best * (1 + 1e-5)).all())
    assert float(gain.min()) >= best * share


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_is_its_textbook(norm, steps):
    """A random start, steps of 2.5 eps / steps along the steepest direction, the best point."""
    threat, w = ThreatModel(norm, 0.3), weights(0, two_largest=True)
    model, x, y = linear_problem(threat, w, n=20, gap=0.5)
    eps = torch.full((len(x),), threat.eps)
    direction = {
        "Linf": w.sign(),
        "L2": w / w.norm(),
        "L1": w.sign() * (w.abs() >= w.abs().flatten().sort()[0][20]) / 5,
    }
    noise = cold_noise(x, norm, seed=0, ids=torch.arange(len(x)))
    points = [random_start(x, noise, torch.full((len(x),), threat.eps), norm)]
    for _ in range(steps):
        moved = points[-1] + 2.5 * threat.eps / steps * direction[norm]
        points.append(project(moved, x, eps, norm))
    with torch.no_grad():
        losses = torch.stack([ce(model(point), y) for point in points])
        found = ce(model(pgd(model, x, y, threat, steps=steps)), y)
    torch.testing.assert_close(found, losses.amax(0), rtol=1e-4, atol=0)


# the evaluation form


@by_threat
def test_broken_samples_are_misclassified_and_robust_ones_have_step_minus_1(trained, threat):
    model, x, y = trained
    result = attack(model, x, y, threat, steps=10, batch_size=16)
    check_feasible(result.x_adv, x, threat)
    with torch.no_grad():
        wrong_clean, wrong = model(x).argmax(1) != y, model(result.x_adv).argmax(1) != y
    assert 0 < int((result.broken & ~wrong_clean).sum()) < int((~wrong_clean).sum())
    assert torch.equal(result.broken, wrong)
    assert torch.equal(result.step == -1, ~result.broken)
    assert int(result.step.max()) <= 10


@by_threat
def test_misclassified_samples_are_returned_unchanged(trained, threat):
    model, x, y = trained
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
    assert int(wrong.sum()) >= 6
    result = attack(model, x, y, threat, steps=3, batch_size=16)
    assert torch.equal(result.x_adv[wrong], x[wrong])
    assert bool(result.broken[wrong].all())
    assert bool((result.step[wrong] == 0).all())
    assert bool((result.x_adv[~wrong] != x[~wrong]).flatten(1).any(1).all())


@by_threat
def test_a_verdict_does_not_depend_on_batch_size_order_or_other_samples(trained, threat):
    model, x, y = trained
    ids = torch.arange(60) * 7 + 3
    full_result = attack(model, x, y, threat, steps=10, ids=ids, batch_size=60)
    everything = torch.arange(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    some = order[:17]
    cases = [(everything, 7), (everything, 250), (order, 60), (order, 16), (some, 60), (some, 4)]
    for rows, batch_size in cases:
        partial_result = attack(
            model, x[rows], y[rows], threat, steps=10, ids=ids[rows], batch_size=batch_size
        )
        assert torch.equal(partial_result.broken, full_result.broken[rows])
        assert torch.equal(partial_result.step, full_result.step[rows])
        torch.testing.assert_close(partial_result.x_adv, full_result.x_adv[rows], rtol=0, atol=1e-6)


def test_ids_default_to_the_position(trained):
    model, x, y = trained
    default, same, shifted = (
        apgd(model, x[:20], y[:20], THREATS[0], steps=2, ids=ids)
        for ids in (None, torch.arange(20), torch.arange(20) + 1)
    )
    assert torch.equal(default, same)
    assert not torch.equal(default, shifted)


@by_threat
def test_the_seed_determines_the_start(trained, threat):
    model, x, y = trained
    first, same, different = (
        apgd(model, x[:20], y[:20], threat, steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    with torch.no_grad():
        attacked = model(x[:20]).argmax(1) == y[:20]
    assert bool((first != different).flatten(1).any(1)[attacked].all())


def losses_along(model, points, y):
    with torch.no_grad():
        logits = torch.cat([model(point) for point in points])
    y = y.expand(len(points))
    return ce(logits, y), logits.argmax(1) != y


def attack_one(form, model, x, y, row, threat, steps):
    """Attack one sample alone, and return the result and the points that the search visited."""
    spy = Spy(model)
    result = form(
        spy, x[[row]], y[[row]], threat, steps=steps, ids=torch.tensor([row]), batch_size=1
    )
    return result, spy.inputs[2:], spy.gradients  # after the probe and the clean pass


@by_threat
def test_a_broken_sample_is_returned_at_its_first_misclassified_point(trained, threat):
    model, x, y = trained
    broken = attack(model, x, y, threat, steps=20)
    late = int(broken.step.argmax())
    assert int(broken.step[late]) >= 1
    result, points, _ = attack_one(attack, model, x, y, late, threat, steps=20)
    _, wrong = losses_along(model, points, y[late])
    if threat.norm != "L1":  # there, only points of the last stage are inside eps
        first = int(wrong.nonzero()[0])
        assert first == int(result.step[0]) == int(broken.step[late])
        inside = move_inside(points[first], x[[late]], threat)
        assert torch.equal(points[-1], inside)  # checked again if rounding left it outside
        assert len(points) == first + (1 if torch.equal(points[first], inside) else 2)
    assert torch.equal(result.x_adv, points[-1])
    assert bool(wrong[-1])


@pytest.mark.parametrize("threat", [ThreatModel("Linf", 0.04), ThreatModel("L2", 0.2)], ids=str)
def test_a_robust_sample_is_returned_at_its_point_of_highest_loss(trained, threat):
    model, x, y = trained
    row = int((attack(model, x, y, threat, steps=10).step == -1).nonzero()[0])
    x_adv, points, gradients = attack_one(apgd, model, x, y, row, threat, steps=10)
    assert (len(points), gradients) == (11, 10)  # the last point needs no gradient
    loss, wrong = losses_along(model, points, y[row])
    assert not bool(wrong.any())
    best = points[int(loss.argmax())]
    assert torch.equal(x_adv, move_inside(best, x[[row]], threat))
    assert int(loss.argmax()) > 0


@by_threat
def test_progress_counts_up_to_the_number_of_attacked_samples(trained, threat):
    model, x, y = trained
    with torch.no_grad():
        attacked = int((model(x).argmax(1) == y).sum())
    reports = []

    def record(done, total):
        reports.append((done, total))

    attack(model, x, y, threat, steps=5, batch_size=8, on_progress=record)
    assert reports == sorted(reports)
    assert reports[-1] == (attacked, attacked)
    assert {total for _, total in reports} == {attacked}


def test_no_samples_need_no_work():
    model, x, y = small_problem()
    result = attack(model, x[:0], y[:0], THREATS[0])
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
def test_l1_in_stages_differs_from_plain_l1_and_breaks_about_as_much(trained, monkeypatch, eps):
    model, x, y = trained
    staged = attack(model, x, y, ThreatModel("L1", eps), steps=40)
    for_threat = StepSchedule.for_threat

    def one_stage(threat, steps, adaptive):
        return for_threat(threat, steps, staged=False)

    monkeypatch.setattr(StepSchedule, "for_threat", one_stage)
    plain = attack(model, x, y, ThreatModel("L1", eps), steps=40)
    assert not torch.equal(staged.x_adv, plain.x_adv)
    assert 10 < int(plain.broken.sum()) < 60
    assert int(staged.broken.sum()) >= int(plain.broken.sum()) - 6


# the training form


@by_threat
def test_training_lowers_no_loss_and_moves_most_samples(trained, threat):
    model, x, y = trained
    y = y.clone()
    with torch.no_grad():
        y[:6] = (model(x[:6]).argmax(1) + 1) % 10  # samples that need no attack are attacked too
    if threat.norm == "L1":  # moves the pixels of largest gradient alone, even at the box's edge
        x = 0.3 + 0.4 * x
    x_adv = apgd_train(model, x, y, threat, steps=2)
    check_feasible(x_adv, x, threat)
    with torch.no_grad():
        before, after = ce(model(x), y), ce(model(x_adv), y)
    assert bool((after >= before - 1e-9).all())
    moved = (x_adv != x).flatten(1).any(1)
    assert float(moved.double().mean()) > 0.5
    assert bool(moved[:6].any())
    assert float(after.mean()) > float(before.mean())


@pytest.fixture
def one_lane():
    """Let PyTorch use one thread, so that a batch is not divided."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@by_threat
def test_training_returns_the_highest_loss_of_3_passes_and_2_gradients(trained, one_lane, threat):
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
def test_training_is_deterministic_and_independent_of_other_samples(trained, threat):
    model, x, y = trained
    x_adv = apgd_train(model, x, y, threat, steps=4)
    assert torch.equal(apgd_train(model, x, y, threat, steps=4), x_adv)
    partial_result = apgd_train(model, x[20:33], y[20:33], threat, steps=4)
    torch.testing.assert_close(partial_result, x_adv[20:33], rtol=0, atol=1e-9)


@by_threat
def test_training_divides_the_batch_among_lanes(trained, threat):
    model, x, y = trained
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one_lane = apgd_train(model, x, y, threat)
        torch.set_num_threads(2)
        two_lanes = apgd_train(model, x, y, threat)
        assert torch.equal(two_lanes, apgd_train(model, x, y, threat))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(two_lanes, one_lane, rtol=0, atol=1e-6)


# side effects


@pytest.mark.parametrize("form", [apgd_train, apgd])
@pytest.mark.parametrize("fails", [False, True])
def test_network_images_and_global_randomness_are_left_as_they_were(form, fails):
    model, x, y = small_problem()
    model.train()
    model.layer1.eval()
    model.linear.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = x.clone(), y.clone()
    randomness = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    modes_under_attack = []

    def loss(logits, labels):
        modes_under_attack.append([module.training for module in model.modules()])
        if fails:
            raise ZeroDivisionError
        return ce(logits, labels)

    if fails:
        with pytest.raises(ZeroDivisionError):
            form(model, x, y, THREATS[0], steps=2, loss=loss)
    else:
        form(model, x, y, THREATS[0], steps=2, loss=loss)
    assert modes_under_attack
    assert not any(map(any, modes_under_attack))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    assert not x.requires_grad
    assert torch.equal(torch.random.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert np.array_equal(np.random.get_state()[1], randomness[2])


@pytest.mark.parametrize("form", [apgd_train, apgd])
def test_an_attack_works_where_gradients_are_disabled(form):
    model, x, y = small_problem()
    expected = form(model, x, y, THREATS[0], steps=2)
    with torch.no_grad():
        assert torch.equal(form(model, x, y, THREATS[0], steps=2), expected)
    assert not expected.requires_grad


# invalid requests


class Answers(nn.Module):
    """A network that returns `answer(x)` and counts its calls."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, 0

    def forward(self, x):
        self.calls += 1
        return self.answer(x)


BATCH = {"x": torch.full((4, 1, 2, 2), 0.5), "y": torch.arange(4)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": BATCH["x"] * 255}, DataError, r"\[127\.5, 127\.5\].*\[0, 1\]"),
        ({"x": BATCH["x"] - 0.6}, DataError, r"expected floats in \[0, 1\]"),
        ({"x": torch.full((4, 1, 2, 2), 1)}, DataError, "torch.int64"),
        ({"x": BATCH["x"].index_fill(0, torch.tensor([3]), torch.nan)}, DataError, "nan"),
        ({"y": torch.arange(3)}, DataError, "got 4 images and 3 labels, expected equal numbers"),
        ({"steps": 0}, RequestError, "steps: got 0, expected at least 1"),
        ({"steps": -3}, RequestError, "steps: got -3"),
        ({"batch_size": 0}, RequestError, "batch_size.*0"),
        ({"ids": torch.arange(3)}, RequestError, "ids: got 3, expected 4, one for each image"),
    ],
)
def test_an_invalid_request_is_refused_before_the_network_is_called(change, error, text):
    model = Answers(lambda x: x.flatten(1).sum(1, keepdim=True) * torch.arange(10.0))
    arguments = {**BATCH, "threat": THREATS[0], "steps": 2, **change}
    with pytest.raises(error, match=text):
        apgd(model, **arguments)
    assert model.calls == 0


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (lambda x: torch.zeros(len(x), 3) * x.sum(), ModelError, r"0\.\.3.*has 3 classes"),
        (lambda x: torch.zeros(len(x), 10, 2), ModelError, r"shape \(2, 10, 2\)"),
        (lambda x: torch.zeros(10), ModelError, r"shape \(10,\)"),
        (lambda x: torch.zeros(1, 10), ModelError, r"shape \(1, 10\)"),
        (lambda x: {"logits": x}, ModelError, r"shape \(2, 1, 2, 2\)"),
        (lambda x: {"a": x, "b": x}, ModelError, "returned dict with the keys a, b"),
        (lambda x: torch.full((len(x), 10), torch.nan), Diverged, "NaN"),
        (lambda x: torch.full((len(x), 10), torch.inf), Diverged, "infinity"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_after_one_pass(answer, error, text):
    model = Answers(answer)
    with pytest.raises(error, match=text):
        apgd(model, **BATCH, threat=THREATS[0], steps=2)
    assert model.calls == 1


def test_labels_below_0_are_refused():
    model, x, y = small_problem()
    with pytest.raises(ModelError, match=r"labels: got -1\.\."):
        apgd(model, x, y.index_fill(0, torch.tensor([2]), -1), THREATS[0], steps=2)


@pytest.mark.parametrize("steps", [0, -1])
def test_training_without_steps_is_refused(steps):
    model, x, y = small_problem()
    spy = Spy(model)
    with pytest.raises(RequestError, match=f"steps: got {steps}, expected at least 1"):
        apgd_train(spy, x, y, THREATS[0], steps=steps)
    assert not spy.inputs


def test_run_attack_refuses_autoattack():
    model, x, y = small_problem()
    expected = 'attack: got "autoattack", expected one of apgd, pgd, pma, malt'
    with pytest.raises(RequestError, match=expected):
        attack(model, x, y, THREATS[0], attack="autoattack")


@pytest.mark.parametrize(
    ("loss", "classes", "required"),
    [("dlr", 2, 3), ("targeted dlr", 2, 4), ("targeted dlr", 3, 4)],
)
@pytest.mark.parametrize("form", [apgd, pgd])
def test_a_loss_that_needs_more_classes_is_refused(loss, classes, required, form):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    text = rf'loss: "{loss}" needs {required} classes or more, got {classes}; use "'
    with pytest.raises(RequestError, match=text):
        form(network, x, y, "Linf 0.1", loss=loss)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, required))
    assert form(network, x, y, "Linf 0.1", loss=loss, steps=2).shape == x.shape


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"loss": "hinge"}, 'loss: got "hinge", expected one of ce, dlr, targeted dlr'),
        ({"restarts": 0}, "restarts: got 0"),
        ({"targets": 0}, "targets: got 0"),
        ({"eot": 0}, "eot: got 0"),
        ({"precision": "half"}, 'precision: got "half"'),
    ],
)
@pytest.mark.parametrize("form", [apgd, pgd])
def test_invalid_settings_are_refused(wrong, text, form):
    y = torch.zeros(2, dtype=torch.long)
    with pytest.raises(RequestError, match=text):
        form(nn.Flatten(), torch.rand(2, 1, 2, 2), y, "Linf 0.1", **wrong)


# one step in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_are_copied_between_memory_formats(dtype, memory_format):
    source, target = (torch.rand(5, 3, 4, 4, dtype=torch.float64).to(dtype) for _ in range(2))
    source = source.contiguous(memory_format=torch.channels_last)
    target = target.contiguous(memory_format=memory_format)
    before, strides = target.clone(), target.stride()
    rows = torch.tensor([True, False, True, True, False])
    copy_rows(rows, source, target)
    assert torch.equal(target[rows], source[rows])
    assert torch.equal(target[~rows], before[~rows])
    assert target.stride() == strides


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_keeps_the_last_point_and_the_memory_format(norm, memory_format):
    """The format decides which kernels a network runs, and so the bits of its logits."""
    x = torch.full((4, 3, 6, 6), 0.5).contiguous(memory_format=memory_format)
    schedule = StepSchedule(norm, ((0.5, 10),))
    state = initial_state(x, torch.zeros(4, dtype=torch.long), 0.5, x, schedule)
    for _ in range(3):
        state.grad.copy_(torch.randn(x.shape))
        before = state.x_adv.clone()
        advance(state, norm)
        assert torch.equal(state.x_prev, before)
        assert not torch.equal(state.x_adv, before)
        assert state.x_adv.stride() == state.x_prev.stride() == x.stride()

"""AutoAttack: official verdicts, feasible points, and no side effects."""

import logging
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from markers import thinned
from torch import nn

from robustsoup.attacks import autoattack
from robustsoup.attacks.autoattack import (
    STANDARD_ATTACKS,
    AutoAttackPlan,
    InPasses,
    attack_chunk,
    plan_autoattack,
)
from robustsoup.errors import RequestError
from robustsoup.evaluation import attackers
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model
from robustsoup.settings import AttackSettings
from robustsoup.threats import CLEAN, ThreatModel

pyautoattack = pytest.importorskip("pyautoattack")
autopgd_base = pytest.importorskip("pyautoattack.autopgd_base")

ORD = {"Linf": torch.inf, "L2": 2, "L1": 1}
THREATS = [ThreatModel("Linf", 0.02), ThreatModel("L2", 0.1), ThreatModel("L1", 0.3)]
"""Threat models under which every attack breaks some but not all samples of `problem`."""
by_threat = pytest.mark.parametrize("threat", THREATS, ids=str)
FEW = {"queries": 30, "steps": 8}
"""Budget of a plan that is run for speed."""


def problem(n=16, *, classes=10, channels=1, side=8):
    """A network with random weights, random images, and its own predictions as labels."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inner = 6 * ((side - 3) // 2 + 1) ** 2
        layers = (
            nn.Conv2d(channels, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(inner, classes),
        )
    model = nn.Sequential(*layers).eval()
    x = torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(5))
    return model, x, predict_labels(model, x)


def predict_labels(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def residual(n, *, side):
    model = load_model("resnet9:width=4", seed=3).eval()
    x = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(5))
    return model, x, predict_labels(model, x)


class Flat(nn.Module):
    """A network whose gradient is zero, which makes pyautoattack warn."""

    def forward(self, x):
        return torch.arange(10.0) + 0 * x.flatten(1).sum(1, keepdim=True)


def only(*attacks, **budget):
    return AutoAttackPlan(attacks, 9, "standard", **budget)


def check_real(model, x, y, threat, x_adv, by):
    """Broken images are feasible and misclassified; all others are returned unchanged."""
    broken = by >= 0
    assert x_adv.shape == x.shape
    assert x_adv.is_contiguous()
    assert torch.equal(x_adv[~broken], x[~broken])
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    delta = (x_adv.double() - x.double()).flatten(1)
    assert bool(
        (torch.linalg.vector_norm(delta, ORD[threat.norm], dim=1) <= threat.eps + 1e-6).all()
    )
    assert bool((predict_labels(model, x_adv[broken]) != y[broken]).all())


# plans


def test_ten_classes_are_the_standard_and_fewer_are_not():
    threat = THREATS[0]
    assert plan_autoattack(10, threat) == AutoAttackPlan(STANDARD_ATTACKS, 9, "standard")
    assert plan_autoattack(1000, threat) == AutoAttackPlan(STANDARD_ATTACKS, 9, "standard")
    assert plan_autoattack(9, threat) == AutoAttackPlan(
        STANDARD_ATTACKS, 8, "non-standard (8 targets)"
    )
    assert plan_autoattack(4, threat) == AutoAttackPlan(
        STANDARD_ATTACKS, 3, "non-standard (3 targets)"
    )


@pytest.mark.parametrize("classes", [5, 10, 1000])
def test_the_passes_of_a_survivor_are_those_of_the_standard(classes):
    plan = plan_autoattack(classes, THREATS[0])
    apgd, fab = 2 * plan.steps * (1 + plan.targets), 3 * plan.steps * plan.targets
    settings = AttackSettings(attack="autoattack", steps=7, restarts=2)  # which have no effect
    assert settings.most_passes(classes) == apgd + fab + plan.queries


def test_fewer_than_four_classes_are_refused():
    with pytest.raises(RequestError) as error:
        plan_autoattack(3, ThreatModel("Linf", 8 / 255))
    assert str(error.value) == (
        "autoattack on Linf 8/255: got 3 classes, expected at least 4, "
        "because its targeted DLR loss compares 4; use the attack strong"
    )


def test_without_pyautoattack_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    text = "autoattack: pyautoattack is not installed; pip install 'robustsoup[autoattack]'"
    with pytest.raises(RequestError) as error:
        plan_autoattack(10, THREATS[0])
    assert str(error.value) == text
    with pytest.raises(RequestError) as error:
        attack_chunk(*problem(2), THREATS[0], plan=only("apgd-ce"), seed=0)
    assert str(error.value) == text


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_image_sizes_that_square_cannot_tile_are_refused_before_any_work(norm):
    model, x, y = problem(2, side=12)
    reports = []
    with pytest.raises(RequestError, match="Square cannot tile images of 12 x 12 in " + norm):
        attack_chunk(
            model,
            x,
            y,
            ThreatModel(norm, 0.1),
            plan=only(*STANDARD_ATTACKS),
            seed=0,
            on_attack=lambda *at: reports.append(at),
        )
    assert reports == []


def test_an_evaluation_checks_the_tiling_of_every_threat_before_any_work():
    model, x, y = problem(2, side=12)
    reports, threats = [], ["Linf 0.1", "L2 0.1"]
    state = torch.random.get_rng_state()
    with pytest.raises(RequestError, match="Square cannot tile images of 12 x 12 in L2"):
        evaluate(
            model,
            (x, y),
            threats,
            attack="autoattack",
            on_progress=lambda *report: reports.append(report),
        )
    assert reports == []
    assert torch.equal(torch.random.get_rng_state(), state)


def test_square_in_linf_accepts_sizes_that_it_cannot_tile_in_l2():
    model, x, y = problem(2, side=12)
    threat = ThreatModel("Linf", 0.1)
    check_real(
        model,
        x,
        y,
        threat,
        *attack_chunk(model, x, y, threat, plan=only("square", **FEW), seed=0),
    )


@pytest.mark.parametrize(("graph_bytes", "calls"), [(2**30, [4, 4, 2]), (0, [4, 4, 2, 4, 2])])
def test_a_batch_in_passes_has_the_gradient_of_the_whole_batch(graph_bytes, calls, monkeypatch):
    monkeypatch.setattr(autoattack, "GRAPH_BYTES", graph_bytes)
    model, x, y = problem(10)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))

    def gradient(network):
        at = x.clone().requires_grad_()
        logits = network(at)
        loss = torch.nn.functional.cross_entropy(logits, y)
        return logits.detach(), torch.autograd.grad(loss, at)[0]

    whole = gradient(model)
    seen.clear()
    torch.testing.assert_close(gradient(InPasses(model, 4)), whole)
    assert sorted(seen) == sorted(calls)


def test_an_evaluation_gives_autoattack_passes_of_the_requested_size(monkeypatch):
    plan = only("apgd-ce", **FEW)
    monkeypatch.setattr(attackers, "plan_autoattack", lambda classes, threat: plan)
    model, x, y = problem(10)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    evaluate(model, (x, y), ["Linf 0.02"], attack="autoattack", batch_size=4)
    assert max(seen) == 4


# equal to pyautoattack


@by_threat
def test_apgd_ce_equals_pyautoattack_with_the_same_seed(threat):
    model, x, y = problem(channels=3, side=16)
    reference = pyautoattack.AutoAttack(
        model,
        norm=threat.norm,
        eps=threat.eps,
        seed=autoattack._seed_of_attack(11, "apgd-ce"),
        version="standard",
    )
    reference.attacks_to_run = ["apgd-ce"]
    points, labels = reference.run_standard_evaluation(x, y)
    x_adv, by = attack_chunk(model, x, y, threat, plan=only("apgd-ce"), seed=11)
    assert torch.equal(by >= 0, labels != y)
    assert 0 < int((by >= 0).sum()) < len(x)
    torch.testing.assert_close(x_adv, points, rtol=0, atol=0 if threat.norm != "L1" else 1e-6)


@thinned("threat", THREATS, one_in=3)
def test_all_four_equal_one_run_of_the_standard_version(threat, monkeypatch):
    # The standard version gives all four attacks the same seed.
    monkeypatch.setattr(autoattack, "_seed_of_attack", lambda seed, name: seed)
    model, x, y = problem(6)
    reference = pyautoattack.AutoAttack(
        model, norm=threat.norm, eps=threat.eps, seed=11, version="standard"
    )
    reference.square.n_queries = 100
    _, labels = reference.run_standard_evaluation(x, y)
    _, by = attack_chunk(
        model, x, y, threat, plan=replace(plan_autoattack(10, threat), queries=100), seed=11
    )
    assert torch.equal(by >= 0, labels != y)
    assert 0 < int((by >= 0).sum()) < len(x)


def test_apgd_t_has_at_most_five_targets_in_l1():
    targets = []
    for threat, classes in ((THREATS[0], 10), (THREATS[2], 10), (THREATS[2], 5)):
        plan = plan_autoattack(classes, threat)
        runner = autoattack._make_runner(
            "apgd-t", Flat(), threat, plan, seed=1, device=torch.device("cpu")
        )
        targets.append((runner.apgd_targeted.n_target_classes, runner.fab.n_target_classes))
    assert targets == [(9, 9), (5, 9), (4, 4)]


def test_fewer_steps_scale_the_schedule_as_in_pyautoattack():
    runner = autoattack._make_runner(
        "apgd-t",
        Flat(),
        THREATS[0],
        only("apgd-t", steps=50),
        seed=1,
        device=torch.device("cpu"),
    )
    reference = autopgd_base.APGDAttack(Flat(), n_iter=50, eps=1.0)
    for name in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr"):
        assert (
            getattr(runner.apgd, name)
            == getattr(runner.apgd_targeted, name)
            == getattr(reference, name)
        )


# results


@by_threat
@pytest.mark.parametrize("name", STANDARD_ATTACKS)
def test_each_attack_returns_real_adversarial_examples(name, threat):
    model, x, y = problem()
    x_adv, by = attack_chunk(model, x, y, threat, plan=only(name, **FEW), seed=1)
    check_real(model, x, y, threat, x_adv, by)
    assert set(by.tolist()) == {-1, 0}
    assert by.dtype == torch.int64


@by_threat
def test_a_channels_last_residual_network_is_attacked(threat):
    """The view of gradients in pyautoattack fails on channels_last tensors."""
    model, x, y = residual(6, side=16)
    model, x = (
        model.to(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
    )
    x_adv, by = attack_chunk(model, x, y, threat, plan=only(*STANDARD_ATTACKS, **FEW), seed=1)
    check_real(model, x, y, threat, x_adv, by)
    assert int((by >= 0).sum()) > 0


@by_threat
def test_a_single_small_image_is_attacked(threat):
    model, x, y = problem(1)
    x_adv, by = attack_chunk(
        model,
        x,
        y,
        ThreatModel(threat.norm, threat.eps / 100),
        plan=only(*STANDARD_ATTACKS, **FEW),
        seed=1,
    )
    assert by.tolist() == [-1]
    assert torch.equal(x_adv, x)


def test_an_attack_receives_only_what_earlier_attacks_left():
    """Square with few queries comes first, and leaves most images to the second attack."""
    model, x, y = problem()
    threat = THREATS[0]
    alone = attack_chunk(model, x, y, threat, plan=only("square", **FEW), seed=1)
    x_adv, by = attack_chunk(model, x, y, threat, plan=only("square", "apgd-ce", **FEW), seed=1)
    assert set(by.tolist()) >= {0, 1}
    assert torch.equal(by == 0, alone[1] == 0)
    assert torch.equal(x_adv[by == 0], alone[0][by == 0])
    check_real(model, x, y, threat, x_adv, by)


@pytest.mark.parametrize("classes", [4, 6])
def test_fewer_classes_are_attacked_by_all_four(classes):
    threat = THREATS[0]
    model, x, y = problem(6, classes=classes)
    x_adv, by = attack_chunk(
        model, x, y, threat, plan=replace(plan_autoattack(classes, threat), **FEW), seed=1
    )
    check_real(model, x, y, threat, x_adv, by)


def test_a_linear_network_is_broken_wherever_that_is_possible():
    """In Linf, class k is reached iff eps ||w_k - w_y||_1 exceeds the gap of the logits.

    The images lie deep enough in the box for this to hold.
    """
    generator = torch.Generator().manual_seed(2)
    linear = nn.Linear(16, 10)
    linear.weight.data = torch.randn(10, 16, generator=generator)
    model, x = (
        nn.Sequential(nn.Flatten(), linear),
        0.3 + 0.4 * torch.rand(20, 1, 4, 4, generator=generator),
    )
    with torch.no_grad():
        logits = model(x).double()
    y, weight = logits.argmax(1), linear.weight.detach().double()
    distance = (logits.gather(1, y[:, None]) - logits) / (weight[y][:, None] - weight).abs().sum(2)
    distance = distance.scatter(1, y[:, None], torch.inf).amin(1)
    ranked = distance.sort().values
    threat = ThreatModel("Linf", float(ranked[9] + ranked[10]) / 2)
    assert threat.eps < 0.3
    x_adv, by = attack_chunk(
        model, x, y, threat, plan=replace(plan_autoattack(10, threat), queries=30), seed=0
    )
    assert torch.equal(by >= 0, distance < threat.eps)
    check_real(model, x, y, threat, x_adv, by)


def test_every_point_is_checked():
    """The four points: too far away, NaN, feasible but classified correctly, and a real one."""
    model, x, y = problem(4)
    far = ThreatModel("Linf", 0.5)
    real, by = attack_chunk(model, x, y, far, plan=only("apgd-ce", steps=10), seed=0)
    assert by.tolist() == [0] * 4
    threat = ThreatModel("Linf", 1e-7)
    points = torch.stack([real[0], torch.full_like(x[1], torch.nan), x[2], real[3]])
    _, broken = autoattack._certify_points(model, points, x, y, threat)
    assert broken.tolist() == [False] * 4
    _, broken = autoattack._certify_points(model, points, x, y, far)
    assert broken.tolist() == [True, False, False, True]


def test_a_point_just_outside_the_l1_ball_is_projected_and_still_broken():
    """The float32 sums of APGD leave a large ball by a little; here it is more than rounding."""

    def model(x):
        """The class is 1 where the pixels sum to over 9."""
        total = x.flatten(1).sum(1)
        return torch.stack([torch.full_like(total, 9), total], 1)

    threat = ThreatModel("L1", 1.6)
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.tensor([0])
    outside = x + 0.1 * (1 + 1e-4)
    points, broken = autoattack._certify_points(model, outside, x, y, threat)
    assert broken.tolist() == [True]
    assert float((outside.double() - x).abs().sum()) > threat.eps + 1e-4
    assert float((points.double() - x).abs().sum()) <= threat.eps + 1e-6


@pytest.mark.parametrize(("n", "threat"), [(0, THREATS[0]), (3, CLEAN)])
def test_without_samples_or_radius_nothing_is_broken(n, threat):
    model, x, y = problem(3)
    x_adv, by = attack_chunk(model, x[:n], y[:n], threat, plan=only(*STANDARD_ATTACKS), seed=0)
    assert torch.equal(x_adv, x[:n])
    assert by.tolist() == [-1] * n


# side effects


def test_only_the_seed_determines_the_noise():
    model, x, y = problem()
    threat = THREATS[0]
    found = []
    for state, seed in ((0, 1), (99, 1), (0, 2)):
        torch.manual_seed(state)
        found.append(
            attack_chunk(model, x, y, threat, plan=only(*STANDARD_ATTACKS, **FEW), seed=seed)
        )
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])


def test_every_attack_and_seed_has_its_own_noise():
    assert (
        len(
            {
                autoattack._seed_of_attack(seed, name)
                for seed in (-1, 0, 1, 2, 2**40)
                for name in STANDARD_ATTACKS
            }
        )
        == 20
    )


def random_state():
    return torch.random.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_random_state_network_and_trace_function_are_restored():
    model, x, y = problem(4)
    model[0].train()
    modes = [part.training for part in model.modules()]
    next(model.parameters()).requires_grad_(False)
    wanted = [weight.requires_grad for weight in model.parameters()]
    before, image = random_state(), x.clone()

    def trace(frame, event, arg):
        return None

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        attack_chunk(model, x, y, THREATS[0], plan=only(*STANDARD_ATTACKS, **FEW), seed=0)
        remaining_trace = sys.gettrace()
    finally:
        sys.settrace(old)
    assert remaining_trace is trace
    assert random_state() == before
    assert [part.training for part in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(x, image)


def test_warnings_reach_handlers_but_are_not_printed(capfd, monkeypatch):
    # pytest's handlers would keep the warnings from being printed.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    x, y, logger = (
        torch.full((2, 1, 8, 8), 0.5),
        torch.tensor([9, 9]),
        logging.getLogger("auto-attack"),
    )
    handlers = list(logger.handlers)

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    records, keep = [], Keep()
    logger.addHandler(keep)
    try:
        attack_chunk(Flat(), x, y, THREATS[0], plan=only("apgd-t", **FEW), seed=0)
    finally:
        logger.removeHandler(keep)
    assert any("zero gradient" in text for text in records)
    assert logger.handlers == handlers
    attack_chunk(Flat(), x, y, THREATS[0], plan=only(*STANDARD_ATTACKS, **FEW), seed=0)
    assert capfd.readouterr() == ("", "")


def test_after_each_attack_the_rest_can_go_on_alone():
    model, x, y = problem(10)
    request = {"plan": only("square", "apgd-ce", "apgd-t", **FEW), "seed": 1}
    reports = []

    def note(points, by, finished):
        reports.append((points.clone(), by.clone(), finished))

    whole, by = attack_chunk(model, x, y, THREATS[0], on_attack=note, **request)
    assert [finished for *_, finished in reports] == [1, 2, 3]
    assert torch.equal(reports[-1][0], whole)
    for _, earlier, finished in reports:
        assert torch.equal(earlier, torch.where(by < finished, by, -1))
        left = earlier < 0
        rest, rest_by = attack_chunk(
            model, x[left], y[left], THREATS[0], finished=finished, **request
        )
        assert torch.equal(rest, whole[left])
        assert torch.equal(rest_by, by[left])

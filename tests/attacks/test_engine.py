"""The engine of the attacks: verdicts that depend on the sample alone, searches that are cheaper than their judges."""

import itertools
import math
import threading

import pytest
import torch
from digits import check_inside, digits_network
from torch import nn
from torch.nn import functional

from robustsoup.attacks import apgd, apgd_train, pgd, run_attack
from robustsoup.attacks import losses
from robustsoup.attacks.attempts import check_points, list_attempts
from robustsoup.attacks.engine import DeviceRows, Search, take_step
from robustsoup.attacks.folding import fold_batchnorm
from robustsoup.attacks.forward import frozen_eval, input_gradient, pass_size, predict_logits
from robustsoup.attacks.losses import ce
from robustsoup.attacks.outcome import Samples
from robustsoup.attacks.projections import norms, project
from robustsoup.attacks.steps import StepSchedule, cold_start, initial_state
from robustsoup.catalog import LOSSES
from robustsoup.data import load_data, to_float
from robustsoup.errors import RequestError
from robustsoup.models import load_model
from robustsoup.settings import AttackSettings
from robustsoup.threats import NORMS, ThreatModel

N = 100  # more than a pass takes, so that rows are refilled
THREATS = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.7), ThreatModel("L1", 1.0)]
by_threat = pytest.mark.parametrize("threat", THREATS, ids=str)
by_precision = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
PARTS = ("broken", "step", "by", "x_adv")


@pytest.fixture(scope="module")
def trained():
    """A small network in float32 that tells the digits apart, and 100 of them."""
    data = load_data("digits")
    model = digits_network(4)
    x, y = to_float(data.test.images[:N]), data.test.labels[:N].clone()
    with torch.no_grad():
        assert float((model(x).argmax(1) == y).float().mean()) > 0.8
    return model, x, y


@pytest.fixture
def threads():
    """Sets how many threads PyTorch, and so how many lanes the attack has; they are as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(model, x, y, threat, *, ids=None, **settings):
    return run_attack(model, x, y, threat, AttackSettings(**{"steps": 10, **settings}), ids=ids)


def right(model, x, y):
    """(n,) bool: what the network gets right, in passes of the one shape that verdicts are made in."""
    with frozen_eval(model):
        return (
            predict_logits(model, lambda at: x[at], len(x), pass_size(x.device), x.device).argmax(1)
            == y
        )


def check_broken(model, result, x, y, threat):
    """Broken is exactly what the network itself gets wrong in float32 at x_adv, which is in the ball and in the box."""
    assert torch.equal(result.broken, ~right(model, result.x_adv, y))
    check_inside(result.x_adv, x, threat)


def same(one, other, at):
    """Whether `other` says bit for bit of its samples what `one` says of samples `at`."""
    return all(torch.equal(getattr(other, part), getattr(one, part)[at]) for part in PARTS)


# a verdict is the sample's own


@by_precision
@pytest.mark.parametrize("loss", LOSSES)
@by_threat
def test_verdicts_are_bit_equal_whatever_the_company(trained, threads, threat, loss, precision):
    model, x, y = trained
    ids = torch.arange(N) * 7 + 3
    settings = {"steps": 6, "loss": loss, "targets": 2, "precision": precision}
    threads(1)
    whole = run(model, x, y, threat, ids=ids, **settings)
    assert 0 < int(whole.broken.sum()) < N
    assert len(set(whole.step.tolist())) > 2
    everything = torch.arange(N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for rows, batch_size in (
        (order, None),
        *((shard, None) for shard in order.split(61)),
        (everything, 32),
        (order, 250),
    ):
        again = run(
            model, x[rows], y[rows], threat, ids=ids[rows], batch_size=batch_size, **settings
        )
        assert same(whole, again, rows), (len(rows), batch_size)
    threads(2)
    assert same(whole, run(model, x, y, threat, ids=ids, **settings), everything)
    assert torch.get_num_threads() == 2


@by_precision
def test_every_pass_has_one_shape(trained, precision):
    model, x, y = trained
    shapes, x = [], x[:45]

    class Spy(nn.Module):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            return model(x)

    run(Spy(), x, y[:45], THREATS[0], precision=precision, steps=4)
    assert shapes[0] == (2, 1, 8, 8)  # the look at the network
    folding = shapes.count((16, 1, 8, 8))
    assert folding == (precision == "bfloat16")
    assert set(shapes[1:]) - {(16, 1, 8, 8)} == {(32, 1, 8, 8)}


def test_other_ids_give_other_verdicts(trained):
    """What the test above would miss if noise were not a sample's own, or there were none."""
    model, x, y = trained
    one, other = (run(model, x, y, THREATS[0], ids=torch.arange(N) + shift) for shift in (0, 1))
    assert not same(one, other, torch.arange(N))


@pytest.mark.parametrize("batch_size", [1, 5, 31])
def test_smaller_passes_come_to_the_same_verdicts(trained, batch_size):
    """Their shape is another one, and so is their rounding: bits may differ, verdicts on this network do not."""
    model, x, y = trained
    some = slice(0, 30)
    whole = run(model, x[some], y[some], THREATS[0], steps=4)
    again = run(model, x[some], y[some], THREATS[0], steps=4, batch_size=batch_size)
    assert torch.equal(again.broken, whole.broken)
    torch.testing.assert_close(again.x_adv, whole.x_adv, rtol=0, atol=1e-4)


# a search in bfloat16, judged in float32


class Eavesdropper(nn.Module):
    """The same network; it writes down, for each pass, whether autocast was on and whether a gradient was wanted."""

    heard: list = []  # noqa: RUF012  (outside of the instance: a folded network is a copy)

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        self.heard.append((torch.is_autocast_enabled("cpu"), x.requires_grad))
        return self.network(x)


@by_precision
def test_only_the_search_runs_in_bfloat16(trained, precision):
    model, x, y = trained
    Eavesdropper.heard.clear()
    run(Eavesdropper(model), x, y, THREATS[0], steps=3, precision=precision)
    searched = {autocast for autocast, wanted in Eavesdropper.heard if wanted}
    judged = {autocast for autocast, wanted in Eavesdropper.heard if not wanted}
    assert searched == {precision == "bfloat16"}
    assert judged == {False}


@pytest.mark.parametrize("loss", LOSSES)
@by_threat
def test_what_a_bfloat16_search_broke_is_broken_in_float32(trained, threat, loss):
    model, x, y = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, x, y, threat, loss=loss, precision="bfloat16")
    check_broken(model, result, x, y, threat)
    exact = run(model, x, y, threat, loss=loss)
    assert not same(exact, result, torch.arange(N))  # it was another search
    assert abs(int(result.broken.sum()) - int(exact.broken.sum())) <= 8  # and hardly a weaker one
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Doubting(nn.Module):
    """Two classes; class 1 gains w . x - bias. Under autocast it answers `lie` on top of that."""

    def __init__(self, w, bias, lie):
        super().__init__()
        self.w, self.bias, self.lie = nn.Parameter(w), bias, lie

    def forward(self, x):
        gain = (x.float() * self.w).flatten(1).sum(1) - self.bias
        if torch.is_autocast_enabled("cpu"):
            gain = gain + self.lie
        return torch.stack([torch.zeros_like(gain), gain], 1)


def doubted(threat, gap, lie, seed=0):
    """20 samples of class 0 that the best perturbation leaves `gap` short of class 1, and a network that lies by `lie`.

    Two largest weights, because APGD in L1 never moves fewer than two pixels.
    """
    w = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(seed))
    w[0, 0, 0], w[0, 3, 1] = -3.5, 3.5
    x = torch.full((20, 1, 5, 5), 0.5)
    dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[threat.norm]
    most = threat.eps * float(torch.linalg.vector_norm(w.flatten(), dual))
    return (
        Doubting(w, float((x[0] * w).sum()) + most + gap, lie),
        x,
        torch.zeros(20, dtype=torch.long),
    )


LINEAR = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.45), ThreatModel("L1", 0.45)]


@pytest.mark.parametrize("threat", LINEAR, ids=str)
def test_what_only_bfloat16_takes_for_broken_is_robust(threat):
    """Every point of the search is a hit, none of them in float32: each is sent back, and the search goes on to its end."""
    model, x, y = doubted(threat, gap=0.1, lie=100.0)
    result = run(model, x, y, threat, precision="bfloat16", steps=12)
    assert not bool(result.broken.any())
    assert bool((result.step == -1).all())
    exact = run(model, x, y, threat, steps=12)
    with torch.no_grad():
        found, aim = ce(model(result.x_adv), y), ce(model(exact.x_adv), y)
    torch.testing.assert_close(found, aim, rtol=2e-2, atol=0)  # the doubts cost no strength


@pytest.mark.parametrize("threat", LINEAR, ids=str)
def test_what_bfloat16_overlooks_is_found_at_the_end(threat):
    """No point of the search is a hit; the last and the best point are judged in float32 all the same."""
    model, x, y = doubted(threat, gap=-0.1, lie=-5.0)
    result = run(model, x, y, threat, precision="bfloat16", steps=12)
    check_broken(model, result, x, y, threat)
    exact = run(model, x, y, threat, steps=12)
    assert int(exact.broken.sum()) == 20
    assert int(result.broken.sum()) == 20
    assert bool((result.step >= exact.step).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_point_of_a_bfloat16_search_is_judged_too(seed):
    """A target that the search oversteps again and again: the best point is a hit where the last one is not."""
    w = torch.randn(25, generator=torch.Generator().manual_seed(seed))

    class Target(nn.Module):
        def forward(self, x):
            gain = 0.02 - (((x.flatten(1) - 0.5) * w).sum(1) - 0.31).abs()
            seen = gain - 5.0 * torch.is_autocast_enabled("cpu")
            return torch.stack([torch.zeros_like(gain), seen, gain - 100.0], 1)

    def honest(logits, y):
        return logits[:, 2]

    x, y, threat = (
        torch.full((40, 1, 5, 5), 0.5),
        torch.zeros(40, dtype=torch.long),
        ThreatModel("L2", 0.3),
    )
    exact, found = (
        run(Target(), x, y, threat, steps=8, precision=p, loss=honest)
        for p in ("float32", "bfloat16")
    )
    assert torch.equal(found.broken, exact.broken)
    assert len(set(found.step[found.broken].tolist())) > 1  # not all of them at the last point
    check_broken(Target(), found, x, y, threat)


# attempts: restarts, targets, random networks


def test_what_attempts_are_called():
    names = [
        attempt.name
        for attempt in list_attempts(AttackSettings(loss="targeted dlr", targets=2, restarts=2), 10)
    ]
    assert names == [
        "apgd-t target 1",
        "apgd-t target 2",
        "apgd-t target 1 restart 2",
        "apgd-t target 2 restart 2",
    ]
    assert [
        a.name for a in list_attempts(AttackSettings(attack="pgd", loss="dlr", restarts=2), 10)
    ] == [
        "pgd-dlr",
        "pgd-dlr restart 2",
    ]
    assert [a.name for a in list_attempts(AttackSettings(targets=3), 10)] == ["apgd-ce"]
    for classes, targets in ((4, 3), (7, 6), (10, 9), (100, 9)):
        assert len(list_attempts(AttackSettings(loss="targeted dlr"), classes)) == targets


@by_threat
def test_restarts_add_breaks_and_take_none_back(trained, threat):
    model, x, y = trained
    weak = ThreatModel(threat.norm, threat.eps * 0.7)
    results = [run(model, x, y, weak, steps=3, restarts=restarts) for restarts in (1, 2, 6)]
    assert results[2].attempts == (
        "apgd-ce",
        *(f"apgd-ce restart {number}" for number in range(2, 7)),
    )
    for fewer, more in itertools.pairwise(results):
        kept = fewer.broken
        assert bool((more.broken | ~kept).all())
        assert all(
            torch.equal(getattr(more, part)[kept], getattr(fewer, part)[kept]) for part in PARTS
        )
    assert int(results[2].broken.sum()) > int(results[0].broken.sum())
    check_broken(model, results[2], x, y, weak)
    late = results[2].broken & ~results[0].broken
    assert bool((results[2].by[late] >= 1).all())
    wrong = ~right(model, x, y)
    assert bool((results[2].by[wrong] == -1).all())
    assert bool((results[2].by[~results[2].broken] == -1).all())


@pytest.mark.parametrize("norm", NORMS)
def test_every_restart_seed_and_sample_starts_elsewhere(norm):
    x = torch.full((3, 1, 6, 6), 0.5)
    starts = [
        cold_start(x, 0.2, norm, seed=seed, ids=torch.tensor(ids), restart=restart)
        for seed, ids, restart in (
            (0, [1, 2, 3], 0),
            (1, [1, 2, 3], 0),
            (0, [1, 2, 3], 1),
            (0, [4, 5, 6], 0),
        )
    ]
    points = torch.cat(starts).flatten(1)
    assert len({tuple(point.tolist()) for point in points}) == 12
    assert float(norms(points.double() - 0.5, norm).max()) <= 0.2 + 1e-6
    again = cold_start(x[:1], 0.2, norm, seed=0, ids=torch.tensor([2]))
    assert torch.equal(again[0], starts[0][1])  # whoever stands beside it


def test_more_targets_break_no_less_and_each_is_another_class(trained, monkeypatch):
    model, x, y = trained
    threat, whole, asked = ThreatModel("Linf", 0.06), losses.targeted_dlr, []

    def spy(logits, labels, target):
        asked.append((labels.clone(), target.clone()))
        return whole(logits, labels, target)

    monkeypatch.setattr(losses, "targeted_dlr", spy)
    one, three = (
        run(model, x, y, threat, loss="targeted dlr", targets=targets) for targets in (1, 3)
    )
    assert three.attempts == ("apgd-t target 1", "apgd-t target 2", "apgd-t target 3")
    assert bool((three.broken | ~one.broken).all())
    assert {1, 2} & set(three.by.tolist())
    assert all(bool((labels != target).all()) for labels, target in asked)


def test_targets_are_the_likeliest_other_classes(monkeypatch):
    """Class k scores 1 - k / 10: the ranks are 1, 2, 3 for label 0, and those of the other labels leave it out."""
    asked = []

    def spy(logits, labels, target):
        asked.append(dict(zip(labels.tolist(), target.tolist(), strict=True)))
        return logits[:, 0] * 0

    class Scores(nn.Module):
        def forward(self, x):
            first = functional.one_hot((x[:, 0, 0, 0] * 5).long(), 5)
            return x.flatten(1).sum(1, keepdim=True) * 0 + 1 - torch.arange(5) / 10 + first

    monkeypatch.setattr(losses, "targeted_dlr", spy)
    x = (torch.arange(3.0) / 5 + 0.1).view(3, 1, 1, 1)
    run(
        Scores(),
        x,
        torch.arange(3),
        ThreatModel("Linf", 1e-3),
        loss="targeted dlr",
        targets=3,
        steps=1,
    )
    assert [asked[0], asked[2], asked[4]] == [
        {0: 1, 1: 0, 2: 0},
        {0: 2, 1: 2, 2: 1},
        {0: 3, 1: 3, 2: 3},
    ]


@pytest.mark.parametrize(
    ("loss", "classes", "least"), [("dlr", 2, 3), ("targeted dlr", 2, 4), ("targeted dlr", 3, 4)]
)
@pytest.mark.parametrize("attack", [apgd, pgd])
def test_a_loss_that_needs_more_classes_is_refused(loss, classes, least, attack):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(
        RequestError, match=rf'loss: "{loss}" needs {least} classes or more, got {classes}; use ce'
    ):
        attack(network, x, y, "Linf 0.1", loss=loss)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, least))
    assert attack(network, x, y, "Linf 0.1", loss=loss, steps=2).shape == x.shape


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
@pytest.mark.parametrize("attack", [apgd, pgd])
def test_wrong_settings_are_refused(wrong, text, attack):
    with pytest.raises(RequestError, match=text):
        attack(
            nn.Flatten(),
            torch.rand(2, 1, 2, 2),
            torch.zeros(2, dtype=torch.long),
            "Linf 0.1",
            **wrong,
        )


class Changing(nn.Module):
    """A linear network whose weights are another multiple in every pass that a gradient is asked of."""

    def __init__(self, w):
        super().__init__()
        self.w, self.passes = w, 0

    def forward(self, x):
        self.passes += x.requires_grad
        return x.flatten(1) @ (self.w * (self.passes if x.requires_grad else 1))


def test_eot_averages_losses_and_gradients():
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3
    _, loss, grad = input_gradient(Changing(w), x, y, ce, "float32", eot=3)
    parts = [
        input_gradient(lambda x, k=k: x.flatten(1) @ (w * k), x, y, ce, "float32")
        for k in (1, 2, 3)
    ]
    torch.testing.assert_close(loss, sum(part[1] for part in parts) / 3)
    torch.testing.assert_close(grad, sum(part[2] for part in parts) / 3)


@pytest.mark.parametrize("eot", [1, 2, 5])
def test_eot_takes_so_many_passes_a_step(eot):
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 1e-6
    x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    y = (x.flatten(1) @ w).argmax(1)
    model = Changing(w)
    result = run(model, x, y, ThreatModel("Linf", 1e-4), steps=4, eot=eot)
    assert not bool(result.broken.any())
    assert model.passes == 4 * eot


def test_eot_finds_what_noise_hides():
    """A linear network whose gradient drowns in noise: averaged over 30 passes it shows."""
    w = torch.randn(36, generator=torch.Generator().manual_seed(2))
    w = w / w.norm()

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x):
            noise = torch.randn(36, generator=self.generator) * x.requires_grad
            gain = x.flatten(1) @ (w + noise) - 0.5 * float(w.sum() + noise.sum()) - 2.0
            return torch.stack([torch.zeros_like(gain), gain], 1)

    x, y = torch.full((40, 1, 6, 6), 0.5), torch.zeros(40, dtype=torch.long)
    gains = []
    for eot in (1, 30):
        points = pgd(Noisy(), x, y, "L2 0.1", steps=10, eot=eot).flatten(1) - 0.5
        gains.append(float((points @ w).mean()))
    assert gains[1] > gains[0] + 0.02


# PGD


@by_precision
@by_threat
def test_pgd_breaks_and_stays_in_the_ball(trained, threat, precision):
    model, x, y = trained
    threat = ThreatModel(threat.norm, threat.eps * 0.7)
    result = run(model, x, y, threat, attack="pgd", steps=20, precision=precision)
    assert result.attempts == ("pgd-ce",)
    check_broken(model, result, x, y, threat)
    wrong = int((~right(model, x, y)).sum())
    assert wrong + 10 <= int(result.broken.sum()) < N
    torch.testing.assert_close(
        pgd(model, x, y, threat, precision=precision), result.x_adv, rtol=0, atol=0
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("threat", "share"), [(ThreatModel("Linf", 0.1), 1 - 1e-5), (ThreatModel("L2", 0.45), 0.96)]
)
def test_pgd_finds_the_best_perturbation_of_a_linear_network(threat, share, seed):
    """In L2 the angle to it shrinks step by step, by 2.5 radii in all: a few percent are left."""
    model, x, y = doubted(threat, gap=0.5, lie=0.0, seed=seed)
    most = model.bias - 0.5 - float((x[0] * model.w.detach()).sum())
    gain = ((pgd(model, x, y, threat, steps=40) - x).double() * model.w.detach()).flatten(1).sum(1)
    assert bool((gain <= most * (1 + 1e-5)).all())
    assert float(gain.min()) >= most * share


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_is_its_textbook(norm, steps):
    """A random start, steps of 2.5 eps / steps along the steepest direction, the point of highest loss of all of them."""
    threat = ThreatModel(norm, 0.3)
    model, x, y = doubted(threat, gap=0.5, lie=0.0)
    w, eps = model.w.detach(), torch.full((len(x),), threat.eps)
    direction = {
        "Linf": w.sign(),
        "L2": w / w.norm(),
        "L1": w.sign() * (w.abs() >= w.abs().flatten().sort()[0][20]) / 5,
    }
    point = cold_start(x, threat.eps, norm, seed=0, ids=torch.arange(len(x)))
    points = [point]
    for _ in range(steps):
        point = project(point + 2.5 * threat.eps / steps * direction[norm], x, eps, norm)
        points.append(point)
    with torch.no_grad():
        losses = torch.stack([ce(model(point), y) for point in points])
        found = ce(model(pgd(model, x, y, threat, steps=steps)), y)
    torch.testing.assert_close(found, losses.amax(0), rtol=1e-4, atol=0)


# a folded network


class Fold(nn.Module):
    """conv, BatchNorm, ReLU, twice, and a linear layer; with statistics and weights that are not trivial."""

    def __init__(self, seed=0, stats=True):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.norm1, self.norm2 = (nn.BatchNorm2d(4, track_running_stats=stats) for _ in range(2))
        self.head = nn.Linear(4 * 36, 3)
        generator = torch.Generator().manual_seed(seed)
        for module in (self.norm1, self.norm2):
            for tensor in (
                *module.parameters(),
                *(b for b in module.buffers() if b.is_floating_point()),
            ):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        return self.head(self.norm2(self.second(x)).relu().flatten(1))


class Between(Fold):
    """Something that is no module stands between convolution and BatchNorm."""

    def forward(self, x):
        x = self.norm1(self.first(x) * 2 + 1).relu()
        return self.head(self.norm2(functional.relu(self.second(x))).relu().flatten(1))


class Beside(Fold):
    """Something that is no module reads the convolution's output beside its BatchNorm."""

    def forward(self, x):
        x = self.first(x)
        x = self.norm1(x).relu() + x
        second = self.second(x)
        return self.head((self.norm2(second) - second.mean()).relu().flatten(1))


class InPlace(Fold):
    """The convolution's output is changed in place before its BatchNorm sees it, still the same tensor."""

    def forward(self, x):
        x = self.norm1(self.first(x).relu_()).relu()
        return self.head(self.norm2(self.second(x).mul_(3)).relu().flatten(1))


class PreActivation(Fold):
    """BatchNorm before its convolution."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(1)

    def forward(self, x):
        x = self.first(self.norm1(x).relu())
        return self.head(self.second(self.norm2(x.relu()).relu()).flatten(1))


class Twice(Fold):
    """Modules that are called twice: one BatchNorm for two convolutions, and one convolution for two BatchNorms."""

    def __init__(self):
        super().__init__()
        self.norm3 = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        x = self.norm1(self.second(x)).relu()
        return self.head(self.norm3(self.second(x)).relu().flatten(1))


def images(n=8):
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(9))


def batchnorms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_what_follows_a_convolution_is_folded_into_it():
    model = Fold().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    light = fold_batchnorm(model, images())
    assert light is not model
    assert (batchnorms(light), batchnorms(model)) == (0, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not {id(tensor) for tensor in light.parameters()} & {
        id(tensor) for tensor in model.parameters()
    }
    assert not any(module._forward_hooks for net in (model, light) for module in net.modules())
    x = images(50)
    with torch.no_grad():
        torch.testing.assert_close(light(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_resnet_is_folded_through_its_shortcuts(trained):
    model, x, _ = trained
    light = fold_batchnorm(model, x[:16])
    assert (batchnorms(light), batchnorms(model)) == (0, 8)
    with torch.no_grad():
        torch.testing.assert_close(light(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "network",
    [Between, Beside, InPlace, PreActivation, Twice, lambda: Fold(stats=False)],
    ids=["between", "beside", "in place", "pre-activation", "twice", "no statistics"],
)
def test_what_cannot_be_folded_is_left_alone(network):
    model = network().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fold_batchnorm(model, images()) is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_one_branch_is_folded_where_another_cannot_be():
    class Half(Fold):
        def forward(self, x):
            x = self.norm1(self.first(x)).relu()
            return self.head(self.norm2(self.second(x) + x).relu().flatten(1))

    model = Half().eval()
    light = fold_batchnorm(model, images())
    assert isinstance(light.norm1, nn.Identity)
    assert isinstance(light.norm2, nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(light(images(50)), model(images(50)), rtol=1e-4, atol=1e-5)


# ready-made points


@by_threat
def test_ready_made_points_are_judged_in_float32(trained, threat):
    model, x, y = trained
    found = run(model, x, y, threat)
    samples = Samples(lambda at: x[at], y, torch.arange(N), model(x))
    which = torch.arange(5, 97)
    broken, margin = check_points(
        model, samples, lambda at: found.x_adv[at], which, size=32, device=x.device
    )
    assert torch.equal(broken, found.broken[which])
    assert torch.equal(margin < 0, broken)
    nothing, _ = check_points(
        model, samples, lambda at: found.x_adv[at], which[:0], size=32, device=x.device
    )
    assert len(nothing) == 0
    assert nothing.dtype == torch.bool


# no question to the device


@pytest.mark.parametrize("attack", ["apgd", "pgd"])
@pytest.mark.parametrize("loss", LOSSES)
@by_threat
def test_a_step_asks_the_device_nothing(threat, loss, attack):
    """Tensors on PyTorch's "meta" device have no values: waiting for one raises an error."""
    meta = torch.device("meta")
    x, y = torch.empty(6, 1, 8, 8, device=meta), torch.empty(6, dtype=torch.long, device=meta)
    model = load_model("resnet9:width=2", channels=1).eval().requires_grad_(False).to(meta)
    settings = AttackSettings(attack=attack, loss=loss, steps=20, eot=2)
    search = search_of(model, Samples(lambda rows: x[rows], y, y, y), threat, settings, 10)
    schedule = search.schedule
    rows = DeviceRows.from_state(initial_state(x, y, schedule.stages[0][0], x, schedule, target=y))
    with pytest.raises(RuntimeError):
        bool(rows.found.any())  # reading a value does raise
    assert search.window > 1
    with torch.no_grad():
        for _ in range(search.window):
            take_step(search, rows, schedule.check_periods().to(meta))


def search_of(model, samples, threat, settings, classes):
    """The work of the first attempt, on the device of the samples' labels."""
    schedule = StepSchedule.for_threat(threat, settings.steps, adaptive=settings.attack == "apgd")
    return Search(
        model=model,
        search_model=model,
        samples=samples,
        attempt=list_attempts(settings, classes)[0],
        index=0,
        attempts=1,
        schedule=schedule,
        seed=settings.seed,
        precision=settings.precision,
        eot=settings.eot,
        pass_size=6,
        device=samples.y.device,
    )


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 20, 50, 97, 100])
@by_threat
def test_the_window_divides_every_stage(threat, steps):
    nothing = torch.empty(0, device="meta")
    samples = Samples(lambda rows: rows, nothing, nothing, nothing)
    search = search_of(nn.Identity(), samples, threat, AttackSettings(steps=steps), 10)
    assert 1 <= search.window <= 10
    assert all(count % search.window == 0 for _, count in search.schedule.stages)
    if steps == 100:
        assert search.window == 10


# training's attack


@by_threat
def test_training_is_shared_out_among_lanes(trained, threads, threat):
    model, x, y = trained
    threads(1)
    alone = apgd_train(model, x, y, threat)
    threads(2)
    shared = apgd_train(model, x, y, threat)
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-6)
    assert torch.equal(shared, apgd_train(model, x, y, threat))
    assert torch.get_num_threads() == 2
    assert math.isfinite(float(shared.sum()))


def test_threads_to_come_have_as_many_threads_as_before(trained, threads):
    """A lane limits itself to one core; PyTorch would hand that on to every thread that begins later."""
    model, x, y = trained
    threads(3)
    run(model, x, y, THREATS[0], steps=2)
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]
    assert torch.get_num_threads() == 3


def test_an_error_in_a_lane_comes_out_and_leaves_the_threads(threads):
    threads(2)

    class Fails(nn.Module):
        def forward(self, x):
            if x.requires_grad:
                raise ZeroDivisionError
            return x.flatten(1)

    x = torch.rand(100, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ZeroDivisionError):
        run(Fails(), x, x.flatten(1).argmax(1), THREATS[0])
    assert torch.get_num_threads() == 2


# float32 is float32


def test_verdicts_are_not_made_in_tf32(trained):
    model, x, y = trained
    allowed = []

    class Asks(nn.Module):
        def forward(self, x):
            allowed.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
            return model(x)

    before = torch.backends.cudnn.allow_tf32
    run(Asks(), x[:10], y[:10], THREATS[0], steps=2)
    assert not any(allowed)
    assert torch.backends.cudnn.allow_tf32 == before

"""Objectives: spellings, losses, attacks, and user-defined objectives."""

import copy
import importlib.util
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from digits import check_inside, digits_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from trained_seed import trained_seed
from training_helpers import DATA, DIGITS, LINF, fresh_network, interrupt_at, train_digits

from robustsoup.attacks import apgd_train
from robustsoup.attacks.forward import input_gradient
from robustsoup.attacks.losses import ce, kl
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import batches, to_float
from robustsoup.errors import CheckpointError, ThreatError
from robustsoup.models import load_model
from robustsoup.runs.tasks import step_passes
from robustsoup.settings import LearnSettings
from robustsoup.soups.learning import learn
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.adversarial_loss import (
    BatchNoise,
    attack_batch,
    objective_loss,
)
from robustsoup.training.objectives import Objective, clean_weight, trades

THREATS = [LINF, ThreatModel("L2", 0.5), ThreatModel("L1", 3.0)]
OWN_LOSSES = """
from functools import partial

from robustsoup.attacks.losses import ce, kl
from robustsoup.training.objectives import Objective


def half(clean, attacked, y):
    return (ce(clean, y) + ce(attacked, y)) / 2


def smooth(clean, attacked, y, label_smoothing=0.0):
    return ce(attacked, y)


def scaled(clean, attacked, y, factor):
    return factor * ce(attacked, y)


class Weighted:
    def __init__(self, beta):
        self.beta = beta

    def __call__(self, clean, attacked, y):
        return ce(attacked, y)


steep = Objective(partial(scaled, factor=2.0))
steeper = Objective(partial(scaled, factor=3.0))
kl_attack = Objective(half, attack_loss=kl, attack_compares_with_clean=True)
weighted = Objective(Weighted(2.0))
only_clean = Objective(lambda clean, attacked, y: ce(clean, y), uses_attacked=False)
"""


def load_mart():
    path = Path(__file__).parents[2] / "examples" / "mart.py"
    spec = importlib.util.spec_from_file_location("mart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mart


def trades_by_hand(clean, adv, y, beta):
    """Compute TRADES as in Zhang et al.'s own code: batch means, gradient through both."""
    natural = F.cross_entropy(clean, y)
    divergence = F.kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="sum")
    return natural + beta / len(y) * divergence


def zhang_loss(model, x_natural, x_adv, y, beta):
    """Return trades_loss of the authors' trades.py after its attack, line by line."""
    logits = model(x_natural)
    loss_natural = F.cross_entropy(logits, y)
    loss_robust = (1.0 / len(x_natural)) * nn.KLDivLoss(reduction="sum")(
        F.log_softmax(model(x_adv), dim=1), F.softmax(model(x_natural), dim=1)
    )
    return loss_natural + beta * loss_robust


def random_logits(seed, b=9, classes=5):
    generator = torch.Generator().manual_seed(seed)
    clean, adv = (3 * torch.randn(2, b, classes, generator=generator)).unbind(0)
    return clean, adv, torch.randint(classes, (b,), generator=generator)


def kl_attack(model, x, y, threat, *, steps, key):
    return attack_batch(
        model, (x, y), threat, trades(), steps=steps, precision="float32", noise=BatchNoise(key)
    )


# spellings


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ce", "ce"),
        ("mixed 0", "ce"),
        ("mixed 0.4", "mixed 0.4"),
        ("mixed 1", "mixed 1"),
        (" mixed 0.40 ", "mixed 0.4"),
        ("trades", "trades 6"),
        ("trades 5", "trades 5"),
        ("trades 0.5", "trades 0.5"),
    ],
)
def test_text_and_back(text, name):
    objective = Objective.parse(text)
    assert str(objective) == name
    assert Objective.parse(name) == objective
    assert Objective.parse(objective) is objective
    assert objective.clean_weight == clean_weight(text)
    assert objective.fingerprint is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "trade",
        "ce 1",
        "mixed",
        "mixed x",
        "mixed 1.5",
        "mixed nan",
        "mixed 0.1 0.2",
        "trades x",
        "trades -1",
        "trades inf",
        "trades nan",
        "nowhere.at_all:fn",
        "math:nothing",
        "math:pi",
        ":",
        "a b:c",
    ],
)
def test_wrong_text_is_refused_in_one_line(text):
    with pytest.raises(ThreatError, match="objective") as caught:
        Objective.parse(text)
    assert "\n" not in str(caught.value)


def test_an_unknown_objective_is_answered_with_the_spellings():
    with pytest.raises(ThreatError) as caught:
        Objective.parse("trade")
    assert str(caught.value) == (
        'objective: got "trade", expected one of ce, "mixed A" as in "mixed 0.4", '
        'trades, or "trades B" as in "trades 5", or package.module:function'
    )
    with pytest.raises(ThreatError, match='module "nowhere" cannot be found; is it on the Python'):
        Objective.parse("nowhere.at_all:fn")


@pytest.fixture
def own_losses(tmp_path, monkeypatch):
    """Put a module with user-defined objectives on the Python path."""
    (tmp_path / "own_losses.py").write_text(OWN_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)


def test_an_objective_is_imported_by_name(own_losses):
    half = Objective.parse("own_losses:half")
    assert str(half) == "own_losses:half"
    assert (half.uses_clean, half.uses_attacked) == (True, True)
    assert (half.attack_loss, half.clean_weight) == (ce, None)
    only = Objective.parse("own_losses:only_clean")
    assert str(only) == "own_losses:only_clean"
    assert (only.uses_clean, only.uses_attacked) == (True, False)


def test_the_fingerprint_differs_by_code_flags_and_bound_values(own_losses):
    names = ["half", "smooth", "steep", "steeper", "kl_attack", "weighted"]
    fingerprints = {Objective.parse(f"own_losses:{name}").fingerprint for name in names}
    smoothed = Objective.parse("own_losses:smooth").with_label_smoothing(0.1)
    assert len({*fingerprints, smoothed.fingerprint}) == 7
    assert None not in fingerprints
    assert Objective.parse("ce").with_label_smoothing(0.1).fingerprint is None


def test_training_with_an_imported_objective(own_losses):
    by_name = train_digits(objective="own_losses:half")
    by_weight = train_digits(objective="mixed 0.5")
    assert by_name.provenance["training"]["objective"] == "own_losses:half"
    for name, tensor in by_weight.tensors.items():  # they are one function
        assert torch.allclose(by_name.tensors[name], tensor, atol=1e-4), name
    only_clean = train_digits(objective="own_losses:only_clean")
    assert only_clean.digest == train_digits(objective="mixed 1").digest


def test_the_passes_of_a_step_are_counted(own_losses):
    assert step_passes(LINF, "ce", 2) == 5 + 3
    assert step_passes(LINF, "mixed 0.4", 2) == 5 + 6
    assert step_passes(LINF, "mixed 1", 2) == 3
    assert step_passes(LINF, "trades 5", 2) == 6 + 7
    assert step_passes(CLEAN, "trades", 2) == 3
    assert step_passes(LINF, "own_losses:half", 2) == 5 + 6
    assert step_passes(LINF, "own_losses:only_clean", 2) == 3


def test_an_objective_must_return_a_loss_for_each_sample():
    with pytest.raises(ThreatError, match=r"wrong.*returned \(32, 10\) for 32 samples"):
        train_digits(objective=Objective(lambda clean, attacked, y: clean, "wrong"))
    with pytest.raises(ThreatError, match="expected a function"):
        Objective(0.4)
    with pytest.raises(ThreatError, match="needs a clean or an attacked batch"):
        Objective(ce, uses_clean=False, uses_attacked=False)


# losses


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 6.0]))
def test_trades_and_its_gradient_equal_a_literal_implementation(seed, beta):
    clean, adv, y = random_logits(seed)
    results = []
    for function in (
        lambda c, a: trades(beta).loss(c, a, y).mean(),
        lambda c, a: trades_by_hand(c, a, y, beta),
    ):
        leaves = [clean.clone().requires_grad_(), adv.clone().requires_grad_()]
        value = function(*leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        results.append([value, *grads])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_kl_is_zero_for_equal_logits_and_positive_for_others(seed):
    clean, adv, y = random_logits(seed)
    assert torch.equal(kl(clean, y, clean), torch.zeros(len(y)))
    assert bool((kl(adv, y, clean) > 0).all())


@pytest.mark.parametrize("objective", ["ce", "mixed 0.4", "trades"])
def test_label_smoothing_equals_pytorchs_and_spares_the_kl(objective):
    clean, adv, y = random_logits(3)
    got = Objective.parse(objective).with_label_smoothing(0.1).loss(clean, adv, y).mean()
    smooth = [F.cross_entropy(logits, y, label_smoothing=0.1) for logits in (clean, adv)]
    expected = {
        "ce": smooth[1],
        "mixed 0.4": 0.4 * smooth[0] + 0.6 * smooth[1],
        "trades": smooth[0] + 6 * kl(adv, y, clean).mean(),
    }
    assert float(got) == pytest.approx(float(expected[objective]), rel=1e-5)


def test_a_function_without_label_smoothing_is_refused():
    with pytest.raises(ThreatError, match=r"label_smoothing: the objective .*does not support it"):
        train_digits(objective=lambda clean, attacked, y: ce(attacked, y), label_smoothing=0.1)


# the attack of TRADES


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_kl_attack_stays_inside_and_raises_the_kl(threat):
    model = digits_network(4)
    x, y = to_float(DIGITS.val.images[:40]), DIGITS.val.labels[:40]
    generator = torch.random.get_rng_state()
    x_adv = kl_attack(model, x, y, threat, steps=3, key=(0, 7))
    assert torch.equal(generator, torch.random.get_rng_state())
    check_inside(x_adv, x, threat)
    with torch.no_grad():
        clean, adv = model(x), model(x_adv)
        beside = model((x + 0.001 * torch.randn(x.shape)).clamp(0, 1))
    assert float(kl(adv, y, clean).mean()) > 20 * float(kl(beside, y, clean).mean())
    assert torch.equal(x_adv, kl_attack(model, x, y, threat, steps=3, key=(0, 7)))
    assert not torch.equal(x_adv, kl_attack(model, x, y, threat, steps=3, key=(0, 8)))


def test_the_kl_has_no_gradient_at_x_so_its_attack_starts_beside():
    model = digits_network(4)
    x, y = to_float(DIGITS.val.images[:40]), DIGITS.val.labels[:40]
    clean = model(x)
    at_x, beside_x = (
        input_gradient(model, point, y, kl, "float32", target=clean)[2]
        for point in (x, (x + 0.01).clamp(0, 1))
    )
    assert float(at_x.abs().max()) < 1e-5 < 1e-3 < float(beside_x.abs().max())
    start = (x + 0.001).clamp(0, 1)
    result = apgd_train(
        model, x, y, LINF, steps=1, loss=lambda logits, y: 0 * logits.sum(1), start=start
    )
    assert torch.equal(result, start)  # no point has a higher loss than the start


def test_the_kl_attack_does_not_depend_on_the_number_of_threads():
    model = digits_network(4)
    x, y = to_float(DIGITS.val.images[:64]), DIGITS.val.labels[:64]
    threads = torch.get_num_threads()
    alone = kl_attack(model, x, y, LINF, steps=2, key=(0, 0))
    try:
        torch.set_num_threads(2)
        shared = kl_attack(model, x, y, LINF, steps=2, key=(0, 0))
    finally:
        torch.set_num_threads(threads)
    assert float((alone - shared).abs().amax(dim=(1, 2, 3)).median()) < 1e-6


def test_a_step_of_trades_equals_one_written_by_hand():
    data, start = DATA.first(32), fresh_network()
    got = train_digits(start, data, objective="trades 5", epochs=1)
    by_hand = copy.deepcopy(start)
    x, y, _ = next(iter(batches(data, 32, seed=trained_seed(), epoch=0)))
    x_adv = kl_attack(by_hand, x, y, LINF, steps=2, key=(trained_seed(), 0))
    by_hand.train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    zhang_loss(by_hand, x, x_adv, y, beta=5.0).backward()
    optimizer.step()
    for name, tensor in by_hand.state_dict().items():
        assert torch.allclose(got.tensors[name], tensor, rtol=1e-3, atol=1e-5), name
    assert got.provenance["training"]["objective"] == "trades 5"


@pytest.mark.parametrize("objective", ["trades", "mixed 0.4"])
def test_with_a_clean_threat_one_pass_sees_one_batch(objective):
    model, (x, y, _) = fresh_network(), next(iter(batches(DATA, 32, seed=0, epoch=0)))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    loss = objective_loss(model, x, x, y, Objective.parse(objective), precision="float32")
    assert seen == [32]
    expected = F.cross_entropy(model(x), y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


class Seeing(nn.Sequential):
    """A linear network that notes the sizes of the batches that it is trained on."""

    sizes: ClassVar[list[int]] = []

    def forward(self, x):
        if self.training:
            self.sizes.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", ["trades", "mixed 0.4"])
def test_clean_training_passes_each_image_once(objective, accumulate):
    network = Seeing(nn.Flatten(), nn.Linear(64, 10))
    items = [Checkpoint.of(network), Checkpoint.of(network)]
    sizes = {}
    for name in ("ce", objective):
        options = {"epochs": 1, "threat": CLEAN, "objective": name, "accumulate": accumulate}
        Seeing.sizes.clear()
        train_digits(network, **options)
        learn(items, DATA, LearnSettings(batch_size=32, **options), network=network)
        sizes[name] = list(Seeing.sizes)
    assert sizes[objective] == sizes["ce"]
    assert sizes["ce"].count(32 // accumulate) >= 2 * 3 * accumulate


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
@pytest.mark.parametrize(
    "name", ["resnet9:width=4", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_trades_and_its_gradient_equal_the_authors_with_batchnorm(name, beta):
    model = load_model(name, channels=3 if name == "resnet18" else 1).double()
    size = 32 if name == "resnet18" else 8
    generator = torch.Generator().manual_seed(0)
    shape = (8, 3 if name == "resnet18" else 1, size, size)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    x_adv = (x + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    y = torch.randint(10, (8,), generator=generator)
    reference = copy.deepcopy(model).train()
    theirs = zhang_loss(reference, x, x_adv, y, beta)
    ours = objective_loss(model, x, x_adv, y, trades(beta), precision="float32")
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-10)
    got, expected = (
        torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(net.parameters()))])
        for loss, net in ((ours, model), (theirs, reference))
    )
    assert float(F.cosine_similarity(got, expected, dim=0)) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for (buffer, value), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12, msg=buffer)


@pytest.mark.parametrize(
    ("objective", "threat_is_clean", "expected"),
    [
        ("trades", False, ["clean", "attacked", "clean"]),
        ("trades", True, ["clean"]),
        ("mixed 0.4", False, ["both"]),
        ("ce", False, ["attacked"]),
        ("mixed 1", False, ["clean"]),
        (Objective(lambda clean, attacked, y: ce(attacked, y) + ce(clean, y)), False, ["both"]),
    ],
)
def test_the_batches_that_update_running_statistics(objective, threat_is_clean, expected):
    model, (x, y, _) = fresh_network(), next(iter(batches(DATA, 32, seed=0, epoch=0)))
    x_adv, seen = x if threat_is_clean else 1 - x, []

    def record_batch(module, inputs):
        names = {"clean": x, "attacked": 1 - x, "both": torch.cat([x, 1 - x])}
        seen.extend(name for name, batch in names.items() if torch.equal(inputs[0], batch))

    model.register_forward_pre_hook(record_batch)
    before = [layer.num_batches_tracked.clone() for layer in batchnorms(model)]
    objective_loss(model, x, x_adv, y, Objective.parse(objective), precision="float32")
    assert seen == expected
    for layer, count in zip(batchnorms(model), before, strict=True):
        assert int(layer.num_batches_tracked - count) == len(expected)


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_training_with_trades_resumes_bit_for_bit(save_every_step, tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train_digits(objective="trades", state_path=path, on_progress=interrupt_at(2))
    resumed = train_digits(objective="trades", state_path=path)
    complete_run = train_digits(objective="trades")
    assert (resumed.digest, resumed.provenance) == (complete_run.digest, complete_run.provenance)


def test_learning_takes_trades_and_functions():
    items = [train_digits(threat=f"Linf {eps}/255", epochs=1) for eps in (8, 64)]
    arguments = {
        "threat": LINF,
        "epochs": 1,
        "batch_size": 32,
        "device": "cpu",
        "precision": "float32",
    }
    by_text = learn(items, DATA, objective="trades", val=DIGITS.val.first(32), **arguments)
    assert by_text.record["learning"]["objective"] == "trades 6"
    assert math.isfinite(by_text.record["history"][0]["val_loss"])
    repeated = learn(items, DATA, objective=trades(6), val=DIGITS.val.first(32), **arguments)
    assert torch.equal(by_text.alpha, repeated.alpha)
    with_ce = learn(items, DATA, **arguments)
    with_mart = learn(items, DATA, objective=load_mart(), **arguments)
    assert not torch.equal(by_text.alpha, with_ce.alpha)
    assert not torch.equal(by_text.alpha, with_mart.alpha)


def test_the_state_of_another_function_with_that_name_is_refused(tmp_path):
    def single(clean, attacked, y):
        return ce(attacked, y)

    def double(clean, attacked, y):
        return 2 * ce(attacked, y)

    path = tmp_path / "state.pt"
    objective = Objective(single, "own", uses_clean=False)
    train_digits(objective=objective, state_path=path)
    finished = train_digits(objective=objective, state_path=path)
    assert finished.digest == train_digits().digest
    with pytest.raises(CheckpointError, match="other settings"):
        train_digits(objective=Objective(double, "own", uses_clean=False), state_path=path)


# MART, the example


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_mart_equals_its_formula(seed):
    clean, adv, y = random_logits(seed)
    total = 0.0
    for c, a, label in zip(clean.double(), adv.double(), y.tolist(), strict=True):
        p, q = (torch.exp(row) / torch.exp(row).sum() for row in (c, a))
        others = [float(q[k]) for k in range(len(q)) if k != label]
        boosted = -math.log(float(q[label])) - math.log(1.0001 - max(others))
        divergence = sum(float(p[k]) * math.log(float(p[k] / q[k])) for k in range(len(p)))
        total += boosted + 6 * divergence * (1 - float(p[label]))
    assert float(load_mart().loss(clean, adv, y).mean()) == pytest.approx(total / len(y), rel=1e-4)


def test_a_network_is_trained_with_mart():
    trained = train_digits(objective=load_mart(), epochs=1)
    assert trained.provenance["training"]["objective"] == "mart:mart"
    assert load_mart().separate_passes

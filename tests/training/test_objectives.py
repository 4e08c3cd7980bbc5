"""Objectives: their text forms, the loss that they are, what their attack climbs, and functions of one's own."""

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from digits import check_inside, digits_network
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.attacks import apgd_train
from robustsoup.attacks.forward import frozen_eval, input_gradient
from robustsoup.attacks.losses import ce, kl
from robustsoup.data import batches, load_data, to_float
from robustsoup.errors import CheckpointError, ThreatError
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.runs.tasks import step_passes
from robustsoup.soups.learning import learn
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.adversarial_loss import attack_batch, measure_objective, objective_loss
from robustsoup.training.objectives import Objective, clean_weight, trades
from robustsoup.training.train import train

DIGITS = load_data("digits")
DATA = DIGITS.train.first(96)
LINF = ThreatModel("Linf", 32 / 255)
THREATS = [LINF, ThreatModel("L2", 0.5), ThreatModel("L1", 3.0)]


def fresh(**options):
    return load_model("resnet9:width=2", channels=1, **options)


def trained(network=None, data=DATA, **changed):
    chosen = {
        "threat": LINF,
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.1,
        "device": "cpu",
        "precision": "float32",
    }
    return train(fresh() if network is None else network, data, **(chosen | changed))


def example():
    spec = importlib.util.spec_from_file_location(
        "mart", Path(__file__).parents[2] / "examples" / "mart.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mart


def trades_by_hand(clean, adv, y, beta):
    """As in Zhang et al.'s own code: batch means, gradient through both."""
    natural = F.cross_entropy(clean, y)
    return natural + beta / len(y) * F.kl_div(
        F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="sum"
    )


def logits_of(seed, b=9, classes=5):
    generator = torch.Generator().manual_seed(seed)
    clean, adv = (3 * torch.randn(2, b, classes, generator=generator)).unbind(0)
    return clean, adv, torch.randint(classes, (b,), generator=generator)


# text forms


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_text_and_back(text, said):
    objective = Objective.parse(text)
    assert str(objective) == said
    assert Objective.parse(said) == objective
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
def test_wrong_text_is_one_line(text):
    with pytest.raises(ThreatError, match="objective") as caught:
        Objective.parse(text)
    assert "\n" not in str(caught.value)


def test_a_function_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(
        "from functools import partial\nfrom robustsoup.attacks.losses import ce, kl\nfrom robustsoup.training.objectives import Objective\n"
        "def half(clean, attacked, y):\n    return (ce(clean, y) + ce(attacked, y)) / 2\n"
        "def smooth(clean, attacked, y, label_smoothing=0.0):\n    return ce(attacked, y)\n"
        "steep = Objective(partial(half, y=2.0))\nsteeper = Objective(partial(half, y=3.0))\n"
        "other_climb = Objective(half, attack_loss=kl, attack_compares_with_clean=True)\n"
        "class Held:\n    def __init__(self, beta):\n        self.beta = beta\n"
        "    def __call__(self, clean, attacked, y):\n        return ce(attacked, y)\n"
        "held = Objective(Held(2.0))\n"
        "only_clean = Objective(lambda clean, attacked, y: ce(clean, y), uses_attacked=False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    half = Objective.parse("own_losses:half")
    assert (
        str(half),
        half.uses_clean,
        half.uses_attacked,
        half.attack_loss,
        half.clean_weight,
    ) == (
        "own_losses:half",
        True,
        True,
        ce,
        None,
    )
    assert half.fingerprint not in (None, "unknown")
    marks = [
        Objective.parse(f"own_losses:{name}").fingerprint
        for name in ("smooth", "steep", "steeper", "other_climb", "held")
    ]
    assert (
        len(
            {
                half.fingerprint,
                *marks,
                Objective.parse("own_losses:smooth").with_label_smoothing(0.1).fingerprint,
            }
        )
        == 7
    )
    assert Objective.parse("ce").with_label_smoothing(0.1).fingerprint is None
    only = Objective.parse("own_losses:only_clean")
    assert (str(only), only.uses_clean, only.uses_attacked) == (
        "own_losses:only_clean",
        True,
        False,
    )
    # CE on both batches with equal weights is what "mixed 0.5" is
    given_text, by_mix = trained(objective="own_losses:half"), trained(objective="mixed 0.5")
    assert given_text.provenance["training"]["objective"] == "own_losses:half"
    for name, tensor in by_mix.tensors.items():
        assert torch.allclose(given_text.tensors[name], tensor, atol=1e-4), name
    assert trained(objective=only).digest == trained(objective="mixed 1").digest
    assert (
        step_passes(LINF, "own_losses:half", 2),
        step_passes(LINF, "own_losses:only_clean", 2),
    ) == (11, 3)


def test_passes_count_the_pass_that_trades_compares_with():
    assert step_passes(LINF, "ce", 2) == 5 + 3
    assert step_passes(LINF, "mixed 0.4", 2) == 5 + 6
    assert step_passes(LINF, "mixed 1", 2) == 3
    assert step_passes(LINF, "trades 5", 2) == 5 + 6 + 1
    assert step_passes(CLEAN, "trades", 2) == 3


def test_what_is_no_loss_for_each_sample_is_refused():
    with pytest.raises(ThreatError, match=r"wrong.*returned \(32, 10\) for 32 samples"):
        trained(objective=Objective(lambda clean, attacked, y: clean, "wrong"))
    with pytest.raises(ThreatError, match="expected a function"):
        Objective(0.4)
    with pytest.raises(ThreatError, match="needs a clean or an attacked batch"):
        Objective(ce, uses_clean=False, uses_attacked=False)


# the losses


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 6.0]))
def test_trades_and_its_gradient_are_those_of_a_literal_implementation(seed, beta):
    clean, adv, y = logits_of(seed)
    found = []
    for function in (
        lambda c, a: trades(beta).loss(c, a, y).mean(),
        lambda c, a: trades_by_hand(c, a, y, beta),
    ):
        leaves = [clean.clone().requires_grad_(), adv.clone().requires_grad_()]
        value = function(*leaves)
        found.append(
            [value, *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)]
        )
    for got, wanted in zip(*found, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_kl_is_zero_at_home_and_above_it_elsewhere(seed):
    clean, adv, y = logits_of(seed)
    assert torch.equal(kl(clean, y, clean), torch.zeros(len(y)))
    assert bool((kl(adv, y, clean) > 0).all())


@pytest.mark.parametrize("objective", ["ce", "mixed 0.4", "trades"])
def test_label_smoothing_is_torchs_and_leaves_the_kl_alone(objective):
    clean, adv, y = logits_of(3)
    got = Objective.parse(objective).with_label_smoothing(0.1).loss(clean, adv, y).mean()
    smooth = [F.cross_entropy(logits, y, label_smoothing=0.1) for logits in (clean, adv)]
    wanted = {
        "ce": smooth[1],
        "mixed 0.4": 0.4 * smooth[0] + 0.6 * smooth[1],
        "trades": smooth[0] + 6 * kl(adv, y, clean).mean(),
    }
    assert float(got) == pytest.approx(float(wanted[objective]), rel=1e-5)


def test_a_function_without_smoothing_says_so():
    with pytest.raises(ThreatError, match=r"label_smoothing: the objective .*does not support it"):
        trained(objective=lambda clean, attacked, y: ce(attacked, y), label_smoothing=0.1)


# the attack of trades


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_kl_attack_stays_inside_and_raises_the_kl(threat):
    model = digits_network(4)
    x, y = to_float(DIGITS.val.images[:40]), DIGITS.val.labels[:40]
    generator = torch.random.get_rng_state()
    x_adv = attack_batch(model, x, y, threat, trades(), steps=3, precision="float32", key=(0, 7))
    assert torch.equal(generator, torch.random.get_rng_state())
    check_inside(x_adv, x, threat)
    with torch.no_grad():
        clean, adv = model(x), model(x_adv)
        beside = model((x + 0.001 * torch.randn(x.shape)).clamp(0, 1))
    assert float(kl(adv, y, clean).mean()) > 20 * float(kl(beside, y, clean).mean())
    again = attack_batch(model, x, y, threat, trades(), steps=3, precision="float32", key=(0, 7))
    other = attack_batch(model, x, y, threat, trades(), steps=3, precision="float32", key=(0, 8))
    assert torch.equal(x_adv, again)
    assert not torch.equal(x_adv, other)


def test_at_x_itself_the_kl_has_no_gradient_and_a_start_is_where_the_attack_begins():
    model = digits_network(4)
    x, y = to_float(DIGITS.val.images[:40]), DIGITS.val.labels[:40]
    clean = model(x)
    at_home, aside = (
        input_gradient(model, point, y, kl, "float32", target=clean)[2]
        for point in (x, (x + 0.01).clamp(0, 1))
    )
    assert float(at_home.abs().max()) < 1e-5 < 1e-3 < float(aside.abs().max())
    start = (x + 0.001).clamp(0, 1)
    moved = apgd_train(
        model, x, y, LINF, steps=1, loss=lambda logits, y: 0 * logits.sum(1), start=start
    )
    assert torch.equal(moved, start)  # nothing is higher than where it began


def test_points_for_the_kl_do_not_depend_on_how_the_batch_is_shared_out():
    model = digits_network(4)
    x, y = to_float(DIGITS.val.images[:64]), DIGITS.val.labels[:64]
    threads = torch.get_num_threads()
    alone = attack_batch(model, x, y, LINF, trades(), steps=2, precision="float32", key=(0, 0))
    try:
        torch.set_num_threads(2)
        shared = attack_batch(model, x, y, LINF, trades(), steps=2, precision="float32", key=(0, 0))
    finally:
        torch.set_num_threads(threads)
    assert float((alone - shared).abs().amax(dim=(1, 2, 3)).median()) < 1e-6


def test_a_step_of_trades_is_that_written_by_hand():
    data, start = DATA.first(32), fresh()
    got = trained(start, data, objective="trades 5", epochs=1)
    by_hand = copy.deepcopy(start)
    x, y, _ = next(iter(batches(data, 32, seed=0, epoch=0)))
    x_adv = attack_batch(by_hand, x, y, LINF, trades(5), steps=2, precision="float32", key=(0, 0))
    by_hand.train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    clean, adv = by_hand(torch.cat([x, x_adv])).split(32)
    trades_by_hand(clean, adv, y, 5.0).backward()
    optimizer.step()
    for name, tensor in by_hand.state_dict().items():
        assert torch.allclose(got.tensors[name], tensor, rtol=1e-3, atol=1e-5), name
    assert got.provenance["training"]["objective"] == "trades 5"


@pytest.mark.parametrize("objective", ["trades", "mixed 0.4"])
def test_with_a_clean_threat_one_pass_sees_one_batch(objective):
    model, (x, y, _) = fresh(), next(iter(batches(DATA, 32, seed=0, epoch=0)))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    loss = objective_loss(model, x, x, y, Objective.parse(objective), "float32")
    assert seen == [32]
    seen.clear()
    assert float(loss.detach()) == pytest.approx(
        float(F.cross_entropy(model(x), y).detach()), rel=1e-5
    )


def test_trades_lowers_its_objective_and_resumes(monkeypatch, tmp_path):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)

    def stop(done, total, figures):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(objective="trades", state_path=tmp_path / "s.pt", on_progress=stop)
    resumed, whole = (
        trained(objective="trades", state_path=tmp_path / "s.pt"),
        trained(objective="trades"),
    )
    assert (resumed.digest, resumed.provenance) == (whole.digest, whole.provenance)
    before = measure_objective(fresh(), DIGITS.val.first(64), LINF, trades(), steps=3)
    longer = trained(data=DIGITS.train.first(512), objective="trades", epochs=8, lr=0.1)
    assert (
        measure_objective(longer.network(), DIGITS.val.first(64), LINF, trades(), steps=3)
        < before - 0.2
    )


def test_learning_takes_trades_and_functions():
    items = [trained(threat=f"Linf {eps}/255", epochs=1) for eps in (8, 64)]
    chosen = {
        "threat": LINF,
        "epochs": 1,
        "batch_size": 32,
        "device": "cpu",
        "precision": "float32",
    }
    by_text = learn(items, DATA, objective="trades", val=DIGITS.val.first(32), **chosen)
    assert by_text.record["learning"]["objective"] == "trades 6"
    assert math.isfinite(by_text.record["history"][0]["val_loss"])
    again = learn(items, DATA, objective=trades(6), val=DIGITS.val.first(32), **chosen)
    assert torch.equal(by_text.alpha, again.alpha)
    assert not torch.equal(by_text.alpha, learn(items, DATA, **chosen).alpha)
    assert not torch.equal(by_text.alpha, learn(items, DATA, objective=example(), **chosen).alpha)


def test_a_state_of_another_function_of_that_name_is_refused(tmp_path):
    def loss(clean, attacked, y):
        return ce(attacked, y)

    trained(objective=Objective(loss, "own", uses_clean=False), state_path=tmp_path / "s.pt")
    first = trained(
        objective=Objective(loss, "own", uses_clean=False), state_path=tmp_path / "s.pt"
    )
    assert first.digest == trained().digest

    def loss(clean, attacked, y):
        return 2 * ce(attacked, y)

    with pytest.raises(CheckpointError, match="other settings"):
        trained(objective=Objective(loss, "own", uses_clean=False), state_path=tmp_path / "s.pt")


# MART, the example


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_mart_is_a_literal_transcription_of_its_formula(seed):
    clean, adv, y = logits_of(seed)
    total = 0.0
    for c, a, label in zip(clean.double(), adv.double(), y.tolist(), strict=True):
        p, q = (torch.exp(row) / torch.exp(row).sum() for row in (c, a))
        others = [float(q[k]) for k in range(len(q)) if k != label]
        boosted = -math.log(float(q[label])) - math.log(1.0001 - max(others))
        total += boosted + 6 * sum(
            float(p[k]) * math.log(float(p[k] / q[k])) for k in range(len(p))
        ) * (1 - float(p[label]))
    assert float(example()(clean, adv, y).mean()) == pytest.approx(total / len(y), rel=1e-4)


def test_a_network_is_trained_with_mart():
    mart = example()
    start = load_model("resnet9:width=4", channels=1)
    got = trained(start, DIGITS.train.first(512), objective=mart, threat="Linf 16/255", epochs=6)
    assert got.provenance["training"]["objective"] == "mart:mart"
    history = [entry["loss"] for entry in got.provenance["history"]]
    assert history[-1] < history[0] - 0.2
    with frozen_eval(got.network()), torch.no_grad():
        right = (
            (got.network().eval()(to_float(DIGITS.val.images)).argmax(1) == DIGITS.val.labels)
            .float()
            .mean()
        )
    assert right > 0.5

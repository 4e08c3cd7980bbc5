"""A learning run: its gradients by layer, lazy mixing, early stopping, and what it returns."""

import dataclasses
import math

import pytest
import torch
from learning_helpers import (
    LAYERS,
    assert_same_coefficients,
    learn_digits,
    relative_error,
    resnet_ingredients,
    small_ingredients,
)
from torch import nn
from torch.func import functional_call
from training_helpers import DATA, DIGITS, LINF, VAL, fresh_network, interrupt_at

from robustsoup.attacks.losses import ce
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import batches, load_data
from robustsoup.errors import Diverged, LeakageError, RequestError
from robustsoup.settings import DialSettings, LearnSettings
from robustsoup.soups import learning_run
from robustsoup.soups.granularity import layer_groups
from robustsoup.soups.learning import learn
from robustsoup.soups.learning_run import LearningInputs, LearningRun
from robustsoup.soups.mixing import mix
from robustsoup.threats import CLEAN
from robustsoup.training import adversarial_loss
from robustsoup.training.adversarial_loss import measure_objective, measure_robust_loss
from robustsoup.training.objectives import Objective, mixed

CPU = torch.device("cpu")


def make_run(items, network, granularity="parameter", dial=None):
    """Return a learning run before its first step."""
    settings = LearnSettings(
        threat=LINF,
        objective=Objective.parse("ce"),
        epochs=1,
        batch_size=32,
        lr=5.0,
        schedule="constant",
        detach=0.5,
        granularity=granularity,
        precision="float32",
        dial=dial,
    )
    inputs = LearningInputs(items, DATA, None, network, None, "memory", CPU)
    return LearningRun(inputs, settings)


def take_gradient_step(run):
    """Update every layer of a run with rate 1 by the gradient of one batch."""
    x, y, _ = next(iter(batches(DATA, 32, seed=0, epoch=0)))
    every_layer = range(len(run.layers))
    run.mix_layers(every_layer)
    loss = ce(run.model.train()(x), y).mean()
    grads = torch.autograd.grad(loss, list(run.parameters.values()))
    run.update_line(list(every_layer), dict(zip(run.parameters, grads, strict=True)), lr=1.0)


def mix_in_graph(net, items, alpha):
    """Return the loss of one batch with {parameter: (n,)} coefficients in the autograd graph."""
    x, y, _ = next(iter(batches(DATA, 32, seed=0, epoch=0)))
    theta = {
        name: sum(a * item.tensors[name] for a, item in zip(row, items, strict=True))
        for name, row in alpha.items()
    }
    return ce(functional_call(net.train(), theta, (x,)), y).mean()


@pytest.mark.parametrize("by", [None, "objective", "eps"])
def test_the_attack_is_not_recorded_where_its_radius_changes(by):
    net, items = small_ingredients(2)
    run = make_run(items, net, dial=by and DialSettings(by=by))
    assert (run.replayed_attack is None) == (by == "eps")


# gradients


@pytest.mark.parametrize(
    "granularity", ["parameter", "module", "block", "model", r"re:(conv|norm)"]
)
def test_gradients_of_layers_equal_autograds_with_all_networks_in_the_graph(granularity):
    net, items = small_ingredients(4)
    groups = layer_groups(net, granularity)
    torch.manual_seed(1)
    logits = {layer: torch.randn(4, dtype=torch.float64, requires_grad=True) for layer in groups}
    alpha = {
        name: torch.softmax(logits[layer], 0) for layer, names in groups.items() for name in names
    }
    expected = torch.autograd.grad(mix_in_graph(net, items, alpha), list(logits.values()))

    run = make_run(items, net, granularity)
    line = torch.stack([logits[layer].detach() for layer in run.layers])
    run.line = line[:, torch.tensor(run.order)].unsqueeze(0)
    run.velocity = torch.zeros_like(run.line)
    take_gradient_step(run)
    columns = torch.tensor([run.order.index(i) for i in range(4)])
    for layer, got, grad in zip(run.layers, run.velocity[0][:, columns], expected, strict=True):
        if groups[layer] == ["conv1.bias"]:  # BatchNorm removes it: rounding only
            assert got.abs().max() < 1e-12 > grad.abs().max()
        else:
            assert relative_error(got, grad) < 1e-9, layer


def test_detaching_other_layers_does_not_change_the_gradient_of_a_layer():
    """No layer's gradient passes through another layer's softmax, so none can vanish there."""
    net, items = small_ingredients(3)
    names = [name for name, _ in net.named_parameters()]

    def gradient_of(layer, *, detach_others):
        torch.manual_seed(2)
        logits = {name: torch.randn(3, dtype=torch.float64, requires_grad=True) for name in names}
        alpha = {
            name: torch.softmax(row.detach() if detach_others and name != layer else row, 0)
            for name, row in logits.items()
        }
        return torch.autograd.grad(mix_in_graph(net, items, alpha), logits[layer])[0]

    for layer in ("conv1.weight", "norm2.weight", "linear.weight"):
        alone = gradient_of(layer, detach_others=True)
        assert float(alone.norm()) > 0
        assert relative_error(alone, gradient_of(layer, detach_others=False)) < 1e-12


def test_the_gradient_of_one_layer_for_the_network_is_the_sum_over_its_parameters():
    net, items = small_ingredients(3)
    fine, coarse = make_run(items, net, "parameter"), make_run(items, net, "model")
    for run in (fine, coarse):
        run.line = torch.zeros_like(run.line).double()
        run.velocity = torch.zeros_like(run.line)
        take_gradient_step(run)
    assert relative_error(coarse.velocity[0, 0], fine.velocity[0].sum(0)) < 1e-9


@pytest.mark.parametrize("granularity", ["module", "block", "model", "re:weight"])
def test_coefficients_of_coarser_layers_mix_their_parameters(granularity):
    items = resnet_ingredients()
    alpha = learn_digits(items, granularity=granularity)
    groups = layer_groups(items[0].network(), granularity)
    assert alpha.layers == tuple(groups)
    soup = mix(items, alpha, buffers="average")
    for row, names in zip(alpha.alpha, groups.values(), strict=True):
        for name in names:
            terms = [a * item.tensors[name].double() for a, item in zip(row, items, strict=True)]
            assert torch.allclose(soup.tensors[name].double(), sum(terms), atol=1e-6), name


# mixing


def test_the_trained_network_is_the_soup():
    items = resnet_ingredients()
    run = make_run(items, items[0].network())
    for x, y, _ in batches(DATA, 32, seed=0, epoch=0):
        run.take_step(x, y)
        run.step += 1
    soup = mix(items, run.coefficients(), buffers="tracked")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, soup.tensors[name]), name


def test_mixing_only_changed_layers_equals_mixing_all_bit_for_bit(monkeypatch):
    items, mixed_layers = resnet_ingredients(), []
    lazy = learn_digits(items, detach=0.7)
    real = LearningRun.mix_layers

    def mix_every_layer(self, active):
        mixed_layers.append(len(active))
        real(self, range(len(self.layers)))

    monkeypatch.setattr(LearningRun, "mix_layers", mix_every_layer)
    assert_same_coefficients(lazy, learn_digits(items, detach=0.7))
    at_start, *in_steps = mixed_layers
    assert at_start == LAYERS
    assert 0 < sum(in_steps) < 0.5 * LAYERS * len(in_steps)


# early stopping


class Flat(nn.Module):
    """A linear network on the pixels, which has no BatchNorm."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10, bias=False)

    def forward(self, x):
        return self.linear(x.flatten(1))


def opposite_ingredients():
    """Return a linear network and two checkpoints: its class means as weights, and their negative.

    Learning on DATA moves to the first; on DATA with wrong labels, the first has a high loss.
    """
    images, labels = DATA.images.flatten(1).float() / 255, DATA.labels
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    weights, network = means - means.mean(0), Flat()
    signed = [{"linear.weight": sign * weights} for sign in (1, -1)]
    return network, [Checkpoint(tensors, {"parameters": ["linear.weight"]}) for tensors in signed]


def test_early_stopping_returns_the_epoch_of_the_lowest_loss_on_val():
    network, items = opposite_ingredients()
    wrong_labels = dataclasses.replace(VAL, labels=(VAL.labels + 1) % 10)
    arguments = {
        "network": network,
        "threat": "clean",
        "init": "zeros",
        "detach": 0.0,
        "lr": 0.02,
        "schedule": "constant",
    }
    stopped = learn_digits(items, epochs=4, val=wrong_labels, early_stop={"steps": 3}, **arguments)
    losses = [entry["val_loss"] for entry in stopped.record["history"]]
    assert losses == sorted(losses)  # fitting the true labels, the run gets worse on the wrong ones
    assert losses[0] < losses[-1]
    assert stopped.record["early_stopped_at"] == 1
    assert torch.equal(stopped.alpha, learn_digits(items, epochs=1, **arguments).alpha)
    last = learn_digits(items, epochs=4, val=wrong_labels, **arguments)
    assert last.record["early_stopped_at"] is None
    assert last.alpha[0, 0] > stopped.alpha[0, 0] > 0.5


def test_early_stopping_passes_over_losses_that_are_not_finite(monkeypatch):
    losses = iter([math.nan, 2.0, 1.0, 3.0])
    monkeypatch.setattr(learning_run, "measure_objective", lambda *_, **__: next(losses))
    network, items = opposite_ingredients()
    stops = {"network": network, "threat": "clean", "epochs": 4, "early_stop": {"steps": 1}}
    assert learn_digits(items, val=VAL, **stops).record["early_stopped_at"] == 3


def test_early_stopping_returns_the_statistics_of_its_epoch():
    arguments = {"lr": 60.0, "schedule": "constant", "detach": 0.0}
    items = resnet_ingredients()
    stopped = learn_digits(items, epochs=3, val=VAL, early_stop={"steps": 2}, **arguments)
    losses = [entry["val_loss"] for entry in stopped.record["history"]]
    best = losses.index(min(losses)) + 1
    assert stopped.record["early_stopped_at"] == best
    assert_same_coefficients(stopped, learn_digits(items, epochs=best, **arguments))


def test_the_loss_on_val_is_the_objective():
    net, val = fresh_network(), DIGITS.val.first(64)
    clean, _ = measure_robust_loss(net, val, CLEAN)
    robust, _ = measure_robust_loss(net, val, LINF, steps=3)
    assert robust > clean
    for weight in (0.0, 0.3, 1.0):
        got = measure_objective(net, val, LINF, mixed(weight), steps=3)
        assert got == pytest.approx(weight * clean + (1 - weight) * robust)


def test_early_stopping_requires_val():
    with pytest.raises(RequestError, match="early_stop: requires a validation split"):
        learn_digits(early_stop=True)


def test_a_killed_run_with_early_stopping_resumes_bit_for_bit(save_every_step, tmp_path):
    arguments = {"epochs": 4, "lr": 60.0, "val": VAL, "early_stop": {"steps": 2}}
    path = tmp_path / "state.pt"
    for step in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            learn_digits(state_path=path, on_progress=interrupt_at(step), **arguments)
    resumed, whole = learn_digits(state_path=path, **arguments), learn_digits(**arguments)
    assert_same_coefficients(resumed, whole)
    assert resumed.record == whole.record


# results


def test_movement_and_slopes_describe_what_learning_changed():
    stuck, moved = learn_digits(detach=1.0), learn_digits(detach=0.0)
    assert torch.equal(stuck.start, stuck.alpha)
    assert float(stuck.movement().max()) == 0
    assert float(stuck.slopes.max()) == 0
    assert torch.allclose(moved.movement(), (moved.alpha - moved.start).abs().sum(1) / 2)
    assert float(moved.movement().max()) > 0.01
    assert (moved.slopes > 0).sum() > 20


def test_the_slope_of_one_step_is_the_norm_of_its_gradient():
    alpha = learn(
        resnet_ingredients(),
        DATA.first(32),
        threat=LINF,
        epochs=1,
        batch_size=32,
        lr=1e-3,
        momentum=0.0,
        detach=0.0,
        init="zeros",
        schedule="constant",
        device="cpu",
        precision="float32",
    )
    logits = torch.log(alpha.alpha)
    steps = logits - logits.mean(1, keepdim=True)  # from zero, -lr times the gradient
    assert torch.allclose(steps.norm(dim=1) / 1e-3, alpha.slopes, rtol=1e-3, atol=1e-6)


def test_a_single_ingredient_is_learned_with_a_warning():
    alpha = learn_digits(resnet_ingredients(1))
    assert torch.equal(alpha.alpha, torch.ones(LAYERS, 1, dtype=torch.float64))
    assert alpha.record["warnings"] == [
        "a single ingredient: there is nothing to learn; the soup is the ingredient"
    ]
    assert "warnings" not in learn_digits(resnet_ingredients(2)).record


# what is refused


def test_a_loss_that_breaks_during_the_run_keeps_the_state_before(
    tmp_path, monkeypatch, save_every_step
):
    items, path, steps = resnet_ingredients(), tmp_path / "state.pt", []
    real = adversarial_loss.attack_batch

    def poison_fifth_step(model, batch, *rest, **options):
        steps.append(1)
        return batch[0] * float("nan") if len(steps) == 5 else real(model, batch, *rest, **options)

    monkeypatch.setattr(adversarial_loss, "attack_batch", poison_fifth_step)
    with pytest.raises(
        Diverged, match=r"learn: the loss became nan at step 4, first in layer normalize"
    ):
        learn_digits(items, epochs=3, state_path=path)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 4
    tensors = [state[name] for name in ("line", "velocity", "loss_sum")]
    tensors += [tensor for tensor in state["buffers"].values() if tensor.is_floating_point()]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    resumed = learn_digits(items, epochs=3, state_path=path)
    assert_same_coefficients(resumed, learn_digits(items, epochs=3))


def test_ingredients_of_another_split_are_refused():
    other = load_data("digits", seed=1).train
    trained = {"data": DATA.record, "trained_on": ["train"]}
    items = [item.with_provenance(**trained) for item in resnet_ingredients(2)]
    learn_digits(items, epochs=1)
    two_splits = [items[0], items[1].with_provenance(data=other.record)]
    with pytest.raises(
        LeakageError,
        match=r"another split of digits \(seed 1\) than this one \(seed 0\).*no sample is fresh",
    ):
        learn_digits(two_splits)
    learn_digits(two_splits, epochs=1, allow_leakage=True)
    everything = DIGITS.unsplit().first(64)  # holds nothing out
    learn(two_splits, everything, threat=LINF, epochs=1, batch_size=32, device="cpu")


def test_learn_refuses_settings_of_a_dial():
    with pytest.raises(RequestError, match="dial: learn returns one soup; call learn_dial"):
        learn(resnet_ingredients(), DATA, LearnSettings(dial=DialSettings()))

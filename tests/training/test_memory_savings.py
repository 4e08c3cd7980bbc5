"""Accumulation and activation checkpointing: the same step with less memory."""

import pytest
import torch
from learning_helpers import learn_digits
from ranks import run_ranks
from shared_steps import take_learning_step, take_training_step
from torch import nn
from training_helpers import DATA, LINF, fresh_network, train_digits

from robustsoup.attacks import apgd_train
from robustsoup.data import to_float
from robustsoup.errors import ModelError, RequestError
from robustsoup.settings import LearnSettings, TrainSettings
from robustsoup.soups.subspace import train_subspace
from robustsoup.training import adversarial_loss
from robustsoup.training.objectives import Objective
from robustsoup.training.recomputation import find_blocks, recomputed_activations
from robustsoup.training.train import TrainingInputs, TrainingRun

STEPS = {"train": take_training_step, "learn": take_learning_step}
X, Y = to_float(DATA.images[:16]).double(), DATA.labels[:16]


@pytest.fixture(autouse=True)
def _attack(monkeypatch):
    """Restore the attack that a shared step replaces."""
    monkeypatch.setattr(adversarial_loss, "attack_batch", adversarial_loss.attack_batch)


def stacked(*extras):
    """Return a network of four blocks of convolutions, each with more layers, in float64."""

    def block(channels):
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.SiLU(),
            *(extra() for extra in extras),
        )

    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return nn.Sequential(block(1), nn.Sequential(block(4), block(4)), head).double()


def spectral():
    """Return a layer whose weight depends on vectors that each pass in train mode changes."""
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))


def gradients(network, *, enabled):
    """Return the gradients of a loss of two passes in train mode, by the images and parameters."""
    network.train()
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    with recomputed_activations(network, enabled):
        loss = sum(nn.functional.cross_entropy(network(part), Y) for part in (x, 1 - x))
        loss.backward()
    return [x.grad, *(parameter.grad for parameter in network.parameters())]


def saved_bytes(network, *, enabled):
    """Return the bytes that a pass keeps for its backward pass, the inputs of blocks included."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    blocks = find_blocks(network)
    hooks = [block.register_forward_pre_hook(lambda _, inputs: keep(inputs[0])) for block in blocks]
    with (
        recomputed_activations(network, enabled),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        network(X)
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("extra", [nn.Identity, nn.Dropout, spectral])
def test_recomputed_activations_change_no_bit(extra):
    plain, again = stacked(extra), stacked(extra)
    expected, got = gradients(plain, enabled=False), gradients(again, enabled=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert max(float(grad.abs().max()) for grad in expected) > 1e-4
    updated = again.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, updated[name]), name
    assert int(updated["0.1.num_batches_tracked"]) == 2


def test_recomputed_activations_take_less_memory():
    network = stacked(nn.Identity, nn.SiLU)
    assert saved_bytes(network, enabled=True) < 0.6 * saved_bytes(network, enabled=False)
    assert all("forward" not in vars(module) for module in network.modules())


def test_attacks_pass_through_recomputed_blocks():
    network = stacked().eval()
    expected = apgd_train(network, X, Y, LINF, steps=2)
    with recomputed_activations(network, True):
        assert torch.equal(apgd_train(network, X, Y, LINF, steps=2), expected)


def test_blocks_are_the_innermost_entries_with_layers():
    assert len(find_blocks(fresh_network())) == 8
    assert len(find_blocks(stacked())) == 4
    assert find_blocks(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))) == []


def test_recomputed_training_is_that_without_it():
    plain, again = train_digits(), train_digits(recompute_activations=True)
    assert plain.digest == again.digest
    assert "recompute_activations" not in plain.provenance["training"]
    assert again.provenance["training"]["recompute_activations"] is True


def test_recomputed_learning_is_that_without_it():
    plain, again = learn_digits(), learn_digits(recompute_activations=True)
    assert torch.equal(plain.alpha, again.alpha)
    assert all(torch.equal(again.tracked[name], plain.tracked[name]) for name in plain.tracked)


def test_a_network_without_blocks_cannot_be_recomputed():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ModelError, match="recompute_activations: got a network with 0 blocks"):
        train_digits(network, recompute_activations=True)


@pytest.mark.parametrize("objective", ["mixed 0.3", "trades"])
@pytest.mark.parametrize("verb", ["train", "learn"])
def test_an_accumulated_step_is_that_of_the_whole_batch(verb, objective):
    loss, grads, _, _ = STEPS[verb](objective, "per-rank", 1)
    assert all(grad.dtype == torch.float64 for grad in grads.values())
    for parts in (2, 3):
        in_parts = STEPS[verb](objective, "per-rank", parts)
        assert abs(float(in_parts[0] - loss)) < 1e-12
        for name, grad in grads.items():
            assert float((in_parts[1][name] - grad).abs().max()) < 1e-12, name


@pytest.mark.parametrize("verb", ["train", "learn"])
def test_ranks_accumulate_their_shares_and_exchange_once(verb):
    loss, grads, _, _ = STEPS[verb]("ce", "per-rank", 1)
    counts = [end[3] for end in run_ranks(2, STEPS[verb], "ce", "per-rank", 1)]
    for in_parts in run_ranks(2, STEPS[verb], "ce", "per-rank", 3):
        assert abs(float(in_parts[0] - loss)) < 1e-12
        for name, grad in grads.items():
            assert float((in_parts[1][name] - grad).abs().max()) < 1e-12, name
        assert in_parts[3] == counts[0]


def test_batchnorm_sees_each_part():
    settings = TrainSettings(
        batch_size=32, accumulate=4, objective=Objective.parse("ce"), precision="float32"
    )
    run = TrainingRun(fresh_network(), TrainingInputs(DATA, None, None, settings))
    run.take_step(*next(run.batches(0, 0))[:2])
    tracked = [
        int(tensor)
        for name, tensor in run.model.state_dict().items()
        if name.endswith("num_batches_tracked")
    ]
    assert tracked
    assert set(tracked) == {4}


def test_a_subspace_trains_in_parts_too():
    ends = train_subspace(
        fresh_network(),
        DATA,
        threats=[LINF, "clean"],
        epochs=1,
        batch_size=32,
        accumulate=2,
        recompute_activations=True,
        device="cpu",
    )
    assert len(ends) == 2
    assert ends[0].provenance["training"]["accumulate"] == 2


@pytest.mark.parametrize("kind", [TrainSettings, LearnSettings])
def test_parts_have_two_images_at_least(kind):
    with pytest.raises(RequestError, match="accumulate: got 5 parts of a batch of 8 images"):
        kind(batch_size=8, accumulate=5)
    with pytest.raises(RequestError, match=r"accumulate: got 60 parts for 96 images, .* most 48"):
        train_digits(batch_size=128, accumulate=60)

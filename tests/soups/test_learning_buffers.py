"""BatchNorm statistics while a soup is learned, by each policy."""

import copy

import pytest
import torch
from ingredients import perturbed
from learning_helpers import (
    SmallNetwork,
    assert_same_coefficients,
    learn_digits,
    resnet_ingredients,
    small_ingredients,
)
from torch import nn
from training_helpers import DATA, LINF, fresh_network, interrupt_at

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import CheckpointError, RequestError
from robustsoup.soups.batchnorm import recalibrate, running_statistics
from robustsoup.soups.mixing import mix
from robustsoup.threats import CLEAN


def means_and_variances(alpha):
    return {
        name: tensor
        for name, tensor in alpha.tracked.items()
        if not name.endswith("num_batches_tracked")
    }


def test_averaged_statistics_follow_the_coefficients():
    items = resnet_ingredients()
    alpha = learn_digits(items, buffers="average", granularity="module")
    assert not torch.equal(alpha.alpha, alpha.start)
    expected = mix(items, alpha, buffers="average").tensors
    for name, tensor in means_and_variances(alpha).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_statistics_of_the_base_stay():
    items, base = resnet_ingredients(), resnet_ingredients(5)[4]
    alpha = learn_digits(items, buffers="base", base=base)
    for name, tensor in means_and_variances(alpha).items():
        assert torch.equal(tensor, base.tensors[name])
    assert alpha.record["learning"]["base"] == base.digest
    without_base = learn_digits(items, buffers="base")  # no common ancestor is recorded
    for name, tensor in means_and_variances(without_base).items():
        assert torch.equal(tensor, items[0].tensors[name])
    assert not torch.equal(without_base.alpha, alpha.alpha)


def test_recalibrated_statistics_are_measured_after_each_epoch():
    items = resnet_ingredients()
    alpha = learn_digits(items, buffers="recalibrate")
    expected = mix(items, alpha, buffers="recalibrate", calibrate_on=DATA, threat=CLEAN).tensors
    for name, tensor in means_and_variances(alpha).items():
        assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-5), name


def test_adversarial_recalibration_attacks_with_the_statistics_of_the_epoch_before():
    items = resnet_ingredients()
    alpha = learn_digits(items, buffers="recalibrate-adversarial")
    averaged = mix(items, alpha, buffers="average").tensors
    recalibrated = mix(
        items, alpha, buffers="recalibrate-adversarial", calibrate_on=DATA, threat=LINF
    ).tensors
    name = next(iter(means_and_variances(alpha)))
    tracked = alpha.tracked[name]
    assert not torch.equal(tracked, averaged[name])
    to_recalibrated = (tracked - recalibrated[name]).abs().max()
    assert to_recalibrated < (tracked - averaged[name]).abs().max()


@pytest.mark.parametrize("policy", ["average", "base", "recalibrate"])
def test_a_killed_run_resumes_bit_for_bit_with_every_policy(policy, tmp_path, save_every_step):
    path = tmp_path / "state.pt"
    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            learn_digits(epochs=2, buffers=policy, state_path=path, on_progress=interrupt_at(step))
    resumed = learn_digits(epochs=2, buffers=policy, state_path=path)
    assert_same_coefficients(resumed, learn_digits(epochs=2, buffers=policy))


def test_a_users_policy_is_called_after_each_epoch_and_is_part_of_the_state(tmp_path, monkeypatch):
    path = tmp_path / "counting_policies.py"
    path.write_text(
        "from robustsoup.soups.mixing import Buffers\n"
        "calls = []\n"
        "def count(soup):\n"
        "    calls.append(soup.coefficients.alpha)\n"
        "    name = next(n for n in soup.ingredients[0].tensors if n.endswith('running_var'))\n"
        "    return Buffers({name: soup.ingredients[0].tensors[name] * 0 + len(calls)})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    state = {"buffers": "counting_policies:count", "state_path": tmp_path / "state.pt"}
    alpha = learn_digits(**state)
    variance = next(t for name, t in alpha.tracked.items() if name.endswith("running_var"))
    assert torch.equal(variance, torch.full_like(variance, 3))  # at the start and twice after
    with path.open("a") as file:
        file.write("calls.append(0)\n")
    with pytest.raises(CheckpointError, match="other settings"):
        learn_digits(**state)


def test_policies_without_what_they_need_are_refused():
    with pytest.raises(RequestError, match='buffers: got "mean", expected one of base, average'):
        learn_digits(buffers="mean")
    with pytest.raises(RequestError, match="requires a threat to attack the samples with"):
        learn_digits(buffers="recalibrate-adversarial", threat="clean")


class FrozenNorm(nn.Module):
    """Normalises by statistics that training does not change."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        mean, var = (b[:, None, None] for b in (self.running_mean, self.running_var))
        return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("policy", ["tracked", "average", "recalibrate"])
@pytest.mark.parametrize(
    "norm", [FrozenNorm, lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True)]
)
def test_statistics_of_other_normalisations_are_mixed_too(norm, policy):
    base = SmallNetwork()
    base.norm1 = norm(4).double()
    items = [perturbed(base, seed) for seed in (1, 2)]
    settings = {"buffers": policy} if policy != "tracked" else {}
    alpha = learn_digits(items, network=base, **settings)
    soup = mix(items, alpha, network=base)
    for name in ("norm1.running_mean", "norm1.running_var", "norm2.running_var"):
        assert torch.equal(soup.tensors[name], alpha.tracked[name].to(soup.tensors[name]))


def test_ingredients_without_counters_are_learned_and_recalibrated():
    network = fresh_network()
    items = [without_counters(item).with_network_of(network) for item in resnet_ingredients(2)]
    learned = mix(items, learn_digits(items, epochs=1))
    measured = mix(items, [0.5, 0.5], buffers="recalibrate", calibrate_on=DATA)
    for soup in (learned, measured):
        assert set(soup.tensors) == set(items[0].tensors)
        soup.load_into(network)


def without_counters(item):
    """Return a checkpoint as files from before PyTorch 0.4.1 are, without BatchNorm's counters."""
    tensors = item.tensors.items()
    return Checkpoint({name: tensor for name, tensor in tensors if "num_batches" not in name})


class SharedNorm(SmallNetwork):
    """A SmallNetwork that applies one block three times, under three names."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
        self.blocks = nn.ModuleList([block] * 3)
        self.after = nn.Conv2d(4, 4, 1).double()

    def forward(self, x):
        x = self.norm1(self.conv1(x.double()))
        for block in self.blocks:
            x = block(x)
        x = nn.functional.silu(self.after(x))
        return self.linear(nn.functional.silu(self.norm2(self.conv2(x))).mean((2, 3)))


class SharedWeight(SmallNetwork):
    """A SmallNetwork with two BatchNorms that share one weight."""

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False).double()
        self.norm2, self.linear = nn.BatchNorm2d(4).double(), nn.Linear(4, 10).double()
        self.norm2.weight = self.norm1.weight


def test_a_batchnorm_under_several_names_is_recalibrated_under_all():
    network, items = small_ingredients(2, SharedNorm)
    soup = mix(items, [0.5, 0.5], buffers="recalibrate", calibrate_on=DATA, network=network)
    measured = recalibrate(soup_network(network, soup), DATA)
    for kind in ("running_mean", "running_var"):
        for number in range(3):
            name = f"blocks.{number}.1.{kind}"
            assert torch.equal(soup.tensors[name], soup.tensors[f"blocks.0.1.{kind}"])
            assert torch.equal(soup.tensors[name], measured[name])


@pytest.mark.parametrize("kind", [SharedNorm, SharedWeight])
def test_statistics_follow_a_shared_weight_and_can_be_learned(kind):
    network, items = small_ingredients(2, kind)
    for name, owner in running_statistics(items[0]).items():
        weight = f"{name.rpartition('.')[0]}.weight"
        assert owner == items[0].tied.get(weight, weight)
    soup = mix(items, learn_digits(items, epochs=1, network=network), network=network)
    assert set(soup.tensors) == set(items[0].tensors)


def soup_network(network, soup):
    """Return a copy of the network with the weights of a soup."""
    model = copy.deepcopy(network)
    soup.load_into(model)
    return model

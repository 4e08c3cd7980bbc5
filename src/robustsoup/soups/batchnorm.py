"""BatchNorm's running statistics: find, average and recalibrate them."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustsoup.attacks import apgd_train
from robustsoup.attacks.adaptation import copy_network
from robustsoup.attacks.forward import set_mode
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.parameters import find_owners_of_statistics
from robustsoup.data import Split, batches
from robustsoup.device import autocast
from robustsoup.errors import DataError
from robustsoup.models.fit import adapt_to
from robustsoup.precision import full_float32
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.summation import canonical_sum
from robustsoup.threats import CLEAN, ThreatModel

BATCH_SIZE = 250
"""Most images of a batch that statistics are measured on."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of `model` that keep running statistics, by each name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def running_statistics(item: Checkpoint) -> dict[str, str]:
    """Map each running mean and variance to the parameter whose coefficients average it.

    That parameter is the weight of the BatchNorm or, for a BatchNorm without weight, the last
    parameter before it: that of the layer that the BatchNorm normalises. Without a record of that
    order, the file's counts.
    """
    owners = find_owners_of_statistics(item.tensors, item.parameters, item.tied)
    recorded = item.provenance.get("statistics", {})
    return {name: recorded.get(name, owner) for name, owner in owners.items()}


def average_statistics(
    ingredients: Sequence[Checkpoint], coefficients: Coefficients
) -> dict[str, Tensor]:
    """Average the running means and variances of the ingredients.

    Args:
        ingredients: n checkpoints of one network.
        coefficients: Mixing coefficients; a statistic uses those of the parameter that
            `running_statistics` maps it to.

    Returns:
        Statistics by name, in the dtype of the first ingredient.
    """
    first, digests = ingredients[0], [item.digest for item in ingredients]
    averages = {}
    for name, owner in running_statistics(first).items():
        rows = [item.tensors[name] for item in ingredients]
        average = canonical_sum(rows, coefficients.row(owner), digests)
        averages[name] = average.to(first.tensors[name].dtype)
    return averages


def divide_samples(count: int, batch_size: int = BATCH_SIZE) -> tuple[int, int]:
    """Return the number and the size of the equal batches that statistics are measured on.

    The average counts each batch alike, so a smaller last batch would count too much. At most
    one sample of each batch but the first is left out.

    Raises:
        DataError: For fewer than 2 samples.
    """
    if count < 2:
        raise DataError(f"recalibrate: got {count} samples, expected at least 2")
    number = min(-(-count // batch_size), count // 2)
    return number, count // number


@full_float32()
def recalibrate(
    model: nn.Module,
    data: Split,
    *,
    threat: ThreatModel = CLEAN,
    attack_steps: int = 2,
    samples: int = 10_000,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    precision: str = "float32",
) -> dict[str, Tensor]:
    """Measure running statistics that fit the weights of `model`.

    The statistics are reset, then averaged over the batches of one pass (cumulative momentum).

    Args:
        model: The network; adapted in place, see `adapt_to`. Its tensors stay.
        data: Training samples, augmented as in training.
        threat: Attack the samples under this threat before the pass, on the network with its
            current statistics. Clean: no attack.
        attack_steps: APGD steps.
        samples: Maximum number of samples.
        batch_size: Most images per batch; see `divide_samples`.
        seed: Seed that draws the samples; one seed draws the same samples for every network.
        precision: "float32" or "bfloat16".

    Returns:
        The new buffers by name, on the CPU; empty for a network without BatchNorm.

    Raises:
        DataError: For fewer than 2 samples.
    """
    number, size = divide_samples(min(samples, len(data)), batch_size)
    device = next(iter(model.parameters())).device
    adapt_to(model, data)
    measured = copy_network(model)
    set_mode(measured, training=False)
    layers = norm_layers(measured)
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    each = batches(data.to(device), size, seed=seed, epoch=0)
    for x, y, _ in itertools.islice(each, number if layers else 0):
        x = apgd_train(model, x, y, threat, steps=attack_steps, precision=precision)
        with torch.no_grad(), autocast(device, precision):
            measured(x)
    tensors = measured.state_dict()
    names = [f"{layer}.{kind}" if layer else kind for layer in layers for kind in STATISTICS]
    return {name: tensors[name].cpu() for name in names}

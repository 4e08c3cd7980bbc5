"""BatchNorm's running statistics: which tensors they are, and measuring them anew for given weights."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustsoup.attacks import apgd_train
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split, batches
from robustsoup.device import autocast
from robustsoup.errors import DataError
from robustsoup.threats import CLEAN, ThreatModel


def norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm modules of `model` that keep running statistics, by name."""
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    }


def running_statistics(item: Checkpoint) -> dict[str, str]:
    """name of a running mean or variance -> the parameter with whose coefficients it is averaged.

    That is the weight of its BatchNorm, or, where it has none, the last parameter before it: the layer that it normalises.
    """
    parameters, owners = list(item.parameters), {}
    before = parameters[0] if parameters else None
    known = set(parameters)
    for name in item.tensors:
        prefix, _, last = name.rpartition(".")
        if name in known:
            before = name
        elif last in ("running_mean", "running_var") and before is not None:
            weight = f"{prefix}.weight" if prefix else "weight"
            owners[name] = weight if weight in known else before
    return owners


def recalibrate(
    model: nn.Module,
    data: Split,
    *,
    threat: ThreatModel = CLEAN,
    attack_steps: int = 2,
    samples: int = 10_000,
    batch_size: int = 250,
    seed: int = 0,
    precision: str = "float32",
) -> dict[str, Tensor]:
    """The running statistics of `model` for its weights: reset, then one pass with cumulative momentum.

    data: training samples, augmented as in training; `samples` of them, the same for every network at one seed.
    threat: what the samples are attacked with before the pass (clean: not at all); the attack sees the network's
    present statistics. `model` itself is not changed. Returns the new buffers by name, on the CPU; empty where the
    network has no BatchNorm.

    Raises DataError for fewer than 2 samples.
    """
    count = min(samples, len(data))
    if count < 2:
        raise DataError(f"recalibrate: got {count} samples, expected at least 2")
    device = next(model.parameters()).device
    measured = copy.deepcopy(model).eval()
    layers = norm_layers(measured)
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    seen = 0
    for x, y, _ in batches(data.to(device), min(batch_size, count), seed=seed, epoch=0):
        x, y = x[: count - seen], y[: count - seen]
        if len(x) < 2 or not layers:
            break
        x = apgd_train(model, x, y, threat, steps=attack_steps, precision=precision)
        with torch.no_grad(), autocast(device, precision):
            measured(x)
        seen += len(x)
    buffers = measured.state_dict()
    return {
        f"{name}.{kind}" if name else kind: buffers[f"{name}.{kind}" if name else kind].cpu()
        for name in layers
        for kind in ("running_mean", "running_var", "num_batches_tracked")
    }

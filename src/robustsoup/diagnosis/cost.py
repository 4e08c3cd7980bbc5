"""Memory and disk space of the ingredients of a soup, and the time of one learning step."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from robustsoup.attacks import apgd_train
from robustsoup.attacks.adaptation import copy_network, enable_gradients
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split, to_float
from robustsoup.threats import ThreatModel
from robustsoup.training.adversarial_loss import objective_loss
from robustsoup.training.objectives import mixed

BATCH_SIZE = 128


@dataclass(frozen=True)
class Cost:
    """Memory, disk space and learning time of the ingredients of a soup.

    Attributes:
        bytes: Bytes of each checkpoint's tensors.
        on_disk: Bytes of each checkpoint's file; None for a checkpoint in memory.
        layers: Number of parameter tensors.
        largest_layer: Name and bytes of the largest parameter tensor.
        step_seconds: Measured seconds of one step of `learn` at a batch of 128 (APGD of 2 steps and
            one training pass in float32, without reading the ingredients); None without data.
    """

    bytes: tuple[int, ...]
    on_disk: tuple[int | None, ...]
    layers: int
    largest_layer: tuple[str, int]
    step_seconds: float | None


def measure_cost(checkpoints: Sequence[Checkpoint]) -> Cost:
    """Measure bytes in memory and on disk."""
    first = checkpoints[0]
    layers = {
        name: first.tensors[name].nbytes for name in first.parameters if name in first.tensors
    }
    return Cost(
        bytes=tuple(sum(tensor.nbytes for tensor in item.tensors.values()) for item in checkpoints),
        on_disk=tuple(_file_size(item) for item in checkpoints),
        layers=len(layers),
        largest_layer=max(layers.items(), key=lambda layer: layer[1], default=("", 0)),
        step_seconds=None,
    )


def measure_step_seconds(model: nn.Module, data: Split, threat: ThreatModel) -> float:
    """Time one step of `learn` at a batch of 128: the median of up to three, after a warm-up."""
    model = copy_network(model)
    weights = enable_gradients(model)  # learn moves frozen weights as well
    data = data.first(min(BATCH_SIZE, len(data))).to(next(model.parameters()).device)
    x, y = to_float(data.images).contiguous(memory_format=torch.channels_last), data.labels
    repeats = math.ceil(BATCH_SIZE / len(x))
    x, y = x.repeat(repeats, 1, 1, 1)[:BATCH_SIZE], y.repeat(repeats)[:BATCH_SIZE]
    threat = ThreatModel("Linf", 8 / 255) if threat.is_clean else threat
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 4 and sum(seconds) < 5):
        started = time.perf_counter()
        x_adv = apgd_train(model, x, y, threat, steps=2)
        loss = objective_loss(model, x, x_adv, y, mixed(0), precision="float32")
        if loss.requires_grad:  # else learn refuses the network
            torch.autograd.grad(loss, weights, allow_unused=True)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def _file_size(checkpoint: Checkpoint) -> int | None:
    path = checkpoint.path
    return path.stat().st_size if path and path.is_file() else None

"""Checkpoints near a network, for tests that mix or learn."""

import copy

import torch
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint


def perturbed(model: nn.Module, seed: int, scale: float = 0.3) -> Checkpoint:
    """Return a checkpoint near `model`: every float tensor moved, variances kept positive."""
    generator = torch.Generator().manual_seed(seed)
    near = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in near.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("normalize."):
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * scale
                tensor.mul_(1 + noise.abs()) if name.endswith("running_var") else tensor.add_(noise)
    return Checkpoint.of(near)

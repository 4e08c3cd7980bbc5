"""Shared by tests: a small network that classifies digits, and the constraints of attacks."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional
from trained_seed import trained_seed

from robustsoup.attacks.projections import norms
from robustsoup.data import load_data, to_float
from robustsoup.models import load_model


def digits_network(width: int, steps: int = 60) -> nn.Module:
    """Return a copy of a resnet9 trained for a few steps on digits, frozen, in eval mode."""
    return copy.deepcopy(_train_network(width, steps))


@functools.cache
def _train_network(width: int, steps: int) -> nn.Module:
    train = load_data("digits").train
    model = load_model(f"resnet9:width={width}", channels=1, seed=trained_seed())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    x, y = to_float(train.images), train.labels
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / steps)
        first = (step + trained_seed()) % 10 * 100
        rows = slice(first, first + 100)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def check_inside(x_adv: torch.Tensor, x: torch.Tensor, threat) -> None:
    """Check that every point lies in the box and, up to rounding, in the ball."""
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    length = norms(x_adv.double() - x.double(), threat.norm)
    assert float(length.max()) <= threat.eps + 1e-6 * max(1, threat.eps)

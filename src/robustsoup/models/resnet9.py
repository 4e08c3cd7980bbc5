"""ResNet-9, as David Page trained it on CIFAR-10 ("How to train your ResNet", 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std by channel; both are buffers, which a checkpoint carries if they are persistent."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], persistent: bool = True
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent)
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, c, h, w) in [0,1] -> the same shape. Raises ValueError for another number of channels."""
        if x.shape[1] != self.mean.shape[1]:  # one channel would be broadcast
            raise ValueError(f"got {x.shape[1]} channels, expected {self.mean.shape[1]}")
        return (x - self.mean) / self.std


def _conv(channels: int, out: int, pool: bool = False) -> nn.Sequential:
    layers = [
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class ResNet9(nn.Module):
    """Images (b, channels, h, w) in [0,1], h and w at least 8 -> logits (b, classes).

    Convolutions to width, 2, 4 and 8 times width, residuals after the second and fourth, a global max-pool, a
    bias-free linear layer, logits times 0.125. 6,573,120 parameters in 25 tensors at width 64 and 10 classes.
    """

    def __init__(
        self, classes: int, channels: int, width: int, mean: list[float], std: list[float]
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.prep = _conv(channels, width)
        self.layer1 = _conv(width, 2 * width, pool=True)
        self.residual1 = nn.Sequential(_conv(2 * width, 2 * width), _conv(2 * width, 2 * width))
        self.layer2 = _conv(2 * width, 4 * width, pool=True)
        self.layer3 = _conv(4 * width, 8 * width, pool=True)
        self.residual3 = nn.Sequential(_conv(8 * width, 8 * width), _conv(8 * width, 8 * width))
        self.linear = nn.Linear(8 * width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) in [0,1] -> logits (b, classes)."""
        x = self.layer1(self.prep(self.normalize(x)))
        x = self.layer2(x + self.residual1(x))
        x = self.layer3(x)
        x = x + self.residual3(x)
        return self.linear(x.amax(dim=(2, 3))) * 0.125


def resnet9(
    *,
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ResNet9:
    """A ResNet9 with fresh weights; without mean and std, inputs are used as they are."""
    return ResNet9(classes, channels, width, mean or [0.0] * channels, std or [1.0] * channels)

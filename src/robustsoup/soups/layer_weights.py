"""Two ways to write the weights of a layer as free numbers: a softmax, or those weights."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

SMALLEST_START = 0.01
"""Weight at which a softmax starts that is asked to start at less; it never reaches 0."""


class LayerWeights(Protocol):
    """How free numbers (layers, n), which learning changes, give the weights of n ingredients."""

    def alpha(self, free: Tensor) -> Tensor:
        """Return the weights, (layers, n) float64; each row sums to 1."""

    def gradient(self, by_alpha: Tensor, alpha: Tensor) -> Tensor:
        """Return dL/dfree from dL/dalpha and alpha, all (layers, n)."""

    def start(self, weights: Sequence[float]) -> Tensor:
        """Return the free numbers of one layer, (n,) float32, that give these weights."""


class Softmax:
    """Convex weights: the free numbers are logits."""

    def alpha(self, free: Tensor) -> Tensor:
        """Return the softmax of each row."""
        return torch.softmax(free.double(), 1)

    def gradient(self, by_alpha: Tensor, alpha: Tensor) -> Tensor:
        """Return dL/dlogits."""
        return alpha * (by_alpha - (alpha * by_alpha).sum(-1, keepdim=True))

    def start(self, weights: Sequence[float]) -> Tensor:
        """Return the logarithms, of at least SMALLEST_START each."""
        return torch.tensor(weights, dtype=torch.float64).clamp(min=SMALLEST_START).log().float()


class Affine:
    """Weights that sum to 1 and may be negative.

    A step at the uniform soup moves them as far as a step of the softmax with the same learning
    rate does, which is why the gradient is divided by n squared.

    Source: Li et al., MEHL-Soup, ECCV 2024; by tensor there.
    """

    def alpha(self, free: Tensor) -> Tensor:
        """Return the rows, moved so that each sums to 1 up to float64."""
        free = free.double()
        return free + (1 - free.sum(1, keepdim=True)) / free.shape[1]

    def gradient(self, by_alpha: Tensor, alpha: Tensor) -> Tensor:
        """Return the gradient along rows of equal sum, divided by n squared."""
        return (by_alpha - by_alpha.mean(-1, keepdim=True)) / alpha.shape[-1] ** 2

    def start(self, weights: Sequence[float]) -> Tensor:
        """Return the weights."""
        return torch.tensor(weights, dtype=torch.float32)

"""Geometry: how far apart networks are, and in which directions fine-tuning took them."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.diagnosis.barriers import Pair
from robustsoup.soups.mixing import check_ingredients

NUMBERS = 1 << 22
"""How many numbers of all files are in memory at once while distances are computed: 32 MiB in float64."""


@dataclass(frozen=True)
class Geometry:
    """Norms of the task vectors theta_i - theta_base, or, without a base, of the weights.

    base: its name, None where none is known; relative: over the norm of the base; empty without one.
    """

    base: str | None
    base_norm: float | None
    norms: tuple[float, ...]
    relative: tuple[float, ...]


def measure(files: Sequence[Checkpoint], base: Checkpoint | None) -> tuple[Geometry, list[Pair]]:
    """Norms and pairwise distances and cosines of task vectors, or, without a base, of the weights themselves.

    files, base: checkpoints of one network. Returns all pairs in order, without curves. Raises IngredientMismatch for a base of
    another network. Source of task vectors: Ilharco et al. 2023, arXiv:2212.04089.
    """
    if base is not None:
        check_ingredients([files[0], base])
    reference, n = base or files[0], len(files)
    names = [name for name in files[0].parameters if files[0].tensors[name].is_floating_point()]
    g = gram(files, reference, names)
    square = g.diagonal()[:n]
    distances = (square[:, None] + square - 2 * g[:n, :n]).clamp(min=0).sqrt()
    base_norm = float(g[n, n].sqrt())
    inner = g[:n, :n] if base is not None else g[:n, :n] + g[:n, n:] + g[n:, :n] + g[n, n]
    norms = inner.diagonal().clamp(min=0).sqrt().tolist()
    found = []
    for a, b in itertools.combinations(range(n), 2):
        distance, size = (
            float(distances[a, b]),
            base_norm if base else math.hypot(norms[a], norms[b]) / math.sqrt(2),
        )
        cosine = float(inner[a, b]) / (norms[a] * norms[b]) if norms[a] and norms[b] else None
        found.append(Pair(a, b, distance, distance / size if size else math.nan, cosine, {}))
    if base is None:
        return Geometry(None, None, tuple(norms), ()), found
    return Geometry(
        base.name, base_norm, tuple(norms), tuple(norm / base_norm for norm in norms if base_norm)
    ), found


def gram(files: Sequence[Checkpoint], reference: Checkpoint, names: Sequence[str]) -> Tensor:
    """(n + 1, n + 1) float64: inner products of theta_1 - r, ..., theta_n - r and r itself, over the named tensors.

    A few rows of each tensor at a time, so that about NUMBERS numbers are in memory whatever n and the network are.
    """
    n = len(files) + 1
    total = torch.zeros(n, n, dtype=torch.float64)
    for name in names:
        tensors = [_rows(item.tensors[name]) for item in (*files, reference)]
        if not tensors[0].numel():
            continue
        for item in (*files, reference):
            item.check_source()
        step = max(NUMBERS // (n * (tensors[0].numel() // len(tensors[0]))), 1)
        for begin in range(0, len(tensors[0]), step):
            block = torch.stack(
                [tensor[begin : begin + step].reshape(-1).double() for tensor in tensors]
            )
            block[:-1] -= block[-1]
            total += block @ block.T
    return total


def _rows(tensor: Tensor) -> Tensor:
    """The tensor without dimensions of size 1, but at least one: no copy, whatever its strides are."""
    tensor = tensor.detach().squeeze()
    return tensor if tensor.dim() else tensor.view(1)

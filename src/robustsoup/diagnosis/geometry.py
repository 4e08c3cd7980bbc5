"""Norms, distances and cosines of networks and of the task vectors of fine-tuning."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.diagnosis.barriers import Pair
from robustsoup.soups.ancestry import check_ingredients

MAX_NUMBERS_IN_MEMORY = 1 << 22
"""Numbers of all checkpoints held in memory while distances are computed: 32 MiB in float64."""


@dataclass(frozen=True)
class Geometry:
    """Norms of the task vectors theta_i - theta_base or, without a base, of the weights.

    Attributes:
        base: Name of the base; None where no base is known.
        base_norm: Euclidean norm of the base; None without a base.
        norms: Norm of each checkpoint's task vector or weights.
        relative: The norms divided by that of the base; empty without a base.
    """

    base: str | None
    base_norm: float | None
    norms: tuple[float, ...]
    relative: tuple[float, ...]


def measure_geometry(
    checkpoints: Sequence[Checkpoint], base: Checkpoint | None
) -> tuple[Geometry, list[Pair]]:
    """Measure norms, pairwise distances and cosines of task vectors, or of weights without a base.

    Args:
        checkpoints: Checkpoints of one network.
        base: The checkpoint that the others were fine-tuned from, or None.

    Returns:
        The norms, and all pairs in order, without curves.

    Raises:
        IngredientMismatch: The base is another network.

    Source: task vectors: Ilharco et al. 2023, arXiv:2212.04089.
    """
    if base is not None:
        check_ingredients([checkpoints[0], base])
    first, n = checkpoints[0], len(checkpoints)
    names = [name for name in first.parameters if first.tensors[name].is_floating_point()]
    gram = gram_matrix(checkpoints, base or first, names)
    squared_norms = gram.diagonal()[:n]
    distances = (squared_norms[:, None] + squared_norms - 2 * gram[:n, :n]).clamp(min=0).sqrt()
    reference_norm = float(gram[n, n].sqrt())
    products = gram[:n, :n]
    if base is None:  # <w_i, w_j>, from w = (w - r) + r
        products = products + gram[:n, n:] + gram[n:, :n] + gram[n, n]
    norms = products.diagonal().clamp(min=0).sqrt().tolist()
    pairs = []
    for a, b in itertools.combinations(range(n), 2):
        distance = float(distances[a, b])
        size = reference_norm if base else math.hypot(norms[a], norms[b]) / math.sqrt(2)
        cosine = float(products[a, b]) / (norms[a] * norms[b]) if norms[a] and norms[b] else None
        pairs.append(Pair(a, b, distance, distance / size if size else math.nan, cosine, {}))
    if base is None:
        return Geometry(None, None, tuple(norms), ()), pairs
    relative = tuple(norm / reference_norm for norm in norms if reference_norm)
    return Geometry(base.name, reference_norm, tuple(norms), relative), pairs


def gram_matrix(
    checkpoints: Sequence[Checkpoint], reference: Checkpoint, names: Sequence[str]
) -> Tensor:
    """Compute the inner products of theta_1 - r, ..., theta_n - r and r itself.

    Works on a few rows of each tensor at a time, so that about MAX_NUMBERS_IN_MEMORY numbers are
    in memory, regardless of n and of the size of the network.

    Args:
        checkpoints: n checkpoints theta_i of one network.
        reference: The checkpoint r.
        names: Tensors to include.

    Returns:
        (n + 1, n + 1) float64.
    """
    n = len(checkpoints) + 1
    gram = torch.zeros(n, n, dtype=torch.float64)
    for name in names:
        tensors = [_drop_unit_dimensions(item.tensors[name]) for item in (*checkpoints, reference)]
        if not tensors[0].numel():
            continue
        for item in (*checkpoints, reference):
            item.check_source()
        rows = max(MAX_NUMBERS_IN_MEMORY // (n * (tensors[0].numel() // len(tensors[0]))), 1)
        for begin in range(0, len(tensors[0]), rows):
            block = torch.stack(
                [tensor[begin : begin + rows].reshape(-1).double() for tensor in tensors]
            )
            block[:-1] -= block[-1]
            gram += block @ block.T
    return gram


def _drop_unit_dimensions(tensor: Tensor) -> Tensor:
    """Drop dimensions of size 1 but keep at least one dimension; copies nothing."""
    tensor = tensor.detach().squeeze()
    return tensor if tensor.dim() else tensor.view(1)

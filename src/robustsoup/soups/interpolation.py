"""Merging methods between two ingredients: along an arc, or in some blocks alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robustsoup.errors import RequestError
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.merging import Merge, Merged
from robustsoup.soups.summation import canonical_sum

SMALLEST_SINE = 1e-6
"""Tensors whose angle has a smaller sine are mixed along the line."""


def slerp(merge: Merge) -> Merged:
    """Return sin((1 - t) w) / sin(w) * a + sin(t w) / sin(w) * b, tensor by tensor.

    The weights are (1 - t, t), and w is the angle between the two tensors as vectors. Tensors that
    are zero, or parallel up to rounding, are mixed along the line.

    Source: Shoemake 1985, doi:10.1145/325165.325242.
    """
    tensors = {}
    for name in merge.parameters:
        rows = merge.rows(name)
        tensors[name] = canonical_sum(rows, arc_factors(rows, merge.weights), merge.digests)
    return Merged(tensors)


def arc_factors(pair: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float]:
    """Return the factors of two tensors on the arc between them, for weights (1 - t, t)."""
    a, b = (tensor.detach().double().flatten() for tensor in pair)
    norms = float(a.norm() * b.norm())
    angle = math.acos(max(-1.0, min(1.0, float(a @ b) / norms))) if norms else 0.0
    sine, (left, right) = math.sin(angle), weights
    if sine < SMALLEST_SINE or 0 in weights:
        return left, right
    return math.sin(left * angle) / sine, math.sin(right * angle) / sine


def swap(merge: Merge) -> Merged:
    """Return the first ingredient with some blocks moved to the second, by its weight.

    With weights (0, 1) these blocks are those of the second ingredient; their BatchNorm statistics
    come with them. RiFT fine-tunes the least robust-critical module alone and interpolates it
    with its start; here the fine-tuned module is one of another ingredient.

    Raises:
        RequestError: If a block names no parameter.

    Source: Zhu et al. 2023, arXiv:2308.02533, section 3.
    """
    names = merge.parameters
    for block in merge.settings.blocks:
        if not any(in_block(name, block) for name in names):
            raise RequestError(
                f'method "swap": no parameter begins with "{block}"; their names are '
                f"{', '.join(list(names)[:3])}, ..."
            )
    owners = list(dict.fromkeys(names.values()))
    blocks = merge.settings.blocks
    moved = {  # a tied tensor moves under any of its names
        owner for name, owner in names.items() if any(in_block(name, block) for block in blocks)
    }
    rows = [merge.weights if name in moved else (1.0, 0.0) for name in owners]
    coefficients = Coefficients(torch.tensor(rows, dtype=torch.float64), tuple(owners))
    tensors = {
        name: canonical_sum(merge.rows(name), coefficients.row(owner), merge.digests)
        for name, owner in names.items()
    }
    return Merged(tensors, coefficients)


def in_block(name: str, block: str) -> bool:
    """Return whether a parameter belongs to a block: is called so, or begins with "BLOCK."."""
    return name == block or name.startswith(f"{block}.")

"""Weighted sums of tensors in an order that does not depend on how the ingredients are listed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum_i weights[i] * tensors[i], skipping zero weights.

    Args:
        tensors: n tensors of one shape and dtype.
        weights: n numbers, at least one of them not 0.

    Returns:
        The sum, taken and returned in at least float32. If a single weight is not 0 and equals 1, a
        copy of its tensor in its dtype.
    """
    terms = [
        (tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0
    ]
    first, first_weight = terms[0]
    if len(terms) == 1 and first_weight == 1:
        return first.clone()
    dtype = sum_dtype(first.dtype)
    total = first.to(dtype) * first_weight
    for tensor, weight in terms[1:]:
        total.add_(tensor.to(dtype), alpha=weight)
    return total


def as_real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs, in a last dimension of 2; others unchanged.

    Sums, gradients and merging methods treat both parts alike.
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which tensors of a type are summed: at least float32."""
    if dtype.is_floating_point and dtype.itemsize == 1:  # float8 cannot be promoted
        return torch.float32
    return torch.promote_types(dtype, torch.float32)


def canonical_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], digests: Sequence[str]
) -> Tensor:
    """Return the weighted sum, added up in the order of digests; equal digests, of weights."""
    order = sorted(range(len(weights)), key=lambda i: (digests[i], weights[i]))
    return weighted_sum([tensors[i] for i in order], [weights[i] for i in order])


def canonical_order(digests: Sequence[str]) -> list[int]:
    """Return the positions of the ingredients, sorted by digest."""
    return sorted(range(len(digests)), key=lambda i: digests[i])

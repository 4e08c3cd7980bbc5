"""Recompute the vectors of `spectral_norm` for mixed weights.

`spectral_norm` divides a weight W by u^T W v, where u and v are the singular vectors of W's largest
singular value as power iterations found them in training. The average of two such vectors is none
of these, and those of one ingredient belong to its own W.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.parameters import find_power_vectors
from robustsoup.soups.coefficients import Coefficients

MAX_ITERATIONS = 200
TOLERANCE = 1e-10
"""Relative change of the largest singular value at which the iteration ends."""


def compute_power_vectors(
    ingredients: Sequence[Checkpoint], coefficients: Coefficients, mixed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the vectors of the power iterations that belong to the mixed weights, by name.

    A weight that equals that of the ingredient with the largest coefficient keeps its vectors. For
    the others, the power iteration starts from these vectors and runs, in float64, to its end.

    Args:
        ingredients: n checkpoints of one network.
        coefficients: Mixing coefficients.
        mixed: The mixed parameters.
    """
    parameters = set(ingredients[0].parameters)
    vectors: dict[str, Tensor] = {}
    for names in find_power_vectors(mixed):
        if names.weight is None or names.weight not in parameters:
            continue
        row = list(coefficients.row(names.weight))
        order = sorted(range(len(row)), key=lambda i: (-row[i], ingredients[i].digest))
        source = ingredients[order[0]]
        u, v = source.tensors[names.u], source.tensors[names.v]
        if torch.allclose(mixed[names.weight], source.tensors[names.weight], rtol=1e-6, atol=0):
            vectors |= {names.u: u.clone(), names.v: v.clone()}
        else:
            matrix = _as_matrix(mixed[names.weight], u, v)
            new_u, new_v = _iterate(matrix, u.double())
            vectors |= {names.u: new_u.to(u.dtype), names.v: new_v.to(v.dtype)}
    return vectors


def _as_matrix(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the weight as the matrix (len(u), len(v)) of which u and v are singular vectors.

    Transposed convolutions have their outputs in the second dimension. Where both dimensions have
    the length of u, the vectors tell which is meant: theirs is the larger value.
    """
    matrices = [
        weight.double().movedim(dimension, 0).flatten(1)
        for dimension in (0, 1)
        if weight.shape[dimension : dimension + 1] == u.shape
    ]
    return max(matrices, key=lambda matrix: float(u.double() @ (matrix @ v.double())))


def _iterate(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    value = 0.0
    v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
    for _ in range(MAX_ITERATIONS):
        product = matrix @ v
        u = torch.nn.functional.normalize(product, dim=0)
        v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
        previous, value = value, float(product.norm())
        if abs(value - previous) <= TOLERANCE * value:
            break
    return u, v

"""Merging methods on task vectors: the differences of fine-tuned checkpoints from their base."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustsoup.errors import RequestError
from robustsoup.file_bytes import digest_tensors
from robustsoup.seeding import keyed_generator
from robustsoup.soups.merging import Merge, Merged
from robustsoup.soups.summation import canonical_order, sum_dtype

CombineTasks = Callable[[str, Sequence[Tensor], Sequence[float]], Tensor]
"""combine(name, task vectors, weights): returns what is added to the base, for one tensor."""


def task_arithmetic(merge: Merge) -> Merged:
    """Return base + scale * sum_i weight_i * task_i.

    The paper's factor of a sum of n task vectors is scale / n at uniform weights.

    Source: Ilharco et al. 2023, arXiv:2212.04089, section 2.
    """

    def combine(_name: str, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return merge.settings.scale * _weigh(tasks, weights)

    return _add_to_base(merge, combine)


def ties(merge: Merge) -> Merged:
    """Trim each task vector, elect a sign for each entry, and average what has that sign.

    Each task vector keeps the `density` of its entries that are largest in magnitude, over the
    whole network. The sign of an entry is that of its weighted sum over the ingredients; a sum of 0
    takes the sign that most entries of the tensor have.

    Source: Yadav et al. 2023, arXiv:2306.01708, section 4.
    """
    thresholds = [_magnitude_threshold(merge, i) for i in range(len(merge.ingredients))]
    ordered = [thresholds[i] for i in canonical_order(merge.digests)]

    def combine(_name: str, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        trimmed = [
            torch.where(task.abs() >= threshold, task, torch.zeros_like(task))
            for task, threshold in zip(tasks, ordered, strict=True)
        ]
        return merge.settings.scale * average_agreeing(trimmed, weights)

    return _add_to_base(merge, combine)


def average_agreeing(tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of the entries that are not 0 and have the elected sign; else 0."""
    signs = _weigh(tasks, weights).sign()
    majority = signs.sum().sign()
    signs = torch.where(signs == 0, majority, signs)
    total, weight_sum = torch.zeros_like(signs), torch.zeros_like(signs)
    for task, weight in zip(tasks, weights, strict=True):
        agrees = task * signs > 0
        total += torch.where(agrees, weight * task, 0)
        weight_sum += weight * agrees
    return torch.where(weight_sum > 0, total / weight_sum.clamp(min=1e-12), 0)


def dare(merge: Merge) -> Merged:
    """Drop entries of each task vector at random, divide the rest by `density`, and average.

    An entry is kept with probability `density`, so the expectation is the average. Equal tensors of
    an ingredient draw alike, so weights stay tied that no record calls so.

    Source: Yu et al. 2023, arXiv:2311.03099, section 3.
    """
    density = merge.settings.density
    digests = [merge.digests[i] for i in canonical_order(merge.digests)]

    def combine(_name: str, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        kept = []
        for task, digest in zip(tasks, digests, strict=True):
            content = digest_tensors({"task": task})
            generator = keyed_generator("dare", merge.seed, digest, content)
            draws = torch.rand(task.shape, generator=generator, dtype=torch.float32)
            kept.append(torch.where(draws < density, task / density, 0))
        return merge.settings.scale * _weigh(kept, weights)

    return _add_to_base(merge, combine)


def model_stock(merge: Merge) -> Merged:
    """Return t * average + (1 - t) * base for each tensor, t = n cos / (1 + (n - 1) cos).

    The cosine is the mean over all pairs of task vectors of the tensor; t is kept in [0, 1]. The
    mean of t over the tensors is recorded.

    Raises:
        RequestError: For fewer than 2 ingredients.

    Source: Jang et al. 2024, arXiv:2403.19522, section 4.
    """
    n = len(merge.ingredients)
    ratios: list[float] = []
    if n < 2:
        raise RequestError(f'method "model-stock": got {n} checkpoint, expected at least 2')

    def combine(_name: str, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        ratios.append(stock_ratio(tasks))
        return ratios[-1] * _weigh(tasks, weights)

    merged = _add_to_base(merge, combine)
    return Merged(merged.tensors, record={"mean_ratio": sum(ratios) / len(ratios)})


def stock_ratio(tasks: Sequence[Tensor]) -> float:
    """Return t of `model_stock` for the task vectors of one tensor."""
    vectors = torch.stack([task.double().flatten() for task in tasks])
    units = torch.nn.functional.normalize(vectors, dim=1)
    n = len(tasks)
    cosine = float((units.sum(0).square().sum() - units.square().sum()) / (n * (n - 1)))
    below = 1 + (n - 1) * cosine
    return min(max(n * cosine / below, 0.0), 1.0) if below > 0 else 0.0


def _add_to_base(merge: Merge, combine: CombineTasks) -> Merged:
    """Return base + combine(tasks) for each tensor; tied tensors get the sum of their owner.

    The tasks are in the order of the ingredients' digests, so that permuting changes no bit.
    """
    order = canonical_order(merge.digests)
    weights = [merge.weights[i] for i in order]
    tensors: dict[str, Tensor] = {}
    for name, owner in merge.parameters.items():
        if owner in tensors:
            tensors[name] = tensors[owner]
            continue
        rows, start = merge.rows(owner), _widen(merge.base_row(owner))
        tasks = [_widen(rows[i]) - start for i in order]
        tensors[name] = start + combine(owner, tasks, weights)
    return Merged(tensors)


def _magnitude_threshold(merge: Merge, i: int) -> float:
    """Return the smallest magnitude among the entries that trimming keeps of a task vector."""
    owners = dict.fromkeys(merge.parameters.values())
    tasks = (_widen(merge.rows(name)[i]) - _widen(merge.base_row(name)) for name in owners)
    magnitudes = torch.cat([task.abs().flatten() for task in tasks])
    kept = max(round(merge.settings.density * len(magnitudes)), 1)
    return float(magnitudes.kthvalue(len(magnitudes) - kept + 1).values)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(sum_dtype(tensor.dtype))


def _weigh(tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(
        (weight * task for task, weight in zip(tasks, weights, strict=True)),
        torch.zeros_like(tasks[0]),
    )

"""Pass a batch through a network in parts, one after another, and add up their gradients.

A step on n parts needs the memory of one part. Its gradient is that of the whole batch up to
rounding; a layer that looks at a whole batch, as BatchNorm does, looks at each part.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustsoup import distributed
from robustsoup.attacks.cuda_graph import ReplayedCall
from robustsoup.settings import LearnSettings, TrainSettings
from robustsoup.training.adversarial_loss import attack_under_all, mean_objective_loss
from robustsoup.training.objectives import Objective
from robustsoup.training.sharing import BatchShare


def attack_parts(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    settings: TrainSettings | LearnSettings,
    objective: Objective,
    *,
    step: int,
    parts: Sequence[BatchShare],
    replayed: ReplayedCall | None = None,
) -> list[list[Tensor]]:
    """Return the attacked batches of each part of a global batch, all from the same weights.

    The arguments are those of `attack_under_all`; `replayed` serves a batch that is not divided.
    """
    x, y = batch
    is_plain = len(parts) == 1 and not settings.recompute_activations
    return [
        attack_under_all(
            model,
            (part.take(x), part.take(y)),
            settings,
            objective,
            step=step,
            share=part,
            replayed=replayed if is_plain else None,
        )
        for part in parts
    ]


def add_gradients(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    attacked: Sequence[Sequence[Tensor]],
    objective: Objective,
    *,
    precision: str,
    parts: Sequence[BatchShare],
) -> Tensor:
    """Add the gradients of the objective on a global batch to those of the parameters.

    Args:
        model: The network of the loss pass; DistributedDataParallel averages once, in the last
            part.
        batch: Images and labels of the global batch.
        attacked: The attacked batches of each part.
        objective: The objective.
        precision: "float32" or "bfloat16".
        parts: The parts of the batch that this rank takes.

    Returns:
        What these parts contribute to the loss of the global batch, a detached scalar.
    """
    x, y = batch
    # DistributedDataParallel divides the sum of the gradients by the number of ranks.
    ranks = distributed.world() if isinstance(model, DistributedDataParallel) else 1
    losses: list[Tensor] = []
    for part, points in zip(parts, attacked, strict=True):
        with nullcontext() if part is parts[-1] else _without_exchange(model):
            loss = mean_objective_loss(
                model, part.take(x), points, part.take(y), objective, precision=precision
            )
            with distributed.named_failure():
                (loss * (part.weight * ranks)).backward()
        losses.append(loss.detach() * part.weight)
    return torch.stack(losses).sum()


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which gradients add up in each rank alone."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

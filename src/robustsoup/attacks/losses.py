"""Losses per sample, which attacks maximise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]
"""loss(logits, y) -> (b,): what an attack climbs; a targeted one is called as loss(logits, y, target)."""


def ce(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample: logits (b, classes), y (b,) int64 -> (b,) in the logits' dtype, at least float32.

    label_smoothing: the share of the target that is spread evenly over all classes.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)


def kl(logits: Tensor, y: Tensor, clean: Tensor) -> Tensor:
    """KL(p_clean || p) of each sample, p the softmax of logits: logits and clean (b, classes) -> (b,). y is not looked at.

    Source: Zhang et al. 2019, arXiv:1901.08573.
    """
    return F.kl_div(
        logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True
    ).sum(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: logits (b, classes >= 3), y (b,) -> (b,); above 0 where misclassified.

    Unlike cross-entropy it does not change when the logits are scaled, and its gradient does not vanish with them.
    Source: Croce and Hein 2020, arXiv:2003.01690, Eq. 6.
    """
    ordered = logits.sort(dim=1).values
    right = logits.gather(1, y.view(-1, 1)).squeeze(1)
    first = logits.argmax(1) == y
    other = torch.where(first, ordered[:, -2], ordered[:, -1])
    return -(right - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted difference of logits ratio: logits (b, classes >= 4), y and target (b,) -> (b,).

    Source: Croce and Hein 2020, arXiv:2003.01690, Eq. 7.
    """
    ordered = logits.sort(dim=1).values
    right, wanted = (logits.gather(1, which.view(-1, 1)).squeeze(1) for which in (y, target))
    return -(right - wanted) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12)


LOSSES: dict[str, Loss] = {"ce": ce, "dlr": dlr, "targeted dlr": targeted_dlr}
LEAST_CLASSES = {"dlr": 3, "targeted dlr": 4}
"""How many classes a loss needs; 2 where it is not named."""

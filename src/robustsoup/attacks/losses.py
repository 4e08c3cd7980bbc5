"""Losses per sample, which attacks maximise; the catalog lists them by name."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustsoup.attacks.projections import is_numpy_like
from robustsoup.catalog import LOSSES

Loss = Callable[..., Tensor]
"""loss(logits, y) -> (b,); a targeted loss is called as loss(logits, y, target)."""


def ce(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each sample.

    Args:
        logits: (b, classes).
        y: (b,) int64 labels.
        label_smoothing: Share of each label that is spread evenly over all classes, in [0, 1).

    Returns:
        (b,) in the dtype of the logits, but at least float32.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)


def kl(logits: Tensor, _y: Tensor, clean: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(logits)) of each sample.

    Args:
        logits: (b, classes) at the attacked points.
        _y: Unused; every loss is called with the labels.
        clean: (b, classes) logits of the clean images.

    Returns:
        (b,).

    Source: Zhang et al. 2019, arXiv:1901.08573.
    """
    log_p, log_p_clean = logits.log_softmax(1), clean.log_softmax(1)
    return F.kl_div(log_p, log_p_clean, reduction="none", log_target=True).sum(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio; above 0 where misclassified.

    Unlike cross-entropy, the loss is invariant to the scale of the logits, and its gradient does
    not vanish where the network is confident.

    Args:
        logits: (b, classes), 3 classes or more.
        y: (b,) int64 labels.

    Returns:
        (b,).

    Source: Croce and Hein 2020, arXiv:2003.01690, Eq. 6.
    """
    ordered, classes = logits.sort(dim=1)
    label_logit = logits.gather(1, y.view(-1, 1)).squeeze(1)
    correct = classes[:, -1] == y  # not argmax, which may order ties otherwise
    best_other = torch.where(correct, ordered[:, -2], ordered[:, -1])
    return -(label_logit - best_other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio.

    Args:
        logits: (b, classes), 4 classes or more.
        y: (b,) int64 labels.
        target: (b,) int64 classes to move to, never the label.

    Returns:
        (b,).

    Source: Croce and Hein 2020, arXiv:2003.01690, Eq. 7.
    """
    ordered = logits.sort(dim=1).values
    label_logit = logits.gather(1, y.view(-1, 1)).squeeze(1)
    target_logit = logits.gather(1, target.view(-1, 1)).squeeze(1)
    scale = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12
    return -(label_logit - target_logit) / scale


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the largest other logit minus the logit of the label; above 0 where misclassified.

    Attacks follow the sign or the direction of a gradient, which the scale of the logits does not
    change. Unlike DLR, the loss needs no third class to divide by.

    Args:
        logits: (b, classes), 2 classes or more.
        y: (b,) int64 labels.

    Returns:
        (b,).

    Source: Carlini and Wagner 2017, arXiv:1608.04644, f6.
    """
    return -logit_margin(logits, y)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the logit of the target minus the logit of the label.

    Args:
        logits: (b, classes), 2 classes or more.
        y: (b,) int64 labels.
        target: (b,) int64 classes to move to, never the label.

    Returns:
        (b,).

    Source: Gowal et al. 2019, arXiv:1910.09338.
    """
    ends = logits.gather(1, torch.stack([target, y], 1))
    return ends[:, 0] - ends[:, 1]


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the largest other probability minus the probability of the label.

    The gradient vanishes where the network is certain, as that of cross-entropy does.

    Args:
        logits: (b, classes), 2 classes or more.
        y: (b,) int64 labels.

    Returns:
        (b,) in [-1, 1]; above 0 where misclassified.

    Source: Xie et al. 2024 (PMA), arXiv:2411.15210.
    """
    return -logit_margin(logits.softmax(1), y)


def scale_free_loss(classes: int) -> str:
    """Return the name of an untargeted loss whose gradient does not vanish with large logits."""
    return "dlr" if classes >= LOSSES["dlr"].facts["classes"] else "margin"


def logit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logit of the label minus the largest other logit; below 0 where misclassified.

    Args:
        logits: (b, classes).
        y: (b,) int64 labels.

    Returns:
        (b,) in the dtype of the logits.
    """
    label_logit = logits.gather(1, y.view(-1, 1)).squeeze(1)
    return label_logit - logits.scatter(1, y.view(-1, 1), -torch.inf).amax(1)


def judge(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logit margin of each sample and whether it is misclassified, without gradients.

    On a CPU NumPy computes them, which keeps the interpreter's lock; see `as_arrays`.

    Args:
        logits: (b, classes).
        y: (b,) int64 labels.

    Returns:
        (b,) margins in the dtype of the logits; (b,) bool.
    """
    if not (is_numpy_like(logits) and is_numpy_like(y)):
        return logit_margin(logits, y), logits.argmax(1) != y
    values, labels = logits.numpy(force=True), y.numpy()
    rows, others = np.arange(len(labels)), values.copy()
    others[rows, labels] = -np.inf
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN
        margin = values[rows, labels] - others.max(1)
    return torch.from_numpy(margin), torch.from_numpy(values.argmax(1) != labels)

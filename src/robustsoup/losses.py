"""Losses per sample, and the objectives that training and learning minimise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustsoup.errors import ThreatError

Loss = Callable[..., Tensor]
"""loss(logits, y) -> (b,): what an attack climbs; a targeted one is called as loss(logits, y, target)."""


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits (b, classes), y (b,) int64 -> (b,) in the logits' dtype, at least float32."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")


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


@dataclass(frozen=True)
class Objective:
    """What is minimised: clean_weight * L(clean) + (1 - clean_weight) * L(attack), the paper's Eq. 1 (0) and Eq. 2.

    `ce` is clean_weight 0 (adversarial training); `mixed a` is clean_weight a. The paper calls the second TRADES; it is
    not the KL objective of Zhang et al. 2019.
    """

    clean_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clean_weight <= 1:
            raise ThreatError(f"objective: the clean weight is {self.clean_weight}, expected a number in [0, 1]")

    @classmethod
    def parse(cls, text: "str | Objective") -> "Objective":
        """Read "ce" or "mixed 0.4"."""
        if isinstance(text, Objective):
            return text
        name, _, rest = str(text).strip().partition(" ")
        try:
            if name == "ce" and not rest:
                return cls(0.0)
            if name == "mixed":
                return cls(float(rest))
        except ValueError:
            pass
        raise ThreatError(f'objective: got "{text}", expected "ce" or "mixed A" with A in [0, 1], as in "mixed 0.4"')

    def __str__(self) -> str:
        return f"mixed {self.clean_weight:g}" if self.clean_weight else "ce"

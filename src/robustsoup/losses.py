"""Losses per sample, and the objectives that training and learning minimise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustsoup.errors import ThreatError

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits (b, classes), y (b,) int64 -> (b,) in the logits' dtype, at least float32."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")


LOSSES: dict[str, Loss] = {"ce": ce}


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

"""Learning subject to a limit: the lowest robust loss among soups whose clean loss is at most c.

The Lagrangian is L(attacked) + m (L(clean) - c). Each step descends its weights' part, scaled by
1 / (1 + m) so that the learning rate keeps its meaning: the objective "mixed m / (1 + m)". Then
the multiplier m ascends: m <- max(0, m + RATE (L(clean) - c)).
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, stack

from robustsoup import distributed
from robustsoup.training.loop import History
from robustsoup.training.objectives import Objective, mixed_loss
from robustsoup.training.sharing import BatchShare

RATE = 0.1
"""Change of the multiplier in a step whose clean loss is one nat above the limit."""
TOLERANCE = 0.05
"""Share of the limit by which the clean loss may exceed it: a limit is met from both sides."""


class CleanLimit:
    """The limit of a learning run, and the multiplier that enforces it.

    Attributes:
        most: c, the highest mean clean loss, in nats.
        multiplier: m, at least 0; 0 while the limit does not bind.
        loss_sum: Sum of the clean losses of the current epoch's steps, in nats.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.multiplier = self.loss_sum = 0.0
        self._noted: list[Tensor] = []

    def begin_step(self) -> Objective:
        """Return the objective of the next step, which notes the clean loss of each pass."""
        self._noted = []
        weight = self.multiplier / (1 + self.multiplier)
        return Objective(partial(self._mix_and_note, weight=weight), f"clean loss <= {self.most:g}")

    def _mix_and_note(self, clean: Tensor, attacked: Tensor, y: Tensor, *, weight: float) -> Tensor:
        self._noted.append(mixed_loss(clean, None, y, weight=1.0).detach().mean())
        return mixed_loss(clean, attacked, y, weight=weight)

    def end_step(self, parts: Sequence[BatchShare]) -> None:
        """Move the multiplier by the clean loss that a step noted.

        Args:
            parts: The parts of the batch that this process passed, in order.
        """
        by_part = stack(self._noted).view(len(parts), -1).mean(1)
        weights = by_part.new_tensor([part.weight for part in parts])
        clean = float(distributed.sum_ranks((weights * by_part).sum()))
        self.loss_sum += clean
        self.multiplier = max(0.0, self.multiplier + RATE * (clean - self.most))

    def end_epoch(self, entry: dict[str, float], steps: int) -> None:
        """Add the mean clean loss and the multiplier to the figures of an epoch."""
        entry["clean_loss"], entry["multiplier"] = self.loss_sum / steps, self.multiplier
        self.loss_sum = 0.0

    def describe_miss(self, history: History) -> list[str]:
        """Return a warning if the clean loss of the last epoch is well above the limit."""
        clean = history[-1]["clean_loss"]
        if clean <= (1 + TOLERANCE) * self.most:
            return []
        text = (
            f"clean_limit: the mean clean loss of the last epoch is {clean:.3g} nats, above the "
            f"limit of {self.most:g}; learn for more epochs, or raise the limit"
        )
        return [text]

    def state(self) -> tuple[float, float]:
        """Return what `restore` needs."""
        return self.multiplier, self.loss_sum

    def restore(self, state: tuple[float, float]) -> None:
        """Resume from a saved state."""
        self.multiplier, self.loss_sum = state

"""The samples under attack, and the outcome that attempts record for them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from robustsoup.attacks.projections import constraint_excess, norms
from robustsoup.threats import ThreatModel


@dataclass(frozen=True)
class AttackedSamples:
    """n samples under attack.

    Attributes:
        fetch: fetch(samples (b,) int64) -> (b, ...) images on the network's device.
        y: (n,) int64 labels, on the CPU.
        ids: (n,) int64 sample numbers, which seed the noise; on the CPU.
        logits: (n, classes) logits of the clean images, on the CPU.
    """

    fetch: Callable[[Tensor], Tensor]
    y: Tensor
    ids: Tensor
    logits: Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.logits.shape[1]

    @property
    def correct(self) -> Tensor:
        """(n,) bool: whether the network classifies the clean image correctly."""
        return self.logits.argmax(1) == self.y

    def ranked_target(self, samples: Tensor, rank: int) -> Tensor:
        """Return the rank-th most likely class other than the label, for some samples.

        Args:
            samples: (b,) int64 samples.
            rank: From 1 to classes - 1.

        Returns:
            (b,) int64 classes.
        """
        other_logits = self.logits[samples].scatter(1, self.y[samples].view(-1, 1), -torch.inf)
        return other_logits.sort(dim=1, descending=True).indices[:, rank - 1]


@dataclass
class Outcome:
    """Results of the attempts of one attack on n samples; every tensor is on the CPU.

    Attributes:
        settled: (n,) int64, number of finished attempts; all of them for a broken sample.
        broken: (n,) bool, whether an adversarial example was found.
        by: (n,) int64, index of the attempt that broke the sample, else -1.
        step: (n,) int64, step at which the sample broke, else -1.
        norm: (n,) float32, norm of the recorded perturbation.
        excess: (n,) float64, by how much that point leaves the ball or the box; NaN: no point yet.
        margin: (n,) float32, smallest logit margin under attack.
        attacked: (n,) bool, whether an attempt started.
        zero_gradient: (n,) bool, whether the gradient was exactly 0 at a start.
        nan: (n,) bool, whether logits were NaN at an attacked point.
        x_adv: (n, ...) the recorded points, or None.
    """

    settled: Tensor
    broken: Tensor
    by: Tensor
    step: Tensor
    norm: Tensor
    excess: Tensor
    margin: Tensor
    attacked: Tensor
    zero_gradient: Tensor
    nan: Tensor
    x_adv: Tensor | None = None

    @classmethod
    def blank(cls, n: int, x: Tensor | None = None) -> Self:
        """Return the outcome before any attempt.

        Args:
            n: Number of samples.
            x: (n, ...) copy of the clean images to store the points in, or None.
        """
        return cls(
            settled=torch.zeros(n, dtype=torch.long),
            broken=torch.zeros(n, dtype=torch.bool),
            by=torch.full((n,), -1),
            step=torch.full((n,), -1),
            norm=torch.zeros(n, dtype=torch.float32),
            excess=torch.full((n,), torch.nan, dtype=torch.float64),
            margin=torch.full((n,), torch.inf, dtype=torch.float32),
            attacked=torch.zeros(n, dtype=torch.bool),
            zero_gradient=torch.zeros(n, dtype=torch.bool),
            nan=torch.zeros(n, dtype=torch.bool),
            x_adv=x,
        )

    def record_points(
        self, samples: Tensor, points: Tensor, x: Tensor, threat: ThreatModel
    ) -> None:
        """Record points of an attempt, with their norms and their excess.

        Args:
            samples: (b,) int64 samples.
            points: (b, ...) points.
            x: (b, ...) clean images.
            threat: Threat model that the points must satisfy.
        """
        self.norm[samples] = norms(points - x, threat.norm).float().cpu()
        self.excess[samples] = constraint_excess(points, x, threat).cpu()
        if self.x_adv is not None:
            self.x_adv[samples] = points.to(self.x_adv)

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy to save while attempts are running.

        `settled` is copied first, because a sample is counted there only after its other results.
        """
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}

    def restore(self, saved: dict[str, Tensor], attempts: int) -> None:
        """Restore a snapshot, dropping results that were only partly written.

        Args:
            saved: A snapshot.
            attempts: Number of attempts of the attack.
        """
        for name, value in saved.items():
            getattr(self, name).copy_(value)
        self.broken &= self.settled == attempts
        self.by[~self.broken] = self.step[~self.broken] = -1

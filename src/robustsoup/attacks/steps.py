"""The steps of APGD and PGD, row by row: a point is observed (loss, gradient, best point, step size), the next one is
proposed. Rows of one batch may be at different steps, and all of it happens in place and on the device.

Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208; PGD: Madry et al. 2018.
"""

import math
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from robustsoup.attacks.projections import norms, project, random_start
from robustsoup.threats import ThreatModel

_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class Schedule:
    """How an attack spends its steps: (eps, steps) of each stage, and whether step sizes adapt (APGD) or not (PGD)."""

    norm: str
    stages: tuple[tuple[float, int], ...]
    adaptive: bool = True

    @classmethod
    def of(
        cls, threat: ThreatModel, steps: int, *, adaptive: bool = True, staged: bool = True
    ) -> Self:
        """The schedule of `steps` steps; for L1 they are spent as in AutoAttack where `staged`.

        Staged: .3 of the steps at 3 eps, .3 at 2 eps, .4 at eps, each warm-started from the last.
        """
        first = math.ceil(0.3 * steps)
        if not (staged and adaptive) or threat.norm != "L1" or steps <= 2 * first:
            return cls(threat.norm, ((threat.eps, steps),), adaptive)
        return cls(
            "L1",
            ((3 * threat.eps, first), (2 * threat.eps, first), (threat.eps, steps - 2 * first)),
        )

    def checks(self) -> Tensor:
        """int64, the stages' tables one after another: at step k the length of the period that ends there, else 0."""
        return torch.cat([_checks(steps, self.norm, self.adaptive) for _, steps in self.stages])


def _checks(steps: int, norm: str, adaptive: bool) -> Tensor:
    periods = torch.zeros(steps + 1, dtype=torch.long)
    if not adaptive:
        return periods
    if norm == "L1":
        period = max(int(0.04 * steps), 1)
        periods[period::period] = period
        return periods
    period, shorter, least = (max(int(part * steps), 1) for part in (0.22, 0.03, 0.06))
    at = period
    while at <= steps:
        periods[at] = period
        period = max(period - shorter, least)
        at += period
    return periods


@dataclass
class Rows:
    """The state of b samples, one row each; `step` counts a row's steps in its stage, `base` is where the stage begins
    in the table of checks. `lower` and `upper` are the ball and the box together, for Linf.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    eps: Tensor
    lower: Tensor
    upper: Tensor
    x_adv: Tensor
    x_old: Tensor
    x_best: Tensor
    grad: Tensor
    grad_best: Tensor
    loss_last: Tensor
    loss_best: Tensor
    loss_best_at_check: Tensor
    step_best: Tensor
    rises: Tensor
    reduced: Tensor
    eta: Tensor
    topk: Tensor
    support: Tensor
    step: Tensor
    base: Tensor
    last: Tensor
    margin: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, at: Tensor) -> "Rows":
        """A copy of some rows."""
        return Rows(*(tensor[at] for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """All of the state."""
        return [getattr(self, field.name) for field in fields(self)]

    def put(self, at: Tensor, other: "Rows") -> None:
        """Overwrite some rows."""
        for field in fields(self):
            getattr(self, field.name)[at] = getattr(other, field.name)


def joined(parts: list[Rows]) -> Rows:
    """Several rows as one."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rows))
    )


def start_rows(
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    start: Tensor,
    schedule: Schedule,
    *,
    target: Tensor | None = None,
    topk: float | Tensor = 0.2,
    base: Tensor | int = 0,
    last: Tensor | bool = True,
) -> Rows:
    """Rows at their starting point. x, start: (b, ...); eps: a number or (b,); topk: L1's first share of pixels."""
    zero = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    eps = zero + eps
    size = float(x[0].numel())
    support = torch.full_like(eps, size) if isinstance(topk, float) else topk * 1.5 * size
    if schedule.adaptive:
        eta = eps.clone() if schedule.norm == "L1" else 2 * eps
    else:  # Madry et al.: so that the ball can be crossed more than twice
        eta = 2.5 * eps / schedule.stages[0][1]
    radius = column(eps, x)
    near = schedule.norm == "Linf"
    return Rows(
        x=x,
        y=y,
        target=torch.zeros_like(y) if target is None else target,
        eps=eps,
        lower=(x - radius).clamp_(min=0.0) if near else x,
        upper=(x + radius).clamp_(max=1.0) if near else x,
        x_adv=start.clone(),
        x_old=start.clone(),
        x_best=start.clone(),
        grad=torch.zeros_like(x),
        grad_best=torch.zeros_like(x),
        loss_last=zero.clone(),
        loss_best=torch.full_like(eps, -math.inf),
        loss_best_at_check=zero.clone(),
        step_best=torch.zeros_like(y),
        rises=zero.clone(),
        reduced=torch.ones_like(eps, dtype=torch.bool),
        eta=eta,
        topk=topk + zero,
        support=support,
        step=torch.zeros_like(y),
        base=torch.zeros_like(y) + base,
        last=torch.zeros_like(y, dtype=torch.bool) | last,
        margin=torch.full_like(eps, math.inf),
    )


def next_stage(rows: Rows, stage: Tensor, schedule: Schedule) -> Rows:
    """Rows at the start of `stage` (b,) int64, which is not the first: from the best point, brought into the smaller ball."""
    eps = torch.tensor(
        [radius for radius, _ in schedule.stages], device=rows.x.device, dtype=rows.x.dtype
    )[stage]
    taken = (
        torch.tensor([0, *(steps + 1 for _, steps in schedule.stages)]).cumsum(0).to(stage.device)
    )
    start = project(rows.x_best, rows.x, eps, schedule.norm)
    topk = (start != rows.x).flatten(1).sum(1).to(rows.x) / rows.x[0].numel() / 1.5
    fresh = start_rows(
        rows.x,
        rows.y,
        eps,
        start,
        schedule,
        target=rows.target,
        topk=topk,
        base=taken[stage],
        last=stage == len(schedule.stages) - 1,
    )
    fresh.margin = rows.margin
    return fresh


def column(values: Tensor, like: Tensor) -> Tensor:
    """(b,) as (b, 1, ...), to go with `like` (b, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def observe(rows: Rows, loss: Tensor, grad: Tensor, periods: Tensor, norm: str) -> None:
    """Take in the loss (b,) and gradient (b, ...) at x_adv; where a check falls, adapt and maybe go back to the best."""
    better = loss > rows.loss_best
    rows.grad.copy_(grad).nan_to_num_(0.0)
    torch.where(column(better, grad), rows.x_adv, rows.x_best, out=rows.x_best)
    torch.where(column(better, grad), rows.grad, rows.grad_best, out=rows.grad_best)
    torch.where(better, loss, rows.loss_best, out=rows.loss_best)
    torch.where(better, rows.step, rows.step_best, out=rows.step_best)
    stepped = rows.step > 0
    torch.where(stepped, rows.loss_best_at_check, loss, out=rows.loss_best_at_check)
    # As in the reference, the first step is compared with a loss of zero, not with the starting point's.
    rows.rises.add_(stepped & (loss > rows.loss_last))
    torch.where(stepped, loss, rows.loss_last, out=rows.loss_last)
    period = periods[rows.base + rows.step]
    if period.device.type != "cpu" or bool((period > 0).any()):
        (_check_l1 if norm == "L1" else _check)(rows, period)


def _check(rows: Rows, period: Tensor) -> None:
    due = period > 0
    halve = rows.rises <= 0.75 * period
    halve = due & (halve | (~rows.reduced & (rows.loss_best_at_check >= rows.loss_best)))
    torch.where(due, halve, rows.reduced, out=rows.reduced)
    torch.where(due, rows.loss_best, rows.loss_best_at_check, out=rows.loss_best_at_check)
    rows.rises.masked_fill_(due, 0.0)
    torch.where(halve, rows.eta / 2, rows.eta, out=rows.eta)
    _back_to_best(rows, halve)


def _check_l1(rows: Rows, period: Tensor) -> None:
    due = period > 0
    support = (rows.x_best != rows.x).flatten(1).sum(1).to(rows.eps)
    sparser = due & (support / rows.support < 0.95)
    eta = torch.where(sparser, rows.eps, rows.eta / 1.5)
    eta = torch.minimum(torch.maximum(eta, rows.eps / 10), rows.eps)
    torch.where(due, support / rows.x[0].numel() / 1.5, rows.topk, out=rows.topk)
    torch.where(due, eta, rows.eta, out=rows.eta)
    torch.where(due, support, rows.support, out=rows.support)
    _back_to_best(rows, sparser)


def _back_to_best(rows: Rows, where: Tensor) -> None:
    torch.where(column(where, rows.x), rows.x_best, rows.x_adv, out=rows.x_adv)
    torch.where(column(where, rows.x), rows.grad_best, rows.grad, out=rows.grad)


def advance(rows: Rows, norm: str, *, momentum: bool = True) -> None:
    """Move every row to its next point."""
    new = _propose(rows, norm, momentum)
    rows.x_old.copy_(rows.x_adv)
    rows.x_adv.copy_(new)
    rows.step.add_(1)


def _propose(rows: Rows, norm: str, momentum: bool) -> Tensor:
    if norm == "L1":
        direction = _sparse_sign(rows.grad, rows.topk)
        count = direction.abs().flatten(1).sum(1)
        return project(
            rows.x_adv + column(rows.eta / (count + 1e-10), rows.x) * direction,
            rows.x,
            rows.eps,
            norm,
        )
    if norm == "Linf":
        direction = rows.grad.sign()
    else:
        direction = rows.grad / column(norms(rows.grad, "L2") + 1e-12, rows.x)
    z = _into(direction.mul_(column(rows.eta, rows.x)).add_(rows.x_adv), rows, norm)
    if not momentum:
        return z
    a = column(1.0 - 0.25 * (rows.step > 0).to(rows.eps), rows.x)
    moved = z.sub_(rows.x_adv).mul_(a).add_(rows.x_adv)
    return _into(moved.add_((rows.x_adv - rows.x_old).mul_(1 - a)), rows, norm)


def _into(z: Tensor, rows: Rows, norm: str) -> Tensor:
    if norm == "Linf":
        return torch.clamp(z, rows.lower, rows.upper, out=z)
    return project(z, rows.x, rows.eps, norm)


def _sparse_sign(grad: Tensor, topk: Tensor) -> Tensor:
    flat = grad.abs().flatten(1)
    size = flat.shape[1]
    at = ((1.0 - topk) * size).clamp(0, size - 1).long()
    threshold = flat.sort(dim=1)[0].gather(1, at.view(-1, 1))
    return grad.sign() * (grad.abs() >= column(threshold, grad))


def cold_start(
    x: Tensor, eps: float, norm: str, seed: int, ids: Tensor, restart: int = 0
) -> Tensor:
    """A random point for each row of x (b, ...), from (seed, id, restart) alone, so that it is the same on every device."""
    generator = torch.Generator()
    noise = torch.empty(x.shape, dtype=x.dtype)
    for row, number in zip(noise, ids.tolist(), strict=True):
        key = (
            seed * 0x9E3779B97F4A7C15
            + number * 0xBF58476D1CE4E5B9
            + restart * 0x94D049BB133111EB
            + 1
        )
        generator.manual_seed(key & _MASK)
        row.uniform_(-1, 1, generator=generator) if norm == "Linf" else row.normal_(
            generator=generator
        )
    radius = torch.full((len(x),), eps, device=x.device, dtype=x.dtype)
    return random_start(x, noise.to(x.device), radius, norm)

"""The per-sample state of APGD and PGD, and one step of it.

A step observes the loss and gradient at the current point, then moves to the next point. The rows
of a batch may be at different steps. Everything happens in place and on the device, so that a
step can be captured in a CUDA graph.

Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208;
PGD: Madry et al. 2018, arXiv:1706.06083.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from robustsoup.attacks.projections import (
    as_column,
    is_numpy_like,
    norms,
    project,
    random_start,
    sort_rows,
)
from robustsoup.settings import SEED_LIMIT
from robustsoup.threats import ThreatModel

Array = Any
"""A vector with an entry for each row: a tensor, or a NumPy array; see `as_arrays`."""


@dataclass(frozen=True)
class StepSchedule:
    """The distribution of an attack's steps over stages.

    Attributes:
        norm: Norm of the threat model.
        stages: (eps, steps) of each stage; the last eps is that of the threat model.
        adaptive: Whether step sizes adapt and steps have momentum (APGD), or neither (PGD).
    """

    norm: str
    stages: tuple[tuple[float, int], ...]
    adaptive: bool = True

    @classmethod
    def for_threat(
        cls, threat: ThreatModel, steps: int, *, adaptive: bool = True, staged: bool = True
    ) -> Self:
        """Return the schedule of `steps` steps against a threat model.

        Args:
            threat: Threat model.
            steps: Number of steps, at least 1.
            adaptive: True for APGD, False for PGD.
            staged: Let APGD in L1 spend 30 % of the steps at 3 eps, 30 % at 2 eps and 40 % at eps,
                each stage starting from the best point of the last, as AutoAttack does.
        """
        first = math.ceil(0.3 * steps)
        if not (staged and adaptive) or threat.norm != "L1" or steps <= 2 * first:
            return cls(threat.norm, ((threat.eps, steps),), adaptive)
        last = steps - 2 * first
        return cls("L1", ((3 * threat.eps, first), (2 * threat.eps, first), (threat.eps, last)))

    def check_periods(self) -> Tensor:
        """Return a table, int64: the length of the period that a check at step k ends, else 0.

        The tables of the stages follow one another; a stage of n steps has n + 1 entries.
        """
        return torch.cat([self._stage_periods(steps) for _, steps in self.stages])

    def stage_offsets(self) -> Tensor:
        """Return the index of each stage's first entry in `check_periods`; (stages,) int64."""
        return torch.tensor([0, *(steps + 1 for _, steps in self.stages[:-1])]).cumsum(0)

    def _stage_periods(self, steps: int) -> Tensor:
        periods = torch.zeros(steps + 1, dtype=torch.long)
        if not self.adaptive:
            return periods
        if self.norm == "L1":
            period = max(int(0.04 * steps), 1)
            periods[period::period] = period
            return periods
        period, shortening, shortest = (max(int(p * steps), 1) for p in (0.22, 0.03, 0.06))
        step = period
        while step <= steps:
            periods[step] = period
            period = max(period - shortening, shortest)
            step += period
        return periods


@dataclass
class SearchState:
    """The state of b searches, one row each.

    Attributes:
        x: (b, ...) clean images.
        y: (b,) labels.
        target: (b,) target classes (or (b, ...) for a custom loss).
        eps: (b,) radius of the row's stage.
        lower, upper: (b, ...) bounds of ball and box for Linf; unused for other norms.
        x_adv, x_prev: (b, ...) current and previous point.
        x_best: (b, ...) point of highest loss so far.
        grad, grad_best: (b, ...) gradient at x_adv and x_best.
        loss_prev: (b,) loss at the previous step.
        loss_best, step_best: (b,) loss at x_best, and the step that reached it.
        loss_best_at_check: (b,) loss_best at the last check.
        rises: (b,) steps since the last check in which the loss rose.
        halved: (b,) whether the last check halved the step size.
        step_size: (b,) step size.
        topk: (b,) share of pixels that a step in L1 moves.
        support: (b,) number of pixels that x_best changed at the last check (L1).
        step: (b,) steps taken in the stage.
        offset: (b,) index of the stage's first entry in the table of checks.
        final_stage: (b,) whether the stage is the last, so that its points count.
        margin: (b,) smallest logit margin of the points that count.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    eps: Tensor
    lower: Tensor
    upper: Tensor
    x_adv: Tensor
    x_prev: Tensor
    x_best: Tensor
    grad: Tensor
    grad_best: Tensor
    loss_prev: Tensor
    loss_best: Tensor
    loss_best_at_check: Tensor
    step_best: Tensor
    rises: Tensor
    halved: Tensor
    step_size: Tensor
    topk: Tensor
    support: Tensor
    step: Tensor
    offset: Tensor
    final_stage: Tensor
    margin: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the state."""
        return [getattr(self, field.name) for field in fields(self)]

    def select(self, rows: Tensor) -> "SearchState":
        """Return a copy of some rows; `rows` is int64 on the state's device."""
        return SearchState(*(tensor[rows] for tensor in self.tensors()))

    def overwrite(self, rows: Tensor, source: "SearchState") -> None:
        """Overwrite some rows in place."""
        for target, values in zip(self.tensors(), source.tensors(), strict=True):
            target[rows] = values


def concat_states(states: list[SearchState]) -> SearchState:
    """Concatenate the rows of several states."""
    if len(states) == 1:
        return states[0]
    columns = zip(*(state.tensors() for state in states), strict=True)
    return SearchState(*(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Stage:
    """The parameters of one stage of a search.

    Attributes:
        topk: First share of pixels that a step in L1 moves, for a stage without `support`.
        support: (b,) number of pixels that the start of the stage changed; decides the first share
            of pixels of a stage that continues a search, as in the reference. None for a stage
            that starts afresh.
        offset: Index of the stage's first entry in the table of checks, a number or (b,).
        final: Whether the stage is the last, a bool or (b,).
    """

    topk: float = 0.2
    support: Tensor | None = None
    offset: int | Tensor = 0
    final: bool | Tensor = True


def initial_state(
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    start: Tensor,
    schedule: StepSchedule,
    *,
    target: Tensor | None = None,
    stage: Stage | None = None,
) -> SearchState:
    """Return the state of searches at their starting points.

    Args:
        x: (b, ...) clean images.
        y: (b,) int64 labels.
        eps: Radius, a number or (b,).
        start: (b, ...) starting points in the ball and the box.
        schedule: The schedule of the attack.
        target: (b,) target classes.
        stage: The stage that begins; by default the only stage.
    """
    stage = stage or Stage()
    zeros = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    eps = zeros + eps
    pixels = float(x[0].numel())
    if stage.support is None:
        topk, support = zeros + stage.topk, torch.full_like(eps, pixels)
    else:
        topk, support = stage.support / pixels / 1.5, stage.support
    if schedule.adaptive:
        step_size = eps.clone() if schedule.norm == "L1" else 2 * eps
    else:  # 2.5 eps / steps lets PGD cross the ball more than once (Madry et al.)
        step_size = 2.5 * eps / schedule.stages[0][1]
    radius = as_column(eps, x)
    has_bounds = schedule.norm == "Linf"
    return SearchState(
        x=x,
        y=y,
        target=torch.zeros_like(y) if target is None else target,
        eps=eps,
        lower=(x - radius).clamp_(min=0.0) if has_bounds else x,
        upper=(x + radius).clamp_(max=1.0) if has_bounds else x,
        x_adv=start.clone(),
        x_prev=start.clone(),
        x_best=start.clone(),
        grad=torch.zeros_like(x),
        grad_best=torch.zeros_like(x),
        loss_prev=zeros.clone(),
        loss_best=torch.full_like(eps, -math.inf),
        loss_best_at_check=zeros.clone(),
        step_best=torch.zeros_like(y),
        rises=zeros.clone(),
        halved=torch.ones_like(eps, dtype=torch.bool),
        step_size=step_size,
        topk=topk,
        support=support,
        step=torch.zeros_like(y),
        offset=torch.zeros_like(y) + stage.offset,
        final_stage=torch.zeros_like(y, dtype=torch.bool) | stage.final,
        margin=torch.full_like(eps, math.inf),
    )


def start_first_stage(
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    schedule: StepSchedule,
    *,
    target: Tensor | None = None,
) -> SearchState:
    """Return the state at the random start of the first stage.

    If more stages follow, the first one takes its support from its start, as in the reference. The
    reference adds the projection's correction to x + noise, so that rounding leaves a pixel changed
    that the projection sets back: about 1,200 of 3,072 pixels count on CIFAR at L1 36, not 140.

    Args:
        x: (b, ...) clean images.
        y: (b,) int64 labels.
        noise: (b, ...) see `cold_noise`.
        schedule: The schedule of the attack.
        target: (b,) target classes.
    """
    eps, _ = schedule.stages[0]
    radius = torch.full((len(x),), eps, device=x.device, dtype=x.dtype)
    start, stage = random_start(x, noise, radius, schedule.norm), Stage()
    if len(schedule.stages) > 1:
        far = x + noise
        changed = (start != x) | (far - (far - x) != x)
        stage = Stage(support=changed.flatten(1).sum(1).to(x), final=False)
    return initial_state(x, y, eps, start, schedule, target=target, stage=stage)


def start_next_stage(state: SearchState, stage: Tensor, schedule: StepSchedule) -> SearchState:
    """Return the state at the start of `stage` (b,) int64, which is not the first.

    The search starts from the best point of the previous stage, projected into the smaller ball.
    """
    x = state.x
    radii = torch.tensor([eps for eps, _ in schedule.stages], device=x.device, dtype=x.dtype)
    eps = radii[stage]
    start = project(state.x_best, x, eps, schedule.norm)
    offset = schedule.stage_offsets().to(stage.device)[stage]
    is_final = stage == len(schedule.stages) - 1
    next_stage = Stage(support=_count_changed(start, x), offset=offset, final=is_final)
    result = initial_state(x, state.y, eps, start, schedule, target=state.target, stage=next_stage)
    result.margin = state.margin
    return result


def observe(state: SearchState, loss: Tensor, grad: Tensor, periods: Tensor, norm: str) -> None:
    """Record loss and gradient at x_adv; where a check is due, adapt the step size.

    A check may move a row back to its best point.

    Args:
        state: State to update in place.
        loss: (b,) loss at x_adv.
        grad: (b, ...) gradient at x_adv; NaN counts as 0.
        periods: The table of `StepSchedule.check_periods`, on the device.
        norm: Norm of the threat model.
    """
    torch.nan_to_num(grad, 0.0, out=state.grad)
    step, offset, reached, table, values, previous, highest, at_check, rises = as_arrays(
        *(state.step, state.offset, state.step_best, periods),
        *(loss, state.loss_prev, state.loss_best, state.loss_best_at_check, state.rises),
    )
    better = values > highest
    copy_rows(better, state.x_adv, state.x_best)
    copy_rows(better, state.grad, state.grad_best)
    set_rows(better, values, highest)
    set_rows(better, step, reached)
    has_moved = step > 0
    set_rows(~has_moved, values, at_check)
    # As in the reference, the first step compares with a loss of 0, not with that of the start.
    rises += has_moved & (values > previous)
    set_rows(has_moved, values, previous)
    period = table[offset + step]
    # Only a CPU knows at no cost whether a check is due.
    if loss.device.type != "cpu" or (period > 0).any():
        (_check_l1 if norm == "L1" else _check_l2_linf)(state, period)


def _check_l2_linf(state: SearchState, period: Array) -> None:
    rises, halved, step_size, highest, at_check = as_arrays(
        state.rises, state.halved, state.step_size, state.loss_best, state.loss_best_at_check
    )
    due = period > 0
    few_rises = rises <= 0.75 * period
    stalled = ~halved & (at_check >= highest)
    halve = due & (few_rises | stalled)
    set_rows(due, halve, halved)
    set_rows(due, highest, at_check)
    rises *= ~due
    set_rows(halve, step_size / 2, step_size)
    _return_to_best(state, halve)


def _check_l1(state: SearchState, period: Array) -> None:
    due = torch.as_tensor(period) > 0
    support = _count_changed(state.x_best, state.x)
    sparser = due & (support / state.support < 0.95)
    step_size = torch.where(sparser, state.eps, state.step_size / 1.5)
    step_size = torch.minimum(torch.maximum(step_size, state.eps / 10), state.eps)
    torch.where(due, support / state.x[0].numel() / 1.5, state.topk, out=state.topk)
    torch.where(due, step_size, state.step_size, out=state.step_size)
    torch.where(due, support, state.support, out=state.support)
    _return_to_best(state, sparser)


def _count_changed(points: Tensor, x: Tensor) -> Tensor:
    """Return the number of pixels that differ from x, (b,) in the dtype of x."""
    return (points != x).flatten(1).sum(1).to(x)


def _return_to_best(state: SearchState, rows: Array) -> None:
    copy_rows(rows, state.x_best, state.x_adv)
    copy_rows(rows, state.grad_best, state.grad)


def as_arrays(*vectors: Tensor) -> list[Any]:
    """Return vectors as NumPy arrays that share their memory, if NumPy can read all of them.

    A step has some thirty operations on one number a row. PyTorch lets go of the interpreter's
    lock in each of them, and two lanes then wait for each other; NumPy keeps it.
    """
    if all(is_numpy_like(vector) for vector in vectors):
        return [vector.numpy() for vector in vectors]
    return list(vectors)


def set_rows(rows: Array, values: Array, target: Array) -> None:
    """Set `target` (b,) to `values` (b,) where `rows` (b,) bool is true, in place."""
    if isinstance(target, Tensor):
        torch.where(rows, values, target, out=target)
    else:
        np.copyto(target, values, where=rows)


def copy_rows(rows: Array, source: Tensor, target: Tensor) -> None:
    """Copy the rows where `rows` (b,) bool is true from one tensor (b, ...) to another, in place.

    On a CPU only these rows are read and written; a GPU must not wait for their number.
    """
    if not is_numpy_like(target):
        torch.where(as_column(rows, source), source, target, out=target)
        return
    numbers = np.asarray(rows).nonzero()[0]
    if not len(numbers):
        return
    # Whole rows are copied fastest by NumPy, in the order of the axes in memory.
    axes = sorted(range(1, target.dim()), key=target.stride, reverse=True)
    target.numpy().transpose(0, *axes)[numbers] = source.numpy().transpose(0, *axes)[numbers]


def advance(state: SearchState, norm: str, *, momentum: bool = True) -> None:
    """Move every row to its next point, in place."""
    x_next = _next_l1(state) if norm == "L1" else _next_l2_linf(state, norm, momentum)
    if x_next.device.type == "cpu" and x_next.stride() == state.x_adv.stride():
        state.x_prev, state.x_adv = state.x_adv, x_next
    else:  # a CUDA graph refers to the memory of the state, and the memory format must stay
        state.x_prev.copy_(state.x_adv)
        state.x_adv.copy_(x_next)
    state.step.add_(1)


def _next_l1(state: SearchState) -> Tensor:
    direction = _sparse_sign(state.grad, state.topk)
    moved = direction.abs().flatten(1).sum(1)
    scale = as_column(state.step_size / (moved + 1e-10), state.x)
    return project(state.x_adv + scale * direction, state.x, state.eps, "L1")


def _next_l2_linf(state: SearchState, norm: str, momentum: bool) -> Tensor:
    if norm == "Linf":
        direction = state.grad.sign()
    else:
        direction = state.grad / as_column(norms(state.grad, "L2") + 1e-12, state.x)
    step = direction.mul_(as_column(state.step_size, state.x))
    z = _clip_to_ball_and_box(step.add_(state.x_adv), state, norm)
    if not momentum:
        return z
    a = as_column(1.0 - 0.25 * (state.step > 0), state.x)
    x_next = z.sub_(state.x_adv).mul_(a).add_(state.x_adv)
    x_next.add_((state.x_adv - state.x_prev).mul_(1 - a))
    return _clip_to_ball_and_box(x_next, state, norm)


def _clip_to_ball_and_box(z: Tensor, state: SearchState, norm: str) -> Tensor:
    if norm == "Linf":
        return torch.clamp(z, state.lower, state.upper, out=z)
    return project(z, state.x, state.eps, norm)


def _sparse_sign(grad: Tensor, topk: Tensor) -> Tensor:
    """Return the sign of the gradient where its size is among the largest `topk` (b,), else 0."""
    size = grad.abs().flatten(1)
    pixels = size.shape[1]
    rank = ((1.0 - topk) * pixels).clamp(0, pixels - 1).long()
    threshold = sort_rows(size).gather(1, rank.view(-1, 1))
    return grad.sign() * (grad.abs() >= as_column(threshold, grad))


def cold_noise(x: Tensor, norm: str, *, seed: int, ids: Tensor, restart: int = 0) -> Tensor:
    """Return the noise of each sample's random start, for `random_start`.

    The noise of a sample depends only on (seed, id, restart) and is the same on every device.

    Args:
        x: (b, ...) clean images.
        norm: Norm of the threat model.
        seed: Seed of the attack.
        ids: (b,) int64 sample numbers.
        restart: Number of the restart, from 0.

    Returns:
        (b, ...) uniform in (-1, 1) for Linf, else Gaussian.
    """
    generator = torch.Generator()
    noise = torch.empty(x.shape, dtype=x.dtype)
    for row, sample in zip(noise, ids.tolist(), strict=True):
        key = seed * 0x9E3779B97F4A7C15 + sample * 0xBF58476D1CE4E5B9
        key += restart * 0x94D049BB133111EB + 1
        generator.manual_seed(key % SEED_LIMIT)
        if norm == "Linf":
            row.uniform_(-1, 1, generator=generator)
        else:
            row.normal_(generator=generator)
    return noise.to(x.device)

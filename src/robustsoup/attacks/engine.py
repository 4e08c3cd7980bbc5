"""The engine of evaluation attacks: a queue of samples, and lanes that keep their passes full.

A lane holds a fixed number of rows. When the sample of a row is broken or finished, the row takes
the next sample from the queue. Every pass has the same shape, and every sample has its own noise
and state, so its verdict does not depend on the batch size, the order or other samples.

The search may run in bfloat16. A point that fools the network in the search is checked in
float32 before it counts, and so is a point that rounding left outside the ball and that was moved
inside. The last point of every sample (which needs no gradient) and its best point are checked too.
Rows to check are collected until they fill a whole pass, or nothing else can fill their places.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustsoup.attacks.cuda_graph import capture_step
from robustsoup.attacks.forward import input_gradient, padded_loss
from robustsoup.attacks.lanes import lane_count, run_in_lanes
from robustsoup.attacks.losses import Loss, judge, logit_margin
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.attacks.projections import as_column, move_inside
from robustsoup.attacks.steps import (
    SearchState,
    StepSchedule,
    advance,
    as_arrays,
    cold_noise,
    concat_states,
    copy_rows,
    observe,
    set_rows,
    start_first_stage,
    start_next_stage,
)
from robustsoup.threats import ThreatModel

Numbers, Flags = NDArray[np.int64], NDArray[np.bool_]
MAX_WINDOW = 10
"""Largest number of steps that a GPU takes between two inspections by the host."""


@dataclass(frozen=True)
class Attempt:
    """One start of an attack.

    Attributes:
        name: Name in records, such as "apgd-t target 2".
        loss: Loss to maximise.
        target_rank: Rank of the target class among the other classes; 0 if untargeted.
        restart: Number of the restart, from 0.
        by_distance: Whether the target is the rank-th class by `rank_targets` of MALT, instead of
            by the logits.
    """

    name: str
    loss: Loss
    target_rank: int = 0
    restart: int = 0
    by_distance: bool = False


@dataclass(frozen=True)
class Search:
    """The networks, samples and settings of one attempt.

    Attributes:
        model: Network in eval mode that decides, in float32, whether a point is adversarial.
        search_model: Network whose gradients are followed: `model` or a faster copy of it.
        samples: All samples of the attack.
        attempt: The attempt.
        index: Index of the attempt.
        attempts: Number of attempts of the attack.
        schedule: The stages and their steps.
        seed: Seed of the noise.
        precision: Arithmetic of the search, "float32" or "bfloat16".
        eot: Passes that each gradient is averaged over.
        pass_size: Number of images in every pass.
        device: Device of the networks.
        nearest: (n, ranks) int64 target classes, for an attempt that ranks them by distance.
    """

    model: nn.Module
    search_model: nn.Module
    samples: AttackedSamples
    attempt: Attempt
    index: int
    attempts: int
    schedule: StepSchedule
    seed: int
    precision: str
    eot: int
    pass_size: int
    device: torch.device
    nearest: Tensor | None = None

    @property
    def threat(self) -> ThreatModel:
        """The threat model that every reported point satisfies."""
        return ThreatModel(self.schedule.norm, self.schedule.stages[-1][0])

    @property
    def window(self) -> int:
        """Number of steps between two inspections by the host.

        A GPU takes several steps without synchronising. The number divides the length of every
        stage, so that every row is inspected when its stage ends.
        """
        if self.device.type == "cpu":
            return 1
        common = gcd(*(steps for _, steps in self.schedule.stages))
        return max(k for k in range(1, MAX_WINDOW + 1) if common % k == 0)

    def choose_targets(self, samples: Tensor) -> Tensor:
        """Return the target class of some samples (b,) int64, for an attempt that has one."""
        rank = self.attempt.target_rank
        if self.nearest is not None:
            return self.nearest[samples, rank - 1]
        return self.samples.ranked_target(samples, rank)

    def needs_check(self) -> bool:
        """Whether a hit of the search must be checked in float32."""
        return self.precision != "float32"


class SampleQueue:
    """The samples that wait for a row, shared by all lanes.

    Args:
        waiting: AttackedSamples, first to last.
    """

    def __init__(self, waiting: Sequence[int]) -> None:
        self.stopped = False
        self._waiting = list(waiting)[::-1]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, count: int) -> list[int]:
        """Remove and return up to `count` samples."""
        with self._lock:
            return [self._waiting.pop() for _ in range(min(count, len(self._waiting)))]

    def stop(self) -> None:
        """Make the lanes return soon; unfinished samples stay unsettled."""
        self.stopped = True


def run_search(
    search: Search, queue: SampleQueue, outcome: Outcome, poll: Callable[[], None] | None = None
) -> None:
    """Attack the samples of the queue until it is empty or stopped, writing to `outcome`.

    Args:
        search: The attempt to run.
        queue: The samples to attack; each must be classified correctly and not broken yet.
        outcome: Written as samples are settled.
        poll: Called in this thread several times a second.
    """
    run_lane = partial(_run_lane, search, queue, outcome)
    run_lanes(run_lane, queue, search.pass_size, search.device, poll=poll)


def run_lanes(
    run_lane: Callable[[], None],
    queue: SampleQueue,
    size: int,
    device: torch.device,
    *,
    poll: Callable[[], None] | None = None,
) -> None:
    """Run as many lanes as the device has and the queue fills.

    Args:
        run_lane: Attacks samples of the queue until it is empty or stopped.
        queue: The samples to attack.
        size: Number of images in every pass.
        device: Device of the network.
        poll: Called in this thread several times a second.
    """
    lanes = min(lane_count(device), -(-len(queue) // size))
    run_in_lanes([run_lane] * lanes, device, poll=poll, stop=queue.stop)


def run_in_turn(
    run_attempt: Callable[[int, SampleQueue, Callable[[], None] | None], None],
    attempts: int,
    samples: AttackedSamples,
    outcome: Outcome,
    *,
    poll: Callable[[int, int], None] | None = None,
) -> None:
    """Run attempts one after the other on the samples that none of them has broken yet.

    Args:
        run_attempt: run_attempt(index, queue, poll) attacks the samples of the queue.
        attempts: Number of attempts.
        samples: All samples of the attack.
        outcome: Read before each attempt; the attempts write to it.
        poll: Called several times a second with (settled, total), which count samples times
            attempts.
    """
    correct = samples.correct

    def report_progress() -> None:
        if poll:
            poll(int(outcome.settled[correct].sum()), int(correct.sum()) * attempts)

    for index in range(attempts):
        queue = SampleQueue(order_waiting(samples, outcome, index))
        run_attempt(index, queue, report_progress if poll else None)
        if queue.stopped:
            break


def order_waiting(samples: AttackedSamples, outcome: Outcome, index: int) -> list[int]:
    """Return the samples that wait for attempt `index`, in the order in which to attack them.

    Samples that are likely to break come last, so that short searches fill the rows at the end.
    """
    is_waiting = samples.correct & (outcome.settled == index) & ~outcome.broken
    waiting = is_waiting.nonzero().flatten()
    rank = -logit_margin(samples.logits, samples.y)
    order: list[int] = waiting[rank[waiting].argsort(stable=True)].tolist()
    return order


@torch.no_grad()
def _run_lane(search: Search, queue: SampleQueue, outcome: Outcome) -> None:
    samples = torch.tensor(queue.take(search.pass_size), dtype=torch.long)
    if len(samples):
        outcome.attacked[samples] = True
        Lane(search, queue, outcome, begin_search(search, samples)).run()


@dataclass
class DeviceRows:
    """The tensors that a step changes, all on the device.

    Attributes:
        state: State of every row.
        hit: (b,) bool, whether a point fooled the network since the last inspection by the host.
        hit_points: (b, ...) the first point that fooled the network.
        hit_step: (b,) int64, the step of its stage at which this point was reached.
        fooled: (b,) bool, whether the latest point fooled the network.
    """

    state: SearchState
    hit: Tensor
    hit_points: Tensor
    hit_step: Tensor
    fooled: Tensor

    @classmethod
    def from_state(cls, state: SearchState) -> "DeviceRows":
        """Return rows without hits."""
        hit = torch.zeros_like(state.final_stage)
        return cls(state, hit, state.x_adv.clone(), state.step.clone(), hit.clone())

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a step changes."""
        return [*self.state.tensors(), self.hit, self.hit_points, self.hit_step, self.fooled]


def take_step(search: Search, rows: DeviceRows, periods: Tensor) -> None:
    """Take one step of every row, without waiting for the device.

    Args:
        search: The attempt to run.
        rows: Rows to update in place.
        periods: The schedule's table of checks, on the device.
    """
    state, norm = rows.state, search.schedule.norm
    target = state.target if search.attempt.target_rank else None
    logits, loss, grad = input_gradient(
        search.search_model,
        state.x_adv,
        state.y,
        search.attempt.loss,
        search.precision,
        target=target,
        eot=search.eot,
    )
    margin, is_fooled = judge(logits, state.y)
    margin = margin.to(state.margin)
    is_fooled_now, fooled, hit, hit_step, step, final, margins, before, smallest = as_arrays(
        *(is_fooled, rows.fooled, rows.hit, rows.hit_step, state.step, state.final_stage),
        *(margin, state.margin, torch.minimum(margin, state.margin)),
    )
    fooled[...] = is_fooled_now
    is_new = fooled & final & ~hit
    if search.needs_check():  # after float32 refuted a hit, check only deeper hits
        is_new &= ~(margins >= before)
    copy_rows(is_new, state.x_adv, rows.hit_points)
    set_rows(is_new, step, hit_step)
    hit |= is_new
    set_rows(final, smallest, before)
    observe(state, loss, grad, periods, norm)
    advance(state, norm, momentum=search.schedule.adaptive)


@dataclass
class Pending:
    """Rows outside a lane: new rows, rows to check in float32, and rows to put back.

    The bookkeeping is on the CPU, `points` and `state` are on the device.

    Attributes:
        sample: (b,) int64 samples.
        stage: (b,) int64 stage of the schedule.
        points: (b, ...) points to check.
        step: (b,) int64 step at which each point was reached, counted over all stages.
        finished: (b,) bool, whether the row has taken all steps of its stage.
        hit: (b,) bool, whether the point fooled the network in the search.
        is_best: (b,) bool, whether the point is the best of its row; the last point was checked.
        state: State of the rows.
    """

    sample: Tensor
    stage: Tensor
    points: Tensor
    step: Tensor
    finished: Tensor
    hit: Tensor
    is_best: Tensor
    state: SearchState

    def __len__(self) -> int:
        return len(self.sample)

    def select(self, rows: Tensor) -> "Pending":
        """Return a copy of some rows; `rows` is int64 on the CPU."""
        device_rows = rows.to(self.points.device)
        return Pending(
            sample=self.sample[rows],
            stage=self.stage[rows],
            points=self.points[device_rows],
            step=self.step[rows],
            finished=self.finished[rows],
            hit=self.hit[rows],
            is_best=self.is_best[rows],
            state=self.state.select(device_rows),
        )

    def where(self, mask: Tensor) -> "Pending":
        """Return a copy of the rows where `mask` (b,) bool is true."""
        return self.select(mask.nonzero().flatten())


def begin_search(search: Search, samples: Tensor) -> Pending:
    """Return samples (b,) int64 at their random starting points."""
    schedule, data = search.schedule, search.samples
    x = data.fetch(samples)
    noise = cold_noise(
        x,
        schedule.norm,
        seed=search.seed,
        ids=data.ids[samples],
        restart=search.attempt.restart,
    )
    target = None
    if search.attempt.target_rank:
        target = search.choose_targets(samples).to(x.device)
    y = data.y[samples].to(x.device)
    state = start_first_stage(x, y, noise, schedule, target=target)
    zeros, false = torch.zeros_like(samples), torch.zeros(len(samples), dtype=torch.bool)
    return Pending(samples, zeros, x, zeros, false, false, false, state)


class Lane:
    """A fixed number of rows, refilled from the queue.

    Args:
        search: The attempt to run.
        queue: Source of new samples.
        outcome: Receives the results.
        first: The first rows, at least 1 and at most the size of a pass.
    """

    def __init__(
        self, search: Search, queue: SampleQueue, outcome: Outcome, first: Pending
    ) -> None:
        self.search, self.queue, self.outcome = search, queue, outcome
        self.window = search.window
        size, stages = search.pass_size, search.schedule.stages
        self.stage_steps = np.array([steps for _, steps in stages], dtype=np.int64)
        self.steps_before = torch.from_numpy(self.stage_steps.cumsum() - self.stage_steps)
        # The host's view of the rows: sample (-1: free), stage, and step within the stage.
        self.sample = np.full(size, -1, dtype=np.int64)
        self.stage, self.step = np.zeros_like(self.sample), np.zeros_like(self.sample)
        self.to_check: list[Pending] = []
        self.to_place: list[Pending] = []
        # Rows that stay free hold copies of the first ones, so that every pass is full.
        filling = (torch.arange(size) % len(first)).to(search.device)
        self.rows = DeviceRows.from_state(first.state.select(filling))
        self._place(torch.arange(len(first)), first)
        self.periods = search.schedule.check_periods().to(search.device)
        self.take_step: Callable[[], None] = partial(take_step, search, self.rows, self.periods)
        if search.device.type == "cuda":
            # The graph refers to the memory of rows, periods and networks, which this lane keeps.
            state = self.rows.state
            self.take_step = capture_step(self.take_step, self.rows.tensors(), state.loss_best)

    def run(self) -> None:
        """Attack until the queue is empty and every row is settled, or until it is stopped."""
        while not self.queue.stopped:
            if self._is_busy():
                self._run_window()
            elif not self.to_check:
                return
            while self._check_is_due():
                self._check_pass()
            self._refill()

    def _is_busy(self) -> bool:
        return bool((self.sample >= 0).any())

    def _check_is_due(self) -> bool:
        if not self.to_check:
            return False
        pending = sum(len(items) for items in self.to_check)
        if pending >= self.search.pass_size or not self._is_busy():
            return True
        # Once the queue is empty nothing else fills the free rows, so a hit that may be refuted
        # continues at once: after all others it would run its remaining steps almost alone.
        may_continue = (bool((items.hit & ~items.finished).any()) for items in self.to_check)
        return len(self.queue) == 0 and any(may_continue)

    def _refill(self) -> None:
        if not (self.to_place or len(self.queue)):
            return
        free = torch.from_numpy((self.sample < 0).nonzero()[0])
        if self.to_place and len(free):
            pending = _concat_pending(self.to_place)
            placed, remaining = torch.arange(len(pending)).tensor_split([len(free)])
            self.to_place = [pending.select(remaining)] if len(remaining) else []
            self._place(free[: len(placed)], pending.select(placed))
            free = free[len(placed) :]
        samples = torch.tensor(self.queue.take(len(free)), dtype=torch.long)
        if len(samples):
            self.outcome.attacked[samples] = True
            self._place(free[: len(samples)], begin_search(self.search, samples))

    def _place(self, rows: Tensor, items: Pending) -> None:
        self.rows.state.overwrite(rows.to(self.search.device), items.state)
        numbers = rows.numpy()
        self.sample[numbers], self.stage[numbers] = items.sample.numpy(), items.stage.numpy()
        self.step[numbers] = items.state.step.cpu().numpy()

    def _run_window(self) -> None:
        """Take the steps of one window, then remove the rows that were hit or have finished."""
        self.rows.hit.zero_()
        busy = self.sample >= 0
        starting = (self.step == 0) & (self.stage == 0) & busy
        self.take_step()
        zero_gradient = None  # stays on the device until the end of the window
        if starting.any():
            # Where the start fools the network, the gradient of dlr may be 0; that is no doubt.
            zero_gradient = self.rows.state.grad.flatten(1).abs().amax(1) == 0
            zero_gradient &= ~self.rows.fooled
        for _ in range(self.window - 1):
            self.take_step()
        self.step += self.window
        hit = self.rows.hit.cpu().numpy() & busy
        finished = (self.step == self.stage_steps[self.stage]) & busy
        if zero_gradient is not None:
            started = torch.from_numpy(self.sample[starting])
            self.outcome.zero_gradient[started] |= zero_gradient.cpu()[starting]
        self._reset_steps((~busy).nonzero()[0])
        rows = (finished | hit).nonzero()[0]
        if len(rows):
            self._sort_removed(self._remove_rows(rows, finished[rows], hit[rows]))

    def _sort_removed(self, items: Pending) -> None:
        """Settle hits that need no check, and set the other rows aside for one.

        A point that rounding left outside the ball is moved inside, and counts as it is then.
        """
        points, items.points = items.points, self._move_inside(items.points, items.state)
        is_moved = (points != items.points).flatten(1).any(1).cpu()
        certain = items.hit & ~is_moved & (not self.search.needs_check())
        if len(broken := items.where(certain)):
            self._settle(broken, broken.state.margin, is_broken=True)
        if len(uncertain := items.where(~certain)):
            self.to_check.append(uncertain)

    def _move_inside(self, points: Tensor, state: SearchState) -> Tensor:
        """Move points of the last stage into the ball, exactly."""
        inside = move_inside(points, state.x, self.search.threat)
        return torch.where(as_column(state.final_stage, points), inside, points)

    def _reset_steps(self, rows: Numbers) -> None:
        """Set free rows back to step 0, so that they stay inside the table of checks."""
        if not len(rows):
            return
        device_rows = torch.from_numpy(rows).to(self.search.device)
        self.step[rows] = 0
        self.rows.state.step[device_rows] = 0
        self.rows.state.offset[device_rows] = 0

    def _remove_rows(self, rows: Numbers, finished: Flags, hit: Flags) -> Pending:
        """Free some rows and return each with its hit, or else with its current point."""
        device_rows = torch.from_numpy(rows).to(self.search.device)
        sample, stage, last = (
            torch.from_numpy(values[rows]) for values in (self.sample, self.stage, self.step)
        )
        has_ended, is_hit = torch.from_numpy(finished), torch.from_numpy(hit)
        state = self.rows.state.select(device_rows)
        moves = as_column(is_hit.to(self.search.device), state.x)
        points = torch.where(moves, self.rows.hit_points[device_rows], state.x_adv)
        step = torch.where(is_hit, self.rows.hit_step[device_rows].cpu(), last)
        step = step + self.steps_before[stage]
        self.sample[rows] = -1
        self._reset_steps(rows)
        is_best = torch.zeros_like(is_hit)
        return Pending(sample, stage, points, step, has_ended, is_hit, is_best, state)

    def _check_pass(self) -> None:
        """Check one pass of pending points in float32, and settle or continue each row."""
        pending = _concat_pending(self.to_check)
        checked, remaining = torch.arange(len(pending)).tensor_split([self.search.pass_size])
        self.to_check = [pending.select(remaining)] if len(remaining) else []
        items = pending.select(checked)
        state, attempt = items.state, self.search.attempt
        logits, loss = padded_loss(
            self.search.model,
            items.points,
            state.y,
            attempt.loss,
            self.search.pass_size,
            target=state.target if attempt.target_rank else None,
        )
        margin, is_fooled = judge(logits, state.y)
        margin = margin.to(state.margin)
        fooled = (is_fooled & state.final_stage).cpu()
        ended = items.finished & ~items.hit & ~fooled
        _update_best(items, loss, ended & ~items.is_best)
        smallest = torch.minimum(state.margin, margin)
        state.margin = torch.where(state.final_stage, smallest, state.margin)
        if len(broken := items.where(fooled)):
            self._settle(broken, margin[fooled.to(margin.device)], is_broken=True)
        self._sort_ended(items, ended)
        self._sort_refuted(items, items.hit & ~fooled)

    def _sort_ended(self, items: Pending, ended: Tensor) -> None:
        """Continue ended rows with the next stage or their best point; settle the survivors."""
        final = items.stage == len(self.stage_steps) - 1
        best_is_unchecked = ended & final & ~items.is_best & self.search.needs_check()
        if len(survived := items.where(ended & final & ~best_is_unchecked)):
            self._settle(survived, survived.state.margin.clamp(min=0), is_broken=False)
        if len(continued := items.where(ended & ~final)):
            continued.stage += 1
            stage = continued.stage.to(self.search.device)
            continued.state = start_next_stage(continued.state, stage, self.search.schedule)
            self.to_place.append(continued)
        if len(best := items.where(best_is_unchecked)):
            best.points = self._move_inside(best.state.x_best, best.state)
            best.is_best = torch.ones_like(best.is_best)
            best.step = best.state.step_best.cpu() + self.steps_before[best.stage]
            self.to_check.append(best)

    def _sort_refuted(self, items: Pending, refuted: Tensor) -> None:
        """Continue refuted hits; where the search has ended, check its last point instead."""
        if len(continued := items.where(refuted & ~items.finished)):
            self.to_place.append(continued)
        if len(last := items.where(refuted & items.finished)):
            last.points = self._move_inside(last.state.x_adv, last.state)
            last.hit = torch.zeros_like(last.hit)
            last.step = last.state.step.cpu() + self.steps_before[last.stage]
            self.to_check.append(last)

    def _settle(self, items: Pending, margin: Tensor, *, is_broken: bool) -> None:
        """Write the result of this attempt for some samples."""
        samples, state, outcome = items.sample, items.state, self.outcome
        if is_broken:
            outcome.record_points(samples, items.points, state.x, self.search.threat)
        elif self.search.index == 0:
            best = self._move_inside(state.x_best, state)
            outcome.record_points(samples, best, state.x, self.search.threat)
        outcome.margin[samples] = torch.fmin(outcome.margin[samples], margin.float().cpu())
        outcome.nan[samples] |= (margin.isnan() | state.margin.isnan()).cpu()
        if is_broken:
            outcome.step[samples], outcome.by[samples] = items.step, self.search.index
            outcome.broken[samples] = True
        # Written last: a snapshot relies on all other results of a settled sample.
        outcome.settled[samples] = self.search.attempts if is_broken else self.search.index + 1


def _concat_pending(parts: list[Pending]) -> Pending:
    return Pending(
        sample=torch.cat([part.sample for part in parts]),
        stage=torch.cat([part.stage for part in parts]),
        points=torch.cat([part.points for part in parts]),
        step=torch.cat([part.step for part in parts]),
        finished=torch.cat([part.finished for part in parts]),
        hit=torch.cat([part.hit for part in parts]),
        is_best=torch.cat([part.is_best for part in parts]),
        state=concat_states([part.state for part in parts]),
    )


def _update_best(items: Pending, loss: Tensor, rows: Tensor) -> None:
    """In `rows` (b,) bool, make the checked point the best one where its loss is the highest."""
    state = items.state
    better = rows.to(loss.device) & (loss > state.loss_best)
    state.x_best = torch.where(as_column(better, state.x), items.points, state.x_best)
    state.step_best = torch.where(better, state.step, state.step_best)

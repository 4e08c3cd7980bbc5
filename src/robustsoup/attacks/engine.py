"""The evaluation form: samples wait in a queue, and a row whose sample is fooled or finished takes the next one.

Every pass has one fixed shape, and a sample's noise and state are its own, so its verdict depends on neither batch size,
nor order, nor the samples beside it. A point that fools the network in bfloat16 is judged again in float32 before it
counts, and so are the last point of every sample, which needs no gradient, and the best: such samples are set aside until
there are enough of them for a pass of their own.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import gradient, judge
from robustsoup.attacks.lanes import in_lanes, lane_count
from robustsoup.attacks.losses import Loss
from robustsoup.attacks.projections import norms
from robustsoup.attacks.steps import (
    Rows,
    Schedule,
    advance,
    cold_start,
    joined,
    next_stage,
    observe,
    start_rows,
)
from robustsoup.threats import ThreatModel


@dataclass(frozen=True)
class Attempt:
    """One attack from one start: what it is called, what it climbs, the rank of its target (0: untargeted), its restart."""

    name: str
    loss: Loss
    target: int = 0
    restart: int = 0


@dataclass
class Outcome:
    """What attempts, one after the other, did to n samples; all on the CPU.

    settled: (n,) int64, how many attempts are over (all of them once broken); broken: (n,) bool; by: (n,) int64, the
    attempt that broke it, -1 if none did; step: (n,) int64, at which step; norm: (n,) float32, of the perturbation
    that was found; excess: (n,) float64, by how much it leaves the ball or the box (NaN: no point yet); margin: (n,)
    float32, the least margin (right logit less the largest other) under attack; attacked, blind, nan: (n,) bool, taken from
    the queue, without a gradient at a start, NaN at a point; x_adv: (n, ...) or None.
    """

    settled: Tensor
    broken: Tensor
    by: Tensor
    step: Tensor
    norm: Tensor
    excess: Tensor
    margin: Tensor
    attacked: Tensor
    blind: Tensor
    nan: Tensor
    x_adv: Tensor | None = None

    @classmethod
    def blank(cls, n: int, x: Tensor | None = None) -> "Outcome":
        """Nothing attacked yet; x: where to keep the points, holding the clean images."""
        minus = torch.full((n,), -1)
        return cls(
            torch.zeros(n, dtype=torch.long),
            torch.zeros(n, dtype=torch.bool),
            minus,
            minus.clone(),
            torch.zeros(n),
            torch.full((n,), torch.nan, dtype=torch.float64),
            torch.full((n,), torch.inf),
            *torch.zeros(3, n, dtype=torch.bool),
            x,
        )

    def snapshot(self) -> dict[str, Tensor]:
        """A copy to save while lanes go on: `settled` first, for what it says is final."""
        return {name: value.clone() for name, value in vars(self).items() if value is not None}

    def restore(self, saved: dict[str, Tensor], attempts: int) -> None:
        """Go on from a snapshot; whatever was being written at that moment is dropped."""
        for name, value in saved.items():
            getattr(self, name).copy_(value)
        self.broken &= self.settled == attempts
        self.by[~self.broken] = self.step[~self.broken] = -1


class Job:
    """One attempt on the samples in `waiting`, by as many lanes as the device has."""

    def __init__(
        self,
        model: nn.Module,
        fetch: Callable[[Tensor], Tensor],
        y: Tensor,
        ids: Tensor,
        waiting: Sequence[int],
        attempt: Attempt,
        number: int,
        attempts: int,
        schedule: Schedule,
        outcome: Outcome,
        *,
        seed: int,
        rows: int,
        precision: str,
        eot: int,
        targets: Tensor | None,
        device: torch.device,
        stop_below: int | None = None,
        searched: nn.Module | None = None,
    ) -> None:
        self.searched = model if searched is None else searched
        self.model, self.fetch, self.y, self.ids, self.targets = model, fetch, y, ids, targets
        self.attempt, self.number, self.attempts, self.schedule, self.outcome = (
            attempt,
            number,
            attempts,
            schedule,
            outcome,
        )
        self.seed, self.rows, self.precision, self.eot, self.device = (
            seed,
            rows,
            precision,
            eot,
            device,
        )
        self.waiting, self.lock, self.stopped = list(waiting)[::-1], threading.Lock(), False
        self.periods = schedule.checks().to(device)
        self.ends = torch.tensor([0, *(steps for _, steps in schedule.stages)]).cumsum(0)
        self.surviving, self.stop_below = None, stop_below
        outcome.attacked[self.waiting] = True
        # A GPU is asked for news every few steps only; these divide every stage, so that each row is asked at its own end.
        self.window = (
            1 if device.type == "cpu" else _divisor([steps for _, steps in schedule.stages])
        )

    def run(self, poll: Callable[[], None] | None) -> None:
        """Attack them all, or until `stop`."""
        count = min(lane_count(self.device), -(-len(self.waiting) // self.rows))
        in_lanes([_Lane(self).run for _ in range(count)], self.device, poll=poll, stop=self.stop)

    def stop(self) -> None:
        """Make the lanes return soon; what is unfinished stays unsettled."""
        self.stopped = True

    def take(self, count: int) -> list[int]:
        """The next samples from the queue."""
        with self.lock:
            return [self.waiting.pop() for _ in range(min(count, len(self.waiting)))]

    def settle(
        self, at: Tensor, rows: Rows, points: Tensor, step: Tensor | None, margin: Tensor
    ) -> None:
        """Write down what was found for samples `at`: broken at `step`, or (None) not broken."""
        x, outcome = rows.x, self.outcome
        if step is not None or self.number == 0:
            outcome.norm[at] = norms(points - x, self.schedule.norm).float().cpu()
            outcome.excess[at] = excess_of(
                points, x, ThreatModel(self.schedule.norm, self.schedule.stages[-1][0])
            ).cpu()
            if outcome.x_adv is not None:
                outcome.x_adv[at] = points.to(outcome.x_adv)
        outcome.margin[at] = torch.fmin(outcome.margin[at], margin.float().cpu())
        outcome.nan[at] |= (margin.isnan() | rows.margin.isnan()).cpu()
        if step is not None:
            outcome.step[at], outcome.by[at], outcome.broken[at] = step, self.number, True
        outcome.settled[at] = self.attempts if step is not None else self.number + 1
        if step is not None and self.stop_below is not None:
            with self.lock:
                self.surviving -= len(at)
            if self.surviving < self.stop_below:
                self.stop()


@dataclass
class _Aside:
    """Rows set aside to be judged in float32: whose they are, the point in question, and at which step it was found.

    over: whether the row has taken all steps of its stage; hit: whether the point fooled the network in the search;
    best: whether it is the best point, the last one being judged already.
    """

    owner: Tensor
    stage: Tensor
    points: Tensor
    step: Tensor
    over: Tensor
    hit: Tensor
    best: Tensor
    rows: Rows

    def take(self, at: Tensor) -> "_Aside":
        at_device = at.to(self.points.device)
        host = {
            name: getattr(self, name)[at]
            for name in ("owner", "stage", "step", "over", "hit", "best")
        }
        return _Aside(**host, points=self.points[at_device], rows=self.rows.take(at_device))

    def where(self, mask: Tensor) -> "_Aside":
        return self.take(mask.nonzero().flatten())

    def __len__(self) -> int:
        return len(self.owner)


def _together(parts: list[_Aside]) -> _Aside:
    names = ("owner", "stage", "points", "step", "over", "hit", "best")
    return _Aside(
        *(torch.cat([getattr(p, name) for p in parts]) for name in names),
        rows=joined([p.rows for p in parts]),
    )


class _Lane:
    """Rows of one fixed number, kept full."""

    def __init__(self, job: Job) -> None:
        self.job, self.rows = job, None
        self.owner = torch.full((job.rows,), -1)
        self.stage = torch.zeros(job.rows, dtype=torch.long)
        self.step = torch.zeros(
            job.rows, dtype=torch.long
        )  # of the stage; the host's copy of rows.step
        self.aside: list[_Aside] = []
        self.back: list[_Aside] = []
        self.found = self.points = self.found_step = self.step_once = None

    def run(self) -> None:
        """Take samples until the queue is empty and all of them are settled."""
        with torch.no_grad(), self._on_device():
            while not self.job.stopped:
                self._fill()
                if bool((self.owner >= 0).any()):
                    self._window()
                elif not self.aside:
                    return
                while self.aside and (
                    sum(map(len, self.aside)) >= self.job.rows or not bool((self.owner >= 0).any())
                ):
                    self._judge()

    def _on_device(self) -> contextlib.AbstractContextManager:
        return (
            torch.cuda.device(self.job.device)
            if self.job.device.type == "cuda"
            else contextlib.nullcontext()
        )

    def _fill(self) -> None:
        free = (self.owner < 0).nonzero().flatten()
        if self.back and len(free):
            back = _together(self.back)
            now, later = torch.arange(len(back)).tensor_split([len(free)])
            self.back = [back.take(later)] if len(later) else []
            self._place(free[: len(now)], back.take(now))
            free = free[len(now) :]
        samples = self.job.take(len(free)) if len(free) else []
        if samples:
            self._place(free[: len(samples)], self._fresh(torch.tensor(samples)))

    def _fresh(self, samples: Tensor) -> _Aside:
        job = self.job
        x = job.fetch(samples)
        eps, _ = job.schedule.stages[0]
        start = cold_start(
            x, eps, job.schedule.norm, job.seed, job.ids[samples], job.attempt.restart
        )
        target = job.targets[samples].to(x.device) if job.targets is not None else None
        rows = start_rows(
            x,
            job.y[samples].to(x.device),
            eps,
            start,
            job.schedule,
            target=target,
            last=len(job.schedule.stages) == 1,
        )
        zero = torch.zeros_like(samples)
        return _Aside(samples, zero, x, zero, zero > 0, zero > 0, zero > 0, rows)

    def _place(self, at: Tensor, items: _Aside) -> None:
        if self.rows is None:  # the first rows also fill what is still empty
            self.rows = items.rows.take(
                (torch.arange(self.job.rows) % len(items)).to(items.points.device)
            )
            self.found = torch.zeros_like(self.rows.last)
            self.points, self.found_step = self.rows.x_adv.clone(), self.rows.step.clone()
            self.step_once = self._step
            if self.job.device.type == "cuda":
                self.step_once = _captured(
                    self._step, [*self.rows.tensors(), self.found, self.points, self.found_step]
                )
        self.rows.put(at.to(items.points.device), items.rows)
        self.owner[at], self.stage[at] = items.owner, items.stage
        self.step[at] = items.rows.step.cpu()

    def _window(self) -> None:
        """A few steps of all rows without asking how they went; then take out who is fooled or at the end."""
        job = self.job
        self.found.zero_()
        fresh = (self.step == 0) & (self.stage == 0)
        for number in range(job.window):
            self.step_once()
            if number == 0 and bool(fresh.any()):
                self._count_zeros(fresh)
        self.step += job.window
        idle = self.owner < 0
        hit = self.found.cpu() & ~idle
        over = (self.step == (self.job.ends[self.stage + 1] - self.job.ends[self.stage])) & ~idle
        self.step[idle] = 0
        self.rows.step.masked_fill_(idle.to(job.device), 0)
        self.rows.base.masked_fill_(idle.to(job.device), 0)
        sure = hit & (job.precision == "float32")
        if bool(sure.any()):
            at = sure.nonzero().flatten()
            out = self._take_out(at)
            job.settle(out.owner, out.rows, out.points, out.step, out.rows.margin)
        rest = (over | hit) & ~sure
        if bool(rest.any()):
            at = rest.nonzero().flatten()
            self.aside.append(self._take_out(at, over=over[at], hit=hit[at]))

    def _step(self) -> None:
        """One step of every row, on the device alone."""
        job, rows = self.job, self.rows
        logits, loss, grad = gradient(
            job.searched,
            rows.x_adv,
            rows.y,
            job.attempt.loss,
            job.precision,
            target=rows.target if job.attempt.target else None,
            eot=job.eot,
        )
        margin = margin_of(logits, rows.y).to(rows.margin)
        new = (logits.argmax(1) != rows.y) & rows.last & ~self.found
        if (
            job.precision != "float32"
        ):  # a hit that float32 refuted is not asked about again before a deeper one
            new &= ~(margin >= rows.margin)
        torch.where(
            new.view(-1, *[1] * (rows.x.dim() - 1)), rows.x_adv, self.points, out=self.points
        )
        torch.where(new, rows.step, self.found_step, out=self.found_step)
        self.found |= new
        rows.margin.copy_(torch.where(rows.last, torch.minimum(rows.margin, margin), rows.margin))
        observe(rows, loss, grad, job.periods, job.schedule.norm)
        advance(rows, job.schedule.norm, momentum=job.schedule.adaptive)

    def _count_zeros(self, fresh: Tensor) -> None:
        at = (fresh & (self.owner >= 0)).nonzero().flatten()
        zero = self.rows.grad[at.to(self.job.device)].flatten(1).abs().amax(1) == 0
        self.job.outcome.blind[self.owner[at]] |= zero.cpu()

    def _take_out(
        self, at: Tensor, over: Tensor | None = None, hit: Tensor | None = None
    ) -> _Aside:
        on = at.to(self.job.device)
        over = torch.zeros_like(at, dtype=torch.bool) if over is None else over
        hit = ~over if hit is None else hit
        rows, stage = self.rows.take(on), self.stage[at]
        points = torch.where(
            hit.to(on.device).view(-1, *[1] * (rows.x.dim() - 1)), self.points[on], rows.x_adv
        )
        step = torch.where(hit, self.found_step[on].cpu(), self.step[at]) + self.job.ends[stage]
        out = _Aside(self.owner[at], stage, points, step, over, hit, torch.zeros_like(hit), rows)
        self.owner[at] = -1
        self.step[at] = 0
        self.rows.step[on] = 0
        self.rows.base[on] = 0
        return out

    def _judge(self) -> None:
        """One float32 pass, without a gradient, over what was set aside: settle it, or send it back."""
        job = self.job
        everything = _together(self.aside)
        now, later = torch.arange(len(everything)).tensor_split([job.rows])
        self.aside = [everything.take(later)] if len(later) else []
        items = everything.take(now)
        rows = items.rows
        targets = rows.target if job.attempt.target else None
        logits, loss = judge(
            job.model, items.points, rows.y, job.attempt.loss, job.rows, target=targets
        )
        margin = margin_of(logits, rows.y).to(rows.margin)
        fooled = ((logits.argmax(1) != rows.y) & rows.last).cpu()
        ended = items.over & ~items.hit & ~fooled
        self._keep_best(items, loss, ended & ~items.best)
        rows.margin = torch.where(rows.last, torch.minimum(rows.margin, margin), rows.margin)
        last = items.stage == len(job.schedule.stages) - 1
        unsure = ended & last & ~items.best & (job.precision != "float32")
        if len(broken := items.where(fooled)):
            job.settle(
                broken.owner,
                broken.rows,
                broken.points,
                broken.step,
                margin[fooled.to(margin.device)],
            )
        if len(done := items.where(ended & last & ~unsure)):
            job.settle(done.owner, done.rows, done.rows.x_best, None, done.rows.margin.clamp(min=0))
        if len(on := items.where(ended & ~last)):
            on.stage += 1
            on.rows = next_stage(on.rows, on.stage.to(job.device), job.schedule)
            self.back.append(on)
        missed = items.hit & ~fooled
        if len(on := items.where(missed & ~items.over)):
            self.back.append(on)
        if len(again := items.where(missed & items.over)):  # its last point is still to be judged
            again.points, again.hit = again.rows.x_adv, torch.zeros_like(again.hit)
            again.step = again.rows.step.cpu() + job.ends[again.stage]
            self.aside.append(again)
        if len(best := items.where(unsure)):
            best.points, best.best = best.rows.x_best, torch.ones_like(best.best)
            best.step = best.rows.step_best.cpu() + job.ends[best.stage]
            self.aside.append(best)

    @staticmethod
    def _keep_best(items: _Aside, loss: Tensor, which: Tensor) -> None:
        """Take the point that was judged as the best one, where its loss is the highest."""
        rows = items.rows
        better = which.to(loss.device) & (loss > rows.loss_best)
        rows.x_best = torch.where(
            better.view(-1, *[1] * (rows.x.dim() - 1)), items.points, rows.x_best
        )
        rows.step_best = torch.where(better, rows.step, rows.step_best)


def _captured(step: Callable[[], None], state: list[Tensor]) -> Callable[[], None]:
    """`step` as a CUDA graph, one launch instead of hundreds; `step` itself if the network cannot be captured.

    state: every tensor that `step` changes, all of them in place; they are left as they were.
    """
    kept = [tensor.clone() for tensor in state]
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels before anything is recorded
                step()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError:
        return step
    finally:
        for tensor, before in zip(state, kept, strict=True):
            tensor.copy_(before)
    return graph.replay


def excess_of(points: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """(b,) float64: by how much points (b, ...) leave the ball around x or the box [0, 1]; at most 0 inside both."""
    wide = points.double()
    length = norms(wide - x.double(), threat.norm) - threat.eps
    return torch.maximum(
        length, torch.maximum(-wide.flatten(1).amin(1), wide.flatten(1).amax(1) - 1)
    )


def margin_of(logits: Tensor, y: Tensor) -> Tensor:
    """The right logit less the largest other: logits (b, classes), y (b,) -> (b,) in the logits' dtype."""
    right = logits.gather(1, y.view(-1, 1)).squeeze(1)
    return right - logits.scatter(1, y.view(-1, 1), -torch.inf).amax(1)


def _divisor(stages: Sequence[int]) -> int:
    common = 0
    for steps in stages:
        common = gcd(common, steps)
    return max(k for k in range(1, 11) if common % k == 0)

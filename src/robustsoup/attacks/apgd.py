"""AutoPGD, in two forms that are not the same function.

`apgd` (evaluation): cold starts seeded per sample, stops at the first misclassified point, keeps batches full.
`apgd_train` (training): starts at x and returns the point of highest loss for every sample.

Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208. Both forms share one step: a
point is observed (loss, gradient, best point, step size) and the next one is proposed, row by row, so that rows of one
batch may be at different steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import check_inputs, frozen_eval, gradient, predict
from robustsoup.errors import RequestError
from robustsoup.losses import Loss, ce
from robustsoup.threats import ThreatModel, norms, project, random_start

BATCH = 250
_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, for n samples.

    x_adv: (n, ...) the first misclassified point, else the point of highest loss; broken: (n,) bool; step: (n,) int64,
    the step at which the sample broke (0: the starting point), -1 where it did not.
    """

    x_adv: Tensor
    broken: Tensor
    step: Tensor


@dataclass
class _Rows:
    """The state of the samples in the batch, one row each; `step` counts the row's steps in its stage.

    `step` and `base` (where the stage begins in the table of checks) stay on the host.
    """

    x: Tensor
    y: Tensor
    eps: Tensor
    x_adv: Tensor
    x_old: Tensor
    x_best: Tensor
    grad: Tensor
    grad_best: Tensor
    loss_last: Tensor
    loss_best: Tensor
    loss_best_at_check: Tensor
    rises: Tensor
    reduced: Tensor
    eta: Tensor
    topk: Tensor
    support: Tensor
    step: Tensor
    base: Tensor


def _new_rows(x: Tensor, y: Tensor, eps: Tensor, start: Tensor, norm: str, topk: float | Tensor) -> _Rows:
    zero = torch.zeros_like(eps)
    size = float(x[0].numel())
    support = torch.full_like(eps, size) if isinstance(topk, float) else topk * 1.5 * size
    return _Rows(
        x=x, y=y, eps=eps, x_adv=start, x_old=start, x_best=start, grad=torch.zeros_like(x), grad_best=torch.zeros_like(x),
        loss_last=zero, loss_best=torch.full_like(eps, -math.inf), loss_best_at_check=zero, rises=zero,
        reduced=torch.ones_like(eps, dtype=torch.bool), eta=eps if norm == "L1" else 2 * eps,
        topk=topk + zero, support=support,
        step=torch.zeros(len(x), dtype=torch.long), base=torch.zeros(len(x), dtype=torch.long),
    )  # fmt: skip


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _checks(steps: int, norm: str) -> Tensor:
    """(steps + 1,) int64: at step k > 0 the length of the period that ends there, 0 where no check falls."""
    periods = torch.zeros(steps + 1, dtype=torch.long)
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


def _observe(rows: _Rows, loss: Tensor, grad: Tensor, periods: Tensor, norm: str) -> None:
    """Take in the loss and gradient at x_adv; where a check falls, adapt the step size and maybe go back to the best."""
    stepped = (rows.step > 0).to(loss.device)
    better = loss > rows.loss_best
    rows.grad = grad
    rows.x_best = torch.where(_column(better, grad), rows.x_adv, rows.x_best)
    rows.grad_best = torch.where(_column(better, grad), grad, rows.grad_best)
    rows.loss_best = torch.maximum(loss, rows.loss_best)
    rows.loss_best_at_check = torch.where(stepped, rows.loss_best_at_check, loss)
    # As in the reference, the first step is compared with a loss of zero, not with the starting point's.
    rows.rises = rows.rises + (stepped & (loss > rows.loss_last))
    rows.loss_last = torch.where(stepped, loss, rows.loss_last)
    period = periods[rows.base + rows.step]
    if bool((period > 0).any()):
        (_check_l1 if norm == "L1" else _check)(rows, period.to(loss.device))


def _check(rows: _Rows, period: Tensor) -> None:
    due = period > 0
    halve = rows.rises <= 0.75 * period
    halve = due & (halve | (~rows.reduced & (rows.loss_best_at_check >= rows.loss_best)))
    rows.reduced = torch.where(due, halve, rows.reduced)
    rows.loss_best_at_check = torch.where(due, rows.loss_best, rows.loss_best_at_check)
    rows.rises = torch.where(due, 0.0, rows.rises)
    rows.eta = torch.where(halve, rows.eta / 2, rows.eta)
    _back_to_best(rows, halve)


def _check_l1(rows: _Rows, period: Tensor) -> None:
    due = period > 0
    support = (rows.x_best != rows.x).flatten(1).sum(1).to(rows.eps)
    sparser = due & (support / rows.support < 0.95)
    eta = torch.where(sparser, rows.eps, rows.eta / 1.5)
    eta = torch.minimum(torch.maximum(eta, rows.eps / 10), rows.eps)
    rows.topk = torch.where(due, support / rows.x[0].numel() / 1.5, rows.topk)
    rows.eta = torch.where(due, eta, rows.eta)
    rows.support = torch.where(due, support, rows.support)
    _back_to_best(rows, sparser)


def _back_to_best(rows: _Rows, where: Tensor) -> None:
    rows.x_adv = torch.where(_column(where, rows.x), rows.x_best, rows.x_adv)
    rows.grad = torch.where(_column(where, rows.x), rows.grad_best, rows.grad)


def _propose(rows: _Rows, norm: str) -> Tensor:
    """The next point of every row."""
    if norm == "L1":
        direction = _sparse_sign(rows.grad, rows.topk)
        count = direction.abs().flatten(1).sum(1)
        return project(rows.x_adv + _column(rows.eta / (count + 1e-10), rows.x) * direction, rows.x, rows.eps, norm)
    if norm == "Linf":
        direction = rows.grad.sign()
    else:
        direction = rows.grad / _column(norms(rows.grad, "L2") + 1e-12, rows.x)
    z = project(rows.x_adv + _column(rows.eta, rows.x) * direction, rows.x, rows.eps, norm)
    a = _column(torch.where(rows.step > 0, 0.75, 1.0).to(rows.eps), rows.x)
    moved = rows.x_adv + (z - rows.x_adv) * a + (rows.x_adv - rows.x_old) * (1 - a)
    return project(moved, rows.x, rows.eps, norm)


def _sparse_sign(grad: Tensor, topk: Tensor) -> Tensor:
    flat = grad.abs().flatten(1)
    size = flat.shape[1]
    at = ((1.0 - topk) * size).clamp(0, size - 1).long()
    threshold = flat.sort(dim=1)[0].gather(1, at.view(-1, 1))
    return grad.sign() * (grad.abs() >= _column(threshold, grad))


def _move(rows: _Rows, new: Tensor) -> None:
    rows.x_old, rows.x_adv = rows.x_adv, new
    rows.step = rows.step + 1


def apgd_train(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *,
    steps: int = 2, loss: Loss = ce, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """APGD as adversarial training uses it: from x itself, the point of highest loss, for every sample.

    x: (b, ...) float in [0,1]; y: (b,) int64. Samples already misclassified, or never fooled, are perturbed too.
    The network is attacked in eval mode and left as it was. `steps` steps take steps + 1 forward passes and `steps`
    gradients by the input. eps = 0 returns x. No randomness.

    Raises RequestError for steps below 1.
    """
    if threat.is_clean:
        return x
    if steps < 1:
        raise RequestError(f"attack steps: got {steps}, expected at least 1")
    eps = torch.full((len(x),), threat.eps, device=x.device, dtype=x.dtype)
    rows = _new_rows(x, y, eps, x, threat.norm, 0.05)
    periods = _checks(steps, threat.norm)
    with frozen_eval(model):
        for _ in range(steps):
            _, value, grad = gradient(model, rows.x_adv, y, loss, precision)
            _observe(rows, value, grad, periods, threat.norm)
            _move(rows, _propose(rows, threat.norm))
        _, value, _ = gradient(model, rows.x_adv, y, loss, precision, needed=False)
    return torch.where(_column(value > rows.loss_best, x), rows.x_adv, rows.x_best)


def apgd(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *,
    steps: int = 100, seed: int = 0, ids: Tensor | None = None, loss: Loss = ce,
    batch_size: int = BATCH, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """APGD as evaluation uses it: x_adv (n, ...), the first misclassified point, else the point of highest loss.

    x: (n, ...) float in [0,1]; y: (n,) int64; ids: (n,) int64 sample numbers that seed the noise (default 0..n-1).
    Every batch has `batch_size` rows, padded at the end, so a sample's verdict does not depend on its neighbours.
    A sample that the network gets wrong without an attack is returned as it is.

    Raises RequestError for x outside [0,1], labels outside the classes, or steps below 1.
    """
    return run_apgd(
        model, x, y, threat, steps=steps, seed=seed, ids=ids, loss=loss, batch_size=batch_size, precision=precision
    ).x_adv


def run_apgd(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *,
    steps: int = 100, seed: int = 0, ids: Tensor | None = None, loss: Loss = ce,
    batch_size: int = BATCH, precision: str = "float32", known_correct: Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AttackResult:  # fmt: skip
    """`apgd` with its record: which samples broke and at which step.

    known_correct: (n,) bool, clean verdicts already at hand (saves a pass). For L1 the steps are spent as in
    AutoAttack: .3 at 3 eps, .3 at 2 eps, .4 at eps, each warm-started from the last; only points in eps count.
    """
    if steps < 1:
        raise RequestError(f"steps: got {steps}, expected at least 1")
    if batch_size < 1:
        raise RequestError(f"batch_size: got {batch_size}, expected at least 1")
    if ids is not None and len(ids) != len(x):
        raise RequestError(f"ids: got {len(ids)}, expected {len(x)}, one for each image")
    check_inputs(model, x, y)
    result = AttackResult(x.clone(), torch.zeros(len(x), dtype=torch.bool), torch.full((len(x),), -1))
    if threat.is_clean or len(x) == 0:
        return result
    ids = torch.arange(len(x)) if ids is None else ids.cpu()
    with frozen_eval(model):
        if known_correct is None:
            known_correct = predict(model, x, batch_size, precision).argmax(1) == y.cpu()
        wrong = ~known_correct.cpu()
        result.broken[wrong], result.step[wrong] = True, 0
        waiting = (~wrong).nonzero().flatten().tolist()
        if not waiting:
            return result
        queue = _Queue(x, y, ids, waiting, threat, steps, seed, batch_size, result)
        while queue.busy():
            queue.advance(*gradient(model, queue.rows.x_adv, queue.rows.y, loss, precision))
            if on_progress:
                on_progress(queue.done, len(waiting))
    return result


class _Queue:
    """Keeps a batch of one fixed shape full: a row goes to the next sample once its own is fooled or finished."""

    def __init__(self, x: Tensor, y: Tensor, ids: Tensor, queue: list[int], threat: ThreatModel, steps: int, seed: int,
                 rows: int, result: AttackResult) -> None:  # fmt: skip
        self.x, self.y, self.ids, self.norm, self.seed, self.result = x, y, ids, threat.norm, seed, result
        self.waiting, self.done = queue[::-1], 0
        self.stages = _stages(threat, steps)
        self.taken = torch.tensor([0, *(count for _, count in self.stages)]).cumsum(0)
        self.periods = torch.cat([_checks(count, threat.norm) for _, count in self.stages])
        self.owner = torch.full((rows,), -1)
        self.stage = torch.zeros(rows, dtype=torch.long)
        start = self._fresh([queue[0]] * rows)
        self.rows = _Rows(**{name: value.clone() for name, value in vars(start).items()})
        self._refill(torch.arange(rows))

    def _fresh(self, samples: list[int]) -> _Rows:
        x = self.x[samples]
        eps = torch.full((len(x),), self.stages[0][0], device=x.device, dtype=x.dtype)
        start = random_start(x, _noise(x, self.norm, self.seed, self.ids[samples]), eps, self.norm)
        return _new_rows(x, self.y[samples], eps, start, self.norm, 0.2)

    def _refill(self, free: Tensor) -> None:
        samples = [self.waiting.pop() for _ in range(min(len(free), len(self.waiting)))]
        self.owner[free] = -1
        if samples:
            free = free[: len(samples)]
            self.owner[free], self.stage[free] = torch.tensor(samples), 0
            _put(self.rows, free, self._fresh(samples))

    def _next_stage(self, at: Tensor) -> None:
        self.stage[at] += 1
        x, y, best = self.rows.x[at], self.rows.y[at], self.rows.x_best[at]
        eps = torch.tensor([self.stages[stage][0] for stage in self.stage[at]], device=x.device, dtype=x.dtype)
        start = project(best, x, eps, self.norm)
        topk = (start != x).flatten(1).sum(1).to(x) / x[0].numel() / 1.5
        _put(self.rows, at, _new_rows(x, y, eps, start, self.norm, topk))
        self.rows.base[at] = self.taken[self.stage[at]] + self.stage[at]

    def busy(self) -> bool:
        """Whether any row is still attacking a sample."""
        return bool((self.owner >= 0).any())

    def advance(self, logits: Tensor, loss: Tensor, grad: Tensor) -> None:
        """Take in one pass over the rows: record and replace who is fooled or finished, move the others."""
        points, owned = self.rows.x_adv, self.owner >= 0
        last = self.stage == len(self.stages) - 1
        fooled = owned & last & (logits.argmax(1) != self.rows.y).cpu()
        at_end = self.rows.step == (self.taken[self.stage + 1] - self.taken[self.stage])
        ended = owned & ~fooled & at_end
        step = self.taken[self.stage] + self.rows.step
        _observe(self.rows, loss, grad, self.periods, self.norm)
        self._record(fooled, points, step)
        self._record(ended & last, self.rows.x_best, None)
        _move(self.rows, _propose(self.rows, self.norm))
        if bool((ended & ~last).any()):
            self._next_stage((ended & ~last).nonzero().flatten())
        free = (fooled | (ended & last)).nonzero().flatten()
        self.done += len(free)
        if len(free):
            self._refill(free)
        idle = self.owner < 0
        self.rows.step[idle], self.rows.base[idle] = 0, 0

    def _record(self, which: Tensor, points: Tensor, step: Tensor | None) -> None:
        at = which.nonzero().flatten()
        if len(at):
            owners = self.owner[at]
            self.result.x_adv[owners] = points[at]
            if step is not None:
                self.result.broken[owners] = True
                self.result.step[owners] = step[at]


def _put(rows: _Rows, at: Tensor, fresh: _Rows) -> None:
    for name, value in vars(fresh).items():
        getattr(rows, name)[at] = value


def _stages(threat: ThreatModel, steps: int) -> list[tuple[float, int]]:
    """(eps, steps) of each stage; several for L1 alone, as in AutoAttack."""
    first = math.ceil(0.3 * steps)
    if threat.norm != "L1" or steps <= 2 * first:
        return [(threat.eps, steps)]
    return [(3 * threat.eps, first), (2 * threat.eps, first), (threat.eps, steps - 2 * first)]


def _noise(x: Tensor, norm: str, seed: int, ids: Tensor) -> Tensor:
    """Noise like x, each row from (seed, id) alone and drawn on the CPU, so that it is the same on every device."""
    generator = torch.Generator()
    noise = torch.empty(x.shape, dtype=x.dtype)
    for row, number in zip(noise, ids.tolist(), strict=True):
        generator.manual_seed((seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) & _MASK)
        row.uniform_(-1, 1, generator=generator) if norm == "Linf" else row.normal_(generator=generator)
    return noise.to(x.device)

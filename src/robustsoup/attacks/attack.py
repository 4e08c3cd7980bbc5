"""The evaluation forms of APGD and PGD: what is asked for, checked before any work, and run attempt by attempt."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustsoup.attacks.engine import Attempt, Job, Outcome, margin_of
from robustsoup.attacks.folding import folded
from robustsoup.attacks.forward import check_inputs, frozen_eval, judge, pass_rows, predict
from robustsoup.attacks.lanes import in_lanes
from robustsoup.attacks.losses import LEAST_CLASSES, LOSSES, Loss, ce
from robustsoup.attacks.steps import Schedule
from robustsoup.device import resolve_precision
from robustsoup.errors import RequestError
from robustsoup.threats import ThreatModel

LOOK = 16
"""How many images are looked at to fold a network."""


@dataclass(frozen=True)
class Settings:
    """What an attack does to a sample that is right without it.

    attack: "apgd" or "pgd"; loss: a name of LOSSES, or a function; restarts: cold starts of each attempt; targets: how
    many of the likeliest other classes a targeted loss tries; eot: passes that a gradient is averaged over; precision:
    of the search, "float32" or "bfloat16" (every hit is judged again in float32). stop_below: give up once
    fewer samples survive.
    """

    attack: str = "apgd"
    loss: str | Loss = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    eot: int = 1
    seed: int = 0
    precision: str = "float32"
    batch_size: int | None = None
    stop_below: int | None = None

    def check(self, classes: int | None = None) -> "Settings":
        """The same settings. Raises RequestError for what cannot be run, on `classes` classes where known."""
        if self.attack not in ("apgd", "pgd"):
            raise RequestError(f'attack: got "{self.attack}", expected apgd or pgd')
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise RequestError(f'loss: got "{self.loss}", expected one of {", ".join(LOSSES)}')
        for name in ("steps", "restarts", "targets", "eot"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise RequestError(f"batch_size: got {self.batch_size}, expected at least 1")
        least = LEAST_CLASSES.get(self.loss_name, 2)
        if classes is not None and classes < least:
            raise RequestError(
                f'loss: "{self.loss_name}" needs {least} classes or more, got {classes}; take ce'
            )
        return self

    @property
    def loss_name(self) -> str:
        """The loss as text."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", "custom")

    def attempts(self, classes: int) -> list[Attempt]:
        """Every start of the attack, in order."""
        loss = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        targeted = self.loss == "targeted dlr"
        ranks = range(1, min(self.targets, classes - 1) + 1) if targeted else (0,)
        short = {"targeted dlr": "t"}.get(self.loss_name, self.loss_name)
        return [
            Attempt(
                f"{self.attack}-{short}"
                + f" target {rank}" * bool(rank)
                + f" restart {restart + 1}" * bool(restart),
                loss,
                rank,
                restart,
            )
            for restart in range(self.restarts)
            for rank in ranks
        ]


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, for n samples.

    x_adv: (n, ...) the first misclassified point, else the point of highest loss; broken: (n,) bool; step: (n,) int64,
    the step at which the sample broke (0: the starting point), -1 where it did not; by: (n,) int64, which of `attempts`
    broke it, -1 where none did; what is wrong without an attack is broken at step 0 by none.
    """

    x_adv: Tensor
    broken: Tensor
    step: Tensor
    by: Tensor
    attempts: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """The samples under attack: fetch(rows (b,) int64) gives images on the device; y, ids: (n,) on the CPU; the network's
    logits (n, classes) without an attack, on the CPU."""

    fetch: Callable[[Tensor], Tensor]
    y: Tensor
    ids: Tensor
    logits: Tensor

    @property
    def correct(self) -> Tensor:
        """(n,) bool: right without an attack."""
        return self.logits.argmax(1) == self.y


def run_attempts(
    model: nn.Module,
    samples: Samples,
    threat: ThreatModel,
    settings: Settings,
    outcome: Outcome,
    device: torch.device,
    *,
    poll: Callable[[int, int], None] | None = None,
) -> None:
    """Attack what is right and not settled yet, writing to `outcome`; the network is in eval mode already.

    poll(done, total) is called several times a second; both count samples times attempts.
    """
    attempts = settings.attempts(samples.logits.shape[1])
    schedule = Schedule.of(threat, settings.steps, adaptive=settings.attack == "apgd")
    correct = samples.correct
    searched = model
    if settings.precision != "float32" and bool(correct.any()):
        searched = folded(model, samples.fetch(correct.nonzero().flatten()[:LOOK]))

    def tell() -> None:
        poll(int(outcome.settled[correct].sum()), int(correct.sum()) * len(attempts))

    for number, attempt in enumerate(attempts):
        waiting = (correct & (outcome.settled == number) & ~outcome.broken).nonzero().flatten()
        # The likeliest to break first where a candidate may lose; else last, when short work fills the rows to the end.
        likely = (
            outcome.margin
            if settings.stop_below is not None
            else -margin_of(samples.logits, samples.y)
        )
        waiting = waiting[likely[waiting].argsort(stable=True)].tolist()
        if not waiting:
            continue
        job = Job(
            model,
            samples.fetch,
            samples.y,
            samples.ids,
            waiting,
            attempt,
            number,
            len(attempts),
            schedule,
            outcome,
            seed=settings.seed,
            rows=pass_rows(device, settings.batch_size),
            precision=settings.precision,
            eot=settings.eot,
            targets=_targets(samples, attempt.target),
            device=device,
            stop_below=settings.stop_below,
            searched=searched,
        )
        job.surviving = int((correct & ~outcome.broken).sum())
        job.run(tell if poll else None)
        if job.stopped:
            break


def try_points(
    model: nn.Module,
    samples: Samples,
    points: Callable[[Tensor], Tensor],
    which: Tensor,
    rows: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Judge ready-made points in float32: for samples `which` (k,), (broken (k,) bool, margin (k,) float32).

    points(samples (b,)) -> (b, ...) images on the device.
    """

    def part(at: Tensor) -> tuple[Tensor, Tensor]:
        y = samples.y[at].to(device)
        logits, _ = judge(model, points(at), y, ce, rows)
        return (logits.argmax(1) != y).cpu(), margin_of(logits, y).float().cpu()

    parts = (
        in_lanes([lambda at=at: part(at) for at in which.split(rows)], device) if len(which) else []
    )
    empty = torch.zeros(0)
    return (
        tuple(torch.cat(column) for column in zip(*parts, strict=True))
        if parts
        else (empty.bool(), empty)
    )


def _targets(samples: Samples, rank: int) -> Tensor | None:
    """The rank-th likeliest class other than the label, by the clean logits; (n,) int64."""
    if not rank:
        return None
    others = samples.logits.scatter(1, samples.y.view(-1, 1), -torch.inf)
    return others.sort(dim=1, descending=True).indices[:, rank - 1]


def run_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    settings: Settings,
    *,
    ids: Tensor | None = None,
    known_correct: Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AttackResult:
    """Attack x (n, ...) with y (n,) as `settings` say, and return the points with their record.

    ids: (n,) int64 sample numbers that seed the noise (default 0..n-1).
    known_correct: (n,) bool, clean verdicts already at hand (saves a pass, but for a targeted loss).

    Raises RequestError, DataError or ModelError before any work, for settings, images or a network that do not fit.
    """
    settings.check()
    if ids is not None and len(ids) != len(x):
        raise RequestError(f"ids: got {len(ids)}, expected {len(x)}, one for each image")
    classes = check_inputs(model, x, y)
    outcome = Outcome.blank(len(x), x.clone())
    if threat.is_clean or len(x) == 0:
        return AttackResult(outcome.x_adv, outcome.broken, outcome.step, outcome.by, ())
    settings.check(classes)
    attempts = settings.attempts(classes)
    ids = torch.arange(len(x)) if ids is None else ids.cpu()
    rows, y = pass_rows(x.device, settings.batch_size), y.cpu()
    with frozen_eval(model):
        if known_correct is None or attempts[0].target:
            logits = predict(model, lambda at: x[at.to(x.device)], len(x), rows, x.device)
        else:  # any logits that say the same
            wrong = (y + 1) % classes
            logits = torch.nn.functional.one_hot(
                torch.where(known_correct.cpu(), y, wrong), classes
            ).float()
        samples = Samples(lambda at: x[at.to(x.device)], y, ids, logits)
        run_attempts(model, samples, threat, settings, outcome, x.device, poll=on_progress)
    outcome.broken[~samples.correct], outcome.step[~samples.correct] = True, 0
    return AttackResult(
        outcome.x_adv, outcome.broken, outcome.step, outcome.by, tuple(a.name for a in attempts)
    )


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel | str,
    *,
    steps: int = 100,
    loss: str | Loss = "ce",
    restarts: int = 1,
    targets: int = 9,
    eot: int = 1,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
) -> Tensor:
    """APGD as evaluation uses it: x_adv (n, ...), the first misclassified point, else the point of highest loss.

    x: (n, ...) float in [0,1]; y: (n,) int64; loss: "ce", "dlr", "targeted dlr" (over the `targets` likeliest other
    classes) or a function (logits, y) -> (b,); restarts: cold starts, each seeded by (seed, id, restart); eot: passes that
    a gradient is averaged over, for networks that answer at random; ids: (n,) int64 sample numbers (default 0..n-1).
    precision: of the search, "float32", "bfloat16" or "auto"; every hit is judged again in float32. batch_size: the most
    images in a pass (passes have one padded shape, so a sample's verdict does not depend on its neighbours).
    For L1 the steps are spent as in AutoAttack: .3 at 3 eps, .3 at 2 eps, .4 at eps, each warm-started from the last.
    A sample that the network gets wrong without an attack is returned as it is.

    Raises RequestError, DataError or ModelError before any work: x outside [0,1], labels outside the classes, a network
    whose answers are not logits, steps below 1, an unknown loss, or one that needs more classes.
    Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208.
    """
    settings = Settings(
        "apgd",
        loss,
        steps,
        restarts,
        targets,
        eot,
        seed,
        resolve_precision(precision, x.device),
        batch_size,
    )
    return run_attack(model, x, y, ThreatModel.parse(threat), settings, ids=ids).x_adv


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel | str,
    *,
    steps: int = 20,
    loss: str | Loss = "ce",
    restarts: int = 1,
    targets: int = 9,
    eot: int = 1,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
) -> Tensor:
    """Projected gradient descent, the plain baseline: a random start and steps of 2.5 eps / steps. Otherwise as `apgd`.

    For L1 each step goes along the signs of the steepest fifth of the pixels.
    Source: Madry et al. 2018, arXiv:1706.06083.
    """
    settings = Settings(
        "pgd",
        loss,
        steps,
        restarts,
        targets,
        eot,
        seed,
        resolve_precision(precision, x.device),
        batch_size,
    )
    return run_attack(model, x, y, ThreatModel.parse(threat), settings, ids=ids).x_adv

"""The attackers of an evaluation: the queue's, Square, strong, AutoAttack, and users' attacks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from robustsoup.attacks.attempts import (
    AttackProgress,
    check_classes,
    check_points,
    count_targets,
    list_attempts,
    queued_loss,
    run_attempts,
)
from robustsoup.attacks.autoattack import (
    AutoAttackPlan,
    InPasses,
    attack_chunk,
    check_square_tiling,
    plan_autoattack,
)
from robustsoup.attacks.forward import pass_size
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.attacks.projections import constraint_excess
from robustsoup.attacks.square import run_square, square_attempts
from robustsoup.attacks.strong import run_strong, strong_attempts
from robustsoup.catalog import ATTACKS, check_call, import_by_name
from robustsoup.errors import RequestError
from robustsoup.evaluation.doubts import certificate_tolerance
from robustsoup.fingerprint import code_fingerprint
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

CHUNK_SAMPLES = 500
"""Samples in one call of AutoAttack or of a user-defined attack, which may attack a sample
differently in another batch."""
_FEWEST_TARGETS = 5
"""Targets of AutoAttack's apgd-t in L1, where they are fewest."""


@dataclass(frozen=True)
class Target:
    """A network under attack, and the samples on which it is attacked.

    Attributes:
        model: Network on `device`, in eval mode.
        samples: Images, labels, ids and clean logits of n samples.
        device: Device of the network.
        pass_size: Images in one pass.
    """

    model: nn.Module
    samples: AttackedSamples
    device: torch.device
    pass_size: int


class Attacker(Protocol):
    """Attacks the samples that are correct without an attack.

    Attributes:
        together: Samples in one call of the attack, which may attack a sample differently beside
            others; 1 if every sample is attacked by itself.
    """

    together: ClassVar[int]

    @property
    def attempts(self) -> tuple[str, ...]:
        """Names of the attempts, in order."""

    def protocol(self) -> dict[str, Any]:
        """Return the settings that decide the verdicts, ready for JSON."""

    def attack(
        self, target: Target, threat: ThreatModel, outcome: Outcome, poll: AttackProgress
    ) -> None:
        """Attack every correct sample that `outcome` does not settle yet, and settle it there."""

    def count_passes(self, correct: Tensor, outcome: Outcome) -> int:
        """Return at least how many passes of one image the verdicts of an outcome take.

        A gradient counts as two passes. The number depends on the verdicts alone.

        Args:
            correct: (n,) bool, correct without an attack.
            outcome: The settled outcome.
        """


@dataclass(frozen=True)
class QueueAttacker:
    """APGD, PGD, PMA or MALT, by the queue of `robustsoup.attacks.engine`.

    Attributes:
        settings: The attack, with its precision resolved.
        classes: Number of classes.
        pass_size: Images in one pass.
    """

    together: ClassVar[int] = 1
    settings: AttackSettings
    classes: int
    pass_size: int

    @property
    def attempts(self) -> tuple[str, ...]:
        """One name for each restart and target."""
        return tuple(attempt.name for attempt in list_attempts(self.settings, self.classes))

    def protocol(self) -> dict[str, Any]:
        """Return the settings that decide the verdicts."""
        s = self.settings
        protocol = {
            "attack": s.attack,
            "loss": self._loss_name,
            "steps": s.steps,
            "restarts": s.restarts,
            "eot": s.eot,
            "search_precision": s.precision,
            "rows": self.pass_size,
            "l1_schedule": "3eps,2eps,eps",
        }
        if s.tries_targets:
            protocol["targets"] = count_targets(s, self.classes)
        if callable(s.loss):
            protocol["code"] = code_fingerprint(s.loss)
        return protocol

    def attack(
        self, target: Target, threat: ThreatModel, outcome: Outcome, poll: AttackProgress
    ) -> None:
        """Run the attempts one after the other."""
        _attack_target(run_attempts, self.settings, target, threat, outcome=outcome, poll=poll)

    @property
    def _loss_name(self) -> str:
        """The loss as text; that of MALT depends on the number of classes."""
        loss = queued_loss(self.settings, self.classes) if self.settings.is_queued else "several"
        return loss if isinstance(loss, str) else self.settings.loss_text

    def count_passes(self, correct: Tensor, outcome: Outcome) -> int:
        """Return two passes for each step, times eot."""
        steps = _count_steps(correct, outcome, len(self.attempts), self.settings.steps)
        return 2 * self.settings.eot * steps


@dataclass(frozen=True)
class SquareAttacker:
    """Square, which queries the outputs alone.

    Attributes:
        settings: The attack.
        pass_size: Images in one pass.
    """

    together: ClassVar[int] = 1
    settings: AttackSettings
    pass_size: int

    @property
    def attempts(self) -> tuple[str, ...]:
        """One name for each restart."""
        return square_attempts(self.settings.restarts)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that decide the verdicts."""
        return {
            "attack": "square",
            "loss": self.settings.loss_name,
            "n_queries": self.settings.n_queries,
            "restarts": self.settings.restarts,
            "search_precision": "float32",
            "rows": self.pass_size,
        }

    def attack(
        self, target: Target, threat: ThreatModel, outcome: Outcome, poll: AttackProgress
    ) -> None:
        """Run the restarts one after the other."""
        _attack_target(run_square, self.settings, target, threat, outcome=outcome, poll=poll)

    def count_passes(self, correct: Tensor, outcome: Outcome) -> int:
        """Return one pass for each query."""
        return _count_steps(correct, outcome, len(self.attempts), self.settings.n_queries)


@dataclass(frozen=True)
class StrongAttacker:
    """PMA, MALT and Square in turn.

    Attributes:
        settings: The attack, with its precision resolved.
        classes: Number of classes.
        pass_size: Images in one pass.
    """

    together: ClassVar[int] = 1
    settings: AttackSettings
    classes: int
    pass_size: int

    @property
    def attempts(self) -> tuple[str, ...]:
        """One name for each restart and target, and then for each restart of Square."""
        return strong_attempts(self.settings, self.classes)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that decide the verdicts."""
        attacker = QueueAttacker(self.settings, self.classes, self.pass_size)
        queries = {name: getattr(self.settings, name) for name in ("n_queries", "trial_queries")}
        return attacker.protocol() | queries

    def attack(
        self, target: Target, threat: ThreatModel, outcome: Outcome, poll: AttackProgress
    ) -> None:
        """Run the attempts one after the other."""
        _attack_target(run_strong, self.settings, target, threat, outcome=outcome, poll=poll)

    def count_passes(self, correct: Tensor, outcome: Outcome) -> int:
        """Return two passes for each step, times eot, and one for each query of Square.

        A survivor counts the trial of the first Square alone, whether it went on or not.
        """
        s = self.settings
        searches, each_step = len(self.attempts) - s.restarts, 2 * s.eot
        costs = [each_step * s.steps] * searches + [s.trial_queries]
        costs += [s.n_queries] * (s.restarts - 1)
        before = torch.tensor([0, *costs]).cumsum(0)
        by = torch.where(outcome.broken, outcome.by, len(costs))[correct]
        taken = outcome.step[correct].clamp(min=0) * torch.where(by < searches, each_step, 1)
        is_broken = outcome.broken[correct]
        passes = before[by.clamp(max=len(costs))] + torch.where(is_broken, taken, 0)
        by_other_means = is_broken & (by >= len(costs))
        return int(passes[~by_other_means].sum())


def _attack_target(
    run: Callable[..., None],
    settings: AttackSettings,
    target: Target,
    threat: ThreatModel,
    *,
    outcome: Outcome,
    poll: AttackProgress,
) -> None:
    """Call `run_attempts`, `run_square` or `run_strong`, which take the same arguments."""
    run(target.model, target.samples, threat, settings, outcome, device=target.device, poll=poll)


class AttackFunction(Protocol):
    """A user-defined attack, which returns one point for each image."""

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Network in eval mode; its parameters need no gradient.
            x: (b, c, h, w) float32 images in [0, 1].
            y: (b,) int64 labels.
            threat: Threat model.
            seed: Seed of the noise, if there is any.

        Returns:
            (b, c, h, w) points in the ball and the box.
        """


@dataclass(frozen=True)
class FunctionAttacker:
    """A user-defined attack, one chunk of samples at a time.

    Args:
        name: Name in records.
        function: The attack.
        seed: Seed of the noise.
    """

    together: ClassVar[int] = CHUNK_SAMPLES
    name: str
    function: AttackFunction
    seed: int

    @property
    def attempts(self) -> tuple[str, ...]:
        """The attack itself is the only attempt."""
        return (self.name,)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that decide the verdicts."""
        return {
            "attack": self.name,
            "code": code_fingerprint(self.function),
            "chunk": CHUNK_SAMPLES,
            "seed": self.seed,
            "search_precision": "float32",
        }

    def attack(
        self, target: Target, threat: ThreatModel, outcome: Outcome, poll: AttackProgress
    ) -> None:
        """Attack chunk by chunk; the chunks do not depend on the settled samples."""
        correct = target.samples.correct.nonzero().flatten()
        for chunk in correct.split(CHUNK_SAMPLES):
            if bool((outcome.settled[chunk] == 0).any()):
                self._attack_chunk(target, threat, outcome, chunk)
            poll(int(outcome.settled[correct].sum()), len(correct))

    def _attack_chunk(
        self, target: Target, threat: ThreatModel, outcome: Outcome, chunk: Tensor
    ) -> None:
        x, y = target.samples.fetch(chunk), target.samples.y[chunk].to(target.device)
        seed = self.seed + int(target.samples.ids[chunk[0]])
        with torch.enable_grad():  # the attack may change its copies in place
            returned = self.function(target.model, x.clone(), y.clone(), threat, seed=seed)
        points = self._check_points(returned, x)
        excess = float(constraint_excess(points, x, threat).max())
        if math.isnan(excess):
            raise RequestError(f'attack "{self.name}": a point holds NaN')
        if excess > certificate_tolerance(threat):
            raise RequestError(
                f'attack "{self.name}": a point lies {excess:.2g} outside the ball or the box of '
                f"{threat}; project the points"
            )
        waiting = (
            outcome.settled[chunk] == 0
        )  # the pool or an earlier evaluation settled the others
        chunk = chunk[waiting]
        points, x = points[waiting.to(points.device)], x[waiting.to(x.device)]
        outcome.record_points(chunk, points, x, threat)

        def fetch_points(samples: Tensor) -> Tensor:
            return points[torch.searchsorted(chunk, samples)]

        broken, margin = check_points(
            target.model,
            target.samples,
            fetch_points,
            chunk,
            size=target.pass_size,
            device=target.device,
        )
        outcome.attacked[chunk] = True
        outcome.broken[chunk], outcome.margin[chunk] = broken, margin
        outcome.by[chunk] = torch.where(broken, 0, -1)
        outcome.settled[chunk] = 1

    def count_passes(self, correct: Tensor, outcome: Outcome) -> int:
        """Return one gradient for each sample: an attack of one's own may take no more."""
        by_other_means = outcome.broken & (outcome.by > 0)
        return 2 * int((correct & ~by_other_means).sum())

    def _check_points(self, points: object, x: Tensor) -> Tensor:
        """Return what the attack returned as numbers like x, after a check of type and shape."""
        if not isinstance(points, Tensor):
            raise RequestError(
                f'attack "{self.name}": returned {type(points).__name__}, expected a tensor of '
                f"shape {tuple(x.shape)}"
            )
        if points.shape != x.shape or not points.is_floating_point():
            raise RequestError(
                f'attack "{self.name}": returned {tuple(points.shape)} {points.dtype}, '
                f"expected {tuple(x.shape)} {x.dtype}"
            )
        return points.detach().to(x.dtype)


@dataclass(frozen=True)
class AutoAttacker:
    """Standard AutoAttack, one chunk of samples at a time.

    Attributes:
        plan: The attacks that are possible with the classes of the data.
        seed: Seed of the noise.
    """

    together: ClassVar[int] = CHUNK_SAMPLES
    plan: AutoAttackPlan
    seed: int

    @property
    def attempts(self) -> tuple[str, ...]:
        """The attacks of AutoAttack."""
        return tuple(self.plan.attacks)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that decide the verdicts."""
        return {
            "attack": "autoattack",
            "version": self.plan.label,
            "targets": self.plan.targets,
            "chunk": CHUNK_SAMPLES,
            "search_precision": "float32",
        }

    def attack(
        self, target: Target, threat: ThreatModel, outcome: Outcome, poll: AttackProgress
    ) -> None:
        """Attack chunk by chunk; the chunks do not depend on the settled samples."""
        attempts = len(self.attempts)
        correct = target.samples.correct.nonzero().flatten()

        def poll_settled() -> None:
            poll(int(outcome.settled[correct].sum()), len(correct) * attempts)

        for chunk in correct.split(CHUNK_SAMPLES):
            waiting = chunk[outcome.settled[chunk] < attempts]
            if len(waiting):
                seed = self.seed + int(target.samples.ids[chunk[0]])
                self._attack_chunk(target, threat, outcome, waiting, seed=seed, poll=poll_settled)

    def _attack_chunk(
        self,
        target: Target,
        threat: ThreatModel,
        outcome: Outcome,
        chunk: Tensor,
        *,
        seed: int,
        poll: Callable[[], None],
    ) -> None:
        x = target.samples.fetch(chunk)

        def record(points: Tensor, by: Tensor, finished: int) -> None:
            """Record what is known after an attack: an interruption costs at most the next."""
            by = by.cpu()
            outcome.record_points(chunk, points, x, threat)
            _, margin = check_points(
                target.model,
                target.samples,
                lambda samples: points[torch.searchsorted(chunk, samples)],
                chunk,
                size=target.pass_size,
                device=target.device,
            )
            broken = by >= 0
            outcome.margin[chunk], outcome.by[chunk], outcome.broken[chunk] = margin, by, broken
            outcome.settled[chunk] = torch.where(broken, len(self.attempts), finished)
            poll()

        attack_chunk(
            InPasses(target.model, target.pass_size),
            x,
            target.samples.y[chunk].to(target.device),
            threat,
            plan=self.plan,
            seed=seed,
            finished=int(outcome.settled[chunk].min()),
            on_attack=record,
        )

    def count_passes(self, correct: Tensor, outcome: Outcome) -> int:
        """Return the passes of the attacks that a sample survived, by their numbers of steps."""
        plan = self.plan
        passes = {
            "apgd-ce": 2 * plan.steps,
            "apgd-t": 2 * plan.steps * min(plan.targets, _FEWEST_TARGETS),
            "fab-t": 2 * plan.steps * plan.targets,
            "square": plan.queries,
        }
        before = torch.tensor([0, *(passes[name] for name in plan.attacks)]).cumsum(0)
        survived = torch.where(outcome.broken, outcome.by, len(plan.attacks))
        by_other_means = outcome.broken & (outcome.by >= len(plan.attacks))
        return int(before[survived.masked_fill(by_other_means, 0)[correct]].sum())


def _count_steps(correct: Tensor, outcome: Outcome, attempts: int, steps: int) -> int:
    """Return the steps of all attempts; samples that other means broke count as none."""
    by = outcome.by[correct]
    survivors = int((correct & ~outcome.broken).sum())
    is_broken = (by >= 0) & (by < attempts)
    taken = by * steps + outcome.step[correct].clamp(min=0)
    return survivors * attempts * steps + int(taken[is_broken].sum())


def make_attacker(
    settings: AttackSettings,
    threats: tuple[ThreatModel, ...],
    classes: int,
    device: torch.device,
    shape: tuple[int, ...],
) -> Attacker:
    """Return the attacker that the settings describe.

    Args:
        settings: The attack, with its precision resolved.
        threats: Threat models of the evaluation.
        classes: Number of classes of the data.
        device: Device of the network.
        shape: Shape of an image, (c, h, w).

    Raises:
        RequestError: If the attack does not support this number of classes or images of this
            shape, or is not installed.
    """
    check_classes(settings, classes)
    if settings.attack == "autoattack" and threats:
        plan = plan_autoattack(classes, threats[0])
        for threat in threats:
            check_square_tiling(shape, threat)
        return AutoAttacker(plan, settings.seed)
    images = pass_size(device, settings.batch_size)
    if settings.attack == "square":
        return SquareAttacker(settings, images)
    if settings.attack == "strong":
        return StrongAttacker(settings, classes, images)
    if settings.is_queued or settings.attack == "autoattack":
        name = settings.attack if settings.is_queued else "apgd"
        return QueueAttacker(replace(settings, attack=name), classes, images)
    name, function = _find_attack_function(settings.attack)
    return FunctionAttacker(name, function, settings.seed)


def _find_attack_function(attack: str | AttackFunction) -> tuple[str, AttackFunction]:
    """Return the name and the function of a user-defined attack."""
    if not isinstance(attack, str):
        name, function = getattr(attack, "__name__", type(attack).__name__), attack
    elif ":" in attack:
        name, function = attack, import_by_name(attack, label=f'attack "{attack}"')
    else:
        name, function = attack, ATTACKS.get_entry(attack).load()
    arguments = ["model", "x", "y", "threat"]
    check_call(function, arguments, label=f'attack "{name}"', keywords=["seed"])
    return name, function

"""The evaluation form of APGD and PGD: checks the request, then runs attempt after attempt."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from robustsoup.attacks.engine import (
    Attempt,
    SampleQueue,
    Search,
    order_waiting,
    run_in_turn,
    run_search,
)
from robustsoup.attacks.folding import fold_batchnorm
from robustsoup.attacks.forward import (
    ImageBatch,
    LabelBatch,
    as_attack_inputs,
    check_inputs,
    frozen_eval,
    padded_loss,
    pass_size,
    predict_logits,
)
from robustsoup.attacks.lanes import run_in_lanes
from robustsoup.attacks.losses import Loss, ce, judge
from robustsoup.attacks.malt import MOST_CANDIDATES, NearestTargets
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.attacks.steps import StepSchedule
from robustsoup.catalog import LOSSES
from robustsoup.device import resolve_precision
from robustsoup.errors import RequestError
from robustsoup.gradients import gradients_enabled
from robustsoup.settings import QUEUED_ATTACKS, AttackSettings
from robustsoup.threats import ThreatModel

FOLDING_IMAGES = 16
"""Number of images on which BatchNorm folding is tested."""
_LOSS_ABBREVIATIONS = {"targeted dlr": "t", "targeted margin": "t-margin"}
STRONG_PARTS = ("pma", "malt")
"""The attacks of "strong" that follow gradients, in order; Square comes last."""


class AttackProgress(Protocol):
    """Receives the progress of an attack several times a second."""

    def __call__(self, done: int, total: int, /) -> None:
        """Report that `done` of `total` are settled; both count samples times attempts."""


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack on n samples.

    A sample that is misclassified without an attack is broken at step 0 by no attempt.

    Attributes:
        x_adv: (n, ...) the first misclassified point, else the point of highest loss.
        broken: (n,) bool, whether an adversarial example was found.
        step: (n,) int64, step at which the sample broke (0: the starting point), else -1.
        by: (n,) int64, index in `attempts` of the attempt that broke the sample, else -1.
        attempts: Names of the attempts, in order.
    """

    x_adv: Tensor
    broken: Tensor
    step: Tensor
    by: Tensor
    attempts: tuple[str, ...]


def check_classes(settings: AttackSettings, classes: int) -> None:
    """Check that the loss can be used with this number of classes.

    Raises:
        RequestError: If the loss needs more classes.
    """
    if not isinstance(settings.loss, str):
        return
    facts = LOSSES[settings.loss].facts
    if classes < facts["classes"]:
        raise RequestError(
            f'loss: "{settings.loss}" needs {facts["classes"]} classes or more, got {classes}; '
            f'use "{facts.get("instead", "ce")}"'
        )


def list_attempts(settings: AttackSettings, classes: int) -> list[Attempt]:
    """List the attempts of an attack: for each restart, one attempt per target.

    Args:
        settings: An attack of the queue, or "strong" for those of its parts.
        classes: Number of classes.
    """
    if settings.attack == "strong":
        parts = [replace(settings, attack=part) for part in STRONG_PARTS]
        return [attempt for part in parts for attempt in list_attempts(part, classes)]
    loss: str | Loss = queued_loss(settings, classes)
    is_targeted = isinstance(loss, str) and LOSSES[loss].facts.get("targeted", False)
    by_distance = settings.attack == "malt"
    ranks = range(1, count_targets(settings, classes) + 1) if is_targeted else (0,)
    name = str(settings.attack)
    if not settings.own_loss:
        loss_name = settings.loss_text
        name = f"{name}-{_LOSS_ABBREVIATIONS.get(loss_name, loss_name.replace(' ', '-'))}"
    function: Loss = LOSSES[loss].load() if isinstance(loss, str) else loss
    attempts = []
    for restart in range(settings.restarts):
        suffix = f" restart {restart + 1}" if restart else ""
        for rank in ranks:
            target = f" target {rank}" if rank else ""
            attempts.append(
                Attempt(f"{name}{target}{suffix}", function, rank, restart, by_distance)
            )
    return attempts


def count_targets(settings: AttackSettings, classes: int) -> int:
    """Return how many other classes a targeted attack tries of `classes`."""
    ranked = MOST_CANDIDATES if settings.attack in ("malt", "strong") else classes
    return min(settings.targets, classes - 1, ranked)


def queued_loss(settings: AttackSettings, classes: int) -> str | Loss:
    """Return the loss that an attack of the queue maximises: its name, or the user's function.

    MALT takes the margin where there are too few classes for DLR.
    """
    if not settings.own_loss:
        return settings.loss
    facts = LOSSES[settings.own_loss].facts
    return settings.own_loss if classes >= facts["classes"] else str(facts["instead"])


def run_attempts(
    model: nn.Module,
    samples: AttackedSamples,
    threat: ThreatModel,
    settings: AttackSettings,
    outcome: Outcome,
    *,
    device: torch.device,
    poll: AttackProgress | None = None,
) -> None:
    """Attack every sample that is classified correctly and not settled yet.

    Args:
        model: Network in eval mode; see `frozen_eval`.
        samples: The samples.
        threat: Threat model with eps above 0.
        settings: The attack, "apgd", "pgd", "pma" or "malt".
        outcome: Read to resume, and written as samples are settled.
        device: Device of the network.
        poll: Receives progress.
    """
    attempts = list_attempts(settings, samples.classes)
    run_attempt = prepare_attempts(
        model, samples, threat, settings, outcome, attempts=len(attempts), device=device
    )
    run_in_turn(run_attempt, len(attempts), samples, outcome, poll=poll)


def prepare_attempts(
    model: nn.Module,
    samples: AttackedSamples,
    threat: ThreatModel,
    settings: AttackSettings,
    outcome: Outcome,
    *,
    attempts: int,
    device: torch.device,
) -> Callable[[int, SampleQueue, Callable[[], None] | None], None]:
    """Return a function that runs one of the attempts of `list_attempts`, for `run_in_turn`.

    Args:
        model: Network in eval mode; see `frozen_eval`.
        samples: The samples.
        threat: Threat model with eps above 0.
        settings: The attack.
        outcome: Read to resume, and written as samples are settled.
        attempts: Number of attempts of the whole attack, of which these are the first.
        device: Device of the network.
    """
    listed = list_attempts(settings, samples.classes)
    correct = samples.correct
    precision = resolve_precision(settings.precision, device)
    search_model = model
    if precision != "float32" and bool(correct.any()):
        probe = samples.fetch(correct.nonzero().flatten()[:FOLDING_IMAGES])
        search_model = fold_batchnorm(model, probe)
    search = Search(
        model=model,
        search_model=search_model,
        samples=samples,
        attempt=listed[0],
        index=0,
        attempts=attempts,
        schedule=StepSchedule.for_threat(threat, settings.steps, adaptive=settings.attack != "pgd"),
        seed=settings.seed,
        precision=precision,
        eot=settings.eot,
        pass_size=pass_size(device, settings.batch_size),
        device=device,
    )

    nearest = NearestTargets(model, samples, threat.norm, search.pass_size, device)

    def run_attempt(index: int, queue: SampleQueue, report: Callable[[], None] | None) -> None:
        attempt, table = listed[index], None
        if attempt.by_distance:
            waiting = torch.tensor(order_waiting(samples, outcome, index))
            table = nearest.rank(waiting, report)
        run = replace(search, attempt=attempt, index=index, nearest=table)
        run_search(run, queue, outcome, report)

    return run_attempt


def check_points(
    model: nn.Module,
    samples: AttackedSamples,
    fetch_points: Callable[[Tensor], Tensor],
    selected: Tensor,
    *,
    size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Evaluate given points in float32.

    Args:
        model: Network in eval mode; see `frozen_eval`.
        samples: The samples.
        fetch_points: fetch_points(samples (b,)) -> (b, ...) points on the device.
        selected: (k,) int64 samples to check.
        size: Number of images in a pass.
        device: Device of the network.

    Returns:
        Whether each point is misclassified (k,) bool, and its logit margin (k,) float32.
    """

    def check_pass(batch: Tensor) -> tuple[Tensor, Tensor]:
        y = samples.y[batch].to(device)
        logits, _ = padded_loss(model, fetch_points(batch), y, ce, size)
        margin, is_fooled = judge(logits, y)
        return is_fooled.cpu(), margin.float().cpu()

    if len(selected) == 0:
        return torch.zeros(0, dtype=torch.bool), torch.zeros(0)
    passes = [partial(check_pass, batch) for batch in selected.split(size)]
    broken, margin = zip(*run_in_lanes(passes, device), strict=True)
    return torch.cat(broken), torch.cat(margin)


@gradients_enabled()
def run_attack(
    model: nn.Module | Callable[[Tensor], object],
    x: ImageBatch,
    y: LabelBatch,
    threat: ThreatModel,
    settings: AttackSettings,
    *,
    ids: Tensor | None = None,
    on_progress: AttackProgress | None = None,
) -> AttackResult:
    """Attack images with an attack of the queue, and return the points and verdicts.

    Args:
        model: Network, whose state is restored, or a function that returns logits.
        x: (n, ...) float images in [0, 1], on the network's device.
        y: (n,) integer labels.
        threat: Threat model.
        settings: The attack, "apgd", "pgd", "pma" or "malt".
        ids: (n,) int64 sample numbers that seed the noise; 0..n-1 by default.
        on_progress: Called several times a second with (done, total).

    Raises:
        RequestError, DataError, ModelError: Before any work, if the settings, the radius, the
            images or the network do not fit.
    """
    if not settings.is_queued:
        expected = ", ".join(QUEUED_ATTACKS)
        raise RequestError(f'attack: got "{settings.attack}", expected one of {expected}')
    if ids is not None and len(ids) != len(x):
        raise RequestError(f"ids: got {len(ids)}, expected {len(x)}, one for each image")
    model, x, y = as_attack_inputs(model, x, y)
    threat.check_shape(x.shape[1:])
    classes = check_inputs(model, x, y)
    outcome = Outcome.blank(len(x), x.clone())
    if threat.is_clean or len(x) == 0:
        return AttackResult(x.clone(), outcome.broken, outcome.step, outcome.by, ())
    check_classes(settings, classes)
    attempts = list_attempts(settings, classes)

    def fetch(samples: Tensor) -> Tensor:
        return x[samples.to(x.device)]

    y = y.cpu()
    with frozen_eval(model):
        size = pass_size(x.device, settings.batch_size)
        logits = predict_logits(model, fetch, len(x), size, x.device)
        samples = AttackedSamples(
            fetch, y, torch.arange(len(x)) if ids is None else ids.cpu(), logits
        )
        run_attempts(model, samples, threat, settings, outcome, device=x.device, poll=on_progress)
    outcome.broken[~samples.correct], outcome.step[~samples.correct] = True, 0
    points = x if outcome.x_adv is None else outcome.x_adv
    names = tuple(attempt.name for attempt in attempts)
    return AttackResult(points, outcome.broken, outcome.step, outcome.by, names)

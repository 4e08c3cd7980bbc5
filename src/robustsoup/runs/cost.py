"""Estimate the time and disk space of steps on this device, from a short measurement."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from robustsoup.attacks.adaptation import adapt_network
from robustsoup.attacks.forward import frozen_eval, input_gradient, pass_size
from robustsoup.attacks.lanes import lane_count, run_in_lanes
from robustsoup.attacks.losses import ce
from robustsoup.data import Data
from robustsoup.runs.context import Context
from robustsoup.runs.plan import Step
from robustsoup.runs.planner import Planner
from robustsoup.runs.tasks import (
    BuildGreedySoup,
    DoPart,
    EvaluateNetwork,
    EvaluationSettings,
    MeasureClean,
    MergeSoup,
    MixSoup,
    Task,
    TrainNetwork,
    TrainSubspace,
)
from robustsoup.soups.racing import round_ends
from robustsoup.soups.screening import short_attack
from robustsoup.soups.surrogate_map import TESTS, spread_first
from robustsoup.soups.surrogate_search import count_part

ATTACK_STEP_FRACTION = 0.55
"""Fraction of an evaluation's attack steps that run: misclassified samples leave the attack."""
SHORTEST_STEP = 0.02
"""Seconds."""
BYTES_PER_VERDICT = 30


def measure_pass_seconds(context: Context, precision: str) -> float:
    """Return the seconds of one forward pass of one sample.

    The time is half of the median time of forward and input gradient of a batch.
    """
    device, batch_size = context.device, pass_size(context.device)
    network = context.fresh_network(0)
    network.to(device)
    shape = (batch_size, context.data.record["channels"], *context.data.record["size"])
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    adapt_network(network, x[:2])
    y = torch.zeros(batch_size, dtype=torch.long, device=device)
    tasks = [lambda: input_gradient(network, x, y, ce, precision)] * lane_count(device)
    seconds: list[float] = []
    with frozen_eval(network):
        for _ in range(6):
            started = time.perf_counter()
            run_in_lanes(tasks, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) / (2 * batch_size * len(tasks))


@dataclass(frozen=True)
class WaysToSearch:
    """Estimated seconds of the ways to search one grid of soups.

    Attributes:
        soups: Number of soups.
        grid: Seconds to attack all of them.
        screen: Seconds with a short attack on all of them.
        surrogate: Seconds to attack those that the surrogate is likely to need.
    """

    soups: int
    grid: float
    screen: float
    surrogate: float


USUAL_CONFIRMATIONS = 3
"""Soups that a screened search usually attacks in full, beside the ingredients."""
USUAL_STEPS = 4
"""Soups that the surrogate usually attacks after the first ones."""
USUAL_FINALISTS = 2
"""Soups beside the ingredients that the surrogate usually attacks on all samples."""


def compare_ways(
    planner: Planner,
    context: Context,
    measure: Callable[[Context, str], float] = measure_pass_seconds,
) -> WaysToSearch | None:
    """Estimate how long each way to search takes, from one short measurement.

    A screened search attacks the ingredients in full; every other soup meets their adversarial
    points, a short attack, and the full attack on the first round of samples (`soups.racing`).

    Args:
        planner: The planner of the search.
        context: Data, network and device.
        measure: Returns the seconds of one forward pass of one sample in a precision.

    Returns:
        The times, or None unless the recipe searches exactly one grid with a queued attack.
    """
    recipe = planner.recipe
    grids = [s for s in recipe.soups.values() if s.method in ("grid", "line", "surrogate")]
    settings = planner.selecting_settings()
    if len(grids) != 1 or len(recipe.soups) != 1 or not settings.attack.is_queued:
        return None
    soups, n = len(recipe.alphas_of(grids[0])), len(recipe.ingredients_of(grids[0]))
    short = short_attack(settings.attack, recipe.evaluate["screen_steps"])
    attack = _count_attack_passes(settings, context.data)
    brief = _count_attack_passes(replace(settings, attack=short), context.data, points=n)
    clean = settings.count_samples(context.data)
    mixing = planner.mixing_of(grids[0]).count_passes(context.data)
    seconds = measure(context, settings.attack.precision)
    ends = round_ends(clean)
    opening = ends[0] / clean if len(ends) > 1 else 0.0
    screened = max(0, soups - n)
    confirmed = min(screened, USUAL_CONFIRMATIONS)
    first = len(spread_first(recipe.alphas_of(grids[0]))) + TESTS
    attacked = min(soups, first + USUAL_STEPS)
    attacks: float = attacked  # in soups' worth of samples
    part = count_part(clean, settings.attack, shift=settings.shift is not None)
    if part is not None:
        in_full = n + min(attacked - n, USUAL_FINALISTS)
        attacks = in_full + (attacked - in_full) * part / clean
    full = n + confirmed * (1 - opening) + screened * opening
    return WaysToSearch(
        soups,
        seconds * soups * (attack + mixing),
        seconds * (soups * mixing + screened * brief + full * attack),
        seconds * (soups * (clean + mixing) + attacks * (attack + mixing)),
    )


def _count_attack_passes(settings: EvaluationSettings, data: Data, *, points: int = 0) -> float:
    """Return the passes of an evaluation; the steps that it counts run forward and backward."""
    return 2 * ATTACK_STEP_FRACTION * settings.count_passes(data, points=points)


def estimate_bytes(steps: Sequence[Step], context: Context) -> int:
    """Estimate the bytes that the outputs of steps take on disk."""
    tensors = context.fresh_network(0).state_dict().values()
    network_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return sum(_count_output_bytes(step.task, context.data, network_bytes) for step in steps)


def _count_output_bytes(task: Task, data: Data, network_bytes: int) -> int:
    """Estimate the bytes of the output of a task; 0 for links and small files."""
    match task:
        case TrainNetwork() | TrainSubspace():
            return network_bytes * task.checkpoints
        case MixSoup() | MergeSoup():
            return network_bytes
        case EvaluateNetwork():
            points = task.settings.count_point_bytes(data) if task.keep_points else 0
            return _count_verdicts(task.settings, data) * BYTES_PER_VERDICT + points
        case MeasureClean():
            return len(task.alphas) * task.settings.count_samples(data) // 8
        case BuildGreedySoup():
            return task.rounds * _count_verdicts(task.evaluation, data) * BYTES_PER_VERDICT
        case _:
            return 0


def _count_verdicts(settings: EvaluationSettings, data: Data) -> int:
    return settings.count_samples(data) * len(settings.threats)


def estimate_seconds(
    steps: Sequence[Step],
    context: Context,
    measure: Callable[[Context, str], float] = measure_pass_seconds,
) -> dict[str, float]:
    """Estimate the seconds of each step, by key.

    Args:
        steps: The steps.
        context: Data, network and device.
        measure: Returns the seconds of one forward pass of one sample in a precision.
    """
    precisions = {step.task.precision for step in steps}
    seconds = {precision: measure(context, precision) for precision in precisions}
    estimates: dict[str, float] = {}
    for step in steps:
        # count_passes counts an attack step as one pass, but the step runs forward and backward.
        task = step.task.whole if isinstance(step.task, DoPart) else step.task
        factor = 2 * ATTACK_STEP_FRACTION if isinstance(task, EvaluateNetwork) else 1
        estimate = step.passes * factor * seconds[step.task.precision]
        estimates[step.key] = max(estimate, SHORTEST_STEP)
    return estimates

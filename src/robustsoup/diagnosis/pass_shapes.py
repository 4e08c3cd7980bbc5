"""Measure how many images in a pass are fastest on this machine's CPU, for one network."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from robustsoup.attacks import run_attack
from robustsoup.attacks.adaptation import adapt_network
from robustsoup.attacks.forward import CPU_PASS_SIZE, frozen_eval, predict_logits
from robustsoup.attacks.lanes import lane_count
from robustsoup.device import resolve_precision
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

SIZES = (8, 16, CPU_PASS_SIZE)
STEPS = 3
ROUNDS = 5
NO_BREAK = ThreatModel("Linf", 1e-6)
"""A radius at which no image breaks, so that every attack takes all steps."""
WORTHWHILE = 0.05
"""Least share of the time that a smaller pass must save to be recommended."""


@dataclass(frozen=True)
class PassTimes:
    """Times of an attack's step.

    Attributes:
        threads: Threads of PyTorch, each of which runs passes of its own.
        seconds: Median seconds for a step of one image, by precision and images a pass.
    """

    threads: int
    seconds: Mapping[str, Mapping[int, float]]

    def best_size(self, precision: str) -> int:
        """Return the fastest size, or the default where that saves less than WORTHWHILE."""
        seconds = self.seconds[precision]
        best = min(seconds, key=seconds.__getitem__)
        return best if self.saved_share(precision, best) >= WORTHWHILE else CPU_PASS_SIZE

    def saved_share(self, precision: str, size: int) -> float:
        """Return the share of the time that a size saves, compared with the default."""
        seconds = self.seconds[precision]
        return 1 - seconds[size] / seconds[CPU_PASS_SIZE]


def measure_pass_times(
    network: nn.Module,
    image: tuple[int, int, int],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> PassTimes:
    """Time attacks that fill all lanes, on random images, for each size in turn.

    Args:
        network: A network on the CPU; adapted to attacks.
        image: Channels, height and width of its images.
        on_progress: Called with (attacks done, all attacks).

    Raises:
        ModelError: The network fails on images of this shape.
    """
    device = torch.device("cpu")
    precisions = sorted({"float32", resolve_precision("auto", device)}, reverse=True)
    images = lane_count(device) * CPU_PASS_SIZE
    x = torch.rand(images, *image, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    with frozen_eval(network):
        adapt_network(network, x[:2])
        y = predict_logits(network, lambda at: x[at], images, CPU_PASS_SIZE, device).argmax(1)
    tried = [(precision, size) for precision in precisions for size in SIZES]
    seconds: dict[tuple[str, int], list[float]] = {one: [] for one in tried}
    for number in range(ROUNDS + 1):
        for position, (precision, size) in enumerate(tried):
            settings = AttackSettings(steps=STEPS, precision=precision, batch_size=size)
            started = time.perf_counter()
            run_attack(network, x, y, NO_BREAK, settings)
            if number:  # the first round warms up
                seconds[precision, size].append(time.perf_counter() - started)
            if on_progress:
                on_progress(number * len(tried) + position + 1, (ROUNDS + 1) * len(tried))
    medians = {
        precision: {
            size: statistics.median(seconds[precision, size]) / (images * STEPS) for size in SIZES
        }
        for precision in precisions
    }
    return PassTimes(torch.get_num_threads(), medians)

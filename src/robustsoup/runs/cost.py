"""What a step will cost on this device, from a short measurement."""

import statistics
import time
from collections.abc import Sequence

import torch

from robustsoup.attacks.forward import frozen_eval, input_gradient, pass_size
from robustsoup.attacks.lanes import lane_count, run_in_lanes
from robustsoup.attacks.losses import ce
from robustsoup.runs.execute import Context
from robustsoup.runs.plan import Step

VERDICT = 30
"""Bytes that one verdict takes in a file."""
SURVIVING = 0.55
"""The share of an evaluation's attack steps that are really taken: fooled samples leave. Seen on small CIFAR-10 nets."""


def measure(context: Context, precision: str) -> float:
    """Seconds for one forward pass of one sample (half of a forward and input gradient), the median of a few passes."""
    device, rows = context.device, pass_size(context.device)
    network = context.fresh_network(0).to(device, memory_format=torch.channels_last)
    shape = (rows, context.data.record["channels"], *context.data.record["size"])
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.zeros(rows, dtype=torch.long, device=device)
    tasks = [lambda: input_gradient(network, x, y, ce, precision)] * lane_count(device)
    times = []
    with frozen_eval(network):
        for _ in range(6):
            started = time.perf_counter()
            run_in_lanes(tasks, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / (2 * rows * len(tasks))


def bytes_of(steps: Sequence[Step], context: Context) -> int:
    """About how many bytes the outputs of the steps take on disk: checkpoints, kept points and verdicts."""
    weights = sum(
        t.numel() * t.element_size() for t in context.fresh_network(0).state_dict().values()
    )
    image = (
        context.data.record["channels"]
        * context.data.record["size"][0]
        * context.data.record["size"][1]
    )
    total = 0
    for step in steps:
        if step.kind in ("pretrain", "finetune"):
            every = step.settings.get("checkpoint_every")
            total += weights * (1 + (step.settings["epochs"] // every if every else 0))
        elif step.kind == "mix":
            total += weights
        elif step.kind == "evaluate":
            samples = step.settings["samples"] or len(context.data.split(step.settings["split"]))
            threats = len(step.settings["threats"])
            total += samples * threats * (VERDICT + 4 * image * step.settings["keep_points"])
    return total


def seconds_of(steps: Sequence[Step], context: Context) -> dict[str, float]:
    """Estimated seconds for each step, by key."""
    precisions = {step.settings.get("precision", "float32") for step in steps}
    unit = {precision: measure(context, precision) for precision in precisions}
    estimates = {}
    for step in steps:
        passes = step.passes
        if step.kind == "evaluate":
            passes *= 2 * SURVIVING
        estimates[step.key] = max(passes * unit[step.settings.get("precision", "float32")], 0.02)
    return estimates

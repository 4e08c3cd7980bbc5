"""APGD-CE beside the physical limit and pyautoattack, for a tiny, a small and a larger network.

    python benchmarks/attack.py [--tiny 2000] [--resnet9 1000] [--resnet18 512] [--steps 100]

--tiny, --resnet9 and --resnet18 give numbers of images; 0 leaves a network out. resnet18 takes a
fifth of the steps. The networks are trained adversarially on the first call (half an hour on two
cores; resnet18 sees few images), and attacked on test images that they classify correctly. bfloat16
is timed where the processor has it.

Each round times, in turn: bare passes (forward, cross-entropy and input gradient, nothing else), in
as many lanes as there are threads, at the best of several sizes; robustsoup's whole evaluation;
bare passes again; and pyautoattack. The limit is the mean time of a bare pass times the number of
unavoidable passes: for each attacked sample, up to the step that breaks it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from common import (
    CPU,
    FULL,
    LINF,
    SMALL,
    Workload,
    channels_last,
    describe_machine,
    first_images,
    freeze,
    parse_arguments,
    print_times,
    ratio,
)
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn
from torch.nn import functional

import robustsoup as rs
from robustsoup.attacks.lanes import lane_count, run_in_lanes
from robustsoup.data import Split
from robustsoup.device import autocast, resolve_precision

PASS_SIZES = (16, 32, 64)
PEER_BATCH = 125
"""Batch size at which pyautoattack was fastest for a ResNet-9 on another processor."""
PRECISIONS = sorted({"float32", resolve_precision("auto", CPU)}, reverse=True)
RESNET9 = replace(FULL, pretrain_epochs=4)
TINY = Workload("cifar10", "common:two_convolutions", LINF, 3, 1, None)
TINY_DIGITS = Workload("digits", "common:two_convolutions:pixels=8", SMALL.threat, 1, 1, 256)
RESNET18 = Workload("cifar10", "resnet18", LINF, 2, 1, 4000)
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A network to attack, images that it classifies correctly, and the threat."""

    name: str
    network: nn.Module
    split: Split
    threat: rs.ThreatModel
    steps: int


def make_task(workload: Workload, images: int, steps: int) -> Task:
    """Train a network and take the first test images that it classifies correctly."""
    network = freeze(
        workload.train_base().network(workload.model).to(memory_format=torch.channels_last)
    )
    test = workload.load_data().test
    is_correct = torch.zeros(len(test), dtype=torch.bool)
    for rows in torch.arange(len(test)).split(250):
        x, y = first_images(test.take(rows), len(rows))
        with torch.no_grad():
            is_correct[rows] = network(x).argmax(1) == y
        if int(is_correct.sum()) >= images:
            break
    split = test.take(is_correct.nonzero().flatten()[:images])
    return Task(workload.model, network, split, workload.threat, steps)


def bare_pass(network: nn.Module, x: Tensor, y: Tensor, precision: str) -> None:
    """Compute the gradient of the cross-entropy with respect to the images."""
    point = x.detach().requires_grad_()
    with autocast(x.device, precision, cache=False):
        logits = network(point)
    torch.autograd.grad(functional.cross_entropy(logits.float(), y), point)


def time_bare_image(task: Task, precision: str, size: int, seconds: float = 1.0) -> float:
    """Return the seconds of one image's bare pass, in all lanes, from passes for some seconds."""
    x, y = first_images(task.split, size)
    x, lanes = channels_last(x), lane_count(CPU)

    def time_passes(passes: int) -> float:
        def run_lane() -> None:
            for _ in range(passes):
                bare_pass(task.network, x, y, precision)

        started = time.perf_counter()
        run_in_lanes([run_lane] * lanes, CPU)
        return (time.perf_counter() - started) / passes

    time_passes(1)  # warm up
    passes = max(round(seconds / time_passes(1)), 1)
    return time_passes(passes) / (lanes * len(x))


def attack_with_pyautoattack(
    network: nn.Module, x: Tensor, y: Tensor, threat: rs.ThreatModel, steps: int, *, batch: int
) -> Tensor:
    """Return whether each sample is robust, (n,) bool, by pyautoattack in batches."""
    attack = APGDAttack(
        network, n_iter=steps, norm="Linf", eps=threat.eps, loss="ce", device=x.device.type, seed=0
    )
    parts = zip(x.split(batch), y.split(batch), strict=True)
    points = torch.cat([attack.perturb(images, labels) for images, labels in parts])
    with torch.no_grad():
        return torch.cat([network(part).argmax(1) for part in points.split(250)]) == y


def count_passes(verdicts: rs.Evaluation, task: Task) -> int:
    """Return the passes that no attack of this length can avoid, given when samples broke."""
    by, step = (getattr(verdicts.threats[str(task.threat)], name) for name in ("by", "step"))
    broken_under_attack = by > 0
    return int((step[broken_under_attack] + 1).sum()) + task.steps * int((by < 0).sum())


def time_task(task: Task, rounds: int) -> None:
    """Time all variants in turn, and print medians and ratios."""
    times: dict[str, list[float]] = {}
    robust: dict[str, Tensor] = {}
    x, y = first_images(task.split, len(task.split))
    sizes = {
        precision: min(PASS_SIZES, key=partial(time_bare_image, task, precision))
        for precision in PRECISIONS
    }

    def record(name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    for _ in range(rounds):
        for precision in PRECISIONS:
            attack = partial(rs.evaluate, task.network, task.split, [task.threat], device="cpu")
            name = f"robustsoup, {precision}"
            before = time_bare_image(task, precision, sizes[precision])
            verdicts = record(name, partial(attack, steps=task.steps, precision=precision))
            after = time_bare_image(task, precision, sizes[precision])
            robust[name] = verdicts.threats[str(task.threat)].robust
            limit = count_passes(verdicts, task) * (before + after) / 2
            times.setdefault(f"limit, {precision}", []).append(limit)
        peer = partial(attack_with_pyautoattack, task.network, x, y, task.threat, task.steps)
        robust["pyautoattack"] = record("pyautoattack", partial(peer, batch=PEER_BATCH))
    print(f"\n{task.name}: {len(task.split)} images, {task.steps} steps, {task.threat}\n")
    print("| | time | robust |\n|---|---|---|")
    print_times(
        times,
        lambda name: f"{100 * float(robust[name].float().mean()):.1f} %" if name in robust else "",
    )
    print(f"\nbare passes of {', '.join(map(str, sizes.values()))} images")
    print_ratios(times, rounds)


def print_ratios(times: dict[str, list[float]], rounds: int) -> None:
    """Print the medians over the rounds of the ratios within a round."""
    for precision in PRECISIONS:
        ours, limit = times[f"robustsoup, {precision}"], times[f"limit, {precision}"]
        to_limit = statistics.median(ours[i] / limit[i] for i in range(rounds))
        print(
            f"{precision}: {to_limit:.2f} x the limit; "
            f"{ratio(times, 'pyautoattack', f'robustsoup, {precision}'):.2f} x as fast as "
            "pyautoattack"
        )


def main() -> None:
    """Time each network."""
    options = parse_arguments(__doc__, tiny=2000, resnet9=1000, resnet18=512, steps=100, rounds=3)
    tasks = [
        (TINY, options.tiny, options.steps),
        (RESNET9, options.resnet9, options.steps),
        (RESNET18, options.resnet18, max(options.steps // 5, 1)),
    ]
    if options.small:
        options.rounds = 1
        tasks = [(TINY_DIGITS, 64, 5), (SMALL, 64, 5)]
    print(
        f"{describe_machine()}\nAPGD-CE, {options.rounds} rounds; medians [minimum, maximum]; "
        f"pyautoattack in batches of {PEER_BATCH}"
    )
    for workload, images, steps in tasks:
        if images:
            time_task(make_task(workload, images, steps), options.rounds)


if __name__ == "__main__":
    main()

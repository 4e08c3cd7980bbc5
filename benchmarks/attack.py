"""APGD-CE beside the physical limit and pyautoattack, for a tiny, a small and a larger network.

    python benchmarks/attack.py [--tiny 500] [--resnet9 500] [--resnet18 128] [--steps 100]

--tiny, --resnet9 and --resnet18 give numbers of images; 0 leaves a network out. resnet18 takes a
fifth of the steps. The networks have fresh weights, which take as long as trained ones: an image's
label is what the network predicts, and at the radius about 60 % of the images survive, as on a
robust network.

Each round times, in turn: bare passes (forward, cross-entropy and input gradient, nothing else), in
as many lanes as there are threads, at the best of several sizes; robustsoup's whole evaluation; and
pyautoattack. The limit is the time of a bare pass times the number of unavoidable passes: for each
attacked sample, up to the step that breaks it.
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
    channels_last,
    describe_machine,
    first_images,
    freeze,
    parse_arguments,
    print_times,
    ratio,
    workload,
)
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn
from torch.nn import functional

import robustsoup as rs
from robustsoup.attacks.lanes import lane_count, run_in_lanes
from robustsoup.attacks.losses import logit_margin
from robustsoup.data import Split
from robustsoup.device import autocast

PASS_SIZES = (16, 32, 64)
PEER_BATCH = 125
"""Batch size at which pyautoattack was fastest (docs/benchmarks.md)."""
SURVIVORS, LARGEST_RADIUS = 0.6, 0.25
PRECISIONS = ("float32", "bfloat16")
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A network to attack, the images with its own predictions as labels, and the threat."""

    name: str
    network: nn.Module
    split: Split
    threat: rs.ThreatModel
    steps: int


def make_network(name: str, channels: int, pixels: int) -> nn.Module:
    """Return a network with fresh weights; "tiny" has two convolutions of 16 and 32 channels."""
    if name != "tiny":
        return freeze(channels_last_network(rs.load_model(name, channels=channels)))
    torch.manual_seed(0)
    tiny = nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (pixels // 4) ** 2, 10)),
    )
    return freeze(channels_last_network(tiny))


def channels_last_network(network: nn.Module) -> nn.Module:
    """Return the network with its weights in channels_last memory format."""
    return network.to(memory_format=torch.channels_last)


def make_task(name: str, split: Split, steps: int) -> Task:
    """Label the images by the network; the search for a radius starts where a linear one ends."""
    x, _ = first_images(split, len(split))
    network = make_network(name, x.shape[1], x.shape[2])
    labels, distances = [], []
    for part in x.split(32):
        point = part.clone().requires_grad_()
        logits = network(point)
        margin = logit_margin(logits, logits.argmax(1))
        (grad,) = torch.autograd.grad(margin.sum(), point)
        labels.append(logits.argmax(1))
        distances.append(margin.detach() / grad.flatten(1).abs().sum(1))
    eps = float(torch.cat(distances).quantile(1 - SURVIVORS))
    labelled = replace(split, labels=torch.cat(labels))
    threat = rs.ThreatModel("Linf", grow_radius(network, *first_images(labelled, 32), eps))
    return Task(name, network, labelled, threat, steps)


def grow_radius(network: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Return a radius from eps on at which few enough images survive ten steps."""
    while eps < LARGEST_RADIUS:
        points = rs.apgd(network, x, y, f"Linf {eps}", steps=10)
        with torch.no_grad():
            survivors = float((network(points).argmax(1) == y).float().mean())
        if survivors <= SURVIVORS:
            break
        eps *= 1.3
    return eps


def bare_pass(network: nn.Module, x: Tensor, y: Tensor, precision: str) -> None:
    """Compute the gradient of the cross-entropy with respect to the images."""
    point = x.detach().requires_grad_()
    with autocast(x.device, precision, cache=False):
        logits = network(point)
    torch.autograd.grad(functional.cross_entropy(logits.float(), y), point)


def time_bare_image(task: Task, precision: str) -> float:
    """Return the seconds of one image's bare pass, in all lanes, at the best size."""
    x, y = first_images(task.split, max(PASS_SIZES))
    lanes, best = lane_count(CPU), float("inf")
    for size in PASS_SIZES:
        part, passes = channels_last(x[:size]), max(2, 128 // size)

        def run_lane(part: Tensor = part, passes: int = passes) -> None:
            for _ in range(passes):
                bare_pass(task.network, part, y[: len(part)], precision)

        run_in_lanes([run_lane] * lanes, CPU)  # warm up
        started = time.perf_counter()
        run_in_lanes([run_lane] * lanes, CPU)
        best = min(best, (time.perf_counter() - started) / (lanes * passes * len(part)))
    return best


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

    def record(name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    for _ in range(rounds):
        for precision in PRECISIONS:
            attack = partial(rs.evaluate, task.network, task.split, [task.threat])
            name = f"robustsoup, {precision}"
            verdicts = record(name, partial(attack, steps=task.steps, precision=precision))
            robust[name] = verdicts.threats[str(task.threat)].robust
            limit = count_passes(verdicts, task) * time_bare_image(task, precision)
            times.setdefault(f"limit, {precision}", []).append(limit)
        peer = partial(attack_with_pyautoattack, task.network, x, y, task.threat, task.steps)
        robust["pyautoattack"] = record("pyautoattack", partial(peer, batch=PEER_BATCH))
    print(f"\n{task.name}: {len(task.split)} images, {task.steps} steps, {task.threat}\n")
    print("| | time | robust |\n|---|---|---|")
    print_times(
        times,
        lambda name: f"{100 * float(robust[name].float().mean()):.1f} %" if name in robust else "",
    )
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
    options = parse_arguments(__doc__, tiny=500, resnet9=500, resnet18=128, steps=100, rounds=3)
    numbers = {
        "tiny": options.tiny,
        "resnet9:width=16": options.resnet9,
        "resnet18": options.resnet18,
    }
    if options.small:
        numbers, options.steps, options.rounds = {"tiny": 64, "resnet9:width=4": 64}, 5, 1
    work = workload(small=options.small)
    images = work.load_data().test
    print(
        f"{describe_machine()}\nAPGD-CE on {work.data_name}, {options.rounds} rounds; medians "
        f"[minimum, maximum]; pyautoattack in batches of {PEER_BATCH}"
    )
    for name, samples in numbers.items():
        if samples:
            steps = max(options.steps // 5, 1) if name == "resnet18" else options.steps
            part = images.first(min(samples, len(images)))
            time_task(make_task(name, part, steps), options.rounds)


if __name__ == "__main__":
    main()

"""APGD-CE on a robust network: against the physical limit, and against pyautoattack.

    python benchmarks/attack.py [--samples 1000] [--rounds 3] [--small]

Each round times, in turn: one pass (forward and input gradient) in both precisions, at the best of
several batch sizes; robustsoup's evaluation in float32 and with bfloat16 search; and pyautoattack
at batches of 64, 125, 250 and 500. The physical limit is the time of one pass times the number of
unavoidable passes: for each attacked sample, up to the step that breaks the sample.
"""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from common import (
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

import robustsoup as rs
from robustsoup.attacks.forward import input_gradient
from robustsoup.attacks.losses import ce

BATCHES = (64, 125, 250, 500)
T = TypeVar("T")


def time_one_pass(network: nn.Module, x: Tensor, y: Tensor, precision: str) -> float:
    """Return the seconds of one image's forward and input gradient, at the best batch size."""
    best = float("inf")
    for batch in BATCHES:
        part = channels_last(x[:batch])
        times = []
        for _ in range(7):
            started = time.perf_counter()
            input_gradient(network, part, y[:batch], ce, precision)
            times.append(time.perf_counter() - started)
        best = min(best, statistics.median(times[2:]) / len(part))
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


def count_passes(verdicts: rs.Evaluation, threat: rs.ThreatModel, steps: int) -> int:
    """Return the passes that no attack of this length can avoid, given when samples broke."""
    by, step = (getattr(verdicts.threats[str(threat)], name) for name in ("by", "step"))
    broken_under_attack = by > 0
    return int((step[broken_under_attack] + 1).sum()) + steps * int((by < 0).sum())


def main() -> None:
    """Time all variants in turn, and print medians and ratios."""
    options = parse_arguments(__doc__, samples=1000, rounds=3, steps=100)
    if options.small:
        options.samples, options.rounds, options.steps = 64, 1, 5
    task = workload(small=options.small)
    data, checkpoint = task.load_data(), task.train_ingredient(8)
    split = data.test.first(min(options.samples, len(data.test)))
    plain, fast = (freeze(checkpoint.network()) for _ in range(2))
    fast = fast.to(memory_format=torch.channels_last)
    x, y = first_images(split, len(split))
    times: dict[str, list[float]] = {}
    robust: dict[str, Tensor] = {}

    def record(name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    for _ in range(options.rounds):
        for precision in ("float32", "bfloat16"):

            def evaluate(precision: str = precision) -> rs.Evaluation:
                return rs.evaluate(
                    fast, split, [task.threat], steps=options.steps, precision=precision
                )

            name = f"robustsoup, {precision}"
            verdicts = record(name, evaluate)
            robust[name] = verdicts.threats[str(task.threat)].robust
            passes = count_passes(verdicts, task.threat, options.steps)
            limit = passes * time_one_pass(fast, x, y, precision)
            times.setdefault(f"limit, {precision}", []).append(limit)
        for batch in BATCHES:
            name = f"pyautoattack, batch {batch}"
            robust[name] = record(
                name,
                lambda batch=batch: attack_with_pyautoattack(
                    plain, x, y, task.threat, options.steps, batch=batch
                ),
            )
    print(
        f"{describe_machine()}\n{task.model} on {task.data_name}, {len(y)} images, "
        f"APGD-CE-{options.steps}, {task.threat}, {options.rounds} rounds; "
        "medians [minimum, maximum]\n\n| | time | robust |\n|---|---|---|"
    )
    print_times(
        times,
        lambda name: f"{100 * float(robust[name].float().mean()):.1f} %" if name in robust else "",
    )
    best = min(
        (name for name in times if name.startswith("pyautoattack")),
        key=lambda name: statistics.median(times[name]),
    )
    differ = int((robust["robustsoup, float32"] != robust[best]).sum())
    print(f"\nbest of pyautoattack: {best}; verdicts that differ in float32: {differ} of {len(y)}")
    for precision in ("float32", "bfloat16"):
        ours = f"robustsoup, {precision}"
        print(
            f"{precision}: {ratio(times, ours, f'limit, {precision}'):.2f} x the limit; "
            f"{ratio(times, best, ours):.2f} x as fast as pyautoattack"
        )


if __name__ == "__main__":
    main()

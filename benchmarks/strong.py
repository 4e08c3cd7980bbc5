"""Compare the attack "strong" with standard AutoAttack: misses either way, and time.

Four small networks, trained once and cached: robust ones on digits and CIFAR-10, and the one on
digits behind two ways of masking gradients. Times are seconds of the processor, in one thread, so
that other work on the machine counts little. Without --parts the whole table takes about ten
minutes.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import LINF, Workload, describe_machine, freeze, parse_arguments
from torch import Tensor, nn

import robustsoup as rs
from robustsoup.data import Split

EVALUATED_AT = {"digits": rs.ThreatModel("Linf", 32 / 255), "cifar10": LINF}
"""Radii that leave about half of the samples that are right without an attack."""
DIGITS = Workload("digits", "resnet9:width=8", rs.ThreatModel("Linf", 24 / 255), 15, 1, None)
CIFAR = Workload("cifar10", "resnet9:width=8", LINF, 5, 1, 8000)
TINY = Workload("digits", "resnet9:width=2", rs.ThreatModel("Linf", 24 / 255), 2, 1, 768)


class Masked(nn.Module):
    """A network that masks its gradients, by rounded inputs or by the scale of its logits.

    Args:
        network: The network.
        levels: Levels that inputs are rounded to, which leaves no gradient; 0 for no rounding.
        scale: Factor of the logits; a large one makes softmax exact, so its gradient vanishes.
    """

    def __init__(self, network: nn.Module, *, levels: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.network, self.levels, self.scale = network, levels, scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        if self.levels:
            x = (x * self.levels).round() / self.levels
        return self.scale * self.network(x)


@dataclass(frozen=True)
class Case:
    """One network of the comparison."""

    name: str
    network: nn.Module
    split: Split
    threat: rs.ThreatModel


def make_cases(options: argparse.Namespace) -> list[Case]:
    """Train the networks, or load them, and return the comparisons in the order of the table."""
    digits, cifar = (TINY, TINY) if options.small else (DIGITS, CIFAR)
    cases = []
    for task, samples in ((digits, options.digits), (cifar, options.cifar)):
        network = freeze(task.train_ingredient(8).network())
        split = task.load_data().test.first(samples)
        cases.append(Case(task.data_name, network, split, EVALUATED_AT[task.data_name]))
    first = cases[0]
    masks = {
        "digits, inputs rounded": Masked(first.network, levels=255),
        "digits, logits times 10,000": Masked(first.network, scale=1e4),
    }
    return cases + [
        Case(name, freeze(network), first.split, first.threat) for name, network in masks.items()
    ]


def time_attack(work: Callable[[], rs.Evaluation]) -> tuple[rs.Evaluation, float]:
    """Return an evaluation and the seconds of the processor that it took."""
    started = time.process_time()
    return work(), time.process_time() - started


def count_broken_by(evaluation: rs.Evaluation, threat: str) -> str:
    """Return how many samples each part of an attack broke, as text."""
    names, by = evaluation.record["broken_by"], evaluation.threats[threat].by
    counts: dict[str, int] = {}
    for index, name in enumerate(names[1:], start=1):
        part = name.split(" restart")[0]
        counts[part] = counts.get(part, 0) + int((by == index).sum())
    return ", ".join(f"{part} {count}" for part, count in counts.items() if count)


def compare(case: Case, options: argparse.Namespace) -> None:
    """Run both attacks on one network, and print a row of the table."""
    threat, chosen = str(case.threat), {"masking_check": False, "seed": options.seed}
    attack = partial(rs.evaluate, case.network, case.split, [threat], device="cpu", **chosen)
    short = {"steps": 5, "n_queries": 20} if options.small else {}
    ours, our_seconds = time_attack(lambda: attack(attack="strong", precision="auto", **short))
    referee = "apgd" if options.small else "autoattack"
    theirs, their_seconds = time_attack(lambda: attack(attack=referee))
    robust = [evaluation.threats[threat].robust for evaluation in (ours, theirs)]
    missed, gained = (int((a & ~b).sum()) for a, b in (robust, robust[::-1]))
    columns = [
        case.name,
        threat,
        len(case.split),
        f"{100 * float((ours.prediction == ours.labels).float().mean()):.1f} %",
        *(f"{100 * float(r.float().mean()):.1f} %" for r in robust),
        missed,
        gained,
        f"{our_seconds:.1f} s",
        f"{their_seconds:.1f} s",
        f"{their_seconds / our_seconds:.1f}",
        count_broken_by(ours, threat),
        count_broken_by(theirs, threat),
    ]
    print("| " + " | ".join(map(str, columns)) + " |", flush=True)


def main() -> None:
    """Print the table."""
    options = parse_arguments(__doc__, digits=300, cifar=200, seed=0)
    referee = "apgd, for speed" if options.small else "AutoAttack"
    if options.small:
        options.digits = options.cifar = 16
    torch.set_num_threads(1)
    print(
        f"{describe_machine()}\nseed {options.seed}; strong searches in "
        f"{rs.AttackSettings(attack='strong').steps} steps, precision auto\n\n"
        f"| network | threat | images | clean | robust: strong | {referee} | strong misses "
        "| referee misses | strong takes | referee takes | times as fast "
        "| strong breaks by | referee breaks by |\n" + "|---" * 13 + "|"
    )
    for case in make_cases(options):
        compare(case, options)


if __name__ == "__main__":
    main()

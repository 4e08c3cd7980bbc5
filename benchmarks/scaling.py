"""Simulate a grid of soups on 1 to 512 workers, with step times measured on this machine.

    python benchmarks/scaling.py --soups 21 --samples 50000 --steps 100 --part-samples 2000

The plan has one evaluation for each soup, divided into parts as `robustsoup run --ray` divides
them; its own step, which joins the parts, takes a clean pass and the check for masked gradients
(5 % of the attack). The seconds of a pass are measured here, and calculated for ViT-B/16 at 224
pixels on H100s (17.6 billion multiply-adds a pass at the rate of `robustsoup plan --device h100`).
Losses: each worker is lost once in `--hours-between-losses` hours of work.
"""

from dataclasses import replace

import torch
from common import CPU, describe_machine, parse_arguments, workload

from robustsoup.models import NetworkSettings
from robustsoup.runs.context import Context
from robustsoup.runs.cost import ATTACK_STEP_FRACTION, measure_pass_seconds
from robustsoup.runs.plan import Step
from robustsoup.runs.scaling import RATES, simulate
from robustsoup.runs.tasks import DoPart, EvaluateNetwork, EvaluationSettings
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

VIT_B_OPERATIONS = 2 * 17.6e9
MASKING_SHARE = 0.05
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STARTING_SECONDS = 10.0
"""Seconds in which a worker loads PyTorch, the data and a checkpoint; an assumption."""


def plan_grid(
    soups: int, samples: int, steps: int, part_samples: int, pass_seconds: float
) -> tuple[list[Step], dict[str, float]]:
    """Return the steps of the evaluations of a grid, and the seconds of each."""
    attack = AttackSettings(steps=steps)
    settings = EvaluationSettings("test", samples, (ThreatModel("Linf", 0.01),), attack)
    of_attack = samples * attack.most_passes(10) * ATTACK_STEP_FRACTION * pass_seconds
    count = max(samples // part_samples, 1)
    plan, seconds = [], {}
    for soup in range(soups):
        task = EvaluateNetwork(f"file:{soup}", settings)
        parts = [f"{soup}.{number}" for number in range(count)]
        for number, key in enumerate(parts):
            plan.append(Step(key, key, DoPart(task, number, count), 0))
            seconds[key] = (samples * pass_seconds + of_attack) / count
        plan.append(Step(str(soup), str(soup), replace(task, parts=tuple(parts)), 0))
        seconds[str(soup)] = samples * pass_seconds + MASKING_SHARE * of_attack
    return plan, seconds


def print_curve(title: str, plan: list[Step], seconds: dict[str, float], hours: int) -> None:
    """Print hours and efficiency for each number of workers, without and with losses."""
    print(f"\n{title}: {len(plan)} steps, {sum(seconds.values()) / 3600:.3g} hours of work\n")
    print("| workers | hours | efficiency | with losses | efficiency |")
    print("|---|---|---|---|---|")
    for workers in WORKERS:
        runs = [
            simulate(plan, seconds, workers, overhead=STARTING_SECONDS, losses_per_hour=rate)
            for rate in (0.0, 1 / hours)
        ]
        cells = [f"{run.seconds / 3600:.3g} | {run.efficiency:.0%}" for run in runs]
        print(f"| {workers} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the curves."""
    arguments = parse_arguments(
        __doc__,
        **{"soups": 21, "samples": 50_000, "steps": 100, "part-samples": 2000},
        **{"hours-between-losses": 24},
    )
    torch.set_num_threads(1)
    work = workload(small=arguments.small)
    data = work.load_data()
    record = data.record
    network = NetworkSettings(work.model, data.test.classes, record["channels"], None)
    here = measure_pass_seconds(Context(data, network, CPU), "float32")
    rate = RATES["h100"].operations["bfloat16"]
    sizes = (arguments.soups, arguments.samples, arguments.steps, arguments.part_samples)
    print(describe_machine())
    curves = {
        f"{work.model}, {1e6 * here:.0f} us a pass in float32, measured here": here,
        "ViT-B/16 on H100s in bfloat16, a calculation": VIT_B_OPERATIONS / rate,
    }
    for title, pass_seconds in curves.items():
        print_curve(title, *plan_grid(*sizes, pass_seconds), arguments.hours_between_losses)


if __name__ == "__main__":
    main()

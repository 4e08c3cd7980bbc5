"""What the benchmarks share: the robust network and images they time on, and how times are told."""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import robustsoup as rs
from robustsoup.recipes import load_recipe
from robustsoup.runs.run import prepare
from robustsoup.runs.store import Store

RECIPE = Path(__file__).parent.parent / "recipes" / "two_cores" / "eps_soups.toml"
LINF = rs.ThreatModel("Linf", 8 / 255)
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a 95 % interval over so many seeds."""


def arguments(description: str, **defaults: int) -> argparse.Namespace:
    """Numbers that can be changed on the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def checkpoint(name: str) -> rs.Checkpoint:
    """A checkpoint of the small recipe, from the store."""
    prepared = prepare(load_recipe(RECIPE))
    key = next(
        step.key
        for step in prepared.plan.steps
        if step.name == name and step.kind in ("pretrain", "finetune")
    )
    store = Store()
    if not store.has(key):
        sys.exit(f"{name} is not in the store; first run: robustsoup run {RECIPE}")
    return rs.Checkpoint.load(store.path(key) / "checkpoint.safetensors")


def images(n: int) -> tuple[Tensor, Tensor]:
    """The first n test images of CIFAR-10 as float32 in [0, 1], NCHW, and their labels."""
    test = rs.load_data("cifar10").test.first(n)
    return test.images.float() / 255, test.labels


def frozen(network: nn.Module) -> nn.Module:
    """In eval mode and without gradients for weights, as every tool is given it."""
    return network.eval().requires_grad_(False)


def ratio(times: dict[str, list[float]], of: str, to: str) -> float:
    """Median of `of` over median of `to`."""
    return statistics.median(times[of]) / statistics.median(times[to])


def table(times: dict[str, list[float]], extra: Callable[[str], str] = lambda name: "") -> None:
    """A row for each: median, least and most seconds."""
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"| {name} | {median:.3g} s [{min(values):.3g}, {max(values):.3g}] | {extra(name)} |",
            flush=True,
        )


def machine() -> str:
    """One line on what this ran on."""
    lines = subprocess.run(
        ["lscpu"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    cpu = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("Model name")),
        platform.processor(),
    )
    peers = []
    for name in ("pyautoattack", "torchattacks"):
        try:
            peers.append(f"{name} {version(name)}")
        except ImportError:
            continue
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    own = f"Python {platform.python_version()}, torch {torch.__version__}, robustsoup {version('robustsoup')}"
    return f"{cpu}, {threads}; {own}, {', '.join(peers)}"

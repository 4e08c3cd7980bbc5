"""Shared parts of the benchmark scripts: robust networks, images, tables and ratios.

The scripts require no prepared files: networks are trained once, with a progress bar, and cached in
the user's cache folder. With --small, a script runs in seconds on the embedded digits, to show that
it works; its times are then meaningless.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustsoup as rs
from robustsoup.data import Data, Split
from robustsoup.device import resolve_precision
from robustsoup.files import cache_folder

RECIPES = Path(__file__).parent.parent / "recipes" / "two_cores"
LINF = rs.ThreatModel("Linf", 8 / 255)
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t for a 95 % interval, of 2 to 10 seeds."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workload:
    """The data, network and training that a benchmark times on."""

    data_name: str
    model: str
    threat: rs.ThreatModel
    pretrain_epochs: int
    finetune_epochs: int
    pretrain_samples: int | None

    def load_data(self) -> Data:
        """Load the data set."""
        return rs.load_data(self.data_name)

    def train_base(self) -> rs.Checkpoint:
        """Return an adversarially trained network; trained on the first call, then cached."""
        data = self.load_data()
        return self._train_once(
            "pretrained",
            lambda: rs.load_model(
                self.model,
                channels=data.record["channels"],
                mean=data.record["mean"],
                std=data.record["std"],
            ),
            data.train.first(self.pretrain_samples),
            threat=self.threat,
            epochs=self.pretrain_epochs,
            lr=0.1,
        )

    def train_ingredient(self, eps: int) -> rs.Checkpoint:
        """Return the base fine-tuned at Linf eps/255; trained on the first call, then cached."""
        base = self.train_base()
        return self._train_once(
            f"eps{eps}",
            lambda: base,
            self.load_data().train.first(self.pretrain_samples),
            threat=rs.ThreatModel("Linf", self.threat.eps * eps / 8),
            epochs=self.finetune_epochs,
            lr=0.02,
        )

    def _train_once(
        self,
        name: str,
        start: Callable[[], nn.Module | rs.Checkpoint],
        train: Split,
        *,
        threat: rs.ThreatModel,
        epochs: int,
        lr: float,
    ) -> rs.Checkpoint:
        label = f"{self.data_name}-{self.model}-{self.pretrain_epochs}".replace(":", "-")
        if self.pretrain_samples:
            label += f"-{self.pretrain_samples}"
        path = cache_folder() / "benchmarks" / label / f"{name}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            state = path.with_suffix(".state.pt")
            trained = rs.train(
                start(),
                train,
                threat=threat,
                epochs=epochs,
                lr=lr,
                state_path=state,
                on_progress=print_progress(f"training {name} of {self.model} once"),
            )
            trained.save(path)
            state.unlink(missing_ok=True)
        return rs.Checkpoint.load(path)


def two_convolutions(*, channels: int = 3, pixels: int = 32, classes: int = 10) -> nn.Module:
    """Return a network of two convolutions with 16 and 32 channels."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (pixels // 4) ** 2, classes)),
    )


FULL = Workload("cifar10", "resnet9:width=16", LINF, 12, 2, None)
SMALL = Workload("digits", "resnet9:width=4", rs.ThreatModel("Linf", 16 / 255), 3, 1, 768)


def write_small_recipe(name: str, folder: Path) -> Path:
    """Write recipes/two_cores/NAME.toml for digits and a tiny network; return the new recipe.

    Only sizes differ from the recipe: one epoch, two attack steps, few samples and points.
    """
    import tomli_w

    recipe = RECIPES / f"{name}.toml"
    folder.mkdir(parents=True, exist_ok=True)
    small = folder / "small.toml"
    small.write_text(tomli_w.dumps({"extends": str(recipe), **shrink(read_toml(recipe))}))
    return small


def run_recipe_small(name: str, folder: Path) -> Path:
    """Run a recipe that `write_small_recipe` writes; return the run folder."""
    small = write_small_recipe(name, folder)
    command = [sys.executable, "-m", "robustsoup", "run", str(small), "-o", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: no soup met the requirement
        sys.exit(f"{name}: {done.stderr}")
    return folder


def read_step_seconds() -> dict[str, float]:
    """Return the seconds of merges, learning and evaluations in the store, by digest of output."""
    from robustsoup.runs.store import Store
    from robustsoup.runs.worker import CHECKPOINT, COEFFICIENTS, EVALUATION

    store = Store()
    outputs = {"merge": CHECKPOINT, "learn": COEFFICIENTS, "evaluate": EVALUATION}
    return {
        store.digest_of(key, outputs[record["kind"]]).sha256: record["seconds"]
        for key in store.keys()  # noqa: SIM118, a store is no mapping
        if (record := store.record(key))["kind"] in outputs
    }


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a recipe and of the recipe that it extends."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    if "extends" not in content:
        return content
    base = read_toml(path.parent / content.pop("extends"))
    tables = {key: base.get(key, {}) | value for key, value in content.items() if is_table(value)}
    return base | content | tables


def is_table(value: object) -> bool:
    """Return whether a TOML value is a table."""
    return isinstance(value, dict)


def shrink(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that make a recipe run in seconds on digits."""
    learns = ("learned", "dial")
    soups = {
        name: ({"epochs": 1} if soup["method"] in learns else {})
        | ({"step": 0.5} if soup["method"] == "grid" else {})
        | ({"measure_samples": 32} if soup["method"] in ("fisher", "regmean") else {})
        | {"calibrate_samples": 64}
        for name, soup in recipe.get("soups", {}).items()
    }
    planes = {
        name: {"points": 4, "samples": 16, "calibrate_samples": 64, "attack_steps": 1}
        for name in recipe.get("planes", {})
    }
    return {
        "data": "digits",
        "model": "wide_resnet:depth=10,width=1" if "wide" in recipe["name"] else "resnet9:width=2",
        "pretrain": {"epochs": 3, "early_stop": False},
        "finetune": {"epochs": 1},
        "evaluate": {"steps": 2, "select_samples": 60, "report_samples": 60},
        **({"soups": soups} if soups else {}),
        **({"planes": planes} if planes else {}),
    }


def print_progress(title: str) -> Callable[[int, int, str], None]:
    """Return an on_progress callback that keeps one line of standard error up to date."""
    from robustsoup.cli.progress import Bar

    bar = Bar(title)
    bar.__enter__()

    def update(done: int, total: int, figures: str) -> None:
        bar(done, total, figures)
        if done == total:
            bar.__exit__(None, None, None)

    return update


def parse_arguments(description: str | None, **defaults: int) -> argparse.Namespace:
    """Parse --small, and one integer option for each default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument(
        "--small", action="store_true", help="run in seconds on digits; the times are meaningless"
    )
    return parser.parse_args()


def workload(*, small: bool) -> Workload:
    """Return the data, network and training to time on."""
    return SMALL if small else FULL


def first_images(split: Split, n: int) -> tuple[Tensor, Tensor]:
    """Return the first n images as float32 (n, c, h, w) in [0, 1], and their labels (n,)."""
    part = split.first(min(n, len(split)))
    return part.images.float() / 255, part.labels


def freeze(network: nn.Module) -> nn.Module:
    """Put a network in eval mode without gradients for its weights, as attack tools expect it."""
    return network.eval().requires_grad_(False)


def channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor in channels_last memory format."""
    return tensor.contiguous(memory_format=torch.channels_last)


def half_interval(values: Sequence[float]) -> float:
    """Return half the 95 % interval of Student's t around the mean of 2 to 10 values."""
    n = len(values)
    if not 2 <= n <= len(T95) + 1:
        sys.exit(f"got {n} seeds, expected 2 to {len(T95) + 1}")
    return T95[n - 2] * statistics.stdev(values) / math.sqrt(n)


class StepTimer:
    """An on_progress callback that records the seconds between steps, without the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def __call__(self, done: int, total: int, figures: str) -> None:
        """Record the time since the step before."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def ratio(times: dict[str, list[float]], of: str, to: str) -> float:
    """Return the median time of `of` over that of `to`."""
    return statistics.median(times[of]) / statistics.median(times[to])


def print_times(
    times: dict[str, list[float]], extra: Callable[[str], str] = lambda name: ""
) -> None:
    """Print a table row for each name: median, minimum and maximum seconds."""
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"| {name} | {median:.3g} s [{min(values):.3g}, {max(values):.3g}] | {extra(name)} |",
            flush=True,
        )


def describe_machine() -> str:
    """Return one line about the processor, the threads and the versions."""
    try:
        listing = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    except OSError:
        listing = ""
    models = [line.split(":")[1].strip() for line in listing.splitlines() if "Model name" in line]
    cpu = models[0] if models else platform.processor() or platform.machine()
    bf16 = "" if resolve_precision("auto", CPU) == "bfloat16" else "no "
    packages = f"torch {torch.__version__}, robustsoup {version('robustsoup')}"
    peers = [
        f"{name} {peer_version}"
        for name in ("pyautoattack", "torchattacks")
        if (peer_version := installed_version(name))
    ]
    return (
        f"{cpu} ({torch.backends.cpu.get_cpu_capability()}, {bf16}native bfloat16), "
        f"{torch.get_num_threads()} threads on {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, {', '.join([packages, *peers])}"
    )


def installed_version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def make_near_copies(folder: Path, n: int, model: str, *, channels: int = 3) -> list[Path]:
    """Write n checkpoints near one network, at distances typical of fine-tuned networks.

    Each weight is moved by about a tenth of its size. How long a step of learning takes does not
    depend on the values of the weights.
    """
    base = rs.load_model(model, channels=channels)
    paths = []
    for seed in range(n):
        near = rs.Checkpoint.of(base)
        generator = torch.Generator().manual_seed(seed)
        for name in near.parameters:
            noise = torch.randn(near.tensors[name].shape, generator=generator)
            near.tensors[name].mul_(1 + 0.1 * noise)
        paths.append(near.save(folder / f"{seed}.safetensors"))
    return paths

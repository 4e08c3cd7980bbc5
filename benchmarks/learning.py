"""A step of a learned soup: against a step of adversarial training, and against the paper's way of mixing in the graph.

    python benchmarks/learning.py [--ingredients 72] [--width 64] [--batch 128] [--rounds 5] [--folder /tmp/soup72]

resnet18 on CIFAR-10 shapes, APGD-2, one softmax a parameter, detach 0.8. The paper's way keeps all ingredients stacked in
memory and mixes them by einsum and functional_call in every forward pass, those of the attack too. It is given our attack on
the whole batch, no gradient to the coefficients inside the attack, and the same precision. Every step is taken in turn.
`--folder` is where the ingredients' files are made (45 MB each at width 64); they are removed at the end.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from common import LINF, machine, ratio, table
from torch import nn
from torch.func import functional_call

import robustsoup as rs
from robustsoup.attacks.apgd import _highest_loss
from robustsoup.attacks.forward import frozen_eval
from robustsoup.attacks.losses import ce
from robustsoup.device import autocast, resolve_precision
from robustsoup.soups import learning
from robustsoup.training.objectives import Objective
from robustsoup.training.train import _Run as Training

CPU = torch.device("cpu")


def make_ingredients(folder: Path, n: int, width: int) -> list[Path]:
    """n files near one resnet18, as far apart as fine-tuned ones: each weight moved by about a tenth of its size."""
    base = rs.load_model(f"resnet18:width={width}")
    paths = []
    for seed in range(n):
        near = rs.Checkpoint.of(base)
        generator = torch.Generator().manual_seed(seed)
        for name in near.parameters:
            near.tensors[name].mul_(
                1 + 0.1 * torch.randn(near.tensors[name].shape, generator=generator)
            )
        paths.append(near.save(folder / f"{seed}.safetensors"))
    return paths


class Stacked(nn.Module):
    """The paper's way: all ingredients in one module, mixed in every forward pass."""

    def __init__(self, paths: list[Path], precision: str) -> None:
        super().__init__()
        items = [rs.Checkpoint.load(path) for path in paths]
        self.network = items[0].network()
        self.names = items[0].parameters
        self.stacks = [torch.stack([item.tensors[name] for item in items]) for name in self.names]
        self.logits = nn.ParameterList(torch.randn(len(paths)) for _ in self.names)
        self.velocity = [torch.zeros(len(paths)) for _ in self.names]
        self.precision = precision

    def forward(self, x: torch.Tensor, alphas: list[torch.Tensor] | None = None) -> torch.Tensor:
        """x (b, c, h, w) -> logits (b, classes)."""
        alphas = alphas or [torch.softmax(logits, 0) for logits in self.logits]
        with torch.autocast("cpu", enabled=False):
            pairs = zip(alphas, self.stacks, strict=True)
            theta = dict(
                zip(self.names, (torch.einsum("n,n...->...", a, s) for a, s in pairs), strict=True)
            )
        return functional_call(self.network, theta, (x,))

    def take_step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Attack, one train-mode pass, SGD with momentum on the layers that are not detached."""
        self.network.eval()
        with frozen_eval(self):
            x_adv = _highest_loss(self, x, y, LINF, 2, ce, self.precision)
        self.network.train()
        active = [bool(torch.rand(()) >= 0.8) for _ in self.names]
        alphas = [
            torch.softmax(logits if wanted else logits.detach(), 0)
            for logits, wanted in zip(self.logits, active, strict=True)
        ]
        with autocast(CPU, self.precision):
            logits = self(x_adv, alphas)
        ce(logits, y).mean().backward()
        with torch.no_grad():
            for i, logits in enumerate(self.logits):
                if logits.grad is not None:
                    self.velocity[i] = 0.9 * self.velocity[i] + logits.grad
                    logits -= 10 * self.velocity[i]
                    logits.grad = None


def ours(paths: list[Path], place: str, batch: int):
    """One learning run, ready to take steps."""
    settings = learning._settings(
        threat=LINF,
        objective="ce",
        attack_steps=2,
        epochs=30,
        batch_size=batch,
        lr=10.0,
        momentum=0.9,
        schedule="constant",
        detach=0.8,
        init="xavier",
        granularity="parameter",
        buffers="tracked",
        early_stop=False,
        early_stop_steps=1,
        seed=0,
    )
    data = rs.load_data("cifar10").train.first(batch * 100)
    return learning._start(
        paths, data, None, settings, None, None, place, None, True, "cpu", "auto"
    )


def training(path: Path, batch: int):
    """One adversarial fine-tuning run, ready to take steps."""
    network = rs.Checkpoint.load(path).network().to(memory_format=torch.channels_last)
    settings = {
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "batch_size": batch,
        "schedule": "constant",
        "epochs": 30,
        "attack_steps": 2,
        "precision": resolve_precision("auto", CPU),
        "early_stop": False,
    }
    data = rs.load_data("cifar10").train.first(batch * 100)
    return Training(network, data, None, LINF, Objective(), settings)


def main() -> None:
    """Take steps in turn, print medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"ingredients": 72, "width": 64, "batch": 128, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/soup72"))
    asked = parser.parse_args()
    n, batch = asked.ingredients, asked.batch
    try:
        paths = make_ingredients(asked.folder, n, asked.width)
        precision = resolve_precision("auto", CPU)
        runs = {
            "adversarial training": training(paths[0], batch),
            "learned, 3 resident": ours(paths[:3], "memory", batch),
            f"learned, {n} from files": ours(paths, "files", batch),
            "paper's way, 3": Stacked(paths[:3], precision),
            f"paper's way, {n}": Stacked(paths, precision),
        }
        train = rs.load_data("cifar10").train
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(asked.rounds + 1):
            x = (train.images[number * batch : (number + 1) * batch] / 255).contiguous(
                memory_format=torch.channels_last
            )
            y = train.labels[number * batch : (number + 1) * batch]
            for name, run in runs.items():
                started = time.perf_counter()
                run.take_step(x, y)
                if number:
                    times[name].append(time.perf_counter() - started)
                if not isinstance(run, Stacked):
                    run.step += 1
    finally:
        shutil.rmtree(asked.folder, ignore_errors=True)
    print(
        f"{machine()}\nresnet18:width={asked.width}, batch {batch}, {LINF}, {precision}, {asked.rounds} steps each in turn\n"
    )
    print("| | a step | of adversarial training's |\n|---|---|---|")
    table(times, lambda name: f"{ratio(times, name, 'adversarial training'):.2f} x")
    for mine, theirs in (
        ("learned, 3 resident", "paper's way, 3"),
        (f"learned, {n} from files", f"paper's way, {n}"),
    ):
        print(f"\n{mine}: {ratio(times, theirs, mine):.2f} x as fast as {theirs}")


if __name__ == "__main__":
    main()

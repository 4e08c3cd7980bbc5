"""A step of a learned soup: against a step of adversarial training, and against the paper's way.

    python benchmarks/learning.py [--ingredients 72] [--width 64] [--batch 128] [--rounds 5]
                                  [--steps 3] [--small]

resnet18 on CIFAR-10 shapes, APGD-2, one softmax for each parameter, detach 0.8. The paper's way
keeps all ingredients stacked in memory and mixes them by einsum and functional_call in every
forward pass, those of the attack too. It gets the same attack (APGD-2 from x) on the whole batch,
no gradient to the coefficients inside the attack, and the same precision. Rounds alternate between
all ways.
The ingredients (45 MB each at width 64) are made in a temporary folder and removed at the end.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import (
    CPU,
    LINF,
    StepTimer,
    channels_last,
    describe_machine,
    make_near_copies,
    parse_arguments,
    print_times,
    ratio,
)
from torch import Tensor, nn
from torch.func import functional_call

import robustsoup as rs
from robustsoup.attacks.losses import ce
from robustsoup.data import Split
from robustsoup.device import autocast, resolve_precision


class StackedSoup(nn.Module):
    """The paper's way: all ingredients in one module, mixed in every forward pass."""

    def __init__(self, paths: Sequence[Path], precision: str) -> None:
        super().__init__()
        items = [rs.Checkpoint.load(path) for path in paths]
        self.network = items[0].network()
        self.names = items[0].parameters
        self.stacks = [torch.stack([item.tensors[name] for item in items]) for name in self.names]
        self.logits = nn.ParameterList(torch.randn(len(paths)) for _ in self.names)
        self.velocity = [torch.zeros(len(paths)) for _ in self.names]
        self.precision = precision

    def forward(self, x: Tensor, alphas: Sequence[Tensor] | None = None) -> Tensor:
        """Map x (b, c, h, w) to logits (b, classes)."""
        alphas = alphas or [torch.softmax(logits, 0) for logits in self.logits]
        with torch.autocast("cpu", enabled=False):
            weights = [
                torch.einsum("n,n...->...", alpha, stack)
                for alpha, stack in zip(alphas, self.stacks, strict=True)
            ]
        return functional_call(self.network, dict(zip(self.names, weights, strict=True)), (x,))

    def attack(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the points of highest loss of APGD-2 from x (b, c, h, w)."""
        self.network.eval()
        alphas = [torch.softmax(logits.detach(), 0) for logits in self.logits]
        low, high = (x - LINF.eps).clamp(0, 1), (x + LINF.eps).clamp(0, 1)
        point = best = before = x
        best_loss = torch.full((len(x),), -torch.inf)
        for number in range(3):
            point = point.detach().requires_grad_(number < 2)
            with torch.set_grad_enabled(number < 2), autocast(CPU, self.precision):
                loss = ce(self(point, alphas), y)
            rises = loss.detach() > best_loss
            best = torch.where(rises.view(-1, 1, 1, 1), point.detach(), best)
            best_loss = torch.maximum(best_loss, loss.detach())
            if number < 2:
                (gradient,) = torch.autograd.grad(loss.sum(), point)
                current = point.detach()
                ahead = (current + 2 * LINF.eps * gradient.sign()).clamp(low, high)
                mixed = current + 0.75 * (ahead - current) + 0.25 * (current - before)
                point, before = (mixed if number else ahead).clamp(low, high), current
        return best

    def take_step(self, x: Tensor, y: Tensor) -> None:
        """Attack, one train-mode pass, SGD with momentum on the layers that are not detached."""
        x_adv = self.attack(x, y)
        self.network.train()
        active = [bool(torch.rand(()) >= 0.8) for _ in self.names]
        alphas = [
            torch.softmax(logits if learns else logits.detach(), 0)
            for logits, learns in zip(self.logits, active, strict=True)
        ]
        with autocast(CPU, self.precision):
            logits = self(x_adv, alphas)
        if any(active):
            ce(logits, y).mean().backward()
        with torch.no_grad():
            for i, parameter in enumerate(self.logits):
                if parameter.grad is not None:
                    self.velocity[i] = 0.9 * self.velocity[i] + parameter.grad
                    parameter -= 10 * self.velocity[i]
                    parameter.grad = None


def make_data(samples: int) -> Split:
    """Return training images with CIFAR-10's shape; how long a step takes ignores their values."""
    from robustsoup.data.splits import Augmentation, DataDescription, Samples, assemble

    generator = torch.Generator().manual_seed(0)

    def draw(n: int, first: int) -> Samples:
        shape = (n, 3, 32, 32)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (n,), generator=generator)
        return Samples(images, labels, torch.arange(first, first + n))

    classes = tuple(str(number) for number in range(10))
    description = DataDescription(
        "noise", "0" * 64, classes, (0.5,) * 3, (0.25,) * 3, Augmentation()
    )
    parts = draw(samples, 0), draw(10, samples), draw(10, samples + 10)
    return assemble(description, *parts, seed=0).train


def main() -> None:
    """Take steps in turn, print medians and ratios."""
    options = parse_arguments(__doc__, ingredients=72, width=64, batch=128, rounds=5, steps=3)
    if options.small:
        options.ingredients, options.width, options.batch, options.rounds = 4, 8, 16, 1
    n, batch, steps = options.ingredients, options.batch, options.steps
    model = f"resnet18:width={options.width}"
    data = make_data(batch * (steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        paths = make_near_copies(Path(folder), n, model)
        precision = resolve_precision("auto", CPU)
        few, many = StackedSoup(paths[:3], precision), StackedSoup(paths, precision)
        common = {"threat": LINF, "epochs": 1, "batch_size": batch, "schedule": "constant"}

        def train(timer: StepTimer) -> None:
            rs.train(paths[0], data, lr=0.01, device="cpu", on_progress=timer, **common)

        def learn(timer: StepTimer, count: int, place: str) -> None:
            rs.learn(
                paths[:count],
                data,
                place=place,
                allow_leakage=True,
                device="cpu",
                on_progress=timer,
                **common,
            )

        def step_stacked(timer: StepTimer, soup: StackedSoup) -> None:
            for number in range(steps + 1):
                part = slice(number * batch, (number + 1) * batch)
                soup.take_step(channels_last(data.images[part] / 255), data.labels[part])
                timer(number, steps, "")

        ways: dict[str, Callable[[StepTimer], None]] = {
            "adversarial training": train,
            "learned, 3 in memory": lambda timer: learn(timer, 3, "memory"),
            f"learned, {n} from files": lambda timer: learn(timer, n, "files"),
            "paper's way, 3": lambda timer: step_stacked(timer, few),
            f"paper's way, {n}": lambda timer: step_stacked(timer, many),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        started = time.perf_counter()
        for _ in range(options.rounds):
            for name, way in ways.items():
                timer = StepTimer()
                way(timer)
                times[name].append(statistics.median(timer.seconds))
    print(
        f"{describe_machine()}\n{model}, batch {batch}, {LINF}, {precision}, {options.rounds} "
        f"rounds of {steps} steps each in turn, {time.perf_counter() - started:.0f} s in all\n\n"
        "| | a step | relative to adversarial training |\n|---|---|---|"
    )
    print_times(times, lambda name: f"{ratio(times, name, 'adversarial training'):.2f} x")
    for ours, peer in (
        ("learned, 3 in memory", "paper's way, 3"),
        (f"learned, {n} from files", f"paper's way, {n}"),
    ):
        print(f"\n{ours}: {ratio(times, peer, ours):.2f} x as fast as {peer}")


if __name__ == "__main__":
    main()

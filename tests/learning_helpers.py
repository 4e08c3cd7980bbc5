"""Small networks near one another and short learning runs, for tests."""

from typing import Any

import torch
from ingredients import perturbed
from torch import Tensor, nn
from trained_seed import trained_seed
from training_helpers import DATA, LINF, fresh_network

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.learning import learn

LAYERS = 25
"""Parameters of the small resnet9."""


class SmallNetwork(nn.Module):
    """Two convolutions with BatchNorm that compute in float64 whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (b, 10)."""
        x = nn.functional.silu(self.norm1(self.conv1(x.double())))
        return self.linear(nn.functional.silu(self.norm2(self.conv2(x))).mean((2, 3)))


class NetworkWithoutNorm(SmallNetwork):
    """The convolutions of a SmallNetwork, whose images do not depend on one another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Identity(), nn.Identity()


def small_ingredients(
    n: int = 3, kind: type[SmallNetwork] = SmallNetwork
) -> tuple[SmallNetwork, list[Checkpoint]]:
    """Return a SmallNetwork and n checkpoints near it."""
    torch.manual_seed(trained_seed())
    base = kind()
    return base, [perturbed(base, trained_seed(seed)) for seed in range(n)]


def resnet_ingredients(n: int = 3) -> list[Checkpoint]:
    """Return n checkpoints near one small resnet9."""
    base = fresh_network()
    return [perturbed(base, trained_seed(seed), 0.1) for seed in range(n)]


def learn_digits(items=None, data: Split = DATA, **changes: Any) -> Coefficients:
    """Learn for two epochs of three steps; `changes` are arguments of `learn`."""
    arguments = {
        "threat": LINF,
        "epochs": 2,
        "batch_size": 32,
        "device": "cpu",
        "precision": "float32",
        "detach": 0.5,
        "seed": trained_seed(),
    }
    return learn(items or resnet_ingredients(), data, **(arguments | changes))


def assert_same_coefficients(a: Coefficients, b: Coefficients) -> None:
    """Check that alpha and the tracked statistics are equal bit for bit."""
    assert torch.equal(a.alpha, b.alpha)
    assert a.tracked.keys() == b.tracked.keys()
    for name, tensor in a.tracked.items():
        assert torch.equal(tensor, b.tracked[name]), name


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    return float((got - expected).norm() / expected.norm())

"""Three networks that mask their gradients and three honest ones: flagged and not flagged."""

import pytest
import torch
from digits import digits_network
from torch import nn

from robustsoup.data import load_data
from robustsoup.evaluation.evaluate import evaluate

THREATS = ("Linf 24/255", "L2 0.8")


class Front(nn.Module):
    """A network behind a function of its inputs."""

    def __init__(self, network, before):
        super().__init__()
        self.network, self.before = network, before

    def forward(self, x):
        return self.network(self.before(x))


MASKED = {
    "reversed gradients": lambda x: 2 * x.detach() - x,
    "shattered gradients": lambda x: x + 1e-4 * torch.sin(1e7 * x),
    "no gradients": lambda x: (255 * x).round() / 255,
}
HONEST = {
    "a trained network": lambda x: x,
    "a normalisation in front": lambda x: (x - 0.3) / 0.5 * 0.5 + 0.3,
    "a straight-through rounding": lambda x: x + ((2048 * x).round() / 2048 - x).detach(),
}


@pytest.fixture(scope="module")
def network():
    """A small network that classifies digits."""
    return digits_network(8, steps=150)


def find_masking(network, before, threat):
    """Return the warnings of an evaluation behind a function of the inputs."""
    split = load_data("digits").test.first(200)
    return evaluate(Front(network, before).eval(), split, [threat], steps=20).warnings


def test_masked_networks_are_flagged(network, tally_of):
    tally = tally_of("masked networks (silent: not flagged)")
    for name, before in MASKED.items():
        for threat in THREATS:
            tally.count()
            if not find_masking(network, before, threat):
                tally.silent.append(f"{name}, {threat}")
    tally.check()


def test_honest_networks_are_not_flagged(network, tally_of):
    tally = tally_of("honest networks (lost: flagged)")
    for name, before in HONEST.items():
        for threat in THREATS:
            tally.count()
            if warnings := find_masking(network, before, threat):
                tally.lost.append(f"{name}, {threat}: {warnings}")
    tally.check()

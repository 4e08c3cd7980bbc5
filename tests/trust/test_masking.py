"""Networks that mask their gradients and honest ones: flagged and not flagged."""

import math

import pytest
import torch
from digits import digits_network
from evaluated_networks import MirroredGradient
from torch import nn

from robustsoup.data import load_data
from robustsoup.evaluation.evaluate import BETTER_INPUTS, evaluate

THREATS = ("Linf 24/255", "L2 0.8")


class Front(nn.Module):
    """A network behind a function of its inputs and one of its logits."""

    def __init__(self, network, before, after):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x):
        return self.after(self.network(self.before(x)))


def keep(values):
    """Return the values."""
    return values


def round_frequencies(x):
    """Round the cosine transform of 8x8 images, as JPEG does."""
    numbers = torch.arange(8.0)
    waves = torch.cos(math.pi * (2 * numbers + 1) * numbers[:, None] / 16) / 2
    waves[0] /= math.sqrt(2)
    return waves.T @ (10 * waves @ x @ waves.T).round() @ waves / 10


def move_randomly(x):
    """Pad the images, and cut out a random part."""
    top, left = torch.randint(3, (2,)).tolist()
    return nn.functional.pad(x, (1, 1, 1, 1))[..., top : top + 8, left : left + 8]


def reverse_some(x):
    """Return the images, with a reversed gradient for about four in ten."""
    reverse = ((x.detach().flatten(1).sum(1) * 1000).round() % 10 < 4)[:, None, None, None]
    return torch.where(reverse, 2 * x.detach() - x, x)


def hide_columns(x):
    """Return the images, without a gradient in every other column."""
    seen = torch.arange(x.shape[-1]) % 2 == 0
    return torch.where(seen, x, x.detach())


def detach_highest(logits):
    """Return the logits, without the gradient of the highest."""
    return torch.where(logits == logits.amax(1, keepdim=True), logits.detach(), logits)


MASKED = {
    "reversed gradients": (lambda x: 2 * x.detach() - x, keep),
    "shattered gradients": (lambda x: x + 1e-4 * torch.sin(1e7 * x), keep),
    "no gradients": (lambda x: (255 * x).round() / 255, keep),
    "two levels": (lambda x: (x > 0.5).float(), keep),
    "rounded frequencies": (round_frequencies, keep),
    "random places": (move_randomly, keep),
    "reversed at some images": (reverse_some, keep),
    "mirrored gradients": (MirroredGradient.apply, keep),
    "transposed gradients": (lambda x: x.detach() + (x - x.detach()).mT, keep),
    "half of the gradients": (hide_columns, keep),
    "squashed images": (lambda x: torch.tanh(50 * (x - 0.5)) / 2 + 0.5, keep),
    "no gradient of the highest logit": (keep, detach_highest),
    "saturated logits": (keep, lambda logits: 5 * torch.tanh(3 * logits)),
    "flat logits": (keep, lambda logits: logits / 1e4),
    "huge logits": (keep, lambda logits: 1e4 * logits),
    "probabilities": (keep, lambda logits: (50 * logits).softmax(1)),
}
HONEST = {
    "a trained network": (keep, keep),
    "a normalisation in front": (lambda x: (x - 0.3) / 0.5 * 0.5 + 0.3, keep),
    "a straight-through rounding": (
        lambda x: x + ((2048 * x).round() / 2048 - x).detach(),
        keep,
    ),
    "a blur": (lambda x: nn.functional.avg_pool2d(x, 3, 1, 1), keep),
    "a crop": (lambda x: nn.functional.pad(x[..., 1:], (1, 0)), keep),
    "small logits": (keep, lambda logits: 0.05 * logits),
    "logarithms of probabilities": (keep, lambda logits: logits.log_softmax(1)),
    "bounded logits": (keep, lambda logits: 5 * torch.tanh(logits / 5)),
}
"""Functions of the images and of the logits, by name."""


@pytest.fixture(scope="module")
def network():
    """A small network that classifies digits."""
    return digits_network(8, steps=150)


def find_masking(network, functions, threat):
    """Return the warnings of an evaluation between two functions, but for the hint on inputs."""
    split = load_data("digits").test.first(200)
    evaluation = evaluate(Front(network, *functions).eval(), split, [threat], steps=20)
    return [line for line in evaluation.warnings if line != evaluation.record.get(BETTER_INPUTS)]


def test_masked_networks_are_flagged(network, tally_of):
    tally = tally_of("masked networks (silent: not flagged)")
    for name, functions in MASKED.items():
        for threat in THREATS:
            tally.count()
            if not find_masking(network, functions, threat):
                tally.silent.append(f"{name}, {threat}")
    tally.check()


def test_honest_networks_are_not_flagged(network, tally_of):
    tally = tally_of("honest networks (lost: flagged)")
    for name, functions in HONEST.items():
        for threat in THREATS:
            tally.count()
            if warnings := find_masking(network, functions, threat):
                tally.lost.append(f"{name}, {threat}: {warnings}")
    tally.check()

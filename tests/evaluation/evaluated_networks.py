"""Threat models, networks and helpers of the tests that evaluate."""

import threading

import torch
from torch import nn

from robustsoup.threats import ThreatModel

LINF, L2, L1 = ThreatModel("Linf", 0.1), ThreatModel("L2", 0.5), ThreatModel("L1", 1.0)
NAMES = ["Linf 0.1", "L2 0.5", "L1 1.0"]
PARTS = ("robust", "by", "step", "norm", "margin")
N = 60
WRONG = 6
"""Number of samples whose label differs from the network's prediction."""


def same_verdicts(a, b):
    """Return whether two evaluations have the same verdicts for the same threats."""
    return list(a.threats) == list(b.threats) and all(
        torch.equal(getattr(a.threats[name], part), getattr(b.threats[name], part))
        for name in a.threats
        for part in PARTS
    )


class Wrapped(nn.Module):
    """A network with a function applied to its inputs or outputs."""

    def __init__(self, network, before=None, after=None):
        super().__init__()
        self.network = network
        self.before = before or (lambda x: x)
        self.after = after or (lambda logits: logits)
        self.eval()

    def forward(self, x):
        return self.after(self.network(self.before(x)))


def rounding(network):
    """Return the network behind a rounding of its inputs, whose gradient is zero."""
    return Wrapped(network, before=lambda x: (x * 8).round() / 8)


class MirroredGradient(torch.autograd.Function):
    """The identity, whose gradient is that of the mirrored image."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(-1)


class Counted(nn.Module):
    """A network that counts its passes with and without a gradient, and can wait.

    `evaluate` works on a copy of the network, so the counts belong to the class. After
    `gate_after` passes with a gradient, every further pass waits until `gate` is set; in the main
    thread, as in the check for masked gradients, it raises KeyboardInterrupt.
    """

    passes = {True: 0, False: 0}  # noqa: RUF012 - shared by copies on purpose
    gate_after = None
    gate = threading.Event()

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.train(network.training)

    @classmethod
    def reset(cls, gate_after=None):
        """Reset the counts; wait after a number of passes, or never."""
        cls.passes.update({True: 0, False: 0})
        cls.gate_after, cls.gate = gate_after, threading.Event()

    @classmethod
    def reached_gate(cls):
        """Return whether passes wait, or have waited, at the gate."""
        return cls.gate_after is not None and cls.passes[True] > cls.gate_after

    def forward(self, x):
        self.passes[x.requires_grad] += 1
        if x.requires_grad and self.reached_gate():
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt  # nobody is left to open the gate
            assert self.gate.wait(timeout=120)
        return self.network(x)


def interrupt_at_gate(done, total, figures):
    """Raise KeyboardInterrupt as soon as the network waits at its gate; an `on_progress`."""
    if Counted.reached_gate():
        Counted.gate.set()
        raise KeyboardInterrupt

"""Two-class linear networks, where the best perturbation is known in closed form."""

import torch
from torch import nn

from robustsoup.threats import ThreatModel

LINEAR_THREATS = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.45), ThreatModel("L1", 0.45)]


class LinearNetwork(nn.Module):
    """Logits (0, w . x - bias); under autocast the second logit is larger by `autocast_error`."""

    def __init__(self, w, bias, autocast_error=0.0):
        super().__init__()
        self.w, self.bias, self.autocast_error = nn.Parameter(w), bias, autocast_error

    def forward(self, x):
        gain = (x.float() * self.w).flatten(1).sum(1) - self.bias
        if torch.is_autocast_enabled("cpu"):
            gain = gain + self.autocast_error
        return torch.stack([torch.zeros_like(gain), gain], 1)


def weights(seed, *, two_largest=False):
    """(1, 5, 5) weights; APGD in L1 never moves fewer than two pixels, so two may be largest."""
    w = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(seed))
    if two_largest:
        w[0, 0, 0], w[0, 3, 1] = -3.5, 3.5
    return w


def best_gain(w, threat):
    """The maximum of w . delta over the ball: eps times the dual norm of w."""
    dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[threat.norm]
    return threat.eps * float(torch.linalg.vector_norm(w.double().flatten(), dual))


def linear_problem(threat, w, *, n, gap, autocast_error=0.0):
    """A network, n grey images of class 0, and labels.

    The best perturbation in the ball ends `gap` short of class 1 (beyond it if negative).
    """
    x = torch.full((n, *w.shape), 0.5)
    bias = float((x[0] * w).sum()) + best_gain(w, threat) + gap
    return LinearNetwork(w, bias, autocast_error), x, torch.zeros(n, dtype=torch.long)

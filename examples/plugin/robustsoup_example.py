"""An attack, a network and a data source, which pyproject.toml registers by entry points."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustsoup import Data, ThreatModel
from robustsoup.data import DataDescription, Samples, assemble, content_digest, hold_out
from robustsoup.data.request import DataRequest


def fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
    """Return x plus one step of size eps along the sign of the gradient; for Linf.

    Source: Goodfellow et al. 2015, arXiv:1412.6572, section 4.
    """
    del seed  # nothing is drawn
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x), y), x)
    return (x + threat.eps * gradient.sign()).clamp(0, 1)


def tiny_cnn(classes: int, channels: int, width: int = 8) -> nn.Module:
    """Return a small network for small images: (b, channels, h, w) -> (b, classes)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(1, width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * width, classes),
    )


def load_stripes(request: DataRequest) -> Data:
    """Load 300 images of 8 x 8 pixels with horizontal or vertical stripes and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 2
    stripes = torch.zeros(8, 8)
    stripes[::2] = 100
    patterns = torch.stack([stripes, stripes.T])
    images = patterns[labels] + torch.randint(0, 60, (300, 8, 8), generator=generator)
    samples = Samples(images.to(torch.uint8)[:, None], labels, ids=torch.arange(300))
    pool, test = (samples.take(rows) for rows in hold_out(300, 50, "stripes test"))
    train, val = (pool.take(rows) for rows in hold_out(250, 50, request.seed))
    description = DataDescription(
        request.spec, content_digest(samples), ("horizontal", "vertical"), mean=(0.31,), std=(0.2,)
    )
    return assemble(description, train, val, test, seed=request.seed)

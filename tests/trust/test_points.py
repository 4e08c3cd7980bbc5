"""A million adversarial points over norms, radii, shapes, batch sizes and precisions.

Each point must lie in the box and in the ball, computed with more digits than float64 has and
without a tolerance.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from robustsoup.attacks import apgd, pgd

POINTS = 1_000_000
SHAPES = ((1, 1, 1), (1, 4, 4), (3, 5, 7), (2, 8, 8))
BATCH_SIZES = {1: 0.02, 7: 0.2, 32: 0.8, 512: 2.98}
"""Batch sizes, and the number of their points as a multiple of the mean; small ones take long."""
PRECISIONS = ("float32", "float32", "float32", "bfloat16")
RADII = {
    "Linf": (1e-6, 1 / 255, 8 / 255, 0.3, 1.0),
    "L2": (1e-6, 0.01, 0.1, 0.5, 0.9),
    "L1": (1e-6, 0.01, 0.1, 0.5, 0.9),
}
"""Radii; in L2 times sqrt(d) and in L1 times d, for images of d values, where they exceed 0.1."""


def make_images(count, shape, generator):
    """Make images of which a third lies in corners of the box and a third close to its faces."""
    x = torch.rand(count, *shape, generator=generator)
    x[::3] = x[::3].round()
    x[1::3] = torch.where(x[1::3] < 0.5, 1e-7 * x[1::3], 1 - 1e-7 * x[1::3])
    return x


def radius_of(norm, radius, size):
    """Return a radius that grows with the size of the images as the norm does."""
    growth = {"Linf": 1.0, "L2": size**0.5, "L1": float(size)}[norm]
    return radius * growth if radius > 0.1 and norm != "Linf" else radius


def count_outside(points, x, norm, eps):
    """Return how many points lie outside ball or box, in extended precision."""
    points, x = points.numpy().astype(np.longdouble), x.numpy().astype(np.longdouble)
    delta = np.abs(points - x).reshape(len(x), -1)
    lengths = {
        "Linf": lambda: delta.max(1),
        "L2": lambda: np.sqrt((delta**2).sum(1)),
        "L1": lambda: delta.sum(1),
    }[norm]()
    flat = points.reshape(len(x), -1)
    outside = (lengths > np.longdouble(eps)) | (flat.min(1) < 0) | (flat.max(1) > 1)
    return int((outside | np.isnan(lengths)).sum())


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("attack", [apgd, pgd])
def test_no_point_is_outside(tally_of, tries, attack, norm):
    tally = tally_of(f"points of {attack.__name__} in {norm} outside ball or box")
    variants = list(itertools.product(SHAPES, RADII[norm], BATCH_SIZES, PRECISIONS))
    mean = tries(POINTS) / (2 * len(RADII) * len(variants))
    for number, (shape, radius, batch_size, precision) in enumerate(variants):
        generator = torch.Generator().manual_seed(number)
        size, count = int(np.prod(shape)), math.ceil(mean * BATCH_SIZES[batch_size])
        scale = 10.0 ** (number % 4 - 1)
        layer = nn.Linear(size, 4)
        layer.weight = nn.Parameter(scale * torch.randn(4, size, generator=generator))
        network = nn.Sequential(nn.Flatten(), layer).eval()
        x = make_images(count, shape, generator)
        with torch.no_grad():
            y = network(x).argmax(1)
        eps = radius_of(norm, radius, size)
        settings = {"batch_size": batch_size, "precision": precision, "seed": number}
        points = attack(network, x, y, f"{norm} {eps!r}", steps=1 + number % 5, **settings)
        tally.count(count)
        if outside := count_outside(points, x, norm, eps):
            tally.silent.append(f"{outside} of {shape}, {norm} {eps!r}, {batch_size}, {precision}")
    tally.check()

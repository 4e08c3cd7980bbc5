"""Norms, and projections onto the ball of a threat model intersected with the box [0, 1]."""

import torch
from torch import Tensor


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 1))


def norms(delta: Tensor, norm: str) -> Tensor:
    """The norm of each row of `delta` (b, ...): (b,)."""
    flat = delta.flatten(1)
    if norm == "L2":  # as the reference sums it, so that L2 steps agree bit for bit
        return (flat**2).sum(1).sqrt()
    return flat.abs().sum(1) if norm == "L1" else flat.abs().amax(1)


def project(z: Tensor, x: Tensor, eps: Tensor, norm: str) -> Tensor:
    """Bring each z (b, ...) into the ball of radius eps (b,) around x (b, ...) in [0,1], and into the box [0,1].

    Linf and L1 give the nearest point of the intersection; L2 scales into the ball and then clamps, as AutoPGD does
    (a feasible point, not always the nearest one).
    Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208, section 2.
    """
    if norm == "Linf":
        radius = _column(eps, x)
        return torch.minimum(torch.maximum(z, x - radius), x + radius).clamp(0.0, 1.0)
    if norm == "L2":
        delta = z - x
        length = _column(norms(delta, "L2"), x)
        return (x + delta / (length + 1e-12) * torch.minimum(_column(eps, x), length)).clamp(
            0.0, 1.0
        )
    delta = _project_l1(z - x, x, eps)
    point = x + delta
    # d roundings away from x can add up to more than 1e-6; one step of the last bit towards x undoes each.
    return torch.where((point - x).abs() > delta.abs(), torch.nextafter(point, x), point)


def _project_l1(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """The nearest point to delta (b, ...) with ||.||_1 <= eps and x + . in [0,1].

    The answer is sign(delta) * clamp(|delta| - t, 0, room) with the least t >= 0 that meets the radius. Its norm falls
    piecewise linearly in t with 2d breakpoints; they are sorted and the segment that crosses eps is solved exactly.
    """
    flat, point = (
        delta.flatten(1).double(),
        x.flatten(1).double(),
    )  # thousands of float32 terms would drift by 1e-5
    size = flat.abs()
    room = torch.where(flat > 0, 1.0 - point, point).clamp(min=0.0)
    breaks = torch.cat([(size - room).clamp(min=0.0), size], dim=1)
    bends = torch.cat([-torch.ones_like(size), torch.ones_like(size)], dim=1)
    breaks, order = breaks.sort(dim=1)
    slopes = bends.gather(1, order).cumsum(1)
    start = torch.minimum(size, room).sum(1, keepdim=True)
    falls = (slopes[:, :-1] * (breaks[:, 1:] - breaks[:, :-1])).cumsum(1)
    lengths = torch.cat([start, start + falls], dim=1)
    radius = eps.to(lengths).view(-1, 1)
    segment = (lengths > radius).sum(1, keepdim=True).sub(1).clamp(0, lengths.shape[1] - 2)
    slope = slopes.gather(1, segment).clamp(max=-1.0)
    t = breaks.gather(1, segment) + (radius - lengths.gather(1, segment)) / slope
    t = torch.where(start > radius, t, torch.zeros_like(t)).clamp(min=0.0)
    return (flat.sign() * torch.minimum((size - t).clamp(min=0.0), room)).to(delta).view_as(delta)


def random_start(x: Tensor, noise: Tensor, eps: Tensor, norm: str) -> Tensor:
    """A random point of the ball and the box, made from `noise` (b, ...): uniform in (-1,1) for Linf, else Gaussian.

    Linf: x + eps * t / max|t|; L2: x + eps * t / ||t||_2, both clamped; L1: x + t projected. As AutoPGD starts.
    """
    if norm == "L1":
        return project(x + noise, x, eps, norm)
    unit = noise / (_column(norms(noise, norm), x) + 1e-12)
    return (x + _column(eps, x) * unit).clamp(0.0, 1.0)

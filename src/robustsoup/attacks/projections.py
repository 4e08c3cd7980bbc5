"""Norms of perturbations, and projections onto an lp ball intersected with the box [0, 1]."""

import numpy as np
import torch
from torch import Tensor

from robustsoup.threats import ThreatModel

SUM_MARGIN = 1e-12
"""Relative margin that a length keeps from its radius, for the rounding of a sum in float64."""


def as_column(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` (b,) to (b, 1, ..., 1), so that it broadcasts with `like` (b, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def norms(delta: Tensor, norm: str) -> Tensor:
    """Return the norm of each sample of `delta` (b, ...), as (b,)."""
    flat = delta.flatten(1)
    if norm == "L2":  # summed as in the reference, so that L2 steps are bit-equal
        return (flat**2).sum(1).sqrt()
    return flat.abs().sum(1) if norm == "L1" else flat.abs().amax(1)


def constraint_excess(points: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Return by how much each point leaves the ball around x or the box [0, 1].

    Args:
        points: (b, ...) images to check.
        x: (b, ...) clean images.
        threat: Norm and radius of the ball.

    Returns:
        (b,) float64; at most 0 for a point that satisfies both constraints, NaN for NaN.
    """
    points = points.double()
    ball = norms(points - x.double(), threat.norm) - threat.eps
    box = torch.maximum(-points.flatten(1).amin(1), points.flatten(1).amax(1) - 1)
    return torch.maximum(ball, box)


def is_numpy_like(values: Tensor) -> bool:
    """Return whether NumPy can read a tensor in place."""
    return values.device.type == "cpu" and values.dtype != torch.bfloat16


def sort_rows(values: Tensor) -> Tensor:
    """Sort each row of `values` (b, d), smallest first; on a CPU NumPy is fastest."""
    if is_numpy_like(values):
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values


def project(z: Tensor, x: Tensor, eps: Tensor, norm: str) -> Tensor:
    """Project each z into the ball of radius eps around x, and into the box [0, 1].

    Linf and L1 return the nearest point of the intersection. L2 scales into the ball and then
    clamps, as AutoPGD does: the result is feasible, but not always the nearest point. Linf and L2
    are bit-equal to AutoPGD, so rounding may leave the ball; see `move_inside`.

    Args:
        z: (b, ...) points to project.
        x: (b, ...) centres in [0, 1].
        eps: (b,) radii.
        norm: "Linf", "L2" or "L1".

    Returns:
        (b, ...) points.

    Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208,
        section 2.
    """
    radius = as_column(eps, x)
    if norm == "Linf":
        return torch.minimum(torch.maximum(z, x - radius), x + radius).clamp(0.0, 1.0)
    if norm == "L2":
        delta = z - x
        length = as_column(norms(delta, "L2"), x)
        return (x + delta / (length + 1e-12) * torch.minimum(radius, length)).clamp(0.0, 1.0)
    # `eps` was rounded to its dtype, perhaps up.
    eps = eps.double() * (1 - torch.finfo(eps.dtype).eps)
    return _add_inside(x, _project_l1(z.double() - x.double(), x, eps), eps, "L1")


def move_inside(points: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Move points that rounding left outside the ball into it, as computed in float64.

    Args:
        points: (b, ...) points in the box, outside the ball by rounding at most.
        x: (b, ...) centres in [0, 1].
        threat: Norm and radius of the ball.

    Returns:
        (b, ...) points in the ball and the box; a point that is inside already is unchanged.
    """
    delta = points.double() - x.double()
    if threat.norm == "Linf":
        delta = delta.clamp(-threat.eps, threat.eps)
    radius = torch.full((len(x),), threat.eps, device=x.device, dtype=torch.float64)
    return _add_inside(x, delta, radius, threat.norm)


def _add_inside(x: Tensor, delta: Tensor, eps: Tensor, norm: str) -> Tensor:
    """Return x + delta in the dtype of x, no farther from x than eps (b,) float64.

    The d rounding errors of the sum can add up to more than 1e-6 of norm. Moving a value that was
    rounded away from x by one unit in the last place undoes its error.
    """
    if norm != "Linf":
        limit = eps * (1 - SUM_MARGIN)
        length = norms(delta, norm)
        scale = torch.where(length > limit, limit / length, torch.ones_like(limit))
        delta = delta * as_column(scale, delta)
    point = (x.double() + delta).to(x.dtype)
    is_farther = (point.double() - x.double()).abs() > delta.abs()
    return torch.where(is_farther, torch.nextafter(point, x), point)


def _project_l1(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Return the perturbation nearest to delta (b, ...) of L1 norm <= eps with x + it in [0, 1].

    The solution is sign(delta) * clamp(|delta| - t, 0, room) with the smallest t >= 0 whose norm
    is at most eps; room is the distance to the box. The norm is piecewise linear and falls in t,
    with 2 d breakpoints: sort them, find the segment that crosses eps, and solve it exactly. All
    of it is in float64, because a float32 sum of thousands of terms drifts by 1e-5.
    """
    flat, point = delta.flatten(1), x.flatten(1).to(delta)
    size = flat.abs()
    room = torch.where(flat > 0, 1.0 - point, point).clamp(min=0.0)
    breakpoints = torch.cat([(size - room).clamp(min=0.0), size], dim=1)
    slope_changes = torch.cat([-torch.ones_like(size), torch.ones_like(size)], dim=1)
    breakpoints, order = breakpoints.sort(dim=1)
    slopes = slope_changes.gather(1, order).cumsum(1)
    norm_at_0 = torch.minimum(size, room).sum(1, keepdim=True)
    falls = (slopes[:, :-1] * (breakpoints[:, 1:] - breakpoints[:, :-1])).cumsum(1)
    norm_at = torch.cat([norm_at_0, norm_at_0 + falls], dim=1)
    radius = eps.to(norm_at).view(-1, 1)
    segment = (norm_at > radius).sum(1, keepdim=True).sub(1).clamp(0, norm_at.shape[1] - 2)
    slope = slopes.gather(1, segment).clamp(max=-1.0)
    t = breakpoints.gather(1, segment) + (radius - norm_at.gather(1, segment)) / slope
    t = torch.where(norm_at_0 > radius, t, torch.zeros_like(t)).clamp(min=0.0)
    return (flat.sign() * torch.minimum((size - t).clamp(min=0.0), room)).view_as(delta)


def random_start(x: Tensor, noise: Tensor, eps: Tensor, norm: str) -> Tensor:
    """Return a random point of the ball and the box, as AutoPGD starts.

    Linf: x + eps t / max|t|; L2: x + eps t / ||t||_2, both clamped; L1: x + t, projected.

    Args:
        x: (b, ...) centres in [0, 1].
        noise: (b, ...) t above: uniform in (-1, 1) for Linf, else Gaussian.
        eps: (b,) radii.
        norm: "Linf", "L2" or "L1".

    Returns:
        (b, ...) points.

    Source: Croce and Hein 2020, arXiv:2003.01690.
    """
    if norm == "L1":
        return project(x + noise, x, eps, norm)
    unit = noise / (as_column(norms(noise, norm), x) + 1e-12)
    return (x + as_column(eps, x) * unit).clamp(0.0, 1.0)

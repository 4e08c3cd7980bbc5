"""How an attack asks a network: eval mode, no gradients for weights, logits judged in at least float32."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robustsoup.errors import DataError, Diverged, ModelError
from robustsoup.losses import Loss
from robustsoup.precision import autocast


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and ask no weight for a gradient; leave all as it was found."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


def gradient(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, precision: str, *, needed: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: logits (b, classes), loss (b,) and its gradient by x (b, ...); the gradient is zero if not `needed`."""
    x = x.detach().requires_grad_(needed)
    with torch.set_grad_enabled(needed), autocast(x.device, precision):
        logits = model(x)
    with torch.set_grad_enabled(needed):
        value = loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
        grad = torch.autograd.grad(value.sum(), x)[0] if needed else torch.zeros_like(x)
    return logits.detach(), value.detach().to(x.dtype), grad


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int, precision: str = "float32") -> Tensor:
    """Logits (n, classes) float32 on the CPU for x (n, ...), in batches of one padded shape; the mode is not touched."""
    parts = []
    for chunk in x.split(batch_size):
        padding = chunk[:1].expand(batch_size - len(chunk), *chunk.shape[1:])
        with autocast(x.device, precision):
            logits = model(torch.cat([chunk, padding]))
        parts.append(logits[: len(chunk)].float().cpu())
    return torch.cat(parts)


def check_inputs(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Refuse what no attack can work on: x outside [0,1], labels outside the classes, logits of a wrong shape or NaN.

    Raises DataError or ModelError.
    """
    if len(x) != len(y):
        raise DataError(f"x and y: got {len(x)} images and {len(y)} labels, expected as many of both")
    if len(x) == 0:
        return
    if not (x.is_floating_point() and float(x.min()) >= 0 and float(x.max()) <= 1):  # NaN fails too
        raise DataError(f"x: got {x.dtype} in [{float(x.min()):g}, {float(x.max()):g}], expected floats in [0, 1]")
    with frozen_eval(model), torch.no_grad():
        logits = model(x[:2])
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x[:2]):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"network: got an answer of shape {got} for {len(x[:2])} images, expected (b, classes) logits")
    if not bool(logits.isfinite().all()):
        raise Diverged("network: its logits hold NaN or infinity; the weights may be broken")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= logits.shape[1]:
        raise ModelError(
            f"labels: got {low}..{high}, but the network has {logits.shape[1]} classes; it does not fit this data"
        )

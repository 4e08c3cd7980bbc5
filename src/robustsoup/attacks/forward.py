"""How an attack asks a network: eval mode, no gradients for weights, logits judged in at least float32."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from robustsoup.attacks.lanes import in_lanes
from robustsoup.attacks.losses import Loss
from robustsoup.device import autocast
from robustsoup.errors import DataError, Diverged, ModelError


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, ask no weight for a gradient, and let float32 be float32; leave all as it was found."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        for module, mode in modes:
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


def pass_rows(device: torch.device, batch_size: int | None = None) -> int:
    """How many images a pass takes: at most batch_size, and on a CPU at most 32, where more at once gain nothing.

    So that verdicts have the same bits at every batch size above that.
    """
    most = 32 if device.type == "cpu" else 500
    return min(batch_size, most) if batch_size and device.type == "cpu" else batch_size or most


def gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    precision: str,
    *,
    needed: bool = True,
    target: Tensor | None = None,
    eot: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: logits (b, classes), loss (b,) and its gradient by x (b, ...); the gradient is zero if not `needed`.

    eot: how many passes the loss and the gradient are averaged over, for networks that answer at random (expectation
    over transformation); the logits are the last pass's.
    """
    value, grad = 0.0, 0.0
    for _ in range(eot):
        point = x.detach().requires_grad_(needed)
        with torch.set_grad_enabled(needed), autocast(x.device, precision):
            logits = model(point)
        with torch.set_grad_enabled(needed):
            each = _loss(loss, logits, y, target)
            part = None
            if (
                needed and each.requires_grad
            ):  # not where the network rounds, say, without a gradient
                part = torch.autograd.grad(each.sum(), point, allow_unused=True)[0]
            part = torch.zeros_like(x) if part is None else part
        value, grad = value + each.detach().to(x.dtype), grad + part if eot > 1 else part
    if eot > 1:
        value, grad = value / eot, grad / eot
    return logits.detach(), value, grad


def _loss(loss: Loss, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return loss(logits, y) if target is None else loss(logits, y, target)


@torch.no_grad()
def judge(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, rows: int, *, target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (b, classes) and loss (b,) without autocast for b <= rows images, in one pass padded to `rows`."""
    logits = model(torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])]))[: len(x)]
    return logits, _loss(loss, logits, y, target).to(x.dtype)


def predict(
    model: nn.Module,
    fetch: Callable[[Tensor], Tensor],
    n: int,
    rows: int,
    device: torch.device,
    poll: Callable[[], None] | None = None,
) -> Tensor:
    """Logits (n, classes), at least float32, on the CPU; in passes of one padded shape; the mode is not touched.

    fetch(samples (b,) int64) -> (b, ...) images on `device`.
    """

    @torch.no_grad()
    def part(samples: Tensor) -> Tensor:
        x = fetch(samples)
        logits = model(torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])]))[: len(x)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()

    return torch.cat(
        in_lanes(
            [partial(part, samples) for samples in torch.arange(n).split(rows)], device, poll=poll
        )
    )


def check_inputs(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Refuse what no attack can work on: x outside [0,1], labels outside the classes, logits of a wrong shape or NaN.

    Returns the number of classes (0 without images). Raises DataError, ModelError or Diverged.
    """
    if len(x) != len(y):
        raise DataError(
            f"x and y: got {len(x)} images and {len(y)} labels, expected as many of both"
        )
    if len(x) == 0:
        return 0
    if not (x.is_floating_point() and float(x.min()) >= 0 and float(x.max()) <= 1):  # NaN fails too
        raise DataError(
            f"x: got {x.dtype} in [{float(x.min()):g}, {float(x.max()):g}], expected floats in [0, 1]"
        )
    with frozen_eval(model), torch.no_grad():
        logits = model(x[:2])
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x[:2]):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"network: got an answer of shape {got} for {len(x[:2])} images, expected (b, classes) logits"
        )
    if not bool(logits.isfinite().all()):
        raise Diverged("network: its logits hold NaN or infinity; the weights may be broken")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= logits.shape[1]:
        raise ModelError(
            f"labels: got {low}..{high}, but the network has {logits.shape[1]} classes; it does not fit this data"
        )
    return logits.shape[1]

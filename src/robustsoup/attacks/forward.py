"""The one place where attacks adapt and call a network.

Networks are called in eval mode, without gradients for their weights, in passes of one fixed size.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustsoup.attacks.functions import as_module
from robustsoup.attacks.lanes import run_in_lanes
from robustsoup.attacks.losses import Loss
from robustsoup.device import autocast
from robustsoup.errors import DataError, Diverged, ModelError, RequestError, RobustsoupError
from robustsoup.precision import full_float32
from robustsoup.printable import first_line

ImageBatch = Tensor | NDArray[np.floating]
"""Images, (n, ...) floats in [0, 1]."""
LabelBatch = Tensor | NDArray[np.integer] | Sequence[int]
"""The numbers of the classes of n images."""
CPU_PASS_SIZE = 32
"""Largest pass on a CPU; larger passes are no faster there."""
GPU_PASS_SIZE = 500
"""Default pass on a GPU."""


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Generator[None, None, None]:
    """Freeze a network for an attack, and restore its state afterwards.

    Every module is in eval mode (so BatchNorm's running statistics stay fixed), no weight requires
    a gradient, and float32 means float32; see `full_float32`.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        set_mode(model, training=False)
        for parameter in trainable:
            parameter.requires_grad_(False)
        with full_float32():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Put a network into train or eval mode.

    Raises:
        ModelError: A `train` of the user's own fails, such as one without the argument `mode`, by
            which PyTorch chooses eval mode.
    """
    try:
        model.train() if training else model.eval()
    except Exception as error:
        raise ModelError(
            f"network: cannot be put into {'train' if training else 'eval'} mode: "
            f"{type(error).__name__}: {first_line(error)}; a method train of your own must take "
            "mode=True, as that of torch.nn.Module does"
        ) from error


def as_logits(output: object) -> Tensor:
    """Return the logits in a network's output.

    Args:
        output: A tensor; an object with the attribute "logits"; a mapping with the key "logits" or
            a single value; a tuple or list whose first element is one of these, but for numbers
            before it, as in (loss, logits).

    Raises:
        ModelError: The output holds no tensor in these places.
    """
    part = output
    for _ in range(4):
        if isinstance(part, Tensor):
            return _check_real(part)
        if isinstance(getattr(part, "logits", None), Tensor):
            return _check_real(part.logits)  # pyrefly: ignore[missing-attribute]
        if isinstance(part, Mapping) and ("logits" in part or len(part) == 1):
            part = part["logits"] if "logits" in part else next(iter(part.values()))
        elif isinstance(part, (tuple, list)) and part:
            part = next((item for item in part if not _is_number(item)), part[0])
        else:
            break
    keys = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    raise ModelError(
        f"network: returned {type(output).__name__}{keys}, expected (b, classes) logits: a tensor, "
        'the first element of a tuple, or the entry "logits"'
    )


def _is_number(item: object) -> bool:
    return isinstance(item, Tensor) and item.dim() == 0


def choose_logits(output: object, classes: int, *, inferred: bool) -> Tensor:
    """Return the logits in a network's output for data of a number of classes.

    They are the first element of a tuple, as in `as_logits`, unless another one alone has that
    number of columns, as in (features, logits). If the number is inferred, they may have more.

    Args:
        output: As in `as_logits`.
        classes: The number of classes.
        inferred: Whether that is only the largest label plus 1.

    Raises:
        ModelError: The output holds no logits; or the number is inferred, and several tensors
            (b, n) of different n > classes could be the logits.
    """
    if hasattr(output, "logits") or not isinstance(output, (tuple, list)):
        return as_logits(output)
    tables = [t for t in output if isinstance(t, Tensor) and t.dim() == 2 and t.is_floating_point()]
    fitting = [table for table in tables if table.shape[1] == classes]
    if inferred and not fitting:  # the labels show that there are at least so many
        fitting = [table for table in tables if table.shape[1] > classes]
    widths = [table.shape[1] for table in fitting]
    if len(set(widths)) > 1:
        raise ModelError(
            f"network: returned tensors of {', '.join(map(str, widths))} columns, and which are "
            "the logits cannot be told, since the number of classes is inferred from the labels; "
            "give classes, as in Split.from_tensors(images, labels, classes=10)"
        )
    return fitting[0] if len(fitting) == 1 else as_logits(output)


def _check_real(logits: Tensor) -> Tensor:
    if logits.layout != torch.strided:
        raise ModelError(
            f"network: returned a tensor of layout {logits.layout}, expected dense logits; call "
            "to_dense() on them"
        )
    if not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise ModelError(
            f"network: returned {kind} numbers of shape {tuple(logits.shape)}, expected "
            "(b, classes) float logits"
        )
    return logits


def call_network(model: Callable[[Tensor], object], x: Tensor) -> Tensor:
    """Return the logits of a pass.

    Raises:
        ModelError: The network fails, such as one that takes batches of one size alone, or returns
            no logits.
    """
    try:
        return as_logits(model(x))
    except (RobustsoupError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _refuse_pass(x, error) from error


def _refuse_pass(x: Tensor, error: Exception) -> ModelError:
    return ModelError(
        f"network: fails on {len(x)} images of shape {tuple(x.shape[1:])}: "
        f"{type(error).__name__}: {first_line(error)}"
    )


def pass_size(device: torch.device, batch_size: int | None = None) -> int:
    """Return the number of images in a pass.

    A CPU takes at most 32, so that verdicts have the same bits for every larger `batch_size`.

    Args:
        device: Device of the network.
        batch_size: Requested number, at least 1; None for the device's default.
    """
    if device.type == "cpu":
        return min(batch_size or CPU_PASS_SIZE, CPU_PASS_SIZE)
    return batch_size or GPU_PASS_SIZE


def input_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    precision: str,
    *,
    target: Tensor | None = None,
    eot: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, loss, and the gradient of the loss with respect to x.

    Args:
        model: Network in eval mode.
        x: (b, ...) images.
        y: (b,) int64 labels.
        loss: Loss per sample.
        precision: "float32" or "bfloat16" (autocast).
        target: (b, ...) third argument of a targeted loss.
        eot: Number of passes to average loss and gradient over, for stochastic networks
            (expectation over transformation).

    Returns:
        Logits (b, classes) of the last pass, loss (b,), gradient (b, ...). The gradient is 0 where
        the network is not differentiable.
    """
    logits, value, grad = _gradient_once(model, x, y, loss, precision, target=target)
    for _ in range(eot - 1):
        logits, next_value, next_grad = _gradient_once(model, x, y, loss, precision, target=target)
        value, grad = value + next_value, grad + next_grad
    if eot > 1:
        value, grad = value / eot, grad / eot
    return logits, value, grad


@torch.no_grad()
def loss_without_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    precision: str,
    *,
    target: Tensor | None = None,
) -> Tensor:
    """Return the loss (b,) of one pass; arguments as for `input_gradient`."""
    return _logits_and_loss(model, x, y, loss, precision, target=target)[1].to(x.dtype)


@torch.no_grad()
def padded_loss(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, size: int, *, target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return logits (b, classes) and loss (b,), without autocast, in one pass of `size` images.

    Args:
        model: Network in eval mode.
        x: (b, ...) images, b <= size.
        y: (b,) int64 labels.
        loss: Loss per sample.
        size: Number of images in the pass; it is padded with copies of the first image.
        target: (b, ...) third argument of a targeted loss.
    """
    logits = _padded_logits(model, x, size)
    return logits, _apply_loss(loss, logits, y, target).to(x.dtype)


@full_float32()
def predict_logits(
    model: nn.Module,
    fetch: Callable[[Tensor], Tensor],
    n: int,
    size: int,
    device: torch.device,
) -> Tensor:
    """Return the logits of samples 0..n-1.

    Args:
        model: Network; its mode is not changed.
        fetch: fetch(samples (b,) int64) -> (b, ...) images on `device`.
        n: Number of samples, at least 1.
        size: Number of images in every pass.
        device: Device of the network.

    Returns:
        (n, classes) on the CPU, at least float32.
    """

    @torch.no_grad()
    def predict_pass(samples: Tensor) -> Tensor:
        logits = _padded_logits(model, fetch(samples), size)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()

    passes = [partial(predict_pass, samples) for samples in torch.arange(n).split(size)]
    return torch.cat(run_in_lanes(passes, device))


def as_attack_inputs(
    model: nn.Module | Callable[[Tensor], object], x: ImageBatch, y: LabelBatch
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, images and labels in the form that attacks require.

    Args:
        model: A module, or a function (b, ...) -> (b, classes) logits.
        x: (n, ...) images, a tensor or an array; converted to the network's float32 or float64.
        y: (n,) labels, a tensor, an array or a list of integers of any width.

    Raises:
        ModelError: The model cannot be called, or is a function that calls a network in train mode.
        DataError: The images are no numbers or of half precision, or the labels no integers, one
            for each image.
    """
    network = as_module(model)
    if any(parameter.is_inference() for parameter in network.parameters()):
        raise ModelError(
            "network: made under torch.inference_mode(), where no weight takes part in a gradient; "
            "make it outside"
        )
    images, labels = _as_tensor(x, "x"), _as_tensor(y, "y")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"y: got {labels.dtype}, expected the number of a class for each image")
    if labels.dim() != 1:
        raise DataError(
            f"y: got shape {tuple(labels.shape)}, expected ({len(images)},), the number of a class "
            "for each image; use y.argmax(1) for one-hot labels, y.squeeze(1) for a column"
        )
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), images.dtype)
    if images.is_floating_point() and dtype in (torch.float32, torch.float64):
        images = images.to(dtype)
    if images.dtype in (torch.float16, torch.bfloat16):  # their steps round to more than eps
        raise DataError(
            f"x: got {images.dtype}, expected float32 or float64; convert the images and the "
            "network with float()"
        )
    images, labels = (t.clone() if t.is_inference() else t.detach() for t in (images, labels))
    return network, images, labels.to(images.device, torch.int64)


def _as_tensor(values: object, name: str) -> Tensor:
    try:
        if isinstance(values, (list, tuple)) and values and isinstance(values[0], Tensor):
            return torch.stack([torch.as_tensor(value) for value in values])
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: got {type(values).__name__}, expected a tensor or array of numbers: "
            f"{first_line(error)}"
        ) from error


def check_inputs(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Check images, labels and network before an attack.

    Args:
        model: Network; called once on two images.
        x: (n, ...) float images in [0, 1].
        y: (n,) int64 labels.

    Returns:
        The number of classes; 0 if there are no images.

    Raises:
        DataError: If x and y differ in length, or x is not float in [0, 1].
        ModelError: If the network fails, changes its input, does not return (b, classes) logits, or
            a label has no class.
        Diverged: If the logits contain NaN or infinity.
    """
    if len(x) != len(y):
        raise DataError(f"x and y: got {len(x)} images and {len(y)} labels, expected equal numbers")
    if len(x) == 0:
        return 0
    low, high = float(x.min()), float(x.max())
    if not (x.is_floating_point() and low >= 0 and high <= 1):  # NaN fails both comparisons
        raise DataError(f"x: got {x.dtype} in [{low:g}, {high:g}], expected floats in [0, 1]")
    probe = x[:2]
    logits = _probe_logits(model, probe.clone())
    if logits.dim() != 2 or len(logits) != len(probe):
        raise ModelError(
            f"network: got an output of shape {tuple(logits.shape)} for {len(probe)} images, "
            "expected (b, classes) logits"
        )
    if not bool(logits.isfinite().all()):
        raise Diverged("network: the logits contain NaN or infinity; the weights may be corrupt")
    classes, first, last = logits.shape[1], int(y.min()), int(y.max())
    if first < 0 or last >= classes:
        raise ModelError(
            f"labels: got {first}..{last}, but the network has {classes} classes; "
            "use a network for this data"
        )
    return classes


def _probe_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of images that the network may change.

    Raises:
        ModelError: The network fails, or changes its input in place.
    """
    before = x.clone()
    with frozen_eval(model), torch.no_grad():
        logits = call_network(model, x)
    if not torch.equal(x, before):
        raise ModelError("network: changes its input in place; let its forward copy x first")
    return logits


def _gradient_once(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, precision: str, *, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits, value = _logits_and_loss(model, point, y, loss, precision, target=target)
        grad = None
        if value.requires_grad:  # false if, for example, the network rounds its input
            grad = _differentiate(value.sum(), point)
    grad = torch.zeros_like(x) if grad is None else grad
    return logits.detach(), value.detach().to(x.dtype), grad


def _differentiate(value: Tensor, x: Tensor) -> Tensor | None:
    """Return the gradient of a value with respect to images; None if it does not depend on them.

    Raises:
        ModelError: The network does not allow it, as with checkpoints that are re-entrant.
    """
    try:
        return torch.autograd.grad(value, x, allow_unused=True)[0]
    except (RobustsoupError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"network: no gradient reaches the images: {type(error).__name__}: {first_line(error)}"
        ) from error


def _logits_and_loss(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, precision: str, *, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    # No cache: the weights are frozen, and a captured CUDA graph must not refer to cached casts.
    with autocast(x.device, precision, cache=False):
        logits = call_network(model, x)
    return logits, _apply_loss(loss, logits, y, target)


def _apply_loss(loss: Loss, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    value = loss(logits, y) if target is None else loss(logits, y, target)
    if isinstance(value, Tensor) and value.shape == y.shape:
        return value
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise RequestError(
        f"loss: returned {shape}, expected ({len(y)},), one value for each image; losses of "
        'PyTorch need reduction="none"'
    )


def _padded_logits(model: nn.Module, x: Tensor, size: int) -> Tensor:
    padding = x[:1].expand(size - len(x), *x.shape[1:])
    logits = call_network(model, torch.cat([x, padding]))
    return logits[: len(x)]

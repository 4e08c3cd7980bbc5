"""Convert images and labels of users to the types of a split, where their meaning is plain.

Pixels become uint8: float images are accepted in [0, 1], or as whole numbers from 0 to 255. All
others (normalised images, pixels divided by 255 twice) are refused with the likely cause, because a
network that is judged on wrong pixels gives a number that looks like any other.
"""

import numpy
import torch
from torch import Tensor

from robustsoup.errors import DataError

IMAGES_PER_CHUNK = 256
"""Images processed at a time; a small number, so memory-mapped images are never all in memory."""

GRID_TOLERANCE = 0.05
"""Largest distance of a float pixel from a multiple of 1/255, in 1/255, that is no rounding."""

DARKEST = 32
"""Images of which no pixel exceeds this are in doubt: their range may be 4 bits, or 0 and 1."""


def as_pixels(images: object, place: str, *, exact: bool = False) -> tuple[Tensor, float]:
    """Return images as uint8 (n, c, h, w), and by how much they had to be rounded.

    Args:
        images: A tensor or array, (n, c, h, w), (n, h, w, c) or (n, h, w) with 1 or 3 channels; of
            uint8, of other integers from 0 to 255, or of floats in [0, 1] or from 0 to 255.
        place: Names the images in errors.
        exact: Whether rounding is refused.

    Returns:
        The pixels, and the largest rounding in units of 1/255.

    Raises:
        DataError: The images are something else; the error names the likely cause.
    """
    tensor = _arrange_channels(_as_tensor(images, place), place)
    if tensor.dtype == torch.uint8:
        return tensor.contiguous(), 0.0
    if tensor.dtype in (torch.bool, torch.complex64, torch.complex128) or not tensor.numel():
        raise DataError(f"{place}: got {_describe(tensor)}, expected pixels, uint8 (n, c, h, w)")
    scale = _pixel_scale(tensor, place)
    pixels = torch.empty(tensor.shape, dtype=torch.uint8, device=tensor.device)
    rounding = 0.0
    for chunk, target in zip(
        tensor.split(IMAGES_PER_CHUNK), pixels.split(IMAGES_PER_CHUNK), strict=True
    ):
        values = chunk.double() * scale
        target.copy_(values.round())
        rounding = max(rounding, float((values - values.round()).abs().max()))
    if exact and rounding > GRID_TOLERANCE:
        raise DataError(
            f"{place}: got {_describe(tensor)} with values between the 256 steps of 8 bits, "
            "expected uint8; rs.Split.from_tensors rounds them, and says so"
        )
    return pixels, rounding if rounding > GRID_TOLERANCE else 0.0


def as_labels(labels: object, place: str) -> Tensor:
    """Return labels as int64 (n,).

    Args:
        labels: A tensor, array or list: class numbers (n,) or (n, 1), integers of any width or
            whole floats, or one-hot rows (n, classes).
        place: Names the labels in errors.

    Raises:
        DataError: The labels are something else.
    """
    tensor = _as_tensor(labels, place)
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim == 2:
        is_one_hot = ((tensor == 0) | (tensor == 1)).all() and (tensor.sum(1) == 1).all()
        if not is_one_hot:
            raise DataError(
                f"{place}: got {_describe(tensor)} that is not one-hot, expected one class for "
                "each image, (n,); soft labels are not supported"
            )
        return tensor.to(torch.uint8).argmax(1)
    if tensor.ndim != 1 or tensor.is_complex():
        raise DataError(f"{place}: got {_describe(tensor)}, expected class numbers, (n,)")
    if tensor.is_floating_point() and not bool((tensor == tensor.round()).all()):
        raise DataError(
            f"{place}: got {_describe(tensor)} with values such as "
            f"{float(tensor[tensor != tensor.round()][0]):g}, expected class numbers"
        )
    return tensor.to(torch.int64).contiguous()


def numbers_from_one(labels: Tensor) -> bool:
    """Return whether labels are 1..n, each of them and no other, for an n of at least 2."""
    numbers = labels.unique()
    return len(numbers) > 1 and torch.equal(numbers, torch.arange(1, len(numbers) + 1).to(numbers))


def _as_tensor(values: object, place: str) -> Tensor:
    if isinstance(values, Tensor):
        return _widen(values.detach())
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], Tensor):
        try:
            return _widen(torch.stack([value.detach() for value in values]))
        except (RuntimeError, AttributeError) as error:
            raise DataError(f"{place}: tensors that do not stack: {error}") from None
    try:
        array = numpy.asarray(values)
        if array.dtype.kind not in "biufc":
            raise TypeError
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        return _widen(torch.from_numpy(numpy.require(array, requirements=["C", "W"])))
    except (TypeError, ValueError):
        pass
    kind = type(values)
    raise DataError(
        f"{place}: got {kind.__module__}.{kind.__qualname__}, expected a tensor or array of numbers"
    )


def _widen(tensor: Tensor) -> Tensor:
    """Return unsigned integers of 16 bits or more as int64; PyTorch computes little with them."""
    is_wide = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return tensor.to(torch.int64) if is_wide else tensor


def _arrange_channels(tensor: Tensor, place: str) -> Tensor:
    """Return images as (n, c, h, w)."""
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    if tensor.ndim == 4 and tensor.shape[1] not in (1, 3) and tensor.shape[3] in (1, 3):
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        raise DataError(
            f"{place}: got {_describe(tensor)}, expected (n, c, h, w) with 1 or 3 channels c"
        )
    return tensor


def _pixel_scale(tensor: Tensor, place: str) -> int:
    """Return what values are multiplied with to become 0..255: 255 for floats in [0, 1], else 1."""
    low, high = float(tensor.min()), float(tensor.max())
    got = f"{place}: got {_describe(tensor)} from {low:.4g} to {high:.4g}"
    if not (low > -numpy.inf and high < numpy.inf):
        raise DataError(f"{got}, which holds NaN or infinity")
    if low < 0:
        raise DataError(
            f"{got}, which look normalised, expected [0, 1]; give the images before their "
            "normalisation, and its constants to the network (--normalize, mean= and std=)"
        )
    if not tensor.is_floating_point():
        if high > 255:
            raise DataError(f"{got}, expected 0 to 255; divide 16 bits by 257")
        return 1
    if 0 < high <= 1.5 / 255:
        raise DataError(f"{got}, expected [0, 1]; were they divided by 255 twice?")
    if high <= 1 + 1e-6:
        return 255
    if high <= 255 and bool((tensor == tensor.round()).all()):
        return 1
    raise DataError(f"{got}, expected [0, 1]; divide pixels from 0 to 255 by 255")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

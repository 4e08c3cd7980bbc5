"""Batches from a split: which samples, in which order, cropped and mirrored how, from seeds alone."""

from collections.abc import Iterator

import torch
from torch.nn import functional

from robustsoup.data.splits import Augmentation, Split
from robustsoup.errors import DataError
from robustsoup.seeding import keyed_generator

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images of any shape as float32 in [0, 1]: each value divided by 255."""
    return images.to(torch.float32).div_(255)


def passes(split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Iterate over a whole split in its order: images float32 (b, c, h, w) in [0, 1], channels last, and labels int64 (b,).

    b is 128 on a CPU, where the memory of larger passes comes and goes, and 500 elsewhere.
    """
    size = 128 if split.images.device.type == "cpu" else 500
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        yield to_float(images).contiguous(memory_format=torch.channels_last), labels


def augment(
    images: torch.Tensor, augmentation: Augmentation, generator: torch.Generator
) -> torch.Tensor:
    """Crop each image at a random place after zero padding, and mirror each with probability 1/2.

    images: uint8 (n, c, h, w) on any device; returns the same shape, type and device.
    generator: a CPU generator; it draws the same numbers whatever the device.
    """
    n, _, height, width = images.shape
    pad = augmentation.pad
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator).to(images.device)
    mirrored = torch.rand(n, generator=generator).to(images.device) < 0.5
    if pad:
        windows = (
            functional.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        )
        images = windows[torch.arange(n, device=images.device), :, top, left]
    if augmentation.flip:
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augmented: bool = True,
    shuffle: bool = True,
    drop_last: bool = True,
    skip: int = 0,
) -> Iterator[Batch]:
    """Iterate over one epoch of (images float32 (b, c, h, w) in [0, 1], labels int64 (b,), ids int64 (b,)).

    The order depends on seed and epoch only; what augmentation does to batch number s, on (seed, epoch, s) only.
    So skip=k yields exactly the batches k, k+1, ... of the whole epoch, at no cost for those left out.
    drop_last leaves out a smaller last batch, so that shapes stay fixed; a split smaller than a batch still gives one.

    Raises DataError if batch_size is below 1 or skip below 0.
    """
    if batch_size < 1:
        raise DataError(
            f"{split.record['name']} {split.name}: got batch_size {batch_size}, expected 1 or more"
        )
    if skip < 0:
        raise DataError(f"{split.record['name']} {split.name}: got skip {skip}, expected 0 or more")
    n = len(split)
    order = (
        torch.randperm(n, generator=keyed_generator("order", seed, epoch))
        if shuffle
        else torch.arange(n)
    )
    rows = list(order.to(split.images.device).split(batch_size))
    if drop_last and len(rows) > 1 and len(rows[-1]) < batch_size:
        rows.pop()
    numbered = list(enumerate(rows))[skip:]
    augmentation = split.augmentation if augmented else Augmentation()
    return (
        _batch(split, chosen, augmentation, (seed, epoch, number)) for number, chosen in numbered
    )


def _batch(
    split: Split, rows: torch.Tensor, augmentation: Augmentation, key: tuple[int, int, int]
) -> Batch:
    images = split.images[rows]
    if augmentation != Augmentation():
        images = augment(images, augmentation, keyed_generator("augment", *key))
    return to_float(images), split.labels[rows], split.ids[rows]

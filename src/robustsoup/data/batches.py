"""Batches from a split; order and augmentation depend only on seeds."""

from collections.abc import Iterator

import torch
from torch.nn import functional

from robustsoup.data.splits import Augmentation, Split
from robustsoup.errors import DataError
from robustsoup.seeding import keyed_generator

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""images float32 (b, c, h, w) in [0, 1], labels int64 (b,), ids int64 (b,)."""


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images of any shape to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def passes(split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Iterate over a whole split in its order, without augmentation.

    Yields:
        Images float32 (b, c, h, w) in [0, 1], channels last, and labels int64 (b,); b is 128 on
        a CPU, where larger batches fragment memory, and 500 elsewhere.
    """
    size = 128 if split.images.device.type == "cpu" else 500
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        yield to_float(images).contiguous(memory_format=torch.channels_last), labels


def augment(
    images: torch.Tensor, augmentation: Augmentation, generator: torch.Generator
) -> torch.Tensor:
    """Crop each image at a random place after zero padding; mirror each with probability 1/2.

    A transform of the user takes the place of both.

    Args:
        images: uint8 (n, c, h, w) on any device.
        augmentation: The padding, and whether images are mirrored; or the transform.
        generator: A CPU generator; it draws the same numbers for every device.

    Returns:
        Images of the same shape, type and device.
    """
    if augmentation.transform is not None:
        return augmentation.transform.apply(images, generator)
    n, _, height, width = images.shape
    pad = augmentation.pad
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator).to(images.device)
    mirrored = torch.rand(n, generator=generator, dtype=torch.float32).to(images.device) < 0.5
    if pad:
        padded = functional.pad(images, (pad, pad, pad, pad))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
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
    """Iterate over the batches of one epoch.

    The order depends on seed and epoch only, the augmentation of a batch on seed, epoch and its
    number only. `skip=k` therefore yields exactly the batches k, k+1, ... of the whole epoch.

    Args:
        split: The samples.
        batch_size: Samples in a batch; at least 1.
        seed: Seed of order and augmentation.
        epoch: Number of the epoch.
        augmented: Whether the split's augmentation is applied.
        shuffle: Whether the samples are shuffled.
        drop_last: Whether a smaller last batch is dropped, so that shapes stay fixed; a split
            smaller than one batch still yields one batch.
        skip: Number of batches at the start that are not yielded; at least 0.

    Raises:
        DataError: batch_size or skip is too small.
    """
    where = f"{split.record['name']} {split.name}"
    if batch_size < 1:
        raise DataError(f"{where}: got batch_size {batch_size}, expected 1 or more")
    if skip < 0:
        raise DataError(f"{where}: got skip {skip}, expected 0 or more")
    order = torch.arange(len(split))
    if shuffle:
        order = torch.randperm(len(split), generator=keyed_generator("order", seed, epoch))
    rows_of_batches = list(order.to(split.images.device).split(batch_size))
    if drop_last and len(rows_of_batches) > 1 and len(rows_of_batches[-1]) < batch_size:
        rows_of_batches.pop()
    augmentation = split.augmentation if augmented else Augmentation()
    return (
        _build_batch(split, rows, augmentation, (seed, epoch, number))
        for number, rows in list(enumerate(rows_of_batches))[skip:]
    )


def _build_batch(
    split: Split, rows: torch.Tensor, augmentation: Augmentation, key: tuple[int, int, int]
) -> Batch:
    images = split.images[rows]
    if augmentation != Augmentation():
        images = augment(images, augmentation, keyed_generator("augment", *key))
    return to_float(images), split.labels[rows], split.ids[rows]

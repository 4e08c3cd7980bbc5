"""Folders of corrupted copies of a test set, in the format of CIFAR-10-C: natural shift.

Source: Hendrycks and Dietterich 2019, arXiv:1903.12261.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from robustsoup.data.splits import Split
from robustsoup.errors import DataError
from robustsoup.paths import user_path

SEVERITIES = 5
LABELS_FILE = "labels.npy"

NumberArray = numpy.ndarray[Any, numpy.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Corruptions:
    """The corruptions of a folder, mapped from their files.

    Attributes:
        folder: The folder.
        images: uint8 (5 n, h, w, c) by the name of the corruption: severity 1 first, 5 last.
        labels: int64 (5 n,).
    """

    folder: Path
    images: dict[str, NumberArray]
    labels: torch.Tensor

    def splits(self, like: Split) -> Iterator[tuple[str, Split]]:
        """Iterate over (corruption, samples of all severities), as many of each as `like` has."""
        total = len(self.labels) // SEVERITIES
        count = min(len(like), total)
        rows = torch.cat([torch.arange(count) + total * level for level in range(SEVERITIES)])
        for name, images in self.images.items():
            pixels = torch.from_numpy(numpy.ascontiguousarray(images[rows.numpy()]))
            yield (
                name,
                replace(
                    like, images=pixels.permute(0, 3, 1, 2), labels=self.labels[rows], ids=rows
                ),
            )


def open_corruptions(folder: str | os.PathLike[str], like: Split) -> Corruptions:
    """Map the files of a folder: labels.npy, and one .npy file of images for each corruption.

    Args:
        folder: The folder.
        like: The split whose images and classes the folder must match.

    Raises:
        DataError: A file is missing, broken, or does not match; the error names it.
    """
    path = user_path(folder)
    names = sorted(file.stem for file in path.glob("*.npy") if file.name != LABELS_FILE)
    if not names or not (path / LABELS_FILE).is_file():
        raise DataError(
            f"{path}: expected {LABELS_FILE} and one .npy file of images for each corruption, as "
            "in CIFAR-10-C"
        )
    labels = _map_array(path / LABELS_FILE, 1)
    channels, height, width = like.images.shape[1:]
    if labels.dtype.kind not in "iu" or not len(labels) or len(labels) % SEVERITIES:
        raise DataError(
            f"{path / LABELS_FILE}: got {len(labels)} labels of type {labels.dtype}, expected "
            f"integers for {SEVERITIES} severities"
        )
    if labels.min() < 0 or labels.max() >= like.classes:
        raise DataError(
            f"{path / LABELS_FILE}: got labels {labels.min()}..{labels.max()}, "
            f"expected 0..{like.classes - 1}"
        )
    images = {name: _map_array(path / f"{name}.npy", 4) for name in names}
    expected = (len(labels), height, width, channels)
    for name, array in images.items():
        if array.dtype != numpy.uint8 or array.shape != expected:
            raise DataError(
                f"{path / name}.npy: got {array.dtype} {array.shape}, expected uint8 {expected}"
            )
    return Corruptions(path, images, torch.from_numpy(labels.astype(numpy.int64)))


def _map_array(path: Path, dimensions: int) -> NumberArray:
    try:
        array = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable .npy file ({error})") from None
    if not isinstance(array, numpy.ndarray) or array.ndim != dimensions:
        raise DataError(f"{path}: expected one array of {dimensions} dimensions")
    return array

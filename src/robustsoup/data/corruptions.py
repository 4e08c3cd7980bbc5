"""Folders of corrupted copies of a test set, in the format of CIFAR-10-C: natural shift.

Source: Hendrycks and Dietterich 2019, arXiv:1903.12261.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy
import torch

from robustsoup.data.splits import Split
from robustsoup.data.synthetic import FileState, cached_file_digest
from robustsoup.errors import DataError
from robustsoup.paths import user_path

SEVERITIES = 5
LABELS_FILE = "labels.npy"

CorruptionPart = Literal["all", "select", "search", "confirm", "report"]
"""Copies of which images: of all, of every second one from the first on, or of the others. Soups
are selected by the former half and reported on the latter: there are no corrupted copies of val.
Where finalists are confirmed, every third image of the selecting half is kept for that ("confirm"),
and the others steer the search ("search")."""

NumberArray = numpy.ndarray[Any, numpy.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Corruptions:
    """The corruptions of a folder, mapped from their files.

    Attributes:
        folder: The folder.
        images: uint8 (5 n, h, w, c) by the name of the corruption: severity 1 first, 5 last.
        labels: int64 (5 n,).
        digest: sha256 (hex) over the files.
        part: Whose copies `splits` yields.
    """

    folder: Path
    images: dict[str, NumberArray]
    labels: torch.Tensor
    digest: str
    part: CorruptionPart = "all"

    @property
    def rows(self) -> torch.Tensor:
        """int64, the images of `part`, as rows of one severity."""
        total = len(self.labels) // SEVERITIES
        if self.part in ("all", "report"):
            return torch.arange(total)[1::2] if self.part == "report" else torch.arange(total)
        selecting = torch.arange(0, total, 2)
        kept_aside = torch.arange(len(selecting)) % 3 == 2
        parts = {"select": selecting, "search": selecting[~kept_aside]}
        return parts.get(self.part, selecting[kept_aside])

    def count_images(self, like: Split) -> int:
        """Return the number of images whose copies `splits` yields."""
        return min(len(like), len(self.rows))

    def count_copies(self, like: Split) -> int:
        """Return the number of corrupted copies of these images."""
        return self.count_images(like) * SEVERITIES * len(self.images)

    def splits(self, like: Split) -> Iterator[tuple[str, Split]]:
        """Iterate over (corruption, samples of all severities), as many of each as `like` has."""
        total = len(self.labels) // SEVERITIES
        images = self.rows[: self.count_images(like)]
        rows = torch.cat([images + total * level for level in range(SEVERITIES)])
        for name, array in self.images.items():
            pixels = torch.from_numpy(numpy.ascontiguousarray(array[rows.numpy()]))
            yield (
                name,
                replace(
                    like, images=pixels.permute(0, 3, 1, 2), labels=self.labels[rows], ids=rows
                ),
            )


def open_corruptions(
    folder: str | os.PathLike[str], like: Split, part: CorruptionPart = "all"
) -> Corruptions:
    """Map the files of a folder: labels.npy, and one .npy file of images for each corruption.

    Args:
        folder: The folder.
        like: The split whose images and classes the folder must match.
        part: Whose copies are used.

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
    files = [path / LABELS_FILE, *(path / f"{name}.npy" for name in names)]
    return Corruptions(
        path, images, torch.from_numpy(labels.astype(numpy.int64)), _digest_files(files), part
    )


def _digest_files(files: list[Path]) -> str:
    """Return the sha256 (hex) over names and contents; each file is read once, then cached."""
    digest = hashlib.sha256()
    for file in files:
        content = cached_file_digest(file, FileState.of(file), None)
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def _map_array(path: Path, dimensions: int) -> NumberArray:
    try:
        array = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable .npy file ({error})") from None
    if not isinstance(array, numpy.ndarray) or array.ndim != dimensions:
        raise DataError(f"{path}: expected one array of {dimensions} dimensions")
    return array

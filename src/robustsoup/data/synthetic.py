"""Synthetic images from one .npz file of any size, mapped into memory, and batches that mix them with real ones."""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy
import torch

from robustsoup.data.batches import Batch, augment, to_float
from robustsoup.data.splits import Augmentation, Split
from robustsoup.errors import DataError, StorageError
from robustsoup.files import cache_folder, write_text
from robustsoup.progress import Progress
from robustsoup.seeding import keyed_generator

BLOCK = 1 << 22
LABELS = 1 << 20
"""Labels that are looked at together."""
LOCAL_HEADER = 30
"""Bytes of a zip member's own header before its name; its last four are the lengths of the name and of what follows."""


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Labelled images made by a generative model, in a file.

    images: uint8 (n, h, w, c), labels: integers (n,), both mapped from the file; digest: sha256 (hex) of the file.
    """

    path: Path
    digest: str
    images: numpy.ndarray = field(repr=False)
    labels: numpy.ndarray = field(repr=False)
    stamp: tuple[int, int] = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike, on_progress: Progress | None = None) -> "Synthetic":
        """Map an uncompressed .npz with `image` (n, h, w, c) uint8 and `label` (n,), as numpy.savez writes it.

        The file is read once in full for its digest, which the user's cache folder then keeps by path, size and time;
        on_progress(done, total, figures) counts MiB meanwhile. A compressed file cannot be mapped and is refused: 60 GB
        are not decoded unasked into a second place.

        Raises DataError, naming the file and what is wrong with it.
        """
        path = Path(path).expanduser()
        try:
            with open(path, "rb") as file:
                images, labels = (_mapped(path, file, name) for name in ("image", "label"))
            stamp = _stamp(path)
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such file; expected an .npz with image and label"
            ) from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path}: not a readable .npz file ({reason})") from None
        _check_arrays(path, images, labels)
        return cls(path, _digest(path, stamp, on_progress), images, labels, stamp)

    def __len__(self) -> int:
        return len(self.images)

    def check_fit(self, data: Split) -> None:
        """Raise DataError unless the images have the size of the data's, and the labels are among its classes."""
        height, width, channels = self.images.shape[1:]
        if (channels, height, width) != tuple(data.images.shape[1:]):
            _, c, h, w = data.images.shape
            raise DataError(
                f"{self.path}: got images of shape {(height, width, channels)}, expected {(h, w, c)} as {data.record['name']} has"
            )
        low, high = _bounds(self.labels)
        if low < 0 or high >= data.classes:
            raise DataError(
                f"{self.path}: got labels {low}..{high}, expected 0..{data.classes - 1} as {data.record['name']} has"
            )

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The images (b, c, h, w) uint8 and labels (b,) int64 of some rows.

        Raises DataError if the file has changed since it was opened: reading on could end the process.
        """
        try:
            same = _stamp(self.path) == self.stamp
        except OSError:
            same = False
        if not same:
            raise DataError(
                f"{self.path}: gone or changed since it was opened; put the file back and run the command again"
            )
        at = rows.numpy()
        images = torch.from_numpy(numpy.ascontiguousarray(self.images[at].transpose(0, 3, 1, 2)))
        return images, torch.from_numpy(self.labels[at].astype(numpy.int64))


def check_fraction(fraction: float, batch_size: int) -> None:
    """Raise DataError unless it is in [0, 1) and leaves a real image in each batch."""
    if not 0 <= fraction < 1:
        raise DataError(f"synthetic_fraction: got {fraction}, expected a number in [0, 1)")
    if round(fraction * batch_size) == batch_size:
        raise DataError(
            f"synthetic_fraction: {fraction} of a batch of {batch_size} leaves no real image in it"
        )


def mixed_batches(
    split: Split,
    synthetic: Synthetic,
    fraction: float,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    skip: int = 0,
) -> Iterator[Batch]:
    """One epoch as `batches` gives it, but with round(fraction * batch_size) synthetic images in each batch, at its end.

    An epoch has as many batches as without them (so it sees the share 1 - fraction of the real images, drawn anew each
    epoch), as in Rebuffi et al.'s and Wang et al.'s training. The synthetic ones are drawn uniformly from the whole file,
    with replacement, by (seed, epoch, number of the batch), so a file that is sorted by class is no matter and nothing is
    permuted. Both kinds are augmented alike. ids: of synthetic image r, -1 - r.

    Sources: Rebuffi et al. 2021, arXiv:2103.01946; Wang et al. 2023, arXiv:2302.04638.
    """
    check_fraction(fraction, batch_size)
    made = round(fraction * batch_size)
    real = batch_size - made
    order = torch.randperm(len(split), generator=keyed_generator("order", seed, epoch)).to(
        split.images.device
    )
    for number in range(skip, max(len(split) // batch_size, 1)):
        rows = order[number * real : (number + 1) * real]
        drawn = torch.randint(
            len(synthetic), (made,), generator=keyed_generator("synthetic", seed, epoch, number)
        )
        images, labels = (tensor.to(rows.device) for tensor in synthetic.take(drawn))
        images = torch.cat([split.images[rows], images])
        if split.augmentation != Augmentation():
            images = augment(
                images, split.augmentation, keyed_generator("augment", seed, epoch, number)
            )
        ids = torch.cat([split.ids[rows], (-1 - drawn).to(rows.device)])
        yield to_float(images), torch.cat([split.labels[rows], labels]), ids


def _mapped(path: Path, file: BinaryIO, name: str) -> numpy.ndarray:
    """One array of the file, mapped where it lies; numpy.load cannot do that inside an .npz."""
    with zipfile.ZipFile(file) as archive:
        try:
            member = archive.getinfo(f"{name}.npy")
        except KeyError:
            there = (
                ", ".join(entry.removesuffix(".npy") for entry in archive.namelist()) or "nothing"
            )
            raise DataError(
                f'{path}: no "{name}" in it; got {there}, expected image and label'
            ) from None
    if member.compress_type != zipfile.ZIP_STORED:
        raise DataError(
            f"{path}: compressed, so it cannot be mapped into memory; rewrite it once: python -c 'import numpy; "
            f'a = numpy.load("{path.name}"); numpy.savez("plain.npz", image=a["image"], label=a["label"])\''
        )
    file.seek(member.header_offset + LOCAL_HEADER - 4)
    lengths = file.read(4)
    file.seek(
        int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR
    )
    begin = file.tell()
    shape, in_columns, dtype = _array_header(file)
    start, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject or in_columns:
        kind = "Python objects" if dtype.hasobject else "Fortran order"
        raise DataError(f"{path}: {name} is stored as {kind}, expected plain numbers in C order")
    if (
        start - begin + math.prod(shape) * dtype.itemsize > member.file_size
        or begin + member.file_size > size
    ):
        raise DataError(
            f"{path}: {name} is cut short: shape {shape} does not fit into {member.file_size:,} bytes"
        )
    if not math.prod(shape):
        return numpy.zeros(shape, dtype)
    return numpy.memmap(path, dtype, "r", start, shape)


def _array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, numpy.dtype]:
    version = numpy.lib.format.read_magic(file)
    if version == (1, 0):
        return numpy.lib.format.read_array_header_1_0(file)
    return numpy.lib.format.read_array_header_2_0(file)


def _check_arrays(path: Path, images: numpy.ndarray, labels: numpy.ndarray) -> None:
    if images.dtype != numpy.uint8 or images.ndim != 4:
        raise DataError(
            f"{path}: image is {images.dtype} of shape {images.shape}, expected uint8 of shape (n, h, w, c)"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"{path}: label is {labels.dtype} of shape {labels.shape}, expected integers of shape (n,)"
        )
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{path}: got {len(images)} images and {len(labels)} labels, expected as many of both, at least one"
        )


def _bounds(labels: numpy.ndarray) -> tuple[int, int]:
    parts = [labels[at : at + LABELS] for at in range(0, len(labels), LABELS)]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)


def _stamp(path: Path) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def _digest(path: Path, stamp: tuple[int, int], on_progress: Progress | None) -> str:
    """sha256 of the whole file: from the cache folder if it was taken before, of a file of that path, size and time."""
    known = f"{path.resolve()} {stamp[0]} {stamp[1]}"
    kept = (
        cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(known)).hexdigest()[:32]}.json"
    )
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content["of"] == known:
            return content["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest, done, total = hashlib.sha256(), 0, stamp[0]
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            if on_progress:
                on_progress(done >> 20, max(total >> 20, 1), f"reading {path.name} once")
    if _stamp(path) != stamp:
        raise DataError(
            f"{path}: changed while it was read; wait until it is complete and run the command again"
        )
    try:
        write_text(kept, json.dumps({"of": known, "sha256": digest.hexdigest()}))
    except StorageError:
        pass  # then it is read again next time
    return digest.hexdigest()

"""Synthetic images from a memory-mapped .npz file, and batches that mix them with real ones."""

import contextlib
import hashlib
import json
import math
import os
import struct
import tokenize
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from robustsoup.data.batches import Batch, augment, to_float
from robustsoup.data.splits import Augmentation, Split
from robustsoup.digests import digest_json
from robustsoup.documents import read_json
from robustsoup.errors import DataError, StorageError
from robustsoup.files import cache_folder, open_regular, write_text
from robustsoup.paths import user_path
from robustsoup.printable import first_line
from robustsoup.progress import Progress
from robustsoup.seeding import keyed_generator

READ_BLOCK_BYTES = 1 << 22
LABEL_CHUNK = 1 << 20
"""Labels that are scanned together."""
ZIP_LOCAL_HEADER_BYTES = 30
"""Length of a zip member's local header before its name; the last four bytes are the lengths of
the name and of the extra field that follow."""

_NPZ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    MemoryError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
)
"""What zipfile and numpy raise on broken files."""

NumberArray = numpy.ndarray[Any, numpy.dtype[Any]]


@dataclass(frozen=True)
class FileState:
    """Size in bytes and modification time in nanoseconds of a file."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Read the present state of a file."""
        state = path.stat()
        return cls(state.st_size, state.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Labelled images of a generative model, mapped from a file.

    Attributes:
        path: The file.
        digest: sha256 (hex) of the file.
        images: uint8 (n, h, w, c).
        labels: integers (n,).
        state: Size and time of the file when it was opened.
    """

    path: Path
    digest: str
    images: NumberArray = field(repr=False)
    labels: NumberArray = field(repr=False)
    state: FileState = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], on_progress: Progress | None = None) -> "Synthetic":
        """Map an uncompressed .npz file, as numpy.savez writes it.

        The file is read once in full for its digest, which is cached by path, size and time.
        A compressed file cannot be mapped and is refused, since decompressing it could fill the
        disk.

        Args:
            path: The file; holds `image`, uint8 (n, h, w, c), and `label`, integers (n,).
            on_progress: Called with (done, total, figures), in MiB, while the digest is computed.

        Raises:
            DataError: The file is missing, unreadable, compressed or holds other arrays; the error
                names the file.
        """
        path = user_path(path)
        try:
            with open_regular(path) as file:
                images = _map_npz_array(path, file, "image")
                labels = _map_npz_array(path, file, "label")
            state = FileState.of(path)
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such file; expected an .npz with image and label"
            ) from None
        except _NPZ_ERRORS as error:
            reason = first_line(error)
            raise DataError(f"{path}: not a readable .npz file ({reason})") from None
        _check_arrays(path, images, labels)
        return cls(path, cached_file_digest(path, state, on_progress), images, labels, state)

    def __len__(self) -> int:
        return len(self.images)

    def check_fit(self, data: Split) -> None:
        """Check that the images and labels fit a data set.

        Raises:
            DataError: The images have another shape, or a label is not a class of the data.
        """
        height, width, channels = self.images.shape[1:]
        if (channels, height, width) != tuple(data.images.shape[1:]):
            _, c, h, w = data.images.shape
            raise DataError(
                f"{self.path}: got images of shape {(height, width, channels)}, "
                f"expected {(h, w, c)} as in {data.record['name']}"
            )
        low, high = _label_range(self.labels)
        if low < 0 or high >= data.classes:
            raise DataError(
                f"{self.path}: got labels {low}..{high}, "
                f"expected 0..{data.classes - 1} as in {data.record['name']}"
            )

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read some rows.

        Args:
            rows: int64 (b,).

        Returns:
            images uint8 (b, c, h, w) and labels int64 (b,).

        Raises:
            DataError: The file was removed or changed after it was opened. (Reading past the end
                of a mapped file would kill the process.)
        """
        try:
            unchanged = FileState.of(self.path) == self.state
        except OSError:
            unchanged = False
        if not unchanged:
            raise DataError(
                f"{self.path}: removed or changed after it was opened; "
                "restore the file and run the command again"
            )
        indices = rows.numpy()
        images = numpy.ascontiguousarray(self.images[indices].transpose(0, 3, 1, 2))
        return torch.from_numpy(images), torch.from_numpy(self.labels[indices].astype(numpy.int64))


def check_fraction(fraction: float, batch_size: int) -> None:
    """Check the share of synthetic images.

    Raises:
        DataError: The fraction is not in [0, 1), or leaves no real image in a batch.
    """
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
    """Iterate over one epoch of batches that end in synthetic images.

    The number of batches is that of an epoch without synthetic images, so an epoch uses the share
    1 - fraction of the real images, drawn again each epoch, as in the training of Rebuffi et al.
    and Wang et al. Synthetic images are drawn uniformly from the whole file, with replacement, by
    (seed, epoch, number of the batch). Real and synthetic images are augmented in the same way.

    Args:
        split: The real images.
        synthetic: The synthetic images.
        fraction: share of synthetic images; round(fraction * batch_size) in each batch.
        batch_size: Images in a batch.
        seed: Seed of order, draws and augmentation.
        epoch: Number of the epoch.
        skip: Number of batches at the start that are not yielded.

    Yields:
        Batches as `batches` does; the id of synthetic image r is -1 - r.

    Raises:
        DataError: The fraction is out of range, or the file changed.

    Sources: Rebuffi et al. 2021, arXiv:2103.01946; Wang et al. 2023, arXiv:2302.04638.
    """
    check_fraction(fraction, batch_size)
    n_synthetic = round(fraction * batch_size)
    n_real = batch_size - n_synthetic
    generator = keyed_generator("order", seed, epoch)
    order = torch.randperm(len(split), generator=generator).to(split.images.device)
    for number in range(skip, max(len(split) // batch_size, 1)):
        rows = order[number * n_real : (number + 1) * n_real]
        generator = keyed_generator("synthetic", seed, epoch, number)
        drawn = torch.randint(len(synthetic), (n_synthetic,), generator=generator)
        images, labels = (tensor.to(rows.device) for tensor in synthetic.take(drawn))
        images = torch.cat([split.images[rows], images])
        if split.augmentation != Augmentation():
            generator = keyed_generator("augment", seed, epoch, number)
            images = augment(images, split.augmentation, generator)
        ids = torch.cat([split.ids[rows], (-1 - drawn).to(rows.device)])
        yield to_float(images), torch.cat([split.labels[rows], labels]), ids


def _map_npz_array(path: Path, file: BinaryIO, name: str) -> NumberArray:
    """Map one array of an .npz file in place, which numpy.load cannot do."""
    member = _find_npz_member(path, file, name)
    file.seek(member.header_offset + ZIP_LOCAL_HEADER_BYTES - 4)
    lengths = file.read(4)
    name_bytes = int.from_bytes(lengths[:2], "little")
    extra_bytes = int.from_bytes(lengths[2:], "little")
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
    begin = file.tell()
    shape, fortran_order, dtype = _read_array_header(file)
    start, file_bytes = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject or fortran_order:
        kind = "Python objects" if dtype.hasobject else "Fortran order"
        raise DataError(f"{path}: {name} is stored as {kind}, expected plain numbers in C order")
    member_bytes = start - begin + math.prod(shape) * dtype.itemsize
    if member_bytes > member.file_size or begin + member.file_size > file_bytes:
        raise DataError(
            f"{path}: {name} is cut short: shape {shape} does not fit into "
            f"{member.file_size:,} bytes"
        )
    if not math.prod(shape):
        return numpy.zeros(shape, dtype)
    return numpy.memmap(path, dtype, "r", start, shape)


def _find_npz_member(path: Path, file: BinaryIO, name: str) -> zipfile.ZipInfo:
    with zipfile.ZipFile(file) as archive:
        try:
            member = archive.getinfo(f"{name}.npy")
        except KeyError:
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            raise DataError(
                f'{path}: no "{name}" in it; got {", ".join(names) or "nothing"}, '
                "expected image and label"
            ) from None
    if member.compress_type != zipfile.ZIP_STORED:
        raise DataError(
            f"{path}: compressed, so it cannot be mapped into memory; rewrite it once: "
            f'python -c \'import numpy; a = numpy.load("{path.name}"); '
            'numpy.savez("plain.npz", image=a["image"], label=a["label"])\''
        )
    return member


def _read_array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, numpy.dtype[Any]]:
    """Read (shape, fortran_order, dtype) of an .npy header."""
    version = numpy.lib.format.read_magic(file)
    if version == (1, 0):
        return numpy.lib.format.read_array_header_1_0(file)
    return numpy.lib.format.read_array_header_2_0(file)


def _check_arrays(path: Path, images: NumberArray, labels: NumberArray) -> None:
    if images.dtype != numpy.uint8 or images.ndim != 4:
        raise DataError(
            f"{path}: image is {images.dtype} of shape {images.shape}, "
            "expected uint8 of shape (n, h, w, c)"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"{path}: label is {labels.dtype} of shape {labels.shape}, "
            "expected integers of shape (n,)"
        )
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{path}: got {len(images)} images and {len(labels)} labels, "
            "expected equal numbers of both, at least one"
        )


def _label_range(labels: NumberArray) -> tuple[int, int]:
    chunks = [labels[at : at + LABEL_CHUNK] for at in range(0, len(labels), LABEL_CHUNK)]
    return min(int(chunk.min()) for chunk in chunks), max(int(chunk.max()) for chunk in chunks)


def digest_cache() -> Path:
    """Return the folder of the digests of files of generated images."""
    return cache_folder() / "digests"


def read_digest_cache(kind: str, of: str) -> object:
    """Return what `write_digest_cache` stored; None if it is absent or was changed since."""
    try:
        content = read_json(_cached_file(kind, of))
        damaged = content.pop("digest") != digest_json(content)
        return None if damaged or content["of"] != of else content["found"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_digest_cache(kind: str, of: str, found: object) -> None:
    """Store what was found, JSON-able, if the folder can be written.

    Args:
        kind: "file", "duplicates" or "sketch".
        of: What it was found of: digests, or the path, size and time of a file.
        found: The finding.
    """
    with contextlib.suppress(StorageError):  # without it the next run looks again
        content = {"of": of, "found": found}
        digest = digest_json(content)
        write_text(_cached_file(kind, of), json.dumps({**content, "digest": digest}))


def _cached_file(kind: str, of: str) -> Path:
    name = hashlib.sha256(os.fsencode(of)).hexdigest()[:32]
    return digest_cache() / f"{kind}-{name}.json"


def cached_file_digest(path: Path, state: FileState, on_progress: Progress | None) -> str:
    """Return the sha256 (hex) of a file, from the cache folder if path, size and time match."""
    identity = f"{path.resolve()} {state.size} {state.modified_ns}"
    cached = read_digest_cache("file", identity)
    if isinstance(cached, str):
        return cached
    digest = _compute_file_digest(path, state, on_progress)
    write_digest_cache("file", identity, digest)
    return digest


def _compute_file_digest(path: Path, state: FileState, on_progress: Progress | None) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            if on_progress:
                on_progress(done >> 20, max(state.size >> 20, 1), f"reading {path.name} once")
    if FileState.of(path) != state:
        raise DataError(
            f"{path}: changed while it was read; "
            "wait until it is complete and run the command again"
        )
    return digest.hexdigest()

"""Decode the images of a folder once, store them in the user's cache folder, and map them."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy
import torch

from robustsoup.data.images import Decoder
from robustsoup.data.splits import (
    channel_counts,
    statistics_of_counts,
    streamed_digest,
    tensor_bytes,
)
from robustsoup.digests import FileDigest, digest_json, find_damaged_file
from robustsoup.documents import read_json
from robustsoup.errors import StorageError
from robustsoup.files import cache_folder
from robustsoup.leftovers import remove_leftovers, temporary_sibling
from robustsoup.progress import Progress

CACHE_FORMAT = 4
"""Version of the cache; raise it when the same files decode to other pixels or another layout."""
SPLIT_NAMES = ("train", "val", "test")
SUMMARY_FILE = "about.json"
CACHE_ADVICE = "free space there, permit writing, or set XDG_CACHE_HOME to another folder"

ReadImage = Callable[[str], torch.Tensor]
"""Decodes the image of a path to uint8 (channels, size, size), contiguous."""
WriteImage = Callable[[int, torch.Tensor], None]
"""Writes an image to a row of a file."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files that are not decoded yet, with labels and ids as in Samples."""

    paths: tuple[str, ...]
    labels: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: torch.Tensor) -> "ImageFiles":
        """Return the files of these rows, in their order."""
        paths = tuple(self.paths[row] for row in rows.tolist())
        return ImageFiles(paths, self.labels[rows], self.ids[rows])


@dataclass(frozen=True, eq=False)
class FolderParts:
    """The files of a folder, assigned to train, val and test.

    Attributes:
        classes: Names of the classes.
        pool: The files that are not test.
        rows: The rows of `pool` in train and the rows in val; together all rows.
        test: The test files.
    """

    classes: tuple[str, ...]
    pool: ImageFiles
    rows: tuple[torch.Tensor, torch.Tensor]
    test: ImageFiles

    def __len__(self) -> int:
        return len(self.pool) + len(self.test)

    def paths(self) -> Iterator[str]:
        """Iterate over the paths of all files."""
        return itertools.chain(self.pool.paths, self.test.paths)


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """Decoded images, mapped from files; the system may drop their pages from memory any time.

    Attributes:
        images: Train, val and test, each uint8 (n, channels, size, size).
        digest: content_digest of pool and test.
        mean: Mean of each channel of the pool, in [0, 1].
        std: Standard deviation of each channel of the pool, in [0, 1].
        scaled: Number of images whose pixels were scaled from 16 bits to 8.
        brightest: Largest pixel of these images, before it was scaled.
    """

    images: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scaled: int
    brightest: int


def decoded_folder() -> Path:
    """Return the folder of the decoded images, one folder in it for each source."""
    return cache_folder() / "folders"


def load_decoded(
    root: Path, parts: FolderParts, decoder: Decoder, on_progress: Progress | None = None
) -> DecodedImages:
    """Map the decoded images of a folder; decode them first if the cache folder lacks them.

    Args:
        root: The folder.
        parts: Its files.
        decoder: Decodes one file.
        on_progress: Called with (done, total, figures) after each decoded image.

    Raises:
        StorageError: The cache folder is full or cannot be written.
        DataError: An image cannot be decoded.
    """
    target = decoded_folder() / _cache_key(root, parts, decoder)
    # Tested before the folder is opened: a folder that appears in between was completed by another
    # process and must not be replaced.
    existed = os.path.exists(target)
    decoded = _open_decoded(target, parts, decoder.size)
    if decoded is not None:
        return decoded
    shape = decoder.count_channels(parts.paths()), decoder.size, decoder.size
    with _fill_folder(target, replace=existed) as folder:
        _check_free_space(folder, len(parts) * math.prod(shape))
        _decode_parts(folder, parts, shape, decoder, on_progress)
    decoded = _open_decoded(target, parts, decoder.size)
    if decoded is None:
        raise StorageError(
            f"{target}: the images decoded there cannot be mapped into memory; {CACHE_ADVICE}"
        )
    return decoded


def _cache_key(root: Path, parts: FolderParts, decoder: Decoder) -> str:
    """Return a key of the folder's path and of each file's name, size, time and order."""
    form = f"\0{CACHE_FORMAT} {decoder.size} {decoder.channels}\0".encode()
    digest = hashlib.sha256(os.fsencode(root.resolve()) + form)
    for path in parts.paths():
        relative = os.fsencode(Path(path).relative_to(root))
        digest.update(relative + f"\0{_image_file_state(path)}\0".encode())
    for rows in parts.rows:
        digest.update(f"{len(rows)}\0".encode())
        digest.update(tensor_bytes(rows))
    return digest.hexdigest()[:32]


def _image_file_state(path: str) -> str:
    try:
        stat = Path(path).stat()
    except OSError:
        # A unique state, so that the file is decoded and the error there names it.
        return secrets.token_hex()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _part_shapes(parts: FolderParts, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(n, *shape) for n in (*map(len, parts.rows), len(parts.test))]


def _open_decoded(target: Path, parts: FolderParts, size: int) -> DecodedImages | None:
    """Map the files of `target`; None if they are absent or not as they were written."""
    try:
        summary = read_json(target / SUMMARY_FILE)
        if summary.pop("summary_digest") != digest_json(summary):
            return None
        files = {name: FileDigest.from_json(item) for name, item in summary["files"].items()}
        if find_damaged_file(target, files) is not None:
            return None
        # Copy on write ("c"): torch refuses read-only arrays.
        arrays = [numpy.load(target / f"{name}.npy", mmap_mode="c") for name in SPLIT_NAMES]
        digest, mean, std = summary["digest"], tuple(summary["mean"]), tuple(summary["std"])
        scaled, brightest = int(summary["scaled"]), int(summary["brightest"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shapes = [array.shape for array in arrays]
    if shapes != _part_shapes(parts, (len(mean), size, size)):
        return None
    if any(array.dtype != numpy.uint8 for array in arrays):
        return None
    train, val, test = (torch.from_numpy(array) for array in arrays)
    return DecodedImages((train, val, test), digest, mean, std, scaled, brightest)


@contextlib.contextmanager
def _fill_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` on success and is removed otherwise.

    Args:
        target: The final folder; if another process has created it meanwhile, that folder is kept.
        replace: Whether `target` is a broken folder to remove.
    """
    temporary = temporary_sibling(target)
    try:
        temporary.mkdir(parents=True)
        remove_leftovers(target.parent)
        yield temporary
        if replace:
            _remove_folder(target)
        _rename_folder(temporary, target)
    except OSError as error:
        raise StorageError(
            f"{target.parent}: decoded images cannot be stored there: "
            f"{error.strerror or error}; {CACHE_ADVICE}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_folder(temporary: Path, target: Path) -> None:
    try:
        temporary.replace(target)
    except OSError:
        if not (target / SUMMARY_FILE).is_file():
            raise


def _remove_folder(folder: Path) -> None:
    """Rename the folder, then remove it, so that a kill leaves no partial folder at its path."""
    renamed = temporary_sibling(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.replace(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def _check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError before hours of decoding if the images will not fit."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"got {free / 1e9:.2f} GB free, needed {needed / 1e9:.2f} GB")


def _decode_parts(
    folder: Path,
    parts: FolderParts,
    shape: tuple[int, int, int],
    decoder: Decoder,
    on_progress: Progress | None,
) -> None:
    """Decode every image into `folder`, one at a time, and write digest and statistics.

    Images are decoded in the order of content_digest and written straight to their final rows.
    """

    def read(path: str) -> torch.Tensor:
        return decoder.read(path, path)

    if on_progress is not None:
        read = _count_images(read, len(parts), on_progress)
    counts = torch.zeros(shape[0], 256, dtype=torch.int64)
    n_train = len(parts.rows[0])
    final_rows = torch.empty(len(parts.pool), dtype=torch.int64)
    final_rows[torch.cat(parts.rows)] = torch.arange(len(parts.pool))
    with contextlib.ExitStack() as stack:
        write_train, write_val, write_test = (
            stack.enter_context(_open_rows_file(folder / f"{name}.npy", part_shape))
            for name, part_shape in zip(SPLIT_NAMES, _part_shapes(parts, shape), strict=True)
        )

        def write_pool(row: int, image: torch.Tensor) -> None:
            counts.add_(channel_counts(image[None]))
            if row < n_train:
                write_train(row, image)
            else:
                write_val(row - n_train, image)

        jobs: tuple[tuple[ImageFiles, Iterable[int], WriteImage], ...] = (
            (parts.pool, final_rows.tolist(), write_pool),
            (parts.test, range(len(parts.test)), write_test),
        )
        digest = streamed_digest(
            (
                (len(files), *shape),
                _decode_and_write(files.paths, rows, read, write),
                files.labels,
            )
            for files, rows, write in jobs
        )
    mean, std = statistics_of_counts(counts)
    names = [f"{name}.npy" for name in SPLIT_NAMES]
    files = {name: FileDigest.of(folder / name).to_json() for name in names}
    summary = {
        "digest": digest,
        "mean": mean,
        "std": std,
        "scaled": decoder.scaled,
        "brightest": decoder.brightest,
        "files": files,
    }
    with _open_synced(folder / SUMMARY_FILE) as file:
        content = {**summary, "summary_digest": digest_json(summary)}
        file.write(json.dumps(content).encode())


def _decode_and_write(
    paths: Iterable[str], rows: Iterable[int], read: ReadImage, write: WriteImage
) -> Iterator[torch.Tensor]:
    for path, row in zip(paths, rows, strict=True):
        image = read(path)
        write(row, image)
        yield image


@contextlib.contextmanager
def _open_rows_file(path: Path, shape: tuple[int, ...]) -> Iterator[WriteImage]:
    """Create an .npy file of uint8 (n, ...); yield write(row, image), for each row in any order.

    The file is written, not mapped: on a full disk, a write raises an error, but a store to mapped
    memory kills the process.
    """
    with _open_synced(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        numpy.lib.format.write_array_header_1_0(file, header)
        start, row_bytes = file.tell(), math.prod(shape[1:])

        def write_row(row: int, image: torch.Tensor) -> None:
            file.seek(start + row * row_bytes)
            file.write(tensor_bytes(image))

        yield write_row


@contextlib.contextmanager
def _open_synced(path: Path) -> Iterator[BinaryIO]:
    """Create a file, and flush it to disk before its folder gets its final name."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _count_images(read: ReadImage, total: int, on_progress: Progress) -> ReadImage:
    numbers = itertools.count(1)

    def read_and_count(path: str) -> torch.Tensor:
        image = read(path)
        on_progress(next(numbers), total, "images decoded")
        return image

    return read_and_count

"""The images of a folder, decoded once into files of the user's cache folder and mapped into memory from there."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy
import torch

from robustsoup.data.splits import channel_counts, statistics_of_counts, streamed_digest
from robustsoup.errors import StorageError
from robustsoup.files import cache_folder
from robustsoup.progress import Progress

# To be raised whenever the same files are to be decoded to other pixels, or stored in another way.
FORMAT = 1
PARTS = ("train", "val", "test")
ABOUT = "about.json"
LEFTOVER_SECONDS = 24 * 3600
ADVICE = "free space there, permit writing, or set XDG_CACHE_HOME to another folder"

Read = Callable[[str], torch.Tensor]
Write = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True, eq=False)
class Files:
    """Image files that are not decoded yet, with labels and ids as in Samples."""

    paths: tuple[str, ...]
    labels: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: torch.Tensor) -> "Files":
        return Files(
            tuple(self.paths[row] for row in rows.tolist()), self.labels[rows], self.ids[rows]
        )


@dataclass(frozen=True, eq=False)
class Parts:
    """What is not test (`pool`), which of its rows are train and which val (each row is one of them), and test."""

    classes: tuple[str, ...]
    pool: Files
    rows: tuple[torch.Tensor, torch.Tensor]
    test: Files

    def __len__(self) -> int:
        return len(self.pool) + len(self.test)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images of train, val and test, each uint8 (n, 3, size, size); content_digest of pool and test; pool's statistics.

    The images are mapped from files: only those in use are in memory, and the system may drop them at any time.
    """

    images: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_decoded(
    root: Path, parts: Parts, size: int, read: Read, on_progress: Progress | None = None
) -> Decoded:
    """The parts' images: decoded by read(path) -> uint8 (3, size, size), contiguous, unless the cache folder has them.

    on_progress(done, total, figures) counts images as they are decoded.

    Raises whatever `read` raises, and StorageError if the cache folder is full or cannot be written.
    """
    place = cache_folder() / "folders" / _key(root, parts, size)
    # Asked before it is opened: a folder that appears in between is another process's work, whole and not broken.
    existed = os.path.exists(place)
    found = _open(place, parts, size)
    if found is not None:
        return found
    with _filled(place, replace=existed) as folder:
        _check_space(folder, len(parts) * 3 * size * size)
        _decode(
            folder, parts, size, _counted(read, len(parts), on_progress) if on_progress else read
        )
    found = _open(place, parts, size)
    if found is None:
        raise StorageError(
            f"{place}: the images decoded there cannot be mapped into memory; {ADVICE}"
        )
    return found


def _key(root: Path, parts: Parts, size: int) -> str:
    """Changes with any file's name, size or time and with the order. Two folders never share, even with equal times."""
    digest = hashlib.sha256(os.fsencode(root.resolve()) + f"\0{FORMAT} {size}\0".encode())
    for path in (*parts.pool.paths, *parts.test.paths):
        digest.update(os.fsencode(Path(path).relative_to(root)) + f"\0{_stamp(path)}\0".encode())
    for rows in parts.rows:
        digest.update(f"{len(rows)}\0".encode())
        digest.update(rows.numpy())
    return digest.hexdigest()[:32]


def _stamp(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return (
            secrets.token_hex()
        )  # unlike any other, so that it is decoded, where the error names it
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _shapes(parts: Parts, size: int) -> list[tuple[int, ...]]:
    return [(n, 3, size, size) for n in (*map(len, parts.rows), len(parts.test))]


def _open(place: Path, parts: Parts, size: int) -> Decoded | None:
    """What lies at `place`, or None if it is absent or, say after a disk failed, not whole."""
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        # "c", copy on write: torch refuses arrays that cannot be written to.
        maps = [numpy.load(place / f"{name}.npy", mmap_mode="c") for name in PARTS]
        known = about["digest"], tuple(about["mean"]), tuple(about["std"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    if [(found.dtype, found.shape) for found in maps] != [
        (numpy.uint8, shape) for shape in _shapes(parts, size)
    ]:
        return None
    return Decoded(tuple(map(torch.from_numpy, maps)), *known)


@contextlib.contextmanager
def _filled(place: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `place` on success and is removed otherwise.

    Where another process was faster, its folder stays. replace: what is at `place` is broken, and makes way.
    """
    temporary = _temporary(place)
    try:
        temporary.mkdir(parents=True)
        _remove_leftovers(place.parent)
        yield temporary
        if replace:
            _remove(place)
        _put(temporary, place)
    except OSError as error:
        raise StorageError(
            f"{place.parent}: decoded images cannot be kept there: {error.strerror or error}; {ADVICE}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _put(temporary: Path, place: Path) -> None:
    try:
        os.replace(temporary, place)
    except OSError:
        if not (place / ABOUT).is_file():
            raise


def _remove(place: Path) -> None:
    """By way of another name, so that a kill half-way leaves nothing at `place`."""
    condemned = _temporary(place)
    with contextlib.suppress(FileNotFoundError):
        os.replace(place, condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left; a live one changes some file in its folder far more often than daily."""
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            changed = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
            if time.time() - changed > LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _check_space(folder: Path, needed: int) -> None:
    """Before hours of decoding rather than after."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"got {free / 1e9:.2f} GB free, needed {needed / 1e9:.2f} GB")


def _decode(folder: Path, parts: Parts, size: int, read: Read) -> None:
    """Write the images of each part, and what is known of them, into `folder`, with one image at a time in memory.

    They are decoded in the order in which content_digest takes them, and each goes to its final place at once.
    """
    counts = torch.zeros(3, 256, dtype=torch.int64)
    n = len(parts.rows[0])
    places = torch.empty(len(parts.pool), dtype=torch.int64)
    places[torch.cat(parts.rows)] = torch.arange(len(parts.pool))
    with contextlib.ExitStack() as stack:
        train, val, test = (
            stack.enter_context(_rows_file(folder / f"{name}.npy", shape))
            for name, shape in zip(PARTS, _shapes(parts, size), strict=True)
        )

        def pool(place: int, image: torch.Tensor) -> None:
            counts.add_(channel_counts(image[None]))
            if place < n:
                train(place, image)
            else:
                val(place - n, image)

        ways = ((parts.pool, places.tolist(), pool), (parts.test, range(len(parts.test)), test))
        digest = streamed_digest(
            ((len(files), 3, size, size), _stored(files.paths, where, read, write), files.labels)
            for files, where, write in ways
        )
    mean, std = statistics_of_counts(counts)
    with _synced(folder / ABOUT) as file:
        file.write(json.dumps({"digest": digest, "mean": mean, "std": std}).encode())


def _stored(
    paths: Iterable[str], places: Iterable[int], read: Read, write: Write
) -> Iterator[torch.Tensor]:
    for path, place in zip(paths, places, strict=True):
        image = read(path)
        write(place, image)
        yield image


@contextlib.contextmanager
def _rows_file(path: Path, shape: tuple[int, ...]) -> Iterator[Write]:
    """An .npy file of uint8 (n, ...); yields write(row, image), to be called once for each row, in any order.

    Written as a file, not through a map: on a full disk that is an error, and not a signal that ends the process.
    """
    with _synced(path) as file:
        numpy.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        start, width = file.tell(), math.prod(shape[1:])

        def write(row: int, image: torch.Tensor) -> None:
            file.seek(start + row * width)
            file.write(image.numpy())

        yield write


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on the disk when the context ends, before its folder gets the name that says so."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _counted(read: Read, total: int, on_progress: Progress) -> Read:
    done = itertools.count(1)

    def counted(path: str) -> torch.Tensor:
        image = read(path)
        on_progress(next(done), total, "images decoded")
        return image

    return counted

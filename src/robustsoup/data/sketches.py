"""Sketches: the smallest hashes of a split's images, which show the images two splits share.

The hashes of images are like random numbers, so the smallest ones are a random sample of a split's
images. A record that holds them can be compared with any other images, whatever their ids.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict
from weakref import WeakKeyDictionary

import torch

from robustsoup.data.splits import Split, tensor_bytes
from robustsoup.data.synthetic import Synthetic, read_digest_cache, write_digest_cache
from robustsoup.data.tensors import IMAGES_PER_CHUNK

SKETCH_SIZE = 128
MAX_SKETCHES = 16
"""The most sketches in one record; those of further splits are joined."""

_HASH_DIGITS = 16  # 64 bits


class Sketch(TypedDict):
    """A sample of the images that weights were fitted on, JSON-able.

    Attributes:
        name: The data, as in its record, or the file of generated images.
        split: "train", "val", "test" or "synthetic"; "several" where sketches were joined.
        digest: sha256 (hex) of the source of the data; empty where sketches were joined.
        images: The number of images.
        smallest: The `SKETCH_SIZE` smallest of the different hashes of the images, hex, ascending;
            all of them if there are fewer.
    """

    name: str
    split: str
    digest: str
    images: int
    smallest: list[str]


def digest_images(images: torch.Tensor) -> Iterator[bytes]:
    """Yield the digest (16 bytes) of each image's bytes; images (n, ...) on any device."""
    for chunk in images.split(IMAGES_PER_CHUNK):
        for image in chunk.cpu():
            yield hashlib.blake2b(tensor_bytes(image), digest_size=16).digest()


_hashes: WeakKeyDictionary[Split, frozenset[str]] = WeakKeyDictionary()


def split_hashes(split: Split) -> frozenset[str]:
    """Return the 64-bit hashes (hex) of a split's images; they are computed once per split."""
    known = _hashes.get(split)
    if known is None:
        known = _hashes[split] = frozenset(_shorten(digest_images(split.images)))
    return known


def sketch_split(split: Split) -> Sketch:
    """Return the sketch of a split."""
    return {
        "name": split.record["name"],
        "split": split.name,
        "digest": split.record["digest"],
        "images": len(split),
        "smallest": heapq.nsmallest(SKETCH_SIZE, split_hashes(split)),
    }


def sketch_synthetic(generated: Synthetic) -> Sketch:
    """Return the sketch of generated images; all of them are read, once per file."""
    key = f"sketch {generated.digest}"
    cached = read_digest_cache("sketch", key)
    smallest = cached if isinstance(cached, list) else _smallest_of(generated)
    if smallest is not cached:
        write_digest_cache("sketch", key, smallest)
    return {
        "name": generated.path.name,
        "split": "synthetic",
        "digest": generated.digest,
        "images": len(generated),
        "smallest": smallest,
    }


def _smallest_of(generated: Synthetic) -> list[str]:
    smallest: list[str] = []
    for rows in torch.arange(len(generated)).split(IMAGES_PER_CHUNK):
        hashes = _shorten(digest_images(generated.take(rows)[0]))
        smallest = heapq.nsmallest(SKETCH_SIZE, {*smallest, *hashes})
    return smallest


def _shorten(digests: Iterable[bytes]) -> Iterator[str]:
    return (digest.hex()[:_HASH_DIGITS] for digest in digests)


def join_sketches(sketches: Sequence[Sketch]) -> list[Sketch]:
    """Return the different sketches, at most `MAX_SKETCHES`; further ones are joined into the last.

    The smallest hashes of several sketches are those of all their images together. `images` is
    then the sum, although splits may share images.
    """
    kept = [sketch for i, sketch in enumerate(sketches) if sketch not in sketches[:i]]
    if len(kept) <= MAX_SKETCHES:
        return kept
    kept, rest = kept[: MAX_SKETCHES - 1], kept[MAX_SKETCHES - 1 :]
    hashes = {item for sketch in rest for item in sketch["smallest"]}
    joined: Sketch = {
        "name": ", ".join(sorted({sketch["name"] for sketch in rest})[:3]),
        "split": "several",
        "digest": "",
        "images": sum(sketch["images"] for sketch in rest),
        "smallest": heapq.nsmallest(SKETCH_SIZE, hashes),
    }
    return [*kept, joined]


def count_shared(sketch: Sketch, split: Split) -> tuple[int, int]:
    """Count the images of a sketch that are in a split.

    Returns:
        How many hashes of the sketch are in the split, and about how many of all its images are.
    """
    hashes = split_hashes(split)
    hits = sum(item in hashes for item in sketch["smallest"])
    return hits, round(hits * sketch["images"] / max(len(sketch["smallest"]), 1))

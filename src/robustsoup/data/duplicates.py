"""Images that appear in two splits of a data set, or in generated images: duplicates.

Exact duplicates have the same bytes. A near duplicate correlates with another image by at least
`MIN_GREY_CORRELATION` as 8 x 8 grey pixels and by at least `MIN_CORRELATION` in all its values;
both ignore brightness and contrast. A mirrored image counts too, as augmentations make them. Images
of one colour, and images below `MIN_NEAR_SIZE` pixels a side, in which unrelated images correlate
as much, are compared exactly only.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from robustsoup.data.sketches import digest_images
from robustsoup.data.splits import Data
from robustsoup.data.synthetic import Synthetic, read_digest_cache, write_digest_cache
from robustsoup.data.tensors import IMAGES_PER_CHUNK
from robustsoup.precision import full_float32
from robustsoup.progress import Progress

MIN_GREY_CORRELATION = 0.97
MIN_CORRELATION = 0.90
GREY_SIZE = 8
MIN_NEAR_SIZE = 16
ROWS_PER_CHUNK = 512
"""Images of one split that are compared with a chunk of the other at a time."""


@dataclass(frozen=True)
class Overlap:
    """Samples of one split that are duplicates of samples of another set.

    Attributes:
        split: Name of the split whose samples are counted, "val" or "test".
        other: "train", "val", or the path of generated images.
        samples: Number of samples of `split`.
        exact: Number of them that are in `other`, byte for byte.
        near: Number of them with a near duplicate in `other`, exact ones included; None if near
            duplicates were not looked for.
    """

    split: str
    other: str
    samples: int
    exact: int
    near: int | None = None

    def as_record(self) -> dict[str, Any]:
        """Return the JSON form that results and evaluations hold."""
        return asdict(self)

    def __str__(self) -> str:
        """Describe the overlap in one sentence."""
        near = f" and {self.near - self.exact} near" if self.near is not None else ""
        return (
            f"{self.exact} exact{near} duplicates of {self.other} images among the {self.samples} "
            f"{self.split} images; accuracies on {self.split} are too high if networks remember "
            "them"
        )


def find_overlaps(
    data: Data, *, near: bool = False, on_progress: Progress | None = None
) -> list[Overlap]:
    """Count the samples of val and test that are duplicates of samples in an earlier split.

    Args:
        data: The data set. Without near duplicates, CIFAR-10 takes about a second.
        near: Also look for near duplicates, which compares all pairs: 15 seconds on CIFAR-10.
        on_progress: Receives (images done, all images, text).

    Returns:
        One overlap for each pair of splits that share images.
    """
    pairs = [(data.train, data.test), (data.val, data.test), (data.train, data.val)]
    splits = (data.train, data.val, data.test)
    near = near and min(data.test.images.shape[2:]) >= MIN_NEAR_SIZE
    hashes = {split.name: list(digest_images(split.images)) for split in splits}
    greys = {split.name: _normalise_grey(split.images) for split in splits if near}
    total, done = sum(len(split) for _, split in pairs), 0
    found = []
    for other, split in pairs:
        known = set(hashes[other.name])
        is_exact = torch.tensor([key in known for key in hashes[split.name]], dtype=torch.bool)
        is_near = is_exact.clone()
        for rows in torch.arange(len(split)).split(ROWS_PER_CHUNK) if near else ():
            grey = greys[split.name][rows]
            mirrored = grey.view(-1, GREY_SIZE, GREY_SIZE).flip(-1).flatten(1)
            images = split.images[rows]
            for image, small in ((images, grey), (images.flip(-1), mirrored)):
                candidates = _find_candidates(small, greys[other.name])
                is_near[rows] |= _confirm_candidates(image, other.images, *candidates)
            done += len(rows)
            if on_progress:
                on_progress(done, total, f"{split.name} against {other.name}")
        exact, similar = int(is_exact.sum()), int(is_near.sum())
        if similar:
            count = similar if near else None
            found.append(Overlap(split.name, other.name, len(split), exact, count))
    return found


def find_exact_overlaps(data: Data) -> list[Overlap]:
    """Return `find_overlaps` without near duplicates, from the cache folder if it is known."""
    key = f"{data.record['digest']} {data.record['split_digest']}"
    return _remember(key, lambda: find_overlaps(data))


def find_copies(
    generated: Synthetic, data: Data, on_progress: Progress | None = None
) -> list[Overlap]:
    """Count the samples of val and test that are among generated images, byte for byte.

    Args:
        generated: The generated images; all are read, unless the cache folder knows the answer.
        data: The data set.
        on_progress: Receives (images done, all images, text).
    """
    key = f"{generated.digest} {data.record['digest']} {data.record['split_digest']}"
    found = _remember(key, lambda: _compare_generated(generated, data, on_progress))
    return [replace(overlap, other=str(generated.path)) for overlap in found]


def _remember(key: str, find: Callable[[], list[Overlap]]) -> list[Overlap]:
    """Return what the cache folder holds for `key`, or what `find` finds."""
    with contextlib.suppress(TypeError):
        cached = read_digest_cache("duplicates", key)
        if isinstance(cached, list):
            return [Overlap(**item) for item in cached]
    overlaps = find()
    write_digest_cache("duplicates", key, [item.as_record() for item in overlaps])
    return overlaps


def _compare_generated(
    generated: Synthetic, data: Data, on_progress: Progress | None
) -> list[Overlap]:
    chunks = torch.arange(len(generated)).split(IMAGES_PER_CHUNK)
    known: set[bytes] = set()
    for rows in chunks:
        known.update(digest_images(generated.take(rows)[0]))
        if on_progress:
            on_progress(int(rows[-1]) + 1, len(generated), "looking for copies of val and test")
    overlaps = []
    for split in (data.val, data.test):
        exact = sum(key in known for key in digest_images(split.images))
        if exact:
            overlaps.append(Overlap(split.name, str(generated.path), len(split), exact))
    return overlaps


@full_float32()
def _find_candidates(grey: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of both sides, each (pairs,), that correlate as grey images."""
    rows, other_rows = (grey @ other.T >= MIN_GREY_CORRELATION).nonzero(as_tuple=True)
    return rows, other_rows


def _confirm_candidates(
    images: torch.Tensor, other: torch.Tensor, rows: torch.Tensor, other_rows: torch.Tensor
) -> torch.Tensor:
    """Return (len(images),) bool: which images correlate with a candidate in all values."""
    has_near = torch.zeros(len(images), dtype=torch.bool)
    for mine, theirs in zip(rows.split(1024), other_rows.split(1024), strict=True):
        correlation = (_normalise(images[mine]) * _normalise(other[theirs])).sum(1)
        has_near[mine[correlation >= MIN_CORRELATION]] = True
    return has_near


def _normalise_grey(images: torch.Tensor) -> torch.Tensor:
    """Return 8 x 8 grey images of length 1 around their mean, (n, 64)."""
    pooled = [
        functional.adaptive_avg_pool2d(chunk.float().mean(1, keepdim=True), GREY_SIZE)
        for chunk in images.split(ROWS_PER_CHUNK)
    ]
    return _normalise(torch.cat(pooled))


def _normalise(values: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1 around their mean; rows without contrast become 0."""
    flat = values.float().flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-3, centred / length.clamp(min=1e-3), 0.0)

"""What every data set is once loaded: three splits of uint8 images that share one record of where they came from."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from robustsoup.errors import DataError
from robustsoup.seeding import keyed_generator

# Images that are looked at together: few, so that images which lie in a file never all have to be in memory.
CHUNK = 256


@dataclass(frozen=True)
class Augmentation:
    """What training may do to an image: a random crop after `pad` zero pixels on each side, and a mirror image."""

    pad: int = 0
    flip: bool = False


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: in memory, or mapped into it from a file and read as it is used.

    images: uint8 (n, c, h, w), contiguous; where they are mapped, writing to them changes this process's copy only.
    labels: int64 (n,) in 0..classes-1.
    ids: int64 (n,), each sample's number in the source; train and val share one numbering, test may have its own.
    name: "train", "val" or "test".
    record: where the samples came from, JSON-able, the same for the three splits of one Data: name, digest (of the
    source), split_digest (also of who is in train and who in val), seed, val (number of samples), classes (names),
    channels, size [h, w], mean and std (per channel, in [0, 1]).
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    name: str
    record: dict
    augmentation: Augmentation = Augmentation()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.record["classes"])

    @property
    def digest(self) -> str:
        """sha256 (hex) over which samples these are, of which data and split."""
        return hashlib.sha256(
            self.ids.cpu().numpy().tobytes() + self.record["split_digest"].encode()
        ).hexdigest()

    def to(self, device: str | torch.device) -> "Split":
        """The same split with its tensors on `device`."""
        images, labels, ids = (tensor.to(device) for tensor in (self.images, self.labels, self.ids))
        return replace(self, images=images, labels=labels, ids=ids)

    def first(self, n: int | None) -> "Split":
        """The first n samples, all of them for None; no split is sorted by class, so these are a fair sample.

        Raises DataError if n is below 1 or above the number of samples.
        """
        if n is None:
            return self
        if not 1 <= n <= len(self):
            raise DataError(
                f"{self.record['name']} {self.name}: asked for {n} samples, expected 1 to {len(self)}"
            )
        return replace(self, images=self.images[:n], labels=self.labels[:n], ids=self.ids[:n])

    def sample(self, n: int, seed: int) -> "Split":
        """n samples drawn by `seed` without replacement, in the order of the split; all of them where n is their number.

        Raises DataError if n is below 1 or above the number of samples.
        """
        if not 1 <= n <= len(self):
            raise DataError(
                f"{self.record['name']} {self.name}: asked for {n} samples, expected 1 to {len(self)}"
            )
        order = torch.randperm(len(self), generator=keyed_generator("sample", seed))
        rows = order[:n].sort().values.to(self.images.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows], ids=self.ids[rows])


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: train to fit, val to select, test to report."""

    name: str
    train: Split
    val: Split
    test: Split
    record: dict

    def split(self, name: str) -> Split:
        """The split of that name. Raises DataError for a name other than train, val and test."""
        if name not in ("train", "val", "test"):
            raise DataError(f'{self.name}: no split "{name}"; expected train, val or test')
        return getattr(self, name)

    def unsplit(self) -> Split:
        """train and val together, in the order of their ids: all that may be fitted on where nothing is held out but test."""
        ids = torch.cat([self.train.ids, self.val.ids])
        order = ids.argsort()
        digest = hashlib.sha256(f"unsplit {self.record['digest']}".encode()).hexdigest()
        return Split(
            torch.cat([self.train.images, self.val.images])[order],
            torch.cat([self.train.labels, self.val.labels])[order],
            ids[order],
            "train",
            self.record | {"split_digest": digest, "val": 0},
            self.train.augmentation,
        )


@dataclass(frozen=True, eq=False)
class Samples:
    """Images, labels and ids as in Split, before it is decided which split they belong to."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: torch.Tensor) -> "Samples":
        return Samples(
            *(tensor.index_select(0, rows) for tensor in (self.images, self.labels, self.ids))
        )


@dataclass(frozen=True)
class Source:
    """What a data set says of itself, whatever the seed."""

    name: str
    digest: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation = Augmentation()


def hold_out(n: int, held: int, *key: str | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers 0..n-1, shuffled by `key` and cut into (the other n - held, held)."""
    order = torch.randperm(n, generator=keyed_generator("hold out", *key))
    return order[held:], order[:held]


def content_digest(*samples: Samples) -> str:
    """sha256 (hex) over shapes, images and labels, in the order given."""
    return streamed_digest(
        (tuple(part.images.shape), part.images.split(CHUNK), part.labels) for part in samples
    )


def streamed_digest(
    parts: Iterable[tuple[tuple[int, ...], Iterable[torch.Tensor], torch.Tensor]],
) -> str:
    """content_digest of parts given as (shape of all images, these images piece by piece, labels)."""
    digest = hashlib.sha256()
    for shape, pieces, labels in parts:
        digest.update(str(shape).encode())
        for piece in pieces:
            digest.update(piece.contiguous().numpy())
        digest.update(labels.contiguous().numpy())
    return digest.hexdigest()


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (n, c, h, w), in [0, 1]; see statistics_of_counts."""
    return statistics_of_counts(sum(channel_counts(chunk) for chunk in images.split(CHUNK)))


def channel_counts(images: torch.Tensor) -> torch.Tensor:
    """How often each value occurs in each channel of uint8 images (n, c, h, w): int64 (c, 256)."""
    return torch.stack(
        [torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(1)]
    )


def statistics_of_counts(counts: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], exactly, from its channel_counts (c, 256).

    A std below 1/255 is reported as 1/255, so that normalising a constant channel does not divide by zero.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for count in counts:
        share = count.double() / count.sum()
        mean = (share * values).sum()
        variance = (share * (values - mean) ** 2).sum()
        means.append(round(mean.item(), 6))
        stds.append(max(round(variance.sqrt().item(), 6), 1 / 255))
    return tuple(means), tuple(stds)


def assemble(source: Source, train: Samples, val: Samples, test: Samples, *, seed: int) -> Data:
    """Put three parts and the source's description together."""
    digest = hashlib.sha256(train.ids.numpy())
    digest.update(b"val")
    digest.update(val.ids.numpy())
    digest.update(source.digest.encode())
    record = {
        "name": source.name,
        "digest": source.digest,
        "split_digest": digest.hexdigest(),
        "seed": seed,
        "val": len(val),
        "classes": list(source.classes),
        "channels": train.images.shape[1],
        "size": list(train.images.shape[2:]),
        "mean": list(source.mean),
        "std": list(source.std),
    }
    parts = {
        name: Split(
            part.images.contiguous(), part.labels, part.ids, name, record, source.augmentation
        )
        for name, part in (("train", train), ("val", val), ("test", test))
    }
    return Data(source.name, parts["train"], parts["val"], parts["test"], record)

"""A loaded data set: three splits of uint8 images that share one record of their origin."""

import hashlib
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, TypeVar

import torch

from robustsoup.data.tensors import (
    DARKEST,
    IMAGES_PER_CHUNK,
    as_labels,
    as_pixels,
    numbers_from_one,
)
from robustsoup.data.torch_datasets import class_names, match_channels, read_dataset
from robustsoup.data.transforms import ImageTransform
from robustsoup.display import html_table
from robustsoup.errors import DataError
from robustsoup.printable import make_printable
from robustsoup.seeding import keyed_generator
from robustsoup.settings import plain_number

MAX_CLASSES = 100_000
"""Most classes of a data set; a larger label is a mistake, not one of a million classes."""

P = TypeVar("P")
SplitName = Literal["train", "val", "test"]


class DataRecord(TypedDict):
    """The origin of the samples, JSON-able; the same for the three splits of one Data.

    Attributes:
        name: The spec of the data, such as "cifar10" or "folder:PATH".
        digest: sha256 (hex) of the source.
        split_digest: sha256 (hex) of the source and of which samples are in train and in val.
        seed: The seed that decides which samples are in val.
        val: Number of samples in val.
        classes: Names of the classes.
        channels: Channels of an image.
        size: [height, width] of an image.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
    """

    name: str
    digest: str
    split_digest: str
    seed: int
    val: int
    classes: list[str]
    channels: int
    size: list[int]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images.

    Attributes:
        pad: Zero pixels added on each side before a random crop to the original size.
        flip: Whether an image is mirrored with probability 1/2.
        transform: What is done instead of both, or None.
    """

    pad: int = 0
    flip: bool = False
    transform: ImageTransform | None = None

    @property
    def fingerprint(self) -> list[int | str | None]:
        """What identifies the augmentation, with a digest of the transform's code, JSON-able."""
        transform = None if self.transform is None else self.transform.fingerprint
        return [self.pad, self.flip, transform]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """The train, val or test split of a data set, in memory or memory-mapped.

    Images and labels of another type are converted where their meaning is plain and nothing is
    lost, such as floats in [0, 1] that are multiples of 1/255, and refused otherwise.

    Attributes:
        images: uint8 (n, c, h, w), contiguous; writing to mapped images changes this process's
            copy only.
        labels: int64 (n,) in 0..classes-1.
        ids: int64 (n,), the number of each sample in the source; train and val share one
            numbering, test may have its own.
        name: "train", "val" or "test".
        record: The origin of the samples.
        augmentation: Augmentation of the images in training.
        notes: What conversion changed, which evaluations repeat as warnings.
        inferred: Whether the number of classes is only the largest label plus 1.
        in_given_order: Whether the samples are in a user's order, which may be sorted by class.

    Raises:
        DataError: Images or labels cannot be converted; the error names the likely cause.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    name: SplitName
    record: DataRecord
    augmentation: Augmentation = Augmentation()
    notes: tuple[str, ...] = ()
    inferred: bool = False
    in_given_order: bool = False

    def __post_init__(self) -> None:
        """Convert images, labels and ids of another type."""
        place = f"split {self.name}"
        if not _has_form(self.images, torch.uint8, 4):
            images, _ = as_pixels(self.images, f"{place}: images", exact=True)
            object.__setattr__(self, "images", images)
        for name in ("labels", "ids"):
            if not _has_form(getattr(self, name), torch.int64, 1):
                object.__setattr__(self, name, as_labels(getattr(self, name), f"{place}: {name}"))
        if not len(self.images) == len(self.labels) == len(self.ids):
            raise DataError(
                f"{place}: got {len(self.images)} images, {len(self.labels)} labels and "
                f"{len(self.ids)} ids, expected as many of each"
            )

    @classmethod
    def from_tensors(
        cls,
        images: object,
        labels: object,
        *,
        classes: int | Sequence[str] | None = None,
        name: str = "tensors",
    ) -> "Split":
        """Make a test split of all samples of two tensors or arrays, to evaluate networks on.

        The samples keep their order, and their ids are the numbers of their rows.

        Args:
            images: (n, c, h, w), (n, h, w, c) or (n, h, w), uint8 or floats in [0, 1], not
                normalised. Floats are rounded to 8 bits; a note says so if that changes them.
            labels: (n,) class numbers, or one-hot (n, classes).
            classes: Number of classes or their names; by default the outputs of the network that
                is evaluated, else the largest label plus 1.
            name: Name of the data in records.

        Raises:
            DataError: Images or labels are something else; the error names the likely cause.
        """
        samples, notes = _convert_samples(images, labels, name, inferred=classes is None)
        names = _class_names(classes, [samples], name)
        description = _describe_samples(name, {"train": samples}, names, Augmentation())
        record = _make_record(description, samples, samples.take(samples.ids[:0]), 0)
        _check_tensors(name, samples, len(names))
        return cls(
            samples.images,
            samples.labels,
            samples.ids,
            "test",
            record,
            notes=notes,
            inferred=classes is None,
            in_given_order=True,
        )

    def __repr__(self) -> str:
        """Return one line: the source, the number and form of the images, and the classes."""
        form = f"{_describe_shape(self)}, {self.classes} classes"
        return make_printable(
            f"Split({self.record['name']} {self.name}: {len(self):,} images, {form})"
        )

    def _repr_html_(self) -> str:
        rows = ((self.name, f"{len(self):,}", _describe_shape(self), self.classes),)
        return html_table(self.record["name"], _COLUMNS, rows, self.notes)

    def with_classes(self, classes: int) -> "Split":
        """Return the split with this many classes, if their number is inferred and smaller."""
        if not self.inferred or classes <= self.classes:
            return self
        names = [str(number) for number in range(classes)]
        return replace(self, record={**self.record, "classes": names})

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.record["classes"])

    @property
    def digest(self) -> str:
        """sha256 (hex) over the ids of the samples and over their data and split."""
        return hashlib.sha256(
            self.ids.cpu().numpy().tobytes() + self.record["split_digest"].encode()
        ).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Name and digest: splits of equal size may share a digest."""
        return f"{self.name} {self.digest}"

    def to(self, device: str | torch.device) -> "Split":
        """Return the split with its tensors on `device`."""
        images, labels, ids = (tensor.to(device) for tensor in (self.images, self.labels, self.ids))
        return replace(self, images=images, labels=labels, ids=ids)

    def first(self, n: int | None) -> "Split":
        """Return the first n samples, or all of them if n is None.

        They are representative, because splits of a data source are not sorted by class. Samples
        in the order of a user may be: the first n of a fixed shuffle are returned, unless n is all.

        Raises:
            DataError: If n is below 1 or above the number of samples.
        """
        if n is None:
            return self
        self._check_count(n)
        if self.in_given_order and n < len(self):
            order = torch.randperm(len(self), generator=keyed_generator("first"))
            return replace(self.take(order[:n]), in_given_order=False)
        return replace(self, images=self.images[:n], labels=self.labels[:n], ids=self.ids[:n])

    def sample(self, n: int, seed: int) -> "Split":
        """Return n samples drawn without replacement, in the order of the split.

        Raises:
            DataError: If n is below 1 or above the number of samples.
        """
        self._check_count(n)
        order = torch.randperm(len(self), generator=keyed_generator("sample", seed))
        rows = order[:n].sort().values.to(self.images.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows], ids=self.ids[rows])

    def take(self, rows: torch.Tensor) -> "Split":
        """Return some samples.

        Args:
            rows: (n,) bool, which samples to take, or their numbers, whose order decides then.
        """
        kept = rows.to(self.images.device)
        return replace(self, images=self.images[kept], labels=self.labels[kept], ids=self.ids[kept])

    def _check_count(self, n: int) -> None:
        try:
            count = operator.index(n)
        except TypeError:
            count = 0
        if isinstance(n, bool) or not 1 <= count <= len(self):
            raise DataError(
                f"{self.record['name']} {self.name}: requested {n!r} samples, "
                f"expected 1 to {len(self)}"
            )


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set.

    Attributes:
        name: The spec of the data, such as "cifar10".
        train: The samples that weights and coefficients are fitted on.
        val: The samples that checkpoints and soups are selected on.
        test: The samples that results are reported on.
        record: The origin of the samples.
        notes: What reading the data left out or changed, one sentence each.
    """

    name: str
    train: Split
    val: Split
    test: Split
    record: DataRecord
    notes: tuple[str, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        images: object,
        labels: object,
        *,
        val: tuple[object, object] | None = None,
        test: tuple[object, object] | None = None,
        classes: int | Sequence[str] | None = None,
        name: str = "tensors",
        seed: int = 0,
        augmentation: Augmentation = Augmentation(),
    ) -> "Data":
        """Make a data set of tensors or arrays.

        Without `test`, one sample in five is held out for test, always the same; without `val`,
        one in eight of the others is held out by the seed.

        Args:
            images: (n, c, h, w), (n, h, w, c) or (n, h, w), uint8 or floats in [0, 1], not
                normalised. Floats are rounded to 8 bits; a note says so if that changes them.
            labels: (n,) class numbers, or one-hot (n, classes).
            val: Images and labels to select on.
            test: Images and labels to report on.
            classes: Number of classes or their names; by default the outputs of the network that
                is evaluated, else the largest label plus 1.
            name: Name of the data in records.
            seed: Decides which samples are in val, if `val` is not given.
            augmentation: Augmentation of the images in training.

        Raises:
            DataError: Images or labels are something else; the error names the likely cause.
        """
        parts = {"train": (images, labels), "val": val, "test": test}
        given = {part: pair for part, pair in parts.items() if pair is not None}
        return assemble_tensors(name, given, classes=classes, seed=seed, augmentation=augmentation)

    @classmethod
    def from_dataset(
        cls,
        dataset: object,
        *,
        val: object = None,
        test: object = None,
        classes: int | Sequence[str] | None = None,
        name: str = "dataset",
        seed: int = 0,
        image_size: int | None = None,
        channels: int | None = None,
        augmentation: Augmentation = Augmentation(),
    ) -> "Data":
        """Make a data set of data sets of PyTorch, which are read into memory.

        Splits are held out as by `from_tensors`. Where `val` and `test` have other `classes` than
        `dataset`, as folders do that lack a class, their labels are translated by name.

        Args:
            dataset: A data set of (image, label) pairs, without augmentation and normalisation, or
                a DataLoader of one. Images are tensors, arrays or images of Pillow.
            val: A data set to select on.
            test: A data set to report on.
            classes: Number of classes or their names; by default those of `dataset.classes`.
            name: Name of the data in records.
            seed: Decides which samples are in val, if `val` is not given.
            image_size: Pixels a side of images of Pillow; by default their own.
            channels: 1 or 3 for images of Pillow; by default 1 if all are grey.
            augmentation: Augmentation of the images in training.

        Raises:
            DataError: A sample is something else, or differs from read to read; or a sample of
                `val` or `test` is of a class that `dataset.classes` lacks.
        """
        parts = {"train": dataset, "val": val, "test": test}
        given = {
            part: read_dataset(dataset, f"{name} {part}", image_size=image_size, channels=channels)
            for part, dataset in parts.items()
            if dataset is not None
        }
        names = class_names(dataset)
        for part in ("val", "test"):
            part_names = class_names(parts[part])
            if part_names is not None and names is not None and part_names != names:
                images, labels = given[part]
                given[part] = images, _renumber(labels, part_names, names, f"{name} {part}")
        classes = names if classes is None else classes
        given = match_channels(given)
        return assemble_tensors(name, given, classes=classes, seed=seed, augmentation=augmentation)

    def __repr__(self) -> str:
        """Return one line: the splits, the form of the images and the classes."""
        sizes = ", ".join(f"{split.name} {len(split):,}" for split in self._splits())
        form = f"{_describe_shape(self.train)}, {self.train.classes} classes"
        return make_printable(f"Data({self.name}: {sizes}; {form})")

    def _repr_html_(self) -> str:
        rows = (
            (split.name, f"{len(split):,}", _describe_shape(split), split.classes)
            for split in self._splits()
        )
        return html_table(self.name, _COLUMNS, rows, self.notes)

    def _splits(self) -> tuple[Split, ...]:
        return self.train, self.val, self.test

    def split(self, name: str) -> Split:
        """Return the split of that name.

        Raises:
            DataError: The name is not train, val or test.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        if name not in splits:
            raise DataError(f'{self.name}: no split "{name}"; expected train, val or test')
        return splits[name]

    def unsplit(self) -> Split:
        """Join train and val in the order of their ids; only test is then held out."""
        ids = torch.cat([self.train.ids, self.val.ids])
        order = ids.argsort()
        digest = hashlib.sha256(f"unsplit {self.record['digest']}".encode()).hexdigest()
        record: DataRecord = {**self.record, "split_digest": digest, "val": 0}
        return Split(
            torch.cat([self.train.images, self.val.images])[order],
            torch.cat([self.train.labels, self.val.labels])[order],
            ids[order],
            "train",
            record,
            self.train.augmentation,
            inferred=self.train.inferred,
            in_given_order=True,  # ids number the samples as the source lists them
        )


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """Images, labels and ids as in Split, before they are assigned to a split."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor

    def __repr__(self) -> str:
        """Return one line: the number and form of the images."""
        return f"Samples({len(self):,} images, {_describe_shape(self)})"

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: torch.Tensor) -> "Samples":
        """Return the samples of these rows, in their order."""
        images, labels, ids = (
            tensor.index_select(0, rows) for tensor in (self.images, self.labels, self.ids)
        )
        return Samples(images, labels, ids)


@dataclass(frozen=True)
class DataDescription:
    """What of the data does not depend on the seed; see DataRecord and Split."""

    name: str
    digest: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation = Augmentation()
    inferred: bool = False


_COLUMNS = ("split", "images", "channels x height x width", "classes")


def _describe_shape(samples: Split | Samples) -> str:
    return " x ".join(map(str, samples.images.shape[1:]))


def hold_out(n: int, n_held_out: int, *key: str | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffle the rows 0..n-1 and hold out some of them.

    Args:
        n: Number of rows.
        n_held_out: Number of rows to hold out, at most n.
        *key: Seeds the shuffle.

    Returns:
        The n - n_held_out remaining rows, and the rows that are held out.
    """
    order = torch.randperm(n, generator=keyed_generator("hold out", *key))
    return order[n_held_out:], order[:n_held_out]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, for digests and files."""
    return tensor.contiguous().numpy().data


def content_digest(*samples: Samples) -> str:
    """Return the sha256 (hex) over shapes, images and labels, in the order of the arguments."""
    return streamed_digest(
        (tuple(part.images.shape), part.images.split(IMAGES_PER_CHUNK), part.labels)
        for part in samples
    )


def streamed_digest(
    parts: Iterable[tuple[tuple[int, ...], Iterable[torch.Tensor], torch.Tensor]],
) -> str:
    """Return `content_digest` of images that are read in chunks.

    Args:
        parts: For each part, the shape of all its images, its images in chunks, and its labels.
    """
    digest = hashlib.sha256()
    for shape, chunks, labels in parts:
        digest.update(str(shape).encode())
        for chunk in chunks:
            digest.update(tensor_bytes(chunk))
        digest.update(tensor_bytes(labels))
    return digest.hexdigest()


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, in [0, 1]; see `statistics_of_counts`.

    Args:
        images: uint8 (n, c, h, w).
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(IMAGES_PER_CHUNK):
        counts += channel_counts(chunk)
    return statistics_of_counts(counts)


def channel_counts(images: torch.Tensor) -> torch.Tensor:
    """Count each value in each channel: uint8 (n, c, h, w) -> int64 (c, 256)."""
    return torch.stack(
        [torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(1)]
    )


def statistics_of_counts(counts: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of each channel, in [0, 1], from its value counts.

    Args:
        counts: int64 (c, 256), see `channel_counts`.

    Returns:
        The means and the standard deviations; a standard deviation is at least 1/255, so that
        normalizing a constant channel does not divide by zero.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means: list[float] = []
    stds: list[float] = []
    for count in counts:
        share = count.double() / count.sum()
        mean = (share * values).sum()
        variance = (share * (values - mean) ** 2).sum()
        means.append(round(mean.item(), 6))
        stds.append(max(round(variance.sqrt().item(), 6), 1 / 255))
    return tuple(means), tuple(stds)


def assemble(
    description: DataDescription, train: Samples, val: Samples, test: Samples, *, seed: int
) -> Data:
    """Build a Data from its three splits and the description of their source.

    Args:
        description: Name, digest, classes and channel statistics.
        train: The training samples.
        val: The validation samples.
        test: The test samples.
        seed: The seed that decided which samples are in val.

    Raises:
        DataError: A tensor has the wrong type or shape, a label is not a class, an id repeats
            within train and val or within test, or the splits share samples.
    """
    parts: dict[SplitName, Samples] = {"train": train, "val": val, "test": test}
    for name, part in parts.items():
        _check_tensors(f"{description.name} {name}", part, len(description.classes))
        _check_image_shape(f"{description.name} {name}", part, train)
    _check_held_out(description.name, train, val, test)
    record = _make_record(description, train, val, seed)

    def build_split(name: SplitName, part: Samples) -> Split:
        return Split(
            part.images.contiguous(),
            part.labels,
            part.ids,
            name,
            record,
            description.augmentation,
            inferred=description.inferred,
        )

    return Data(
        description.name,
        build_split("train", train),
        build_split("val", val),
        build_split("test", test),
        record,
    )


def _make_record(
    description: DataDescription, train: Samples, val: Samples, seed: int
) -> DataRecord:
    digest = hashlib.sha256(tensor_bytes(train.ids))
    digest.update(b"val")
    digest.update(tensor_bytes(val.ids))
    digest.update(description.digest.encode())
    return {
        "name": description.name,
        "digest": description.digest,
        "split_digest": digest.hexdigest(),
        "seed": seed,
        "val": len(val),
        "classes": list(description.classes),
        "channels": train.images.shape[1],
        "size": list(train.images.shape[2:]),
        "mean": list(description.mean),
        "std": list(description.std),
    }


def assemble_tensors(
    name: str,
    parts: Mapping[str, tuple[object, object]],
    *,
    classes: int | Sequence[str] | None = None,
    seed: int,
    augmentation: Augmentation = Augmentation(),
    decoded: bool = False,
) -> Data:
    """Build a Data from the images and labels of its parts; see `Data.from_tensors`.

    Args:
        name: Name of the data in records and errors.
        parts: Images and labels of "train" and, if they exist, of "val" and "test".
        classes: Number of classes or their names; by default the outputs of the network that is
            evaluated, else the largest label plus 1.
        seed: Decides which samples are in val, if that part is missing.
        augmentation: Augmentation of the images in training.
        decoded: Whether the images come from image files, whose range is in no doubt.

    Raises:
        DataError: Images or labels have another form, a part repeats the tensors of another, or no
            sample is left to train on.
    """
    seed = plain_number(seed)
    pools: dict[str, Samples] = {}
    notes: list[str] = []
    for part, pair in parts.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(
                f"{name} {part}: got {type(pair).__name__}, expected a pair (images, labels)"
            )
        place, inferred = f"{name} {part}", classes is None
        pools[part], changed = _convert_samples(*pair, place, inferred=inferred, decoded=decoded)
        notes += changed
    for one, other in itertools.combinations(pools, 2):
        if torch.equal(pools[one].images, pools[other].images):
            raise DataError(f"{name}: {one} and {other} are the same images; hold {other} out")
    names = _class_names(classes, list(pools.values()), name)
    description = _describe_samples(name, pools, names, augmentation)
    description = replace(description, inferred=classes is None)
    pool, test = pools["train"], pools.get("test")
    if test is None:
        rows = hold_out(len(pool), max(1, len(pool) // 5), "tensors test")
        pool, test = pool.take(rows[0]), pool.take(rows[1])
    if "val" in pools:
        given = pools["val"]
        val = _shuffle(replace(given, ids=given.ids + len(pools["train"])))
        train = _shuffle(pool)
    else:
        rows = hold_out(len(pool), max(1, len(pool) // 8), seed)
        train, val = pool.take(rows[0]), pool.take(rows[1])
    _check_trained(name, pools, train)
    data = assemble(description, train, val, _shuffle(test), seed=seed)
    return add_notes(data, [], notes)


def _renumber(labels: object, own: Sequence[str], names: Sequence[str], place: str) -> torch.Tensor:
    """Return labels that are numbers of `own` as numbers of `names`.

    Raises:
        DataError: A label is the number of no class, or of one that `names` lacks or has twice.
    """
    numbers = as_labels(labels, f"{place}: labels")
    used = numbers.unique().tolist()
    if used and not 0 <= used[0] <= used[-1] < len(own):
        raise DataError(
            f"{place}: labels: got {used[0]} to {used[-1]}, expected 0 to {len(own) - 1}, one "
            f"number for each of its {len(own)} classes"
        )
    unknown = sorted({own[label] for label in used if names.count(own[label]) != 1})
    if unknown:
        raise DataError(
            f"{place}: got samples of the classes {', '.join(unknown[:5])}, expected those of "
            f"train, {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}, each once; make "
            "the attributes classes of the data sets agree"
        )
    table = torch.tensor([names.index(own[label]) for label in used], dtype=torch.int64)
    return table[torch.searchsorted(torch.tensor(used, dtype=torch.int64), numbers)]


def add_notes(data: Data, notes: Sequence[str], doubts: Sequence[str]) -> Data:
    """Return the data with more notes.

    Args:
        data: The data.
        notes: What reading the data left out or changed.
        doubts: Notes that concern the pixels, which evaluations on each split repeat as warnings.
    """
    train, val, test = (replace(s, notes=(*s.notes, *doubts)) for s in data._splits())
    return replace(data, notes=(*data.notes, *notes, *doubts), train=train, val=val, test=test)


def _check_trained(name: str, pools: Mapping[str, Samples], train: Samples) -> None:
    if len(train):
        return
    held_out = " and ".join(part for part in ("val", "test") if part not in pools)
    raise DataError(
        f"{name}: got {len(pools['train'])} samples in all, and none is left to train on after "
        f"{held_out} were taken; expected 3 or more, or give val and test"
    )


def promote_val(parts: dict[str, P]) -> tuple[str, ...]:
    """Rename "val" to "test" where that part is missing, in place; return a note if so."""
    if "test" in parts or "val" not in parts:
        return ()
    parts["test"] = parts.pop("val")
    return ("no test split: val is test, and val is held out of train",)


def _shuffle(samples: Samples) -> Samples:
    """Return samples in a fixed order, because many files are sorted by class."""
    return samples.take(hold_out(len(samples), 0, "tensors order")[0])


def _convert_samples(
    images: object, labels: object, place: str, *, inferred: bool, decoded: bool = False
) -> tuple[Samples, tuple[str, ...]]:
    """Return the samples of two tensors, and notes on what conversion changed or left in doubt.

    Args:
        images: As in `as_pixels`.
        labels: As in `as_labels`.
        place: Names the samples in notes and errors.
        inferred: Whether the labels tell the number of classes.
        decoded: Whether the images come from image files.

    Raises:
        DataError: Images or labels have another form, or there are none.
    """
    pixels, rounding = as_pixels(images, f"{place}: images")
    numbers = as_labels(labels, f"{place}: labels")
    if len(pixels) != len(numbers):
        raise DataError(
            f"{place}: got {len(pixels)} images and {len(numbers)} labels, expected as many of each"
        )
    if not len(pixels):
        raise DataError(f"{place}: got no samples, expected one or more")
    notes = [f"{place}: float pixels were rounded to 8 bits"] if rounding else []
    if not decoded and 0 < (brightest := int(pixels.max())) <= DARKEST:
        notes.append(
            f"{place}: the brightest pixel is {brightest} of 255; if the images reach from 0 to "
            f"{brightest}, divide them by {brightest}"
        )
    if inferred and numbers_from_one(numbers):
        notes.append(
            f"{place}: labels run from 1 to {int(numbers.max())}; if no class is numbered 0, "
            "subtract 1"
        )
    return Samples(pixels.cpu(), numbers.cpu(), torch.arange(len(numbers))), tuple(notes)


def _class_names(
    classes: int | Sequence[str] | None, pools: Sequence[Samples], place: str
) -> tuple[str, ...]:
    """Return the names of the classes; by default as many as the largest label asks for.

    Raises:
        DataError: There are fewer than 2 or more than MAX_CLASSES; the error names the label.
    """
    if classes is None:
        largest = max(int(pool.labels.max()) for pool in pools)
        if largest >= MAX_CLASSES:
            raise DataError(
                f"{place}: got label {largest}, expected 0 to {MAX_CLASSES - 1:,}; number the "
                "classes from 0 without gaps"
            )
        classes = max(largest + 1, 2)
    classes = plain_number(classes)
    count = classes if isinstance(classes, int) else len(classes)
    if count > MAX_CLASSES:
        raise DataError(f"{place}: got {count:,} classes, expected at most {MAX_CLASSES:,}")
    if isinstance(classes, int):
        classes = [str(number) for number in range(classes)]
    if len(classes) < 2:
        raise DataError(f"{place}: got {len(classes)} classes, expected 2 or more")
    return tuple(classes)


def _describe_samples(
    name: str, pools: Mapping[str, Samples], classes: tuple[str, ...], augmentation: Augmentation
) -> DataDescription:
    """Return the description of samples; mean and std are of all in "train"."""
    mean, std = channel_statistics(pools["train"].images)
    return DataDescription(name, content_digest(*pools.values()), classes, mean, std, augmentation)


def _has_form(value: object, dtype: torch.dtype, dimensions: int) -> bool:
    is_tensor = isinstance(value, torch.Tensor)
    return is_tensor and value.dtype == dtype and value.ndim == dimensions


def _check_tensors(place: str, part: Samples, classes: int) -> None:
    """Check types, shapes, labels and ids, but read no image, because images may be mapped."""
    images, labels, ids = part.images, part.labels, part.ids
    _check_tensor(f"{place}: images", images, torch.uint8, "(n, c, h, w)")
    _check_tensor(f"{place}: labels", labels, torch.int64, "(n,)")
    _check_tensor(f"{place}: ids", ids, torch.int64, "(n,)")
    if images.shape[1] not in (1, 3):
        raise DataError(
            f"{place}: images: got shape {tuple(images.shape)}, expected (n, c, h, w) with 1 or 3 "
            "channels c; move the channels to the second dimension"
        )
    if not len(images) == len(labels) == len(ids):
        raise DataError(
            f"{place}: got {len(images)} images, {len(labels)} labels and {len(ids)} ids, "
            "expected as many of each"
        )
    if ((labels < 0) | (labels >= classes)).any():
        raise DataError(
            f"{place}: labels: got {int(labels.min())} to {int(labels.max())}, expected 0 to "
            f"{classes - 1}, one number for each of the {classes} classes"
        )
    if len(ids.unique()) < len(ids):
        raise DataError(f"{place}: ids: got an id twice, expected a different id for each sample")


def _check_tensor(place: str, value: object, dtype: torch.dtype, shape: str) -> None:
    """Check that `value` is a tensor of `dtype` with the dimensions of `shape`, such as "(n,)"."""
    expected = f"expected a tensor, {str(dtype).removeprefix('torch.')} {shape}"
    if not isinstance(value, torch.Tensor):
        kind = type(value)
        raise DataError(f"{place}: got {kind.__module__}.{kind.__qualname__}, {expected}")
    if value.dtype != dtype or value.ndim != len(shape.strip("(,)").split(", ")):
        got = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        raise DataError(f"{place}: got {got}, {expected}")


def _check_image_shape(place: str, part: Samples, train: Samples) -> None:
    if part.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"{place}: images: got shape {tuple(part.images.shape)}, expected (n, "
            f"{', '.join(map(str, train.images.shape[1:]))}) as in train"
        )


def _check_held_out(source: str, train: Samples, val: Samples, test: Samples) -> None:
    """Check that val and test share no samples with the splits before them.

    The ids of test may have their own numbering, so equal ids prove nothing there; images that
    start at the same place in memory do.
    """
    shared = torch.isin(val.ids, train.ids)
    if shared.any():
        raise DataError(
            f"{source} val: ids: got {int(shared.sum())} ids that train has too, expected none; "
            "hold val out of train"
        )
    for name, part in (("train", train), ("val", val)):
        if len(part) and len(test) and part.images.data_ptr() == test.images.data_ptr():
            raise DataError(
                f"{source} test: images: got the images of {name}, expected others; "
                f"hold test out of {name}"
            )

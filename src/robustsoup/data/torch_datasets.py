"""Read the data sets and loaders of torch.utils.data into tensors."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    default_convert,
)

from robustsoup.data.images import doubt_depth, is_grey, is_pillow_image, make_decoder
from robustsoup.errors import DataError, RobustsoupError
from robustsoup.printable import first_line

if TYPE_CHECKING:
    from robustsoup.data.images import Image

IMAGE_KEYS = ("image", "img", "pixel_values", "png", "jpg", "jpeg", "webp", "ppm", "pgm")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "cls")
"""Names of images and labels in samples that are dictionaries."""

_PLAIN_BATCHES = (BatchSampler, type(None))

REPEATED_SAMPLES = 8
"""Samples that are read twice, to detect random augmentation."""


@runtime_checkable
class IndexedDataset(Protocol):
    """A data set whose samples have numbers."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, number: int, /) -> object:
        """Return a sample."""
        ...


class ImageStack:
    """Collects images of Pillow, tensors or arrays.

    Args:
        place: Names the data in errors.
        image_size: Pixels a side of images of Pillow; None for their own.
        channels: 1 or 3 for images of Pillow; None for 1 if all are grey.
    """

    def __init__(self, place: str, image_size: int | None, channels: int | None) -> None:
        self.place = place
        self.image_size, self.channels = image_size, channels
        self.decoder = make_decoder(place, image_size, channels)
        self.images: list[object] = []

    def add(self, image: object) -> None:
        """Add an image."""
        self.images.append(self._convert(image) if is_pillow_image(image) else image)

    def stack(self) -> list[object]:
        """Return all images with equal numbers of channels."""
        tensors = [image for image in self.images if isinstance(image, Tensor)]
        if {len(tensor) for tensor in tensors if tensor.ndim == 3} == {1, 3}:
            return [tensor.expand(3, *tensor.shape[1:]) for tensor in tensors]
        return self.images

    def doubts(self) -> tuple[str, ...]:
        """Return notes on the depth of images of 16 bits; see `doubt_depth`."""
        return doubt_depth(self.decoder.scaled, self.decoder.brightest)

    def _convert(self, image: "Image") -> Tensor:
        width, height = image.size
        if self.image_size is None:
            if not self.images and width == height:
                self.decoder.size = width
            if (width, height) != (self.decoder.size, self.decoder.size):
                raise DataError(
                    f"{self.place}: got an image of {width} x {height} pixels, expected square "
                    "images of one size; set image_size"
                )
        self.decoder.channels = self.channels or (1 if is_grey(image) else 3)
        return self.decoder.convert(image, f"{self.place}: image {len(self.images)}")


def match_channels(
    parts: Mapping[str, tuple[object, object]],
) -> dict[str, tuple[object, object]]:
    """Return images and labels of each part; grey images get 3 channels beside parts with colour.

    Args:
        parts: What `ImageStack.stack` returns and labels, by the name of the part. Images of
            another form stay as they are.
    """
    counts = {
        part: len(images[0])
        for part, (images, _) in parts.items()
        if isinstance(images, list) and images and _has_channels(images[0])
    }
    if set(counts.values()) != {1, 3}:
        return dict(parts)
    matched = dict(parts)
    for part in [part for part, count in counts.items() if count == 1]:
        images, labels = parts[part]
        grey = images if isinstance(images, list) else []
        matched[part] = [i.expand(3, -1, -1) if _has_channels(i) else i for i in grey], labels
    return matched


def _has_channels(image: object) -> TypeGuard[Tensor]:
    return isinstance(image, Tensor) and image.ndim == 3


def read_dataset(
    dataset: object, place: str, *, image_size: int | None = None, channels: int | None = None
) -> tuple[object, object]:
    """Return the images and labels of a data set, in its order.

    Args:
        dataset: A data set of (image, label) pairs or of dictionaries, or a DataLoader of one,
            whose batches and order are ignored. Images are tensors, arrays or images of Pillow.
        place: Names the data in errors.
        image_size: Pixels a side of images of Pillow; by default their own.
        channels: 1 or 3 for images of Pillow; by default 1 if all are grey.

    Returns:
        Images and labels, for `as_pixels` and `as_labels`.

    Raises:
        DataError: The data set holds something else, or its samples differ from read to read.
    """
    if isinstance(dataset, DataLoader):
        if dataset.collate_fn not in (default_collate, default_convert):
            raise DataError(
                f"{place}: got a DataLoader with a collate_fn of its own, expected a data set of "
                "(image, label) pairs; pass its images and labels as tensors"
            )
        _refuse_own_sampler(dataset, place)
        dataset = dataset.dataset
    if _is_plain(dataset) and len(dataset.tensors) == 2:
        return dataset.tensors
    # Augmentation draws from the global state, which stays as it was.
    with torch.random.fork_rng(devices=[]):
        _refuse_random_samples(dataset, place)
        stack, labels = ImageStack(place, image_size, channels), list[object]()
        for image, label in _iterate(dataset, place):
            stack.add(image)
            labels.append(label)
    if not labels:
        raise DataError(f"{place}: got no samples, expected one or more")
    return stack.stack(), labels


def _is_plain(dataset: object) -> TypeGuard[TensorDataset]:
    """Return whether the samples of a data set are the rows of its tensors."""
    return (
        isinstance(dataset, TensorDataset)
        and type(dataset).__getitem__ is TensorDataset.__getitem__
    )


def _refuse_own_sampler(loader: DataLoader[object], place: str) -> None:
    """Refuse a loader that leaves out or repeats samples, since its data set is read instead."""
    sampler = loader.sampler
    reads_all = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    is_iterable = isinstance(loader.dataset, IterableDataset)
    if not is_iterable and not (reads_all and type(loader.batch_sampler) in _PLAIN_BATCHES):
        chooser = sampler if not reads_all else loader.batch_sampler
        raise DataError(
            f"{place}: got a DataLoader with a {type(chooser).__name__}, whose choice of samples "
            "would be ignored; pass a torch.utils.data.Subset of its data set, or the tensors"
        )


def class_names(dataset: object) -> list[str] | None:
    """Return the class names that a data set states, as those of torchvision do."""
    while isinstance(dataset, DataLoader) or (
        hasattr(dataset, "dataset") and not hasattr(dataset, "classes")
    ):
        dataset = getattr(dataset, "dataset", None)
    names = getattr(dataset, "classes", None)
    if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
        return list(names)
    return None


def is_dataset(value: object) -> bool:
    """Return whether `read_dataset` reads a value."""
    return isinstance(value, (Dataset, DataLoader))


def split_sample(sample: object, place: str) -> tuple[object, object]:
    """Return the image and the label of one sample.

    Raises:
        DataError: The sample is no pair, and no dictionary with an image and a label.
    """
    if isinstance(sample, Mapping):
        image = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
        label = next((sample[key] for key in LABEL_KEYS if key in sample), None)
        if image is not None and label is not None:
            return image, label
        raise DataError(
            f"{place}: got samples with {', '.join(map(str, sample))}, expected one of "
            f"{', '.join(IMAGE_KEYS)} and one of {', '.join(LABEL_KEYS)}"
        )
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        return sample[0], sample[1]
    size = f" of {len(sample)}" if isinstance(sample, (tuple, list)) else ""
    raise DataError(
        f"{place}: got samples of type {type(sample).__name__}{size}, expected (image, label)"
    )


def _iterate(dataset: object, place: str) -> Iterator[tuple[object, object]]:
    if _is_indexed(dataset):  # many such data sets raise no IndexError at their end
        for number in range(len(dataset)):
            yield _read_sample(dataset, number, place)
    elif isinstance(dataset, Iterable):
        with _named_failure(f"{place}: a sample"):
            for sample in dataset:
                yield split_sample(sample, place)
    else:
        raise DataError(f"{place}: got {type(dataset).__name__}, expected a data set of PyTorch")


def _read_sample(dataset: IndexedDataset, number: int, place: str) -> tuple[object, object]:
    with _named_failure(f"{place}: sample {number}"):
        return split_sample(dataset[number], place)


@contextlib.contextmanager
def _named_failure(sample: str) -> Iterator[None]:
    """Raise DataError for what the code of a data set raises."""
    try:
        yield
    except (RobustsoupError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{sample} cannot be read: {reason}") from error


def _is_indexed(dataset: object) -> TypeGuard[IndexedDataset]:
    return isinstance(dataset, IndexedDataset) and not isinstance(dataset, IterableDataset)


def _refuse_random_samples(dataset: object, place: str) -> None:
    """Refuse a data set whose first samples differ when they are read again."""
    if not _is_indexed(dataset):
        return
    for number in range(min(len(dataset), REPEATED_SAMPLES)):
        both = [_read_sample(dataset, number, place) for _ in range(2)]
        if repr(both[0][1]) != repr(both[1][1]):
            raise DataError(f"{place}: the label of sample {number} differs when it is read again")
        with _named_failure(f"{place}: sample {number}"):
            pixels = [_pixel_bytes(image, f"{place}: sample {number}") for image, _ in both]
        if pixels[0] != pixels[1]:
            raise DataError(
                f"{place}: sample {number} differs when it is read again; remove random "
                "augmentation from its transform, and give augmentation= instead"
            )


def _pixel_bytes(image: object, place: str) -> bytes:
    if is_pillow_image(image):
        return image.tobytes()
    try:
        tensor = torch.as_tensor(image).detach()
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"{place}: got {type(image).__name__}, expected an image: a tensor, an array or an "
            "image of Pillow"
        ) from None
    tensor = tensor.cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

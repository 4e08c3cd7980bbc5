"""Image folders: one sub-folder for each class, split by folders or by a seed."""

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from robustsoup.data.decoded import FolderParts, ImageFiles, load_decoded
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import Augmentation, Data, DataDescription, Samples, assemble, hold_out
from robustsoup.errors import DataError
from robustsoup.files import open_regular

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
DEFAULT_IMAGE_SIZE = 32


@dataclass(frozen=True)
class ImageListing:
    """Image files, sorted by class and then by name.

    Attributes:
        files: Paths.
        labels: The class number of each file.
        classes: Names of the classes.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def load_folder(request: DataRequest) -> Data:
    """Load PATH/train/CLASS/*, PATH/test/CLASS/* and optionally PATH/val/CLASS/*, or PATH/CLASS/*.

    PATH/CLASS/* is split 70/10/20. Images become RGB, uint8 (n, 3, image_size, image_size): the
    shorter side is resized (bilinear, antialiased), then the centre is cropped. Classes are the
    sorted folder names. Hidden files and files of other types are ignored. Without a val folder,
    the seed decides which samples are in val (1/8 of the samples outside test); test is always the
    same. ids are row numbers in sorted order; train and val share one numbering, which includes
    test if PATH is not split. mean and std are computed over train and val, so they do not depend
    on the seed.

    Images are decoded once, into the user's cache folder, and mapped from there, so memory does not
    grow with the data. They are decoded again if a file was added, removed or changed (size or
    time), if image_size changes, or if the seed changes and decides which samples are in val.

    Args:
        request: `place` is the path; `image_size` defaults to 32; `on_progress` counts images as
            they are decoded, and is not called if they are in the cache.

    Raises:
        DataError: The path is missing, a folder holds no images, there are fewer than two classes,
            the parts have different classes, a class has no image left to train on, or an image
            cannot be read; the error names the file.
        StorageError: The cache folder is full or cannot be written.
    """
    size = _image_size(request)
    root = Path(request.place).expanduser()
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing"
        raise DataError(
            f"{root}: got {got}, expected a folder with one sub-folder for each class; "
            "check the path"
        )
    has_split = _has_split_folders(root)
    parts = _list_split(root, request.seed) if has_split else _split_listing(root, request.seed)
    train, val = (parts.pool.take(rows) for rows in parts.rows)
    _check_classes_trained(root, parts.classes, train)
    decoded = load_decoded(
        root, parts, size, lambda file: _read_image(file, size), request.on_progress
    )
    description = DataDescription(
        request.spec,
        decoded.digest,
        parts.classes,
        decoded.mean,
        decoded.std,
        Augmentation(pad=size // 8, flip=True),
    )
    train_samples, val_samples, test_samples = (
        Samples(images, files.labels, files.ids)
        for images, files in zip(decoded.images, (train, val, parts.test), strict=True)
    )
    return assemble(description, train_samples, val_samples, test_samples, seed=request.seed)


def _image_size(request: DataRequest) -> int:
    size = DEFAULT_IMAGE_SIZE if request.image_size is None else request.image_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(
            f"{request.spec}: got image_size {size!r}, expected an integer of at least 1"
        )
    return size


def _has_split_folders(root: Path) -> bool:
    """Return whether `root` is split; a folder "train" of images without "test" is a class."""
    return (root / "train").is_dir() and (
        (root / "test").is_dir() or bool(_class_folders(root / "train"))
    )


def _list_split(root: Path, seed: int) -> FolderParts:
    """List PATH/train, PATH/val if it exists, and PATH/test."""
    train = _list_images(root / "train")
    val = ImageListing((), (), train.classes)
    if (root / "val").is_dir():
        val = _list_images(root / "val")
    test = _list_images(root / "test")
    for name, part in (("val", val), ("test", test)):
        if part.classes != train.classes:
            differing = sorted(set(part.classes) ^ set(train.classes))
            raise DataError(
                f"{root / name}: got classes {_abbreviate(part.classes)}, expected those of "
                f"train, {_abbreviate(train.classes)} (in only one of them: "
                f"{_abbreviate(differing)}); make the folders agree"
            )
    pool = _number_files(train.files + val.files, train.labels + val.labels)
    n = len(train.files)
    if val.files:
        rows = _fixed_order(n), n + _fixed_order(len(val.files))
    else:
        rows = hold_out(n, max(1, n // 8), seed)
    test_files = _number_files(test.files, test.labels)
    return FolderParts(train.classes, pool, rows, test_files.take(_fixed_order(len(test_files))))


def _split_listing(root: Path, seed: int) -> FolderParts:
    """List PATH/CLASS/* and hold out test and val."""
    listing = _list_images(root)
    files = _number_files(listing.files, listing.labels)
    held_out = hold_out(len(files), max(1, len(files) // 5), "folder test")
    pool, test = (files.take(rows) for rows in held_out)
    rows = hold_out(len(pool), max(1, len(pool) // 8), seed)
    return FolderParts(listing.classes, pool, rows, test)


def _fixed_order(n: int) -> torch.Tensor:
    """Return a fixed shuffle of 0..n-1, because the listing is sorted by class."""
    return hold_out(n, 0, "folder order")[0]


def _class_folders(path: Path) -> list[Path]:
    return sorted(
        child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")
    )


def _image_paths(path: Path) -> list[str]:
    """Return the sorted image paths of a folder, as strings, which take less memory than Paths."""
    images = sorted(
        child
        for child in path.iterdir()
        if child.suffix.lower() in SUFFIXES and not child.name.startswith(".")
    )
    return [str(image) for image in images]


def _list_images(path: Path) -> ImageListing:
    expected = "expected two or more folders of images, one for each class"
    if not path.is_dir():
        raise DataError(
            f"{path}: no such folder, {expected}; "
            "add it, or use the layout PATH/CLASS/* without split folders"
        )
    folders = _class_folders(path)
    if len(folders) < 2:
        raise DataError(
            f"{path}: got {len(folders)} class folders, {expected}; "
            "put each class into its own folder"
        )
    files: list[str] = []
    labels: list[int] = []
    for number, folder in enumerate(folders):
        images = _image_paths(folder)
        if not images:
            raise DataError(
                f"{folder}: got no images, expected {', '.join(SUFFIXES)}; "
                "add some or remove the folder"
            )
        files += images
        labels += [number] * len(images)
    return ImageListing(tuple(files), tuple(labels), tuple(folder.name for folder in folders))


def _check_classes_trained(root: Path, classes: tuple[str, ...], train: ImageFiles) -> None:
    counts = torch.bincount(train.labels, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            raise DataError(
                f"{root}: class {name}: got 0 images to train on after val and test were taken, "
                "expected 1 or more; add images of the class, or split the data into train, val "
                "and test folders"
            )


def _number_files(files: tuple[str, ...], labels: tuple[int, ...]) -> ImageFiles:
    return ImageFiles(files, torch.tensor(labels), torch.arange(len(files)))


def _read_image(file: str, size: int) -> torch.Tensor:
    """Decode an image file to uint8 (3, size, size)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{file}: reading images requires Pillow; install it with: pip install pillow"
        ) from error
    try:
        with open_regular(file) as stream, Image.open(stream) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image"
        raise DataError(
            f"{file}: cannot be read ({reason}), expected an image; replace or remove it"
        ) from error
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def _abbreviate(names: tuple[str, ...] | list[str]) -> str:
    first = ", ".join(names[:5])
    return f"{first}, ... ({len(names)})" if len(names) > 5 else first

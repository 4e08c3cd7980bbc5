"""Image folders: one folder a class, already split into train and test, or not."""

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from robustsoup.data.decoded import Files, Parts, load_decoded
from robustsoup.data.splits import Augmentation, Data, DataDescription, Samples, assemble, hold_out
from robustsoup.errors import DataError
from robustsoup.progress import Progress

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
IMAGE_SIZE = 32


@dataclass(frozen=True)
class Listing:
    """Image files, sorted by class and then by name, and the class number of each."""

    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def load_folder(
    path: str, seed: int, image_size: int | None = None, *, on_progress: Progress | None = None
) -> Data:
    """Read PATH/train/CLASS/*, PATH/test/CLASS/* and perhaps PATH/val/CLASS/*; or PATH/CLASS/*, split 70/10/20.

    Images become RGB, uint8 (n, 3, image_size, image_size): shorter side resized (bilinear, antialiased), centre crop.
    image_size: 32 unless given. Classes are the sorted folder names. Hidden and other files are ignored.
    Where there is no val folder the seed decides who is in val (1/8 of what is not test); test is always the same.
    ids are row numbers in sorted order; train and val share one numbering, and test too where PATH was not split.
    mean and std are of train and val together, so that they do not change with the seed.
    Images are decoded once, into the user's cache folder, and mapped from there: memory does not grow with the data.
    They are decoded anew where a file was added, removed or changed (its size or time), for another image_size, and
    for another seed if it decides who is in val.
    on_progress(done, total, figures) counts images as they are decoded; it is not called if they already were.

    Raises DataError if the path is missing, a folder holds no images, there are fewer than two classes, the classes
    of the parts differ, a class has no image left to train on, or an image cannot be read (it is named);
    StorageError if the cache folder cannot be written or is full.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(
            f"folder:{path}: got image_size {size!r}, expected a whole number of pixels above 0"
        )
    root = Path(path).expanduser()
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(
            f"{root}: got {found}, expected a folder with one folder a class; check the path"
        )
    parts = _read_split(root, seed) if _is_split(root) else _split_whole(root, seed)
    train, val = (parts.pool.take(rows) for rows in parts.rows)
    _check_classes_trained(root, parts.classes, train)
    decoded = load_decoded(root, parts, size, lambda file: _read_image(file, size), on_progress)
    augmentation = Augmentation(pad=size // 8, flip=True)
    source = DataDescription(
        f"folder:{path}", decoded.digest, parts.classes, decoded.mean, decoded.std, augmentation
    )
    train, val, test = (
        Samples(images, files.labels, files.ids)
        for images, files in zip(decoded.images, (train, val, parts.test), strict=True)
    )
    return assemble(source, train, val, test, seed=seed)


def _is_split(root: Path) -> bool:
    """A lone folder called "train" that holds images itself is a class, of trains."""
    return (root / "train").is_dir() and (
        (root / "test").is_dir() or bool(_folders(root / "train"))
    )


def _read_split(root: Path, seed: int) -> Parts:
    train = _list_images(root / "train")
    val = _list_images(root / "val") if (root / "val").is_dir() else Listing((), (), train.classes)
    test = _list_images(root / "test")
    for name, part in (("val", val), ("test", test)):
        if part.classes != train.classes:
            raise DataError(
                f"{root / name}: got classes {_some(part.classes)}, expected those of train, {_some(train.classes)} "
                f"(only in one: {_some(sorted(set(part.classes) ^ set(train.classes)))}); make the folders agree"
            )
    pool = _number(train.files + val.files, train.labels + val.labels)
    n = len(train.files)
    given = _shuffled(n), n + _shuffled(len(val.files))
    rows = given if val.files else hold_out(n, max(1, n // 8), seed)
    tested = _number(test.files, test.labels)
    return Parts(train.classes, pool, rows, tested.take(_shuffled(len(tested))))


def _split_whole(root: Path, seed: int) -> Parts:
    listing = _list_images(root)
    files = _number(listing.files, listing.labels)
    others, test = (
        files.take(rows) for rows in hold_out(len(files), max(1, len(files) // 5), "folder test")
    )
    return Parts(
        listing.classes, others, hold_out(len(others), max(1, len(others) // 8), seed), test
    )


def _shuffled(n: int) -> torch.Tensor:
    """Always the same order of 0..n-1. Files are listed class by class, so their first k are no fair sample."""
    return hold_out(n, 0, "folder order")[0]


def _folders(path: Path) -> list[Path]:
    return sorted(
        child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")
    )


def _images(path: Path) -> list[str]:
    """As strings, which need less memory than paths: there may be millions."""
    images = sorted(
        child
        for child in path.iterdir()
        if child.suffix.lower() in SUFFIXES and not child.name.startswith(".")
    )
    return [str(image) for image in images]


def _list_images(path: Path) -> Listing:
    expected = "expected two or more folders of images, one a class"
    if not path.is_dir():
        raise DataError(
            f"{path}: got nothing there, {expected}; add it, or leave the data unsplit (PATH/CLASS/*)"
        )
    folders = _folders(path)
    if len(folders) < 2:
        raise DataError(
            f"{path}: got {len(folders)} class folders, {expected}; put each class into its own folder"
        )
    files, labels = [], []
    for number, folder in enumerate(folders):
        images = _images(folder)
        if not images:
            raise DataError(
                f"{folder}: got no images, expected {', '.join(SUFFIXES)}; add some or remove the folder"
            )
        files += images
        labels += [number] * len(images)
    return Listing(tuple(files), tuple(labels), tuple(folder.name for folder in folders))


def _check_classes_trained(root: Path, classes: tuple[str, ...], train: Files) -> None:
    counts = torch.bincount(train.labels, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            raise DataError(
                f"{root}: class {name}: got 0 images to train on after val and test were taken, expected 1 or more; "
                "add images of it, or split the data into train, val and test folders"
            )


def _number(files: tuple[str, ...], labels: tuple[int, ...]) -> Files:
    return Files(files, torch.tensor(labels), torch.arange(len(files)))


def _read_image(file: str, size: int) -> torch.Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{file}: reading images needs Pillow; install it with: pip install pillow"
        ) from error
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
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


def _some(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown}, ... ({len(names)})" if len(names) > 5 else shown

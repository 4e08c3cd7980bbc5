"""Image folders: one sub-folder for each class, split by folders or by a seed."""

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robustsoup.data.decoded import FolderParts, ImageFiles, load_decoded
from robustsoup.data.images import IMAGE_SUFFIXES, doubt_depth, make_decoder
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import (
    Augmentation,
    Data,
    DataDescription,
    Samples,
    add_notes,
    assemble,
    hold_out,
)
from robustsoup.errors import DataError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names that the folder of each split may have."""


@dataclass(frozen=True)
class ImageListing:
    """Image files, sorted by class and then by path.

    Attributes:
        files: Paths.
        labels: The class number of each file.
        classes: Names of the classes.
        skipped: How many files were left out, by the reason.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    skipped: Counter[str]


def load_folder(request: DataRequest) -> Data:
    """Load PATH/train/CLASS/*, PATH/test/CLASS/* and optionally PATH/val/CLASS/*, or PATH/CLASS/*.

    PATH/CLASS/* is split 70/10/20. Classes are the sorted folder names; images lie in them at any
    depth. Images become uint8 (n, channels, image_size, image_size): the shorter side is resized
    (bilinear, antialiased), then the centre is cropped. They have one channel if every image is
    grey, else three, unless `channels` is set. Hidden files and files of other types are left out.
    Without a val folder, the seed decides which samples are in val (1/8 of the samples outside
    test); test is always the same. With a val folder and no test folder, the val folder is test.
    ids are row numbers in sorted order; train and val share one numbering, which includes test if
    PATH is not split. mean and std are computed over train and val, so they do not depend on the
    seed.

    Images are decoded once, into the user's cache folder, and mapped from there, so memory does not
    grow with the data. They are decoded again if a file was added, removed or changed (size or
    time), if image_size or channels changes, or if the seed changes and decides which samples are
    in val.

    Args:
        request: `place` is the path; `image_size` defaults to 32; `on_progress` counts images as
            they are decoded, and is not called if they are in the cache.

    Returns:
        The data; its notes say which files were left out and which pixels were scaled.

    Raises:
        DataError: The path is missing, a folder holds no images, there are fewer than two classes,
            the parts have different classes, folders look like splits under other names, a class
            has no image left to train on, or an image cannot be read; the error names the file.
        StorageError: The cache folder is full or cannot be written.
    """
    decoder = make_decoder(request.spec, request.image_size, request.channels)
    root = Path(request.place)
    with _refuse_closed_folders(root):
        is_folder = root.is_dir()
    if not is_folder:
        got = "a file" if root.exists() else "nothing"
        raise DataError(
            f"{root}: got {got}, expected a folder with one sub-folder for each class; "
            "check the path"
        )
    with _refuse_closed_folders(root):
        parts, notes = _list_parts(root, request.seed)
    train, val = (parts.pool.take(rows) for rows in parts.rows)
    _check_classes_trained(root, parts.classes, train)
    decoded = load_decoded(root, parts, decoder, request.on_progress)
    if request.channels is None and len(decoded.mean) == 1:
        notes.append("every image is grey, so images have 1 channel; channels = 3 repeats it")
    if decoded.scaled:
        notes.append(f"{decoded.scaled:,} images of 16 bits were scaled to 8")
    doubts = doubt_depth(decoded.scaled, decoded.brightest)
    description = DataDescription(
        request.spec,
        decoded.digest,
        parts.classes,
        decoded.mean,
        decoded.std,
        Augmentation(pad=decoder.size // 8, flip=True),
    )
    train_samples, val_samples, test_samples = (
        Samples(images, files.labels, files.ids)
        for images, files in zip(decoded.images, (train, val, parts.test), strict=True)
    )
    data = assemble(description, train_samples, val_samples, test_samples, seed=request.seed)
    return add_notes(data, [f"{root}: {note}" for note in notes], [f"{root}: {d}" for d in doubts])


@contextlib.contextmanager
def _refuse_closed_folders(root: Path) -> Iterator[None]:
    """Raise DataError for a folder that cannot be listed."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: cannot be listed ({error.strerror or error}); make the "
            "folder and what is in it readable, or remove it"
        ) from error


def _list_parts(root: Path, seed: int) -> tuple[FolderParts, list[str]]:
    """List the files of a folder; return notes on what was left out too."""
    folders = _split_folders(root)
    if folders is None:
        _refuse_splits_as_classes(root)
        listing = _list_images(root)
        return _split_listing(listing, seed), _describe_skipped(listing.skipped)
    notes: list[str] = []
    if "test" not in folders and "val" in folders:
        folders["test"] = folders.pop("val")
        notes.append(
            f'no folder "test": {folders["test"].name} is test, and val is held out of train'
        )
    train, test = (_list_images(folders.get(name, root / name)) for name in ("train", "test"))
    val = ImageListing((), (), train.classes, Counter())
    if "val" in folders:
        val = _list_images(folders["val"])
    for name, part in (("val", val), ("test", test)):
        if part.classes != train.classes:
            differing = sorted(set(part.classes) ^ set(train.classes))
            raise DataError(
                f"{folders[name]}: got classes {abbreviate(part.classes)}, expected those of "
                f"train, {abbreviate(train.classes)} (in only one of them: "
                f"{abbreviate(differing)}); make the folders agree"
            )
    skipped = train.skipped + val.skipped + test.skipped
    unused = [f.name for f in _sub_folders(root) if f not in folders.values()]
    if unused:
        notes.append(f"folders {abbreviate(unused)} beside {folders['train'].name} are not used")
    return _join_listings(train, val, test, seed), notes + _describe_skipped(skipped)


def find_spellings(names: Collection[str], form: str = "{}") -> dict[str, str]:
    """Return how each split is spelled in some names, by our name of it.

    Args:
        names: The names, such as those of folders.
        form: What a name is, with {} for the split, such as "x_{}".
    """
    return {
        part: spelling
        for part, spellings in SPLIT_FOLDERS.items()
        for spelling in reversed(spellings)
        if form.format(spelling) in names
    }


def find_split_word(name: str) -> str | None:
    """Return the split that a file or folder names, such as train in imagenet-train-000.tar.

    The last of several is taken. "trainset" is a spelling of train, as "train" is.
    """
    words = re.findall("[a-z]+", name.lower())
    parts = {
        f"{spelling}{ending}": part
        for part, spellings in SPLIT_FOLDERS.items()
        for spelling in spellings
        for ending in ("", "set", "data")
    }
    return next((parts[word] for word in reversed(words) if word in parts), None)


def _split_folders(root: Path) -> dict[str, Path] | None:
    """Return the folder of each split, or None if `root` is not split.

    Capitals in their names do not matter. A folder "train" of images without another split is a
    class.

    Raises:
        DataError: There are splits, and none is train.
    """
    folders = {folder.name.lower(): folder for folder in _sub_folders(root)}
    found = {part: folders[spelling] for part, spelling in find_spellings(folders).items()}
    if len(found) > 1 and "train" not in found:
        raise DataError(
            f"{root}: got the splits {found['val'].name} and {found['test'].name} without train, "
            f"expected a folder train; if the data is only evaluated, rename {found['val'].name} "
            "to train"
        )
    is_split = len(found) > 1 or ("train" in found and _sub_folders(found["train"]))
    return found if is_split else None


def _refuse_splits_as_classes(root: Path) -> None:
    """Raise DataError if folders look like splits under other names, such as test_set.

    Their names have the words of different splits, and they hold folders of the same names.
    """
    by_split: dict[str, Path] = {}
    for folder in _sub_folders(root):
        if (part := find_split_word(folder.name)) is not None:
            by_split.setdefault(part, folder)
    parts = [part for part in SPLIT_FOLDERS if part in by_split]
    for pair in itertools.combinations(parts, 2):
        folder, other = (by_split[part] for part in pair)
        shared = sorted(_names_of_folders(folder) & _names_of_folders(other))
        if len(shared) > 1:
            raise DataError(
                f"{root}: the folders {folder.name} and {other.name} look like splits, because "
                f"both hold {abbreviate(shared)}, and would be taken for classes; name them "
                f"{' and '.join(pair)}"
            )


def _names_of_folders(folder: Path) -> set[str]:
    """Return the names of the folders in a folder, or in the only one that it holds."""
    inner = [child for child in folder.iterdir() if child.is_dir()]
    if len(inner) == 1:
        inner = [child for child in inner[0].iterdir() if child.is_dir()]
    return {child.name for child in inner if not child.name.startswith(".")}


def _join_listings(
    train: ImageListing, val: ImageListing, test: ImageListing, seed: int
) -> FolderParts:
    """Number the files of split folders, and hold out val if it has no folder."""
    pool = _number_files(train.files + val.files, train.labels + val.labels)
    n = len(train.files)
    if val.files:
        rows = _fixed_order(n), n + _fixed_order(len(val.files))
    else:
        rows = hold_out(n, max(1, n // 8), seed)
    test_files = _number_files(test.files, test.labels)
    return FolderParts(train.classes, pool, rows, test_files.take(_fixed_order(len(test_files))))


def _split_listing(listing: ImageListing, seed: int) -> FolderParts:
    """Hold out test and val of PATH/CLASS/*."""
    files = _number_files(listing.files, listing.labels)
    held_out = hold_out(len(files), max(1, len(files) // 5), "folder test")
    pool, test = (files.take(rows) for rows in held_out)
    rows = hold_out(len(pool), max(1, len(pool) // 8), seed)
    return FolderParts(listing.classes, pool, rows, test)


def _fixed_order(n: int) -> torch.Tensor:
    """Return a fixed shuffle of 0..n-1, because the listing is sorted by class."""
    return hold_out(n, 0, "folder order")[0]


def _sub_folders(path: Path) -> list[Path]:
    """Return the sorted folders in a folder.

    Raises:
        DataError: One is a link that leads nowhere or back: a class would be missing, or would hold
            the images of all.
    """
    folders: list[Path] = []
    for child in sorted(path.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_dir():
            if _leads_above(child, path):
                raise DataError(
                    f"{child}: is a link to a folder that holds it, so it is no class; remove it"
                )
            folders.append(child)
        elif _is_broken_link(child) and child.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"{child}: is a link to nothing, expected a folder; restore what it links to, or "
                "remove it"
            )
    return folders


def _leads_above(folder: Path, parent: Path) -> bool:
    """Return whether a folder in `parent` is a link to it or to one above it."""
    return parent.resolve().is_relative_to(folder.resolve())


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _image_paths(path: Path, skipped: Counter[str]) -> list[str]:
    """Return the sorted image paths of a class, as strings, which take less memory than Paths.

    Args:
        path: The folder of the class; linked folders are followed once, unless they lie above it.
        skipped: Counts the files that are left out, by their ending.
    """
    images: list[Path] = []
    waiting, listed = [path], set[Path]()
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in listed:
            continue
        listed.add(folder.resolve())
        for child in folder.iterdir():
            if child.name.startswith("."):
                continue
            if child.is_dir() and child.resolve() in path.resolve().parents:
                skipped["linking to a folder above"] += 1
            elif child.is_dir():
                waiting.append(child)
            elif child.suffix.lower() in IMAGE_SUFFIXES:
                images.append(child)
            elif _is_broken_link(child):
                skipped["linking to nothing"] += 1
            else:
                skipped[child.suffix.lower() or "without an ending"] += 1
    return [str(image) for image in sorted(images)]


def _list_images(path: Path) -> ImageListing:
    expected = "expected two or more folders of images, one for each class"
    if not path.is_dir():
        raise DataError(
            f"{path}: no such folder, {expected}; "
            "add it, or use the layout PATH/CLASS/* without split folders"
        )
    folders = _sub_folders(path)
    if len(folders) < 2:
        raise DataError(
            f"{path}: got {len(folders)} class folders, {expected}; "
            "put each class into its own folder"
        )
    files: list[str] = []
    labels: list[int] = []
    skipped: Counter[str] = Counter()
    for number, folder in enumerate(folders):
        left_out: Counter[str] = Counter()
        images = _image_paths(folder, left_out)
        if not images:
            got = f" but {_count_reasons(left_out)}" if left_out else ""
            raise DataError(
                f"{folder}: got no images{got}, expected {', '.join(IMAGE_SUFFIXES)}; "
                "add some or remove the folder"
            )
        skipped += left_out
        files += images
        labels += [number] * len(images)
    outside = sum(child.suffix.lower() in IMAGE_SUFFIXES for child in path.iterdir())
    if outside:
        skipped["outside the class folders"] += outside
    names = tuple(folder.name for folder in folders)
    return ImageListing(tuple(files), tuple(labels), names, skipped)


def _describe_skipped(skipped: Counter[str]) -> list[str]:
    """Return a note on the files that were left out, if there are any."""
    if not skipped:
        return []
    endings = ", ".join(IMAGE_SUFFIXES)
    reasons = _count_reasons(skipped)
    return [f"skipped {skipped.total():,} files: {reasons}; images end in {endings}"]


def _count_reasons(skipped: Counter[str]) -> str:
    return abbreviate([f"{count:,} {reason}" for reason, count in sorted(skipped.items())])


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


def abbreviate(names: Sequence[str]) -> str:
    """Return the first five names as text, and how many there are if there are more."""
    first = ", ".join(names[:5])
    return f"{first}, ... ({len(names)})" if len(names) > 5 else first

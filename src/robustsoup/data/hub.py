"""Data sets that the library `datasets` reads: of the Hugging Face Hub, or in local files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robustsoup.data.folders import abbreviate, find_spellings, find_split_word
from robustsoup.data.images import MAX_IMAGE_BYTES, open_image, turn_upright
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import Augmentation, Data, add_notes, assemble_tensors, promote_val
from robustsoup.data.torch_datasets import (
    IMAGE_KEYS,
    LABEL_KEYS,
    ImageStack,
    match_channels,
)
from robustsoup.errors import DataError
from robustsoup.files import read_regular
from robustsoup.printable import first_line

if TYPE_CHECKING:
    from datasets import Dataset

FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow"}
SAVED_FILES = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes."""


@dataclass(frozen=True, eq=False)
class HubSplit:
    """The samples of a split as the library gives them.

    Attributes:
        images: Images, as `as_pixels` takes them.
        labels: The class of each image, by its number or by its name.
        names: Names of the classes in the order of their numbers, if the split states them.
        doubts: Notes on the depth of the images.
    """

    images: list[object]
    labels: list[object]
    names: list[str] | None
    doubts: tuple[str, ...] = ()


def load_hub(request: DataRequest) -> Data:
    """Load NAME[@REVISION][:CONFIGURATION] of the Hub, or a local file or folder, into memory.

    Splits may be called train, validation and test, as in folders; a split without labels is left
    out. The image is the first column of images, the label the first column of classes. Classes
    are numbered as in train, and the labels of other splits are translated by name. Images are
    square and of one size, unless image_size is set. Libraries of the Hub run no code of a data
    set.

    Returns:
        The data; its notes say which splits were left out.

    Raises:
        DataError: `datasets` is not installed or cannot load the data, a column, an image or a
            label is missing, or a split has a class that train lacks.
    """
    found, names = _find_splits(request)
    notes = describe_splits(names)
    splits: dict[str, HubSplit] = {}
    for part, dataset in found.items():
        split = _read_split(dataset, part, request)
        if split is None:
            notes.append(f"{part} has no labels and is left out")
        else:
            splits[part] = split
    if "train" not in splits:
        raise DataError(
            f"{request.spec}: got no labelled split train, expected one; the data has "
            f"{abbreviate(names)}"
        )
    doubts = [f"{request.spec} {part}: {d}" for part, split in splits.items() for d in split.doubts]
    parts, classes = number_classes(splits, request.spec)
    parts = match_channels(parts)
    notes += promote_val(parts)
    size = request.image_size or 0
    data = assemble_tensors(
        request.spec,
        parts,
        classes=classes,
        seed=request.seed,
        augmentation=Augmentation(pad=size // 8, flip=True),
        decoded=True,
    )
    return add_notes(data, [f"{request.spec}: {note}" for note in notes], doubts)


def _find_splits(request: DataRequest) -> tuple[dict[str, "Dataset"], list[str]]:
    """Load the data; return its splits by our names, and the names of all in the data."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{request.spec}: requires the library datasets; install it with: "
            "pip install 'robustsoup[datasets]'"
        ) from None
    place = Path(request.place)
    try:
        if place.is_file():
            kind = FILE_KINDS.get(place.suffix, place.suffix)
            loaded = datasets.load_dataset(kind, data_files={"train": str(place)})
        elif any((place / name).is_file() for name in SAVED_FILES):
            loaded = datasets.load_from_disk(str(place))
        elif place.is_dir():
            loaded = datasets.load_dataset(str(place.resolve()))
        else:
            name, _, configuration = request.place.partition(":")
            name, _, revision = name.partition("@")
            loaded = datasets.load_dataset(name, configuration or None, revision=revision or None)
    except Exception as error:  # the library raises errors of many others
        reason = first_line(error)
        raise DataError(f"{request.spec}: datasets cannot load it: {reason}") from None
    if not isinstance(loaded, Mapping):
        return {"train": loaded}, [str(loaded.split or "train")]
    names = [str(name) for name in loaded]
    return {part: loaded[name] for part, name in match_splits(names).items()}, names


def match_splits(names: Sequence[str]) -> dict[str, str]:
    """Return the name of each split, by our name of it; a single one is train."""
    lower = {name.lower(): name for name in names}
    found = {part: lower[spelling] for part, spelling in find_spellings(lower).items()}
    return {"train": names[0]} if "train" not in found and len(names) == 1 else found


def describe_splits(names: Sequence[str]) -> list[str]:
    """Return notes on the splits that are not used, and on a single one that is not train."""
    found = match_splits(names)
    unused = [name for name in names if name not in found.values()]
    notes = [f"splits that are not used: {abbreviate(unused)}"] if unused else []
    if len(names) == 1 and find_split_word(names[0]) != "train":
        notes.append(f"no split is called train; {names[0]} is split anew")
    return notes


def _read_split(dataset: "Dataset", part: str, request: DataRequest) -> HubSplit | None:
    """Return the samples of a split; None if it is not train and has no labels."""
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    image = _find_column(kinds, "Image", IMAGE_KEYS, request.spec)
    if part != "train" and not _list_columns(kinds, "ClassLabel", LABEL_KEYS):
        return None
    label = _find_column(kinds, "ClassLabel", LABEL_KEYS, request.spec)
    labels = _read_labels(dataset, label, f"{request.spec} {part}")
    if not has_labels(labels, f"{request.spec} {part}"):
        return None
    names = getattr(dataset.features[label], "names", None)
    dataset = dataset.select_columns([image])  # the library would decode others too
    if kinds[image] == "Image":
        dataset = dataset.cast_column(image, type(dataset.features[image])(decode=False))
    stack = ImageStack(request.spec, request.image_size, request.channels)
    for number in range(len(dataset)):
        try:
            row = dataset[number]
        except Exception as error:  # whatever decoding raises
            raise DataError(f"{request.spec}: row {number} cannot be read: {error}") from None
        stack.add(open_stored_image(row[image], f"{request.spec}: row {number}"))
        if request.on_progress:
            request.on_progress(number + 1, len(dataset), "images decoded")
    return HubSplit(stack.stack(), labels, None if names is None else list(names), stack.doubts())


def _read_labels(dataset: "Dataset", column: str, place: str) -> list[object]:
    try:
        return list(dataset.select_columns([column]).with_format(None)[:][column])
    except Exception as error:  # whatever decoding raises
        raise DataError(f"{place}: {column} cannot be read: {first_line(error)}") from None


def has_labels(labels: Sequence[object], place: str) -> bool:
    """Return whether a split has labels; data sets write None or -1 for the secret ones of tests.

    Raises:
        DataError: Only some labels are missing; the error names the first row without one.
    """
    missing = [
        row
        for row, label in enumerate(labels)
        if label is None or (isinstance(label, int) and label < 0)
    ]
    if 0 < len(missing) < len(labels):
        raise DataError(
            f"{place}: row {missing[0]}: got label {labels[missing[0]]}, expected a class; remove "
            f"the rows without a label ({len(missing):,})"
        )
    return bool(labels) and not missing


def open_stored_image(image: object, place: str) -> object:
    """Open an image that is stored as bytes, or as the path of a local file.

    It is turned as its EXIF orientation says, which the library does too. The library would also
    download it from an address in the data, and let Pillow start other programs; see IMAGE_FORMATS.

    Raises:
        DataError: There is no image, or its file cannot be read; the error names the `place`.
    """
    if image is None:
        raise DataError(f"{place}: got None, expected an image; remove the row")
    if not isinstance(image, Mapping):
        return image
    content, path = image.get("bytes"), image.get("path")
    if not isinstance(content, bytes):
        try:
            content = read_regular(str(path), MAX_IMAGE_BYTES)
        except OSError as error:
            raise DataError(f"{place}: {path}: cannot be read ({error.strerror})") from None
    return turn_upright(open_image(content, place), place)


def _find_column(kinds: Mapping[str, str], kind: str, names: Sequence[str], place: str) -> str:
    """Return the column of a kind of feature, else the first of some names."""
    for column in _list_columns(kinds, kind, names):
        return column
    raise DataError(
        f"{place}: got the columns {', '.join(kinds)}, expected one of type {kind} or one of "
        f"{', '.join(names)}"
    )


def _list_columns(kinds: Mapping[str, str], kind: str, names: Sequence[str]) -> list[str]:
    known = [name for name in names if name in kinds]
    of_kind = [name for name in kinds if kinds[name] == kind]
    return [*(name for name in known if name in of_kind), *of_kind, *known]


def number_classes(
    splits: Mapping[str, HubSplit], place: str
) -> tuple[dict[str, tuple[object, object]], list[str] | None]:
    """Number the classes of all splits alike: as in train, or as the first split that names them.

    Labels that are text are numbered in sorted order if no split states the names of the classes.

    Returns:
        Images and labels of each split; and the names of the classes, None if labels are numbers
        without names.

    Raises:
        DataError: A split has a class that is not among the names.
    """
    names = next((split.names for split in splits.values() if split.names is not None), None)
    labels = [label for split in splits.values() for label in split.labels]
    if names is None and all(isinstance(label, str) for label in labels):
        names = sorted({str(label) for label in labels})
    parts: dict[str, tuple[object, object]] = {}
    for part, split in splits.items():
        numbers = split.labels if names is None else _renumber(split, names, f"{place} {part}")
        parts[part] = split.images, numbers
    return parts, names


def _renumber(split: HubSplit, names: Sequence[str], place: str) -> list[object]:
    """Return labels as numbers of `names`."""
    is_text = any(isinstance(label, str) for label in split.labels)
    own = split.names
    if not is_text and (own is None or own == names):
        return split.labels
    numbers = {name: number for number, name in enumerate(names)}
    texts = [
        own[label] if own and isinstance(label, int) and 0 <= label < len(own) else label
        for label in split.labels
    ]
    if unknown := {str(text) for text in texts if not isinstance(text, str) or text not in numbers}:
        raise DataError(
            f"{place}: got classes {abbreviate(sorted(unknown))}, expected those of train, "
            f"{abbreviate(names)}; make the splits agree"
        )
    return [numbers[str(text)] for text in texts]

"""Data sets that the library `datasets` reads: of the Hugging Face Hub, or in local files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from robustsoup.data.folders import SPLIT_FOLDERS
from robustsoup.data.images import open_image
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import Augmentation, Data, assemble_tensors, promote_val
from robustsoup.data.torch_datasets import IMAGE_KEYS, LABEL_KEYS, ImageStack
from robustsoup.errors import DataError
from robustsoup.files import read_regular
from robustsoup.printable import first_line

if TYPE_CHECKING:
    from datasets import Dataset

FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow"}
SAVED_FILES = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes."""
MAX_IMAGE_BYTES = 2**28
"""Largest image file that is read, in bytes."""


def load_hub(request: DataRequest) -> Data:
    """Load NAME[@REVISION][:CONFIGURATION] of the Hub, or a local file or folder, into memory.

    Splits may be called train, validation and test, as in folders; a split without labels is left
    out. The image is the first column of images, the label the first column of classes. Images are
    square and of one size, unless image_size is set. Libraries of the Hub run no code of a data
    set.

    Raises:
        DataError: `datasets` is not installed or cannot load the data, or a column is missing.
    """
    parts: dict[str, tuple[list[object], list[object]]] = {}
    notes: list[str] = []
    classes: list[str] | None = None
    for part, dataset in _find_splits(request).items():
        images, labels, names = _read_split(dataset, request)
        if labels and all(isinstance(label, int) and label < 0 for label in labels):
            notes.append(f"{part} has no labels and is left out")
            continue
        parts[part] = images, labels
        classes = classes or names
    if "train" not in parts:
        raise DataError(f"{request.spec}: got no labelled split, expected train")
    notes += promote_val(parts)
    if classes is None:
        classes = _number_names(parts)
    size = request.image_size or 0
    data = assemble_tensors(
        request.spec,
        parts,
        classes=classes,
        seed=request.seed,
        augmentation=Augmentation(pad=size // 8, flip=True),
        decoded=True,
    )
    return replace(data, notes=(*data.notes, *(f"{request.spec}: {note}" for note in notes)))


def _find_splits(request: DataRequest) -> dict[str, "Dataset"]:
    """Load the data and return its splits by our names."""
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
        return {"train": loaded}
    ours = {theirs: part for part, names in SPLIT_FOLDERS.items() for theirs in names}
    found = {ours[name]: dataset for name, dataset in loaded.items() if name in ours}
    if "train" not in found and len(loaded) == 1:
        return {"train": next(iter(loaded.values()))}
    return found


def _read_split(
    dataset: "Dataset", request: DataRequest
) -> tuple[list[object], list[object], list[str] | None]:
    """Return images, labels and, if the data states them, the names of the classes."""
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    image = _find_column(kinds, "Image", IMAGE_KEYS, request.spec)
    label = _find_column(kinds, "ClassLabel", LABEL_KEYS, request.spec)
    if kinds[image] == "Image":
        dataset = dataset.cast_column(image, type(dataset.features[image])(decode=False))
    stack, labels = ImageStack(request.spec, request.image_size, request.channels), list[object]()
    for number in range(len(dataset)):
        try:
            row = dataset[number]
        except Exception as error:  # whatever decoding raises
            raise DataError(f"{request.spec}: row {number} cannot be read: {error}") from None
        stack.add(_open_stored_image(row[image], f"{request.spec}: row {number}"))
        labels.append(row[label])
        if request.on_progress:
            request.on_progress(number + 1, len(dataset), "images decoded")
    names = getattr(dataset.features[label], "names", None)
    return stack.stack(), labels, None if names is None else list(names)


def _open_stored_image(image: object, place: str) -> object:
    """Open an image that is stored as bytes, or as the path of a local file.

    The library itself would also download it from an address in the data, and let Pillow start
    other programs; see IMAGE_FORMATS.
    """
    if not isinstance(image, Mapping):
        return image
    content, path = image.get("bytes"), image.get("path")
    if not isinstance(content, bytes):
        try:
            content = read_regular(str(path), MAX_IMAGE_BYTES)
        except OSError as error:
            raise DataError(f"{place}: {path}: cannot be read ({error.strerror})") from None
    return open_image(content, place)


def _find_column(kinds: Mapping[str, str], kind: str, names: Sequence[str], place: str) -> str:
    """Return the column of a kind of feature, else the first of some names."""
    known = [name for name in names if name in kinds]
    of_kind = [name for name in kinds if kinds[name] == kind]
    for column in [*(name for name in known if name in of_kind), *of_kind, *known]:
        return column
    raise DataError(
        f"{place}: got the columns {', '.join(kinds)}, expected one of type {kind} or one of "
        f"{', '.join(names)}"
    )


def _number_names(parts: dict[str, tuple[list[object], list[object]]]) -> list[str] | None:
    """Replace labels that are text by their numbers in sorted order, in place.

    Returns:
        The names of the classes; None if the labels are no text.
    """
    labels = [label for _, labels in parts.values() for label in labels]
    if not all(isinstance(label, str) for label in labels):
        return None
    names = sorted({str(label) for label in labels})
    for part, (images, texts) in parts.items():
        parts[part] = images, [names.index(str(text)) for text in texts]
    return names

"""Images and labels in one .npz file."""

from collections.abc import Collection
from pathlib import Path

from robustsoup.arrays import read_arrays
from robustsoup.data.folders import abbreviate, find_spellings
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import Data, add_notes, assemble_tensors
from robustsoup.errors import DataError
from robustsoup.files import open_regular

SPLIT_ARRAYS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))
"""How files with several splits name images and labels; the second is MedMNIST's way."""
WHOLE_ARRAYS = (("images", "labels"), ("image", "label"), ("x", "y"))
"""How files without splits name them."""

MAX_UNPACKED_DATA = 2**32
"""Most bytes that a compressed file of data may unpack to."""


def load_npz(request: DataRequest) -> Data:
    """Load images and labels of an .npz file.

    The arrays are x_train, y_train, x_test, y_test and optionally x_val, y_val (or train_images,
    train_labels and so on), or images and labels, which are split 70/10/20. Splits may be spelled
    as folders are. The arrays have the forms that `Data.from_tensors` takes; others are not read.
    Images are not augmented in training.

    Returns:
        The data; its notes say which arrays were not used.

    Raises:
        DataError: The file is missing, broken or too large, or holds other arrays; the error names
            it.
    """
    path = Path(request.place)
    pairs: dict[str, tuple[str, str]] = {}
    unused: list[str] = []

    def choose(names: Collection[str]) -> list[str]:
        pairs.update(find_pairs(names, str(path)))
        chosen = [name for pair in pairs.values() for name in pair]
        unused.extend(name for name in names if name not in chosen)
        return chosen

    try:
        with open_regular(path) as file:
            arrays = read_arrays(file, choose=choose, max_unpacked=MAX_UNPACKED_DATA)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: not a readable .npz file ({reason})") from None
    parts = {part: (arrays[images], arrays[labels]) for part, (images, labels) in pairs.items()}
    data = assemble_tensors(request.spec, parts, seed=request.seed)
    if not unused:
        return data
    return add_notes(data, [f"{request.spec}: arrays that are not used: {abbreviate(unused)}"], [])


def find_pairs(names: Collection[str], place: str) -> dict[str, tuple[str, str]]:
    """Return the names of the arrays of images and labels of each split.

    Args:
        names: The names of all arrays.
        place: Names the file in errors.

    Raises:
        DataError: No pair of names is known, or one of a pair is missing.
    """
    for images, labels in SPLIT_ARRAYS:
        pairs = {
            part: (images.format(spelling), labels.format(spelling))
            for part, spelling in find_spellings(names, images).items()
        }
        if "train" in pairs:
            return {part: _check_pair(names, pair, place) for part, pair in pairs.items()}
    for pair in WHOLE_ARRAYS:
        if pair[0] in names:
            return {"train": _check_pair(names, pair, place)}
    raise DataError(
        f"{place}: got the arrays {abbreviate(list(names)) or 'none'}, expected x_train, y_train, "
        "x_test and y_test, or images and labels"
    )


def _check_pair(names: Collection[str], pair: tuple[str, str], place: str) -> tuple[str, str]:
    if pair[1] not in names:
        raise DataError(f"{place}: got {pair[0]} without {pair[1]}")
    return pair

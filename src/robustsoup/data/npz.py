"""Images and labels in one .npz file."""

from pathlib import Path

from torch import Tensor

from robustsoup.arrays import read_arrays
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import Data, assemble_tensors
from robustsoup.errors import DataError
from robustsoup.files import open_regular

SPLIT_ARRAYS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))
"""How files with several splits name images and labels; the second is MedMNIST's way."""
WHOLE_ARRAYS = (("images", "labels"), ("image", "label"), ("x", "y"))
"""How files without splits name them."""


def load_npz(request: DataRequest) -> Data:
    """Load images and labels of an .npz file.

    The arrays are x_train, y_train, x_test, y_test and optionally x_val, y_val (or train_images,
    train_labels and so on), or images and labels, which are split 70/10/20. They have the forms
    that `Data.from_tensors` takes. Images are not augmented in training.

    Raises:
        DataError: The file is missing, broken or too large, or holds other arrays; the error names
            it.
    """
    path = Path(request.place)
    try:
        with open_regular(path) as file:
            arrays = read_arrays(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: not a readable .npz file ({reason})") from None
    return assemble_tensors(request.spec, find_parts(arrays, str(path)), seed=request.seed)


def find_parts(arrays: dict[str, Tensor], place: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the images and labels of each split, by the names of the arrays.

    Raises:
        DataError: No pair of names is known, or one of a pair is missing.
    """
    for images, labels in SPLIT_ARRAYS:
        names = {
            part: (images.format(part), labels.format(part)) for part in ("train", "val", "test")
        }
        parts = {part: pair for part, pair in names.items() if pair[0] in arrays}
        if "train" in parts:
            return {part: _get_pair(arrays, pair, place) for part, pair in parts.items()}
    for pair in WHOLE_ARRAYS:
        if pair[0] in arrays:
            return {"train": _get_pair(arrays, pair, place)}
    raise DataError(
        f"{place}: got the arrays {', '.join(arrays) or 'none'}, expected x_train, y_train, x_test "
        "and y_test, or images and labels"
    )


def _get_pair(
    arrays: dict[str, Tensor], pair: tuple[str, str], place: str
) -> tuple[Tensor, Tensor]:
    if pair[1] not in arrays:
        raise DataError(f"{place}: got {pair[0]} without {pair[1]}")
    return arrays[pair[0]], arrays[pair[1]]

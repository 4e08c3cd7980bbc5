"""Turn what a user gives as data into a split."""

from typing import TypeAlias

from torch.utils.data import DataLoader, Dataset

from robustsoup.data.splits import Data, Split
from robustsoup.data.torch_datasets import class_names, is_dataset, read_dataset
from robustsoup.errors import DataError

SplitLike: TypeAlias = Split | tuple[object, object] | Dataset[object] | DataLoader[object]
"""Samples as users give them; see `as_split`."""


def as_split(data: object, function: str) -> Split:
    """Return the samples that a user passes to a function.

    Args:
        data: A split, a pair (images, labels) of tensors or arrays, or a data set or loader of
            torch.utils.data.
        function: Name of the function, for errors.

    Raises:
        DataError: The data is something else, images or labels have another form, or a label is
            not a class.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2:
        data = Split.from_tensors(data[0], data[1])
    elif is_dataset(data):
        images, labels = read_dataset(data, function)
        data = Split.from_tensors(images, labels, classes=class_names(data))
    if isinstance(data, Split):
        _check_labels(data, function)
        return data
    if isinstance(data, Data):
        raise DataError(
            f"{function}: got a whole data set, expected one of its splits, such as data.test"
        )
    hint = "; load it with rs.load_data and pass a split" if isinstance(data, str) else ""
    raise DataError(
        f"{function}: got {type(data).__name__}, expected a split such as data.test, a pair "
        f"(images, labels), or a data set of PyTorch{hint}"
    )


def as_optional_split(data: object, function: str) -> Split | None:
    """Return `as_split` of data that may be left out."""
    return None if data is None else as_split(data, function)


def _check_labels(data: Split, function: str) -> None:
    if not len(data):
        raise DataError(f"{function}: got no samples, expected one or more")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= data.classes:
        raise DataError(
            f"{function}: labels: got {low}..{high}, expected 0..{data.classes - 1}, "
            f"since the data has {data.classes} classes"
        )

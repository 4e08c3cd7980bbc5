"""The provenance record of a checkpoint: every entry that the library reads is checked here."""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from robustsoup.data.sketches import MAX_SKETCHES, SKETCH_SIZE
from robustsoup.errors import CheckpointError
from robustsoup.models.network import check_network_record
from robustsoup.schema import (
    MisfitError,
    anything,
    describe_value,
    file_name,
    integer,
    list_of,
    mapping_of,
    nullable,
    number,
    table,
    text,
)

_ANY_TABLE = mapping_of(anything)
_COUNT = integer(0, 2**63 - 1)
_DATA = table({"name": text, "digest": text, "split_digest": text, "seed": _COUNT}, {"val": _COUNT})
"""The entries of a DataRecord that are compared with the data of a command."""


_HASH = re.compile("[0-9a-f]{16}")


def _hashes(value: object, place: str) -> None:
    list_of(text)(value, place)
    hashes = list(value) if isinstance(value, (list, tuple)) else []
    is_sorted = all(low < high for low, high in pairwise(hashes))
    well_formed = all(_HASH.fullmatch(item) for item in hashes)
    if not (0 < len(hashes) <= SKETCH_SIZE and well_formed and is_sorted):
        expected = f"1 to {SKETCH_SIZE} different ascending numbers of 16 hex digits"
        raise MisfitError(place, value, expected)


_SKETCH = table(
    {"name": text, "split": text, "digest": text, "images": _COUNT, "smallest": _hashes}, {}
)


def _sketches(value: object, place: str) -> None:
    list_of(_SKETCH)(value, place)
    if isinstance(value, (list, tuple)) and len(value) > MAX_SKETCHES:
        raise MisfitError(place, value, f"at most {MAX_SKETCHES} sketches")


def _coefficients(value: object, place: str) -> None:
    check = mapping_of(list_of(number)) if isinstance(value, Mapping) else list_of(number)
    check(value, place)


ENTRIES = {
    "network": nullable(check_network_record),
    "parameters": list_of(text),
    "tied": mapping_of(text),
    "statistics": mapping_of(text),
    "data": nullable(_DATA),
    "fitted_images": _sketches,
    "earlier_data": list_of(nullable(_DATA)),
    "trained_on": list_of(text),
    "parents": list_of(table({"digest": text}, {"file": nullable(file_name)})),
    "synthetic": list_of(_ANY_TABLE),
    "kind": text,
    "training": nullable(_ANY_TABLE),
    "history": nullable(list_of(_ANY_TABLE)),
    "early_stopped_at": nullable(_COUNT),
    "epoch": nullable(_COUNT),
    "seed": nullable(_COUNT),
    "versions": nullable(_ANY_TABLE),
    "coefficients": nullable(_coefficients),
    "learned": nullable(_ANY_TABLE),
    "buffers": nullable(_ANY_TABLE),
    "warnings": list_of(text),
    "merge": nullable(table({"method": text}, {"base": nullable(text)})),
    "subspace": nullable(
        table({"shape": text, "position": _COUNT, "run": text}, {"ends": list_of(text)})
    ),
    "adapter": nullable(_ANY_TABLE),
}
"""The check of each known entry; entries with other names are kept and never read."""


def check_entries(record: Mapping[str, object]) -> None:
    """Check the known entries of a record, of a checkpoint or of coefficients.

    Raises:
        MisfitError: Names the first entry that has another type or range.
    """
    for name, check in ENTRIES.items():
        if name in record:
            check(record[name], name)


def check_record(record: Mapping[str, object], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check the provenance record of a file, and that it fits the tensors of the file.

    Args:
        record: The record.
        tensors: The tensors.
        path: The file, for the error.

    Raises:
        CheckpointError: Names the first entry that has another type or range.
    """
    try:
        check_entries(record)
        _check_parameters(record.get("parameters", ()), tensors)
        _check_tied(record.get("tied", {}), tensors)
        _check_statistics(record, tensors)
    except MisfitError as misfit:
        raise CheckpointError(
            f"{path}: record: {misfit}; the file is damaged or was changed by another program: "
            'get it again, or remove its metadata entry "robustsoup" to use the weights alone'
        ) from None


def _check_parameters(parameters: object, tensors: Mapping[str, Tensor]) -> None:
    names = list(parameters) if isinstance(parameters, (list, tuple)) else []
    for position, name in enumerate(names):
        if name not in tensors:
            raise MisfitError(f"parameters[{position}]", name, "the name of a tensor of the file")
    if len(set(names)) < len(names):
        raise MisfitError("parameters", names, "each name once")


def _check_statistics(record: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Check that a running statistic exists, and that what it belongs to is a parameter."""
    statistics, parameters = record.get("statistics", {}), record.get("parameters", ())
    owners = dict(statistics) if isinstance(statistics, Mapping) else {}
    names = set(parameters) if isinstance(parameters, (list, tuple)) else set()
    for name, owner in owners.items():
        if name not in tensors or owner not in names:
            place = f"statistics[{describe_value(name)}]"
            raise MisfitError(place, owner, "the names of a statistic and of a parameter")


def _check_tied(tied: object, tensors: Mapping[str, Tensor]) -> None:
    """Check that both names of a tied tensor exist, and that the second is not an alias itself."""
    names = dict(tied) if isinstance(tied, Mapping) else {}
    for alias, name in names.items():
        place = f"tied[{describe_value(alias)}]"
        if alias not in tensors or name not in tensors or name in names:
            raise MisfitError(place, name, "two names of one tensor of the file")
        if tensors[alias].shape != tensors[name].shape:
            raise MisfitError(place, name, f"a tensor of shape {tuple(tensors[alias].shape)}")

"""Readers and writers of checkpoint files."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustsoup.checkpoints.mapped import map_safetensors
from robustsoup.errors import CheckpointError
from robustsoup.files import atomic_path

RECORD_KEY = "robustsoup"


@dataclass(frozen=True)
class Wrapping:
    """How a foreign file held its state dict: other entries beside it, the key it was under, the prefix of its names."""

    others: dict[str, Any]
    key: str | None
    prefix: str

    def wrap(self, tensors: dict[str, Tensor]) -> Any:
        """The content of a file that the code which wrote the first one can read."""
        state = {self.prefix + name: tensor for name, tensor in tensors.items()}
        return state if self.key is None else {**copy.copy(self.others), self.key: state}


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], record: dict[str, Any]
) -> None:
    """Write tensors and a JSON record to a .safetensors file, whole or not at all."""
    with atomic_path(path) as temporary:
        _save_safetensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            record,
        )


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON record of a .safetensors file. Raises CheckpointError naming the file."""
    return _tensors_and_record(Path(path), _copied)


def _tensors_and_record(
    path: Path, read: Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, metadata = read(path)
        record = json.loads(metadata.get(RECORD_KEY, "{}"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a whole .safetensors file ({error}); was the copy cut short?"
        ) from None
    if not isinstance(record, dict):
        raise CheckpointError(
            f"{path}: its {RECORD_KEY} record is no table; was it written by another program?"
        )
    return tensors, record


def _copied(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return map_safetensors(path)
    except NotImplementedError:  # a type that has no place in a map
        return _copied(path)


def _save_safetensors(tensors: dict[str, Tensor], path: Path, record: dict[str, Any]) -> None:
    try:
        save_file(tensors, path, metadata={RECORD_KEY: json.dumps(record, sort_keys=True)})
    except SafetensorError as error:
        raise OSError(str(error)) from error

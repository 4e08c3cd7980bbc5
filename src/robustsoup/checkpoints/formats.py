"""Read and write checkpoint files: safetensors, and the pickles that users' scripts save."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustsoup.checkpoints.mapped import MappedFile
from robustsoup.checkpoints.safetensors_files import (
    DIGESTS_KEY,
    RECORD_KEY,
    read_safetensors,
    write_safetensors,
)
from robustsoup.documents import parse_json
from robustsoup.errors import CheckpointError
from robustsoup.file_bytes import DamageError
from robustsoup.files import atomic_path, open_regular, write_torch
from robustsoup.paths import user_path
from robustsoup.stamp import is_stamped, stamp_record, unstamp_record
from robustsoup.torch_files import read_torch

PICKLE_ENDINGS = (".pt", ".pth", ".bin")
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict")
_REMOVABLE_PREFIXES = ("module.", "model.", "0.")


@dataclass(frozen=True)
class Wrapping:
    """The structure around the state dict of a pickled file.

    Attributes:
        other_entries: The entries beside the state dict.
        key: The entry that held the state dict; None if the state dict was the whole file.
        prefix: The common prefix that was removed from the names.
    """

    other_entries: dict[str, Any]
    key: str | None
    prefix: str

    def wrap(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the content of a file with this wrapping, so existing loading code can read it."""
        state: dict[str, Any] = {self.prefix + name: tensor for name, tensor in tensors.items()}
        return state if self.key is None else {**copy.copy(self.other_entries), self.key: state}


@dataclass(frozen=True)
class StoredCheckpoint:
    """The parts of a checkpoint file.

    Attributes:
        tensors: name -> tensor on the CPU.
        record: The provenance record; for a pickled file, only its tied tensors.
        wrapping: The wrapping of a pickled file; None for a .safetensors file.
        source: The file, if the tensors are mapped.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    wrapping: Wrapping | None
    source: MappedFile | None


def read_checkpoint(path: Path, *, mapped: bool) -> StoredCheckpoint:
    """Read a .safetensors file, or a pickled one with weights_only=True.

    Args:
        path: The file; every ending but .safetensors is read as a pickle.
        mapped: Whether the tensors stay in the file, as read-only views.

    Raises:
        CheckpointError: The file is missing, cut short, in a newer format, or holds no tensors,
            coefficients, or NaN or infinity.
    """
    try:
        with open_regular(path) as file:
            return _read_open_checkpoint(path, file, mapped=mapped)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = "no such file" if missing else error.strerror or error
        raise CheckpointError(
            f"{path}: {reason}; give a .safetensors, .pt, .pth or .bin checkpoint"
        ) from None


def _read_open_checkpoint(path: Path, file: BufferedReader, *, mapped: bool) -> StoredCheckpoint:
    source = MappedFile.of(path, file.fileno()) if mapped else None
    verified = source is not None and source.verified
    if path.suffix == ".safetensors":
        tensors, record = _read_safetensors_record(path, file, mapped=mapped, verified=verified)
        wrapping = None
        if record.get("kind") in ("coefficients", "dial"):
            raise CheckpointError(
                f"{path}: holds coefficients, not a network; pass it to mix as --coefficients"
            )
    else:
        content = _read_pickle(path, file, mapped=mapped, verified=verified)
        tensors, wrapping = _unwrap_state_dict(content, path)
        record = {"tied": _find_tied_tensors(tensors)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if not verified:
        _check_finite(tensors, path)
    if source is not None:
        source.check_unchanged()
        source.remember_verified()
    return StoredCheckpoint(tensors, record, wrapping, source)


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any], wrapping: Wrapping | None
) -> None:
    """Write a checkpoint file atomically.

    Args:
        path: .safetensors, or .pt, .pth or .bin.
        tensors: name -> tensor.
        record: The provenance record; only .safetensors files hold it.
        wrapping: The wrapping of a pickled file; None writes a plain state dict.

    Raises:
        CheckpointError: The path has another ending, or a tensor holds NaN or infinity; nothing is
            written then.
        StorageError: The file cannot be written.
    """
    refuse_non_finite(tensors, path)
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, record)
    elif path.suffix in PICKLE_ENDINGS:
        write_torch(path, (wrapping or Wrapping({}, None, "")).wrap(tensors))
    else:
        raise CheckpointError(
            f"{path}: got the ending {path.suffix!r}, expected .safetensors, .pt, .pth or .bin"
        )


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: dict[str, Any]
) -> None:
    """Write tensors and a JSON record to a .safetensors file atomically.

    Raises:
        StorageError: The file cannot be written.
    """
    text = json.dumps(stamp_record(record), sort_keys=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write_safetensors(file, tensors, text)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON record of a .safetensors file.

    Raises:
        CheckpointError: The file is missing, cut short, damaged, in a newer format, or holds
            another program's record.
    """
    path = user_path(path)
    try:
        with open_regular(path) as file:
            return _read_safetensors_record(path, file, mapped=False, verified=False)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise CheckpointError(
            f"{path}: {'no such file' if missing else error.strerror or error}"
        ) from None


def _read_safetensors_record(
    path: Path, file: BufferedReader, *, mapped: bool, verified: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        content = read_safetensors(file, mapped=mapped)
        record = parse_json(content.metadata.get(RECORD_KEY, "{}"))
        if not isinstance(record, dict):
            raise CheckpointError(
                f"{path}: the {RECORD_KEY} record is not a JSON object; "
                "was the file written by another program?"
            )
        stamped, record = is_stamped(record), unstamp_record(record, path)
        if stamped and DIGESTS_KEY not in content.metadata:
            raise DamageError("its digests, which every file of robustsoup has, are missing")
        if not verified:
            content.verify()
    except DamageError as error:
        raise _damaged(path, error) from None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a complete .safetensors file ({error}); was the copy cut short?"
        ) from None
    return content.tensors, record


def _read_pickle(path: Path, file: BufferedReader, *, mapped: bool, verified: bool) -> object:
    try:
        return read_torch(file, mapped=mapped, verified=verified)
    except DamageError as error:
        raise _damaged(path, error) from None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint that can be read with weights_only=True: {error}"
        ) from None


def _damaged(path: Path, error: DamageError) -> CheckpointError:
    return CheckpointError(f"{path}: damaged: {error}; restore the file from its source")


def _unwrap_state_dict(content: object, path: Path) -> tuple[dict[str, Tensor], Wrapping]:
    """Find the state dict in a pickled file and remove prefixes that all its names share."""
    key, state = None, _as_state_dict(content)
    other_entries: dict[str, Any] = {}
    if state is None and isinstance(content, Mapping):
        candidates = {name: _as_state_dict(content.get(name)) for name in _WRAPPER_KEYS}
        key = next((name for name in _WRAPPER_KEYS if candidates[name] is not None), None)
        if key is None:
            raise CheckpointError(
                f"{path}: found no state dict; got keys {list(content)[:5]}, "
                f"expected tensors by name, or one of {', '.join(_WRAPPER_KEYS)}"
            )
        state = candidates[key]
        other_entries = {name: value for name, value in content.items() if name != key}
    if state is None:
        raise CheckpointError(
            f"{path}: got a {type(content).__name__}, expected a state dict (tensors by name)"
        )
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is sparse or quantized; expected plain tensors")
    prefix = _common_prefix(state)
    if prefix in state:
        raise CheckpointError(f"{path}: a name is nothing but the prefix {prefix!r}")
    tensors = {name[len(prefix) :]: tensor.detach() for name, tensor in state.items()}
    return tensors, Wrapping(other_entries, key, prefix)


def _as_state_dict(content: object) -> dict[str, Tensor] | None:
    """Return a non-empty mapping of names to tensors as a dict, None for anything else."""
    if not isinstance(content, Mapping) or not content:
        return None
    state = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return state if len(state) == len(content) else None


def _common_prefix(state: dict[str, Tensor]) -> str:
    """Return the longest chain of removable prefixes that starts every name."""
    prefix = ""
    while shared := next(
        (p for p in _REMOVABLE_PREFIXES if all(name.startswith(prefix + p) for name in state)),
        None,
    ):
        prefix += shared
    return prefix


def _find_tied_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return alias -> first name for tensors that are views of the same memory."""
    first_names: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if place in first_names:
            tied[name] = first_names[place]
        else:
            first_names[place] = name
    return tied


def refuse_non_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse to write NaN and infinity.

    Raises:
        CheckpointError: Names the first tensor that holds them.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"{path}: not written: {name} holds NaN or infinity; use ingredients that were "
                "trained with a lower lr, or mix in float32"
            )


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity; this checkpoint is broken"
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no minimum
        tensor = tensor.float()
    # Unlike isfinite, this needs no memory; NaN is the minimum and the maximum of what holds it.
    return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))

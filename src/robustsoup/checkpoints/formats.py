"""Read and write checkpoint files: safetensors, and the pickles that users' scripts save."""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustsoup.checkpoints.mapped import MappedFile
from robustsoup.checkpoints.parameters import find_constants, guess_parameters
from robustsoup.checkpoints.record import check_record
from robustsoup.checkpoints.safetensors_files import (
    DIGESTS_KEY,
    RECORD_KEY,
    SafetensorsContent,
    read_safetensors,
    write_safetensors,
)
from robustsoup.checkpoints.shards import INDEX_ENDING, read_index
from robustsoup.checkpoints.weight_sets import may_be_surplus
from robustsoup.checkpoints.wrapping import (
    PICKLE_ENDINGS,
    Wrapping,
    file_ending,
    unwrap_pickle,
    wrap_safetensors,
)
from robustsoup.documents import parse_json
from robustsoup.errors import CheckpointError
from robustsoup.file_bytes import DamageError
from robustsoup.file_kinds import recognise_file
from robustsoup.files import atomic_path, open_regular, write_torch
from robustsoup.paths import user_path
from robustsoup.stamp import is_stamped, stamp_record, unstamp_record
from robustsoup.torch_files import read_torch

SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class StoredCheckpoint:
    """The parts of a checkpoint file.

    Attributes:
        tensors: name -> tensor on the CPU.
        record: The provenance record; for a pickled file, only its tied tensors.
        wrapping: What is around the tensors in a foreign file; None for a file of robustsoup.
        source: The file, if the tensors are mapped.
        notes: What a reader of the file should know, each in a line.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    wrapping: Wrapping | None
    source: MappedFile | None
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path, *, mapped: bool, key: str | None = None) -> StoredCheckpoint:
    """Read a .safetensors file, a pickled one with weights_only=True, or the index of shards.

    Args:
        path: The file; an ending .index.json names shards, every other ending but .safetensors is
            read as a pickle.
        mapped: Whether the tensors stay in the file, as read-only views; those of shards do not.
        key: Which weights to read, if the file holds several sets; see `choose_weight_set`.

    Raises:
        CheckpointError: The file is missing, cut short, in a newer format, or holds no tensors,
            coefficients, a malformed record, NaN, or infinity outside of constant buffers.
    """
    try:
        if path.name.endswith(INDEX_ENDING):
            return _read_shards(path, key)
        with open_regular(path) as file:
            return _read_open_checkpoint(path, file, mapped=mapped, key=key)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = "no such file" if missing else error.strerror or error
        raise CheckpointError(
            f"{path}: {reason}; give a .safetensors, .pt, .pth or .bin checkpoint"
        ) from None


def _read_open_checkpoint(
    path: Path, file: BufferedReader, *, mapped: bool, key: str | None
) -> StoredCheckpoint:
    source = MappedFile.of(path, file.fileno()) if mapped else None
    verified = source is not None and source.is_verified(key)
    notes: tuple[str, ...] = ()
    if path.suffix == SAFETENSORS:
        content, record = _read_safetensors_record(path, file, mapped=mapped, verified=verified)
        if record.get("kind") in ("coefficients", "dial"):
            raise CheckpointError(
                f"{path}: holds coefficients, not a network; pass it to mix as --coefficients"
            )
        tensors, wrapping = content.tensors, wrap_safetensors(content, key, path)
        tensors = {name: tensors[source_name] for name, source_name in wrapping.names.items()}
    else:
        pickled = _read_pickle(path, file, mapped=mapped, verified=verified)
        tensors, wrapping, notes = unwrap_pickle(pickled, path, key)
        record = {"tied": _find_tied_tensors(tensors)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    check_record(record, tensors, path)
    stored = StoredCheckpoint(tensors, record, wrapping, source, notes)
    if not verified:
        _check_finite(stored, path)
    if source is not None:
        source.check_unchanged()
        source.remember_verified(key)
    return stored


def _read_shards(path: Path, key: str | None) -> StoredCheckpoint:
    """Read all files that an index names, which are beside it."""
    tensors: dict[str, Tensor] = {}
    shards = read_index(path)
    for file, names in shards.items():
        shard = read_checkpoint(path.parent / file, mapped=False)
        held = shard.wrapping.restore_names(shard.tensors) if shard.wrapping else shard.tensors
        for name in names:
            if name not in held:
                raise CheckpointError(
                    f"{path.parent / file}: lacks {name}, which {path.name} names"
                )
            tensors[name] = held[name]
    pickled, wrapping, notes = unwrap_pickle(tensors, path, key)
    wrapping = replace(wrapping, is_safetensors=all(file.endswith(SAFETENSORS) for file in shards))
    return StoredCheckpoint(pickled, {"tied": _find_tied_tensors(pickled)}, wrapping, None, notes)


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any], wrapping: Wrapping | None
) -> None:
    """Write a checkpoint file atomically.

    Args:
        path: .safetensors, or an ending of `PICKLE_ENDINGS`.
        tensors: name -> tensor.
        record: The provenance record; only .safetensors files hold it.
        wrapping: What a foreign file had around its tensors; None writes a plain state dict.

    Raises:
        CheckpointError: The path has another ending, or a tensor holds NaN, or infinity and is no
            constant buffer; nothing is written then.
        StorageError: The file cannot be written.
    """
    ending = file_ending(path)
    if ending is None:
        raise CheckpointError(
            f"{path}: got the ending {path.suffix!r}, expected {SAFETENSORS} or "
            f"{', '.join(PICKLE_ENDINGS)}"
        )
    refuse_non_finite(tensors, path, _find_constants(tensors, record))
    if ending == SAFETENSORS:
        metadata = {} if wrapping is None else wrapping.metadata
        if wrapping is not None and not wrapping.is_safetensors:
            # A network tells its names; without one, any prefix may be part of them.
            wrapping = None if "parameters" in record else wrapping.names_alone()
        if wrapping is not None:
            record = wrapping.rename_record(record)
            tensors = wrapping.restore_names(tensors)
        write_tensors(path, tensors, record, metadata)
        return
    write_torch(path, dict(tensors) if wrapping is None else wrapping.wrap(tensors))


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    record: dict[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and a JSON record to a .safetensors file atomically.

    Args:
        path: The file.
        tensors: name -> tensor.
        record: The record.
        metadata: Further entries of the metadata.

    Raises:
        StorageError: The file cannot be written.
    """
    text = json.dumps(stamp_record(record), sort_keys=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write_safetensors(file, tensors, text, metadata or {})


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON record of a .safetensors file.

    Raises:
        CheckpointError: The file is missing, cut short, damaged, in a newer format, or holds
            another program's record.
    """
    path = user_path(path)
    try:
        with open_regular(path) as file:
            content, record = _read_safetensors_record(path, file, mapped=False, verified=False)
            return content.tensors, record
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise CheckpointError(
            f"{path}: {'no such file' if missing else error.strerror or error}"
        ) from None


def _read_safetensors_record(
    path: Path, file: BufferedReader, *, mapped: bool, verified: bool
) -> tuple[SafetensorsContent, dict[str, Any]]:
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
        if kind := _recognise(file, read_torch):
            raise CheckpointError(f"{path}: is {kind}") from None
        raise CheckpointError(
            f"{path}: not a complete .safetensors file ({error}); was the copy cut short?"
        ) from None
    return content, record


def _read_pickle(path: Path, file: BufferedReader, *, mapped: bool, verified: bool) -> object:
    try:
        return read_torch(file, mapped=mapped, verified=verified)
    except DamageError as error:
        raise _damaged(path, error) from None
    except ValueError as error:
        if kind := _recognise(file, read_safetensors):
            raise CheckpointError(f"{path}: is {kind}") from None
        raise CheckpointError(
            f"{path}: not a checkpoint that can be read with weights_only=True: {error}"
        ) from None


def _recognise(file: BufferedReader, read_other: Callable[..., object]) -> str | None:
    """Return what a file that cannot be read is, and what to do.

    Args:
        file: The file.
        read_other: The reader of the other format.
    """
    if kind := recognise_file(file, os.fstat(file.fileno()).st_size):
        return kind
    with contextlib.suppress(ValueError):
        read_other(file, mapped=True)
        ending = ".pth" if read_other is read_torch else SAFETENSORS
        return f"a {ending} file under another name; rename it"
    return None


def _damaged(path: Path, error: DamageError) -> CheckpointError:
    return CheckpointError(f"{path}: damaged: {error}; restore the file from its source")


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


def _find_constants(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> set[str]:
    """Return the constant buffers of a file by its record, which may name no parameters."""
    tied = record.get("tied", {})
    parameters = record.get("parameters")
    return find_constants(
        tensors, guess_parameters(tensors, tied) if parameters is None else parameters, tied
    )


def refuse_non_finite(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], constants: Collection[str] = ()
) -> None:
    """Refuse to write NaN and infinity.

    Args:
        tensors: name -> tensor.
        path: The file.
        constants: Names of tensors that may hold infinity.

    Raises:
        CheckpointError: Names the first tensor that holds them.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor, or_infinite=name in constants):
            raise CheckpointError(
                f"{path}: not written: {name} holds NaN or infinity; use ingredients that were "
                "trained with a lower lr, or mix in float32"
            )


def _check_finite(stored: StoredCheckpoint, path: Path) -> None:
    """Refuse NaN and infinity, except where a network may show that they are not its own."""
    foreign = stored.wrapping is not None and "parameters" not in stored.record
    weights = {
        name: tensor
        for name, tensor in stored.tensors.items()
        if not (foreign and may_be_surplus(name))
    }
    refuse_broken(weights, path, _find_constants(stored.tensors, stored.record))


def refuse_broken(
    tensors: Mapping[str, Tensor], place: str | os.PathLike[str], constants: Collection[str]
) -> None:
    """Refuse to use tensors that hold NaN or infinity.

    Args:
        tensors: name -> tensor.
        place: What they are of, for the error.
        constants: Names of tensors that may hold infinity.

    Raises:
        CheckpointError: Names the first that does.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor, or_infinite=name in constants):
            raise CheckpointError(
                f"{place}: {name} holds NaN or infinity; this checkpoint is broken"
            )


def is_finite(tensor: Tensor, *, or_infinite: bool = False) -> bool:
    """Return whether no element is NaN, nor infinite unless `or_infinite`."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no minimum
        tensor = tensor.float()
    # Unlike isfinite, this needs no memory; NaN is the minimum and the maximum of what holds it.
    bounds = torch.aminmax(tensor)
    if or_infinite:
        return not bool(bounds.min.isnan())
    return all(bool(bound.isfinite()) for bound in bounds)

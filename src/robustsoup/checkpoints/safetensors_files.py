"""Read and write .safetensors files, with a digest of each tensor and of the whole.

Source: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

import torch
from torch import Tensor

from robustsoup.documents import parse_json
from robustsoup.file_bytes import (
    MAX_TENSORS,
    DamageError,
    FileBytes,
    check_name,
    sha256_of_tensor,
    view_as,
)

RECORD_KEY = "robustsoup"
"""The metadata entry that holds the provenance record, as JSON."""
DIGESTS_KEY = "robustsoup.digests"
"""The metadata entry that holds the digests, as JSON: "tensors" (sha256 of the bytes of each, by
name) and "whole" (sha256 over names, types, shapes, these digests and the text of the record)."""

MAX_HEADER_BYTES = 2**23
_MAX_HEADER_COLONS = 5 * MAX_TENSORS + 100_000
"""Four for each tensor, one for its digest, and those of the record."""
_METADATA = "__metadata__"
_ALIGNMENT = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class SafetensorsContent:
    """The content of a .safetensors file.

    Attributes:
        tensors: name -> tensor on the CPU, in the order of the header.
        metadata: The text entries of the header.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def verify(self) -> None:
        """Compare the tensors and the record with the digests in the metadata, if it has some.

        Raises:
            DamageError: Names the first tensor that differs.
        """
        if DIGESTS_KEY not in self.metadata:
            return
        try:
            stored = parse_json(self.metadata[DIGESTS_KEY])
        except ValueError:
            stored = None
        found = _compute_digests(self.tensors, self.metadata)
        if stored == found:
            return
        by_name = stored.get("tensors") if isinstance(stored, dict) else None
        for name, digest in found["tensors"].items():
            if isinstance(by_name, dict) and by_name.get(name, digest) != digest:
                raise DamageError(f"{name} was changed after the file was written")
        raise DamageError(
            "the names, types, shapes or record were changed after the file was written"
        )


def read_safetensors(file: BufferedReader, *, mapped: bool) -> SafetensorsContent:
    """Read a .safetensors file without comparing its digests.

    Args:
        file: A regular file, opened in binary mode.
        mapped: Whether the tensors are read-only views of the file instead of copies.

    Raises:
        ValueError: The file is incomplete, too large, or not in this format.
    """
    source = FileBytes(file, mapped=mapped)
    if source.size < 8:
        raise ValueError(f"a file of {source.size} bytes")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > min(source.size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length:,} bytes in a file of {source.size:,}")
    text = source.read(8, length)
    if text.count(b":") > _MAX_HEADER_COLONS:  # counting is far quicker than parsing
        raise ValueError(f"more than {MAX_TENSORS:,} tensors, the most that are read")
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("a header that is not a JSON object")
    metadata = _check_metadata(header.pop(_METADATA, {}))
    if len(header) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS:,} tensors, the most that are read")
    places = {check_name(name): _parse_entry(name, entry) for name, entry in header.items()}
    _check_places(places, source.size - 8 - length)
    tensors: dict[str, Tensor] = {}
    for name, place in places.items():
        raw = source.tensor(8 + length + place.begin, place.end - place.begin)
        try:
            tensors[name] = view_as(raw, place.dtype, place.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return SafetensorsContent(tensors, metadata)


def write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    record_text: str,
    other_metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a .safetensors file with its digests; the same content gives the same bytes.

    Args:
        file: A new file, opened in binary mode.
        tensors: name -> tensor. Tied tensors are written once for each name.
        record_text: The record, as JSON.
        other_metadata: Further entries of the metadata. "format" is "pt" if they do not say
            otherwise, since Hugging Face's libraries refuse files without it.

    Raises:
        OSError: The file system refuses, or a tensor has a type that the format cannot hold.
    """
    # Larger types first, as the reference implementation does, so that all data is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in names}
    metadata = {"format": "pt", **(other_metadata or {}), RECORD_KEY: record_text}
    digests = json.dumps(_compute_digests(ordered, metadata), sort_keys=True)
    header: dict[str, Any] = {_METADATA: {**metadata, DIGESTS_KEY: digests}}
    end = 0
    for name, tensor in ordered.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise OSError(f"{name} has the type {tensor.dtype}, which the format cannot hold")
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered.values():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: list[object]
    begin: int
    end: int


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise ValueError("metadata that is not a JSON object")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata that is not text")
    return metadata


def _parse_entry(name: str, entry: Any) -> _Place:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype not in DTYPES:
                raise ValueError(f"{name} has the unknown type {dtype[:20]}")
            if bool not in (type(begin), type(end)) and 0 <= begin <= end:
                return _Place(DTYPES[dtype], shape, begin, end)
    raise ValueError(f"{name} has no valid dtype, shape and data_offsets")


def _check_places(places: Mapping[str, _Place], data_bytes: int) -> None:
    """Check that the tensors fill the data without gaps or overlaps."""
    covered = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != covered:
            raise ValueError(f"{name} begins at byte {place.begin:,}, expected {covered:,}")
        covered = place.end
    if covered != data_bytes:
        raise ValueError(f"tensors of {covered:,} bytes in all, and {data_bytes:,} bytes of data")


def _compute_digests(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the digests of a file as DIGESTS_KEY holds them.

    Metadata beside the record counts in the order of its names, and only if there is some.
    """
    by_name = {name: sha256_of_tensor(tensor) for name, tensor in tensors.items()}
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        described = [name, str(tensor.dtype), list(tensor.shape), by_name[name]]
        whole.update(json.dumps(described).encode() + b"\n")
    whole.update(metadata.get(RECORD_KEY, "").encode())
    others = {key: text for key, text in metadata.items() if key not in (RECORD_KEY, DIGESTS_KEY)}
    if others:
        whole.update(json.dumps(others, sort_keys=True).encode())
    return {"tensors": by_name, "whole": whole.hexdigest()}

"""Write .npz files, and read them within limits and without running any of their code."""

import re
import zlib
from collections.abc import Callable, Collection, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustsoup.archives import MAX_UNPACKED_BYTES, Archive, Member, unpack_member
from robustsoup.file_bytes import DamageError, FileBytes, check_name, view_as
from robustsoup.files import atomic_path

MAX_ARRAYS = 1000
_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 1024
_ALIGNMENT = 16
_HEADER = re.compile(
    r"\{'descr': '([<>|])([a-z]\d)', 'fortran_order': (False|True), "
    r"'shape': \(((?:\d{1,15}, ?)*(?:\d{1,15})?)\), \} *\n"
)
_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}


def write_arrays(path: Path, tensors: Mapping[str, Tensor], *, compressed: bool) -> None:
    """Write tensors on the CPU to an .npz file; an interruption leaves no part of it.

    Compressed arrays are read only up to MAX_UNPACKED_BYTES together; more are not compressed.
    """
    arrays: dict[str, Any] = {
        name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()
    }
    size = sum(array.nbytes + _MAX_HEADER_BYTES for array in arrays.values())
    compressed = compressed and size <= MAX_UNPACKED_BYTES
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


def read_arrays(
    file: BufferedReader,
    *,
    choose: Callable[[Collection[str]], Collection[str]] | None = None,
    max_unpacked: int = MAX_UNPACKED_BYTES,
) -> dict[str, Tensor]:
    """Read the arrays of an .npz file, compressed or not, and compare their CRC-32.

    Args:
        file: A regular file, opened in binary mode.
        choose: Returns the names to read, of the names of all arrays; by default all are read.
        max_unpacked: Most bytes that the compressed arrays of the file may hold together.

    Returns:
        name -> tensor, a copy.

    Raises:
        DamageError: The content of an array is not what was written.
        ValueError: The file is broken or too large, or an array that is read is no array of plain
            numbers.
    """
    source = FileBytes(file, mapped=False)
    archive = Archive(source, unpacks=True, max_unpacked=max_unpacked)
    if len(archive.members) > MAX_ARRAYS:
        raise ValueError(f"{len(archive.members):,} arrays; at most {MAX_ARRAYS:,} are read")
    members = {check_name(name.removesuffix(".npy")): name for name in archive.members}
    arrays: dict[str, Tensor] = {}
    for array in members if choose is None else choose(members):
        name = members[array]
        raw = _read_member(source, archive.members[name])
        try:
            arrays[array] = _parse_array(raw)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return arrays


def _read_member(source: FileBytes, member: Member) -> Tensor:
    if member.packed and member.length:
        return unpack_member(source, member)
    raw = source.tensor(member.begin, member.length)
    if zlib.crc32(raw.numpy().data) != member.crc:
        raise DamageError(f"{member.name} was changed after the file was written")
    return raw


def _parse_array(raw: Tensor) -> Tensor:
    """Return the array of an .npy file.

    Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    start = bytes(raw[:12].numpy())
    version, length = start[6:8], int.from_bytes(start[8:10], "little")
    if not start.startswith(_MAGIC) or version != b"\x01\x00" or length > _MAX_HEADER_BYTES:
        raise ValueError("not an array that numpy.savez wrote")
    begin = 10 + length
    header = _HEADER.fullmatch(bytes(raw[10:begin].numpy()).decode("latin-1"))
    if header is None or header[2] not in _DTYPES:
        raise ValueError("not an array of plain numbers")
    byte_order, dtype, order = header[1], _DTYPES[header[2]], header[3]
    shape = [int(size) for size in header[4].replace(" ", "").split(",") if size]
    data = raw[begin:]
    # An aligned view is as fast as a copy; numpy aligns the data, others need not.
    data = data if begin % _ALIGNMENT == 0 else data.clone()
    if byte_order == ">" and len(data) % dtype.itemsize == 0:
        data = data.view(-1, dtype.itemsize).flip(1).flatten()
    if order == "False":
        return view_as(data, dtype, shape)
    columns_first = view_as(data, dtype, shape[::-1])
    return columns_first.permute(*range(len(shape))[::-1]).contiguous()

"""Map the tensors of a .safetensors file, so that they take no memory of the process."""

import json
import mmap
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustsoup.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class MappedFile:
    """The file behind mapped tensors, with its state when it was opened.

    Attributes:
        path: The file.
        size: bytes.
        modified_ns: Time of the last modification, in nanoseconds.
    """

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "MappedFile":
        """Read the present state of a file."""
        state = path.stat()
        return cls(path, state.st_size, state.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Check that the tensors can be read; reading past the end of a file kills the process.

        Raises:
            CheckpointError: The file is gone, cut short or modified.
        """
        try:
            now = MappedFile.of(self.path)
        except OSError:
            raise CheckpointError(
                f"{self.path}: the file was removed after it was opened; "
                "restore it and run the same command again"
            ) from None
        if now.size < self.size:
            raise CheckpointError(
                f"{self.path}: the file was cut short after it was opened, "
                f"from {self.size:,} to {now.size:,} bytes; "
                "restore the whole file and run the same command again"
            )
        if now != self:
            raise CheckpointError(
                f"{self.path}: the file was changed after it was opened; run the command again"
            )


def map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a .safetensors file.

    Args:
        path: The file; it must not be overwritten in place while the tensors are in use, and
            `MappedFile.check_unchanged` must pass before they are read.

    Returns:
        The tensors as read-only views of the file, and the file's metadata.

    Raises:
        ValueError: The file is incomplete or is not in this format.
        OSError: The file cannot be opened.
        NotImplementedError: A tensor has a type that cannot be mapped.

    Source: https://github.com/huggingface/safetensors#format
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > min(size, _MAX_HEADER_BYTES):
            raise ValueError(f"a header of {start - 8:,} bytes in a file of {size:,}")
        header = json.loads(file.read(start - 8))
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__", {})
    tensors = {name: _tensor_view(view, start, size, entry) for name, entry in header.items()}
    return tensors, metadata


def _tensor_view(view: mmap.mmap, start: int, size: int, entry: dict[str, Any]) -> Tensor:
    """Return the tensor of one header entry; `start` is the offset of the data in the file."""
    dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
    begin, end = (start + offset for offset in entry["data_offsets"])
    if dtype is None:
        raise NotImplementedError(f"tensors of type {entry['dtype']}")
    count = (end - begin) // dtype.itemsize
    if end > size or begin > end or count != torch.Size(shape).numel():
        raise ValueError(f"bytes {begin:,} to {end:,} for shape {shape} in a file of {size:,}")
    if not count:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        # torch warns that the buffer is read-only; nothing writes to it.
        warnings.simplefilter("ignore")
        return torch.frombuffer(view, dtype=dtype, count=count, offset=begin).view(shape)

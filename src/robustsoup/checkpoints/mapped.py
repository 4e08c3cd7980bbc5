"""Tensors that stay in their file: read-only memory maps, whose pages come and go and are not the process's own memory."""

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
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Source:
    """The file that mapped tensors lie in, as it was when it was opened."""

    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "Source":
        """What the file is now."""
        state = os.stat(path)
        return cls(path, state.st_size, state.st_mtime_ns)

    def check(self) -> None:
        """Raise CheckpointError if the file is gone or is not what it was: reading on could end the process."""
        try:
            now = Source.of(self.path)
        except OSError:
            raise CheckpointError(
                f"{self.path}: the file is gone since it was opened; put it back and run the same command again"
            ) from None
        if now.size < self.size:
            raise CheckpointError(
                f"{self.path}: cut short since it was opened, from {self.size:,} to {now.size:,} bytes; "
                "put the whole file back and run the same command again"
            )
        if now != self:
            raise CheckpointError(
                f"{self.path}: the file was changed since it was opened; run the command again"
            )


def map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file as read-only views of it, and its metadata.

    They must not be written to, and `Source.check` must hold when they are read: a file cut short under a map ends the process.

    Raises ValueError or OSError for a file that is not whole, NotImplementedError for a type that cannot be mapped.
    Source: the format, https://github.com/huggingface/safetensors#format
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > min(size, _LARGEST_HEADER):
            raise ValueError(f"a header of {start - 8:,} bytes in a file of {size:,}")
        header = json.loads(file.read(start - 8))
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__", {})
    tensors = {name: _view(view, start, size, entry) for name, entry in header.items()}
    return tensors, metadata


def _view(view: mmap.mmap, start: int, size: int, entry: dict[str, Any]) -> Tensor:
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
        warnings.simplefilter(
            "ignore"
        )  # torch warns that the buffer is read-only; nothing writes to it
        return torch.frombuffer(view, dtype=dtype, count=count, offset=begin).view(shape)

"""Bytes of a file as tensors, copied or mapped, with limits for files of strangers.

Whatever the bytes are, a call here returns or raises ValueError with a short reason.
"""

import hashlib
import math
import mmap
import os
import warnings
from collections.abc import Mapping, Sequence
from io import BufferedReader

import torch
from torch import Tensor

MAX_FILE_BYTES = 16 * 2**30
"""Largest file of tensors that is read."""

MAX_TENSORS = 10_000
"""Most tensors in one file; the largest image classifiers have some hundreds."""

MAX_NAME_LENGTH = 512
"""Longest name of a tensor, in characters."""

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**40
"""Largest product of the dimensions of a tensor that are not 0."""

COPY_BLOCK = 2**26


class DamageError(ValueError):
    """A digest shows that the content of a file is not what was written."""


class FileBytes:
    """The bytes of an open regular file.

    Args:
        file: The file, opened in binary mode.
        mapped: Whether tensors are read-only views of the file instead of copies.

    Raises:
        ValueError: The file is larger than MAX_FILE_BYTES.
    """

    def __init__(self, file: BufferedReader, *, mapped: bool) -> None:
        self.size = os.fstat(file.fileno()).st_size
        if self.size > MAX_FILE_BYTES:
            raise ValueError(
                f"{self.size:,} bytes, and {MAX_FILE_BYTES:,} are the most that are read"
            )
        self.file = file
        self.view: mmap.mmap | None = None
        if mapped and self.size:
            self.view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, begin: int, length: int) -> bytes:
        """Return `length` bytes from `begin` on.

        Raises:
            ValueError: The file ends before.
        """
        self._check_range(begin, length)
        self.file.seek(begin)
        content = self.file.read(length)
        if len(content) < length:
            raise ValueError(f"the file ends within bytes {begin:,} to {begin + length:,}")
        return content

    def tensor(self, begin: int, length: int) -> Tensor:
        """Return `length` bytes from `begin` on as a uint8 tensor of shape (length,).

        Raises:
            ValueError: The file ends before.
        """
        self._check_range(begin, length)
        if not length:
            return torch.empty(0, dtype=torch.uint8)
        if self.view is not None:
            with warnings.catch_warnings():
                # torch warns that the buffer is read-only; nothing writes to it.
                warnings.simplefilter("ignore")
                return torch.frombuffer(self.view, dtype=torch.uint8, count=length, offset=begin)
        self.file.seek(begin)
        copy = torch.empty(length, dtype=torch.uint8)
        target = copy.numpy().data
        done = 0
        while done < length:
            count = self.file.readinto(target[done : done + COPY_BLOCK])
            if not count:
                raise ValueError(f"the file ends within bytes {begin:,} to {begin + length:,}")
            done += count
        return copy

    def _check_range(self, begin: int, length: int) -> None:
        if begin < 0 or length < 0 or begin + length > self.size:
            raise ValueError(
                f"bytes {begin:,} to {begin + length:,} in a file of {self.size:,} bytes"
            )


def sha256_of_tensor(tensor: Tensor) -> str:
    """Return the sha256 (hex) of the bytes of a contiguous tensor on the CPU."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) over names, types, shapes and bytes of tensors, in any order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_shape(shape: Sequence[object]) -> tuple[int, ...]:
    """Return a shape that a file claims as a tuple of integers.

    Raises:
        ValueError: The shape has too many dimensions, or one that is not a number from 0 on, or
            describes more than MAX_ELEMENTS elements.
    """
    sizes = check_numbers(shape)
    if math.prod(max(size, 1) for size in sizes) > MAX_ELEMENTS:
        raise ValueError(f"a shape of more than {MAX_ELEMENTS:,} elements")
    return sizes


def check_numbers(numbers: Sequence[object]) -> tuple[int, ...]:
    """Return one number for each dimension of a tensor, such as its strides, as integers.

    Raises:
        ValueError: There are too many, or one is not a number from 0 to MAX_ELEMENTS.
    """
    if len(numbers) > MAX_DIMENSIONS:
        raise ValueError(
            f"a tensor of {len(numbers)} dimensions; at most {MAX_DIMENSIONS} are read"
        )
    checked: list[int] = []
    for number in numbers:
        if type(number) is not int or not 0 <= number <= MAX_ELEMENTS:
            raise ValueError("a shape that is not a list of numbers from 0 on")
        checked.append(number)
    return tuple(checked)


def view_as(raw: Tensor, dtype: torch.dtype, shape: Sequence[object]) -> Tensor:
    """Return bytes as a tensor of a dtype and shape.

    Args:
        raw: (bytes,) uint8.
        dtype: Type of the elements.
        shape: The shape that the file claims.

    Raises:
        ValueError: The shape is impossible or needs another number of bytes, or a bool is neither
            0 nor 1.
    """
    sizes = check_shape(shape)
    if math.prod(sizes) * dtype.itemsize != len(raw):
        raise ValueError(f"{len(raw):,} bytes for shape {list(sizes)} of {dtype}")
    if dtype == torch.bool:
        check_bools(raw)
    if not len(raw):
        return torch.empty(sizes, dtype=dtype)
    return raw.view(dtype).view(sizes)


def check_bools(raw: Tensor) -> None:
    """Raise ValueError if a byte of stored bools is neither 0 nor 1."""
    if len(raw) and int(raw.max()) > 1:
        raise ValueError("a bool that is neither 0 nor 1")


def check_name(name: object) -> str:
    """Return the name of a tensor.

    Raises:
        ValueError: The name is empty, too long or not text.
    """
    if not isinstance(name, str) or not name or len(name) > MAX_NAME_LENGTH:
        got = f"{len(name):,} characters" if isinstance(name, str) else type(name).__name__
        raise ValueError(f"a name of {got}; expected 1 to {MAX_NAME_LENGTH} characters")
    return name

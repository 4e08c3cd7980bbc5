"""Read files of torch.save that anybody may have written, without running any of their code."""

from io import BufferedReader, BytesIO
from typing import Any

import torch
from torch import Tensor

from robustsoup.archives import ZIP_SIGNATURE, Archive
from robustsoup.file_bytes import MAX_TENSORS, FileBytes, check_bools
from robustsoup.pickles import PickleReader, StorageRequest

MAX_PICKLE_BYTES = 2**26
SLACK_BYTES = 2**20
"""Bytes of tensors that any file may hold, whatever its size."""
MAX_VIEWS = 4
"""Most times that the tensors of a file may use each of its bytes."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_torch(file: BufferedReader, *, mapped: bool = False, verified: bool = False) -> Any:
    """Read a file of torch.save: its zip archive, or its format from before PyTorch 1.6.

    The content of an archive is compared with its digests before anything is read from it.

    Args:
        file: A regular file, opened in binary mode.
        mapped: Whether the tensors of an archive are read-only views of the file.
        verified: Whether the digests of a mapped file were already compared.

    Returns:
        The saved object, with its tensors on the CPU.

    Raises:
        DamageError: A digest shows that the content is not what was written.
        ValueError: The file is broken, too large, or holds what weights_only=True refuses.
    """
    source = FileBytes(file, mapped=mapped)
    if source.read(0, min(len(ZIP_SIGNATURE), source.size)) != ZIP_SIGNATURE:
        return _read_legacy(source)
    archive = Archive(source)
    folder = archive.find_folder("data.pkl")
    contents = {
        name: source.tensor(member.begin, member.length) for name, member in archive.members.items()
    }
    if not (mapped and verified):
        archive.verify(contents)
    order = contents.get(f"{folder}byteorder")
    if order is not None and bytes(order.numpy()) != b"little":
        raise ValueError("numbers that are not little-endian")
    pickle = contents[f"{folder}data.pkl"]
    if len(pickle) > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {len(pickle):,} bytes")

    def find_storage(request: StorageRequest) -> Tensor:
        raw = contents.get(f"{folder}data/{request.key}")
        if raw is None:
            raise ValueError(f"no storage {request.key[:80]!r} in the file")
        _check_storage(raw, request, len(raw))
        return raw

    stream = BytesIO(pickle.numpy().tobytes())
    return PickleReader(stream, find_storage, _tensor_budget(source)).load()


def _tensor_budget(source: FileBytes) -> int:
    return MAX_VIEWS * source.size + SLACK_BYTES


def _check_storage(raw: Tensor, request: StorageRequest, length: int) -> None:
    if request.nbytes != length:
        raise ValueError(
            f"{length:,} bytes for the {request.nbytes:,} of the storage {request.key[:80]!r}"
        )
    if request.dtype == torch.bool:
        check_bools(raw)


class _LegacyStorages:
    """Storages of the old format: the pickle refers to them, and their content follows it."""

    def __init__(self, source: FileBytes) -> None:
        self.source = source
        self.left = source.size
        self.raw: dict[str, Tensor] = {}
        self.requests: dict[str, StorageRequest] = {}

    def find(self, request: StorageRequest) -> Tensor:
        """Return a storage that `fill` will fill."""
        if request.key not in self.raw:
            self.left -= request.nbytes
            if self.left < 0 or len(self.raw) >= 4 * MAX_TENSORS:
                raise ValueError("storages that are larger than the file")
            self.raw[request.key] = torch.empty(request.nbytes, dtype=torch.uint8)
            self.requests[request.key] = request
        return self.raw[request.key]

    def fill(self, keys: object) -> None:
        """Read the content of all storages, in the order of `keys`."""
        if type(keys) is not list or any(type(key) is not str for key in keys):
            raise ValueError("storages without names")
        if sorted(keys) != sorted(self.raw):
            raise ValueError("storages that are not those of the tensors")
        begin = self.source.file.tell()
        for key in keys:
            request = self.requests[key]
            count = int.from_bytes(self.source.read(begin, 8), "little")
            if count != request.count:
                raise ValueError(f"{count:,} numbers for the {request.count:,} of {key!r}")
            content = self.source.tensor(begin + 8, request.nbytes)
            _check_storage(content, request, len(content))
            self.raw[key].copy_(content)
            begin += 8 + request.nbytes
        if begin != self.source.size:
            raise ValueError("something after the last storage")


def _read_legacy(source: FileBytes) -> Any:
    """Read the format from before PyTorch 1.6: five pickles, then the content of each storage."""
    storages = _LegacyStorages(source)
    source.file.seek(0)

    def read_pickle() -> Any:
        return PickleReader(source.file, storages.find, _tensor_budget(source)).load()

    if source.read(0, min(2, source.size)) != b"\x80\x02":
        raise ValueError("neither a zip archive nor a pickle of torch.save")
    source.file.seek(0)
    for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        number = read_pickle()
        if type(number) is not int or number != expected:  # a tensor would compare its elements
            raise ValueError("a pickle that torch.save did not write")
    read_pickle()  # the sizes of C types on the machine that wrote the file
    content = read_pickle()
    storages.fill(read_pickle())
    return content

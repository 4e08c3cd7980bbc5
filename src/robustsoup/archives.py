"""Read zip archives of arrays that anybody may have written, and seal those that robustsoup writes.

torch.save and numpy.savez write zip archives. The seal is one more member, which other readers
ignore: the sha256 of every member, in the format of sha256sum. Whatever the bytes are, reading
returns or raises ValueError with a short reason.
"""

import itertools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustsoup.file_bytes import (
    MAX_NAME_LENGTH,
    MAX_TENSORS,
    DamageError,
    FileBytes,
    sha256_of_tensor,
)

ZIP_SIGNATURE = b"PK\x03\x04"
SEAL = "robustsoup.sha256"
"""Last part of the name of the member that holds the digests."""

MAX_MEMBERS = 4 * MAX_TENSORS
"""Most members: an optimizer stores two or three tensors for each of a network's."""

MAX_UNPACKED_BYTES = 2**26
"""Most bytes that the compressed members of an archive hold together."""

_BLOCK_BYTES = 2**20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_END = struct.Struct("<4s4xHHIIH")
_END_64_LOCATOR = struct.Struct("<4s4xQ4x")
_END_64 = struct.Struct("<4s28xQQQ")
_MAX_ENTRY_BYTES = 46 + 2 * MAX_NAME_LENGTH
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    IndexError,
    NotImplementedError,
    OverflowError,
    ValueError,
    struct.error,
)


@dataclass(frozen=True)
class Member:
    """A member of an archive.

    Attributes:
        name: Its whole name.
        begin: Where its content begins in the file.
        stored: Bytes of its content in the file.
        length: Bytes of its content.
        crc: CRC-32 of its content.
        header: Where its header begins in the file.
        packed: Whether it is compressed.
    """

    name: str
    begin: int
    stored: int
    length: int
    crc: int
    header: int
    packed: bool


class Archive:
    """The members of a zip archive, by name.

    Args:
        source: The file.
        unpacks: Whether compressed members are read; they are refused otherwise.
        max_unpacked: Most bytes that the compressed members may hold together.

    Raises:
        ValueError: The archive is broken, too large, encrypted or ambiguous: a name stands twice,
            or members share bytes.
    """

    def __init__(
        self, source: FileBytes, *, unpacks: bool = False, max_unpacked: int = MAX_UNPACKED_BYTES
    ) -> None:
        self.source = source
        _check_directory_size(source)
        try:
            with zipfile.ZipFile(source.file) as archive:
                entries = archive.infolist()
        except _ZIP_ERRORS as error:
            raise ValueError(f"a broken zip archive: {error}") from None
        members = [_locate(source, entry) for entry in entries]
        self.members = {member.name: member for member in members}
        if len(self.members) < len(members):
            raise ValueError("a zip archive that repeats the name of a member")
        _check_overlap(members)
        packed = [member for member in members if member.packed]
        if packed and not unpacks:
            raise ValueError(
                f"{packed[0].name} is compressed, which torch.save does not do; "
                "load the file with torch.load and save it again"
            )
        unpacked = sum(member.length for member in packed)
        if unpacked > max_unpacked:
            raise ValueError(
                f"compressed members of {unpacked:,} bytes, and {max_unpacked:,} bytes in all are "
                "the most that are unpacked; write the file with numpy.savez, without compression"
            )

    def find_folder(self, name: str) -> str:
        """Return the folder of the only member of that name, with its slash.

        Raises:
            ValueError: No member has the name, or several have it.
        """
        folders = [
            member.removesuffix(name)
            for member in self.members
            if member == name or (member.endswith(f"/{name}") and member.count("/") == 1)
        ]
        if len(folders) != 1:
            raise ValueError(f"a zip archive with {len(folders)} members {name}, expected one")
        return folders[0]

    def verify(self, contents: Mapping[str, Tensor]) -> None:
        """Compare the content of the members with the seal, or with their CRC-32 without one.

        torch.save and numpy.savez write the CRC-32. PyTorch can be told to leave it out, which
        stores 0.

        Args:
            contents: Bytes of each stored member by name, uint8 (length,).

        Raises:
            DamageError: A member differs.
            ValueError: The seal is broken.
        """
        seals = [name for name in contents if name.rpartition("/")[2] == SEAL]
        if seals:
            sealed = _parse_seal(bytes(contents[seals[0]].numpy()))
            found = {name: sha256_of_tensor(raw) for name, raw in contents.items()}
            del found[seals[0]]
            for name in sorted(sealed.keys() | found.keys()):
                if sealed.get(name) != found.get(name):
                    raise DamageError(f"{name} was changed after the file was written")
        elif any(self.members[name].crc for name in contents):
            for name, raw in contents.items():
                if zlib.crc32(raw.numpy().data) != self.members[name].crc:
                    raise DamageError(f"{name} was changed after the file was written")


def seal_archive(path: Path) -> None:
    """Add a seal to an uncompressed archive that was just written.

    Raises:
        OSError: The file cannot be read or written.
    """
    with path.open("rb") as file:
        source = FileBytes(file, mapped=False)
        members = Archive(source).members
        digests = {
            name: sha256_of_tensor(source.tensor(member.begin, member.length))
            for name, member in members.items()
        }
    folder = next(iter(members)).partition("/")[0]
    text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    with zipfile.ZipFile(path, "a") as archive:
        # ZipInfo dates the member 1980, so the same content gives the same bytes.
        archive.writestr(zipfile.ZipInfo(f"{folder}/{SEAL}"), text)


def _parse_seal(text: bytes) -> dict[str, str]:
    lines = text.decode("utf-8").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    if not all(len(pair) == 2 for pair in pairs):
        raise DamageError(f"{SEAL} was changed after the file was written")
    return {name: digest for digest, name in pairs}


def unpack_member(source: FileBytes, member: Member) -> Tensor:
    """Return the content of a compressed member, uint8 (length,).

    Raises:
        DamageError: The content does not have the member's length or CRC-32, or is broken.
    """
    content = torch.empty(member.length, dtype=torch.uint8)
    target, done = content.numpy().data, 0
    try:
        for block in _unpack_blocks(source, member):
            if done + len(block) > member.length:
                raise DamageError(f"{member.name} was changed after the file was written")
            target[done : done + len(block)] = block
            done += len(block)
    except zlib.error as error:
        raise DamageError(f"{member.name} is damaged: {error}") from None
    if done < member.length or zlib.crc32(target) != member.crc:
        raise DamageError(f"{member.name} was changed after the file was written")
    return content


def _unpack_blocks(source: FileBytes, member: Member) -> Iterator[bytes]:
    """Decompress a member in blocks, so that memory holds its content once."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    end = member.begin + member.stored
    for begin in range(member.begin, end, _BLOCK_BYTES):
        packed = source.read(begin, min(_BLOCK_BYTES, end - begin))
        while packed and not unpacker.eof:
            yield unpacker.decompress(packed, _BLOCK_BYTES)
            packed = unpacker.unconsumed_tail
    while block := unpacker.decompress(b"", _BLOCK_BYTES):
        yield block


def _check_directory_size(source: FileBytes) -> None:
    """Refuse an archive of too many members before its directory is read.

    Raises:
        ValueError: There are too many, or the file does not end with an archive's directory.
    """
    if source.size < _END.size:
        raise ValueError("not a zip archive")
    end = source.size - _END.size
    signature, _, entries, size, offset, comment = _END.unpack(source.read(end, _END.size))
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("a zip archive that is cut short or has something after its end")
    if entries == 0xFFFF or 0xFFFFFFFF in (size, offset):
        locator = source.read(end - _END_64_LOCATOR.size, _END_64_LOCATOR.size)
        _, place = _END_64_LOCATOR.unpack(locator)
        _, entries, size, _ = _END_64.unpack(source.read(place, _END_64.size))
    if entries > MAX_MEMBERS or size > entries * _MAX_ENTRY_BYTES:
        raise ValueError(
            f"a zip archive of {entries:,} members and a directory of {size:,} bytes; "
            f"at most {MAX_MEMBERS:,} members are read"
        )


def _locate(source: FileBytes, entry: zipfile.ZipInfo) -> Member:
    """Return where the content of an entry lies, which only its local header tells."""
    name = entry.filename
    if entry.flag_bits & 1:
        raise ValueError(f"{name[:80]} is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name[:80]} is compressed in a way that is not read")
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"a member whose name has {len(name):,} characters")
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        raise ValueError(f"{name[:80]} has two sizes")
    header = source.read(entry.header_offset, _LOCAL_HEADER.size)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if signature != ZIP_SIGNATURE:
        raise ValueError(f"no member where the directory says that {name[:80]} is")
    begin = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if begin + entry.compress_size > source.size:
        raise ValueError(f"{name[:80]} is cut short")
    return Member(
        name,
        begin,
        entry.compress_size,
        entry.file_size,
        entry.CRC,
        entry.header_offset,
        entry.compress_type != zipfile.ZIP_STORED,
    )


def _check_overlap(members: Sequence[Member]) -> None:
    ordered = sorted(members, key=lambda member: member.header)
    for member, following in itertools.pairwise(ordered):
        if member.begin + member.stored > following.header:
            raise ValueError(f"{following.name[:80]} shares bytes with {member.name[:80]}")

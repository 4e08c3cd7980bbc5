"""Build files of torch.save by hand, with content that torch.save never writes."""

import struct
import zipfile

MARK, STOP, REDUCE, TUPLE, STORAGE, NONE = b"(", b".", b"R", b"t", b"Q", b"N"


def name(module, attribute):
    """Return the opcode of a global name."""
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    """Return the opcode of text."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    """Return the opcode of an integer."""
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def group(*parts):
    """Return the opcodes of a tuple."""
    return MARK + b"".join(parts) + TUPLE


def numbers(values):
    """Return the opcodes of a tuple of integers."""
    return group(*(number(value) for value in values))


def storage(count, kind="FloatStorage", key="0"):
    """Return the opcodes of a reference to a storage."""
    parts = (text("storage"), name("torch", kind), text(key), text("cpu"), number(count))
    return group(*parts) + STORAGE


def tensor(size, stride, offset=0, stored=None):
    """Return the opcodes of a tensor in the storage "0", by default of 4 float32."""
    stored = storage(4) if stored is None else stored
    arguments = (stored, number(offset), numbers(size), numbers(stride), b"\x89", b"}")
    return name("torch._utils", "_rebuild_tensor_v2") + group(*arguments) + REDUCE


def table(*pairs):
    """Return the opcodes of a dict."""
    return b"}" + MARK + b"".join(part for pair in pairs for part in pair) + b"u"


def pickle(content):
    """Return a whole pickle."""
    return b"\x80\x02" + content + STOP


def write_archive(path, content, members=None):
    """Write an archive as torch.save does, with a pickle and the storage "0" of 4 float32."""
    members = {"data/0": struct.pack("<4f", 1, 2, 3, 4)} if members is None else members
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, stored in members.items():
            archive.writestr(f"archive/{key}", stored)
    return path


def nest(depth):
    """Return the opcodes of tuples within tuples."""
    return b")" + b"\x85" * depth


def double(depth):
    """Return the opcodes of a tuple of twice the same tuple, and so on: 2^depth leaves."""
    return b")" + b"q\x00h\x00\x86" * depth


def bomb(path, megabytes):
    """Write an archive whose compressed storage becomes far larger than the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        count = megabytes * 2**18
        archive.writestr(
            "archive/data.pkl",
            pickle(table((text("w"), tensor([count], [1], stored=storage(count))))),
        )
        with archive.open("archive/data/0", "w") as member:
            for _ in range(megabytes):
                member.write(bytes(2**20))
    return path


def rename_member(path, old, new):
    """Replace a name in the headers of an archive by one of the same length."""
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    return path


def set_directory_field(path, offset, value, member=-1):
    """Overwrite a field in an archive's directory: 16 CRC, 20 stored size, 24 size, 42 place."""
    content = bytearray(path.read_bytes())
    starts = [n for n in range(len(content)) if content[n : n + 4] == b"PK\x01\x02"]
    struct.pack_into("<I", content, starts[member] + offset, value)
    path.write_bytes(content)
    return path


def claim_members(path, count):
    """Overwrite the number of members at the end of an archive."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<HH", content, len(content) - 14, count, count)
    path.write_bytes(content)
    return path

"""Arrays of .npz files: what numpy.savez writes, and one reason for everything else."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from hostile_pickles import claim_members, set_directory_field

from robustsoup.archives import MAX_UNPACKED_BYTES
from robustsoup.arrays import read_arrays, write_arrays
from robustsoup.file_bytes import DamageError

ARRAYS = {
    "ids": np.arange(7),
    "robust": np.array([True, False]),
    "margin": np.linspace(-1, 1, 5, dtype=np.float32),
    "x": np.arange(24, dtype=np.float64).reshape(2, 3, 4),
    "half": np.ones(3, dtype=np.float16),
    "small": np.arange(3, dtype=np.int8),
    "unsigned": np.arange(3, dtype=np.uint16),
    "blocks": np.arange(500_000) % 1000,
    "none": np.zeros((0, 3), dtype=np.float32),
    "one": np.array(5),
    "columns first": np.asfortranarray(np.arange(24).reshape(2, 3, 4)),
    "big-endian": np.arange(6, dtype=">f4").reshape(2, 3),
    "both": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
}


def read(path):
    with path.open("rb") as file:
        return read_arrays(file)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, **ARRAYS)
    arrays = read(path)
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].numpy().dtype == array.dtype.newbyteorder("=")
        assert arrays[name].is_contiguous()
        assert np.array_equal(arrays[name].numpy(), array)
        assert arrays[name].numpy().shape == array.shape


@pytest.mark.parametrize("size", [MAX_UNPACKED_BYTES // 2, MAX_UNPACKED_BYTES])
def test_arrays_of_any_size_are_read_again(tmp_path, size):
    path = tmp_path / "a.npz"
    write_arrays(path, {"a": torch.zeros(size, dtype=torch.uint8)}, compressed=True)
    assert len(read(path)["a"]) == size
    assert (path.stat().st_size < size) == (size < MAX_UNPACKED_BYTES)


def header(descr="'<f4'", order="False", shape="(4,)"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def array_file(text, data=bytes(16), version=b"\1\0"):
    padded = text + " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(padded)) + padded.encode() + data


def write_member(path, content, packed=False):
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("a.npy", content)
    return path


def pickled_array():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


HOSTILE = {
    "an empty member": (b"", "not an array that numpy.savez wrote"),
    "text": (b"it is not an array\n", "not an array that numpy.savez wrote"),
    "objects": (pickled_array(), "plain numbers"),
    "a record type": (array_file(header("[('a', '<f4')]")), "plain numbers"),
    "text as numbers": (array_file(header("'<U4'")), "plain numbers"),
    "columns of another size": (array_file(header("'>f4'", "True", "(3, 5)")), "16 bytes for"),
    "big-endian, cut": (array_file(header("'>f4'"), bytes(15)), "15 bytes for shape"),
    "a call": (array_file(header(shape="__import__('os').system('true')")), "plain numbers"),
    "deep nesting": (array_file(header(shape="(" * 900)), "plain numbers|numpy.savez"),
    "a negative size": (array_file(header(shape="(-4,)")), "plain numbers"),
    "a size of 10^15": (array_file(header(shape="(999999999999999,)")), "shape"),
    "a long number": (array_file(header(shape=f"({'9' * 500},)")), "plain numbers"),
    "a product beyond 64 bits": (
        array_file(header(shape="(4294967296, 4294967296)")),
        "more than|shape",
    ),
    "40 dimensions": (array_file(header(shape="(" + "1, " * 40 + ")")), "40 dimensions"),
    "too few bytes": (array_file(header(), bytes(15)), "15 bytes for shape"),
    "too many bytes": (array_file(header(), bytes(17)), "17 bytes for shape"),
    "a newer version": (array_file(header(), version=b"\3\0"), "numpy.savez wrote"),
    "a long header": (array_file(header() + " " * 3000), "numpy.savez wrote"),
    "a bool that is 2": (array_file(header("'|b1'"), b"\0\1\2\0"), "neither 0 nor 1"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["stored", "compressed"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_an_array_that_claims_something_else_is_refused(tmp_path, kind, packed):
    content, reason = HOSTILE[kind]
    path = write_member(tmp_path / "a.npz", content, packed)
    with pytest.raises(ValueError, match=reason) as caught:
        read(path)
    assert str(caught.value).startswith("a.npy: ")
    assert str(caught.value).isprintable()


def test_a_header_that_is_not_aligned_is_read(tmp_path):
    text = header() + " \n"
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()
    path = write_member(tmp_path / "a.npz", content + struct.pack("<4f", 1, 2, 3, 4))
    assert read(path)["a"].tolist() == [1, 2, 3, 4]


def damage_compressed(path):
    write_member(path, array_file(header(shape="(400,)"), bytes(range(160)) * 10), packed=True)
    content = bytearray(path.read_bytes())
    content[90] ^= 255
    path.write_bytes(content)


def write_bomb(path):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as member,
    ):
        for _ in range(65):
            member.write(bytes(2**20))


HOSTILE_ARCHIVES = {
    "nothing": (lambda path: path.write_bytes(b""), "not a zip archive"),
    "text": (lambda path: path.write_bytes(b"it is not an archive, " * 9), "cut short"),
    "a bomb": (write_bomb, "67,108,864 bytes in all"),
    "a bomb that claims to be small": (
        lambda path: (write_bomb(path), set_directory_field(path, 24, 144)),
        "changed|damaged",
    ),
    "a member that claims to be large": (
        lambda path: set_directory_field(write_member(path, array_file(header())), 24, 2**30),
        "two sizes",
    ),
    "a wrong CRC": (
        lambda path: set_directory_field(write_member(path, array_file(header())), 16, 5),
        "changed",
    ),
    "damaged compression": (damage_compressed, "changed|damaged"),
    "60,000 members": (
        lambda path: claim_members(write_member(path, array_file(header())), 60_000),
        "60,000 members",
    ),
    "a file that is cut short": (
        lambda path: write_member(path, b"").write_bytes(path.read_bytes()[:-30]),
        "cut short|not a zip",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE_ARCHIVES)
def test_a_hostile_archive_is_refused(tmp_path, kind):
    make, reason = HOSTILE_ARCHIVES[kind]
    make(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=reason) as caught:
        read(tmp_path / "a.npz")
    assert str(caught.value).isprintable()


def test_more_than_1000_arrays_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for number in range(1001):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(ValueError, match="1,001 arrays"):
        read(tmp_path / "a.npz")


def test_a_changed_array_is_damage(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(4))
    content = (tmp_path / "a.npz").read_bytes()
    place = re.search(re.escape(np.ones(4).tobytes()), content).start()
    (tmp_path / "a.npz").write_bytes(content[:place] + b"\1" + content[place + 1 :])
    with pytest.raises(DamageError, match=r"a\.npy was changed after the file was written"):
        read(tmp_path / "a.npz")

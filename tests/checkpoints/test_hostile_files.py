"""Files made to break a reader: one line of CheckpointError, the same from load and open."""

import json
import os
import re
import struct
import zipfile

import hostile_pickles as hostile
import pytest
import torch
from hostile_pickles import group, name, number, numbers, pickle, storage, table, tensor, text

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import CheckpointError
from robustsoup.progress import SavedState
from robustsoup.soups.coefficients import Coefficients, Dial


def check_refused(path):
    """Check that load and open refuse a file with the same line, and return its reason."""
    messages = set()
    for read in (Checkpoint.load, Checkpoint.open):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500
    return message


# .safetensors


def write_safetensors(path, header, data=b"\0" * 16):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def entry(dtype="F32", shape=(4,), places=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(places)}


def entry_text(shape="[4]", places="[0,16]"):
    return f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{places}}}}}'.encode()


HEADERS = {
    "a negative size": ({"w": entry(shape=[-4])}, "shape"),
    "sizes whose product is a small number modulo 2^64": (
        {"w": entry(shape=[2**32, 2**32, 4])},
        "shape",
    ),
    "a huge size and none": ({"v": entry(), "w": entry(shape=[2**62, 0], places=(0, 0))}, "shape"),
    "a product of huge sizes and none": (
        {"v": entry(), "w": entry(shape=[2**39, 2**39, 2**39, 0], places=(0, 0))},
        "shape",
    ),
    "a float as size": ({"w": entry(shape=[4.0])}, "shape"),
    "a bool as size": ({"w": entry(shape=[True, 4])}, "shape"),
    "a text as shape": ({"w": entry() | {"shape": "4"}}, "no valid"),
    "1,000 dimensions": ({"w": entry(shape=[1] * 1000)}, "1000 dimensions"),
    "a negative place": ({"w": entry(places=(-16, 0))}, "no valid"),
    "places out of order": ({"w": entry(places=(16, 0))}, "no valid"),
    "a bool as place": ({"w": entry(places=(False, 16))}, "no valid"),
    "a place after the end": ({"w": entry(places=(16, 32))}, "expected 0"),
    "a huge place": ({"w": entry(places=(2**63, 2**63 + 16))}, "64 bits|expected 0"),
    "three places": ({"w": entry(places=(0, 16, 16))}, "no valid"),
    "overlapping tensors": ({"v": entry(), "w": entry()}, "expected 16"),
    "a gap": ({"v": entry(shape=[1], places=(0, 4)), "w": entry(shape=[2], places=(8, 16))}, "4"),
    "bytes of no tensor": ({"w": entry(shape=[2], places=(0, 8))}, "16 bytes of data"),
    "an unknown type": ({"w": entry(dtype="F128")}, "unknown type F128"),
    "a type that is no text": ({"w": entry() | {"dtype": ["F32"]}}, "no valid"),
    "an unhashable type": ({"w": entry() | {"dtype": {}}}, "no valid"),
    "a long name": ({"w" * 10_000: entry()}, "10,000 characters"),
    "an empty name": ({"": entry()}, "0 characters"),
    "metadata that is a list": ({"__metadata__": [], "w": entry()}, "metadata"),
    "metadata of numbers": ({"__metadata__": {"robustsoup": 5}, "w": entry()}, "metadata"),
    "a record of NaN": ({"__metadata__": {"robustsoup": '{"a":NaN}'}, "w": entry()}, "NaN"),
    "a deep record": (
        {"__metadata__": {"robustsoup": "[" * 100_000}, "w": entry()},
        "nested deeper",
    ),
    "digests that are no JSON": (
        {"__metadata__": {"robustsoup.digests": "["}, "w": entry()},
        "changed",
    ),
    "digests of another type": (
        {"__metadata__": {"robustsoup.digests": '{"tensors":["w"],"whole":1}'}, "w": entry()},
        "changed",
    ),
    "a name that stands twice": (entry_text()[:-1] + b"," + entry_text()[1:], "stands twice"),
    "a long number": (entry_text(shape="[" + "9" * 100_000 + "]"), "100000 digits"),
    "an infinite number": (entry_text(shape="[1e999]"), "not finite"),
    "NaN": (entry_text(shape="[NaN]"), "NaN"),
    "deep nesting": (entry_text(shape="[" * 100_000), "nested deeper"),
    "300,000 tensors": (
        b"{" + b",".join(b'"%d":{}' % n for n in range(300_000)) + b"}",
        "10,000 tensors",
    ),
    "300,000 keys": (
        b"{" + b",".join(b'"%d":0' % n for n in range(300_000)) + b"}",
        "10,000 tensors",
    ),
    "bytes that are not UTF-8": (b'{"\xff":{}}', "decode"),
    "a bool that is 2": ({"w": entry("BOOL", [16])}, "neither 0 nor 1"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused(tmp_path, kind):
    header, reason = HEADERS[kind]
    path = write_safetensors(tmp_path / "a.safetensors", header, b"\2" * 16)
    assert re.search(reason, check_refused(path))
    for load in (Coefficients.load, Dial.load):
        with pytest.raises(CheckpointError, match=r"a\.safetensors: ") as caught:
            load(path)
        assert str(caught.value).isprintable()


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    for length in (9, 2**23 + 1, 2**40, 2**64 - 1):
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        assert "a header of" in check_refused(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_file_of_endless_zeros_is_refused(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.touch()
    os.truncate(path, 2**40)
    assert "are read" in check_refused(path)


# .pth


def archive_of(content):
    return lambda path: hostile.write_archive(path, pickle(table((text("w"), content))))


def whole(content, members=None):
    return lambda path: hostile.write_archive(path, content, members)


def repeat_member(path):
    hostile.write_archive(path, pickle(table((text("w"), tensor([4], [1])))))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", struct.pack("<4f", 9, 9, 9, 9))


def good_archive(path):
    return hostile.write_archive(path, pickle(table((text("w"), tensor([4], [1])))))


def append_bytes(path):
    good_archive(path)
    path.write_bytes(path.read_bytes() + b"more")


HOSTILE_PICKLES = {
    "a negative stride": (archive_of(tensor([4], [-1], 3)), "shape"),
    "a negative offset": (archive_of(tensor([4], [1], -1)), "shape"),
    "an offset after the end": (archive_of(tensor([4], [1], 1)), "does not hold"),
    "a size after the end": (archive_of(tensor([5], [1])), "does not hold"),
    "a stride after the end": (archive_of(tensor([2], [4])), "does not hold"),
    "a huge stride": (archive_of(tensor([2], [2**62])), "shape"),
    "a product beyond 64 bits": (archive_of(tensor([2**32, 2**32], [0, 0])), "elements"),
    "a billion elements of one number": (archive_of(tensor([10**9], [0])), "larger"),
    "a million tensors of one": (
        whole(
            pickle(
                table(
                    (text("0"), tensor([2**19], [0])),
                    (text("1"), tensor([2**19], [0])),
                )
            )
        ),
        "larger",
    ),
    "sizes and strides of other lengths": (archive_of(tensor([4], [1, 1])), "strides"),
    "a float as size": (
        archive_of(
            name("torch._utils", "_rebuild_tensor_v2")
            + group(
                storage(4),
                number(0),
                group(b"G" + struct.pack(">d", 4.0)),
                numbers([1]),
                b"\x89",
                b"}",
            )
            + b"R"
        ),
        "shape",
    ),
    "a storage that is too large": (archive_of(tensor([5], [1], stored=storage(5))), "16 bytes"),
    "a storage that is too small": (archive_of(tensor([3], [1], stored=storage(3))), "16 bytes"),
    "a storage of another type": (
        archive_of(tensor([4], [1], stored=storage(4, "DoubleStorage"))),
        "16 bytes",
    ),
    "a storage of a negative size": (archive_of(tensor([4], [1], stored=storage(-4))), "storage"),
    "a storage that is not there": (
        archive_of(tensor([4], [1], stored=storage(4, key="7"))),
        "no storage '7'",
    ),
    "one storage of two types": (
        whole(
            pickle(
                table(
                    (text("v"), tensor([4], [1])),
                    (text("w"), tensor([4], [1], stored=storage(4, "IntStorage"))),
                )
            )
        ),
        "two types",
    ),
    "a storage outside the archive": (
        archive_of(tensor([4], [1], stored=storage(4, key="../../x"))),
        "no storage",
    ),
    "a quantized storage": (
        archive_of(tensor([4], [1], stored=storage(4, "QInt8Storage"))),
        "quantized",
    ),
    "a bool that is 2": (
        whole(
            pickle(table((text("w"), tensor([4], [1], stored=storage(4, "BoolStorage"))))),
            {"data/0": b"\0\1\2\0"},
        ),
        "neither 0 nor 1",
    ),
    "numbers of the other byte order": (
        whole(
            pickle(table((text("w"), tensor([4], [1])))), {"data/0": bytes(16), "byteorder": b"big"}
        ),
        "little-endian",
    ),
    "a tensor without content": (
        archive_of(
            name("torch._utils", "_rebuild_meta_tensor_no_storage")
            + group(name("torch", "float32"), numbers([4]), numbers([1]), b"\x89")
            + b"R"
        ),
        "_rebuild_meta_tensor_no_storage",
    ),
    "a tensor of any size": (
        archive_of(name("torch", "Tensor") + group(number(10**10)) + b"R"),
        "torch.Tensor",
    ),
    "bytes of any size": (
        archive_of(name("builtins", "bytearray") + group(number(10**10)) + b"R"),
        "broken pickle",
    ),
    "a command": (archive_of(name("os", "system") + group(text("true")) + b"R"), "os.system"),
    "another name of eval": (
        archive_of(name("builtins", "eval") + group(text("1")) + b"R"),
        "builtins.eval",
    ),
    "a call of what a call returned": (
        archive_of(name("torch", "Size") + group(numbers([1])) + b"R" + group() + b"R"),
        "broken pickle",
    ),
    "a name as state dict": (whole(pickle(name("os", "system"))), "expected a state dict"),
    "a deep tuple": (archive_of(hostile.nest(100_000)), "nested deeper"),
    "a tuple of 2^60 leaves": (archive_of(hostile.double(60)), "nested deeper"),
    "a key of 2^30 leaves": (
        whole(pickle(b"}" + hostile.double(30) + number(1) + b"s")),
        "a key of type tuple",
    ),
    "a set of 2^30 leaves": (
        archive_of(
            name("builtins", "set") + group(b"]" + hostile.double(30) + b"a") + b"R",
        ),
        "a key of type tuple",
    ),
    "a key that stands twice": (
        whole(pickle(table((text("w"), tensor([4], [1])), (text("w"), tensor([4], [1]))))),
        "repeats a key",
    ),
    "a long text": (archive_of(b"X" + struct.pack("<I", 2**31)), "2,147,483,648 bytes"),
    "a long number": (archive_of(b"\x8a\xff" + bytes(255)), "an integer of 255 bytes"),
    "the opcode of a longer number": (archive_of(b"\x8b" + bytes(8)), "opcode"),
    "a million operations": (whole(pickle(b"]" + b"N0" * 600_000)), "opcode"),
    "many nothings": (whole(pickle(b"N" * 600_000)), "350,000 operations"),
    "a pickle without an end": (whole(b"\x80\x02}"), "cut short"),
    "an empty pickle": (whole(b""), "cut short"),
    "a mark without a start": (whole(pickle(b"t")), "broken pickle"),
    "what was never stored": (whole(pickle(b"h\x05")), "broken pickle"),
    "attributes of a class": (
        archive_of(
            name("collections", "OrderedDict") + b")R" + table((text("__class__"), b"N")) + b"b"
        ),
        "broken pickle",
    ),
    "a member that stands twice": (repeat_member, "repeats the name"),
    "bytes after the archive": (append_bytes, "after its end"),
    "a member of two sizes": (
        lambda path: hostile.set_directory_field(good_archive(path), 20, 8),
        "two sizes|broken zip",
    ),
    "a member at the place of another": (
        lambda path: hostile.set_directory_field(good_archive(path), 42, 0),
        "shares bytes|broken zip",
    ),
    "a member after the end": (
        lambda path: hostile.set_directory_field(good_archive(path), 42, 2**31 - 1),
        "bytes|broken zip",
    ),
    "a wrong CRC": (
        lambda path: hostile.set_directory_field(good_archive(path), 16, 12345),
        "damaged",
    ),
    "a compressed bomb": (lambda path: hostile.bomb(path, 64), "compressed"),
    "no pickle": (
        lambda path: hostile.rename_member(good_archive(path), "data.pkl", "data.pkx"),
        "zip archive of other files",
    ),
    "50,000 members": (
        lambda path: hostile.claim_members(good_archive(path), 50_000),
        "50,000 members",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE_PICKLES)
def test_a_hostile_archive_is_refused(tmp_path, kind):
    make, reason = HOSTILE_PICKLES[kind]
    path = tmp_path / "a.pth"
    make(path)
    assert re.search(reason, check_refused(path))
    with pytest.raises(CheckpointError, match=r"; delete it (to start again|or choose another)"):
        SavedState(path, "work").load()


def test_the_archives_of_these_tests_are_read_without_their_faults(tmp_path):
    for read in (Checkpoint.load, Checkpoint.open):
        weights = read(good_archive(tmp_path / "a.pth")).tensors["w"]
        assert weights.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_recompressed_archive_is_refused(tmp_path, level):
    torch.save({"w": torch.arange(64.0)}, tmp_path / "plain.pth")
    packed = zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=level)
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, packed as target:
        for member in plain.namelist():
            target.writestr(member, plain.read(member))
    reason = check_refused(tmp_path / "a.pth")
    assert "is compressed, which torch.save does not do; load the file with torch.load" in reason


def test_an_archive_that_was_packed_again_without_compression_is_read(tmp_path):
    torch.save({"w": torch.arange(64.0)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "a.pth", "w") as target,
    ):
        for member in plain.namelist():
            target.writestr(member, plain.read(member))
    for read in (Checkpoint.load, Checkpoint.open):
        assert torch.equal(read(tmp_path / "a.pth").tensors["w"], torch.arange(64.0))


# the format from before PyTorch 1.6


def legacy(keys, *storages, size=4, kind="FloatStorage"):
    """Return a file in the old format whose tensor uses the storage "0"."""
    parts = (text("storage"), name("torch", kind), text("0"), text("cpu"), number(size), b"N")
    stored = group(*parts) + b"Q"
    start = [pickle(number(0x1950A86A20F9469CFC6C)), pickle(number(1001)), pickle(b"}")]
    content = pickle(table((text("w"), tensor([size], [1], stored=stored))))
    listed = pickle(b"](" + b"".join(text(key) for key in keys) + b"e")
    blocks = [struct.pack("<q", count) + data for count, data in storages]
    return b"".join([*start, content, listed, *blocks])


FOUR = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (legacy([]), "storages that are not those"),
        (legacy(["0", "0"], (4, FOUR), (4, FOUR)), "storages that are not those"),
        (legacy(["0", "1"], (4, FOUR), (4, FOUR)), "storages that are not those"),
        (legacy(["0"], (5, FOUR)), "5 numbers for the 4"),
        (legacy(["0"], (-4, FOUR)), "numbers for the 4"),
        (legacy(["0"], (4, FOUR[:-1])), "bytes"),
        (legacy(["0"], (4, FOUR + b"x")), "after the last storage"),
        (legacy(["0"], (2**36, FOUR), size=2**36), "larger than the file"),
        (legacy(["0"], (4, b"\0\1\2\0"), kind="BoolStorage"), "neither 0 nor 1"),
        (pickle(b"}"), "torch.save did not write"),
        (b"\x80\x04\x95", "opcode|cut short|neither"),
    ],
)
def test_a_hostile_file_in_the_old_format_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert re.search(reason, check_refused(path))


def test_the_old_format_of_these_tests_is_read_without_its_faults(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(legacy(["0"], (4, FOUR)))
    for read in (Checkpoint.load, Checkpoint.open):
        assert read(path).tensors["w"].tolist() == [1, 2, 3, 4]


def test_bytes_that_a_few_operations_ask_for_again_and_again_are_refused(tmp_path):
    memoized = hostile.text("a" * 2**20) + b"q\0" + hostile.name("_codecs", "encode") + b"q\1"
    again = b"h\1" + b"(h\0" + hostile.text("latin1") + b"tR"
    path = tmp_path / "a.pth"
    hostile.write_archive(path, hostile.pickle(b"(" + memoized + 300 * again + b"t"))
    assert "objects of more than 268,435,456 bytes" in check_refused(path)


@pytest.mark.parametrize("old", [False, True])
def test_tensors_of_many_large_dimensions_are_read(tmp_path, old):
    weights = {"embedding": torch.ones(1, 1, 1024, 1024), "images": torch.ones(2, 3, 224, 224)}
    torch.save(weights, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    loaded = Checkpoint.load(tmp_path / "a.pth").tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


# what is no file


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices are files on POSIX systems")
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path, ending):
    os.mkfifo(tmp_path / f"fifo{ending}")
    (tmp_path / f"zero{ending}").symlink_to("/dev/zero")
    assert "got a FIFO, expected a regular file" in check_refused(tmp_path / f"fifo{ending}")
    assert "got a device, expected a regular file" in check_refused(tmp_path / f"zero{ending}")
    for load in (Coefficients.load, Dial.load, lambda path: SavedState(path, "x").load()):
        with pytest.raises(CheckpointError, match="got a FIFO, expected a regular file"):
            load(tmp_path / f"fifo{ending}")

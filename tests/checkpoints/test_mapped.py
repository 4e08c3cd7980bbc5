"""Mapped checkpoints: the same tensors, no memory of the process, errors when a file changes."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.mapped import MappedFile
from robustsoup.errors import CheckpointError
from robustsoup.models import load_model

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def check_same_tensors(left, right):
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert tensor.dtype == right.tensors[name].dtype
        assert torch.equal(tensor, right.tensors[name]), name


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_open_and_load_return_the_same(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("mapped") / "a.safetensors"
    tensors = {
        f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    Checkpoint(tensors, {"note": "x"}).save(path)
    opened, loaded = Checkpoint.open(path), Checkpoint.load(path)
    check_same_tensors(opened, loaded)
    assert (opened.provenance, opened.digest, opened.path) == (
        loaded.provenance,
        loaded.digest,
        path,
    )


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".bin"])
def test_every_format_can_be_opened(tmp_path, ending):
    path = Checkpoint.of(load_model("resnet9:width=2")).save(tmp_path / f"net{ending}")
    opened, loaded = Checkpoint.open(path), Checkpoint.load(path)
    check_same_tensors(opened, loaded)
    assert (opened.tied, opened.wrapping) == (loaded.tied, loaded.wrapping)
    assert opened.source == MappedFile.of(path)
    assert loaded.source is None


def test_a_file_from_before_torch_1_6_is_read_into_memory(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"w": torch.arange(5.0)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(Checkpoint.open(path).tensors["w"], torch.arange(5.0))


def test_a_mapped_file_takes_no_memory_of_the_process(tmp_path):
    path = Checkpoint({"w": torch.ones(1 << 20)}).save(tmp_path / "big.safetensors")
    weight = Checkpoint.open(path).tensors["w"]
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [fields[0].split("-") for fields in maps if fields[-1] == str(path)]
    first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    assert any(int(begin, 16) <= first and last <= int(end, 16) for begin, end in ranges)


def test_views_cannot_change_the_file(tmp_path):
    path = Checkpoint({"w": torch.ones(10)}).save(tmp_path / "w.safetensors")
    before = path.read_bytes()
    Checkpoint.open(path).tensors["w"].clone().mul_(3)
    assert path.read_bytes() == before


def write_safetensors(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 20]}},
        {"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
        {"w": {"dtype": "F32"}},
        {"w": 3},
        [],
        b"{",
        b"",
    ],
)
def test_the_error_for_a_broken_header_names_the_file(tmp_path, header):
    path = write_safetensors(tmp_path / "broken.safetensors", header)
    for read in (Checkpoint.open, Checkpoint.load):
        with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
            read(path)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CheckpointError, match=r"long\.safetensors.*cut short"):
        Checkpoint.open(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U16", "C64"])
def test_rare_types_are_read_alike(tmp_path, dtype):
    size = 16 // {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "C64": 8}[dtype]
    entry = {"dtype": dtype, "shape": [size], "data_offsets": [0, 16]}
    path = write_safetensors(tmp_path / "rare.safetensors", {"w": entry})
    check_same_tensors(Checkpoint.open(path), Checkpoint.load(path))
    assert Checkpoint.load(path).tensors["w"].shape == (size,)


def test_an_unknown_type_is_refused_by_name(tmp_path):
    entry = {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}
    path = write_safetensors(tmp_path / "rare.safetensors", {"w": entry})
    for read in (Checkpoint.open, Checkpoint.load):
        with pytest.raises(CheckpointError, match=r"rare\.safetensors.*w has the unknown type F4"):
            read(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_file_cut_short_is_refused_when_it_is_opened(tmp_path, keep):
    path = Checkpoint.of(load_model("resnet9:width=2")).save(tmp_path / "cut.safetensors")
    size = path.stat().st_size
    os.truncate(path, int(keep * size) if isinstance(keep, float) else keep % size)
    with pytest.raises(CheckpointError, match=r"cut\.safetensors.*cut short"):
        Checkpoint.open(path)


def test_a_file_that_changes_after_it_was_opened_is_named(tmp_path):
    path = Checkpoint({"w": torch.ones(10)}).save(tmp_path / "w.safetensors")
    source = Checkpoint.open(path).source
    source.check_unchanged()
    complete_bytes = path.read_bytes()
    path.write_bytes(complete_bytes[:-4])
    with pytest.raises(
        CheckpointError, match=r"w\.safetensors: the file was cut short.*to .* bytes"
    ):
        source.check_unchanged()
    path.write_bytes(complete_bytes + b"x")
    with pytest.raises(CheckpointError, match=r"w\.safetensors: the file was changed"):
        source.check_unchanged()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"w\.safetensors: the file was removed.*restore it"):
        source.check_unchanged()

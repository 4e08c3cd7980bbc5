"""Single-bit flips and truncations of every file of tensors: noticed, or without effect."""

import math

import pytest
import torch
from mutations import cut_short, flip_bits
from safetensors.torch import load_file, save_file
from stored_files import FORMATS, describe, make_checkpoint, save_state

from robustsoup.checkpoints import mapped
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import CheckpointError, CoefficientError
from robustsoup.progress import SavedState


def check_noticed(path, read, copies):
    """Check that damaged copies of a file are refused in one line or hold the same values."""
    expected, noticed = read(path), 0
    for damaged in copies:
        path.write_bytes(damaged)
        try:
            found, message = read(path), ""
        except (CheckpointError, CoefficientError) as error:
            found, message = None, str(error)
        if found is not None:
            assert found == expected
            continue
        noticed += 1
        assert message.startswith(f"{path}: ")
        assert message.isprintable()  # so it is one line
    return noticed


@pytest.mark.parametrize("kind", FORMATS)
def test_single_bit_flips_are_noticed_or_change_nothing(tmp_path, kind):
    save, read = FORMATS[kind]
    path = save(tmp_path)
    count = 150
    noticed = check_noticed(path, read, flip_bits(path.read_bytes(), count))
    assert noticed > count / 2  # padding and unused fields of the formats do not matter


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_short_is_noticed(tmp_path, kind):
    save, read = FORMATS[kind]
    path = save(tmp_path)
    assert check_noticed(path, read, cut_short(path.read_bytes(), 60)) == 60


@pytest.mark.parametrize("kind", ["checkpoint", "coefficients", "dial"])
def test_flips_in_the_header_are_noticed_or_change_nothing(tmp_path, kind):
    save, read = FORMATS[kind]
    path = save(tmp_path)
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    copies = (damaged + whole[size:] for damaged in flip_bits(whole[:size], 300, seed=2))
    assert check_noticed(path, read, copies) > 150


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_the_error_names_the_damage_and_what_to_do(tmp_path, ending):
    path = Checkpoint({"a": torch.ones(8), "b": torch.full((8,), 3.0)}).save(
        tmp_path / f"x{ending}"
    )
    whole = path.read_bytes()
    place = whole.index(torch.full((8,), 3.0).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    part = "b" if ending == ".safetensors" else "archive/data/1"
    for read in (Checkpoint.load, Checkpoint.open):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path}: damaged: {part} was changed after the file was written; "
            "restore the file from its source"
        )


def test_a_changed_record_is_noticed(tmp_path):
    path = Checkpoint({"a": torch.ones(8)}, {"trained_on": ["train"]}).save(
        tmp_path / "a.safetensors"
    )
    path.write_bytes(path.read_bytes().replace(b"train", b"trail"))
    with pytest.raises(CheckpointError, match="names, types, shapes or record were changed"):
        Checkpoint.load(path)


def test_a_damaged_state_says_how_to_go_on(tmp_path):
    path = save_state(tmp_path)
    whole = path.read_bytes()
    place = whole.index(torch.ones(50).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    with pytest.raises(
        CheckpointError, match=r"state\.pt.*was changed.*; delete it to start again"
    ):
        SavedState(path, "work").load()


def test_files_without_digests_are_read(tmp_path):
    """Files of other programs have none."""
    save_file({"a": torch.ones(8)}, tmp_path / "a.safetensors", {"robustsoup": '{"kind": "x"}'})
    assert torch.equal(Checkpoint.load(tmp_path / "a.safetensors").tensors["a"], torch.ones(8))
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(8)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(Checkpoint.open(tmp_path / "a.pth").tensors["a"], torch.ones(8))


def test_a_file_of_robustsoup_whose_digests_are_missing_is_refused(tmp_path):
    path = Checkpoint({"a": torch.ones(8)}).save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes().replace(b"robustsoup.digests", b"robustsoup.digestz"))
    for read in (Checkpoint.load, Checkpoint.open):
        with pytest.raises(CheckpointError, match=r"its digests, .*, are missing"):
            read(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_mapped_file_is_verified_once_while_it_keeps_its_state(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(mapped, "_verified", set())
    monkeypatch.setattr(mapped, "RACY_SECONDS", -1.0)
    path = Checkpoint({"a": torch.ones(8)}).save(tmp_path / f"a{ending}")
    Checkpoint.load(path)
    assert not mapped.MappedFile.of(path).is_verified(None)
    opened = Checkpoint.open(path)
    assert opened.source.is_verified(None)
    copy = tmp_path / f"b{ending}"
    copy.write_bytes(path.read_bytes())
    assert not mapped.MappedFile.of(copy).is_verified(None)
    path.write_bytes(path.read_bytes())
    assert not mapped.MappedFile.of(path).is_verified(None)


def test_each_set_of_weights_of_a_file_is_checked_for_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "_verified", set())
    monkeypatch.setattr(mapped, "RACY_SECONDS", -1.0)
    weights, broken = {"a": torch.ones(8)}, {"a": torch.full((8,), math.nan)}
    torch.save({"model": weights, "model_ema": broken}, path := tmp_path / "a.pth")
    assert torch.equal(Checkpoint.open(path, key="model").tensors["a"], torch.ones(8))
    with pytest.raises(CheckpointError, match="a holds NaN"):
        Checkpoint.open(path, key="model_ema")


def test_a_file_that_may_change_within_a_tick_of_its_clock_is_verified_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "RACY_SECONDS", 1e6)
    path = Checkpoint({"a": torch.ones(8)}).save(tmp_path / "a.safetensors")
    assert not Checkpoint.open(path).source.is_verified(None)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for ending in (".safetensors", ".pth"):
        first, second = (make_checkpoint().save(tmp_path / f"{n}{ending}") for n in "ab")
        assert first.read_bytes() == second.read_bytes()


def test_other_programs_read_what_robustsoup_writes(tmp_path):
    checkpoint = make_checkpoint()
    loaded = load_file(checkpoint.save(tmp_path / "a.safetensors"))
    assert loaded.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(loaded[name], checkpoint.tensors[name]) for name in loaded)
    path = checkpoint.save(tmp_path / "a.pth")
    for mmap in (False, True):
        content = torch.load(path, weights_only=True, mmap=mmap)
        assert describe(content) == describe(dict(checkpoint.tensors))

"""Shards of webdataset in local .tar files."""

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from robustsoup.data import load_data, shards
from robustsoup.data.shards import group_files
from robustsoup.errors import DataError


@pytest.fixture
def webdataset():
    import webdataset

    return webdataset


def encode(shade, size=8):
    written = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 0, 0)).save(written, "png")
    return written.getvalue()


def write_shard(path, numbers, *, label=lambda n: {"cls": str(n % 2).encode()}, image=encode):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for ending, content in ({"png": image(number)} | label(number)).items():
                member = tarfile.TarInfo(f"{number:06}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def check_samples(split):
    assert torch.equal(split.images[:, 0, 3, 3].long(), split.ids)
    assert torch.equal(split.labels, split.ids % 2)


@pytest.mark.extras
@pytest.mark.parametrize("pattern", ["part-{000..001}.tar", "part-*.tar", ""])
def test_a_pattern_or_a_folder_of_shards(webdataset, tmp_path, pattern):
    write_shard(tmp_path / "part-000.tar", range(15))
    write_shard(tmp_path / "part-001.tar", range(15, 40))
    data = load_data(f"wds:{tmp_path / pattern}")
    assert [len(data.train), len(data.val), len(data.test)] == [28, 4, 8]
    check_samples(data.train)
    check_samples(data.test)


@pytest.mark.extras
def test_members_that_macos_adds_are_left_out(webdataset, tmp_path):
    write_shard(tmp_path / "a.tar", range(40))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name in ("._000000.png", "some/folder/._000001.cls"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    data = load_data(f"wds:{tmp_path / 'a.tar'}")
    assert [len(data.train), len(data.val), len(data.test)] == [28, 4, 8]


@pytest.mark.extras
def test_splits_by_the_names_of_the_files(webdataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def in_json(number):
        return {"json": json.dumps({"label": number % 2, "text": "x"}).encode()}

    write_shard(tmp_path / "s" / "train-0.tar", range(16), label=in_json)
    write_shard(tmp_path / "s" / "val-0.tar", range(4))
    data = load_data("wds:~/s", image_size=4)
    assert [len(data.train), len(data.val), len(data.test)] == [14, 2, 4]
    assert data.train.images.shape[1:] == (3, 4, 4)
    check_samples(data.test)
    assert "val is test" in data.notes[0]


def group(*names):
    groups, notes = group_files([Path(name) for name in names], "wds:x")
    return {part: [file.name for file in files] for part, files in groups.items()}, notes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("imagenet-train-0.tar", "imagenet-val-0.tar"), ["train", "val"]),
        (("Train-0.tar", "Test-0.tar"), ["train", "test"]),
        (("trainset000.tar", "valid_0.tar", "testing.tar"), ["train", "val", "test"]),
        (("test-run-train-0.tar", "test-run-test-0.tar"), ["train", "test"]),
    ],
)
def test_a_split_is_a_word_of_the_name(names, expected):
    assert group(*names) == ({part: [n] for part, n in zip(expected, names, strict=True)}, [])


def test_folders_name_the_splits_of_files_that_do_not():
    assert group("s/train/0.tar", "s/val/0.tar", "s/val/1.tar") == (
        {"train": ["0.tar"], "val": ["0.tar", "1.tar"]},
        [],
    )
    assert group("test/train-0.tar", "test/test-0.tar")[0].keys() == {"train", "test"}
    for names in (("test/0.tar", "test/1.tar"), ("train/0.tar", "more/1.tar")):
        assert group(*names) == ({"train": [Path(name).name for name in names]}, [])
    with pytest.raises(DataError, match=r"\(train/0\.tar, val/0\.tar\) beside .* \(more/0\.tar\)"):
        group("train/0.tar", "val/0.tar", "more/0.tar")


@pytest.mark.extras
def test_a_folder_may_have_brackets_in_its_name(webdataset, tmp_path):
    write_shard(tmp_path / "set[1]" / "a.tar", range(40))
    assert len(load_data(f"wds:{tmp_path / 'set[1]'}").train) == 28


def test_files_whose_names_name_no_split_to_train_on():
    assert group("trainer-0.tar", "value-0.tar")[1] == []
    groups, notes = group("val-0.tar", "val-1.tar")
    assert groups == {"train": ["val-0.tar", "val-1.tar"]}
    assert notes == ["no file names train; those of val are split anew"]


def test_files_of_which_only_some_name_a_split_are_refused():
    with pytest.raises(
        DataError, match=r"\(train-0\.tar, test-0\.tar\) beside .* \(extra-0\.tar\)"
    ):
        group("train-0.tar", "test-0.tar", "extra-0.tar")


@pytest.mark.parametrize(
    ("endings", "chosen"),
    [
        (["depth.png", "seg.png", "jpg", "cls"], "jpg"),
        (["cls", "image.png"], "image.png"),
        (["jpg", "depth.png", "txt"], "jpg"),
    ],
)
def test_maps_beside_the_image_of_a_sample_are_left_out(endings, chosen):
    sample = {"__key__": "000"} | {ending: ending.encode() for ending in endings}
    assert shards._find_image(sample, "wds:x: sample 000") == chosen.encode()


@pytest.mark.parametrize("endings", [["jpg", "png"], ["left.png", "right.png"]])
def test_a_sample_of_several_images_is_refused(endings):
    sample = {"__key__": "000", "cls": b"0"} | dict.fromkeys(endings, b"")
    with pytest.raises(DataError, match=r"got several images, \.(jpg, \.|left\.).*, expected one"):
        shards._find_image(sample, "wds:x: sample 000")


@pytest.mark.extras
def test_only_images_and_labels_are_read_and_none_too_large(webdataset, tmp_path, monkeypatch):
    def label(number):
        return {"cls": b"0", "bin": bytes(5000)}

    write_shard(tmp_path / "a.tar", range(10), label=label)
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 1000)
    assert len(load_data(f"wds:{tmp_path}").test) == 2
    write_shard(tmp_path / "a.tar", range(10), image=lambda number: bytes(1001))
    with pytest.raises(
        DataError, match=r"000000\.png: got 1,001 bytes, expected at most 1,000; re"
    ):
        load_data(f"wds:{tmp_path}")


@pytest.mark.extras
@pytest.mark.parametrize("pattern", ["{0..999999999}.tar", "{0..999}/{000..999}.tar"])
def test_a_pattern_of_too_many_files_is_refused_before_it_is_expanded(webdataset, pattern):
    with pytest.raises(
        DataError, match=r"a pattern of more than 100,000 files; shorten its ranges"
    ):
        load_data(f"wds:{pattern}")


@pytest.mark.extras
def test_a_compressed_archive_is_refused_before_it_is_unpacked(webdataset, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        member = tarfile.TarInfo("0.bin")
        member.size = 10**6
        tar.addfile(member, io.BytesIO(bytes(10**6)))
    with pytest.raises(DataError, match=r"not a readable \.tar file: .*; expected one that is not"):
        load_data(f"wds:{tmp_path}")


@pytest.mark.extras
def test_16_bits_that_hold_fewer_are_doubted(webdataset, tmp_path):
    def image(number):
        written = io.BytesIO()
        Image.fromarray(numpy.full((8, 8), 4095, numpy.uint16)).save(written, "png")
        return written.getvalue()

    write_shard(tmp_path / "a.tar", range(10), image=image)
    data = load_data(f"wds:{tmp_path}")
    assert "hold 12 bits in 16" in data.notes[0]
    assert data.test.notes == data.notes


@pytest.mark.extras
def test_nothing_is_unpickled_and_no_command_runs(webdataset, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    def label(number):
        return {"cls": b"0", "pyd": pickle.dumps(Evil()), "pickle": pickle.dumps(Evil())}

    write_shard(tmp_path / "a.tar", range(10), label=label)
    assert len(load_data(f"wds:{tmp_path / 'a.tar'}").test) == 2
    for place in (f"pipe:touch {tmp_path / 'ran'}", "https://localhost:9/a.tar"):
        with pytest.raises(DataError, match=r"no such file, expected local \.tar files"):
            load_data(f"wds:{place}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.extras
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"label": lambda n: {}}, "sample 000000: no label; got .png, expected the number"),
        ({"label": lambda n: {"cls": b"cat"}}, "sample 000000: no label; got .png, .cls, expected"),
        ({"label": lambda n: {"json": b'{"x": 1}'}}, "sample 000000: no label"),
        (
            {"label": lambda n: {"cls": b"9" * 25}},
            "got label a number of 84 bits, expected 0 to 99",
        ),
        ({"label": lambda n: {"cls": b"100000"}}, "sample 000000: got label 100000, expected 0 to"),
        ({"image": lambda n: b"no image"}, "sample 000000: cannot be read (not one of BMP"),
        ({"image": lambda n: encode(0, 8 + n)}, "an image of 9 x 9 pixels, expected square"),
    ],
)
def test_a_broken_sample_is_named(webdataset, tmp_path, options, text):
    write_shard(tmp_path / "a.tar", range(4), **options)
    with pytest.raises(DataError) as caught:
        load_data(f"wds:{tmp_path / 'a.tar'}")
    assert text in str(caught.value)


@pytest.mark.extras
def test_broken_files_are_refused_in_one_line(webdataset, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=r"a\.tar: not a readable \.tar file: "):
        load_data(f"wds:{tmp_path}")


def test_a_missing_library_is_named_with_its_install_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(DataError, match=r"install it with: pip install 'robustsoup\[webdataset\]'"):
        load_data(f"wds:{tmp_path}")

"""Data: what is loaded, how it is split, how batches follow from seeds, and what each bad input is told."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markers import needs_cifar10
from PIL import Image
from web_server import files_below, serving

from robustsoup.data import (
    DATASETS,
    Augmentation,
    Split,
    augment,
    batches,
    fetch_cifar10,
    load_data,
    to_float,
)
from robustsoup.data import cifar as cifar_file
from robustsoup.data.folders import load_folder
from robustsoup.data.splits import Samples, channel_statistics, content_digest, hold_out
from robustsoup.errors import DataError, StorageError
from robustsoup.seeding import keyed_generator

CROP_AND_FLIP = Augmentation(pad=2, flip=True)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where decoded image folders are kept, on Linux; not in tmp_path, which is itself an image folder in some tests."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "robustsoup" / "folders"


def small_split(n=50, augmentation=CROP_AND_FLIP):
    images = torch.randint(
        0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=keyed_generator("test")
    )
    record = {"name": "small", "classes": ["a", "b"]}
    return Split(images, torch.arange(n) % 2, torch.arange(n) + 100, "train", record, augmentation)


def all_ids(*splits):
    return torch.cat([split.ids for split in splits]).sort().values


def same_batches(left, right):
    left, right = list(left), list(right)
    pairs = [zip(a, b, strict=True) for a, b in zip(left, right, strict=True)]
    return all(torch.equal(a, b) for pair in pairs for a, b in pair)


# digits


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    data = load_data("digits")
    for split in (data.train, data.val, data.test):
        expected = numpy.round(theirs.images[split.ids.numpy()] * 255 / 16).astype(numpy.uint8)
        assert numpy.array_equal(split.images[:, 0].numpy(), expected)
        assert numpy.array_equal(split.labels.numpy(), theirs.target[split.ids.numpy()])


def test_digits_shapes_and_record():
    data = load_data("digits", seed=3)
    assert [len(data.train), len(data.val), len(data.test)] == [1000, 297, 500]
    assert data.train.images.shape == (1000, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.is_contiguous()
    assert data.train.labels.dtype == data.train.ids.dtype == torch.int64
    assert data.train.augmentation == Augmentation()
    record = json.loads(json.dumps(data.record))
    assert record == data.record == data.train.record == data.val.record == data.test.record
    assert (record["name"], record["seed"], record["val"]) == ("digits", 3, 297)
    assert (record["channels"], record["size"], data.test.classes) == (1, [8, 8], 10)
    pool = to_float(torch.cat([data.train.images, data.val.images])).double()
    assert record["mean"] == pytest.approx([pool.mean().item()], abs=1e-5)
    assert record["std"] == pytest.approx([pool.std(correction=0).item()], abs=1e-5)


def test_digits_splits_are_disjoint_and_complete():
    data = load_data("digits")
    assert torch.equal(all_ids(data.train, data.val, data.test), torch.arange(1797))


def test_seed_moves_val_and_leaves_test():
    zero, again, one = load_data("digits"), load_data("digits", seed=0), load_data("digits", seed=1)
    assert zero.record == again.record
    assert torch.equal(zero.train.images, again.train.images)
    assert zero.record["digest"] == one.record["digest"]
    assert zero.record["split_digest"] != one.record["split_digest"]
    assert not torch.equal(all_ids(zero.val), all_ids(one.val))
    assert torch.equal(zero.test.images, one.test.images)
    assert torch.equal(zero.test.ids, one.test.ids)
    assert (zero.record["mean"], zero.record["std"]) == (one.record["mean"], one.record["std"])


def test_a_stored_digest_still_describes_the_embedded_digits():
    expected = "ac2213023a1dd19f8222ec82825f32c3504d17957813b2fdf14736bb5f12f150"
    assert load_data("digits").record["digest"] == expected


def test_every_digits_split_starts_with_a_mix_of_classes():
    data = load_data("digits")
    for split in (data.train, data.val, data.test):
        assert len(split.first(100).labels.unique()) == 10


# splits


def test_first():
    split = small_split()
    assert split.first(None) is split
    assert torch.equal(split.first(7).ids, split.ids[:7])
    assert len(split.first(50)) == 50
    with pytest.raises(DataError, match="small train: requested 51 samples, expected 1 to 50"):
        split.first(51)
    with pytest.raises(DataError, match="requested 0 samples"):
        split.first(0)


def test_to_moves_every_tensor():
    moved = small_split().to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.ids.device.type} == {"meta"}


def test_split_by_name():
    data = load_data("digits")
    assert data.split("val") is data.val
    with pytest.raises(
        DataError, match='digits: no split "validation"; expected train, val or test'
    ):
        data.split("validation")


def test_statistics_of_a_constant_channel_stay_above_zero():
    mean, std = channel_statistics(torch.full((4, 1, 3, 3), 51, dtype=torch.uint8))
    assert mean == (0.2,)
    assert std == (1 / 255,)


def test_statistics_and_digest_are_those_of_everything_at_once():
    """They are computed in chunks; 1000 images are several."""
    images = torch.randint(
        0, 256, (1000, 3, 5, 4), dtype=torch.uint8, generator=keyed_generator("all")
    )
    labels = torch.arange(1000) % 7
    whole = hashlib.sha256(b"(1000, 3, 5, 4)" + images.numpy().tobytes() + labels.numpy().tobytes())
    assert content_digest(Samples(images, labels, torch.arange(1000))) == whole.hexdigest()
    values = (images.double() / 255).transpose(0, 1).flatten(1)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx(values.mean(1).tolist(), abs=1e-6)
    assert std == pytest.approx(values.std(1, correction=0).tolist(), abs=1e-6)


# specs


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("digitz", {}),
            'data "digitz": unknown; expected one of digits, cifar10, folder:PATH; did you mean "digits"?',
        ),
        (("zzz", {}), 'data "zzz": unknown; expected one of digits, cifar10, folder:PATH'),
        (("", {}), 'data "": unknown'),
        (("folder:", {}), 'data "folder:": got no path, expected folder:PATH'),
        (("digits:7", {}), 'data "digits:7": got "7" after the name, expected "digits" alone'),
        (("digits", {"seed": -1}), "got seed -1, expected a whole number >= 0"),
        (("digits", {"seed": True}), "got seed True"),
        (("digits", {"seed": 1.0}), "got seed 1.0"),
        (("digits", {"image_size": 32}), "got image_size 32, which only folder:PATH takes"),
    ],
)
def test_wrong_request(arguments, text):
    spec, options = arguments
    with pytest.raises(DataError) as caught:
        load_data(spec, **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_known_data_set_is_named_to_who_misspells_one():
    with pytest.raises(DataError) as caught:
        load_data("?")
    assert all(name in str(caught.value) for name in DATASETS)


# batches


def test_to_float_is_exact():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(images)
    assert floats.dtype == torch.float32
    assert floats.min() == 0
    assert floats.max() == 1
    assert torch.equal((floats * 255).round().to(torch.uint8), images)
    assert images.dtype == torch.uint8


def slow_augment(images, augmentation, generator):
    """One image at a time, by assignment into a black canvas."""
    n, channels, height, width = images.shape
    pad = augmentation.pad
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    done = torch.empty_like(images)
    for i in range(n):
        canvas = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=torch.uint8)
        canvas[:, pad : pad + height, pad : pad + width] = images[i]
        crop = canvas[:, top[i] : top[i] + height, left[i] : left[i] + width]
        done[i] = crop.flip(2) if augmentation.flip and mirrored[i] else crop
    return done


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    channels=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    pad=st.integers(0, 4),
    flip=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_augment_is_the_slow_reference(n, channels, height, width, pad, flip, seed):
    images = torch.randint(
        0, 256, (n, channels, height, width), dtype=torch.uint8, generator=keyed_generator(seed)
    )
    before = images.clone()
    augmentation = Augmentation(pad, flip)
    fast = augment(images, augmentation, keyed_generator("a", seed))
    assert torch.equal(fast, slow_augment(images, augmentation, keyed_generator("a", seed)))
    assert fast.dtype == torch.uint8
    assert fast.is_contiguous()
    assert torch.equal(images, before)


def test_augment_reaches_every_crop_and_both_sides():
    images = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(2000, 1, 3, 3)
    seen = augment(images, Augmentation(pad=1, flip=True), keyed_generator(0))
    assert len(seen.flatten(1).unique(dim=0)) == 3 * 3 * 2


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 45),
    skip=st.integers(0, 45),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_skip_gives_the_rest_bit_for_bit(n, batch_size, skip, epoch, shuffle, drop_last):
    split = small_split(n)
    options = {"seed": 5, "epoch": epoch, "shuffle": shuffle, "drop_last": drop_last}
    whole = list(batches(split, batch_size, **options))
    assert same_batches(batches(split, batch_size, **options, skip=skip), whole[skip:])
    ids = torch.cat([ids for _, _, ids in whole])
    assert len(ids.unique()) == len(ids)
    assert len(whole) >= 1
    sizes = {len(ids) for _, _, ids in whole}
    if drop_last:
        assert sizes == {min(batch_size, n)}
        assert len(whole) == max(1, n // batch_size)
    else:
        assert len(ids) == n


def test_batches_carry_their_own_samples():
    split = small_split(augmentation=Augmentation())
    for images, labels, ids in batches(split, 8, seed=0, epoch=0):
        rows = ids - 100
        assert images.dtype == torch.float32
        assert torch.equal(images, to_float(split.images[rows]))
        assert torch.equal(labels, split.labels[rows])


def test_plain_batches_are_the_split_in_order():
    split = small_split()
    parts = list(
        batches(split, 16, seed=0, epoch=0, augmented=False, shuffle=False, drop_last=False)
    )
    assert torch.equal(torch.cat([images for images, _, _ in parts]), to_float(split.images))
    assert torch.equal(torch.cat([ids for _, _, ids in parts]), split.ids)


def test_seed_and_epoch_change_order_and_augmentation():
    split = small_split()
    first = list(batches(split, 10, seed=0, epoch=0))
    assert same_batches(batches(split, 10, seed=0, epoch=0), first)
    for seed, epoch in ((0, 1), (1, 0)):
        assert not torch.equal(next(batches(split, 10, seed=seed, epoch=epoch))[2], first[0][2])
        fixed = {"seed": seed, "epoch": epoch, "shuffle": False}
        moved, still = (
            next(batches(split, 10, **fixed)),
            next(batches(split, 10, seed=0, epoch=0, shuffle=False)),
        )
        assert torch.equal(moved[2], still[2])
        assert not torch.equal(moved[0], still[0])


def test_batches_of_one_epoch_are_augmented_differently():
    split = small_split()
    alike = dataclasses.replace(split, images=split.images[:1].expand(50, -1, -1, -1).contiguous())
    first, second, *_ = batches(alike, 10, seed=0, epoch=0)
    assert not torch.equal(first[0], second[0])


def test_global_random_state_is_neither_read_nor_moved():
    split = small_split()
    torch.manual_seed(1)
    first = list(batches(split, 10, seed=0, epoch=0))
    state = torch.get_rng_state()
    assert same_batches(batches(split, 10, seed=0, epoch=0), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_batches_are_refused_at_the_call():
    with pytest.raises(DataError, match="small train: got batch_size 0, expected 1 or more"):
        batches(small_split(), 0, seed=0, epoch=0)
    with pytest.raises(DataError, match="got skip -1"):
        batches(small_split(), 4, seed=0, epoch=0, skip=-1)


# folders


def write_images(folder, count, size=(10, 10), suffix="png", colour=(10, 20, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shade = tuple((value + number) % 256 for value in colour)
        Image.new("RGB", size, shade).save(folder / f"{number:03}.{suffix}")


def test_unsplit_folder(tmp_path):
    write_images(tmp_path / "cat", 30)
    write_images(tmp_path / "ant", 20, colour=(200, 0, 0), suffix="bmp")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._000.png").write_text("left by another system")
    (tmp_path / ".hidden").mkdir()
    data = load_data(f"folder:{tmp_path}", image_size=16)
    assert [len(data.train), len(data.val), len(data.test)] == [35, 5, 10]
    assert data.record["classes"] == ["ant", "cat"]
    assert data.record["size"] == [16, 16]
    assert data.train.augmentation == Augmentation(pad=2, flip=True)
    assert torch.equal(all_ids(data.train, data.val, data.test), torch.arange(50))
    for split in (data.train, data.val, data.test):
        assert split.images.is_contiguous()
        assert split.images.shape[1:] == (3, 16, 16)
        assert torch.equal(split.labels, (split.ids >= 20).long())
        number = split.ids - 20 * split.labels
        assert torch.equal(
            split.images[:, 0, 5, 5].long(), torch.where(split.labels == 1, 10, 200) + number
        )
    other = load_data(f"folder:{tmp_path}", seed=1, image_size=16)
    assert torch.equal(other.test.ids, data.test.ids)
    assert other.record["digest"] == data.record["digest"]
    assert other.record["split_digest"] != data.record["split_digest"]
    assert (other.record["mean"], other.record["std"]) == (data.record["mean"], data.record["std"])


def test_split_folder_without_val(tmp_path):
    for part, count in (("train", 40), ("test", 12)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count)
    data = load_data(f"folder:{tmp_path}")
    assert [len(data.train), len(data.val), len(data.test)] == [70, 10, 24]
    assert torch.equal(all_ids(data.train, data.val), torch.arange(80))
    assert torch.equal(all_ids(data.test), torch.arange(24))
    assert data.record["size"] == [32, 32]
    assert len(data.test.first(12).labels.unique()) == 2
    assert torch.equal(load_data(f"folder:{tmp_path}", seed=9).test.ids, data.test.ids)


def test_split_folder_with_val(tmp_path):
    for part, count in (("train", 5), ("val", 3), ("test", 2)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count)
    data, other = (load_data(f"folder:{tmp_path}", seed=seed) for seed in (0, 1))
    assert torch.equal(all_ids(data.train), torch.arange(10))
    assert torch.equal(all_ids(data.val), torch.arange(10, 16))
    assert data.record["split_digest"] == other.record["split_digest"]


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "tram", 10)
    assert load_data(f"folder:{tmp_path}").record["classes"] == ["train", "tram"]


def test_digest_follows_the_pixels(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 10)
    before = load_data(f"folder:{tmp_path}").record["digest"]
    Image.new("RGB", (10, 10), (255, 255, 255)).save(tmp_path / "b" / "004.png")
    assert load_data(f"folder:{tmp_path}").record["digest"] != before


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_images_are_cropped_at_the_centre(tmp_path, size):
    """The middle square is white, all else black; half a pixel of blur at its edge is what resizing costs."""
    for name in ("a", "b"):
        write_images(tmp_path / name, 5)
        image = Image.new("L", size, 0)
        image.paste(
            255,
            ((size[0] - 20) // 2, (size[1] - 20) // 2, (size[0] + 20) // 2, (size[1] + 20) // 2),
        )
        for number in range(5):
            image.save(tmp_path / name / f"{number:03}.png")
    images = load_data(f"folder:{tmp_path}", image_size=10).train.images
    assert images.shape[1:] == (3, 10, 10)
    assert (images[:, :, 1:-1, 1:-1] == 255).all()
    assert (images > 150).all()


def prepare(tmp_path, case):
    if case == "file":
        (tmp_path / "data").write_text("")
    elif case == "empty":
        (tmp_path / "data").mkdir()
    elif case != "missing":
        write_images(tmp_path / "data" / "a", 10)
    if case in ("class without images", "broken", "cut short", "classes differ", "too few"):
        write_images(tmp_path / "data" / "b", 10)
    if case == "class without images":
        (tmp_path / "data" / "c").mkdir()
    if case == "broken":
        (tmp_path / "data" / "b" / "003.png").write_text("not a picture")
    if case == "cut short":
        file = tmp_path / "data" / "b" / "003.png"
        Image.effect_noise((64, 64), 50).save(file)
        file.write_bytes(file.read_bytes()[:1000])
    if case == "too few":
        shutil.rmtree(tmp_path / "data")
        for name in ("a", "b"):
            write_images(tmp_path / "data" / name, 1)
    if case == "classes differ":
        whole = tmp_path / "data"
        for part in ("train", "test"):
            shutil.copytree(whole / "a", whole / part / "a")
            shutil.copytree(whole / "b", whole / part / ("b" if part == "train" else "B"))
    if case == "no test":
        for name in ("a", "b"):
            write_images(tmp_path / "data" / "train" / name, 3)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("case", "place", "text"),
    [
        ("missing", "", "got nothing, expected a folder with one folder a class; check the path"),
        ("file", "", "got a file, expected a folder with one folder a class; check the path"),
        (
            "empty",
            "",
            "got 0 class folders, expected two or more folders of images, one a class; put each class",
        ),
        ("one class", "", "got 1 class folders, expected two or more folders of images"),
        (
            "class without images",
            "c",
            "got no images, expected .bmp, .jpeg, .jpg, .png, .webp; add some or remove",
        ),
        (
            "broken",
            "b/003.png",
            "cannot be read (not an image), expected an image; replace or remove it",
        ),
        ("cut short", "b/003.png", "cannot be read ("),
        (
            "too few",
            "",
            "got 0 images to train on after val and test were taken, expected 1 or more",
        ),
        (
            "classes differ",
            "test",
            "got classes B, a, expected those of train, a, b (only in one: B, b); make",
        ),
        (
            "no test",
            "test",
            "got nothing there, expected two or more folders of images, one a class; add it",
        ),
    ],
)
def test_wrong_folder(tmp_path, case, place, text):
    data = prepare(tmp_path, case)
    with pytest.raises(DataError) as caught:
        load_data(f"folder:{data}")
    message = str(caught.value)
    assert message.startswith(f"{data / place}: ")
    assert text in message
    assert "\n" not in message


def test_wrong_image_size(tmp_path):
    with pytest.raises(
        DataError, match="got image_size 0, expected a whole number of pixels above 0"
    ):
        load_data(f"folder:{tmp_path}", image_size=0)


# folders, decoded once

LAYOUTS = {
    "whole": {"a": 9, "b": 12, "c": 7},
    "split": {"train/a": 9, "train/b": 12, "test/a": 4, "test/b": 3},
    "split with val": {
        "train/a": 9,
        "train/b": 12,
        "val/a": 2,
        "val/b": 3,
        "test/a": 4,
        "test/b": 3,
    },
}


def write_noise(root, layout, seed=0):
    """Noise of several sizes, in colour and grey, as PNG."""
    random = numpy.random.default_rng(seed)
    for name, count in layout.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            shape = (int(random.integers(5, 40)), int(random.integers(5, 40)))
            pixels = random.integers(
                0, 256, shape if number == 2 else (*shape, 3), dtype=numpy.uint8
            )
            Image.fromarray(pixels).save(root / name / f"{number:03}.png")


def decode_plainly(root, size):
    """Samples of PATH/CLASS/* in sorted order, all at once."""
    images, labels = [], []
    for label, folder in enumerate(sorted(root.iterdir())):
        for file in sorted(folder.iterdir()):
            image = Image.open(file).convert("RGB")
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            pixels = numpy.array(image.resize((width, height), Image.Resampling.BILINEAR))
            top, left = (height - size) // 2, (width - size) // 2
            images.append(
                torch.from_numpy(pixels[top : top + size, left : left + size]).permute(2, 0, 1)
            )
            labels.append(label)
    return Samples(torch.stack(images), torch.tensor(labels), torch.arange(len(labels)))


def split_plainly(root, size, seed):
    """(train, val, test, pool) by the rules that load_folder states."""
    if not (root / "train").is_dir():
        samples = decode_plainly(root, size)
        pool, test = (
            samples.take(rows) for rows in hold_out(len(samples), len(samples) // 5, "folder test")
        )
        return *(pool.take(rows) for rows in hold_out(len(pool), len(pool) // 8, seed)), test, pool
    train, test = decode_plainly(root / "train", size), decode_plainly(root / "test", size)
    test = test.take(hold_out(len(test), 0, "folder order")[0])
    if not (root / "val").is_dir():
        return (
            *(train.take(rows) for rows in hold_out(len(train), len(train) // 8, seed)),
            test,
            train,
        )
    val, n = decode_plainly(root / "val", size), len(train)
    pool = Samples(
        torch.cat([train.images, val.images]),
        torch.cat([train.labels, val.labels]),
        torch.arange(n + 5),
    )
    rows = hold_out(n, 0, "folder order")[0], n + hold_out(5, 0, "folder order")[0]
    return *(pool.take(chosen) for chosen in rows), test, pool


def same_data(left, right):
    assert left.record == right.record
    for name in ("train", "val", "test"):
        one, other = left.split(name), right.split(name)
        assert one.digest == other.digest
        assert all(
            torch.equal(getattr(one, key), getattr(other, key))
            for key in ("images", "labels", "ids")
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 5])
def test_a_folder_is_what_plain_decoding_makes_of_it(tmp_path, layout, seed):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS[layout])
    *expected, pool = split_plainly(root, 12, seed)
    told = []
    first = load_folder(str(root), seed, 12, on_progress=lambda *told_now: told.append(told_now))
    again = load_folder(str(root), seed, 12, on_progress=lambda *told_now: told.append(told_now))
    total = sum(LAYOUTS[layout].values())
    assert told == [(number, total, "images decoded") for number in range(1, total + 1)]
    for data in (first, again):
        for name, samples in zip(("train", "val", "test"), expected, strict=True):
            split = data.split(name)
            assert torch.equal(split.images, samples.images)
            assert torch.equal(split.labels, samples.labels)
            assert torch.equal(split.ids, samples.ids)
            assert split.images.is_contiguous()
            assert split.labels.dtype == split.ids.dtype == torch.int64
        assert data.record["digest"] == content_digest(pool, expected[2])
        assert (data.record["mean"], data.record["std"]) == tuple(
            map(list, channel_statistics(pool.images))
        )
    same_data(first, again)


def spoil(file):
    """Make the file unreadable, leaving its size and time as they are."""
    times = file.stat()
    file.write_bytes(bytes(times.st_size))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_an_unchanged_folder_is_not_decoded_again(tmp_path, cache):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS["split with val"])
    first = load_folder(str(root), 0)
    file = root / "val" / "b" / "001.png"
    spoil(file)
    same_data(load_folder(str(root), 0), first)
    assert load_folder(str(root), 1).record["split_digest"] == first.record["split_digest"]
    assert len(list(cache.iterdir())) == 1
    os.utime(file, (1, 1))
    with pytest.raises(DataError, match="cannot be read"):
        load_folder(str(root), 0)
    assert len(list(cache.iterdir())) == 1


def test_spellings_of_one_folder_share_what_was_decoded(tmp_path, cache, monkeypatch):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for spelling in (tmp_path / "data", "data", "./data/", "link"):
        load_folder(str(spelling), 0)
    assert len(list(cache.iterdir())) == 1


def test_folders_that_differ_in_pixels_alone_are_not_confused(tmp_path):
    """As unpacked from two archives without times: names, sizes and times are the same."""
    for place, colour in (("one", (1, 2, 3)), ("two", (90, 80, 70))):
        for name in ("a", "b"):
            write_images(tmp_path / place / name, 8, suffix="bmp", colour=colour)
        for file in (tmp_path / place).rglob("*.bmp"):
            os.utime(file, (0, 0))
    one, two = (load_folder(str(tmp_path / place), 0).record["digest"] for place in ("one", "two"))
    assert one != two


def test_writing_to_images_stays_in_this_process(tmp_path):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    changed, expected = (load_folder(str(tmp_path / "data"), 0) for _ in range(2))
    before = expected.train.images.clone()
    changed.train.images.zero_()
    assert torch.equal(expected.train.images, before)
    assert torch.equal(load_folder(str(tmp_path / "data"), 0).train.images, before)


@pytest.mark.parametrize(
    "damage", ["cut short", "wrong shape", "no record", "broken record", "other record", "empty"]
)
def test_damaged_files_are_decoded_again(tmp_path, cache, damage):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    expected = load_folder(str(tmp_path / "data"), 0)
    (place,) = cache.iterdir()
    # Replaced rather than written to: `expected` still looks at the old ones.
    content = (place / "train.npy").read_bytes()
    (place / "train.npy").unlink()
    if damage == "cut short":
        (place / "train.npy").write_bytes(content[:-1])
    elif damage == "wrong shape":
        numpy.save(place / "train.npy", numpy.zeros((2, 3, 32, 32), dtype=numpy.uint8))
    elif damage == "empty":
        (place / "train.npy").write_bytes(b"")
    else:
        (place / "train.npy").write_bytes(content)
        (place / "about.json").unlink()
    if damage in ("broken record", "other record"):
        (place / "about.json").write_text("{" if damage == "broken record" else "[]")
    same_data(load_folder(str(tmp_path / "data"), 0), expected)
    assert list(cache.iterdir()) == [place]


def run_script(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


LOAD_AND_DIE = """
import os, sys
from robustsoup.data.folders import load_folder
load_folder(sys.argv[1], 0, on_progress=lambda done, total, figures: done == 5 and os._exit(9))
"""


def test_a_killed_load_leaves_nothing_that_looks_whole(tmp_path, cache):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS["whole"])
    assert run_script(LOAD_AND_DIE, root).returncode == 9
    (leftover,) = cache.iterdir()
    assert leftover.name.endswith(".tmp")
    *expected, _ = split_plainly(root, 32, 0)
    assert torch.equal(load_folder(str(root), 0).train.images, expected[0].images)
    assert leftover.is_dir()
    long_ago = time.time() - 25 * 3600
    for path in (*leftover.iterdir(), leftover):
        os.utime(path, (long_ago, long_ago))
    load_folder(str(root), 1)
    assert len(list(cache.iterdir())) == 2
    assert not leftover.exists()


LOAD_AND_TELL = """
import sys
from robustsoup.data.folders import load_folder
print(load_folder(sys.argv[1], 0).test.images.sum().item())
"""


def test_processes_that_decode_at_once_agree(tmp_path, cache):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS["whole"])
    command = [sys.executable, "-c", LOAD_AND_TELL, str(root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert told == [f"{load_folder(str(root), 0).test.images.sum().item()}\n"] * 2
    assert len(list(cache.iterdir())) == 1


def test_who_loses_the_race_uses_the_winners_files(tmp_path, cache):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS["whole"])
    winners = []

    def race(done, total, figures):
        if done == total:
            winners.append(load_folder(str(root), 0))

    same_data(load_folder(str(root), 0, on_progress=race), winners[0])
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_what_only_looks_like_an_image_is_named(tmp_path, cache, kind):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    odd = tmp_path / "data" / "a" / "x.png"
    odd.mkdir() if kind == "folder" else odd.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError) as caught:
        load_folder(str(tmp_path / "data"), 0)
    assert str(caught.value).startswith(f"{odd}: cannot be read (")
    assert not list(cache.iterdir())


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError) as caught:
        load_folder(str(tmp_path / "data"), 0)
    assert str(caught.value) == (
        f"{tmp_path / 'file' / 'robustsoup' / 'folders'}: decoded images cannot be kept there: Not a directory; "
        "free space there, permit writing, or set XDG_CACHE_HOME to another folder"
    )


def test_too_little_space_is_told_before_decoding(tmp_path, cache):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    with pytest.raises(
        StorageError, match=r"GB free, needed 3360\.00 GB; free space there"
    ) as caught:
        load_folder(str(tmp_path / "data"), 0, image_size=200_000)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


LOAD_ON_A_FULL_DISK = """
import resource, sys
from robustsoup.data.folders import load_folder
from robustsoup.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    load_folder(sys.argv[1], 0)
except StorageError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_a_disk_that_fills_up(tmp_path, cache):
    """A limit on the size of files stands in for the disk: both refuse a write half-way through."""
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    done = run_script(LOAD_ON_A_FULL_DISK, tmp_path / "data")
    assert done.stdout.startswith(
        f"{cache}: decoded images cannot be kept there: File too large; free space there"
    )
    assert not list(cache.iterdir())


MEASURE_MEMORY = """
import sys
from robustsoup.data.batches import batches
from robustsoup.data.folders import load_folder

def anonymous():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024

def use(root):
    seen = [anonymous()]
    data = load_folder(root, 0, 96, on_progress=lambda done, total, figures: seen.append(anonymous()))
    for split in (data.train, data.val, data.test):
        for images, labels, ids in batches(split, 8, seed=0, epoch=0):
            images.sum()
    seen.append(anonymous())
    return data, max(seen) - seen[0]

warm, small, large = sys.argv[1:]
kept = [use(root) for root in (warm, small, large, small, large)]
print(*(growth for _, growth in kept[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_folder(tmp_path):
    """The most memory that no file backs, while 16 and 63 MiB of images are decoded and used, and then used again."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=numpy.uint8)
    roots = [tmp_path / name for name in ("warm", "small", "large")]
    for root, count in zip(roots, (30, 300, 1200), strict=True):
        for name in ("a", "b"):
            (root / name).mkdir(parents=True)
            Image.fromarray(pixels).save(root / name / "0000.png")
            for number in range(1, count):
                shutil.copy(root / name / "0000.png", root / name / f"{number:04}.png")
    done = run_script(MEASURE_MEMORY, *roots)
    assert done.returncode == 0, done.stderr
    small, large, small_again, large_again = map(float, done.stdout.split())
    assert large - small < 12
    assert large_again - small_again < 12


# CIFAR-10: the download, against a server on this machine

FILES = {"data_batch_1": b"one" * 2000, "test_batch": bytes(range(256)) * 20}
FILE_MD5 = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}


def make_archive(files, extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in [
            *((f"cifar-10-batches-py/{name}", content) for name, content in files.items()),
            *extra,
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def fetch(root, url, body, **options):
    return fetch_cifar10(
        root, url=url, archive_md5=hashlib.md5(body).hexdigest(), file_md5=FILE_MD5, **options
    )


UNPACKED = ["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"]


def test_download_happens_once_and_unpacks_only_what_is_expected(tmp_path):
    body = make_archive(FILES, extra=[("../evil", b"x"), ("cifar-10-batches-py/other", b"y")])
    root, progress = tmp_path / "root", []
    with serving(body) as (url, requests):
        folder = fetch(
            root, url, body, on_progress=lambda done, total: progress.append((done, total))
        )
        assert fetch(root, url, body) == folder == root / "cifar-10-batches-py"
    assert len(requests) == 1
    assert progress[-1] == (len(body), len(body))
    assert files_below(tmp_path) == [f"root/{name}" for name in UNPACKED]
    assert all((folder / name).read_bytes() == content for name, content in FILES.items())


def test_a_missing_file_is_fetched_again(tmp_path):
    body = make_archive(FILES)
    with serving(body) as (url, requests):
        folder = fetch(tmp_path, url, body)
        (folder / "test_batch").unlink()
        fetch(tmp_path, url, body)
    assert len(requests) == 2
    assert files_below(tmp_path) == UNPACKED


def test_an_archive_put_there_by_hand_is_used_and_kept(tmp_path):
    body = make_archive(FILES)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(body)
    fetch(tmp_path, "http://127.0.0.1:9/refused", body)
    assert files_below(tmp_path) == sorted([*UNPACKED, "cifar-10-python.tar.gz"])


def test_the_environment_names_the_root(tmp_path, monkeypatch):
    body = make_archive(FILES)
    monkeypatch.setenv("ROBUSTSOUP_DATA", str(tmp_path / "named"))
    with serving(body) as (url, _):
        assert fetch(None, url, body) == tmp_path / "named" / "cifar-10-batches-py"
    monkeypatch.setenv("ROBUSTSOUP_DATA", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cifar_file.data_root() == cifar_file.cache_folder() / "data"


@pytest.mark.parametrize(
    ("served", "text"),
    [
        ({"body": make_archive({**FILES, "more": b""})}, "wrong content: got md5 "),
        (
            {"body": b"<!DOCTYPE html><p>log in", "kind": "text/html"},
            "got text/html starting b'<!DOCTYPE html>', exp",
        ),
        ({"body": make_archive(FILES)[:100], "announced": 9000}, "cut short"),
        ({"body": b""}, "got 0 bytes, expected a gzip archive"),
        (
            {"body": b"busy", "status": 503},
            "the server answered 503 Service Unavailable, expected 200",
        ),
        ({"body": b"gone", "status": 404}, "the server answered 404 Not Found"),
    ],
)
def test_a_bad_download_is_refused_and_leaves_nothing(tmp_path, served, text):
    with serving(**served) as (url, _), pytest.raises(DataError) as caught:
        fetch(tmp_path, url, make_archive(FILES))
    message = str(caught.value)
    assert message.startswith(f"{url}: ")
    assert text in message
    assert "again" in message
    assert "\n" not in message
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/refused", "no url"])
def test_no_server(tmp_path, url):
    with pytest.raises(
        DataError, match=f"{url}: cannot be downloaded .*; try again, or put cifar-10-python.tar.gz"
    ):
        fetch(tmp_path, url, b"")
    assert files_below(tmp_path) == []


def test_an_archive_with_a_wrong_or_missing_file_is_refused(tmp_path):
    wrong, short = (
        make_archive({**FILES, "test_batch": b"other"}),
        make_archive({"data_batch_1": b"one" * 2000}),
    )
    with (
        serving(wrong) as (url, _),
        pytest.raises(DataError, match="test_batch: wrong content: got md5"),
    ):
        fetch(tmp_path / "wrong", url, wrong)
    with (
        serving(short) as (url, _),
        pytest.raises(DataError, match="no file cifar-10-batches-py/test_batch in it"),
    ):
        fetch(tmp_path / "short", url, short)
    assert not (tmp_path / "wrong" / "cifar-10-batches-py" / "test_batch").exists()


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match="file: got a file, expected a folder to keep data in; name another root"
    ):
        load_data("cifar10", root=tmp_path / "file")


class Bomb:
    """Pickled, it creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_wrong_file_is_named_and_never_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in cifar_file.FILE_MD5:
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(DataError) as caught:
        load_data("cifar10", root=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'data_batch_1'}: wrong content: got md5 ")
    assert "expected c99cafc152244af753f735de768cd75f; delete it and load again" in message
    assert not (tmp_path / "exploded").exists()


@needs_cifar10
def test_a_truncated_file_is_named(tmp_path):
    real = cifar_file.data_root() / "cifar-10-batches-py"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in cifar_file.FILE_MD5:
        (folder / name).symlink_to(real / name)
    (folder / "data_batch_3").unlink()
    (folder / "data_batch_3").write_bytes((real / "data_batch_3").read_bytes()[:-1])
    with pytest.raises(
        DataError,
        match=r"data_batch_3: wrong content: got md5 .*expected 54ebc095f3ab1f0389bbae665268c",
    ):
        load_data("cifar10", root=tmp_path)


@needs_cifar10
def test_cifar10():
    data, other = load_data("cifar10"), load_data("cifar10", seed=1)
    assert [len(data.train), len(data.val), len(data.test)] == [45000, 5000, 10000]
    assert data.train.images.shape == (45000, 3, 32, 32)
    assert data.train.images.is_contiguous()
    assert torch.equal(all_ids(data.train, data.val), torch.arange(50000))
    assert torch.equal(data.test.ids, torch.arange(10000))
    assert torch.equal(other.test.images, data.test.images)
    assert data.record["split_digest"] != other.record["split_digest"]
    assert torch.cat([data.train.labels, data.val.labels]).bincount().tolist() == [5000] * 10
    assert data.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    mean, std = channel_statistics(torch.cat([data.train.images, data.val.images]))
    assert data.record["mean"] == pytest.approx(mean, abs=1e-3)
    assert data.record["std"] == pytest.approx(std, abs=1e-3)

"""Duplicates between the splits of a data set, and of its images in generated ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import run
from digits import digits_network
from PIL import Image

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import find_leakage
from robustsoup.data import Data, Split, Synthetic, load_data
from robustsoup.data.duplicates import Overlap, find_copies, find_exact_overlaps, find_overlaps

SIZES = {"train": 60, "val": 20, "test": 30}


def smooth_images(n, seed, size=32):
    """Colour images with large structures, all different."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 5, 5, generator=generator)
    large = torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1)
    return (255 * large).round().to(torch.uint8)


def make_data(size=32, **images):
    """Return data of the record of digits, with these images in place of random ones."""
    record = {**load_data("digits").record, "digest": str(sorted(images)), "split_digest": "s"}
    splits = {}
    for number, (name, n) in enumerate(SIZES.items()):
        content = images.get(name, smooth_images(n, number, size))
        ids = torch.arange(len(content)) + 1000 * number
        splits[name] = Split(content, torch.zeros(len(content)).long(), ids, name, record)
    return Data("x", splits["train"], splits["val"], splits["test"], record)


def with_copies(split, other, count, change=lambda images: images):
    """Return random images of a split, of which the first `count` are changed ones of another."""
    names = list(SIZES)
    images = smooth_images(SIZES[split], names.index(split))
    source = smooth_images(SIZES[other], names.index(other))
    images[:count] = change(source[5 : 5 + count])
    return {split: images}


def brighten(images):
    return (0.7 * images.float() + 60).round().clamp(0, 255).to(torch.uint8)


def add_noise(images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images.float() + 4 * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("split", "other"), [("test", "train"), ("test", "val"), ("val", "train")])
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("near", [False, True])
def test_exact_duplicates_are_counted_by_pair_of_splits(split, other, count, near):
    data = make_data(**with_copies(split, other, count))
    expected = Overlap(split, other, SIZES[split], count, count if near else None)
    assert find_overlaps(data, near=near) == [expected]


def mirror(images):
    return add_noise(images.flip(-1))


@pytest.mark.parametrize("change", [brighten, add_noise, mirror])
@pytest.mark.parametrize(("split", "other"), [("test", "train"), ("val", "train")])
def test_near_duplicates_are_counted_beside_exact_ones(change, split, other):
    data = make_data(**with_copies(split, other, 6, change))
    assert find_overlaps(data) == []
    assert find_overlaps(data, near=True) == [Overlap(split, other, SIZES[split], 0, 6)]
    copies = with_copies(split, other, 6, change)
    copies[split][10] = smooth_images(SIZES[other], list(SIZES).index(other))[20]
    found = find_overlaps(make_data(**copies), near=True)
    assert found == [Overlap(split, other, SIZES[split], 1, 7)]
    assert "1 exact and 6 near duplicates of train images among the" in str(found[0])


def test_different_images_and_images_of_one_colour_are_no_near_duplicates():
    assert find_overlaps(make_data(), near=True) == []
    flat = {
        name: torch.full((n, 3, 32, 32), 40 + n, dtype=torch.uint8) for name, n in SIZES.items()
    }
    assert find_overlaps(make_data(**flat), near=True) == []
    flat["test"][3] = flat["train"][0]
    assert find_overlaps(make_data(**flat), near=True) == [Overlap("test", "train", 30, 1, 1)]


def test_small_images_are_compared_exactly_only():
    assert find_overlaps(load_data("digits"), near=True) == []
    train = smooth_images(SIZES["train"], 0, 8)
    data = make_data(8, train=train, test=train[:4])
    assert find_overlaps(data, near=True) == [Overlap("test", "train", 4, 4, None)]


def test_progress_counts_every_image():
    seen = []
    find_overlaps(make_data(), near=True, on_progress=lambda *report: seen.append(report[:2]))
    assert seen[-1] == (80, 80)


def test_exact_overlaps_are_cached_by_the_digests_of_data_and_split(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = make_data(**with_copies("test", "train", 3))
    expected = [Overlap("test", "train", 30, 3)]
    assert find_exact_overlaps(data) == expected
    unreadable = replace(data, test=None)
    assert find_exact_overlaps(unreadable) == expected
    other = replace(data, record={**data.record, "split_digest": "t"}, test=data.val)
    assert find_exact_overlaps(other)[0].exact == 20
    for cached in tmp_path.rglob("duplicates-*.json"):
        whole = cached.read_text()
        for damaged in ("{", "[]", whole.replace('"exact": 3', '"exact": 7'), whole[:-1]):
            cached.write_text(damaged)
            assert find_exact_overlaps(data) == expected


def test_copies_in_generated_images_are_counted(tmp_path):
    data = make_data()
    images = torch.cat([smooth_images(400, 7), data.test.images[:5], data.val.images[3:5]])
    np.savez(
        tmp_path / "made.npz",
        image=images.permute(0, 2, 3, 1).numpy(),
        label=np.zeros(len(images), np.int64),
    )
    generated = Synthetic.open(tmp_path / "made.npz")
    path = str(tmp_path / "made.npz")
    expected = [Overlap("val", path, 20, 2), Overlap("test", path, 30, 5)]
    assert find_copies(generated, data) == expected


@pytest.fixture
def folder_with_copies(tmp_path, monkeypatch):
    """A folder data set with two test images that are training images too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, seed, n in (("train", 0, 30), ("test", 1, 12)):
        for label in ("a", "b"):
            place = tmp_path / "pictures" / split / label
            place.mkdir(parents=True)
            for number, image in enumerate(smooth_images(n, seed + 2 * (label == "b"))):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    for number in (1, 2):
        source = tmp_path / "pictures" / "train" / "a" / f"{number}.png"
        (tmp_path / "pictures" / "test" / "a" / f"{number}.png").write_bytes(source.read_bytes())
    return "folder:pictures"


def test_a_command_says_once_how_many_test_images_are_training_images(folder_with_copies, capsys):
    data = load_data(folder_with_copies)
    found = find_overlaps(data)
    assert sum(overlap.exact for overlap in found if overlap.split == "test") == 2
    model = "resnet9:width=2"
    command = ("train", "--model", model, "--data", folder_with_copies, "--epochs", 1)
    assert run(*command, "--lr", 0.01, "--threat", "clean", "-o", "net.safetensors") == 0
    error = capsys.readouterr().err
    for overlap in found:
        assert error.count(f"{overlap.exact} exact duplicates of {overlap.other} images") == 1


def test_training_says_how_many_generated_images_are_test_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = load_data("digits").test.images[:7].permute(0, 2, 3, 1).numpy()
    np.savez("made.npz", image=images, label=np.zeros(7, np.int64))
    options = ("--model", "resnet9:width=2", "--data", "digits", "--epochs", 1, "--lr", 0.01)
    files = ("--synthetic", "made.npz", "-o", "net.safetensors")
    assert run("train", *options, "--threat", "clean", *files) == 0
    assert "7 exact duplicates of made.npz images" in capsys.readouterr().err
    leakage = find_leakage([Checkpoint.load("net.safetensors")], load_data("digits").test)
    assert "7 images of made.npz synthetic are in it" in leakage.why


def test_digits_have_no_duplicates_and_commands_stay_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Checkpoint.of(digits_network(2)).save("net.safetensors")
    assert run("check", "net.safetensors", "--data", "digits", "--samples", 8) in (0, 3)
    captured = capsys.readouterr()
    assert "duplicates" not in captured.out + captured.err

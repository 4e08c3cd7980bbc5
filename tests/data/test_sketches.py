"""Sketches: samples of hashes that show the images two splits share."""

from dataclasses import replace

import numpy
import pytest
import torch

from robustsoup.data import Synthetic, load_data
from robustsoup.data.sketches import (
    MAX_SKETCHES,
    SKETCH_SIZE,
    count_shared,
    join_sketches,
    sketch_split,
    sketch_synthetic,
    split_hashes,
)


@pytest.fixture(scope="module")
def split():
    return load_data("digits").train


def numbered(split, count):
    """A split of images that hold their numbers in their pixels."""
    images = torch.arange(count).view(-1, 1, 1, 1) // torch.tensor([1, 256]) % 256
    zeros = torch.zeros(count, dtype=torch.int64)
    images = images.to(torch.uint8)
    return replace(split, images=images, labels=zeros, ids=torch.arange(count))


def test_a_sketch_holds_the_smallest_hashes(split):
    sketch = sketch_split(split)
    assert sketch["smallest"] == sorted(split_hashes(split))[:SKETCH_SIZE]
    assert (sketch["images"], sketch["split"]) == (len(split), "train")
    few = sketch_split(numbered(split, 5))
    assert len(few["smallest"]) == few["images"] == 5


def test_ids_labels_names_and_order_do_not_matter(split):
    other = replace(split, images=split.images.flip(0), ids=split.ids + 10**6, name="test")
    assert split_hashes(other) == split_hashes(split)


def test_the_count_of_shared_images_is_scaled_up(split):
    sketch = sketch_split(numbered(split, 4000))
    assert count_shared(sketch, numbered(split, 4000)) == (SKETCH_SIZE, 4000)
    hits, shared = count_shared(sketch, numbered(split, 1000))
    assert shared == round(hits * 4000 / SKETCH_SIZE)
    assert 500 < shared < 1500
    assert count_shared(sketch_split(split), numbered(split, 1000)) == (0, 0)


def test_sketches_are_bounded_and_joined(split):
    parts = [numbered(split, 20 + n) for n in range(MAX_SKETCHES + 4)]
    sketches = [replace_name(sketch_split(part), str(n)) for n, part in enumerate(parts)]
    assert join_sketches([*sketches[:3], *sketches[:3]]) == sketches[:3]
    joined = join_sketches(sketches)
    assert len(joined) == MAX_SKETCHES
    assert joined[-1]["smallest"] == sketch_split(parts[-1])["smallest"]
    assert joined[-1]["images"] == sum(len(part) for part in parts[MAX_SKETCHES - 1 :])
    assert join_sketches(joined) == joined


def replace_name(sketch, name):
    return {**sketch, "name": name}


def test_generated_images_are_read_once(split, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = split.images[:40].permute(0, 2, 3, 1).numpy()
    numpy.savez(tmp_path / "a.npz", image=images, label=split.labels[:40].numpy())
    generated = Synthetic.open(tmp_path / "a.npz")
    first = sketch_synthetic(generated)
    assert first["smallest"] == sketch_split(split.first(40))["smallest"]
    monkeypatch.setattr(Synthetic, "take", None)
    assert sketch_synthetic(generated) == first

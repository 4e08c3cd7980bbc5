"""Batches depend only on seeds."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import small_split

from robustsoup.data import (
    Augmentation,
    augment,
    batches,
    to_float,
)
from robustsoup.errors import DataError
from robustsoup.seeding import keyed_generator


def same_batches(left, right):
    left, right = list(left), list(right)
    pairs = [zip(a, b, strict=True) for a, b in zip(left, right, strict=True)]
    return all(torch.equal(a, b) for pair in pairs for a, b in pair)


def test_to_float_is_exact():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(images)
    assert floats.dtype == torch.float32
    assert floats.min() == 0
    assert floats.max() == 1
    assert torch.equal((floats * 255).round().to(torch.uint8), images)
    assert images.dtype == torch.uint8


def slow_augment(images, augmentation, generator):
    """Crop one image at a time, by assignment into a black canvas."""
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
    all_batches = list(batches(split, batch_size, **options))
    assert same_batches(batches(split, batch_size, **options, skip=skip), all_batches[skip:])
    ids = torch.cat([ids for _, _, ids in all_batches])
    assert len(ids.unique()) == len(ids)
    assert len(all_batches) >= 1
    sizes = {len(ids) for _, _, ids in all_batches}
    if drop_last:
        assert sizes == {min(batch_size, n)}
        assert len(all_batches) == max(1, n // batch_size)
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

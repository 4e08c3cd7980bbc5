"""Augmentation by a transform of the user."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from training_helpers import DATA, Killed, fresh_network, kill_at, train_digits
from user_transforms import lighten, normalise, shift, shrink

from robustsoup.data import batches
from robustsoup.data.splits import Augmentation
from robustsoup.data.transforms import ImageTransform
from robustsoup.errors import DataError, RequestError
from robustsoup.recipes import load_recipe
from robustsoup.runs.run import prepare_run
from robustsoup.seeding import keyed_generator
from robustsoup.settings import TrainSettings
from robustsoup.training.transforms import take_transform

IMAGES = DATA.images[:12]


def apply(function, images=IMAGES, key=0):
    return ImageTransform.parse(function).apply(images, keyed_generator("test", key))


class Mirror(nn.Module):
    """A transform with settings, in the manner of torchvision."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, image):
        return image.flip(2) if float(torch.rand(())) < self.p else image

    def extra_repr(self):
        return f"p={self.p}"


def test_each_image_passes_by_itself():
    changed = apply(shift)
    widths = {
        next(by for by in range(8) if torch.equal(image.roll(by, 2), other))
        for image, other in zip(IMAGES, changed, strict=True)
    }
    assert len(widths) > 1


def test_the_draws_depend_on_the_key_alone_and_leave_the_generators():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = apply(shift)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    torch.rand(5), random.random(), np.random.rand(3)
    assert torch.equal(apply(shift), first)
    assert not torch.equal(apply(shift, key=1), first)


def test_batches_are_transformed_whatever_came_before():
    split = take_transform(DATA, TrainSettings(transform=shift))[0]
    assert split.augmentation == Augmentation(transform=ImageTransform.parse(shift))
    whole = list(batches(split, 64, seed=0, epoch=1))
    rest = list(batches(split, 64, seed=0, epoch=1, skip=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], rest, strict=True))
    plain = next(batches(split, 64, seed=0, epoch=1, augmented=False))
    assert torch.equal(plain[2], whole[0][2])
    assert not torch.equal(plain[0], whole[0][0])


def test_floats_become_eight_bits():
    expected = (IMAGES.float() / 255).sqrt() * 255
    assert torch.equal(apply(lighten), expected.round().to(torch.uint8))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (normalise, r"returned torch.float32 from -1 to .*; leave normalisation to the network"),
        (shrink, r"returned \(1, 7, 7\), expected an image of shape \(1, 8, 8\)"),
        (lambda image: None, "returned <class 'NoneType'>, expected an image"),
        (lambda image: image.long() * 300, "returned torch.int64"),
        (lambda image: image * float("nan"), "returned torch.float32 from nan"),
    ],
)
def test_what_is_no_image_is_refused(function, message):
    with pytest.raises(DataError, match=message):
        apply(function)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("shift", 'got "shift", expected package.module:name'),
        ("user_transforms:nothing", "nothing"),
        ("user_transforms:number", "got user_transforms:number, expected a function"),
        (3, "got 3, expected a function of one image"),
        (Mirror, "expected a function of one image"),
    ],
)
def test_what_is_no_transform_is_refused(value, message):
    with pytest.raises(RequestError, match=message):
        train_digits(fresh_network(), transform=value)


def test_names_and_fingerprints_tell_transforms_apart():
    assert str(ImageTransform.parse("user_transforms:shift")) == "user_transforms:shift"
    assert str(ImageTransform.parse(shift)) == "user_transforms:shift"
    assert str(ImageTransform.parse(Mirror(0.5))) == "Mirror(p=0.5)"
    transforms = [shift, lighten, Mirror(0.5), Mirror(0.25)]
    assert len({ImageTransform.parse(item).fingerprint for item in transforms}) == 4
    assert ImageTransform.parse(Mirror(0.5)).fingerprint == (
        ImageTransform.parse(Mirror(0.5)).fingerprint
    )


class Lighten:
    """A transform that prints where it lies in memory."""

    def __init__(self, by):
        self.by = by

    def __call__(self, image):
        return (image + self.by).clamp(max=255).to(torch.uint8)


@pytest.mark.parametrize("make", [Lighten, lambda by: partial(Lighten.__call__, Lighten(by))])
def test_equal_objects_are_one_transform(make):
    first, again, other = (ImageTransform.parse(make(by)) for by in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert first.name == again.name
    assert "0x" not in first.name


def test_training_uses_records_and_resumes_it(save_every_step, tmp_path):
    path = tmp_path / "state.pt"
    plain, trained = train_digits(fresh_network()), train_digits(fresh_network(), transform=shift)
    assert plain.digest != trained.digest
    assert trained.provenance["training"]["transform"] == "user_transforms:shift"
    assert "transform" not in plain.provenance["training"]
    with pytest.raises(Killed):
        train_digits(fresh_network(), transform=shift, state_path=path, on_progress=kill_at(3))
    resumed = train_digits(fresh_network(), transform=shift, state_path=path)
    assert resumed.digest == trained.digest


def test_a_recipe_names_a_transform(tmp_path, monkeypatch):
    def keys(**finetune):
        lines = "\n".join(f'{key} = "{value}"' for key, value in finetune.items())
        path = tmp_path / "a.toml"
        path.write_text(
            'name = "a"\ndata = "digits"\nmodel = "resnet9:width=2"\n'
            f"[pretrain]\nepochs = 1\n[finetune]\nepochs = 1\n{lines}\n"
            '[ingredients]\na = { threat = "clean" }\n'
        )
        prepared = prepare_run(load_recipe(path), device="cpu")
        return [step.key for step in prepared.plan.steps if step.name == "a"]

    named, other = (
        keys(transform="user_transforms:shift"),
        keys(transform="user_transforms:lighten"),
    )
    assert len({*named, *other, *keys()}) == 3
    with pytest.raises(RequestError, match=r'finetune.transform.*got "shift"'):
        keys(transform="shift")

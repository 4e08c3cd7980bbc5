"""Augmentation by torchvision.transforms.v2."""

import pytest
import torch
from training_helpers import DATA, fresh_network, train_digits

from robustsoup.data.transforms import ImageTransform
from robustsoup.seeding import keyed_generator

NAMES = ("crop", "resized", "several", "floats", "randaugment")


def make_transform(name):
    from torchvision.transforms import v2

    transforms = {
        "crop": v2.RandomCrop(8, padding=2),
        "resized": v2.RandomResizedCrop(8, antialias=True),
        "several": v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(10)]),
        "floats": v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.ColorJitter(0.3)]),
        "randaugment": v2.RandAugment(),
    }
    return transforms[name]


@pytest.mark.parametrize("name", NAMES)
def test_each_image_is_drawn_for_itself_and_again_the_same(name):
    images = DATA.images[:1].expand(32, 1, 8, 8).contiguous()
    transform = ImageTransform.parse(make_transform(name))
    first, again, other = (
        transform.apply(images, keyed_generator("test", key)) for key in (0, 0, 1)
    )
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) > 1


def test_training_takes_a_transform():
    trained = train_digits(fresh_network(), transform=make_transform("crop"))
    assert "RandomCrop" in trained.provenance["training"]["transform"]

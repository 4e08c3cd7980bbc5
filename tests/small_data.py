"""Small data that several tests of this folder share."""

import torch
from PIL import Image

from robustsoup.data import Augmentation, Split
from robustsoup.seeding import keyed_generator

CROP_AND_FLIP = Augmentation(pad=2, flip=True)


def small_split(n=50, augmentation=CROP_AND_FLIP):
    """A split of n random colour images of 6x6 pixels with ids from 100."""
    images = torch.randint(
        0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=keyed_generator("test")
    )
    record = {"name": "small", "classes": ["a", "b"]}
    return Split(images, torch.arange(n) % 2, torch.arange(n) + 100, "train", record, augmentation)


def all_ids(*splits):
    """The sorted ids of all samples."""
    return torch.cat([split.ids for split in splits]).sort().values


def write_images(folder, count, size=(10, 10), suffix="png", colour=(10, 20, 30)):
    """Write `count` images of one colour, each a shade lighter than the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shade = tuple((value + number) % 256 for value in colour)
        Image.new("RGB", size, shade).save(folder / f"{number:03}.{suffix}")

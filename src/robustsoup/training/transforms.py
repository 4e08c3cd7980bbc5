"""The transform of training images that the settings name."""

from dataclasses import replace
from typing import TypeVar

from robustsoup.data import Split
from robustsoup.data.sources import is_built_in
from robustsoup.data.splits import Augmentation
from robustsoup.data.transforms import ImageTransform
from robustsoup.settings import LearnSettings, TrainSettings

S = TypeVar("S", TrainSettings, LearnSettings)


def take_transform(data: Split, settings: S) -> tuple[Split, S]:
    """Return the split with the transform of the settings, which are returned with it parsed.

    Raises:
        RequestError: The settings name no transform.
    """
    if settings.transform is None:
        return data, settings
    transform = ImageTransform.parse(settings.transform)
    augmented = replace(data, augmentation=Augmentation(transform=transform))
    return augmented, replace(settings, transform=transform)


def transform_fingerprint(settings: TrainSettings | LearnSettings) -> str | None:
    """Return a digest of the transform's code; None without a transform."""
    if settings.transform is None:
        return None
    return ImageTransform.parse(settings.transform).fingerprint


def augmentation_fingerprint(data: Split) -> list[int | str | None]:
    """Return what identifies the augmentation of a user's data, whose digest does not say it.

    The list is empty for built-in data, which always has the same augmentation.
    """
    return [] if is_built_in(data.record["name"]) else data.augmentation.fingerprint

"""Augmentation by a transform of the user, such as those of torchvision.transforms.v2.

Each image passes through the transform by itself. What the transform draws from the global
generators of PyTorch, NumPy and Python depends on seed, epoch and batch alone, so that a resumed
run sees the same images; the generators are left as they were.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from robustsoup.catalog import check_call, import_by_name
from robustsoup.errors import DataError, RequestError
from robustsoup.fingerprint import code_fingerprint
from robustsoup.seeding import seeded_random_state

MOST_SEED = 2**32
"""NumPy's seeds have 32 bits."""


@dataclass(frozen=True)
class ImageTransform:
    """A transform of one training image.

    Attributes:
        function: Takes an image, uint8 (c, h, w), and returns one of the same shape, uint8 or
            floats in [0, 1].
        name: How the user named it.
    """

    function: Callable[[torch.Tensor], torch.Tensor] = field(compare=False)
    name: str

    @classmethod
    def parse(cls, value: object) -> "ImageTransform":
        """Return the transform that a user names.

        Args:
            value: "package.module:name", a function, a transform of torchvision.transforms.v2 or
                another callable object.

        Raises:
            RequestError: It is none of these.
        """
        if isinstance(value, cls):
            return value
        name = value if isinstance(value, str) else _describe(value)
        if isinstance(value, str):
            if ":" not in value:
                raise RequestError(f'transform: got "{value}", expected package.module:name')
            value = import_by_name(value, label=f'transform "{value}"', error=RequestError)
        if not callable(value) or inspect.isclass(value):
            raise RequestError(
                f"transform: got {name}, expected a function of one image or a transform such as "
                "torchvision.transforms.v2.RandomCrop(32, padding=4)"
            )
        check_call(value, ["image"], label=f'transform "{name}"')
        return cls(value, name)

    @property
    def fingerprint(self) -> str:
        """Digest of its code, and of what it holds if it is an object."""
        return code_fingerprint(self.function)

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the transformed images.

        Args:
            images: uint8 (n, c, h, w).
            generator: Draws the seed of what the transform draws.

        Returns:
            Images of the same shape, type and device.

        Raises:
            DataError: The transform returns something else.
        """
        seed = int(torch.randint(MOST_SEED, (), generator=generator))
        with seeded_random_state(seed, images.device):
            changed = [self._check(self.function(image), image) for image in images]
        return torch.stack(changed)

    def _check(self, changed: object, image: torch.Tensor) -> torch.Tensor:
        if not isinstance(changed, torch.Tensor) or changed.shape != image.shape:
            got = tuple(changed.shape) if isinstance(changed, torch.Tensor) else type(changed)
            raise DataError(
                f"transform {self.name}: returned {got}, expected an image of shape "
                f"{tuple(image.shape)}"
            )
        if changed.dtype == torch.uint8:
            return changed.as_subclass(torch.Tensor)
        low, high = float(changed.min()), float(changed.max())
        if not changed.is_floating_point() or not (low >= 0 and high <= 1):
            raise DataError(
                f"transform {self.name}: returned {changed.dtype} from {low:g} to {high:g}, "
                "expected uint8 or floats in [0, 1]; leave normalisation to the network"
            )
        return (changed.as_subclass(torch.Tensor) * 255).round().to(torch.uint8)

    def __str__(self) -> str:
        """Return the name."""
        return self.name


def _describe(value: object) -> str:
    """Return how an object prints, in one line; the import path of a function or its class."""
    text = " ".join(repr(value).split())
    named = value if inspect.isroutine(value) else type(value)
    is_bare = named is value or " at 0x" in text
    return f"{named.__module__}:{named.__qualname__}" if is_bare else text

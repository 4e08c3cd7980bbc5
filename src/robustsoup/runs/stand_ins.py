"""What a plan takes in place of data and checkpoints that are not on this machine.

A plan needs sizes alone: how many samples there are, and how large the network is. Both are known
before anything is downloaded, so `robustsoup plan` downloads only what it cannot do without: data
that only its files describe, and checkpoints of a network that the recipe does not name.
"""

import dataclasses
from collections.abc import Collection, Sequence

import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.published import PUBLISHED_CHECKPOINTS, published_path
from robustsoup.checkpoints.remote import has_copy, remote_address
from robustsoup.data import Data
from robustsoup.data.cifar import RELEASES, is_here
from robustsoup.models import load_model
from robustsoup.recipes import Recipe, checkpoint_places
from robustsoup.recipes.sections import PUBLISHED_PREFIX


def list_absent(recipe: Recipe, data_root: str | None = None) -> list[str]:
    """Return what would be downloaded although its size is known without that.

    Args:
        recipe: The recipe.
        data_root: Folder of the data and of published checkpoints.

    Returns:
        The data of the recipe, if its sizes are known, and the places of checkpoints, if their
        network is.

    Raises:
        RequestError: No published checkpoint has such a name.
    """
    data_is_absent = recipe.data in RELEASES and not is_here(recipe.data, data_root)
    places = dict.fromkeys(checkpoint_places(recipe))
    absent = [place for place in places if _must_be_fetched(place, data_root)]
    return [
        *([recipe.data] if data_is_absent else []),
        *(absent if _network_of(recipe, absent) else []),
    ]


def imitate_checkpoints(
    recipe: Recipe, absent: Collection[str], data: Data
) -> dict[str, Checkpoint]:
    """Return checkpoints with fresh weights in place of those that `list_absent` found."""
    places = [place for place in dict.fromkeys(checkpoint_places(recipe)) if place in absent]
    spec = _network_of(recipe, places)
    if spec is None or not places:
        return {}
    channels = data.record["channels"]
    fresh = Checkpoint.of(load_model(spec, classes=data.test.classes, channels=channels))
    return {place: _change(fresh, number) for number, place in enumerate(places, 1)}


def _must_be_fetched(place: str, data_root: str | None) -> bool:
    if place.startswith(PUBLISHED_PREFIX):
        return not published_path(place.removeprefix(PUBLISHED_PREFIX), data_root).exists()
    address = remote_address(place)
    return address is not None and not has_copy(address)


def _network_of(recipe: Recipe, absent: Sequence[str]) -> str | None:
    """Return the network that the recipe names, else that of the first published checkpoint."""
    names = [place.removeprefix(PUBLISHED_PREFIX) for place in absent]
    published = [
        PUBLISHED_CHECKPOINTS[name].model for name in names if name in PUBLISHED_CHECKPOINTS
    ]
    return recipe.model or next(iter(published), None)


def _change(checkpoint: Checkpoint, number: int) -> Checkpoint:
    """Return the checkpoint with one tensor changed, so that it has a digest of its own."""
    name = min(checkpoint.parameters, key=lambda name: checkpoint.tensors[name].numel())
    tensors = {**checkpoint.tensors, name: torch.full_like(checkpoint.tensors[name], number)}
    return dataclasses.replace(checkpoint, tensors=tensors)

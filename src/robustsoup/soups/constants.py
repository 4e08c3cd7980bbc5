"""Constants of a network: buffers that mixing does not average, such as the mean of its inputs."""

from collections.abc import Iterator, Sequence

import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.wrapping import join_names
from robustsoup.soups.coefficients import Coefficients


def used_ingredients(
    ingredients: Sequence[Checkpoint], coefficients: Coefficients
) -> list[Checkpoint]:
    """Return the ingredients with a coefficient other than 0; a soup has the first one's constants.

    So a one-hot mix has those of its ingredient.
    """
    takes_part = (coefficients.alpha != 0).any(0).tolist()
    return [item for item, takes in zip(ingredients, takes_part, strict=True) if takes]


def describe_differing_constants(
    ingredients: Sequence[Checkpoint], source: str | None = None
) -> Iterator[str]:
    """Yield a warning for constants that differ, since a soup takes those of one checkpoint.

    Args:
        ingredients: One or more checkpoints of one network.
        source: Whose constants the soup has; by default those of the first checkpoint.
    """
    first = ingredients[0]
    names, name = sorted(first.constants), _short_name(first)
    differing: dict[str, list[str]] = {}
    normalizing: dict[str, list[str]] = {}
    expected = first.provenance.get("network") or {}
    for item in ingredients[1:]:
        # A file may lack constants that change nothing; see `Checkpoint.with_names_like`.
        shared = [n for n in names if n in item.tensors]
        unequal = [n for n in shared if not torch.equal(first.tensors[n], item.tensors[n])]
        if unequal:
            differing.setdefault(join_names(unequal, 3), []).append(_short_name(item))
        got = item.provenance.get("network")
        if expected and got and got.get("normalize") != expected.get("normalize"):
            normalizing.setdefault(str(got.get("normalize")), []).append(_short_name(item))
    taken = source or f"{name}'s"
    for constants, files in differing.items():
        yield (
            f"{join_names(files)}: {constants} differs from {name}; it is not averaged, so a "
            f"soup takes {taken}. If it normalises the input, the networks expect different inputs"
        )
    for constants, files in normalizing.items():
        yield (
            f"{join_names(files)}: normalises its input by {constants}, {name} by "
            f"{expected.get('normalize')}; a soup takes {name}'s normalisation: fine-tune all "
            "ingredients with one"
        )


def _short_name(item: Checkpoint) -> str:
    """Return the file's name without its folders, which reports and cards would publish."""
    return item.path.name if item.path else item.name

"""Check that checkpoints belong to one network, and find their common ancestor."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.parameters import has_scale, is_inexact, is_pruning_mask
from robustsoup.errors import CheckpointError, IngredientMismatch


def check_ingredients(ingredients: Sequence[Checkpoint]) -> None:
    """Check that checkpoints share the names, shapes and dtypes of their tensors.

    Raises:
        CheckpointError: If there is no ingredient, or if they are LoRA adapters.
        IngredientMismatch: Names the first tensor that differs from the first ingredient's.
    """
    if not ingredients:
        raise CheckpointError("ingredients: got none, expected at least one checkpoint")
    first = ingredients[0]
    if len(ingredients) > 1:
        _refuse_adapters(first)
    for other in ingredients[1:]:
        _refuse_other_masks(first, other)
        for name in [*first.tensors, *other.tensors]:
            _check_tensor(name, first, other)


_FACTORS = re.compile(
    r"(^|[._])(lora_?(A|B|E|up|down|embedding_A|embedding_B|magnitude)|(hada|lokr)_[wt][12](_[ab])?|"
    r"b?oft_[rs]|vera_(A|B|lambda_[bd]))\b",
    re.IGNORECASE,
)
"""Names that peft gives to the factors of LoRA, AdaLoRA, DoRA, LoHa, LoKr, OFT, BOFT and VeRA."""


def _refuse_adapters(item: Checkpoint) -> None:
    """Refuse the factors of low-rank adapters: the mean of products is not that of the factors."""
    factors = [name for name in item.tensors if _FACTORS.search(name)]
    if factors:
        raise CheckpointError(
            f"{item.name}: {factors[0]} is a factor of an adapter, and the average of factors is "
            "not that of their products: merge it with peft (merge_and_unload), or give the folder "
            "of a LoRA adapter with its adapter_config.json, which is merged into its base"
        )


def _refuse_other_masks(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse weights that cannot be averaged: quantized ones, and ones pruned by other masks.

    Raises:
        IngredientMismatch: Names the first such tensor.
    """
    for name, a in first.tensors.items():
        b = other.tensors.get(name)
        reason = _reason_against_averaging(name, first.tensors)
        if reason and b is not None and a.shape == b.shape and not torch.equal(a, b):
            raise IngredientMismatch(f"{name}: differs in {first.name} and {other.name}: {reason}")


def _reason_against_averaging(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Return why a tensor cannot be averaged with a differing one; None if it can be, or copied."""
    tensor = tensors[name]
    if is_pruning_mask(name, tensors):
        return "the networks were pruned differently; make it permanent with prune.remove"
    if not is_inexact(tensor) and tensor.dim() > 1:
        return "integers are not averaged; give the weights from before quantization"
    if tensor.dtype.itemsize == 1 and has_scale(name, tensors):
        return "numbers with scales are not averaged; give the weights from before quantization"
    return None


def _check_tensor(name: str, first: Checkpoint, other: Checkpoint) -> None:
    for owner, lacking in ((first, other), (other, first)):
        if name not in lacking.tensors:
            raise IngredientMismatch(
                f"{name}: in {owner.name} but not in {lacking.name}; they are not the same network"
            )
    a, b = first.tensors[name], other.tensors[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        raise IngredientMismatch(
            f"{name}: {tuple(a.shape)} {a.dtype} in {first.name}, "
            f"{tuple(b.shape)} {b.dtype} in {other.name}; "
            "ingredients must share names, shapes and dtypes"
        )


def fit_base(base: Checkpoint, first: Checkpoint) -> Checkpoint:
    """Return the base in the names and dtypes of the first ingredient.

    Raises:
        CheckpointError: If the ingredient is a LoRA adapter.
        IngredientMismatch: Names the first tensor that differs.
    """
    fitted = base.with_names_like(first).with_dtypes_like(first)
    check_ingredients([first, fitted])
    return fitted


def common_ancestor(ingredients: Sequence[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint that all ingredients were fine-tuned from.

    The provenance records of all ingredients must name the ancestor, which must be an ingredient
    itself or a file in the folder of one.

    Returns:
        The ancestor, or None if the records share none or its file is not found.
    """
    parent_files = [
        {parent["digest"]: parent.get("file") for parent in item.provenance.get("parents", [])}
        for item in ingredients
    ]
    lineages = [set(files) for files in parent_files]
    if len(ingredients) > 1:  # an ingredient may be the ancestor of the others
        for lineage, item in zip(lineages, ingredients, strict=True):
            lineage.add(item.digest)
    for digest in sorted(set.intersection(*lineages)):
        for item in ingredients:
            if item.digest == digest:
                return item
        for item, files in zip(ingredients, parent_files, strict=True):
            ancestor = _open_beside(item, files.get(digest))
            if ancestor is not None and ancestor.digest == digest:
                return ancestor
    return None


def _open_beside(item: Checkpoint, file: str | None) -> Checkpoint | None:
    """Open the file of that name in the folder of a checkpoint, if there is one."""
    if item.path is None or not file:
        return None
    path = item.path.parent / file
    return Checkpoint.open(path) if path.is_file() else None

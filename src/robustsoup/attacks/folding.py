"""BatchNorm folding: a faster copy of a network for the search.

In eval mode a BatchNorm after a convolution is an affine map and can be merged into its weights.
The result is the same function up to rounding. Only searches in bfloat16 use the copy, because
the network itself checks every point that they find.
"""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robustsoup.attacks.adaptation import copy_network
from robustsoup.attacks.forward import call_network

MAX_RELATIVE_CHANGE = 1e-3
"""Largest allowed change of the logits, relative to the largest logit."""


@torch.no_grad()
def fold_batchnorm(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy of `model` with BatchNorm folded into convolutions where possible.

    Args:
        model: Network in eval mode; it is not changed.
        x: (b, ...) images. A pass over them shows which BatchNorm follows which convolution, and
            whether folding changes the logits.

    Returns:
        The copy, or `model` itself if nothing can be folded.
    """
    pairs, expected = _find_pairs(model, x)
    if not pairs:
        return model
    folded = _fold_pairs(model, pairs)
    if _keeps_logits(folded, x, expected):
        return folded
    # Another layer reads an intermediate output: in a pre-activation network, a shortcut reads the
    # stem. Fold only the pairs that can be folded one at a time.
    pairs = [pair for pair in pairs if _keeps_logits(_fold_pairs(model, [pair]), x, expected)]
    folded = _fold_pairs(model, pairs)
    return folded if pairs and _keeps_logits(folded, x, expected) else model


def _fold_pairs(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    folded = copy_network(model)
    for convolution, batchnorm in pairs:
        conv, bn = folded.get_submodule(convolution), folded.get_submodule(batchnorm)
        assert isinstance(conv, nn.Conv2d)  # _find_pairs returns only these types
        assert isinstance(bn, nn.BatchNorm2d)
        fused = fuse_conv_bn_eval(conv, bn)
        _replace_module(folded, convolution, fused.requires_grad_(False))
        _replace_module(folded, batchnorm, nn.Identity())
    return folded


def _keeps_logits(folded: nn.Module, x: Tensor, expected: Tensor) -> bool:
    change = float((call_network(folded, x) - expected).abs().max())
    return change <= MAX_RELATIVE_CHANGE * float(expected.abs().max())


def _find_pairs(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Return (convolution, BatchNorm) names where the second reads the first, and the logits.

    Both modules of a pair are called exactly once in the pass.
    """
    convolution_of: dict[int, str] = {}  # by id of its output
    outputs: list[Tensor] = []  # kept alive, so that ids stay unique
    calls: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []

    def record_call(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[name] += 1
        if isinstance(module, nn.Conv2d):
            convolution_of[id(output)] = name
            outputs.append(output)
        elif inputs and id(inputs[0]) in convolution_of and module.track_running_stats:
            pairs.append((convolution_of[id(inputs[0])], name))

    hooks = [
        module.register_forward_hook(partial(record_call, name))
        for name, module in model.named_modules()
        if type(module) in (nn.Conv2d, nn.BatchNorm2d)
    ]
    try:
        logits = call_network(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)], logits


def _replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)

"""A network for searching: BatchNorm folded into the convolution before it, which in eval mode is the same function.

Only the search in bfloat16 uses it, where its hits are judged again by the network itself: rounding may differ.
"""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

LARGEST_CHANGE = 1e-3
"""How far the logits of a folded network may be from the network's own, relative to the largest."""


@torch.no_grad()
def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of `model` (in eval mode) with what can be folded; the model itself if nothing can, or it would change it.

    x: (b, ...) images that show which BatchNorm follows which convolution, and whether anything else reads between them.
    """
    pairs, expected = _pairs(model, x)
    if not pairs:
        return model
    light = _fold(model, pairs)
    if _close(light(x), expected):
        return light
    # Something reads one of them, as a shortcut reads the stem of a pre-activation network: fold those that can be folded alone.
    pairs = [pair for pair in pairs if _close(_fold(model, [pair])(x), expected)]
    light = _fold(model, pairs)
    return light if pairs and _close(light(x), expected) else model


def _fold(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    copied = copy.deepcopy(model)
    for conv, norm in pairs:
        fused = fuse_conv_bn_eval(copied.get_submodule(conv), copied.get_submodule(norm))
        _replace(copied, conv, fused.requires_grad_(False))
        _replace(copied, norm, nn.Identity())
    return copied


def _close(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).abs().max()) <= LARGEST_CHANGE * float(expected.abs().max())


def _pairs(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """(convolution, BatchNorm) by name, where the one's output is the other's input and both are called once."""
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no two outputs share an id
    calls: Counter[str] = Counter()
    pairs = []

    def watch(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        calls[name] += 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = name
            kept.append(output)
        elif inputs and id(inputs[0]) in made and module.track_running_stats:
            pairs.append((made[id(inputs[0])], name))

    named = {n: m for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.BatchNorm2d)}
    hooks = [m.register_forward_hook(lambda *a, n=n: watch(n, *a)) for n, m in named.items()]
    try:
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)], logits


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)

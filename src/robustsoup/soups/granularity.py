"""Granularity: which parameters share one set of coefficients."""

import re

from torch import nn

from robustsoup.errors import RequestError

GRANULARITIES = ("parameter", "module", "block", "model")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_groups(model: nn.Module, granularity: str = "parameter") -> dict[str, list[str]]:
    """layer -> the names of its parameters, in the network's order; every named parameter is in one layer.

    "parameter": each by itself, as in the paper. "module": those of one convolution, BatchNorm, linear layer. "block": those of
    one residual block: a row of blocks, as a stage is one, is opened. "model": one layer,
    "*", the control of the paper's section 4.4. "re:PATTERN": parameters whose names match the pattern to the same text (its
    groups joined by ".", where it has any) share a layer; the others are layers by themselves.

    Raises RequestError for another word, or a pattern that is broken or matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    if granularity.startswith("re:"):
        layer_of = _matched(names, granularity.removeprefix("re:"))
    elif granularity == "parameter":
        layer_of = {name: name for name in names}
    elif granularity == "module":
        layer_of = {name: name.rpartition(".")[0] or name for name in names}
    elif granularity == "block":
        blocks = sorted(_blocks(*_unwrapped(model, "")), key=len, reverse=True)
        layer_of = {
            name: next((b for b in blocks if name.startswith(f"{b}.")), name) for name in names
        }
    elif granularity == "model":
        layer_of = dict.fromkeys(names, "*")
    else:
        known = ", ".join(GRANULARITIES)
        raise RequestError(
            f'granularity: got "{granularity}", expected one of {known}, or re:PATTERN on parameter names'
        )
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_of[name], []).append(name)
    return groups


def _unwrapped(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The one module inside `module` that has all its parameters, and its name; wrappers hold a network so."""
    inner = {
        child: part
        for child, part in module.named_children()
        if any(True for _ in part.parameters())
    }
    if len(inner) != 1 or any(True for _ in module.parameters(recurse=False)):
        return module, name
    (child, part) = next(iter(inner.items()))
    return _unwrapped(part, f"{name}.{child}" if name else child)


def _blocks(module: nn.Module, name: str) -> list[str]:
    """The names of the blocks inside `module`, which is opened."""
    found = []
    for child, inner in module.named_children():
        whole = f"{name}.{child}" if name else child
        if _opens(inner):
            found += [whole, *_blocks(inner, whole)]
        elif any(True for _ in inner.parameters()):
            found.append(whole)
    return found


def _opens(module: nn.Module) -> bool:
    """Whether a module is no block itself: a row of blocks (modules of a class of their own), or a wrapper around such a row."""
    inner = [child for child in module.children() if any(True for _ in child.parameters())]
    if not inner or any(True for _ in module.parameters(recurse=False)):
        return False
    if not all(any(True for _ in child.children()) for child in inner):
        return False
    if isinstance(module, _CONTAINERS):
        return any(not isinstance(child, _CONTAINERS) or _opens(child) for child in inner)
    return len(inner) == 1


def _matched(names: list[str], pattern: str) -> dict[str, str]:
    try:
        found = {name: re.search(pattern, name) for name in names}
    except re.error as error:
        raise RequestError(f'granularity: got the pattern "{pattern}": {error}') from None
    if not any(found.values()):
        raise RequestError(
            f'granularity: the pattern "{pattern}" matches no parameter; they are called {names[0]}, ...'
        )
    return {
        name: name
        if match is None
        else ".".join(part or "" for part in match.groups()) or match.group() or name
        for name, match in found.items()
    }

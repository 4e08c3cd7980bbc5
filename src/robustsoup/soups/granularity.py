"""Granularity: which parameters share one set of coefficients."""

import re
from collections.abc import Sequence

from torch import nn

from robustsoup.checkpoints.parameters import inexact_parameters
from robustsoup.errors import RequestError

GRANULARITIES = ("parameter", "module", "block", "model")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_groups(model: nn.Module, granularity: str = "parameter") -> dict[str, list[str]]:
    """Group the parameters of a network into layers.

    Args:
        model: The network.
        granularity: "parameter": each parameter is a layer, as in the paper. "module": the
            parameters of one convolution, BatchNorm or linear layer form a layer. "block": those of
            one residual block; a sequence of blocks, such as a stage, is split into its blocks.
            "model": one layer "*", the control of the paper's section 4.4. "re:PATTERN": parameters
            share a layer if the pattern matches the same text in their names (the groups of the
            pattern, if any, joined by "."); a parameter without a match is a layer by itself.

    Returns:
        The names of each layer's parameters, in the order of the network. Every named parameter of
        real or complex numbers is in exactly one layer.

    Raises:
        RequestError: For an unknown granularity, or a pattern that is invalid or matches nothing.
    """
    names = list(inexact_parameters(model))
    if granularity.startswith("re:"):
        layer_of = _match_pattern(names, granularity.removeprefix("re:"))
    elif granularity == "parameter":
        layer_of = {name: name for name in names}
    elif granularity == "module":
        layer_of = {name: name.rpartition(".")[0] or name for name in names}
    elif granularity == "block":
        layer_of = _innermost_blocks(model, names)
    elif granularity == "model":
        layer_of = dict.fromkeys(names, "*")
    else:
        raise RequestError(
            f'granularity: got "{granularity}", expected one of {", ".join(GRANULARITIES)}, '
            "or re:PATTERN on parameter names"
        )
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_of[name], []).append(name)
    return groups


def _innermost_blocks(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Map each parameter to the innermost block around it, or to itself outside all blocks."""
    blocks = sorted(_block_names(*_unwrap(model, "")), key=len, reverse=True)
    return {name: next((b for b in blocks if name.startswith(f"{b}.")), name) for name in names}


def _unwrap(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Descend while a single child holds all parameters; return the last module and its name."""
    children = [(n, child) for n, child in module.named_children() if _has_parameters(child)]
    if len(children) != 1 or _has_own_parameters(module):
        return module, name
    [(child_name, child)] = children
    return _unwrap(child, f"{name}.{child_name}" if name else child_name)


def _block_names(module: nn.Module, name: str) -> list[str]:
    """Return the names of the blocks inside `module`, including those inside sequences."""
    names: list[str] = []
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if _is_sequence_of_blocks(child):
            names += [path, *_block_names(child, path)]
        elif _has_parameters(child):
            names.append(path)
    return names


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    """Return whether a module contains blocks (or wraps such a module) and is no block."""
    children = [child for child in module.children() if _has_parameters(child)]
    if not children or _has_own_parameters(module):
        return False
    if not all(list(child.children()) for child in children):
        return False
    if isinstance(module, CONTAINERS):
        return any(
            not isinstance(child, CONTAINERS) or _is_sequence_of_blocks(child) for child in children
        )
    return len(children) == 1


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _has_own_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _match_pattern(names: Sequence[str], pattern: str) -> dict[str, str]:
    """Map each parameter to the text that the pattern matches in its name, else to itself."""
    try:
        matches = {name: re.search(pattern, name) for name in names}
    except re.error as error:
        raise RequestError(f'granularity: got the pattern "{pattern}": {error}') from None
    if not any(matches.values()):
        raise RequestError(
            f'granularity: the pattern "{pattern}" matches no parameter; '
            f"their names are {names[0]}, ..."
        )
    return {name: _matched_text(match) or name for name, match in matches.items()}


def _matched_text(match: re.Match[str] | None) -> str:
    if match is None:
        return ""
    return ".".join(part or "" for part in match.groups()) or match.group()

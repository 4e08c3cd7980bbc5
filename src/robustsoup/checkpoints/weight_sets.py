"""Find the sets of weights in what a training script saved, and describe what lies beside them."""

import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustsoup.checkpoints.parameters import is_inexact

WRAPPER_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "ema_state_dict",
    "model_state",
    "network",
    "weights",
    "params",
)
"""Keys of the set that is read if a file holds several, in this order, outer keys first; else the
largest is read, and a copy beside the network, such as its average, last."""

_AVERAGES = re.compile(
    r"(?<![a-z])(ema|swa|avg|averaged?|shadow|teacher|momentum|target|attacker)(?![a-z])",
    re.IGNORECASE,
)
_COMPANIONS = re.compile(
    r"(^|[._])(criterion|loss(es)?|optim(izer)?s?|exp_avg|exp_avg_sq|momentum_buffer|scaler|"
    r"metrics?|attack|adversary|normali[sz]er?)([._]|$)",
    re.IGNORECASE,
)
"""What training scripts save among the tensors of a network."""
_OPTIMIZER = re.compile(r"(?<![a-z])optim(izers?)?(?![a-z])", re.IGNORECASE)
_MAX_DEPTH = 4
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
"""What wrappers of PyTorch put before all names, such as DataParallel and torch.compile."""
_REMOVABLE_PREFIXES = (*WRAPPER_PREFIXES, "model.", "net.", "0.")


@dataclass(frozen=True)
class WeightSet:
    """A mapping of names to tensors in a file.

    Attributes:
        path: The keys that lead to it; empty if it is the whole file.
        tensors: name -> tensor, with the names of the file.
        beside: Entries of the same mapping that are not tensors.
        versions: The version of each module, by its name, as in `_metadata` of a state dict.
    """

    path: tuple[str, ...]
    tensors: dict[str, Tensor]
    beside: dict[str, Any]
    versions: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The keys that lead to it, joined by dots."""
        return ".".join(self.path)

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def find_weight_sets(content: object) -> list[WeightSet]:
    """Return the sets of weights in a file, the one to read first.

    State of an optimizer is passed over. Sets without a float tensor, such as states of random
    number generators, count only if there is nothing else.
    """
    found = list(_walk(content, (), set()))
    holding_floats = [
        item for item in found if any(is_inexact(tensor) for tensor in item.tensors.values())
    ]
    return sorted(holding_floats or found, key=_rank)


def _walk(content: object, path: tuple[str, ...], seen: set[int]) -> Iterator[WeightSet]:
    if not isinstance(content, Mapping) or len(path) > _MAX_DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        beside = {name: value for name, value in content.items() if name not in tensors}
        yield WeightSet(path, tensors, beside, read_versions(content))
    for name, value in named.items():
        if not _OPTIMIZER.search(name):
            yield from _walk(value, (*path, name), seen)


def read_versions(state: Mapping[Any, Any]) -> dict[str, int]:
    """Return the version of each module of a state dict, by its name; empty for a plain mapping."""
    metadata = getattr(state, "_metadata", None)
    if not isinstance(metadata, Mapping):
        return {}
    versions = {
        name: entry.get("version") for name, entry in metadata.items() if isinstance(entry, Mapping)
    }
    return {name: version for name, version in versions.items() if isinstance(version, int)}


def with_versions(tensors: Mapping[str, Any], versions: Mapping[str, int]) -> OrderedDict[str, Any]:
    """Return a state dict that says the version of each module, as `Module.state_dict` does."""
    state = OrderedDict(tensors)
    vars(state)["_metadata"] = OrderedDict(
        (name, {"version": version}) for name, version in versions.items()
    )
    return state


def _rank(item: WeightSet) -> tuple[bool, bool, list[int], int]:
    """Return what sorts sets: those under known keys first, averages among them last.

    The outer keys come before the inner ones, so that a known key within another network, as in
    discriminator.state_dict, does not outrank the network.
    """
    count = len(WRAPPER_KEYS)
    places = [WRAPPER_KEYS.index(key) if key in WRAPPER_KEYS else count for key in item.path]
    places += [count] * (_MAX_DEPTH + 1 - len(places))
    averaged = any(is_average(key) for key in item.path if key not in WRAPPER_KEYS)
    return min(places) == count, averaged, places, -item.size


def is_average(key: str) -> bool:
    """Return whether a key or a prefix names a copy beside the network, such as its average."""
    return _AVERAGES.search(key) is not None


def may_be_surplus(name: str) -> bool:
    """Return whether a tensor is probably no weight of the network; fitting decides."""
    return _COMPANIONS.search(name) is not None or is_average(name)


def choose_weight_set(sets: Sequence[WeightSet], key: str) -> WeightSet | None:
    """Return the set of a key, or the part of a set whose names begin with it; None without one.

    Args:
        sets: The sets of a file.
        key: The keys that lead to the set, joined by dots, or the last of them; or a prefix.
    """
    for item in sets:
        if key in (item.key, *item.path[-1:]):
            return item
    start = key.rstrip(".") + "."
    for item in sets:
        part = {name: tensor for name, tensor in item.tensors.items() if name.startswith(start)}
        if part:
            others = {name: t for name, t in item.tensors.items() if name not in part}
            return WeightSet(item.path, part, {**item.beside, **others}, item.versions)
    return None


def list_complete_sets(read: WeightSet, sets: Sequence[WeightSet]) -> list[str]:
    """Return the keys of other sets that hold tensors of the same names and shapes."""
    shapes = _shapes_without_prefix(read)
    return [
        item.key
        for item in sets
        if item.path != read.path and _shapes_without_prefix(item) == shapes
    ]


def _shapes_without_prefix(item: WeightSet) -> dict[str, torch.Size]:
    shapes = {n: tensor.shape for n, tensor in item.tensors.items() if n != "n_averaged"}
    prefix = common_prefix(shapes)
    return {name[len(prefix) :]: shape for name, shape in shapes.items()}


def common_prefix(names: Collection[str], removable: Sequence[str] = _REMOVABLE_PREFIXES) -> str:
    """Return the longest chain of removable prefixes that starts every name."""
    prefix = ""
    while shared := next(
        (p for p in removable if all(name.startswith(prefix + p) for name in names)),
        None,
    ):
        prefix += shared
    return prefix

"""What a foreign file has around its weights: kept when it is read, restored when it is written."""

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustsoup.checkpoints.safetensors_files import DIGESTS_KEY, RECORD_KEY, SafetensorsContent
from robustsoup.checkpoints.weight_sets import (
    WRAPPER_PREFIXES,
    WeightSet,
    choose_weight_set,
    common_prefix,
    find_weight_sets,
    list_complete_sets,
    with_versions,
)
from robustsoup.errors import CheckpointError
from robustsoup.pickles import Name, Storage
from robustsoup.printable import make_printable

PICKLE_ENDINGS = (
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
    ".pth.tar",
    ".pt.tar",
    ".ckpt.tar",
    ".tar",
    ".model",
    ".pkl",
    ".pickle",
)
"""Endings of files of torch.save that can be written; files of every ending are read."""

_TRAINING_STATE = re.compile(
    r"epoch|step|iter|optim|sched|scaler|best|acc|loss|metric|monitor|eval|score|callback|loops|"
    r"rng|random|seed|ema|swa|average|history|result|time|date|lr$|amp",
    re.IGNORECASE,
)
"""Keys of what belongs to one training run, which a soup does not have."""

_TABLES = (Mapping, Namespace, SimpleNamespace)
_MAX_TABLE_DEPTH = 8
"""Most keys that lead to a table of which a part is kept."""

_NOTHING = object()


@dataclass(frozen=True)
class Wrapping:
    """What is around the tensors of a file.

    Attributes:
        names: Own name of each tensor -> its name in the file.
        content: The whole content of a pickled file.
        path: The keys that lead to the tensors in it.
        beside: Entries of the same mapping that were left aside, by their name in the file.
        copies: Name in the file -> own name, of entries in `beside` that repeat a tensor.
        metadata: The entries of a .safetensors file beside those of robustsoup.
        is_safetensors: Whether the file is a .safetensors file.
        versions: The version of each module, by its name in the file; see `WeightSet`.
    """

    names: Mapping[str, str]
    content: object = field(default=None, compare=False)
    path: tuple[str, ...] = ()
    beside: Mapping[str, Any] = field(default_factory=dict, compare=False)
    copies: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_safetensors: bool = False
    versions: Mapping[str, int] = field(default_factory=dict)

    def restore_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors with the names of the file, and what was beside them there."""
        named: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            named.setdefault(self.names.get(name, name), tensor)
        for name, own in self.copies.items():
            named[name] = tensors[own]
        left = {name: value for name, value in self.beside.items() if name not in named}
        return named | left

    def names_alone(self) -> "Wrapping":
        """Return the names of the file, without what wrappers of PyTorch put before all of them."""
        names = self.names
        start = len(common_prefix(list(names.values()), WRAPPER_PREFIXES))
        return Wrapping({own: name[start:] for own, name in names.items()})

    def wrap(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the content of a pickled file, which existing loading code can read."""
        named: dict[str, Any] = self.restore_names(tensors)
        state = with_versions(named, self.versions) if self.versions else named
        return _replace_at(self.content, self.path, state)

    def own_versions(self) -> dict[str, int]:
        """Return the version of each module by its own name.

        The name of a module in the file follows from those of its tensors:
        module.conv.weight is conv.weight here, so module.conv is conv, and module is the network.
        """
        versions = dict(self.versions)
        for pair in self.names.items():
            own_parts, file_parts = (name.split(".") for name in pair)
            while own_parts and file_parts and own_parts.pop() == file_parts.pop():
                if (module := ".".join(file_parts)) in self.versions:
                    versions[".".join(own_parts)] = self.versions[module]
        return versions

    def rename_record(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return a provenance record that speaks of the names in the file."""
        renamed = dict(record)
        if "parameters" in record:
            names = (self.names.get(name, name) for name in record["parameters"])
            renamed["parameters"] = list(dict.fromkeys(names))
        if "tied" in record:
            tied = {
                self.names.get(alias, alias): self.names.get(name, name)
                for alias, name in record["tied"].items()
            }
            renamed["tied"] = {alias: name for alias, name in tied.items() if alias != name}
        if "statistics" in record:
            renamed["statistics"] = {
                self.names.get(name, name): self.names.get(owner, owner)
                for name, owner in record["statistics"].items()
            }
        return renamed

    def rename(
        self, names: Mapping[str, str], beside: Mapping[str, Any], copies: Mapping[str, str]
    ) -> "Wrapping":
        """Return the wrapping under other own names.

        Args:
            names: New own name -> own name.
            beside: Tensors that were left aside, by their own name.
            copies: Name in the file -> new own name, of those that repeat a tensor.
        """
        left = {self.names.get(name, name): value for name, value in beside.items()}
        return replace(
            self,
            names={new: self.names.get(name, name) for new, name in names.items()},
            beside={**self.beside, **left},
            copies=copies,
        )


def _replace_at(content: object, path: Sequence[str], inner: dict[str, Any]) -> dict[str, Any]:
    """Copy a mapping of mappings with the entry at a path replaced."""
    if not path:
        return inner
    outer = dict(content) if isinstance(content, Mapping) else {}
    outer[path[0]] = _replace_at(outer.get(path[0]), path[1:], inner)
    return outer


def soup_wrapping(wrappings: Sequence[Wrapping | None]) -> tuple[Wrapping | None, list[str]]:
    """Return the wrapping of a soup, and the keys that it leaves out.

    It is that of the first ingredient with the entries that all ingredients share and that hold
    neither other weights nor the state of a training run.
    """
    first, others = wrappings[0], wrappings[1:]
    if first is None:
        return None, []
    dropped: list[str] = []
    content = _keep_shared(
        first.content, [other and other.content for other in others], first.path, dropped
    )
    beside: dict[str, Any] = {}
    for name, value in first.beside.items():
        inner = [other.beside.get(name, _NOTHING) if other else _NOTHING for other in others]
        shared = (
            value if name in first.copies else _share(value, inner, (str(name),), dropped, set())
        )
        if shared is not _NOTHING:
            beside[name] = shared
    metadata = {
        key: text
        for key, text in first.metadata.items()
        if all(other is not None and other.metadata.get(key) == text for other in others)
        or key == "format"
    }
    return replace(first, content=content, beside=beside, metadata=metadata), dropped


def _keep_shared(
    content: object, others: Sequence[object], path: Sequence[str], dropped: list[str]
) -> object:
    kept: dict[Any, Any] = {}
    if not path or not isinstance(content, Mapping):
        return kept
    for key, value in content.items():
        inner = [_entries_of(other).get(key, _NOTHING) for other in others]
        if key == path[0]:
            kept[key] = _keep_shared(value, inner, path[1:], dropped)
        elif not _is_plain(value) or _is_state(key):
            dropped.append(str(key))
        elif (shared := _share(value, inner, (str(key),), dropped, set())) is not _NOTHING:
            kept[key] = shared
    return kept


def _share(
    value: object,
    others: Sequence[object],
    place: tuple[str, ...],
    dropped: list[str],
    seen: set[int],
) -> object:
    """Return a value as far as the other files hold it too, or `_NOTHING`.

    Args:
        value: The value in the first file. Tables of settings lose the entries that differ.
        others: The values in the other files.
        place: The keys that lead to the value.
        dropped: Receives the names of what is left out.
        seen: The ids of the tables that were looked through; a table may hold itself.
    """
    if all(_are_equal(value, other) for other in others):
        return value
    name = ".".join(place)
    if not isinstance(value, _TABLES) or id(value) in seen or len(place) > _MAX_TABLE_DEPTH:
        dropped.append(name)
        return _NOTHING
    seen.add(id(value))
    left_out: list[str] = []
    kept: dict[Any, Any] = {}
    for key, entry in _entries_of(value).items():
        inner = [_entries_of(other).get(key, _NOTHING) for other in others]
        shared = _share(entry, inner, (*place, str(key)), left_out, seen)
        if shared is not _NOTHING:
            kept[key] = shared
    dropped.extend(left_out if kept else [name])
    return _replace_entries(value, kept) if kept else _NOTHING


def _entries_of(table: object) -> Mapping[Any, Any]:
    """Return the entries of a mapping or a namespace; none of other values."""
    if isinstance(table, Mapping):
        return table
    return vars(table) if isinstance(table, _TABLES) else {}


def _replace_entries(table: object, entries: dict[Any, Any]) -> object:
    """Return a namespace, or else a dict, with these entries."""
    if isinstance(table, Mapping):
        return entries
    namespace = type(table)()
    vars(namespace).update(entries)
    return namespace


def _is_state(key: object) -> bool:
    return isinstance(key, str) and _TRAINING_STATE.search(key) is not None


def _is_plain(value: object) -> bool:
    """Return whether a value holds no tensor."""
    return not _holds(value, (Tensor,))


def _holds(value: object, types: tuple[type, ...]) -> bool:
    """Return whether a value or a part of it is of these types; what repeats is looked at once."""
    left, seen = [value], set[int]()
    while left:
        item = left.pop()
        if isinstance(item, types):
            return True
        if id(item) not in seen:
            seen.add(id(item))
            left.extend(_parts_of(item))
            left.extend(item if isinstance(item, Mapping) else ())
    return False


def _parts_of(value: object) -> list[object]:
    return list(value if isinstance(value, (list, tuple)) else _entries_of(value).values())


def _are_equal(left: object, right: object) -> bool:
    """Return whether two values are equal with their types; each pair is compared once."""
    pairs, seen = [(left, right)], set[tuple[int, int]]()
    while pairs:
        a, b = pairs.pop()
        if (id(a), id(b)) in seen:
            continue
        seen.add((id(a), id(b)))
        if type(a) is not type(b):
            return False
        if isinstance(a, _TABLES):
            entries, others = _entries_of(a), _entries_of(b)
            if entries.keys() != others.keys():
                return False
            pairs.extend((entries[key], others[key]) for key in entries)
        elif parts := _parts_of(a):
            others = _parts_of(b)
            if len(parts) != len(others):
                return False
            pairs.extend(zip(parts, others, strict=True))
        elif not _are_equal_leaves(a, b):
            return False
    return True


def _are_equal_leaves(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    return bool(left == right)


def unwrap_pickle(
    content: object, path: Path, key: str | None
) -> tuple[dict[str, Tensor], Wrapping, tuple[str, ...]]:
    """Find the tensors in a pickled file, and remove prefixes that all their names share.

    Returns:
        The tensors, the wrapping, and notes on what was read.

    Raises:
        CheckpointError: There is no state dict, or none of that key.
    """
    sets = find_weight_sets(content)
    if not sets:
        if isinstance(content, Mapping) and content:
            keys, kinds = list(content)[:5], {type(value).__name__ for value in content.values()}
            raise CheckpointError(
                f"{path}: found no state dict; got keys {keys} ({join_names(sorted(kinds))}), "
                "expected tensors by name"
            )
        raise CheckpointError(
            f"{path}: got a {type(content).__name__}, expected a state dict (tensors by name)"
        )
    read = sets[0] if key is None else choose_weight_set(sets, key)
    if read is None:
        raise _no_such_key(path, key, sets)
    for name, tensor in read.tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is sparse or quantized; expected plain tensors")
    names = _own_names(read, path)
    tensors = {own: read.tensors[name].detach() for own, name in names.items()}
    dropped: list[str] = []
    content = _without_code(content, dropped)
    beside = _without_code(read.beside, [])
    notes = _describe_choice(read, sets, path) if key is None else ()
    if dropped:
        notes += (f"{path.name}: set aside {join_names(dropped)}: names of code are not written",)
    wrapping = Wrapping(names, content, read.path, beside, versions=read.versions)
    return tensors, wrapping, notes


def _without_code(content: Any, dropped: list[str], seen: dict[int, Any] | None = None) -> Any:
    """Return the content without the entries that hold names of classes or the like.

    They are text here, and a file that holds them could not be read again.

    Args:
        content: The content; only mappings lose entries.
        dropped: Receives the names of the entries.
        seen: What was made of a mapping, by its id.
    """
    if not isinstance(content, Mapping) or not _holds(content, (Name, Storage)):
        return content
    pruned: dict[int, Any] = {} if seen is None else seen
    if id(content) in pruned:
        return pruned[id(content)]
    entries: dict[Any, Any] = {}
    pruned[id(content)] = entries  # now, since a mapping may hold itself
    for key, value in content.items():
        inner = _without_code(value, dropped, pruned)
        if _holds([key, inner], (Name, Storage)):
            dropped.append(str(key))
        else:
            entries[key] = inner
    return entries


def _no_such_key(path: Path, key: str | None, sets: Iterable[WeightSet]) -> CheckpointError:
    known = [item.key or "the whole file" for item in sets][:8]
    return CheckpointError(f'{path}: holds no weights under "{key}"; got {", ".join(known)}')


def _own_names(read: WeightSet, path: Path) -> dict[str, str]:
    prefix = common_prefix(read.tensors)
    if prefix in read.tensors:
        raise CheckpointError(f"{path}: a name is nothing but the prefix {prefix!r}")
    return {name[len(prefix) :]: name for name in read.tensors}


def join_names(names: Sequence[str], most: int = 6) -> str:
    """Join the first names, printable, and count the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(make_printable, names[:most])) + more


def _describe_choice(read: WeightSet, sets: Sequence[WeightSet], path: Path) -> tuple[str, ...]:
    complete = [key for key in list_complete_sets(read, sets) if key]
    if not complete:
        return ()
    verb = "is" if len(complete) == 1 else "are"
    note = (
        f"{path.name}: read {read.key or 'the whole file'}; {join_names(complete)} {verb} complete "
        f"too (--key {complete[0]})"
    )
    return (note,)


def wrap_safetensors(content: SafetensorsContent, key: str | None, path: Path) -> Wrapping:
    """Return the wrapping of a .safetensors file.

    Raises:
        CheckpointError: No name begins with the key.
    """
    read = WeightSet((), content.tensors, {})
    chosen = read if key is None else choose_weight_set([read], key)
    if chosen is None:
        raise _no_such_key(path, key, [read])
    own = (RECORD_KEY, DIGESTS_KEY)
    metadata = {name: text for name, text in content.metadata.items() if name not in own}
    names = {name: name for name in chosen.tensors}
    return Wrapping(names, beside=chosen.beside, metadata=metadata, is_safetensors=True)


def file_ending(path: Path) -> str | None:
    """Return the ending of a file that can be written, such as ".pth.tar"; None for others."""
    endings = [e for e in (".safetensors", *PICKLE_ENDINGS) if path.name.endswith(e)]
    return max(endings, key=len, default=None) if path.name not in endings else None


def soup_ending(path: Path | None, wrapping: Wrapping | None) -> str:
    """Return the ending of the soup of an ingredient: its own, if it can be written."""
    if wrapping is None or wrapping.is_safetensors or path is None:
        return ".safetensors"
    ending = file_ending(path)
    return ".pth" if ending in (None, ".safetensors") else ending

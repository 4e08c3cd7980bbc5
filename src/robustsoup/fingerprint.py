"""Fingerprints of code: digests that change when results may change."""

import ast
import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path, PurePath
from types import CellType, CodeType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustsoup.catalog import Registry, import_by_name


def code_fingerprint(function: Callable[..., object] | Sequence[type]) -> str:
    """Return a digest of a function's name, the code of its file and any arguments it binds.

    Comments and blank lines do not matter; modules that the file imports are not included.
    The function's bytecode, defaults and the variables that it takes from functions around it are
    included where several functions can share one name (lambdas and nested functions). Bytecode
    stands for the file where there is none (in a notebook). Tensors and networks count by value.

    Args:
        function: A function, a class, a partial or a callable object; or several classes.

    Returns:
        32 hexadecimal digits.
    """
    return hashlib.sha256(repr(_Describer().describe(function)).encode()).hexdigest()[:32]


def entry_fingerprint(registry: Registry, name: str) -> str | None:
    """Return the fingerprint of a user's code that a name stands for.

    Args:
        registry: Where the name is looked up.
        name: A built-in name, one that an installed package adds, or "package.module:function".

    Returns:
        As `code_fingerprint`; None for a built-in name.
    """
    if name in registry:
        return None
    entry = registry.find(name)
    target = name if entry is None else entry.target
    return code_fingerprint(import_by_name(target, label=f"{registry.name} {name}"))


def printed(value: object) -> str:
    """Return what an object prints, without the addresses that differ between processes."""
    return _ADDRESS.sub("", repr(value))


_SETS = (set, frozenset)
_PLAIN = (
    *(str, bytes, int, float, complex, type(None), type(Ellipsis), range, slice, PurePath),
    *(np.generic, torch.dtype, torch.device, torch.Size, torch.layout),
)
"""Types whose repr says all, in every process."""
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


class _Describer:
    """Describes functions and what they bind by values whose repr is the same in every process."""

    def __init__(self) -> None:
        self._open: set[int] = set()  # containers may hold themselves
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []  # so that no other object gets their ids
        self._sources: dict[str, str] = {}

    def describe(self, value: object) -> object:
        """Return the description of a function, an object or a plain value."""
        if isinstance(value, (*_PLAIN, ModuleType, Tensor, np.ndarray)):
            return _describe_leaf(value)
        if isinstance(value, (*_SETS, list, tuple, dict)):
            return self._describe_container(value)
        if id(value) in self._numbers:
            return f"#{self._numbers[id(value)]}"
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        return self._describe_new(value)

    def _describe_new(self, value: object) -> object:
        if isinstance(value, partial):
            return [self.describe(v) for v in (value.func, value.args, value.keywords)]
        if inspect.isroutine(value) or inspect.isclass(value):
            return self._describe_code(value)
        return self.describe(type(value)), self._describe_state(value)

    def _describe_container(self, items: Collection[object]) -> object:
        if id(items) in self._open:
            return "recursion"
        self._open.add(id(items))
        try:
            if isinstance(items, dict):
                return [(repr(key), self.describe(items[key])) for key in sorted(items, key=repr)]
            described = [self.describe(item) for item in items]
        finally:
            self._open.remove(id(items))
        ordered = sorted(described, key=repr) if isinstance(items, _SETS) else described
        return type(items).__name__, ordered

    def _describe_state(self, value: object) -> object:
        """Return the attributes of an object; of one without, what it prints."""
        if isinstance(value, nn.Module):  # hooks and modes change with use
            state = {k: v for k, v in vars(value).items() if k[:1] != "_" and k != "training"}
            state |= dict(value.named_parameters(recurse=False))
            state |= dict(value.named_buffers(recurse=False))
            return self.describe(state | dict(value.named_children()))
        slots = [name for kind in type(value).__mro__ for name in _list_slots(kind)]
        state = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        state |= getattr(value, "__dict__", {})
        return self.describe(state) if state else printed(value)

    def _describe_code(self, function: Any) -> object:
        """Return the description of a function, a method or a class."""
        owner = function.__self__ if inspect.ismethod(function) else None
        source = self._read_source(function)
        # The name may be shared: <lambda>, <locals>, wrappers with the name of what they wrap.
        is_shared = "<" in function.__qualname__ or getattr(function, "__closure__", None)
        body = self._describe_body(function) if is_shared or source is None else None
        wrapped = self.describe(getattr(function, "__wrapped__", None))
        return function.__qualname__, source, body, wrapped, self.describe(owner)

    def _describe_body(self, function: Any) -> object:
        """Return bytecode and bound values; the module's name of what has none."""
        if inspect.isclass(function):
            return function.__module__, self._describe_members(function)
        code = getattr(function, "__code__", None)
        if code is None:
            return getattr(function, "__module__", None)
        bound = [function.__defaults__, function.__kwdefaults__]
        bound += [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
        return self._describe_bytecode(code), self.describe(bound)

    def _describe_members(self, kind: type) -> list[tuple[str, object]]:
        """Return the members of a class that are written in Python."""
        members: list[tuple[str, object]] = []
        for name, member in sorted(vars(kind).items()):
            if name.startswith("__") and name not in ("__init__", "__call__"):
                continue
            if isinstance(member, property):
                member = (member.fget, member.fset, member.fdel)
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) or not (inspect.isroutine(member) or _is_slot(member)):
                members.append((name, self.describe(member)))
        return members

    def _describe_bytecode(self, code: CodeType) -> tuple[object, ...]:
        constants = [
            self._describe_bytecode(item) if isinstance(item, CodeType) else self.describe(item)
            for item in code.co_consts
        ]
        return code.co_code, code.co_names, constants

    def _read_source(self, function: Any) -> str | None:
        """Return a digest of the normalised source of the function's file; None without one."""
        try:
            path = inspect.getfile(function)
            if path not in self._sources:
                source = ast.unparse(ast.parse(Path(path).read_bytes()))
                self._sources[path] = hashlib.sha256(source.encode()).hexdigest()
            return self._sources[path]
        except (OSError, SyntaxError, TypeError, ValueError):
            return None


def _describe_leaf(value: object) -> object:
    if isinstance(value, ModuleType):
        return value.__name__
    return _describe_numbers(value) if isinstance(value, Tensor | np.ndarray) else value


def _describe_numbers(numbers: Tensor | np.ndarray[Any, Any]) -> object:
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().cpu().resolve_conj().resolve_neg()
        content = bytes(numbers.contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        content = repr(numbers.tolist()).encode() if numbers.dtype.hasobject else numbers.tobytes()
    return str(numbers.dtype), tuple(numbers.shape), hashlib.sha256(content).hexdigest()


def _list_slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _is_slot(member: object) -> bool:
    return inspect.isgetsetdescriptor(member) or inspect.ismemberdescriptor(member)


def _is_empty(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False

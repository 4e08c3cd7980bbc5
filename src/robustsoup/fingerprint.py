"""Fingerprints of code and networks: digests that change when results may change."""

import ast
import hashlib
import inspect
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import CellType, CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SMALL_BUFFER = 1000
"""Buffers with fewer elements than this enter a network's fingerprint by value."""


_SETS = (set, frozenset)


def code_fingerprint(function: Callable[..., object]) -> str:
    """Return a digest of a function's name, the code of its file and any arguments it binds.

    Comments and blank lines do not matter; modules that the file imports are not included.
    The function's bytecode, defaults and the variables that it takes from functions around it are
    included where several functions can share one name (lambdas and nested functions). Bytecode
    stands for the file where there is none (in a notebook). Tensors and networks count by value.

    Args:
        function: A function, a class, a partial or a callable object.

    Returns:
        32 hexadecimal digits.
    """
    return hashlib.sha256(repr(_Describer().describe(function)).encode()).hexdigest()[:32]


def network_fingerprint(model: nn.Module) -> str:
    """Return a digest of a network without its weights.

    It covers the printed architecture, `network_settings` and small non-persistent buffers (such
    as normalisation constants). Saved state resumes only for the same fingerprint.

    Returns:
        64 hexadecimal digits.
    """
    persistent = model.state_dict()
    constants = {
        name: tensor.tolist()
        for name, tensor in model.named_buffers()
        if name not in persistent and tensor.numel() < SMALL_BUFFER
    }
    text = f"{model} {getattr(model, 'network_settings', None)} {constants}"
    return hashlib.sha256(text.encode()).hexdigest()


class _Describer:
    """Describes functions and what they bind by values whose repr is the same in every process."""

    def __init__(self) -> None:
        self._open: set[int] = set()  # a function may be bound in itself
        self._sources: dict[str, str] = {}

    def describe(self, value: object) -> object:
        """Return the description of a function, an object or a plain value."""
        if id(value) in self._open:
            return "recursion"
        self._open.add(id(value))
        try:
            if callable(value):
                return self._describe_callable(value)
            return self._describe_value(value)
        finally:
            self._open.remove(id(value))

    def _describe_value(self, value: object) -> object:
        if isinstance(value, Tensor | np.ndarray):
            return _describe_numbers(value)
        if isinstance(value, (*_SETS, list, tuple, dict)):
            return type(value).__name__, self._describe_items(value)
        if type(value).__repr__ is object.__repr__:  # it prints an address
            return self._describe_object(value)
        return value

    def _describe_object(self, value: object) -> object:
        return self.describe(type(value)), self.describe(dict(getattr(value, "__dict__", {})))

    def _describe_items(self, items: Collection[object]) -> object:
        if isinstance(items, dict):
            return [(repr(key), self.describe(items[key])) for key in sorted(items, key=repr)]
        described = [self.describe(item) for item in items]
        return sorted(described, key=repr) if isinstance(items, _SETS) else described

    def _describe_callable(self, function: Callable[..., object]) -> object:
        if isinstance(function, partial):
            return [self.describe(v) for v in (function.func, function.args, function.keywords)]
        function = inspect.unwrap(function)
        if not (inspect.isroutine(function) or inspect.isclass(function)):
            return self._describe_object(function)
        owner = function.__self__ if inspect.ismethod(function) else None
        source = self._read_source(function)
        name_is_shared = "<" in function.__qualname__  # <lambda>, <locals>
        body = self._describe_body(function) if name_is_shared or source is None else None
        return function.__qualname__, source, body, self.describe(owner)

    def _describe_body(self, function: Callable[..., object]) -> object:
        """Return bytecode and bound values; the module's name of what has none."""
        if inspect.isclass(function):
            members = sorted(vars(function).items())
            return [
                (name, self.describe(getattr(member, "__func__", member)))
                for name, member in members
                if name in ("__init__", "__call__") or not name.startswith("__")
            ]
        code = getattr(function, "__code__", None)
        if code is None:
            return function.__module__
        bound = [getattr(function, name) for name in ("__defaults__", "__kwdefaults__")]
        bound += [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
        return _describe_bytecode(code), self.describe(bound)

    def _read_source(self, function: Callable[..., object]) -> str | None:
        """Return the normalised source of the function's file; None without one."""
        try:
            path = inspect.getfile(function)
            if path not in self._sources:
                self._sources[path] = ast.unparse(ast.parse(Path(path).read_bytes()))
            return self._sources[path]
        except (OSError, SyntaxError, TypeError, ValueError):
            return None


def _describe_numbers(numbers: Tensor | np.ndarray[Any, Any]) -> object:
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().cpu().resolve_conj().resolve_neg()
        content = bytes(numbers.contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        content = repr(numbers.tolist()).encode() if numbers.dtype.hasobject else numbers.tobytes()
    return str(numbers.dtype), tuple(numbers.shape), hashlib.sha256(content).hexdigest()


def _is_empty(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _describe_bytecode(code: CodeType) -> tuple[object, ...]:
    constants = [
        _describe_bytecode(item) if isinstance(item, CodeType) else item for item in code.co_consts
    ]
    return code.co_code, code.co_names, constants

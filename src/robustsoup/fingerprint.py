"""Fingerprints of code and networks: digests that change when results may change."""

import ast
import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType

from torch import nn

SMALL_BUFFER = 1000
"""Buffers with fewer elements than this enter a network's fingerprint by value."""


def code_fingerprint(function: Callable[..., object]) -> str:
    """Return a digest of a function's name, the code of its file and any arguments it binds.

    Comments and blank lines do not matter; modules that the file imports are not included.
    The function's bytecode is included where several functions can share one name (lambdas and
    nested functions), and stands for the file where there is none (in a notebook).

    Args:
        function: A function, a class, a partial or a callable object.

    Returns:
        32 hexadecimal digits.
    """
    return hashlib.sha256(repr(_describe_callable(function)).encode()).hexdigest()[:32]


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


def _describe_callable(function: Callable[..., object]) -> tuple[object, ...]:
    if isinstance(function, partial):
        bound = sorted(function.keywords.items())
        return _describe_callable(function.func), function.args, bound
    function = inspect.unwrap(function)
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        return _describe_callable(type(function)), sorted(vars(function).items())
    code = getattr(function, "__code__", None)
    name_is_shared = "<" in function.__qualname__  # <lambda>, <locals>
    bytecode = _describe_bytecode(code) if name_is_shared and code is not None else None
    return function.__qualname__, _describe_source(function), bytecode


def _describe_source(function: Callable[..., object]) -> object:
    """Return the normalised source of the function's file, else its bytecode or module name."""
    try:
        return ast.unparse(ast.parse(Path(inspect.getfile(function)).read_bytes()))
    except (OSError, SyntaxError, TypeError, ValueError):
        code = getattr(function, "__code__", None)
        return function.__module__ if code is None else _describe_bytecode(code)


def _describe_bytecode(code: CodeType) -> tuple[object, ...]:
    constants = [
        _describe_bytecode(item) if isinstance(item, CodeType) else item for item in code.co_consts
    ]
    return code.co_code, code.co_names, constants

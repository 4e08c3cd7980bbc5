"""What tells two pieces of a user's code apart: digests of their source."""

import ast
import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from torch import nn


def mark(function: Callable) -> str:
    """A digest of a function: its name, all the code of its file (comments and blank lines apart), what a partial binds.

    What that file imports is not in it. Where several may have one name, inside a function or without a file (in a notebook,
    say), the function's own compiled code counts.
    """
    return hashlib.sha256(repr(_parts(function)).encode()).hexdigest()[:32]


def _parts(function: Callable) -> tuple[Any, ...]:
    if isinstance(function, partial):
        return _parts(function.func), function.args, sorted(function.keywords.items())
    function = inspect.unwrap(function)
    if inspect.isroutine(function) or inspect.isclass(function):
        several = "<" in function.__qualname__ and hasattr(
            function, "__code__"
        )  # <lambda>, <locals>
        return (
            function.__qualname__,
            _code(function),
            _compiled(function.__code__) if several else None,
        )
    return _parts(type(function)), sorted(vars(function).items())  # an object that can be called


def _code(function: Callable) -> Any:
    try:
        return ast.unparse(ast.parse(Path(inspect.getfile(function)).read_bytes()))
    except (OSError, SyntaxError, TypeError, ValueError):
        return (
            _compiled(function.__code__) if hasattr(function, "__code__") else function.__module__
        )


def _compiled(code: CodeType) -> tuple[Any, ...]:
    inner = [_compiled(item) if isinstance(item, CodeType) else item for item in code.co_consts]
    return code.co_code, code.co_names, inner


def network_mark(model: nn.Module) -> str:
    """What a network is, apart from its weights: a saved state goes on under no other one."""
    kept = model.state_dict()
    hidden = {
        name: tensor.tolist()
        for name, tensor in model.named_buffers()
        if name not in kept and tensor.numel() < 1000
    }
    text = f"{model} {getattr(model, 'network_settings', None)} {hidden}"
    return hashlib.sha256(text.encode()).hexdigest()

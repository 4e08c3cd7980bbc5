"""Networks that are given as functions, and the modules that such a function calls."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType

from torch import Tensor, nn

from robustsoup.errors import ModelError


class FunctionNetwork(nn.Module):
    """A network without weights of its own: a function (b, ...) -> (b, classes)."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        """Call the function."""
        return self.function(x)


def as_module(model: object) -> nn.Module:
    """Return a module as it is, and a function as a module.

    Raises:
        ModelError: The model cannot be called, or is a function that calls a module in train mode.
    """
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise ModelError(
            f"network: got {type(model).__name__}, expected an nn.Module or a function that "
            "returns logits"
        )
    for module in _find_modules(model):
        if module.training:
            raise ModelError(
                f"network: the function calls a {type(module).__name__} in train mode, in which "
                "a pass changes its running statistics; call eval() on it first"
            )
    return FunctionNetwork(model)


def _find_modules(value: object, depth: int = 5) -> Iterator[nn.Module]:
    """Yield the modules that a function calls, as far as its code and arguments name them."""
    if isinstance(value, nn.Module):
        yield value
    elif depth:
        for held in _values_in(value):
            yield from _find_modules(held, depth - 1)


def _values_in(value: object) -> Iterable[object]:
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, FunctionType):
        return _named_values(value)
    if isinstance(value, MethodType):
        return _named_values(value.__func__, value.__self__)
    return _named_values(type(value).__call__, value) if callable(value) else ()


def _named_values(function: object, *bound: object) -> Iterator[object]:
    """Yield the values that the code of a function names, or their attributes that it names.

    Args:
        function: Anything; only functions of Python name values.
        *bound: The object whose method the function is.
    """
    if not isinstance(function, FunctionType):
        return
    names, empty = function.__code__.co_names, CellType()
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != empty]
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    for value in (*bound, *cells, *named, *(function.__defaults__ or ())):
        held = value._modules if isinstance(value, nn.Module) else getattr(value, "__dict__", {})
        yield from [held[name] for name in names if name in held] or [value]

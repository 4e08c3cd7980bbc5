"""Adapt a network to what attacks, training and measurements expect of it, without its help."""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import as_logits, frozen_eval
from robustsoup.errors import ModelError, RobustsoupError
from robustsoup.printable import first_line


class ContiguousInput:
    """A forward pre-hook that passes images on in the contiguous memory format."""

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs, the first one contiguous."""
        return (inputs[0].contiguous(), *inputs[1:])


class ClonedInput:
    """A forward pre-hook that passes on a copy, for a network that changes its input in place."""

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs, the first one cloned."""
        return (inputs[0].clone(), *inputs[1:])


class LogitsOutput:
    """A forward hook that takes the logits out of a tuple, a dict or a ModelOutput."""

    def __call__(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: object) -> Tensor:
        """Return the logits."""
        return as_logits(output)


def copy_network(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network, also of one that keeps derived tensors.

    Tensors that were computed from weights (by weight_norm's hooks, or an activation that a module
    keeps) cannot be deep-copied by PyTorch; the copy holds their values until its next pass.

    Raises:
        ModelError: The network holds something else that cannot be copied.
    """
    memo: dict[int, object] = {id(t): t.detach().clone() for t in _derived_tensors(model)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"network: {type(model).__name__} cannot be copied: {_describe_failure(error)}; "
            "keep what cannot be copied outside the network"
        ) from error


@torch.no_grad()
def adapt_network(model: nn.Module, x: Tensor) -> Tensor:
    """Make a network accept any memory format, keep its input and return logits, in place.

    Networks run in the channels-last memory format, which is faster; one that cannot (it calls
    `view` on a feature map) runs in the contiguous format. GroupNorm always gets contiguous input:
    on a CPU, PyTorch 2.13 ends the process in its backward pass if the input is channels-last and
    needs no gradient, as where a layer of a learned soup rests. Adapting twice changes nothing
    more.

    Args:
        model: The network; its modes stay.
        x: (b, c, h, w) images on its device.

    Returns:
        The logits of the images in eval mode.

    Raises:
        ModelError: The network does not take such images, or returns no logits.
    """
    if not _has_hook(model, LogitsOutput):
        model.register_forward_hook(LogitsOutput())
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and not _has_hook(module, ContiguousInput):
            module.register_forward_pre_hook(ContiguousInput())
    set_memory_format(model)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    try:
        return _call_once(model, channels_last)
    except RobustsoupError:
        raise
    except Exception as error:
        if _has_hook(model, ContiguousInput):
            raise _refuse(x, error) from error
        hook = model.register_forward_pre_hook(ContiguousInput())
        set_memory_format(model)
        try:
            return _call_once(model, channels_last)
        except Exception:
            hook.remove()
            raise _refuse(x, error) from error


def set_memory_format(model: nn.Module) -> nn.Module:
    """Lay a network's weights out in the memory format that it runs in; returns the network."""
    contiguous = _has_hook(model, ContiguousInput)
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    # PyTorch's annotations lack Module.to(memory_format=...).
    return model.to(memory_format=memory_format)  # pyrefly: ignore[no-matching-overload]


@torch.no_grad()
def check_train_mode(model: nn.Module, x: Tensor) -> None:
    """Check that a network takes images in train mode, on a copy.

    Args:
        model: The network, adapted.
        x: (b, c, h, w) images on its device.

    Raises:
        ModelError: The pass fails, as BatchNorm's does for a single value per channel.
    """
    try:
        copy_network(model).train()(x)
    except RobustsoupError:
        raise
    except Exception as error:
        raise ModelError(
            f"network: fails in train mode on {len(x)} images of shape {tuple(x.shape[1:])}: "
            f"{_describe_failure(error)}"
        ) from error


def _call_once(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of x; if the pass changes x, let the network have copies."""
    passed = x.clone()
    with frozen_eval(model):
        logits: Tensor = model(passed)
    if not torch.equal(passed, x) and not _has_hook(model, ClonedInput):
        model.register_forward_pre_hook(ClonedInput())
    return logits


def _has_hook(model: nn.Module, kind: type[object]) -> bool:
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
    return any(isinstance(hook, kind) for hook in hooks)


def _refuse(x: Tensor, error: Exception) -> ModelError:
    shape = tuple(x.shape[1:])
    return ModelError(f"network: does not take images of shape {shape}: {_describe_failure(error)}")


def _describe_failure(error: Exception) -> str:
    kind, line = type(error).__name__, first_line(error)
    return (
        line if isinstance(error, (RuntimeError, ValueError)) or line == kind else f"{kind}: {line}"
    )


def _derived_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in vars(module).values():
            yield from _tensors_with_history(value, depth=3)


def _tensors_with_history(value: object, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_with_history(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors_with_history(item, depth - 1)

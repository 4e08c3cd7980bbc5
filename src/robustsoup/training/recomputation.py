"""Activation checkpointing: compute the inside of a network's blocks again in the backward pass.

A backward pass needs the activations of its forward pass, which take most of the memory. Here a
block keeps only its input, and its other activations are computed again when the gradient reaches
it: about one more forward pass, for the memory of one block instead of all.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from robustsoup.errors import ModelError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
FEWEST_BLOCKS = 2
"""A network with one block would compute everything again and save nothing."""

_Buffers = dict[nn.Module, dict[str, Tensor]]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: the innermost entries of its containers that have layers.

    An entry of an nn.Sequential, nn.ModuleList or nn.ModuleDict that has layers of its own is a
    block, and so is an nn.Sequential of single layers; what contains such blocks is none itself.
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        if not _has_children(child):
            continue
        inner = find_blocks(child) if _holds_blocks(child) else []
        if inner:
            blocks += inner
        elif isinstance(model, CONTAINERS) or isinstance(child, nn.Sequential):
            blocks.append(child)
        else:
            blocks += find_blocks(child)
    return blocks


def check_recomputation(model: nn.Module) -> None:
    """Raise ModelError if a network has too few blocks for activation checkpointing."""
    if len(blocks := find_blocks(model)) < FEWEST_BLOCKS:
        raise ModelError(
            f"recompute_activations: got a network with {len(blocks)} blocks (modules with layers "
            f"of their own in an nn.Sequential, nn.ModuleList or nn.ModuleDict), expected "
            f"{FEWEST_BLOCKS} or more; leave the setting out, and use accumulate to save memory"
        )


@contextmanager
def recomputed_activations(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Checkpoint the activations of each block in the passes of the context.

    Outputs, gradients and buffers have the bits that they have without it: random numbers are drawn
    again, and BatchNorm updates its running statistics once. Passes without gradients stay as they
    are.

    Args:
        model: The network; forward and backward passes must both lie in the context.
        enabled: Whether to do anything.
    """
    with ExitStack() as stack:
        for block in find_blocks(model) if enabled else ():
            stack.enter_context(_checkpointed(block))
        yield


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    own = vars(block).get("forward")
    # An instance's forward hides that of its class; the hooks of the block still run.
    block.forward = partial(_run, block, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own  # type: ignore[method-assign]


def _run(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not is_grad_enabled():
        return forward(*inputs, **named)
    # A pass in eval mode leaves the buffers as they are.
    before = _copy_buffers(block) if block.training else {}

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _buffers_replaced(before)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


def _copy_buffers(block: nn.Module) -> _Buffers:
    return {
        module: {name: b.detach().clone() for name, b in module.named_buffers(recurse=False)}
        for module in block.modules()
    }


@contextmanager
def _buffers_replaced(buffers: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Let a repeated pass read and update the buffers of the first one, not the current ones."""
    current = {module: dict(module.named_buffers(recurse=False)) for module in buffers}
    try:
        _set_buffers(buffers)
        yield
    finally:
        _set_buffers(current)


def _set_buffers(buffers: Mapping[nn.Module, Mapping[str, Tensor]]) -> None:
    for module, tensors in buffers.items():
        for name, tensor in tensors.items():
            setattr(module, name, tensor)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _holds_blocks(module: nn.Module) -> bool:
    """Return whether a container within a module, or the module, has an entry with layers."""
    return any(
        isinstance(container, CONTAINERS) and any(map(_has_children, container.children()))
        for container in module.modules()
    )

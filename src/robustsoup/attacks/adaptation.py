"""Adapt a network to what attacks, training and measurements expect of it, without its help."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robustsoup.attacks.forward import as_logits, choose_logits, frozen_eval, set_mode
from robustsoup.errors import ModelError, RobustsoupError
from robustsoup.printable import first_line

FORMAT_TOLERANCE = 1e-3
"""Most that logits may differ between the memory formats, of the largest of them."""


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
    """A forward hook that takes the logits out of a tuple, a dict or a ModelOutput.

    Attributes:
        classes: The number of classes of the data; None if there is no data.
        inferred: Whether that is only the largest label plus 1.
    """

    classes: int | None = None
    inferred = False

    def __call__(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: object) -> Tensor:
        """Return the logits."""
        if self.classes is None:
            return as_logits(output)
        return choose_logits(output, self.classes, inferred=self.inferred)


def copy_network(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network, also of one that keeps derived tensors.

    Tensors that were computed from weights (by weight_norm's hooks, or an activation that a module
    keeps) cannot be deep-copied by PyTorch; the copy holds their values until its next pass.

    Raises:
        ModelError: The network holds something else that cannot be copied, or a copy would run
            with the weights of the original.
    """
    _refuse_scripts(model)
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(is_lazy, tensors)):
        raise ModelError(
            f"network: {type(model).__name__} has lazy weights, which have no shape yet; call it "
            "once on images"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ModelError(
            f"network: {type(model).__name__} is on the meta device, where weights have no values; "
            "build it on the CPU"
        )
    _refuse_functions_as_forward(model)
    memo: dict[int, object] = {id(t): t.detach().clone() for t in _derived_tensors(model)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"network: {type(model).__name__} cannot be copied: {_describe_failure(error)}; "
            "keep what cannot be copied outside the network"
        ) from error


@torch.no_grad()
def adapt_network(
    model: nn.Module, x: Tensor, classes: int | None = None, *, inferred: bool = False
) -> Tensor:
    """Make a network accept any memory format, keep its input and return logits, in place.

    Networks run in the channels-last memory format, which is faster. One that fails in it (it calls
    `view` on a feature map) or gives other logits in it (it calls `torch.as_strided`) runs in the
    contiguous format. GroupNorm always gets contiguous input: on a CPU, PyTorch 2.13 ends the
    process in its backward pass if the input is channels-last and needs no gradient, as where a
    layer of a learned soup rests. Adapting twice changes nothing more.

    Args:
        model: The network; its modes stay.
        x: (b, c, h, w) images on its device.
        classes: The number of classes of the data, which tells logits from features.
        inferred: Whether that is only the largest label plus 1.

    Returns:
        The logits of the images in eval mode.

    Raises:
        ModelError: The network does not take such images, or returns no logits.
    """
    _refuse_scripts(model)
    parameters = {name for name, _ in model.named_parameters()}
    if classes is not None:
        hook = _logits_hook(model)
        hook.classes, hook.inferred = classes, inferred
    logits = _adapt_until_it_runs(model, x)
    if late := [name for name, _ in model.named_parameters() if name not in parameters]:
        raise ModelError(
            f"network: its first pass added {late[0]}, which no checkpoint could fill; call the "
            "network once on images where it is built"
        )
    return logits


def _adapt_until_it_runs(model: nn.Module, x: Tensor) -> Tensor:
    _logits_hook(model)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and not _has_hook(module, ContiguousInput):
            module.register_forward_pre_hook(ContiguousInput())
    set_memory_format(model)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    try:
        logits = _call_once(model, channels_last)
    except RobustsoupError:
        raise
    except Exception as error:
        contiguous = _call_contiguous(model, channels_last, None)
        if contiguous is None:
            raise _refuse(model, x, error) from error
        return contiguous
    contiguous = _call_contiguous(model, channels_last, logits)
    return logits if contiguous is None else contiguous


def _call_contiguous(model: nn.Module, x: Tensor, known: Tensor | None) -> Tensor | None:
    """Move a network to the contiguous format if its logits there are others than the known ones.

    Returns:
        Its logits in that format, or None if it stays where it is.
    """
    if _has_hook(model, ContiguousInput):
        return None
    move_back = _move_to_contiguous(model)
    with contextlib.suppress(Exception):
        logits = _call_once(model, x)
        # A network that draws random numbers differs from itself in any format.
        if known is None or (not _agree(known, logits) and _agree(logits, _call_once(model, x))):
            return logits
    move_back()
    return None


def _move_to_contiguous(model: nn.Module) -> Callable[[], None]:
    """Let a network run in the contiguous format; returns a function that moves it back."""
    hook = model.register_forward_pre_hook(ContiguousInput())
    set_memory_format(model)

    def move_back() -> None:
        hook.remove()
        set_memory_format(model)

    return move_back


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether the logits of two formats are the same, but for rounding."""
    if first.shape != second.shape:
        return False
    tolerance = FORMAT_TOLERANCE * second.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(first, second, rtol=0, atol=tolerance, equal_nan=True)


def _logits_hook(model: nn.Module) -> LogitsOutput:
    """Return the hook that takes the logits out of the output of a network, which gains it."""
    for hook in model._forward_hooks.values():
        if isinstance(hook, LogitsOutput):
            return hook
    added = LogitsOutput()
    model.register_forward_hook(added)
    return added


def set_memory_format(model: nn.Module) -> nn.Module:
    """Lay a network's weights out in the memory format that it runs in; returns the network."""
    contiguous = _has_hook(model, ContiguousInput)
    memory_format = torch.contiguous_format if contiguous else torch.channels_last

    def lay_out(tensor: Tensor) -> Tensor:  # Module.to fails on the 5-d weights of Conv3d
        return tensor.to(memory_format=memory_format) if tensor.dim() == 4 else tensor

    return model._apply(lay_out)


def check_train_mode(model: nn.Module, x: Tensor) -> None:
    """Check that a network takes images in train mode and has a gradient, on a copy.

    A network that fails there in the channels-last memory format alone, as one that calls `view` in
    train mode only, is adapted to the contiguous format in place.

    Args:
        model: The network, adapted.
        x: (b, c, h, w) images on its device.

    Raises:
        ModelError: The pass fails, as BatchNorm's does for a single value per channel, or no
            gradient of the logits reaches a weight.
    """
    try:
        _try_train_mode(model, x)
    except ModelError:
        if _has_hook(model, ContiguousInput):
            raise
        move_back = _move_to_contiguous(model)
        try:
            _try_train_mode(model, x)
        except ModelError:
            move_back()
            raise


def _try_train_mode(model: nn.Module, x: Tensor) -> None:
    probe = copy_network(model)
    try:
        set_mode(probe, training=True)
        weights = enable_gradients(probe)
        with torch.enable_grad():
            logits = as_logits(probe(x))
            if logits.requires_grad:
                logits.float().sum().backward()
    except RobustsoupError:
        raise
    except Exception as error:
        raise ModelError(
            f"network: fails in train mode on {len(x)} images of shape {tuple(x.shape[1:])}: "
            f"{_describe_failure(error)}"
        ) from error
    if all(weight.grad is None for weight in weights):
        raise ModelError(
            "network: no gradient of its logits reaches its weights, so nothing can be learned; "
            "does its forward run under torch.no_grad()?"
        )


def enable_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Let every weight of a network require a gradient, also frozen ones; return them."""
    weights = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    return weights


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


def _refuse(model: nn.Module, x: Tensor, error: Exception) -> ModelError:
    types = {p.dtype for p in model.parameters() if p.is_floating_point()} - {x.dtype}
    other = str(next(iter(types), "")).removeprefix("torch.")
    hint = f"; its weights are {other} and images float32: convert it with float()" if other else ""
    return ModelError(
        f"network: does not take images of shape {tuple(x.shape[1:])}: "
        f"{_describe_failure(error)}{hint}"
    )


def _describe_failure(error: Exception) -> str:
    kind, line = type(error).__name__, first_line(error)
    return (
        line if isinstance(error, (RuntimeError, ValueError)) or line == kind else f"{kind}: {line}"
    )


def _refuse_scripts(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "network: got a TorchScript module, which cannot be adapted; "
            "give the nn.Module that it was made of"
        )


def _refuse_functions_as_forward(model: nn.Module) -> None:
    """Refuse a forward that was set on a module and holds modules of the network.

    A copy would call it, and so the modules of the original.
    """
    modules = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:  # torch.compile makes its forward again for a copy
            continue
        if _holds_one_of(modules, vars(module).get("forward"), depth=3):
            raise ModelError(
                f"network: forward of {name or type(module).__name__} was replaced by a function "
                "that holds the network, so a copy would run with the weights of the original; "
                "define it in a class, or bind it with types.MethodType"
            )


def _holds_one_of(modules: set[int], function: object, depth: int) -> bool:
    if not isinstance(function, FunctionType) or not depth:
        return False  # bound methods and partial functions are copied with their modules
    for cell in function.__closure__ or ():
        held = cell.cell_contents
        if id(held) in modules or id(getattr(held, "__self__", None)) in modules:
            return True
        if _holds_one_of(modules, held, depth - 1):
            return True
    return False


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

"""Build a network from its name: a built-in one, or a factory in the user's own code."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustsoup.errors import ModelError
from robustsoup.fingerprint import code_fingerprint
from robustsoup.models.network import ChannelConstants, NetworkSettings, channel_constants
from robustsoup.models.preact_resnet import preact_resnet18
from robustsoup.models.resnet import resnet18, resnet50
from robustsoup.models.resnet9 import resnet9
from robustsoup.models.wide_resnet import constants, wide_resnet

Factory = Callable[..., nn.Module]
OptionValue = int | float | str | list[float]

MODELS: dict[str, Factory] = {
    "resnet9": resnet9,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "wide_resnet": wide_resnet,
    "preact_resnet18": preact_resnet18,
}
SIZE_OPTIONS = frozenset({"width", "depth", "classes", "channels"})
"""Options of built-in networks that must be positive integers."""
CONSTANTS_IN_CODE = ("wide_resnet", "preact_resnet18")
"""Networks whose published files hold neither mean nor std; without `normalize` they use the
published constants."""


def load_model(
    spec: str,
    *,
    classes: int = 10,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        spec: "resnet9", "resnet9:width=16" or "package.module:factory[:key=value,...]".
        classes: number of classes; a factory receives it only if its signature names it.
        channels: number of input channels; passed on as `classes` is.
        mean: per-channel mean that a built-in network subtracts from its inputs.
        std: per-channel standard deviation that a built-in network divides its inputs by.
        normalize: (mean, std) by channel, for a network that expects normalized inputs; applied
            before the network, whose state dict keeps its own names. The networks in
            CONSTANTS_IN_CODE use these constants instead of `mean` and `std`.
        seed: seed of the weights; the global generator keeps its state.

    Returns:
        The network. Its attribute `network_settings` holds what it was built with, and a Checkpoint
        of it records that.

    Raises:
        ModelError: an unknown name, a wrong option, or a factory that returns no nn.Module.
    """
    settings = NetworkSettings(spec, classes, channels, channel_constants(normalize))
    return build_network(settings, mean=mean, std=std, seed=seed)


def build_network(
    settings: NetworkSettings,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build the network that the settings describe; arguments and errors as in `load_model`."""
    name, _, rest = settings.spec.partition(":")
    constants_in_code = name in CONSTANTS_IN_CODE
    if constants_in_code:
        mean, std = settings.normalize or (mean, std)
        normalize = _unpublished_constants(mean, std, settings.channels)
        settings = replace(settings, normalize=normalize)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name in MODELS:
            model = _build_builtin(settings, mean, std)
        elif "." in name or rest:
            model = _build_from_factory(settings)
        else:
            raise _unknown_model(settings.spec)
    if settings.normalize and not constants_in_code:
        normalize_inputs(model, *settings.normalize)
    model.network_settings = settings
    return model


def factory_fingerprint(spec: str) -> str | None:
    """Return the fingerprint of a factory's source file; None for a built-in network."""
    name, _, rest = spec.partition(":")
    if name in MODELS:
        return None
    return code_fingerprint(_import_factory(name, rest.partition(":")[0], spec))


def normalize_inputs(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Make `model` normalize its inputs before its forward; the names in its state dict stay.

    Args:
        model: the network; modified in place and returned.
        mean: one number a channel, subtracted from the inputs.
        std: one positive number a channel, by which the inputs are divided.

    Raises:
        ModelError: mean and std differ in length, or a std is not positive.
    """
    channel_constants((mean, std))
    shape = (1, -1, 1, 1)
    model.register_buffer("input_mean", torch.tensor(list(mean)).view(shape), persistent=False)
    model.register_buffer("input_std", torch.tensor(list(std)).view(shape), persistent=False)
    model.register_forward_pre_hook(_normalize_hook)
    return model


def _normalize_hook(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((inputs[0] - model.input_mean) / model.input_std, *inputs[1:])


def _unpublished_constants(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> ChannelConstants | None:
    """Return (mean, std) if both are given and differ from the published constants."""
    if mean is None or std is None or (list(mean), list(std)) == constants(channels):
        return None
    return tuple(mean), tuple(std)


def _build_builtin(
    settings: NetworkSettings, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    name, _, text = settings.spec.partition(":")
    options = _parse_options(text, settings.spec)
    for key in SIZE_OPTIONS & options.keys():
        value = options[key]
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f'model "{settings.spec}": {key}: got {value}, expected an integer of at least 1'
            )
    defaults: dict[str, OptionValue] = {"classes": settings.classes, "channels": settings.channels}
    if mean is not None and std is not None:
        defaults |= {"mean": list(mean), "std": list(std)}
    return _call_factory(MODELS[name], defaults | options, settings.spec)


def _build_from_factory(settings: NetworkSettings) -> nn.Module:
    module, _, rest = settings.spec.partition(":")
    name, _, text = rest.partition(":")
    factory = _import_factory(module, name, settings.spec)
    accepted = _parameter_names(factory)
    sizes = {"classes": settings.classes, "channels": settings.channels}
    options = {key: value for key, value in sizes.items() if key in accepted}
    model = _call_factory(factory, options | _parse_options(text, settings.spec), settings.spec)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f'model "{settings.spec}": the factory returned {type(model).__name__}, '
            "expected a torch.nn.Module"
        )
    return model


def _unknown_model(spec: str) -> ModelError:
    close = difflib.get_close_matches(spec.partition(":")[0], MODELS, 1)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    return ModelError(
        f'model "{spec}": unknown{hint} Expected one of {", ".join(MODELS)} '
        'or "package.module:factory"'
    )


def _parse_options(text: str, spec: str) -> dict[str, OptionValue]:
    """Parse "key=value,..." after the name of a network; values become int or float if possible."""
    options: dict[str, OptionValue] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise ModelError(
                f'model "{spec}": got "{part}", expected key=value as in "resnet9:width=16"'
            )
        if key in options:
            raise ModelError(f'model "{spec}": got {key} twice')
        options[key] = _parse_number(value.strip())
    return options


def _parse_number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _parameter_names(factory: Factory) -> set[str]:
    try:
        return set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return set()


def _import_factory(module: str, name: str, spec: str) -> Factory:
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ModelError(
            f'model "{spec}": module "{error.name}" cannot be found; is it on the Python path?'
        ) from None
    if factory is None:
        raise ModelError(f'model "{spec}": module "{module}" has no "{name}"')
    return factory


def _call_factory(factory: Factory, options: dict[str, OptionValue], spec: str) -> nn.Module:
    try:
        return factory(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f'model "{spec}": cannot be built with {options}: {error}') from None

"""From the name of a network to the network."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robustsoup import fingerprint
from robustsoup.errors import ModelError
from robustsoup.models.preact_resnet import preact_resnet18
from robustsoup.models.resnet import resnet18, resnet50
from robustsoup.models.resnet9 import resnet9
from robustsoup.models.wide_resnet import constants, wide_resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet9": resnet9,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "wide_resnet": wide_resnet,
    "preact_resnet18": preact_resnet18,
}
SIZES = {"width", "depth", "classes", "channels"}
"""Options of built-in networks that count something."""
CONSTANTS_IN_CODE = ("wide_resnet", "preact_resnet18")
"""Networks whose published files hold neither mean nor std: `normalize` says which, else they are the published ones."""


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
    """Build a network with fresh weights from "resnet9", "resnet9:width=16" or "package.module:factory[:key=value,...]".

    A built-in network gets classes, channels, mean and std (normalisation is inside it). A factory gets only what its
    signature names of classes and channels, and its own key=value pairs. What it was built with is kept in its attribute
    `network_settings`, which a Checkpoint of it records. normalize: (mean, std) by channel, for a
    network that expects it outside: it is then applied before the network, whose state dict keeps its own names. The networks
    in CONSTANTS_IN_CODE normalise by it instead of mean and std, and record as it what is not published.
    The weights come from `seed`; the global generator is left as it was.

    Raises ModelError for an unknown name, a wrong option, or a factory that does not return an nn.Module.
    """
    name, _, rest = spec.partition(":")
    if normalize:
        _check_constants(*normalize)
    if name in CONSTANTS_IN_CODE:
        mean, std = normalize or (mean, std)
        normalize = _recorded(mean, std, channels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name in MODELS:
            options = _options(rest, spec)
            for key in SIZES & options.keys():
                if not isinstance(options[key], int) or options[key] < 1:
                    raise ModelError(
                        f'model "{spec}": {key}: got {options[key]}, expected a whole number of at least 1'
                    )
            given = {"classes": classes, "channels": channels}
            if mean is not None and std is not None:
                given |= {"mean": list(mean), "std": list(std)}
            model = _call(MODELS[name], {**given, **options}, spec)
        elif "." in name or rest:
            factory, _, rest = rest.partition(":")
            function = _find(name, factory, spec)
            named = _parameters(function)
            given = {
                k: v for k, v in {"classes": classes, "channels": channels}.items() if k in named
            }
            model = _call(function, {**given, **_options(rest, spec)}, spec)
        else:
            near = difflib.get_close_matches(name, MODELS, 1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ModelError(
                f'model "{spec}": unknown{hint} Expected one of {", ".join(MODELS)} or "package.module:factory"'
            )
    if not isinstance(model, nn.Module):
        raise ModelError(
            f'model "{spec}": the factory returned {type(model).__name__}, expected a torch.nn.Module'
        )
    if normalize and name not in CONSTANTS_IN_CODE:
        normalized(model, *normalize)
    model.network_settings = {
        "spec": spec,
        "classes": classes,
        "channels": channels,
        "normalize": normalize and [list(part) for part in normalize],
    }
    return model


def code_mark(spec: str) -> str | None:
    """What tells two factories of one name apart: a digest of the code of its file; None for a built-in network."""
    name, _, rest = spec.partition(":")
    return None if name in MODELS else fingerprint.mark(_find(name, rest.partition(":")[0], spec))


def normalized(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Make `model` subtract mean and divide by std (one number a channel) before its forward; its names do not change.

    Raises ModelError if mean and std differ in length or a std is not positive.
    """
    _check_constants(mean, std)
    shape = (1, -1, 1, 1)
    model.register_buffer("input_mean", torch.tensor(list(mean)).view(shape), persistent=False)
    model.register_buffer("input_std", torch.tensor(list(std)).view(shape), persistent=False)
    model.register_forward_pre_hook(_normalize_input)
    return model


def _check_constants(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != len(std) or not mean or min(std) <= 0:
        raise ModelError(
            f"normalize: got mean {list(mean)} and std {list(std)}, expected as many of both, std above 0"
        )


def _recorded(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[Sequence[float], Sequence[float]] | None:
    """(mean, std) where they are given and not those that the network has by itself."""
    if mean is None or std is None or (list(mean), list(std)) == constants(channels):
        return None
    return mean, std


def _normalize_input(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((inputs[0] - model.input_mean) / model.input_std, *inputs[1:])


def _options(text: str, spec: str) -> dict:
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ModelError(
                f'model "{spec}": got "{part}", expected key=value as in "resnet9:width=16"'
            )
        if key.strip() in options:
            raise ModelError(f'model "{spec}": got {key.strip()} twice')
        options[key.strip()] = _number(value.strip())
    return options


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _parameters(function: Callable) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _find(module: str, name: str, spec: str) -> Callable:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ModelError(
            f'model "{spec}": module "{error.name}" cannot be found; is it on the Python path?'
        ) from None
    if found is None:
        raise ModelError(f'model "{spec}": module "{module}" has no "{name}"')
    return found


def _call(function: Callable[..., nn.Module], options: dict, spec: str) -> nn.Module:
    try:
        return function(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f'model "{spec}": cannot be built with {options}: {error}') from None

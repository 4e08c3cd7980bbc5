"""Build a network by its name; the catalog lists the built-in ones and the other sources."""

import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from robustsoup.catalog import DATA_SOURCES, MODELS, Entry, import_by_name
from robustsoup.errors import ModelError, RobustsoupError
from robustsoup.fingerprint import code_fingerprint, printed
from robustsoup.models.libraries import (
    InputSettings,
    Library,
    LibrarySpec,
    OptionValue,
    may_be_recorded,
)
from robustsoup.models.network import (
    LARGEST_SIZES,
    MOST_WEIGHTS,
    ChannelConstants,
    NetworkSettings,
    attach_network_settings,
    channel_constants,
    network_settings_of,
)
from robustsoup.models.normalize import normalize_inputs
from robustsoup.models.robustbench_networks import PUBLISHED_NETWORKS
from robustsoup.models.wide_resnet import published_constants
from robustsoup.precision import full_float32
from robustsoup.printable import first_line
from robustsoup.settings import plain_number

Factory = Callable[..., nn.Module]
_OTHER_NAMES = {
    "classes": ("num_classes", "n_classes", "nb_classes", "nclasses", "num_labels"),
    "channels": ("in_channels", "in_chans", "num_channels", "n_channels", "num_input_channels"),
}
"""What factories of other libraries call these sizes."""
SMALL_BUFFER = 1000
"""Buffers with fewer elements than this enter a network's fingerprint by value."""
_KNOWN_PACKAGES = ("builtins", "torch", "robustsoup")
"""Packages whose classes enter a network's fingerprint by name alone."""
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None}
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_model(
    spec: str | Factory,
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
        spec: "resnet9", "resnet9:width=16", "timm:NAME", "hf:FOLDER" or another source of the
            catalog, "package.module:factory[:key=value,...]", or a function at the top level of a
            module.
        classes: Number of classes; a factory receives it as `classes` if its signature names it,
            or as `num_classes` and the like if it requires that.
        channels: Number of input channels; passed under the same condition, also as `in_channels`.
        mean: Per-channel mean that a built-in network subtracts from its inputs.
        std: Per-channel standard deviation that a built-in network divides its inputs by.
        normalize: (mean, std) by channel, for a network that expects normalized inputs; applied
            before the network, whose state dict keeps its own names. Networks with published
            constants (see the catalog) use these constants instead of `mean` and `std`. By default
            the constants of the network's own configuration, where its library has one.
        seed: Seed of the weights; the global generator keeps its state.

    Returns:
        The network. Its attribute `network_settings` holds the settings that it was built from,
        which a Checkpoint of it records; `input_settings` holds how the network of a library
        expects its images.

    Raises:
        ModelError: An unknown name, a wrong option, or a factory that returns no nn.Module.
    """
    text = spec_text(spec)
    classes, channels, seed = map(plain_number, (classes, channels, seed))
    settings = NetworkSettings(text, classes, channels, channel_constants(normalize))
    return build_network(settings, mean=mean, std=std, seed=seed)


def build_network(
    settings: NetworkSettings,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build the network that the settings describe; arguments and errors as in `load_model`."""
    settings = complete_settings(settings)
    name, _, rest = settings.spec.partition(":")
    entry = MODELS.get(name)
    library = _find_library(settings.spec)
    skeleton = build_skeleton(settings) if entry is not None else None
    if skeleton is not None:
        _check_weights(skeleton, settings.spec)
    has_constants = entry is not None and "published_constants" in entry.facts
    if has_constants:
        mean, std = settings.normalize or (mean, std)
        normalize = _unpublished_constants(mean, std, settings.channels)
        settings = replace(settings, normalize=normalize)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if library is not None:
            model = library.build(_library_spec(settings.spec), settings)
        elif entry is not None:
            model = _build_builtin(entry, settings, mean, std)
        elif "." in name or (rest and MODELS.find(name) is None):
            factory_name, _, options = rest.partition(":")
            factory = _import_factory(name, factory_name, settings.spec)
            model = _build_from_factory(factory, options, settings)
        else:
            factory = MODELS.get_entry(name, error=ModelError).load()
            model = _build_from_factory(factory, rest, settings)
    if settings.normalize and not has_constants:
        normalize_inputs(model, *settings.normalize)
    attach_network_settings(model, settings)
    vars(model)["input_settings"] = input_settings(settings)
    return model


def complete_settings(settings: NetworkSettings) -> NetworkSettings:
    """Return the settings with what the network's own configuration adds.

    Published networks of RobustBench become the built-in network that loads their checkpoints, and
    the constants of a library's configuration are used unless the settings have others.

    Raises:
        ModelError: The library is not installed or does not list the network.
    """
    source, _, name = settings.spec.partition(":")
    if source == "robustbench" and name in PUBLISHED_NETWORKS:
        return replace(settings, spec=PUBLISHED_NETWORKS[name])
    if settings.normalize is not None:
        return settings
    return replace(settings, normalize=input_settings(settings).normalize)


def input_settings(settings: NetworkSettings) -> InputSettings:
    """Return how a network expects its images; empty for a network that is not of a library.

    Raises:
        ModelError: As `complete_settings`.
    """
    library = _find_library(settings.spec)
    if library is None:
        return InputSettings()
    return library.read_inputs(_library_spec(settings.spec), settings)


def default_image_size(data: str, model: str | None) -> int | None:
    """Return the side in pixels to which image files are resized for a library's network.

    Args:
        data: The data, as `load_data` takes it.
        model: The network, as `load_model` takes it, or None.

    Returns:
        The side that the network's own configuration names; None if it names none or a rectangle,
        or if the data has a size of its own.
    """
    entry = DATA_SOURCES.get(data.partition(":")[0])
    if model is None or entry is None or not entry.facts.get("decodes"):
        return None
    height, width = input_settings(NetworkSettings(model)).size or (0, 0)
    return height if height == width and height else None


def is_built_in(spec: str) -> bool:
    """Return whether a spec that a file records may be built.

    It may if it names a network of the catalog, or one that an installed library lists itself,
    with no options but numbers of a bounded size, True and False. Every other spec names code, or
    a place from which code or settings are read; these are used only if the user names them.
    """
    library = _find_library(spec)
    if library is None:
        return spec.partition(":")[0] in MODELS
    try:
        network = _library_spec(spec)
    except ModelError:
        return False
    return library.lists is not None and may_be_recorded(network) and library.lists(network)


def build_skeleton(settings: NetworkSettings) -> nn.Module | None:
    """Return a network of the catalog whose tensors have shapes but take no memory.

    None if a library's network cannot be built in this way: code that a user names, and networks
    that read the values of tensors while they are built.

    Raises:
        ModelError: As `load_model`.
    """
    entry = MODELS.get_entry(settings.spec.partition(":")[0], error=ModelError)
    library = _find_library(settings.spec)
    with torch.device("meta"):
        if library is None:
            return _build_builtin(entry, settings, None, None)
        network = _library_spec(settings.spec)
        if library.lists is None or not library.lists(network):
            return None
        try:
            return library.build(network, settings)
        except ModelError:
            return None


def build_known_skeleton(settings: NetworkSettings) -> nn.Module | None:
    """Return what `build_skeleton` does for a spec that may be built; None for any other."""
    return build_skeleton(settings) if is_built_in(settings.spec) else None


def _find_library(spec: str) -> Library | None:
    """Return the library that a spec names as its source, if any."""
    entry = MODELS.get(spec.partition(":")[0])
    return entry.load() if entry is not None and entry.facts.get("library") else None


def _library_spec(spec: str) -> LibrarySpec:
    """Parse "SOURCE:NAME[:key=value,...]"; a colon or an equals sign may be part of the name.

    Raises:
        ModelError: There is no name, or a part of the options is not key=value.
    """
    source, _, rest = spec.partition(":")
    name, colon, text = rest.rpartition(":")
    if not colon or "=" not in text:
        name, text = rest, ""
    if not name:
        raise ModelError(f'model "{spec}": got no name, expected {MODELS[source].spelling}')
    return LibrarySpec(spec, name, _parse_options(text, spec))


def _check_weights(skeleton: nn.Module, spec: str) -> None:
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    if weights > MOST_WEIGHTS:
        raise ModelError(
            f'model "{spec}": has {weights:,} weights, expected at most {MOST_WEIGHTS:,}; '
            "choose a smaller width or depth"
        )


def factory_fingerprint(spec: str) -> str | None:
    """Return a text that changes with the code of a network; None for a built-in network."""
    name, _, rest = spec.partition(":")
    if name == "robustbench" and rest in PUBLISHED_NETWORKS:
        return None
    if (library := _find_library(spec)) is not None:
        return library.fingerprint(_library_spec(spec))
    if MODELS.get(name) is not None:
        return None
    if (plugin := MODELS.find(name)) is not None:
        return code_fingerprint(plugin.load())
    return code_fingerprint(_import_factory(name, rest.partition(":")[0], spec))


def network_fingerprint(model: nn.Module) -> str:
    """Return a digest of a network without its weights.

    It covers the printed architecture, `network_settings`, small non-persistent buffers (such as
    normalisation constants) and the user's code: that of the factory that the settings name, and
    that of the modules' classes. Saved state resumes only for the same fingerprint.

    Returns:
        64 hexadecimal digits.
    """
    persistent = model.state_dict()
    constants = {
        name: tensor.tolist()
        for name, tensor in model.named_buffers()
        if name not in persistent and tensor.numel() < SMALL_BUFFER
    }
    settings = network_settings_of(model)
    parts = [printed(model), settings, constants, _fingerprint_classes(model)]
    parts.append(None if settings is None else _fingerprint_known_factory(settings.spec))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _fingerprint_classes(model: nn.Module) -> str:
    classes = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
    return code_fingerprint(
        [kind for kind in classes if kind.__module__.partition(".")[0] not in _KNOWN_PACKAGES]
    )


def _fingerprint_known_factory(spec: str) -> str | None:
    """Return the fingerprint of a factory; None if a network names one that is not found here."""
    try:
        return factory_fingerprint(spec)
    except RobustsoupError:
        return None


def _unpublished_constants(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> ChannelConstants | None:
    """Return (mean, std) if both are given and differ from the published constants."""
    if mean is None or std is None or (list(mean), list(std)) == published_constants(channels):
        return None
    return tuple(mean), tuple(std)


def _build_builtin(
    entry: Entry,
    settings: NetworkSettings,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> nn.Module:
    options = _parse_options(settings.spec.partition(":")[2], settings.spec)
    defaults: dict[str, OptionValue] = {"classes": settings.classes, "channels": settings.channels}
    if mean is not None and std is not None:
        defaults |= {"mean": list(mean), "std": list(std)}
    for key, value in options.items():
        if value is None or isinstance(value, bool):
            raise ModelError(f'model "{settings.spec}": {key}: got {value}, expected a number')
    options = defaults | options
    for key in LARGEST_SIZES.keys() & options.keys():
        value, largest = options[key], LARGEST_SIZES[key]
        if not isinstance(value, int) or not 1 <= value <= largest:
            raise ModelError(
                f'model "{settings.spec}": {key}: got {value}, '
                f"expected an integer from 1 to {largest:,}"
            )
    return _call_factory(entry.load(), options, settings.spec)


def _build_from_factory(factory: Factory, text: str, settings: NetworkSettings) -> nn.Module:
    """Call a factory that is not built in with the options that it accepts."""
    options = _size_options(factory, settings) | _parse_options(text, settings.spec)
    _check_required(factory, options, settings.spec)
    model = _call_factory(factory, options, settings.spec)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f'model "{settings.spec}": the factory returned {type(model).__name__}, '
            "expected a torch.nn.Module"
        )
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ModelError(
            f'model "{settings.spec}": has lazy weights, which have no shape yet; give a function '
            "that calls the network once on images and returns it"
        )
    return model


def spec_text(named: str | Factory) -> str:
    """Return the text form of a spec, by which a checkpoint can record it.

    Args:
        named: A text, or a function at the top level of a module.

    Raises:
        ModelError: It is something else, such as a network or a path.
    """
    if isinstance(named, str):
        return named
    module, name = (getattr(named, key, None) for key in ("__module__", "__qualname__"))
    if not isinstance(module, str) or not isinstance(name, str):
        raise ModelError(
            f'model: got {type(named).__name__}, expected a name such as "resnet9", or a function '
            "at the top level of a module that builds the network"
        )
    spec = f"{module}:{name}"
    if "." in name or _import_factory(module, name, spec) is not named:
        raise ModelError(
            f'model "{spec}": a checkpoint could not record this function; '
            "define it at the top level of a module, or pass the nn.Module itself"
        )
    return spec


def _parse_options(text: str, spec: str) -> dict[str, OptionValue]:
    """Parse "key=value,..." after the name of a network.

    Numbers become int or float; True, true, False, false and None become what they say.
    """
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
        options[key] = _parse_value(value.strip())
    return options


def _parse_value(text: str) -> int | float | bool | str | None:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _size_options(factory: Factory, settings: NetworkSettings) -> dict[str, OptionValue]:
    """Return the sizes that a factory asks for by name.

    `classes` and `channels` are passed whether or not they have a default, other names only if the
    factory requires them.
    """
    parameters, required = _parameters(factory), _required_names(factory)
    sizes = {"classes": settings.classes, "channels": settings.channels}
    options: dict[str, OptionValue] = {}
    for size, value in sizes.items():
        options |= {name: value for name in required if name in _OTHER_NAMES[size]}
        if size in parameters:
            options[size] = value
    return options


def _check_required(factory: Factory, options: Collection[str], spec: str) -> None:
    """Check that a factory gets each argument that it requires.

    Raises:
        ModelError: Names those that are missing, and how to give them.
    """
    missing = [name for name in _required_names(factory) if name not in options]
    if missing:
        beginning = spec + ("," if spec.count(":") > 1 else ":")
        raise ModelError(
            f'model "{spec}": the factory requires {", ".join(missing)}; write '
            f"{beginning}{','.join(f'{name}=VALUE' for name in missing)}"
        )


def _required_names(factory: Factory) -> list[str]:
    return [
        parameter.name
        for parameter in _parameters(factory).values()
        if parameter.default is parameter.empty and parameter.kind in _BY_NAME
    ]


def _parameters(factory: Factory) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}


def _import_factory(module: str, name: str, spec: str) -> Factory:
    return import_by_name(f"{module}:{name}", label=f'model "{spec}"', error=ModelError)


def _call_factory(factory: Factory, options: dict[str, OptionValue], spec: str) -> nn.Module:
    try:
        with full_float32():  # weights are float32 for any default dtype
            return factory(**options)
    except (RobustsoupError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = first_line(error)
        if not isinstance(error, (TypeError, ValueError, RuntimeError, OverflowError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ModelError(f'model "{spec}": cannot be built with {options}: {reason}') from error

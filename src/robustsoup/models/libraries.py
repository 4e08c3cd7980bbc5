"""What the networks of other libraries share: their description, their import, their options."""

import difflib
import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from robustsoup.errors import ModelError
from robustsoup.models.network import ChannelConstants, NetworkSettings
from robustsoup.precision import full_float32
from robustsoup.printable import first_line

OptionValue = int | float | bool | str | list[float] | None
Result = TypeVar("Result")

LARGEST_OPTION = 65_536
DEEPEST_OPTION = 1_000
"""Largest values of the options that a record may give to the network of a library."""
FORBIDDEN_OPTIONS = re.compile(
    "(pretrained|weights|checkpoint|cache|url|hf_|progress|trust|features_only|scriptable).*"
)
"""Options that load weights or code, or that change what a network returns."""

INSTALL_LINES = {
    "timm": "pip install 'robustsoup[timm]'",
    "hf": "pip install 'robustsoup[hf]'",
    "torchvision": "pip install 'robustsoup[torchvision]'",
    "robustbench": "pip install robustbench 'setuptools<81' "
    "git+https://github.com/fra31/auto-attack",
}
"""How to install the library of each source."""


@dataclass(frozen=True)
class InputSettings:
    """How a network expects its images, according to its own configuration.

    Attributes:
        size: (height, width) in pixels; None if the configuration names none.
        normalize: (mean, std) by channel, for images in [0, 1]; None if it needs none.
        interpolation: Name of the method that resizes images, such as "bicubic"; None if unknown.
        class_names: One name for each class, in order; empty if the configuration names none.
        doubt: Why the configuration does not say whether inputs are normalised; empty if it does.
    """

    size: tuple[int, int] | None = None
    normalize: ChannelConstants | None = None
    interpolation: str | None = None
    class_names: tuple[str, ...] = ()
    doubt: str = ""


@dataclass(frozen=True)
class LibrarySpec:
    """A network of a library, parsed from "SOURCE:NAME[:key=value,...]".

    Attributes:
        spec: The whole text, for messages.
        name: The name of the network, or a folder.
        options: The options by name.
    """

    spec: str
    name: str
    options: Mapping[str, OptionValue]

    def refuse(self, reason: str) -> ModelError:
        """Return the error that this network cannot be built, with the reason."""
        return ModelError(f'model "{self.spec}": {reason}')


@dataclass(frozen=True)
class Library:
    """One source of networks.

    Attributes:
        build: Builds a network with fresh weights; nothing is downloaded but, where the user names
            a place on a hub, its configuration.
        read_inputs: Returns how the network expects its images, without building it.
        fingerprint: Returns a text that changes when the network may change.
        lists: Returns whether the installed library itself lists a name, so that the record of a
            file may name it; None if a record may name no network of this source.
    """

    build: Callable[[LibrarySpec, NetworkSettings], nn.Module]
    read_inputs: Callable[[LibrarySpec, NetworkSettings], InputSettings]
    fingerprint: Callable[[LibrarySpec], str]
    lists: Callable[[LibrarySpec], bool] | None = None


def import_library(module: str, extra: str, network: LibrarySpec) -> ModuleType:
    """Import a module of an optional library.

    Args:
        module: Name of the module.
        extra: A key of INSTALL_LINES.
        network: The network that needs it.

    Raises:
        ModelError: The library is not installed, or does not fit the installed PyTorch.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise _refuse_missing(package, extra, network)
    check_torchvision(network)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # a library may fail in any way while it is imported
        raise network.refuse(f"{package} cannot be imported: {first_line(error)}") from None


def library_version(package: str, extra: str, network: LibrarySpec) -> str:
    """Return the name and version of an installed package; arguments as in `import_library`.

    Raises:
        ModelError: It is not installed.
    """
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        raise _refuse_missing(package, extra, network) from None


def _refuse_missing(package: str, extra: str, network: LibrarySpec) -> ModelError:
    return network.refuse(f"{package} is not installed; {INSTALL_LINES[extra]}")


def check_torchvision(network: LibrarySpec) -> None:
    """Check that an installed torchvision fits PyTorch; the other libraries import it.

    Raises:
        ModelError: torchvision is installed and cannot be imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        raise network.refuse(
            f"torchvision does not work with PyTorch {torch.__version__}: {first_line(error)}; "
            "install both from one source, such as "
            "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
        ) from None


def call_library(function: Callable[[], Result], network: LibrarySpec) -> Result:
    """Call code of a library that builds or describes a network.

    Raises:
        ModelError: The call fails; the text is one line.
    """
    try:
        with warnings.catch_warnings(), full_float32():
            warnings.simplefilter("ignore")
            return function()
    except ModelError:
        raise
    except Exception as error:  # a library may fail in any way on a wrong option
        raise network.refuse(f"cannot be built: {first_line(error)}") from None


def check_name(network: LibrarySpec, names: Iterable[str], library: str) -> None:
    """Check that a library lists a name.

    Raises:
        ModelError: It does not; the text suggests the nearest name.
    """
    names = list(names)
    if network.name in names:
        return
    nearest = difflib.get_close_matches(network.name, names, 1, 0.4)
    hint = f'; did you mean "{nearest[0]}"?' if nearest else ""
    raise network.refuse(f'{library} lists no network "{network.name}"{hint}')


def refuse_forbidden_options(network: LibrarySpec) -> None:
    """Refuse options that load weights: robustsoup gives a network the weights of a checkpoint.

    Raises:
        ModelError: Names the first such option.
    """
    for key in network.options:
        if FORBIDDEN_OPTIONS.fullmatch(key):
            raise network.refuse(
                f"the option {key} is not taken; networks are built with fresh weights, "
                "which those of a checkpoint replace"
            )


def may_be_recorded(network: LibrarySpec) -> bool:
    """Return whether a record may hold these options.

    It may hold numbers of a bounded size, and True and False, which can name neither code nor a
    place; nothing that loads weights.
    """
    return not any(
        FORBIDDEN_OPTIONS.fullmatch(key)
        or not isinstance(value, (int, float))
        or not abs(value) <= (DEEPEST_OPTION if "dep" in key or "layer" in key else LARGEST_OPTION)
        for key, value in network.options.items()
    )


def fit_constants(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> ChannelConstants | None:
    """Return (mean, std) for a number of channels; None if they change nothing.

    Images with another number of channels than the constants get the constants' average.
    """
    means, stds = tuple(map(float, mean)), tuple(map(float, std))
    if len(means) != channels:
        means = (sum(means) / len(means),) * channels
        stds = (sum(stds) / len(stds),) * channels
    return None if set(means) == {0.0} and set(stds) == {1.0} else (means, stds)


def return_logits(model: nn.Module) -> nn.Module:
    """Make a network that returns a structure with `logits` return these; returns the network."""
    model.register_forward_hook(_take_logits)
    return model


def _take_logits(_model: nn.Module, _inputs: tuple[Tensor, ...], output: object) -> object:
    return getattr(output, "logits", output)

"""The networks of timm, as "timm:NAME[:key=value,...]"."""

from types import ModuleType

from torch import nn

from robustsoup.models.libraries import (
    InputSettings,
    Library,
    LibrarySpec,
    call_library,
    check_name,
    fit_constants,
    import_library,
    library_version,
    refuse_forbidden_options,
)
from robustsoup.models.network import NetworkSettings


def _import_timm(network: LibrarySpec) -> ModuleType:
    return import_library("timm", "timm", network)


def _lists(network: LibrarySpec) -> bool:
    """Return whether timm lists the architecture, and the tag if the name has one."""
    timm = _import_timm(network)
    architecture, _, tag = network.name.partition(".")
    listed = timm.list_models(pretrained=True) if tag else timm.list_models()
    return network.name in listed or (not tag and architecture in listed)


def _build(network: LibrarySpec, settings: NetworkSettings) -> nn.Module:
    timm = _import_timm(network)
    if not _lists(network):
        names = timm.list_models(pretrained="." in network.name)
        check_name(network, names, "timm")
    refuse_forbidden_options(network)
    options = {"num_classes": settings.classes, "in_chans": settings.channels}
    options |= dict(network.options)
    return call_library(
        lambda: timm.create_model(network.name, pretrained=False, **options), network
    )


def _read_inputs(network: LibrarySpec, settings: NetworkSettings) -> InputSettings:
    timm = _import_timm(network)
    config = call_library(lambda: timm.get_pretrained_cfg(network.name), network)
    if config is None:
        return InputSettings()
    size = network.options.get("img_size", config.input_size[-1])
    side = size if isinstance(size, int) else config.input_size[-1]
    return InputSettings(
        (side, side),
        fit_constants(config.mean, config.std, settings.channels),
        config.interpolation,
        tuple(config.label_names or ()),
    )


def _fingerprint(network: LibrarySpec) -> str:
    return library_version("timm", "timm", network)


TIMM = Library(_build, _read_inputs, _fingerprint, _lists)

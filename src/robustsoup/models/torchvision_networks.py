"""The classification networks of torchvision, as "torchvision:NAME[:key=value,...]"."""

from types import ModuleType

from torch import nn

from robustsoup.models.libraries import (
    InputSettings,
    Library,
    LibrarySpec,
    OptionValue,
    call_library,
    check_name,
    fit_constants,
    import_library,
    library_version,
    refuse_forbidden_options,
)
from robustsoup.models.network import NetworkSettings

WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def _import_models(network: LibrarySpec) -> ModuleType:
    return import_library("torchvision.models", "torchvision", network)


def _lists(network: LibrarySpec) -> bool:
    models = _import_models(network)
    return network.name in models.list_models(module=models)


def _build(network: LibrarySpec, settings: NetworkSettings) -> nn.Module:
    models = _import_models(network)
    check_name(network, models.list_models(module=models), "torchvision")
    refuse_forbidden_options(network)
    if settings.channels != 3:
        raise network.refuse(
            f"torchvision's networks take 3 channels, the data has {settings.channels}; "
            "timm's take any number"
        )
    options: dict[str, OptionValue] = {"num_classes": settings.classes}
    if network.name in WITH_AUXILIARY_HEADS:
        options["aux_logits"] = False
    options |= network.options
    return call_library(lambda: models.get_model(network.name, weights=None, **options), network)


def _read_inputs(network: LibrarySpec, settings: NetworkSettings) -> InputSettings:
    """Read the transforms of the network's default weights, which are not downloaded."""
    models = _import_models(network)
    check_name(network, models.list_models(module=models), "torchvision")
    weights = models.get_model_weights(network.name).DEFAULT
    transforms = weights.transforms()
    side = network.options.get("image_size", transforms.crop_size[0])
    side = side if isinstance(side, int) else transforms.crop_size[0]
    return InputSettings(
        (side, side),
        fit_constants(transforms.mean, transforms.std, settings.channels),
        transforms.interpolation.value,
        tuple(weights.meta["categories"]),
    )


def _fingerprint(network: LibrarySpec) -> str:
    return library_version("torchvision", "torchvision", network)


TORCHVISION = Library(_build, _read_inputs, _fingerprint, _lists)

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

INCEPTIONS = ("googlenet", "inception_v3")
"""Networks with auxiliary heads, whose pretrained weights expect inputs in [-1, 1]."""
VIT_SIDE = 224
"""Side of the images of a vision transformer without the option image_size, in pixels."""


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
    if network.name in INCEPTIONS:  # as torchvision does wherever it loads weights
        options |= {"aux_logits": False, "transform_input": True}
    options |= network.options
    return call_library(lambda: models.get_model(network.name, weights=None, **options), network)


def _read_inputs(network: LibrarySpec, settings: NetworkSettings) -> InputSettings:
    """Read the transforms of the network's default weights, which are not downloaded."""
    models = _import_models(network)
    check_name(network, models.list_models(module=models), "torchvision")
    weights = models.get_model_weights(network.name).DEFAULT
    transforms = weights.transforms()
    default = VIT_SIDE if network.name.startswith("vit_") else transforms.crop_size[0]
    side = network.options.get("image_size", default)
    side = side if isinstance(side, int) else default
    return InputSettings(
        (side, side),
        fit_constants(transforms.mean, transforms.std, settings.channels),
        transforms.interpolation.value,
        tuple(weights.meta["categories"]),
    )


def _fingerprint(network: LibrarySpec) -> str:
    return library_version("torchvision", "torchvision", network)


TORCHVISION = Library(_build, _read_inputs, _fingerprint, _lists)

"""Networks, by name, from libraries, or by "package.module:factory"."""

from robustsoup.models.libraries import InputSettings
from robustsoup.models.network import NetworkSettings, network_settings_of
from robustsoup.models.sources import (
    Factory,
    build_known_skeleton,
    build_network,
    build_skeleton,
    complete_settings,
    default_image_size,
    factory_fingerprint,
    input_settings,
    is_built_in,
    load_model,
    network_fingerprint,
    spec_text,
)

__all__ = [
    "Factory",
    "InputSettings",
    "NetworkSettings",
    "build_known_skeleton",
    "build_network",
    "build_skeleton",
    "complete_settings",
    "default_image_size",
    "factory_fingerprint",
    "input_settings",
    "is_built_in",
    "load_model",
    "network_fingerprint",
    "network_settings_of",
    "spec_text",
]

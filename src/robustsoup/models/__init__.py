"""Networks, by name or by "package.module:factory"."""

from robustsoup.models.network import NetworkSettings, network_settings_of
from robustsoup.models.sources import (
    build_network,
    build_skeleton,
    factory_fingerprint,
    is_built_in,
    load_model,
)

__all__ = [
    "NetworkSettings",
    "build_network",
    "build_skeleton",
    "factory_fingerprint",
    "is_built_in",
    "load_model",
    "network_settings_of",
]

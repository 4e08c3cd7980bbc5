"""Networks, by name or by "package.module:factory"."""

from robustsoup.models.network import NetworkSettings, network_settings_of
from robustsoup.models.sources import MODELS, build_network, factory_fingerprint, load_model

__all__ = [
    "MODELS",
    "NetworkSettings",
    "build_network",
    "factory_fingerprint",
    "load_model",
    "network_settings_of",
]

"""The networks of RobustBench's model zoo, as "robustbench:[DATASET/][THREAT/]NAME"."""

from typing import Any

from torch import nn

from robustsoup.models.libraries import (
    InputSettings,
    Library,
    LibrarySpec,
    call_library,
    check_name,
    import_library,
    library_version,
)
from robustsoup.models.network import NetworkSettings

PUBLISHED_NETWORKS = {
    "Gowal2021Improving_28_10_ddpm_100m": "wide_resnet",
    "Gowal2021Improving_R18_ddpm_100m": "preact_resnet18",
    "Wang2023Better_WRN-28-10": "wide_resnet",
    "L2/Wang2023Better_WRN-28-10": "wide_resnet",
}
"""The built-in network of each published checkpoint that `robustsoup fetch` offers."""


def _model_zoo(network: LibrarySpec) -> dict[str, dict[str, Any]]:
    """Return the entries of the model zoo by "DATASET/THREAT/NAME"."""
    zoo = import_library("robustbench.model_zoo", "robustbench", network)
    return {
        f"{dataset.value}/{threat.value}/{name}": entry
        for dataset, threats in zoo.model_dicts.items()
        for threat, entries in threats.items()
        for name, entry in entries.items()
    }


def _build(network: LibrarySpec, _settings: NetworkSettings) -> nn.Module:
    zoo = _model_zoo(network)
    parts = network.name.split("/")
    place = "/".join(("cifar10", "Linf")[: max(0, 3 - len(parts))] + tuple(parts))
    check_name(LibrarySpec(network.spec, place, {}), zoo, "RobustBench")
    if network.options:
        raise network.refuse(f"takes no options, got {', '.join(network.options)}")
    return call_library(zoo[place]["model"], network)


def _read_inputs(_network: LibrarySpec, _settings: NetworkSettings) -> InputSettings:
    """Return nothing: the networks of the model zoo normalise their inputs themselves."""
    return InputSettings()


def _fingerprint(network: LibrarySpec) -> str:
    return library_version("robustbench", "robustbench", network)


ROBUSTBENCH = Library(_build, _read_inputs, _fingerprint)

"""The networks of RobustBench's model zoo, as "robustbench:[DATASET/][THREAT/]NAME"."""

import re
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
from robustsoup.models.network import NetworkSettings, set_known_constants

PUBLISHED_NETWORKS = {
    "Gowal2021Improving_28_10_ddpm_100m": "wide_resnet",
    "Gowal2021Improving_R18_ddpm_100m": "preact_resnet18",
    "Wang2023Better_WRN-28-10": "wide_resnet",
    "L2/Wang2023Better_WRN-28-10": "wide_resnet",
}
"""The built-in network of each published checkpoint that `robustsoup fetch` offers."""
_CONSTANTS = ("mu", "sigma", "mean", "std")
"""What networks of the model zoo call the constants that normalise their inputs."""


def _model_zoo(network: LibrarySpec) -> dict[str, dict[str, Any]]:
    """Return the entries of the model zoo by "DATASET/THREAT/NAME"."""
    zoo = import_library("robustbench.model_zoo", "robustbench", network)
    return {
        f"{dataset.value}/{threat.value}/{name}": entry
        for dataset, threats in zoo.model_dicts.items()
        for threat, entries in threats.items()
        for name, entry in entries.items()
    }


def _complete_name(network: LibrarySpec) -> str:
    parts = network.name.split("/")
    return "/".join(("cifar10", "Linf")[: max(0, 3 - len(parts))] + tuple(parts))


def _find_entry(network: LibrarySpec) -> dict[str, Any]:
    zoo, name = _model_zoo(network), _complete_name(network)
    check_name(LibrarySpec(network.spec, name, {}), zoo, "RobustBench")
    return zoo[name]


def _build(network: LibrarySpec, _settings: NetworkSettings) -> nn.Module:
    entry = _find_entry(network)
    if network.options:
        raise network.refuse(f"takes no options, got {', '.join(network.options)}")
    model: nn.Module = call_library(entry["model"], network)
    saved = model.state_dict()
    buffers = [name for name, _ in model.named_buffers() if name in saved]
    set_known_constants(model, [n for n in buffers if n.rpartition(".")[2] in _CONSTANTS])
    return model


def _read_inputs(network: LibrarySpec, _settings: NetworkSettings) -> InputSettings:
    """Return the size alone: the networks of the model zoo normalise their inputs themselves."""
    if not _complete_name(network).startswith("imagenet/"):
        return InputSettings()
    sizes = re.findall(r"\d+", _find_entry(network).get("preprocessing") or "224")
    side = int(sizes[-1])  # the last step of one such as "Res256Crop224"
    return InputSettings((side, side))


def _fingerprint(network: LibrarySpec) -> str:
    return library_version("robustbench", "robustbench", network)


ROBUSTBENCH = Library(_build, _read_inputs, _fingerprint)

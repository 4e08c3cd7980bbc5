"""The settings that a network is built from, which checkpoints record."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import nn

from robustsoup.errors import ModelError
from robustsoup.schema import (
    MisfitError,
    describe_value,
    integer,
    list_of,
    nullable,
    number,
    table,
    text,
)

ChannelConstants = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std), one number for each channel."""

LARGEST_SIZES = {"width": 65_536, "depth": 1_000, "classes": 1_000_000, "channels": 65_536}
"""Largest values of the sizes of a built-in network."""
MOST_WEIGHTS = 2**31
"""Largest number of weights of a network that is built in, or that a configuration describes; the
largest built-in one that was published has 2.7e8."""


def _normalization(value: object, place: str) -> None:
    constants = "two lists of one number a channel, mean and std, each std above 0"
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise MisfitError(place, value, constants)
    for part in value:
        list_of(number)(part, place)
    mean, std = value
    if len(mean) != len(std) or not mean or min(std) <= 0:
        raise MisfitError(place, value, constants)


check_network_record = table(
    {"spec": text},
    {
        "classes": integer(1, LARGEST_SIZES["classes"]),
        "channels": integer(1, LARGEST_SIZES["channels"]),
        "normalize": nullable(_normalization),
    },
    closed=True,
)
"""Checks the "network" entry of a provenance record, which `NetworkSettings.from_record` reads."""


@dataclass(frozen=True)
class NetworkSettings:
    """The settings that determine a network up to its weights.

    Attributes:
        spec: A built-in name or "package.module:factory", each with optional ":key=value,...".
        classes: Number of classes.
        channels: Number of input channels.
        normalize: (mean, std) by channel, applied before a network that does not normalize its
            inputs itself; None for networks that do.
    """

    spec: str
    classes: int = 10
    channels: int = 3
    normalize: ChannelConstants | None = None

    def as_record(self) -> dict[str, Any]:
        """Return the JSON form that checkpoints and step keys hold."""
        normalize = [list(part) for part in self.normalize] if self.normalize else None
        return {
            "spec": self.spec,
            "classes": self.classes,
            "channels": self.channels,
            "normalize": normalize,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "NetworkSettings":
        """Read the JSON form; absent entries take their defaults.

        Args:
            record: The "network" entry of a provenance record; `check_network_record` accepts it.
        """
        return cls(
            record["spec"],
            record.get("classes", cls.classes),
            record.get("channels", cls.channels),
            channel_constants(record.get("normalize")),
        )


def channel_constants(
    normalize: Sequence[Sequence[float]] | None,
) -> ChannelConstants | None:
    """Return (mean, std) as tuples; None and an empty sequence give None.

    Raises:
        ModelError: Mean and std are no finite numbers, differ in length or are empty, or a std is
            not positive.
    """
    if not normalize:
        return None
    if len(normalize) != 2:
        raise ModelError(f"normalize: got {len(normalize)} lists, expected mean and std")
    try:
        mean, std = (tuple(map(float, part)) for part in normalize)
    except (TypeError, ValueError):
        mean, std = (), ()
    if len(mean) != len(std) or not mean or not all(map(isfinite, mean + std)) or min(std) <= 0:
        got_mean, got_std = map(describe_value, normalize)
        raise ModelError(
            f"normalize: got mean {got_mean} and std {got_std}, "
            "expected two lists of equal length, one number a channel, each std above 0"
        )
    return mean, std


def attach_network_settings(model: nn.Module, settings: NetworkSettings) -> None:
    """Store the settings in the attribute `network_settings` of the network that they built."""
    # nn.Module declares assigned attributes to be tensors or modules.
    vars(model)["network_settings"] = settings


def network_settings_of(model: nn.Module) -> NetworkSettings | None:
    """Return the settings that `build_network` attached to a network; None for other networks."""
    settings = getattr(model, "network_settings", None)
    return settings if isinstance(settings, NetworkSettings) else None


def set_known_constants(model: nn.Module, names: Iterable[str]) -> None:
    """Store which constants a network has by itself, so that published files may lack them.

    Args:
        model: The network.
        names: Names of buffers in its state dict; a file has all of them or none.
    """
    vars(model)["known_constants"] = tuple(names)


def known_constants_of(model: nn.Module) -> tuple[str, ...]:
    """Return what `set_known_constants` stored; empty for other networks."""
    return getattr(model, "known_constants", ())


def set_file_names(model: nn.Module, names: Mapping[str, str]) -> None:
    """Store the names that the files of a library give to the tensors of its network.

    Args:
        model: The network.
        names: Name in files by name in the state dict; empty if they are the same.
    """
    vars(model)["file_names"] = dict(names)


def file_names_of(model: nn.Module) -> dict[str, str]:
    """Return what `set_file_names` stored; empty for other networks."""
    return getattr(model, "file_names", {})

"""The settings that a network is built from, which checkpoints record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from robustsoup.errors import ModelError

ChannelConstants = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std), one number for each channel."""


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
    def from_record(cls, record: Mapping[str, Any], where: str) -> "NetworkSettings":
        """Read the JSON form; absent entries take their defaults.

        Args:
            record: The "network" entry of a provenance record.
            where: Names the file in errors.

        Raises:
            ModelError: The record was not written by `as_record`.
        """
        unknown = set(record) - set(cls.__dataclass_fields__)
        spec, normalize = record.get("spec"), record.get("normalize")
        if unknown or not isinstance(spec, str):
            raise ModelError(
                f"{where}: network record: got keys {sorted(record)}, expected "
                f"{', '.join(cls.__dataclass_fields__)}; give --model instead"
            )
        return cls(
            spec,
            record.get("classes", cls.classes),
            record.get("channels", cls.channels),
            channel_constants(normalize),
        )


def channel_constants(
    normalize: Sequence[Sequence[float]] | None,
) -> ChannelConstants | None:
    """Return (mean, std) as tuples; None and an empty sequence give None.

    Raises:
        ModelError: Mean and std differ in length or are empty, or a std is not positive.
    """
    if not normalize:
        return None
    if len(normalize) != 2:
        raise ModelError(f"normalize: got {len(normalize)} lists, expected mean and std")
    mean, std = (tuple(part) for part in normalize)
    if len(mean) != len(std) or not mean or min(std) <= 0:
        raise ModelError(
            f"normalize: got mean {list(mean)} and std {list(std)}, "
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

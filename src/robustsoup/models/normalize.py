"""Normalize the inputs of a network, as a layer inside it or before its forward."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustsoup.models.network import channel_constants


class Normalize(nn.Module):
    """The layer (x - mean) / std, by channel."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], persistent: bool = True
    ) -> None:
        """Store the constants as buffers.

        Args:
            mean: One number for each channel.
            std: One positive number for each channel.
            persistent: Whether the state dict holds the constants.
        """
        super().__init__()
        self.register_buffer("mean", _channel_tensor(mean), persistent)
        self.register_buffer("std", _channel_tensor(std), persistent)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (b, c, h, w) in [0, 1].

        Raises:
            ValueError: x has another number of channels.
        """
        if x.shape[1] != self.mean.shape[1]:  # a single channel would be broadcast
            raise ValueError(f"got {x.shape[1]} channels, expected {self.mean.shape[1]}")
        return (x - self.mean) / self.std


def list_identity_constants(model: nn.Module) -> dict[str, Tensor]:
    """Return constants that change nothing for the layers of a network whose constants are saved.

    Files of other programs, whose networks have no such layer, lack them.

    Returns:
        Name in the state dict -> zeros for a mean, ones for a standard deviation.
    """
    constants: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if name and isinstance(layer, Normalize) and "mean" in layer.state_dict():
            constants[f"{name}.mean"] = torch.zeros(layer.mean.shape)
            constants[f"{name}.std"] = torch.ones(layer.std.shape)
    return constants


def normalize_inputs(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Make `model` normalize its inputs before its forward; the names in its state dict stay.

    Args:
        model: The network; modified in place and returned.
        mean: One number for each channel, subtracted from the inputs.
        std: One positive number for each channel, by which the inputs are divided.

    Raises:
        ModelError: Mean and std differ in length, or a std is not positive.
    """
    channel_constants((mean, std))
    model.register_buffer("input_mean", _channel_tensor(mean), persistent=False)
    model.register_buffer("input_std", _channel_tensor(std), persistent=False)
    model.register_forward_pre_hook(_normalize_hook)
    return model


def _normalize_hook(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    mean, std = model.get_buffer("input_mean"), model.get_buffer("input_std")
    return ((inputs[0] - mean) / std, *inputs[1:])


def _channel_tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32).view(1, -1, 1, 1)

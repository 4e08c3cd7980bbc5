"""The SGD optimizer, and the moving average of the weights."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustsoup.attacks.adaptation import copy_network, set_memory_format
from robustsoup.attacks.forward import set_mode
from robustsoup.checkpoints.parameters import (
    find_power_vectors,
    list_averageable,
    parameters_and_buffers,
)
from robustsoup.settings import TrainSettings


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """Return SGD over the parameters of `model`.

    With weight_decay_bn = False, BatchNorm's weight and bias form a group without weight decay.
    """
    exempt: set[nn.Parameter] = set()
    if settings.weight_decay and not settings.weight_decay_bn:
        exempt = norm_parameters(model)
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p not in exempt]}]
    if exempt:
        unregularised = [p for p in model.parameters() if p in exempt]
        groups.append({"params": unregularised, "weight_decay": 0.0})
    return torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the BatchNorm layers of `model`."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return {parameter for layer in layers for parameter in layer.parameters(recurse=False)}


def set_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Set the momentum of the running statistics of every BatchNorm layer, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum


def prepare_network(model: nn.Module, settings: TrainSettings, device: torch.device) -> nn.Module:
    """Move a network to the device, in its memory format and with the settings' BatchNorm momentum.

    Returns:
        The network.
    """
    model = set_memory_format(model.to(device))
    if settings.bn_momentum is not None:
        set_norm_momentum(model, settings.bn_momentum)
    return model


def list_frozen(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are not trained."""
    return [name for name, item in model.named_parameters() if not item.requires_grad]


def clip_gradients(model: nn.Module, limit: float | None) -> None:
    """Scale the gradients of all parameters together to a norm of at most `limit`, in place."""
    if limit is not None:
        nn.utils.clip_grad_norm_(model.parameters(), limit)


class WeightAverage:
    """The exponential moving average of a network's weights and BatchNorm statistics.

    After step t = 0, 1, ...: average += (1 - d) * (weights - average) with
    d = min(decay, (1 + t) / (10 + t)), so that a short run does not keep its initial weights. The
    average starts as a copy of the network. Statistics are averaged as the weights are, since they
    belong to them; integers, constants with infinity and the vectors of `spectral_norm` are copied.

    Attributes:
        model: The averaged network, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, copy_network(model)
        set_mode(self.model, training=False)
        power_vectors = find_power_vectors(parameters_and_buffers(model))
        vectors = {name for names in power_vectors for name in (names.u, names.v)}
        self._averaged = list_averageable(model) - vectors

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights of `model` after step `step`, counted from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        latest = parameters_and_buffers(model)
        for name, average in parameters_and_buffers(self.model).items():
            if name in self._averaged:
                average.lerp_(latest[name].detach(), share)
            else:
                average.copy_(latest[name])

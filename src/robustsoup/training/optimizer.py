"""How weights are moved: SGD with its options, and the moving average of the weights."""

import copy
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustsoup.errors import RequestError


@dataclass(frozen=True)
class Sgd:
    """SGD and what goes with it; the defaults are the paper's.

    weight_decay_bn: whether BatchNorm's weight and bias decay too. clip_grad: the norm to which the gradient of all weights
    together is cut. bn_momentum: of BatchNorm's running statistics, instead of the network's own. ema: the decay
    of the average of the weights over the steps (0: none). label_smoothing: see `losses.ce`.

    Raises RequestError for a value out of range.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    weight_decay_bn: bool = True
    nesterov: bool = False
    clip_grad: float | None = None
    bn_momentum: float | None = None
    ema: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            raise RequestError(
                f"train: got momentum {self.momentum}, weight_decay {self.weight_decay}; "
                "expected momentum in [0, 1), weight_decay at least 0"
            )
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(
                    f"{name}: got {getattr(self, name)}, expected a number in [0, 1)"
                )
        if self.nesterov and not self.momentum:
            raise RequestError(
                "nesterov: got momentum 0, expected a momentum above 0; leave nesterov out"
            )
        if self.clip_grad is not None and not 0 < self.clip_grad < math.inf:
            raise RequestError(f"clip_grad: got {self.clip_grad}, expected a norm above 0")
        if self.bn_momentum is not None and not 0 < self.bn_momentum <= 1:
            raise RequestError(f"bn_momentum: got {self.bn_momentum}, expected a number in (0, 1]")

    def record(self) -> dict[str, Any]:
        """The settings, for records and keys: of those that came later than the first two, only what is not as usual."""
        usual = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name in ("momentum", "weight_decay") or value != usual[name]
        }

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.SGD:
        """The optimizer of the weights of `model`."""
        exempt = set() if self.weight_decay_bn or not self.weight_decay else norm_parameters(model)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p not in exempt]}
        ]
        if exempt:
            groups.append(
                {"params": [p for p in model.parameters() if p in exempt], "weight_decay": 0.0}
            )
        return torch.optim.SGD(
            groups,
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        """Give the network's BatchNorm layers `bn_momentum`, where one is asked for; returns the network."""
        for module in model.modules():
            if isinstance(module, _BatchNorm) and self.bn_momentum is not None:
                module.momentum = self.bn_momentum
        return model

    def clip(self, model: nn.Module) -> None:
        """Scale the gradients of all weights down to `clip_grad`, if their norm is above it."""
        if self.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip_grad)


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the BatchNorm layers of `model`."""
    return {
        p
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for p in module.parameters(recurse=False)
    }


class Average:
    """The exponential moving average of a network's weights and of its BatchNorm statistics, in a network of its own.

    After step t = 0, 1, ... average += (1 - d) (live - average) with d = min(decay, (1 + t) / (10 + t)): so that a short
    run is not left with its first weights. It starts as a copy. Statistics are averaged like weights, as they
    belong to them; integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, live: nn.Module, step: int) -> None:
        """Take in the weights as they are after step number `step`, counted from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for own, new in zip(_tensors(self.model), _tensors(live), strict=True):
            if own.is_floating_point():
                own.lerp_(new.detach(), share)
            else:
                own.copy_(new)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]

"""BatchNorm's running statistics while a soup is learned."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from robustsoup.catalog import BUFFER_POLICIES
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.data import Split
from robustsoup.settings import LearnSettings
from robustsoup.soups.batchnorm import norm_layers, running_statistics
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.mixing import BufferPolicy, Calibration, UnfinishedSoup, mix


def mix_start(
    ingredients: Sequence[Checkpoint],
    base: CheckpointLike | None,
    policy: str,
) -> Checkpoint:
    """Return the uniform soup with the statistics that learning starts from.

    The policy computes them if it does so at the start alone; otherwise they are averaged.
    """
    start_policy = policy if _update_time(policy) == "start" else "average"
    alpha = [1 / len(ingredients)] * len(ingredients)
    return mix(ingredients, alpha, buffers=start_policy, base=base)


class LearningBuffers:
    """Applies a buffer policy to the network that learns, whenever the policy is due."""

    def __init__(
        self,
        model: nn.Module,
        ingredients: Sequence[Checkpoint],
        data: Split,
        settings: LearnSettings,
    ) -> None:
        self.model = model
        self.ingredients = [_copy_statistics(item) for item in ingredients]
        self.update_time = _update_time(settings.buffers)
        self.compute: BufferPolicy = BUFFER_POLICIES.get_entry(settings.buffers).load()
        self.calibration = Calibration(
            data,
            threat=settings.threat,
            attack_steps=settings.attack_steps,
            precision=settings.precision,
            seed=settings.seed,
        )
        if self.update_time != "train":
            for layer in norm_layers(model).values():
                layer.momentum = 0.0  # the train-mode pass must not change the statistics

    def end_step(self, coefficients: Coefficients) -> None:
        """Update the statistics if the policy does so after each step."""
        if self.update_time == "step":
            self._apply(coefficients)

    def end_epoch(self, coefficients: Coefficients) -> None:
        """Update the statistics if the policy does so after each epoch."""
        if self.update_time == "epoch":
            self._apply(coefficients)

    @torch.no_grad()
    def _apply(self, coefficients: Coefficients) -> None:
        soup = UnfinishedSoup(
            self.ingredients,
            coefficients,
            network=lambda: self.model,
            calibration=self.calibration,
        )
        for name, tensor in self.compute(soup).tensors.items():
            self.model.get_buffer(name).copy_(tensor)


def _copy_statistics(item: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its running statistics in memory, since its file may change."""
    copies = {name: item.tensors[name].clone() for name in running_statistics(item)}
    copied = copy.copy(item)  # keeps the digest, which dataclasses.replace would compute again
    object.__setattr__(copied, "tensors", {**item.tensors, **copies})
    return copied


def _update_time(policy: str) -> str:
    """Return when a policy computes statistics during learning; see catalog.BUFFER_POLICIES."""
    return BUFFER_POLICIES.get_entry(policy).facts.get("learning", "epoch")

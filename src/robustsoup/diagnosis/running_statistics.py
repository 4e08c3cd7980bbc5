"""Differences of the running statistics of several checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.soups.batchnorm import running_statistics


@dataclass(frozen=True)
class RunningStatistics:
    """Differences of the running statistics of several checkpoints.

    Attributes:
        layers: Number of layers that have running statistics.
        difference: Largest |s_i - mean s| / |scale| over layers and checkpoints: norms over the
            channels, the mean over the checkpoints. The scale of a running mean is the square root
            of the mean variance, that of a running variance is the mean variance. None for a
            single checkpoint and for networks without running statistics.
        tensor: Name of the tensor with the largest difference; None where nothing differs.
        file: Name of the checkpoint with the largest difference; None where nothing differs.
    """

    layers: int
    difference: float | None
    tensor: str | None
    file: str | None


def counter_names(checkpoint: Checkpoint) -> list[str]:
    """List the `num_batches_tracked` tensors of a checkpoint."""
    return [name for name in checkpoint.tensors if name.rpartition(".")[2] == "num_batches_tracked"]


def compare_running_statistics(checkpoints: Sequence[Checkpoint]) -> RunningStatistics:
    """Measure how far the running statistics of checkpoints of one network differ."""
    names = list(running_statistics(checkpoints[0]))
    layers = [
        layer
        for name in names
        if (layer := name.removesuffix("running_var")) != name and layer + "running_mean" in names
    ]
    if not layers or len(checkpoints) == 1:
        return RunningStatistics(len(layers), None, None, None)
    largest, tensor, file = 0.0, None, None
    for layer in layers:
        means, variances = (
            torch.stack([item.tensors[layer + kind].double() for item in checkpoints])
            for kind in ("running_mean", "running_var")
        )
        mean_variance = variances.mean(0)
        for name, values, scale in (
            ("running_mean", means, mean_variance.clamp(min=0).sqrt().norm()),
            ("running_var", variances, mean_variance.norm()),
        ):
            scale = scale.clamp(min=torch.finfo(torch.float64).tiny)
            differences = (values - values.mean(0)).norm(dim=1) / scale
            if float(differences.max()) > largest:
                largest, tensor = float(differences.max()), layer + name
                file = checkpoints[int(differences.argmax())].name
    return RunningStatistics(len(layers), largest, tensor, file)

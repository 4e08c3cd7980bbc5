"""Share training steps between the ranks of a command.

A global batch is the concatenation of the ranks' shares, in the order of the ranks. Each rank
attacks its share on the bare network and takes one train-mode pass on it; the gradients are
averaged by the number of images, so a step is that of one process. Only the statistics of
BatchNorm may differ: see `TrainSettings.batchnorm`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from robustsoup import distributed
from robustsoup.attacks.adaptation import copy_network
from robustsoup.attacks.forward import set_mode
from robustsoup.data import Split, to_float
from robustsoup.digests import digest_json
from robustsoup.errors import RequestError
from robustsoup.interruption import signal_waits
from robustsoup.settings import LearnSettings, TrainSettings

SYNCHRONISED = "sync"


@dataclass(frozen=True)
class BatchShare:
    """The part of a global batch that this rank takes.

    Attributes:
        start, stop: First place in the global batch, and the place after the last.
        total: Images in the global batch.
    """

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, total: int) -> "BatchShare":
        """Return this rank's share of a batch: the first ranks get one image more."""
        return cls(0, total, total).split(distributed.world())[distributed.rank()]

    def split(self, count: int) -> list["BatchShare"]:
        """Return consecutive parts of this share; the first ones get one image more."""
        each, more = divmod(self.stop - self.start, count)
        starts = [self.start + i * each + min(i, more) for i in range(count + 1)]
        return [BatchShare(*bounds, self.total) for bounds in pairwise(starts)]

    @property
    def weight(self) -> float:
        """The share of the global batch's images, in (0, 1]."""
        return (self.stop - self.start) / self.total

    def take(self, batch: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that belongs to the global batch."""
        return batch[self.start : self.stop]


def check_same_training(
    data: Split,
    work: list[Any],
    settings: TrainSettings | LearnSettings,
    device: torch.device,
) -> None:
    """Check that all ranks do the same work, and that each gets images of every batch.

    Args:
        data: The training split.
        work: What identifies the settings and the weights, ready for JSON.
        settings: Their batch_size is that of a global batch.
        device: Where this rank computes.

    Raises:
        RequestError: The batch is too small for the ranks or for its parts, or ranks differ.
    """
    _check_parts(data, settings)
    world, images = distributed.world(), min(settings.batch_size, len(data))
    if world == 1:
        return
    if images < 2 * world:  # BatchNorm fails on one image
        raise RequestError(
            f"batch_size: got {images} images for {world} processes, expected {2 * world} or more; "
            "start fewer processes"
        )
    distributed.check_same(
        {
            "device": distributed.describe_device(device),
            "digest of the data": data.digest,
            "digest of the settings and weights": digest_json(work),
        },
        "give all processes the same files and options, on devices of one kind",
    )


def _check_parts(data: Split, settings: TrainSettings | LearnSettings) -> None:
    """Raise RequestError if a part of an accumulated batch would have fewer than two images."""
    world, images = distributed.world(), min(settings.batch_size, len(data))
    if settings.accumulate > 1 and images < 2 * world * settings.accumulate:
        shared = f" in each of {world} processes" if world > 1 else ""
        raise RequestError(
            f"accumulate: got {settings.accumulate} parts{shared} for {images} images, expected at "
            f"most {images // (2 * world)}; BatchNorm needs two images in each part"
        )


def share_loss_pass(model: nn.Module, data: Split) -> nn.Module:
    """Return the network of the loss pass, whose gradients are averaged over all ranks.

    Args:
        model: The network, which attacks and measurements run on; returned as it is if there is
            one process.
        data: Two of its images show whether the network uses all of its parameters.
    """
    if distributed.world() == 1:
        return model
    probe = copy_network(model)
    set_mode(probe, training=False)
    trained = [parameter for parameter in probe.parameters() if parameter.requires_grad]
    logits = probe(to_float(data.images[:2]))
    grads = torch.autograd.grad(logits.float().sum(), trained, allow_unused=True)
    unused = any(grad is None for grad in grads)
    parameters = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in parameters  # since PyTorch 2.13
    keep_buffers: dict[str, Any] = {
        "forward_sync_buffers" if renamed else "broadcast_buffers": False
    }
    shared = DistributedDataParallel(model, find_unused_parameters=unused, **keep_buffers)
    _count_gradients(shared)
    return shared


def _count_gradients(shared: DistributedDataParallel) -> None:
    """Count the bytes of the gradients that a network exchanges."""
    from torch.distributed import GradBucket
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def count_and_average(_state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        distributed.count_exchange(bucket.buffer())
        return allreduce_hook(None, bucket)  # pyrefly: ignore[bad-argument-type]

    shared.register_comm_hook(None, count_and_average)


def average_statistics(model: nn.Module, share: BatchShare, batchnorm: str) -> None:
    """Average the running statistics of BatchNorm over all ranks, by their number of images.

    With "sync", the ranks have the same statistics already.
    """
    if distributed.world() == 1 or batchnorm == SYNCHRONISED:
        return
    buffers = [
        buffer
        for layer in _norm_layers(model)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    means = distributed.sum_ranks(torch.cat(buffers) * share.weight)
    for buffer, mean in zip(buffers, means.split([len(b) for b in buffers]), strict=True):
        buffer.copy_(mean)


def end_together() -> None:
    """Interrupt all ranks after the same step, if a signal waits in one of them.

    Raises:
        KeyboardInterrupt: A rank received a signal.
    """
    if distributed.world() > 1:
        waits = torch.tensor(int(signal_waits()))
        if distributed.sum_ranks(waits) > 0:
            raise KeyboardInterrupt


@contextmanager
def synchronised_batchnorm(model: nn.Module, batchnorm: str) -> Iterator[None]:
    """Normalise by the statistics of the global batch in the train-mode passes of the block.

    Args:
        model: The network.
        batchnorm: "sync"; with "per-rank" or one process, the block runs as it is.

    Raises:
        RequestError: A BatchNorm layer has a forward of its own, such as timm's with activations.
    """
    layers = _norm_layers(model) if distributed.world() > 1 and batchnorm == SYNCHRONISED else []
    for layer in layers:
        if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise RequestError(
                f"batchnorm: {type(layer).__name__} has a forward of its own, which "
                '"sync" would leave out; use "per-rank"'
            )
    for layer in layers:
        # An instance's forward hides that of its class; the hooks of the layer still run.
        layer.forward = partial(_normalise, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _norm_layers(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _normalise(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Return BatchNorm's output for this rank's images, by the statistics of all ranks."""
    if not (layer.training or layer.running_mean is None):
        return type(layer).forward(layer, x)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [dim for dim in range(x.dim()) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    ones = values.new_ones(1) * (x.numel() // x.shape[1])
    sums = _SumOverRanks.apply(torch.cat([values.sum(others), ones]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = values - mean.view(shape)
    var = _SumOverRanks.apply(centred.square().sum(others)) / count
    _update_statistics(layer, mean.detach(), var.detach() * (count / (count - 1)))
    output = centred * torch.rsqrt(var + layer.eps).view(shape)
    if layer.affine:
        output = output * layer.weight.view(shape) + layer.bias.view(shape)
    return output.to(x.dtype)


@torch.no_grad()
def _update_statistics(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    if layer.running_mean is None or layer.running_var is None:
        return
    share = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if share is None:
            share = 1 / float(layer.num_batches_tracked)
    if share:
        layer.running_mean.lerp_(mean.to(layer.running_mean), share)
        layer.running_var.lerp_(var.to(layer.running_var), share)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; the losses of all ranks depend on it."""

    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return distributed.sum_ranks(x.clone())

    @staticmethod
    def backward(_context: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return distributed.sum_ranks(grad.clone())

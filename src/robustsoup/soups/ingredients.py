"""Inner products and weighted sums of the weights of many ingredients, in memory or in files."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from robustsoup.attacks.lanes import run_in_lanes
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import RequestError
from robustsoup.soups.summation import as_real, sum_dtype, weighted_sum

T = TypeVar("T")

PLACES = ("auto", "device", "memory", "files")
CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements of a parameter per chunk, by type of device; 1 MiB of float32 on a CPU fits the cache of
a core."""


class Ingredients:
    """The parameters of n checkpoints of one network, in their stored dtype.

    Results are bit-equal wherever the parameters are stored.

    Args:
        checkpoints: n checkpoints; all results follow their order.
        names: Names of the parameters.
        device: Where results are computed.
        place: "device" and "memory" keep the parameters there (on a CPU they are the same); "files"
            reads them from their memory-mapped files each time. A checkpoint without an open file
            stays in memory.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        names: Sequence[str],
        device: torch.device,
        place: str,
    ) -> None:
        self.device, self.place = device, place
        self.chunk = CHUNK_NUMBERS.get(device.type, CHUNK_NUMBERS["cuda"])
        self.sources = []
        if place == "files":
            self.sources = [item.source for item in checkpoints if item.source is not None]
        self.rows = {
            name: [_place_parameter(item, name, device, place) for item in checkpoints]
            for name in names
        }

    def check(self) -> None:
        """Raise CheckpointError if a mapped file is missing, truncated or changed."""
        for source in self.sources:
            source.check_unchanged()

    def inner(self, grads: dict[str, Tensor]) -> Tensor:
        """Return the inner products of gradients with the parameters of each ingredient.

        Args:
            grads: dL/dtheta of some parameters, by name.

        Returns:
            (len(grads), n) float64 on the CPU: <dL/dtheta, theta_i>.
        """
        self.check()
        return torch.stack([self._inner_products(name, grad) for name, grad in grads.items()])

    @torch.no_grad()
    def mix_into(self, name: str, weights: Sequence[float], parameter: Tensor) -> None:
        """Overwrite `parameter` with sum_i weights[i] * theta_i, summed in at least float32."""
        rows, target = self.rows[name], as_real(parameter)
        dtype = sum_dtype(rows[0].dtype)
        flat = torch.empty(target.numel(), dtype=dtype, device=self.device)

        def mix_chunk(begin: int) -> None:
            pieces = [row[begin : begin + self.chunk].to(self.device) for row in rows]
            flat[begin : begin + self.chunk] = weighted_sum(pieces, weights)

        self._map_chunks(mix_chunk, len(flat))
        target.copy_(flat.view(target.shape))

    def _inner_products(self, name: str, grad: Tensor) -> Tensor:
        rows, flat = self.rows[name], as_real(grad.detach()).contiguous().view(-1)

        def chunk_products(begin: int) -> Tensor:
            piece = flat[begin : begin + self.chunk]
            # Sum from a separate buffer, so that the memory alignment of theta changes no bit.
            product = torch.empty_like(piece)
            thetas = (row[begin : begin + self.chunk].to(piece) for row in rows)
            sums = [torch.sum(torch.mul(piece, theta, out=product)) for theta in thetas]
            return torch.stack(sums).double()

        zero = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        return sum(self._map_chunks(chunk_products, len(flat)), zero).cpu()

    def _map_chunks(self, function: Callable[[int], T], length: int) -> list[T]:
        """Call a function with the start of each chunk; on a CPU the cores share the calls."""
        begins = range(0, length, self.chunk)
        if len(begins) == 1:
            return [function(0)]
        return run_in_lanes([partial(function, begin) for begin in begins], self.device)


def choose_place(
    place: str, budget: float | None, checkpoints: Sequence[Checkpoint], device: torch.device
) -> str:
    """Choose where ingredients are stored.

    Args:
        place: "device", "memory" or "files" is returned unchanged; "auto" becomes "device" if the
            ingredients fit the budget, else "files".
        budget: GiB, at least 0; by default a quarter of the memory available on the device.
        checkpoints: The ingredients.
        device: Where the soup is learned.

    Raises:
        RequestError: For an unknown place or a negative budget.
    """
    if place not in PLACES:
        raise RequestError(f'place: got "{place}", expected one of {", ".join(PLACES)}')
    if budget is not None and not budget >= 0:
        raise RequestError(f"budget: got {budget}, expected GiB of at least 0")
    if place != "auto":
        return place
    limit = available_memory(device) / 4 if budget is None else budget * 2**30
    return "device" if total_bytes(checkpoints) <= limit else "files"


def total_bytes(checkpoints: Sequence[Checkpoint]) -> int:
    """Return the bytes that the parameters of all checkpoints take, in their stored dtype."""
    return sum(item.tensors[name].nbytes for item in checkpoints for name in item.parameters)


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device.

    On a CPU this is the available memory of the machine, or of the control group of the process if
    that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 8 * 2**30
    if hasattr(os, "sysconf"):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = (_read_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        free = min(free, int(limit[0]) - int(used[0]))
    return max(free, 0)


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _place_parameter(item: Checkpoint, name: str, device: torch.device, place: str) -> Tensor:
    """Return a parameter as a flat tensor at its place; "files" keeps the mapped view."""
    tensor = as_real(item.tensors[name].detach())
    if place == "device":
        tensor = tensor.to(device)
    if place in ("device", "memory") and item.source is not None and tensor.device.type == "cpu":
        tensor = tensor.clone()
    return tensor.contiguous().view(-1)

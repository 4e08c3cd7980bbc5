"""The weights of many ingredients, wherever they lie: inner products with them and sums of them, a stretch at a time."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from robustsoup.attacks.lanes import in_lanes
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import RequestError
from robustsoup.soups.summation import weighted_sum

PLACES = ("auto", "device", "memory", "files")
STRETCH = {"cpu": 1 << 18, "cuda": 1 << 24}
"""How many numbers of a layer are worked on at once; on a CPU 1 MiB in float32, which stays in a core's cache."""


class Ingredients:
    """n checkpoints of one network in the order given, in their stored dtype; what is read of them comes to `device`.

    place: "device" and "memory" keep their parameters there (the same on a CPU); "files" reads them from their memory-mapped
    files each time (a checkpoint without an open file stays in memory). Every place gives the same bits.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        names: Sequence[str],
        device: torch.device,
        place: str,
    ) -> None:
        self.device, self.place, self.stretch = device, place, STRETCH.get(device.type, 1 << 24)
        self.sources = (
            [item.source for item in checkpoints if item.source is not None]
            if place == "files"
            else []
        )
        self.rows = {
            name: [_kept(item, name, device, place) for item in checkpoints] for name in names
        }

    def check(self) -> None:
        """Raise CheckpointError, naming the file, if one that is read from is gone, cut short or changed."""
        for source in self.sources:
            source.check_unchanged()

    def inner(self, grads: dict[str, Tensor]) -> Tensor:
        """{name: dL/dtheta of a parameter} -> (len(grads), n) float64 on the CPU: <dL/dtheta, theta_i> of each."""
        self.check()
        return torch.stack([self._inner(name, grad) for name, grad in grads.items()])

    def _inner(self, name: str, grad: Tensor) -> Tensor:
        rows, flat = self.rows[name], grad.contiguous().view(-1)

        def part(begin: int) -> Tensor:
            piece = flat[begin : begin + self.stretch]
            product = torch.empty_like(
                piece
            )  # summed from memory of its own, so that where theta lies changes no bit
            there = (row[begin : begin + self.stretch].to(piece) for row in rows)
            return torch.stack(
                [torch.sum(torch.mul(piece, theta, out=product)) for theta in there]
            ).double()

        return sum(
            self._parts(part, len(flat)),
            torch.zeros(len(rows), dtype=torch.float64, device=self.device),
        ).cpu()

    @torch.no_grad()
    def mix_into(self, name: str, weights: Sequence[float], parameter: Tensor) -> None:
        """Copy sum_i weights[i] * theta_i of one parameter into `parameter`, summed in at least float32."""
        rows = self.rows[name]
        dtype = torch.promote_types(rows[0].dtype, torch.float32)
        flat = torch.empty(parameter.numel(), dtype=dtype, device=self.device)

        def part(begin: int) -> None:
            pieces = [row[begin : begin + self.stretch].to(self.device) for row in rows]
            flat[begin : begin + self.stretch] = weighted_sum(pieces, weights)

        self._parts(part, len(flat))
        parameter.copy_(flat.view(parameter.shape))

    def _parts(self, part: Callable[[int], Tensor | None], length: int) -> list[Tensor | None]:
        begins = range(0, length, self.stretch)
        if len(begins) == 1:
            return [part(0)]
        return in_lanes([partial(part, begin) for begin in begins], self.device)


def choose_place(
    place: str, budget: float | None, checkpoints: Sequence[Checkpoint], device: torch.device
) -> str:
    """Where ingredients are kept: as told, else on the device if they take at most `budget` GiB, else in their files.

    budget: by default a quarter of the memory that is available on the device. Raises RequestError for another place.
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
    """What the parameters of all checkpoints take, in their stored dtype."""
    return sum(item.tensors[name].nbytes for item in checkpoints for name in item.parameters)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU, of the machine or of the control group that the process is in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if hasattr(os, "sysconf")
        else 8 * 2**30
    )
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        free = min(free, int(limit[0]) - int(used[0]))
    return max(free, 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _kept(item: Checkpoint, name: str, device: torch.device, place: str) -> Tensor:
    tensor = item.tensors[name].detach()
    if place == "device":
        tensor = tensor.to(device)
    if place in ("device", "memory") and item.source is not None and tensor.device.type == "cpu":
        tensor = tensor.clone()
    return tensor.contiguous().view(-1)

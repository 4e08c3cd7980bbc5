"""Select the device of a network and its precision: float32, or bfloat16 by autocast."""

import contextlib
import os

import torch

from robustsoup import distributed
from robustsoup.errors import RequestError
from robustsoup.settings import PRECISIONS


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device called `name`; "auto" is CUDA if available, else the CPU.

    Where several processes share a machine, each has the GPU of its own number.

    Raises:
        RequestError: If the device does not exist on this machine.
    """
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if str(name) == "cuda" and distributed.world() > 1:
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f'device: "{name}" cannot be used: {reason}') from None
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """Return "float32" or "bfloat16"; "auto" is bfloat16 where the device has native support.

    Raises:
        RequestError: For any other name.
    """
    if name not in PRECISIONS:
        raise RequestError(f'precision: got "{name}", expected one of {", ".join(PRECISIONS)}')
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    supports_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device.type == "cpu" and supports_bfloat16() else "float32"


def autocast(
    device: torch.device, precision: str, *, cache: bool = True
) -> contextlib.AbstractContextManager[object]:
    """Return a context in which forward passes run in `precision`.

    Weights stay in float32. Under "float32" an enclosing autocast of the caller is disabled.

    Args:
        device: Device of the network.
        precision: "float32" or "bfloat16".
        cache: Whether a weight that is used several times is cast once.
    """
    enabled = precision == "bfloat16"
    if not enabled and not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=cache and enabled
    )


def count_usable_cores() -> int:
    """Return the number of logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

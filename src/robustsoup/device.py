"""Which arithmetic a network runs in: float32, or bfloat16 by autocast with float32 weights."""

import contextlib

import torch
from torch import nn

from robustsoup.errors import RequestError

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device called `name`: "auto" is CUDA where there is one, else the CPU. Raises RequestError if it is absent."""
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f'device: "{name}" cannot be used: {str(error).splitlines()[0]}'
        ) from None
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """ "float32" or "bfloat16": "auto" is bfloat16 where the device computes in it natively, else float32."""
    if name not in PRECISIONS:
        raise RequestError(f'precision: got "{name}", expected one of {", ".join(PRECISIONS)}')
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device.type == "cpu" and native() else "float32"


def autocast(device: torch.device, precision: str):
    """A context in which forward passes run in `precision` ("float32": nothing changes)."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def move_network(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device in the channels-last memory format, in place, and return it."""
    # PyTorch's annotations lack Module.to(memory_format=...).
    return model.to(device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

"""Take gradients, whatever the caller switched off."""

import contextlib
from collections.abc import Generator

import torch


@contextlib.contextmanager
def gradients_enabled() -> Generator[None, None, None]:
    """Leave the caller's `torch.no_grad()` and `torch.inference_mode()` for a while.

    Tensors that are made within are ordinary ones, which may take part in gradients.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield

"""Random generators with named streams."""

import hashlib
import random

import numpy as np
import torch


def keyed_generator(*key: str | int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `key`.

    Every part of the key matters, and similar keys (such as consecutive epochs) give unrelated
    streams.
    """
    text = ":".join(str(part) for part in key)
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def global_random_state(device: torch.device) -> tuple[object, ...]:
    """Return the states of the global generators of Python, numpy and PyTorch, for comparison.

    Args:
        device: The state of its generator is added if it is a GPU.
    """
    numbers = np.random.get_state(legacy=False)["state"]
    state: tuple[object, ...] = (
        random.getstate(),
        (numbers["key"].tobytes(), numbers["pos"]),
        torch.get_rng_state().numpy().tobytes(),
    )
    if device.type == "cuda":
        state += (torch.cuda.get_rng_state(device).numpy().tobytes(),)
    return state

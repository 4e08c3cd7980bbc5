"""Random generators with named streams."""

import contextlib
import hashlib
import random
from collections.abc import Generator

import numpy as np
import torch


def keyed_generator(*key: str | int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `key`.

    Every part of the key matters, and similar keys (such as consecutive epochs) give unrelated
    streams.
    """
    return torch.Generator().manual_seed(_hash_key(key))


@contextlib.contextmanager
def keyed_random_state(device: torch.device, *key: str | int) -> Generator[None, None, None]:
    """Seed the global generators by a hash of `key` for a while, and restore them.

    Dropout, stochastic depth and other layers draw from these generators.

    Args:
        device: As for `seeded_random_state`.
        key: As for `keyed_generator`.
    """
    with seeded_random_state(_hash_key(key), device):
        yield


@contextlib.contextmanager
def seeded_random_state(seed: int, device: torch.device) -> Generator[None, None, None]:
    """Seed the global generators of Python, numpy and PyTorch for a while, and restore them.

    Args:
        seed: Below 2**32.
        device: The generator of this GPU, if it is one, is seeded beside that of the CPU.
    """
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
        if gpus:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _hash_key(key: tuple[str | int, ...]) -> int:
    text = ":".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


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

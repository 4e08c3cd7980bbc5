"""Random generators keyed by what they are used for."""

import hashlib

import torch


def keyed_generator(*key: str | int) -> torch.Generator:
    """A CPU generator that depends on every part of `key`, so that neighbouring keys share no stream."""
    text = ":".join(str(part) for part in key)
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    )

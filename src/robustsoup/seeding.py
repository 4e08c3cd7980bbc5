"""Random generators with named streams."""

import hashlib

import torch


def keyed_generator(*key: str | int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `key`.

    Every part of the key matters, and similar keys (such as consecutive epochs) give unrelated
    streams.
    """
    text = ":".join(str(part) for part in key)
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

"""Checkpoints: weights and their provenance, read from and written to files."""

from robustsoup.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint"]

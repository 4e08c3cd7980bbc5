"""Everything that a command imports, for the server process of commands.py."""

import importlib
import os
import pkgutil

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: F401  # each process imports the main module of its parent
import torch

import robustsoup
from robustsoup.cli import main
from robustsoup.progress import SavedState

__all__ = ["main", "save_after_each_step"]
torch.set_num_threads(1)
for _module in pkgutil.walk_packages(robustsoup.__path__, "robustsoup."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)


def save_after_each_step():
    """Save the state of every run after each step, not only when half a minute has passed."""
    SavedState.due = lambda self: self.path is not None

"""Markers that skip tests whose data or packages are absent."""

import importlib.util
import os
from pathlib import Path

import pytest

data_root = os.environ.get("ROBUSTSOUP_DATA")
needs_cifar10 = pytest.mark.skipif(
    not (data_root and (Path(data_root) / "cifar-10-batches-py").is_dir()),
    reason="set ROBUSTSOUP_DATA to the folder that holds cifar-10-batches-py",
)

robustbench = importlib.util.find_spec("robustbench")
needs_robustbench = pytest.mark.skipif(
    robustbench is None, reason="pip install --no-deps -c constraints.txt robustbench"
)


def model_zoo() -> Path:
    """Return the folder of RobustBench's model zoo; only for tests marked `needs_robustbench`.

    The folder is read without importing the package, which would import torchvision.
    """
    return Path(robustbench.submodule_search_locations[0]) / "model_zoo"

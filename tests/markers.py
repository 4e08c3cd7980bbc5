"""Markers: tests whose data or packages are absent, and combinations that take too long."""

import importlib.util
import itertools
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


def thinned(names, *values, one_in):
    """Parametrize with all combinations of `values`, but keep one in `one_in` for `make test`.

    Of one list, these are every `one_in`-th value. Of several, they lie on diagonals, and hold each
    value if another list has at least `one_in`. `make test-slow` runs the other combinations.
    """
    cases = []
    for combination in itertools.product(*map(enumerate, values)):
        positions, case = zip(*combination, strict=True)
        marks = pytest.mark.slow if sum(positions) % one_in else []
        cases.append(pytest.param(*case, id="-".join(map(str, case)), marks=marks))
    return pytest.mark.parametrize(names, cases)

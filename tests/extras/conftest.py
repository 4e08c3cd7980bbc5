"""What the tests with the real libraries share; `make test-extras` runs them."""

import importlib.util
import sys

import pytest

MISSING = [
    name
    for name in ("timm", "transformers", "torchvision", "robustbench")
    if importlib.util.find_spec(name) is None
]


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder, and skip them where a library is missing."""
    for item in items:
        if "extras" in item.path.parts:
            item.add_marker("extras")
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"make test-extras ({MISSING[0]} missing)"))


@pytest.fixture(autouse=True, scope="session")
def _autoattack_for_robustbench():
    """Let robustbench import pyautoattack, which its package requires, as `autoattack`."""
    if not MISSING:
        import pyautoattack

        sys.modules.setdefault("autoattack", pyautoattack)

"""Settings and fixtures of all tests.

Three environment variables change how the suite runs; no verdict may depend on them:

- ROBUSTSOUP_TEST_THREADS (default 1): the number of threads of PyTorch.
- ROBUSTSOUP_TEST_ORDER: a seed; shuffles the modules, and the tests within each module.
- ROBUSTSOUP_TEST_SEED (default 0): the seed of the networks that tests train: initial weights and
  sample order, not the split of the data (see trained_seed.py).
"""

import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure
from torchvision_operators import declare_operators

from robustsoup.progress import SavedState
from robustsoup.reports.style import FORMATS, STYLE

# The tests' networks are tiny: one thread each is fastest, and pytest-xdist keeps both cores busy.
THREADS = int(os.environ.get("ROBUSTSOUP_TEST_THREADS", "1"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)

# Commands that tests start would inherit signals that a shell or nohup ignores, but not a handler.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)

# The same examples everywhere, so that a test that passed here passes there;
# `pytest --hypothesis-profile default` looks for others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keep caches (decoded folders, downloads) out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def _modules_of_other_tests_forgotten(tmp_path_factory):
    """Forget modules that a test imported from a temporary folder; another may reuse the name."""
    before = set(sys.modules)
    yield
    temporary = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(temporary):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _own_global_randomness():
    """Start each test from one seed, whatever ran before, and leave the generator as it was."""
    before = torch.random.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.random.set_rng_state(before)


NUMERIC_ROOMS = ("attacks", "evaluation", "soups", "training")
TRAINED_ROOMS = (*NUMERIC_ROOMS, "cli", "data", "diagnosis", "runs")
TARGETS = ("browser", "extras", "scale", "simulations", "slow", "trust")
"""Markers of tests that only a target of their own runs."""


def pytest_collection_modifyitems(items):
    """Mark numeric tests and tests of trained networks, and shuffle all tests if requested."""
    for item in items:
        room = item.path.parent.name
        if any(item.get_closest_marker(name) for name in TARGETS):
            continue
        if room in NUMERIC_ROOMS:
            item.add_marker(pytest.mark.kernels)
        if room in TRAINED_ROOMS:
            item.add_marker(pytest.mark.trained)
    if order := os.environ.get("ROBUSTSOUP_TEST_ORDER"):
        items[:] = shuffle_by_module(items, random.Random(int(order)))


def pytest_runtest_setup(item):
    """Let tests of the optional libraries import torchvision from PyPI beside any PyTorch."""
    if item.get_closest_marker("extras"):
        declare_operators()


def shuffle_by_module(items, generator):
    """Return the tests with the modules shuffled, and the tests within each module."""
    modules = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    shuffled = generator.sample(list(modules.values()), len(modules))
    return [item for tests in shuffled for item in generator.sample(tests, len(tests))]


@pytest.fixture(scope="module")
def quick_figures():
    """Draw figures with few dots and simple fonts; tests/reports draws them as users get them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "pdf.fonttype", 3)
        patch.setitem(FORMATS["png"], "dpi", 40)
        yield


@pytest.fixture
def blank_figures(monkeypatch):
    """Write empty files for figures; tests/reports draws them as users get them."""

    def write_nothing(figure, path, **options):
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", write_nothing)
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda figure: None)


@pytest.fixture
def save_every_step(monkeypatch):
    """Save the state of every run after each step, not only when half a minute has passed."""
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)

import os

import pytest
import torch
from hypothesis import settings

from robustsoup.progress import SavedState
from robustsoup.reports.style import FORMATS, STYLE

# The tests' networks are tiny: one thread each is fastest, and pytest-xdist keeps both cores busy.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same examples everywhere, so that a test that passed here passes there;
# `pytest --hypothesis-profile default` looks for others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What is kept between runs (decoded folders, downloads) is kept in a place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def _global_randomness_untouched():
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)


NUMERIC_ROOMS = ("attacks", "evaluation", "soups", "training")


def pytest_collection_modifyitems(items):
    """Mark the numeric tests: `make test-kernels` repeats them with older processors' kernels."""
    for item in items:
        if item.path.parent.name in NUMERIC_ROOMS:
            item.add_marker(pytest.mark.kernels)


@pytest.fixture(scope="module")
def quick_figures():
    """Draw figures with few dots and simple fonts; tests/reports draws them as users get them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "pdf.fonttype", 3)
        patch.setitem(FORMATS["png"], "dpi", 40)
        yield


@pytest.fixture
def save_every_step(monkeypatch):
    """Save the state of every run after each step, not only when half a minute has passed."""
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The tests' networks are tiny: one thread each is fastest, and pytest-xdist keeps both cores busy.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same examples everywhere, so that what passed here passes there; `pytest --hypothesis-profile default` looks for others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

root = os.environ.get("ROBUSTSOUP_DATA")
needs_cifar10 = pytest.mark.skipif(
    not (root and (Path(root) / "cifar-10-batches-py").is_dir()),
    reason="set ROBUSTSOUP_DATA to the folder that holds cifar-10-batches-py",
)


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

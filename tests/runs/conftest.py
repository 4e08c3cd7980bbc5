import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import SCREENED, RecordingReporter, one_thread, recipe_of, run_recipe


@dataclass(frozen=True)
class FinishedRun:
    """A run from its beginning to its end."""

    folder: Path
    store: Path
    results: dict[str, Any]
    selection: Any
    reporter: RecordingReporter


@pytest.fixture(autouse=True)
def _blank_figures(blank_figures):
    """Draw no figures."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The tiny recipe, run on one thread. Do not change its files; `copied` has copies."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("ROBUSTSOUP_STORE", str(place / "store"))
        outcome = run_recipe(recipe_of(), place / "run")
    return FinishedRun(place / "run", place / "store", *outcome)


@pytest.fixture(scope="session")
def screened(finished, tmp_path_factory):
    """The tiny recipe with screening, run on a copy of the store of the finished run."""
    place = tmp_path_factory.mktemp("screened")
    shutil.copytree(finished.store, place / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTSOUP_STORE", str(place / "store"))
        outcome = run_recipe(recipe_of(SCREENED), place / "run")
    return FinishedRun(place / "run", place / "store", *outcome)


@pytest.fixture
def on_one_thread():
    """Run the test on one thread, as the finished run."""
    with one_thread():
        yield


@pytest.fixture
def copied(finished, tmp_path):
    """Copies of the run folder and the store of the finished run: (folder, store).

    The test runs on one thread too, so that a repeated step gives the same bytes.
    """
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.copytree(finished.store, tmp_path / "store")
    with one_thread():
        yield tmp_path / "run", tmp_path / "store"


@pytest.fixture
def files(finished, tmp_path):
    """A folder with copies of the checkpoints low and high."""
    for name in ("low", "high"):
        shutil.copy(finished.folder / "checkpoints" / f"{name}.safetensors", tmp_path)
    return tmp_path

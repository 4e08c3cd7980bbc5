"""The store: a step is finished or absent."""

import json

import pytest
from tiny_runs import recipe_of, run_recipe

from robustsoup.errors import StorageError
from robustsoup.runs.store import Store


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StorageError, match="store cannot be written"):
        run_recipe(recipe_of(), tmp_path / "run")


def test_a_step_is_finished_or_absent(tmp_path):
    store, key = Store(tmp_path), "ab12"

    def fail():
        with store.write_step(key, {"kind": "x"}) as folder:
            (folder / "state.pt").write_text("so far")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert not store.has(key)
    assert not store.path(key).exists()
    with store.write_step(key, {"kind": "x"}) as folder:
        assert (folder / "state.pt").read_text() == "so far"
        (folder / "out").write_text("done")
    assert store.has(key)
    assert {path.name for path in store.path(key).iterdir()} == {"out", "step.json"}
    assert json.loads((store.path(key) / "step.json").read_text()) == {"kind": "x"}
    with store.write_step(key, {}) as folder:
        assert folder is None

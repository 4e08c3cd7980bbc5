"""Saved state: written at intervals, refused to other work, removed at the end."""

import pytest
import torch

from robustsoup.errors import CheckpointError, StorageError
from robustsoup.progress import SavedState


def test_state_is_saved_loaded_and_cleared(tmp_path):
    path = tmp_path / "state.pt"
    saved = SavedState(path, "work")
    assert saved.load() is None
    saved.save({"step": 3, "tensor": torch.arange(2)})
    loaded = SavedState(path, "work").load()
    assert loaded["step"] == 3
    assert torch.equal(loaded["tensor"], torch.arange(2))
    assert set(loaded) == {"step", "tensor"}
    saved.clear()
    saved.clear()
    assert not path.exists()


def test_without_a_path_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = SavedState(None, "work", interval=0.0)
    saved.save({"step": 3})
    saved.clear()
    assert saved.load() is None
    assert not saved.due()
    assert not list(tmp_path.iterdir())


def test_state_is_due_once_the_interval_has_passed(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    saved = SavedState(tmp_path / "state.pt", "work", interval=30.0)
    assert not saved.due()
    now = 130.0
    assert saved.due()
    saved.save({})
    assert not saved.due()


def test_state_of_other_work_is_refused(tmp_path):
    SavedState(tmp_path / "state.pt", "work").save({})
    with pytest.raises(CheckpointError, match=r"state\.pt: saved by work with other settings"):
        SavedState(tmp_path / "state.pt", "other work").load()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_a_corrupt_state_is_refused(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SavedState(tmp_path / "state.pt", "work").load()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'state.pt'}: the saved state cannot be read (")
    assert message.endswith("); delete it to start again")
    assert message.isprintable()


def test_a_state_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        SavedState(tmp_path / "file" / "state.pt", "work").save({})

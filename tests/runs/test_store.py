"""The store: a step is finished or absent, and hands out what was put in."""

import errno
import json
import os
import shutil

import pytest
from tiny_runs import (
    FEW_SAMPLES,
    RecordingReporter,
    keys_of,
    plan_of,
    recipe_of,
    recipe_of_files,
    run_recipe,
    steps_of,
)

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import StorageError
from robustsoup.runs import store as store_module
from robustsoup.runs.store import Store


def ignore(text):
    """Receive a line that the test does not look at."""


def write_step(store, key, content="done", parents=()):
    with store.write_step(key, {"kind": "x"}, parents=parents, notice=ignore) as folder:
        if folder is not None:
            (folder / "out").write_text(content)
    return store.path(key)


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StorageError, match="store cannot be written"):
        run_recipe(recipe_of(), tmp_path / "run")


def test_a_step_is_finished_or_absent(tmp_path):
    store, key = Store(tmp_path), "ab12"

    def fail():
        with store.write_step(key, {"kind": "x"}, notice=ignore) as folder:
            (folder / "state.pt").write_text("so far")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert not store.has(key)
    assert not store.path(key).exists()
    with store.write_step(key, {"kind": "x"}, notice=ignore) as folder:
        assert (folder / "state.pt").read_text() == "so far"
        (folder / "out").write_text("done")
    assert store.has(key)
    assert {path.name for path in store.path(key).iterdir()} == {"out", "step.json"}
    assert store.record(key) == {"kind": "x"}
    assert store.file(key, "out").read_text() == "done"
    with store.write_step(key, {}, notice=ignore) as folder:
        assert folder is None
    assert {path.name for path in store.path(key).parent.iterdir()} == {key}


@pytest.mark.parametrize("moment", ["digest_folder", "write_text"])
def test_a_step_that_is_killed_while_it_is_published_keeps_its_state(tmp_path, monkeypatch, moment):
    store, key = Store(tmp_path), "ab12"

    def kill(*_, **__):
        raise KeyboardInterrupt

    def finish_step():
        with store.write_step(key, {"kind": "x"}, notice=ignore) as folder:
            (folder / "state.pt").write_text("all steps")
            (folder / "out").write_text("done")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, moment, kill)
        with pytest.raises(KeyboardInterrupt):
            finish_step()
    assert not store.has(key)
    with store.write_step(key, {"kind": "x"}, notice=ignore) as folder:
        assert (folder / "state.pt").read_text() == "all steps"
    assert store.has(key)
    assert {path.name for path in store.path(key).iterdir()} == {"out", "step.json"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "out").unlink(),
        lambda folder: (folder / "out").write_text(""),
        lambda folder: (folder / "out").write_text("DONE"),
        lambda folder: (folder / "step.json").unlink(),
        lambda folder: (folder / "step.json").write_text('{"kind": "x"'),
        lambda folder: (folder / "step.json").write_text("[]"),
        lambda folder: (folder / "step.json").write_bytes(b"\xff"),
        lambda folder: (folder / "step.json").write_text(
            (folder / "step.json").read_text().replace('"x"', '"y"')
        ),
        lambda folder: ((folder / "out").unlink(), (folder / "out").mkdir()),
    ],
)
def test_a_damaged_step_is_not_finished_and_is_replaced(tmp_path, damage):
    store, key = Store(tmp_path), "ab12"
    folder = write_step(store, key)
    damage(folder)
    assert not store.has(key)
    assert str(folder) in store.find_damage(key)
    with pytest.raises(StorageError, match="run the same command again, which repeats the step"):
        store.file(key, "out")
    write_step(store, key)
    assert store.has(key)
    assert store.file(key, "out").read_text() == "done"


@pytest.mark.parametrize("place", ["ab12", "ab12.partial"])
@pytest.mark.parametrize(
    "put", [lambda path: path.write_text("a file"), lambda path: path.symlink_to("elsewhere")]
)
def test_what_lies_in_the_place_of_a_step_is_replaced(tmp_path, place, put):
    store = Store(tmp_path)
    path = store.path("ab12").with_name(place)
    path.parent.mkdir()
    put(path)
    assert not store.has("ab12")
    write_step(store, "ab12")
    assert store.has("ab12")
    assert {path.name for path in path.parent.iterdir()} == {"ab12"}


def test_the_folder_of_another_step_is_not_finished(tmp_path):
    store = Store(tmp_path)
    other, own = write_step(store, "ab12", "other"), write_step(store, "ab34", "own")
    shutil.rmtree(own)
    shutil.copytree(other, own)
    assert "the record of another step, ab12" in store.find_damage("ab34")
    write_step(store, "ab34", "own")
    assert store.file("ab34", "out").read_text() == "own"


@pytest.mark.parametrize("kind", ["a FIFO", "an endless device", "1 TiB of zeros"])
def test_a_record_that_would_hang_or_fill_the_memory_counts_as_damage(tmp_path, kind):
    store, key = Store(tmp_path), "ab12"
    record = write_step(store, key) / "step.json"
    record.unlink()
    if kind == "a FIFO":
        os.mkfifo(record)
    elif kind == "an endless device":
        record.symlink_to("/dev/zero")
    else:
        record.touch()
        os.truncate(record, 2**40)
    assert not store.has(key)
    assert "cannot be read" in store.find_damage(key)


def test_a_change_that_keeps_size_and_time_is_found_on_request(tmp_path):
    store, key = Store(tmp_path), "ab12"
    path = write_step(store, key) / "out"
    state = path.stat()
    path.write_text("DONE")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert store.has(key)
    assert "its content changed" in store.find_damage(key, thorough=True)


def test_a_copied_store_is_still_finished(tmp_path):
    key = "ab12" * 8
    write_step(Store(tmp_path / "a"), key)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert Store(tmp_path / "b").has(key)
    assert Store(tmp_path / "b").keys() == [key]


def test_a_step_whose_parent_changed_is_not_finished(tmp_path):
    store = Store(tmp_path)
    write_step(store, "aa01", "first")
    write_step(store, "bb02", parents=("aa01", "a checkpoint that existed before"))
    (store.path("aa01") / "out").unlink()
    assert store.has("bb02")  # nothing says yet that its parent will be another one
    write_step(store, "aa01", "second")
    assert "made from another output of step aa01" in store.find_damage("bb02")
    write_step(store, "bb02", parents=("aa01",))
    assert store.has("bb02")


def damage_step(store, kind, name, file, content=b"cut"):
    path = Store(store).path(keys_of(plan_of())[kind, name]) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "name", "file", "content"),
    [
        ("finetune", "low", "checkpoint.safetensors", None),
        ("finetune", "low", "step.json", b"{"),
        ("learn", "learned-linf-32-255", "coefficients.safetensors", b"x"),
        ("evaluate", "low.val", "evaluation.json", b"{}"),
        ("evaluate", "low.val", "evaluation.points.npz", None),
        ("evaluate", "grid-0.5-0.5.val", "evaluation.json", b"{}"),
        ("evaluate", "grid-0.5-0.5.val", "evaluation.npz", None),
        ("mix", "grid-0.5-0.5", "checkpoint.safetensors", b""),
    ],
)
def test_a_run_repeats_a_damaged_step_with_one_line(copied, finished, kind, name, file, content):
    folder, store = copied
    damage_step(store, kind, name, file, content)
    results, _, reporter = run_recipe(recipe_of(), folder)
    assert reporter.finished_steps == [(kind, name)]
    assert [note for note in reporter.notes if "the step runs again" in note]
    assert len(reporter.notes) == 1
    assert results["rows"] == finished.results["rows"]
    _, _, again = run_recipe(recipe_of(), folder)
    assert again.finished_steps == again.notes == []


def test_what_is_copied_over_a_file_of_a_run_folder_does_not_reach_the_store(copied):
    folder, _ = copied
    low, high = (folder / "checkpoints" / f"{name}.safetensors" for name in ("low", "high"))
    digest = Checkpoint.load(low).digest
    run_recipe(recipe_of(), folder)
    assert {path.stat().st_nlink for path in folder.rglob("*") if path.is_file()} == {1}
    low.write_bytes(high.read_bytes())
    run_recipe(recipe_of(), folder.parent / "another")
    other = folder.parent / "another" / "checkpoints" / "low.safetensors"
    assert Checkpoint.load(other).digest == digest
    _, _, reporter = run_recipe(recipe_of(), folder)  # restores the file
    assert reporter.finished_steps == []
    assert Checkpoint.load(low).digest == digest


def test_a_step_that_changes_when_it_is_repeated_repeats_what_read_it(copied, monkeypatch):
    """The store's copy of `low` is replaced by another network, with its digests."""
    folder, store = copied
    keys = keys_of(plan_of())
    low, high = (Store(store).path(keys["finetune", name]) for name in ("low", "high"))
    record = dict(Store(store).record(low.name))
    shutil.rmtree(low)
    with Store(store).write_step(low.name, record, notice=ignore) as step:
        shutil.copytree(high, step, dirs_exist_ok=True)
    _, _, reporter = run_recipe(recipe_of(), folder)
    readers = {
        (step.kind, step.name)
        for step in steps_of(plan_of()).values()
        if keys["finetune", "low"] in step.parents
    }
    assert readers <= set(reporter.finished_steps)
    assert ("evaluate", "high.val") not in reporter.finished_steps


def test_damaged_remains_of_an_attempt_are_dropped(tmp_path, save_every_step):
    key = keys_of(plan_of())["pretrain", "pretrained"]
    partial = Store().path(key).with_name(f"{key}.partial")
    partial.mkdir(parents=True)
    (partial / "state.pt").write_bytes(b"PK\x03\x04 cut")
    reporter = RecordingReporter(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe_of(), tmp_path / "run", reporter)
    assert reporter.finished_steps == [("pretrain", "pretrained")]
    assert len([note for note in reporter.notes if "the step starts again" in note]) == 1


def test_a_disk_that_spoils_every_step_is_named(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "has", lambda self, key: False)
    with pytest.raises(StorageError, match="damaged again as soon as it is written; check the"):
        run_recipe(recipe_of_files(files, evaluate=FEW_SAMPLES), tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(files, tmp_path, monkeypatch):
    recipe, reporter = recipe_of_files(files, evaluate=FEW_SAMPLES), RecordingReporter()
    write_bytes, calls = json.dumps, []

    def fail_in_the_third_record(content, **settings):
        if isinstance(content, dict) and "inputs" in content and "digest" in content:
            calls.append(1)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(content, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail_in_the_third_record)
        with pytest.raises(StorageError, match="store cannot be written: No space left on device"):
            run_recipe(recipe, tmp_path / "run", reporter)
    _, _, resumed = run_recipe(recipe, tmp_path / "run")
    (steps,) = reporter.missing
    assert resumed.finished_steps == steps[2:]

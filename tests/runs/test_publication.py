"""A run folder is published as one step: old or new, and a mixture is seen."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from markers import thinned
from tiny_runs import find_leftovers, one_thread, recipe_of, run_recipe

from robustsoup import files
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main
from robustsoup.errors import RequestError, StorageError
from robustsoup.interruption import handled_signals
from robustsoup.reports import write_report
from robustsoup.runs import staging
from robustsoup.runs.results import Results

OTHER = [(("evaluate", "steps"), 2), (("ingredients", "low", "threat"), "Linf 24/255")]


class Stop(BaseException):
    """A kill: nothing that handles errors handles it."""


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """The run folder and the store of a run with other settings, run once: (folder, store)."""
    place = tmp_path_factory.mktemp("other")
    shutil.copytree(finished.store, place / "store")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("ROBUSTSOUP_STORE", str(place / "store"))
        run_recipe(recipe_of(OTHER), place / "run")
    return place / "run", place / "store"


@pytest.fixture
def other_run(copied, other):
    """The run folder and the recipe of a run with other settings, all of whose steps are stored."""
    folder, store = copied
    shutil.copytree(other[0], folder.parent / "other")
    shutil.copytree(other[1], store, dirs_exist_ok=True)
    return folder, recipe_of(OTHER)


def digests(folder):
    """Return the digest of each checkpoint that results.json names, by its file."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["checkpoint"]: Checkpoint.load(folder / row["checkpoint"]).digest for row in rows}


def test_results_hold_the_digest_of_every_file_but_themselves(finished):
    results = Results.load(finished.folder / "results.json")
    present = {
        path.relative_to(finished.folder).as_posix()
        for path in finished.folder.rglob("*")
        if path.is_file()
    }
    assert set(results.files) == present - {"results.json"}
    results.check_files(finished.folder)


def test_a_kill_before_the_first_rename_leaves_the_old_run_whole(other_run, monkeypatch):
    folder, recipe = other_run
    before = digests(folder)

    def stop(*arguments, **settings):
        raise Stop

    monkeypatch.setattr(staging.StagedFiles, "publish", stop)
    with pytest.raises(Stop):
        run_recipe(recipe, folder)
    assert digests(folder) == before
    write_report(folder)


@pytest.mark.parametrize(
    "renamed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_kill_between_renames_is_seen_by_report_and_mended_by_the_next_run(
    other_run, monkeypatch, renamed
):
    folder, recipe = other_run
    kill_at_rename(folder, recipe, renamed)
    with pytest.raises(RequestError, match="so it does not belong to results"):
        write_report(folder)
    run_recipe(recipe, folder)
    assert find_leftovers(folder) == []
    assert digests(folder) == digests(folder.parent / "other")
    write_report(folder)


def kill_at_rename(folder, recipe, renamed):
    """Run a recipe in a process that kills itself after some renames into the run folder."""
    script = f"""
import os, signal, sys
from robustsoup.cli import main
rename, count = os.replace, 0
def replace(source, target):
    global count
    if ".staging." in str(source) and ".staging." not in str(target):
        count += 1
        if count > {renamed}:
            os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
main(sys.argv[1:])
"""
    path = folder.parent / "other.toml"
    path.write_text(recipe.to_toml())
    arguments = ["run", path, "--threads", 1, "-o", folder]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_renames_waits_for_the_last_one(other_run, monkeypatch, number):
    folder, recipe = other_run
    rename, sent = staging.StagedFiles._rename, []

    def send_once(staged, name):
        if not sent:
            sent.append(name)
            os.kill(os.getpid(), number)
        rename(staged, name)

    monkeypatch.setattr(staging.StagedFiles, "_rename", send_once)
    with pytest.raises(KeyboardInterrupt), handled_signals(restore=True):
        run_recipe(recipe, folder)
    assert digests(folder) == digests(folder.parent / "other")
    assert find_leftovers(folder) == []
    write_report(folder)


def test_a_kill_between_removals_leaves_nothing_after_the_next_run(copied, monkeypatch):
    folder, _ = copied
    earlier = [f"evaluations/old{number}.json" for number in range(3)]
    add_files(folder, earlier)
    unlink, removed = Path.unlink, []

    def stop_at_the_second(path, missing_ok=False):
        if path.name.startswith("old"):
            removed.append(path)
            if len(removed) == 2:
                raise Stop
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop_at_the_second)
        with pytest.raises(Stop):
            run_recipe(recipe_of(), folder)
    assert sum((folder / name).exists() for name in earlier) == 2
    run_recipe(recipe_of(), folder)
    assert not [name for name in earlier if (folder / name).exists()]


def test_a_flip_that_keeps_the_time_is_mended_by_the_next_run(copied):
    folder, _ = copied
    path = folder / "checkpoints" / "low.safetensors"
    content, state = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    run_recipe(recipe_of(), folder)
    assert path.read_bytes() == content


@thinned("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT], one_in=2)
def test_a_folder_that_cannot_be_written_keeps_the_old_run(other_run, monkeypatch, code):
    folder, recipe = other_run
    before, calls, utime = digests(folder), [], os.utime

    def fail_at_the_third_copy(path, **settings):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(code, os.strerror(code))
        return utime(path, **settings)

    monkeypatch.setattr(os, "utime", fail_at_the_third_copy)
    with pytest.raises(StorageError, match=os.strerror(code)):
        run_recipe(recipe, folder)
    assert digests(folder) == before
    assert find_leftovers(folder) == []
    _, _, reporter = run_recipe(recipe, folder)
    assert reporter.finished_steps == []
    assert digests(folder) == digests(folder.parent / "other")


def test_a_folder_that_vanishes_during_the_run_is_written_again(copied):
    folder, _ = copied

    class RemovingReporter:
        notes = ()

        def begin(self, plan, missing):
            shutil.rmtree(folder, ignore_errors=True)

        def note(self, text):
            """Ignore it."""

    results, _, _ = run_recipe(recipe_of(), folder, RemovingReporter())
    assert len(digests(folder)) == len(results["rows"])


def add_files(folder, names):
    """Write files that the folder's results.json names, as those of an earlier run."""
    content = json.loads((folder / "results.json").read_text())
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("text")
    content["files"] |= dict.fromkeys(names, content["files"]["recipe.toml"])
    content["other"] = "," * 700_000  # as many as the rows of thousands of soups have
    (folder / "results.json").write_text(json.dumps(content))


def test_files_of_an_earlier_run_go_and_a_users_files_stay(copied):
    folder, _ = copied
    earlier = ("soup.pth", "evaluations/old.val.npz", "landscapes/old.json", "report.html")
    kept = ("notes.txt", "evaluations/mine.json", "checkpoints/old.safetensors")
    add_files(folder, (*earlier, kept[2]))
    for name in kept:
        (folder / name).write_text("text")
    run_recipe(recipe_of(), folder)
    assert not [name for name in earlier if (folder / name).exists()]
    assert all((folder / name).exists() for name in kept)


def test_hostile_names_in_results_remove_nothing(copied):
    folder, _ = copied
    victim = folder.parent / "victim"
    victim.write_text("mine")
    content = json.loads((folder / "results.json").read_text())
    entry = content["files"]["recipe.toml"]
    names = ("../victim", "evaluations/../../victim", str(victim), "evaluations/..")
    content["files"] |= dict.fromkeys(names, entry)
    (folder / "results.json").write_text(json.dumps(content))
    run_recipe(recipe_of(), folder)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("file", ["checkpoints/low.safetensors", "evaluations/low.test.npz"])
def test_a_file_that_was_replaced_is_refused_by_report(copied, file, capsys):
    folder, _ = copied
    path = folder / file
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: its content changed" in error


def test_results_that_were_edited_are_refused(copied):
    folder, _ = copied
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"name": "tiny"', '"name": "tidy"'))
    with pytest.raises(RequestError, match="its content changed"):
        Results.load(path)


def test_results_without_digests_are_read(copied):
    folder, _ = copied
    content = json.loads((folder / "results.json").read_text())
    del content["digest"], content["files"]
    (folder / "results.json").write_text(json.dumps(content))
    assert Results.load(folder / "results.json").files == {}
    write_report(folder)


def test_a_copy_is_a_file_of_its_own_with_the_time_of_the_source(tmp_path):
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_text("content")
    os.utime(source, (1, 1))
    files.copy_file(source, target)
    assert target.read_text() == "content"
    assert not target.samefile(source)
    assert target.stat().st_mtime_ns == source.stat().st_mtime_ns
    with pytest.raises(StorageError, match="target: cannot be written"):
        files.copy_file(tmp_path / "absent", target)
    assert target.read_text() == "content"


@pytest.mark.skipif(sys.platform != "linux", reason="clones are made on Linux")
def test_a_file_is_cloned_where_the_file_system_can(tmp_path, monkeypatch):
    import fcntl

    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("content")
    requests = []

    def clone(copy, request, original):
        requests.append(request)
        os.write(copy, Path(f"/proc/self/fd/{original}").read_bytes())

    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr(shutil, "copyfile", pytest.fail)
    files.copy_file(source, target)
    assert target.read_text() == "content"
    assert requests == [0x40049409]

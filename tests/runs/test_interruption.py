"""Interrupted and killed runs resume, and equal undisturbed ones."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import (
    FEW_SAMPLES,
    RecordingReporter,
    find_leftovers,
    forget_steps,
    modification_times,
    plan_of,
    recipe_of,
    recipe_of_files,
    run_recipe,
    steps_of,
)

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import Diverged
from robustsoup.runs.execute import StepClock
from robustsoup.runs.store import Store


def test_seconds_before_a_kill_count(tmp_path, monkeypatch):
    monkeypatch.setattr(StepClock, "SAVE_EVERY", 0.0)
    path, reporter, step = tmp_path / "seconds.txt", RecordingReporter(), plan_of().steps[0]
    StepClock(path, reporter, step)(1, 4, "")
    assert reporter.shares == [0.25]
    path.write_text(f"{float(path.read_text()) + 10_000:.3f}")  # as if it had worked for hours
    assert StepClock(path, reporter, step).stop() > 10_000
    assert not path.exists()
    assert StepClock(path, reporter, step).stop() < 10_000


def test_finished_steps_stay_when_a_run_is_interrupted(files, tmp_path):
    recipe, first = recipe_of_files(files, evaluate=FEW_SAMPLES), RecordingReporter(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "run", first)
    assert not (tmp_path / "run" / "results.json").exists()
    _, _, second = run_recipe(recipe, tmp_path / "run")
    (steps,) = first.missing
    assert second.missing == [steps[3:]]
    assert first.finished_steps + second.finished_steps == steps


def test_a_failing_step_is_named_and_earlier_steps_stay(copied):
    folder, store = copied
    forget_steps(store, "low", "high")
    diverging = recipe_of([(("ingredients", "high", "lr"), 1e30)])
    with pytest.raises(Diverged, match=r"^high: train: the loss became"):
        run_recipe(diverging, folder)
    _, _, reporter = run_recipe(recipe_of(), folder)
    assert reporter.finished_steps == [("finetune", "high")]


def test_a_step_without_its_record_runs_again(copied):
    folder, store = copied
    place = Store(store).path(steps_of(plan_of())["finetune", "low"].key)
    (place / "step.json").unlink()
    (place / "checkpoint.safetensors").write_bytes(b"half")
    _, _, reporter = run_recipe(recipe_of(), folder)
    assert reporter.finished_steps == [("finetune", "low")]
    assert Checkpoint.load(folder / "checkpoints" / "low.safetensors")


# Kills


SELF_KILLING = """
import os, signal, sys
from robustsoup.cli import main

rename, remaining, name = os.replace, int(sys.argv.pop(1)), sys.argv.pop(1)
def replace(source, target):
    global remaining
    if name in str(target):
        remaining -= 1
        if not remaining:
            os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = replace
main(sys.argv[1:])
"""
"""Runs the command line; kills itself before the n-th rename to a path that contains a name."""


@pytest.fixture
def tiny_arguments(tmp_path):
    """The arguments that run the tiny recipe into tmp_path/run."""
    (tmp_path / "tiny.toml").write_text(recipe_of().to_toml())
    arguments = ["run", tmp_path / "tiny.toml", "--threads", 1, "-o", tmp_path / "run"]
    return [*map(str, arguments), "--set", "report.figures=[]"]


def start_python(*arguments):
    """Start Python on one thread."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lasting_output(folder):
    """Return what must not depend on kills: rows, selection and digests of all checkpoints."""
    results = json.loads((folder / "results.json").read_text())
    paths = sorted((folder / "checkpoints").iterdir())
    digests = {path.name: Checkpoint.load(path).digest for path in paths}
    return results["rows"], results["selection"], digests


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("evaluation.json", 3),
        ("checkpoint.safetensors", 2),
    ],
)
def test_a_run_killed_while_it_writes_equals_an_undisturbed_one(
    finished, tmp_path, tiny_arguments, name, number
):
    process = start_python("-c", SELF_KILLING, number, name, *tiny_arguments)
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr
    _, _, reporter = run_recipe(recipe_of([(("report", "figures"), [])]), tmp_path / "run")
    assert 0 < len(reporter.finished_steps) < len(finished.reporter.finished_steps)
    assert lasting_output(tmp_path / "run") == lasting_output(finished.folder)
    assert find_leftovers(tmp_path / "run") == find_leftovers(tmp_path / "store") == []


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_an_undisturbed_one(
    finished, tmp_path, tiny_arguments
):
    """Kill several times, each at a random moment after files have changed."""
    folder, store = tmp_path / "run", tmp_path / "store"
    seed = random.SystemRandom().randrange(10**6)
    generator, kills = random.Random(seed), 0
    for _ in range(6):
        process, before = start_python("-m", "robustsoup", *tiny_arguments), files_below(tmp_path)
        while process.poll() is None and files_below(tmp_path) == before:
            time.sleep(0.02)
        try:
            process.wait(generator.uniform(0, 0.7))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.communicate()
    last = start_python("-m", "robustsoup", *tiny_arguments)
    _, stderr = last.communicate()
    assert last.returncode == 0, (seed, stderr)
    assert kills > 0, seed
    assert lasting_output(folder) == lasting_output(finished.folder), seed
    assert find_leftovers(folder) == [], seed
    assert [p for p in find_leftovers(store) if not p.endswith(".lock")] == [], seed
    assert (folder / "report.html").exists()


def files_below(folder):
    """Return every file below a folder and its last change, while another process writes there."""
    while True:
        try:
            return modification_times(folder)
        except FileNotFoundError:  # renamed between listing and reading
            continue


def test_a_kill_while_results_are_written_leaves_the_old_file(finished, tmp_path, tiny_arguments):
    """The kill falls between writing results.json and renaming it; the next run tidies up."""
    shutil.copytree(finished.store, tmp_path / "store")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "results.json"
    path.write_text("old")
    process = start_python("-c", SELF_KILLING, 1, "results.json", *tiny_arguments)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    results, _, _ = run_recipe(recipe_of(), tmp_path / "run")
    assert json.loads(path.read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    assert find_leftovers(tmp_path / "run") == []

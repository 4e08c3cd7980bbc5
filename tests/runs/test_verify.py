"""`robustsoup verify` and `robustsoup doctor --prune`."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_runs import find_leftovers, keys_of, plan_of, recipe_of, run_recipe

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.runs import caches
from robustsoup.runs.locks import claim_unused_folder, hold_folder
from robustsoup.runs.store import Store


def run(*arguments):
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def verify(path, capsys):
    """Return the exit code of verify and what it says of each name."""
    code = run("verify", path, "--json")
    return code, {
        one["name"]: one["damage"] if one["recorded"] else "unrecorded"
        for one in json.loads(capsys.readouterr().out)
    }


def flip(path, position=-1):
    """Change one bit and keep the size and the time of the last change."""
    state, content = path.stat(), bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_an_untouched_run_and_its_store_are_as_written(finished, capsys):
    for path in (finished.folder, finished.folder / "results.json", finished.store):
        code, outcomes = verify(path, capsys)
        assert code == 0
        assert set(outcomes.values()) == {None}
    assert len(outcomes) == len(plan_of().steps)


def test_a_table_names_each_file(copied, capsys):
    folder, _ = copied
    flip(folder / "checkpoints" / "low.safetensors")
    assert run("verify", folder) == 1
    printed = capsys.readouterr().out
    assert "its content changed" in printed
    assert f"{folder}: " in printed
    assert "1 damaged or missing" in printed


@pytest.mark.parametrize(
    "name",
    [
        "recipe.toml",
        "checkpoints/low.safetensors",
        "coefficients/learned-linf-32-255.safetensors",
        "evaluations/low.test.json",
        "evaluations/low.test.npz",
        "soup.safetensors",
    ],
)
def test_a_flip_that_keeps_the_time_is_found_in_every_file_of_a_run(copied, name, capsys):
    folder, _ = copied
    flip(folder / name)
    code, outcomes = verify(folder, capsys)
    assert (code, outcomes.pop(name)) == (1, "its content changed")
    assert set(outcomes.values()) == {None}


def test_missing_files_edited_results_and_unnamed_files_are_told_apart(copied, capsys):
    folder, _ = copied
    (folder / "evaluations" / "low.test.npz").unlink()
    shutil.copy(folder / "soup.safetensors", folder / "checkpoints" / "mine.safetensors")
    code, outcomes = verify(folder, capsys)
    assert code == 1
    assert outcomes["evaluations/low.test.npz"] == "is missing"
    assert outcomes["checkpoints/mine.safetensors"] == "unrecorded"
    results = folder / "results.json"
    results.write_text(results.read_text().replace('"seconds": ', '"seconds": 1'))
    code, outcomes = verify(folder, capsys)
    assert code == 1
    assert outcomes["results.json"].startswith("its content changed")


def test_a_flip_in_the_store_is_found(copied, capsys):
    _, store = copied
    key = keys_of(plan_of())["finetune", "low"]
    flip(Store(store).path(key) / "checkpoint.safetensors")
    code, outcomes = verify(store, capsys)
    assert code == 1
    assert outcomes[f"{key[:2]}/{key}"] == "checkpoint.safetensors: its content changed"


@pytest.mark.parametrize(
    "name", ["checkpoints/low.safetensors", "evaluations/low.test.json", "soup.safetensors"]
)
def test_a_single_file_is_verified_by_the_digests_in_it(copied, name, capsys):
    path = copied[0] / name
    code, outcomes = verify(path, capsys)
    assert (code, outcomes) == (0, {path.name: None})
    flip(path if path.suffix == ".safetensors" else path.with_suffix(".npz"), -200)
    code, outcomes = verify(path, capsys)
    assert code == 1
    assert outcomes[path.name]


def test_points_that_are_gone_are_missing_unless_a_run_left_them_out(copied, capsys):
    folder, _ = copied
    of_run, moved = folder / "evaluations" / "low.test.json", folder.parent / "low.json"
    evaluation = Evaluation.load(of_run)
    ((name, verdicts),) = evaluation.threats.items()
    kept = replace(verdicts, x_adv=torch.zeros(len(evaluation.ids), 1, 8, 8))
    for path in (of_run, moved):
        replace(evaluation, threats={name: kept}).save(path)
        assert verify(path, capsys) == (0, {path.name: None})
        path.with_suffix(".points.npz").unlink()
    assert verify(of_run, capsys) == (0, {of_run.name: None})
    assert verify(moved, capsys) == (1, {moved.name: "low.points.npz is missing"})


def test_a_folder_of_files_is_verified_file_by_file(copied, capsys):
    folder = copied[0] / "evaluations"
    code, outcomes = verify(folder, capsys)
    assert code == 0
    assert "low.test.json" in outcomes
    (folder / "r1" / "r1-old").mkdir(parents=True)  # two folders that look like those of a store
    torch.save({"weight": torch.zeros(3)}, folder / "foreign.pt")
    code, outcomes = verify(folder, capsys)
    assert (code, outcomes["foreign.pt"]) == (0, "unrecorded")


def test_an_index_stands_for_the_shards_beside_it(tmp_path, capsys):
    shards = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    for shard in shards:
        Checkpoint({"weight": torch.ones(64)}).save(shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {item.stem: item.name for item in shards}}))
    intact = dict.fromkeys([item.name for item in shards]) | {index.name: "unrecorded"}
    assert verify(index, capsys) == (0, intact)
    flip(shards[0], -200)
    shards[1].unlink()
    code, outcomes = verify(index, capsys)
    assert code == 1
    assert "was changed" in outcomes[shards[0].name]
    assert "no such file" in outcomes[shards[1].name]
    index.write_text("{}")
    code, outcomes = verify(index, capsys)
    assert code == 1
    assert "no index of a checkpoint" in outcomes[index.name]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_what_robustsoup_did_not_write_is_a_wrong_request(tmp_path, make, capsys):
    path = tmp_path / "thing"
    make(path)
    assert run("verify", path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "notes.txt").write_text("text")
    assert run("verify", tmp_path / "notes.txt") == 2


def test_doctor_shows_and_prunes_what_the_caches_hold(copied, capsys):
    folder, store = copied
    (store / "unfinished").mkdir()
    (store / "unfinished" / f"{'0' * 32}.pt").write_bytes(b"state")
    (store / "mine.txt").write_text("a user's")
    entries = len(plan_of().steps) + 1
    assert run("doctor", "--json") == 0
    described = json.loads(capsys.readouterr().out)["caches"]["steps"]
    assert described["entries"] == entries
    assert described["bytes"] > 10_000
    assert run("doctor", "--prune") == 2  # nobody can answer
    assert Store(store).keys()
    assert run("doctor", "--yes") == 2
    capsys.readouterr()
    assert run("doctor", "--prune", "--yes") == 0
    assert f"cached steps: {entries} entries" in capsys.readouterr().out
    assert Store(store).keys() == []
    assert (store / "mine.txt").exists()
    assert (folder / "results.json").exists()
    assert run("doctor", "--prune", "--yes") == 0
    assert "nothing to prune" in capsys.readouterr().out
    _, _, reporter = run_recipe(recipe_of(), folder)
    assert len(reporter.finished_steps) == entries - 1


HOLD = """
import sys
from pathlib import Path
from robustsoup.runs.locks import hold_folder
hold_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX locks")
def test_a_store_that_a_run_holds_is_not_pruned(copied, capsys):
    _, store = copied
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    assert run("doctor", "--prune", "--yes") == 1
    assert "another process of robustsoup uses it" in capsys.readouterr().err
    assert Store(store).keys()
    process.communicate("\n")
    assert run("doctor", "--prune", "--yes") == 0
    assert Store(store).keys() == []


def test_holding_is_shared_and_ends_where_this_process_prunes(tmp_path):
    hold_folder(tmp_path)
    hold_folder(tmp_path)
    with claim_unused_folder(tmp_path):
        pass
    hold_folder(tmp_path / "file" / "below")
    (tmp_path / "blocked").write_text("")
    hold_folder(tmp_path / "blocked")  # nothing can be held there, and that is no error


def test_every_cache_of_the_user_is_listed():
    assert [cache.name for cache in caches.list_caches()] == [
        "steps",
        "decoded folders",
        "digests",
        "remote checkpoints",
    ]


# Several processes


def start(folder, recipe, *arguments):
    """Start a run as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "robustsoup", "run", recipe, "-o", folder, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("folders", [("run",) * 4, ("a", "b", "c", "d")])
def test_four_runs_at_once_on_one_store_all_succeed(copied, tmp_path, folders):
    """Into one folder and into four; three steps are left to do, so that they meet in the store."""
    _, store = copied
    for kind_and_name in (("finetune", "low"), ("evaluate", "low.val"), ("mix", "grid-0.5-0.5")):
        shutil.rmtree(Store(store).path(keys_of(plan_of())[kind_and_name]))
    (tmp_path / "tiny.toml").write_text(recipe_of().to_toml())
    shutil.rmtree(tmp_path / "run")
    processes = [
        start(tmp_path / folder, tmp_path / "tiny.toml", "--set", "report.figures=[]")
        for folder in folders
    ]
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error
        assert "Traceback" not in error
    for folder in set(folders):
        assert find_leftovers(tmp_path / folder) == []
        assert run("verify", tmp_path / folder) == 0
    assert find_leftovers(store) == []
    assert run("verify", store) == 0

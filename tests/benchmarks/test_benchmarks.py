"""Every script under benchmarks/ runs in its small form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from common import RECIPES, run_recipe_small

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TIMED = ("attack", "scaling")
TIMED_LONGER = (
    *("grid", "learning", "learning_memory", "memory", "strong", "surrogate", "training_attack"),
)
READ_RUN_FOLDERS = ("ablations", "claims")
LIBRARIES = ("common",)
LINUX_ONLY = ("learning_memory", "memory")


def run_script(path, *arguments, cache):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHON": sys.executable}
    return subprocess.run(
        [*path, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


def test_every_script_is_run_here():
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert names == {*TIMED, *TIMED_LONGER, *READ_RUN_FOLDERS, *LIBRARIES, "gpu", "exchanged_bytes"}


@pytest.mark.parametrize(
    "name", [*TIMED, *(pytest.param(name, marks=pytest.mark.slow) for name in TIMED_LONGER)]
)
def test_it_runs_small_and_prints_the_machine_and_a_ratio(name, cache):
    if name in LINUX_ONLY and sys.platform != "linux":
        pytest.skip("reads /proc")
    done = run_script([sys.executable, BENCHMARKS / f"{name}.py"], "--small", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "threads on" in done.stdout
    assert "|---|" in done.stdout or " x as fast" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_RUN_FOLDERS)
def test_it_runs_recipes_on_digits_and_prints_tables(name, cache):
    done = run_script([sys.executable, BENCHMARKS / f"{name}.py"], "--small", cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|---|") >= 4
    assert "nan" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("[!_]*.toml")), ids=lambda path: path.stem)
def test_each_family_of_recipes_runs_on_digits(recipe, tmp_path):
    folder = run_recipe_small(recipe.stem, tmp_path)
    assert (folder / "results.json").is_file()
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_the_gpu_script_runs_small_on_a_cpu(tmp_path, cache):
    script = ["bash", BENCHMARKS / "gpu.sh"]
    done = run_script(script, "--device", "cpu", "--small", "-o", tmp_path, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert set(results) == {"machine", "tests", "attack", "steps", "pretraining"}
    assert not [name for name, section in results.items() if "error" in section]
    assert results["steps"]["rows"][0]["float32"]["learning_step_seconds"] > 0
    assert all(row["float32"]["limit_seconds"] > 0 for row in results["attack"]["rows"])
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "step of training" in table
    assert "Pre-training resnet9" in table


def test_the_gpu_script_without_a_gpu_says_how_to_try_it():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = ["bash", BENCHMARKS / "gpu.sh"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "no CUDA device; to try the script: --device cpu --small" in done.stderr


@pytest.mark.scale
def test_the_exchanged_bytes_are_counted(cache):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = BENCHMARKS / "exchanged_bytes.py"
    ended = run_script(
        [*torchrun, "--nproc-per-node", "2", str(script)], "resnet9:width=2", cache=cache
    )
    assert ended.returncode == 0, ended.stderr
    rows = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines()]
    assert [row[2] for row in rows] == ["train", "learn"]
    parameters, trained, learned = (
        int(text.replace(",", "")) for text in (rows[0][1], rows[0][3], rows[1][3])
    )
    layers, n = 25, 2
    assert trained - 4 * parameters == learned - 8 * layers * n > 0

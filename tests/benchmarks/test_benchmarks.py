"""Every script under benchmarks/ runs in its small form."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pieces
import pytest
from ablations import format_difference
from claims import RunResults, format_interval, line_tables, plane_table
from common import RECIPES, run_recipe_small
from fine_tunes import draw_on_line
from gpu import SECTIONS
from merging import draw_gain, find_front

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TIMED = ("attack",)
TIMED_LONGER = (
    *("grid", "learning", "learning_memory", "memory", "scaling", "strong", "surrogate"),
    "training_attack",
)
READ_RUN_FOLDERS = {"ablations": 4, "claims": 4, "fine_tunes": 1, "merging": 1, "subspaces": 1}
"""Scripts that read run folders, with the fewest separators of table heads that they print."""
LIBRARIES = ("common",)
FAMILIES = sorted(set(RECIPES.glob("[!_]*.toml")) - set(RECIPES.glob("choosing_*.toml")))
"""Recipes of two cores, less those for `surrogate.py --small`, which runs one of them."""
LINUX_ONLY = ("learning_memory", "memory")
ON_CPU = ("attack", "exchanged_bytes", "grid", "learning", "learning_memory", "strong")
"""Scripts that compare with CPU code or count on CPUs, and call functions that take a device."""
TAKE_A_DEVICE = ("rs.evaluate", "rs.learn", "rs.search", "rs.train")


def run_script(path, *arguments, cache, timeout=600):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHON": sys.executable}
    return subprocess.run(
        [*path, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


def test_every_script_is_run_here():
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert names == {
        *TIMED,
        *TIMED_LONGER,
        *READ_RUN_FOLDERS,
        *LIBRARIES,
        "gpu",
        "exchanged_bytes",
        "pieces",
        "scale",
    }


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


@pytest.mark.parametrize("name", ON_CPU)
def test_it_stays_on_the_cpu_on_a_machine_with_a_gpu(name):
    tree = ast.parse((BENCHMARKS / f"{name}.py").read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for called in (node.func, *node.args)  # or partial(rs.evaluate, ...)
        if ast.unparse(called) in TAKE_A_DEVICE
    ]
    assert calls
    for call in calls:
        devices = [word.value for word in call.keywords if word.arg == "device"]
        assert [ast.literal_eval(device) for device in devices] == ["cpu"], ast.unparse(call)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_RUN_FOLDERS)
def test_it_runs_recipes_on_digits_and_prints_tables(name, cache):
    done = run_script([sys.executable, BENCHMARKS / f"{name}.py"], "--small", cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|---|") >= READ_RUN_FOLDERS[name]
    assert "nan" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FAMILIES, ids=lambda path: path.stem)
def test_each_family_of_recipes_runs_on_digits(recipe, tmp_path):
    folder = run_recipe_small(recipe.stem, tmp_path)
    assert (folder / "results.json").is_file()
    assert (folder / "report.html").is_file()


@pytest.mark.scale
def test_the_demonstration_of_many_processes_runs_small(cache):
    pytest.importorskip("ray")
    pytest.importorskip("submitit")
    script = [sys.executable, BENCHMARKS / "scale.py"]
    done = run_script(script, "--small", cache=cache, timeout=1800)  # many processes start
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:5] for line in done.stdout.splitlines()].count("|---|") == 3
    assert "are the same for all of them" in done.stdout
    assert "Results are the same" in done.stdout


@pytest.mark.slow
def test_the_gpu_script_runs_small_on_a_cpu(tmp_path, cache):
    script = ["bash", BENCHMARKS / "gpu.sh"]
    done = run_script(script, "--device", "cpu", "--small", "-o", tmp_path, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert set(results) == {"machine", *SECTIONS}
    assert not [name for name, section in results.items() if "error" in section]
    assert results["steps"]["rows"][0]["float32"]["learning_step_seconds"] > 0
    for section in ("attack", "attack_on_trained"):
        assert all(row["float32"]["limit_seconds"] > 0 for row in results[section]["rows"])
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "step of training" in table
    assert "Pre-training resnet9" in table


@pytest.mark.slow
def test_the_gpu_script_without_a_gpu_says_how_to_try_it():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = ["bash", BENCHMARKS / "gpu.sh"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "no CUDA device; to try the script: --device cpu --small" in done.stderr


@pytest.mark.slow
def test_a_run_in_pieces_ends_like_one_at_once(cache):
    done = run_script([sys.executable, BENCHMARKS / "pieces.py"], "--small", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "files of at most 15 MiB: 1" in done.stdout
    assert "evaluations with the same verdicts" in done.stdout


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


def test_a_line_is_read_between_neighbouring_soups():
    """Robust accuracy at a clean accuracy, interpolated in each draw; undefined outside."""
    clean = {"a": [50, 50], "b": [70, 60], "end": [80, 80]}
    robust = {"a": [40, 40], "b": [30, 38], "end": [10, 20]}
    run = SimpleNamespace(
        draw_accuracy=lambda name, measure: np.array(
            {"clean": clean, "Linf": robust}[measure][name]
        )
    )
    drawn = draw_on_line(run, ["end", "b", "a"], np.array([60, 70]), "Linf")
    assert drawn.tolist() == [35, 29]
    outside = draw_on_line(run, ["end", "b", "a"], np.array([49, 81]), "Linf")
    assert np.isnan(outside).all()


def test_a_merge_is_compared_with_the_front_of_its_grid():
    points = {
        "eps4": (80, 20), "eps16": (50, 40), "half": (66, 38), "dominated": (60, 30),
        "between": (73, 27), "robust": (40, 41), "clean": (90, 10),
    }  # fmt: skip
    ends = ["eps4", "eps16"]
    rows = {
        name: {
            "name": name,
            "role": "grid" if name in ("half", "dominated") else "merge",
            "ingredients": None if name in ends else ends,
            "val": {"clean": {"value": clean}, "Linf": {"value": robust}},
        }
        for name, (clean, robust) in points.items()
    }
    on_test = points | {"half": (66, 42)}  # where the choice on val, eps16, is not the most robust

    class Run(RunResults):
        def __init__(self):
            self.rows, self.select_on = rows, "val"

        def draw_accuracy(self, name, measure):
            return np.full(2, on_test[name][measure == "Linf"], dtype=float)

    run = Run()
    assert set(find_front(run, ends, "Linf")) == {"eps4", "half", "eps16"}
    assert draw_gain(run, rows["between"], "Linf").tolist() == [-4, -4]
    assert draw_gain(run, rows["robust"], "Linf").tolist() == [1, 1]
    assert draw_gain(run, rows["clean"], "Linf").tolist() == [-10, -10]


def test_without_a_grid_the_front_is_that_of_the_ingredients():
    points = {"eps4": (80, 20), "eps16": (50, 40), "worse": (49, 39)}
    rows = {
        name: {
            "name": name,
            "role": "ingredient",
            "ingredients": None,
            "val": {"clean": {"value": clean}, "Linf": {"value": robust}},
        }
        for name, (clean, robust) in points.items()
    }
    run = SimpleNamespace(rows=rows, select_on="val")
    assert find_front(run, list(points), "Linf") == ["eps4", "eps16"]


def test_verdicts_of_another_attack_take_the_place_of_the_runs_own(tmp_path):
    rows = [{"name": name, "role": "line", "soup": "line"} for name in ("a-0.5", "b")]
    protocol = {"select_on": "val", "report_on": "test", "threats": ["clean", "Linf 8/255"]}
    results = {"rows": rows, "protocol": protocol}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    autoattack = tmp_path / "autoattack"
    autoattack.mkdir()
    record = {"threats": ["L2 0.5", "clean", "Linf 8/255"]}
    (autoattack / "a-0.5.test.json").write_text(json.dumps(record), encoding="utf-8")
    labels = np.arange(4)
    robust = {"robust_0": labels > 9, "robust_1": np.array([True, False, False, False])}
    np.savez(autoattack / "a-0.5.test.npz", prediction=labels, labels=labels, **robust)
    run = RunResults(tmp_path, autoattack)
    assert list(run.rows) == ["a-0.5"]
    assert run.rows_by_section("line") == {"line": [rows[0]]}
    assert run.draw_accuracy("a-0.5", "clean")[-1] == 100
    assert run.draw_accuracy("a-0.5", "Linf 8/255")[-1] == 25
    assert list(RunResults(tmp_path).rows) == ["a-0.5", "b"]
    with pytest.raises(SystemExit, match="no verdicts on test"):
        RunResults(tmp_path, tmp_path / "empty")
    (autoattack / "a-0.5.test.json").write_text('{"threats": ["L2 0.5"]}', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"under L2 0\.5, expected Linf 8/255"):
        RunResults(tmp_path, autoattack).draw_accuracy("a-0.5", "clean")


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A store with a file of two parts, and the folder that its parts are packed into."""
    monkeypatch.setattr(pieces, "PART_BYTES", 4096)
    state = tmp_path / "store" / "ab" / "abcd" / "state.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(np.random.default_rng(0).bytes(6000))
    return pieces.Store(tmp_path / "store"), tmp_path / "parts"


def test_a_full_disk_leaves_the_earlier_parts(packed, monkeypatch):
    store, folder = packed
    earlier = {path: path.read_bytes() for path in pieces.pack(store, folder)}
    assert len(earlier) == 2
    write = Path.write_bytes

    def write_first(path, content):
        if path.name != "part-000":
            raise OSError("no space left on device")
        return write(path, content)

    (store.root / "ab" / "abcd" / "state.pt").write_bytes(np.random.default_rng(1).bytes(5000))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_first)
        with pytest.raises(OSError, match="no space"):
            pieces.pack(store, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == earlier
    (store.root / "ab" / "abcd" / "state.pt").write_bytes(b"short")
    assert pieces.pack(store, folder) == list(folder.iterdir()) == [folder / "part-000"]


@pytest.fixture
def stop_run(monkeypatch):
    """A function that sets how the run of a piece is stopped, and with what exit code it ends."""

    def patch(stop, code):
        calls = []

        class Process:
            def __init__(self, *_, **__):
                pass

            def wait(self, _timeout=None):
                calls.append("wait")
                if len(calls) == 1:
                    raise stop
                return code

            def terminate(self):
                calls.append("terminate")

        monkeypatch.setattr(pieces.subprocess, "Popen", Process)
        return calls

    return patch


def test_an_interrupted_piece_ends_its_run_and_packs(packed, stop_run):
    store, folder = packed
    calls = stop_run(KeyboardInterrupt, 130)
    with pytest.raises(KeyboardInterrupt):
        pieces.run_piece([], store, 1, pack_to=folder)
    assert calls == ["wait", "terminate", "wait"]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(("code", "answer"), [(143, 75), (0, 0), (1, 1)])
def test_a_piece_whose_time_is_over_is_unfinished_unless_its_run_ended(
    packed, stop_run, code, answer
):
    store, folder = packed
    calls = stop_run(subprocess.TimeoutExpired("run", 60), code)
    assert pieces.run_piece([], store, 1, pack_to=folder) == answer
    assert calls == ["wait", "terminate", "wait"]
    assert len(list(folder.iterdir())) == 2


def test_every_seed_has_its_tables_of_lines_and_planes():
    runs = [
        SimpleNamespace(
            results={"name": "wise-ft", "recipe": {"seed": seed}, "planes": []},
            threats=["Linf 8/255"],
            rows_by_section=lambda role: {},
        )
        for seed in (3, 5)
    ]
    lines = [*line_tables(runs), *(text for run in runs for text in plane_table(run))]
    titles = [line.strip() for line in lines if "**" in line]
    assert titles == [
        *(f"**wise-ft, Linf 8/255** (seed {seed})" for seed in (3, 5)),
        *(f"**wise-ft** (seed {seed})" for seed in (3, 5)),
    ]


def test_ten_seeds_have_an_interval_and_eleven_a_message():
    assert format_difference([0.0, 1.0] * 5) == "+0.5 ± 0.4"
    assert format_interval([np.array([0.0, value]) for value in range(6)]) == "+2.5 ± 2.0"
    with pytest.raises(SystemExit, match="got 11 seeds, expected 2 to 10"):
        format_difference([0.0] * 11)


def test_an_interval_that_is_not_defined_is_a_dash():
    assert format_interval([np.array([1.0, np.nan, 2.0])]) == "-"
    assert format_interval([np.array([1.0, 1.0]), np.array([1.0, np.nan])]) == "-"
    assert format_interval([np.array([1.0, 2.0]), np.array([1.0, 4.0])], sign=False) == "3.0 ± 12.7"

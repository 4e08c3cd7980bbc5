"""Measure many processes on one machine: torchrun, Ray with a killed worker, submitit.

    python benchmarks/scale.py            # a quarter of CIFAR-10; 20 minutes on two quiet cores
    python benchmarks/scale.py --small    # digits: shows that it works; the times are meaningless

It needs the extras ray and slurm (`make scale` installs them), and prints the tables of
docs/benchmarks.md: times of train, learn and evaluate with 1, 2 and 3 processes, bytes a step, the
time lost to a killed worker, what Ray and submitit add to a step, and what `plan` predicts.
It fails unless verdicts and results are the same everywhere.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import describe_machine, parse_arguments

import robustsoup as rs

LAYOUTS = {"1 x 1": (1, 1), "1 x 2": (1, 2), "2 x 1": (2, 1), "3 x 1": (3, 1)}
"""Processes and threads of each."""
SMALL_LAYOUTS = ("1 x 1", "2 x 1")
ON_CPU = ("--device", "cpu", "--threads", 1)
TIMES = ("created", "seconds", "digest", "digests", "files", "inputs")
"""Keys of results.json that differ between equal runs."""
RECIPE = """
name = "scale"
data = "digits"
model = "resnet9:width={width}"
precision = "float32"
pretrain = {{ threat = "Linf 32/255", epochs = {epochs}, lr = 0.2 }}
finetune = {{ epochs = 1 }}
ingredients = {{ low = {{ threat = "Linf 16/255" }}, high = {{ threat = "Linf 48/255" }} }}
soups.grid = {{ method = "grid", step = 0.25 }}
evaluate = {{ threats = ["Linf 32/255"], steps = {steps}, select_samples = 150 }}
select = {{ require = ["clean>=0"] }}
report = {{ examples = 0 }}
"""


def start(folder: Path, words: list[object], threads: int = 1, **variables: str) -> Any:
    """Start a Python module with some words, its output kept in a file of the folder."""
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": str(threads)}
    log = (folder / "output.txt").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=folder,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def finish(process: Any, folder: Path) -> str:
    """Await a process and return its output; end the script if it failed."""
    code, output = process.wait(), (folder / "output.txt").read_text()
    if code:
        sys.exit(f"failed: {' '.join(process.args)}\n{output}")
    return output


def time_command(folder: Path, words: list[object], processes: int, threads: int) -> float:
    """Return the seconds of a command of robustsoup, start-up included."""
    launcher: list[object] = []
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"]
    started = time.perf_counter()
    finish(start(folder, [*launcher, "robustsoup", *words], threads), folder)
    return time.perf_counter() - started


def time_layouts(folder: Path, *, small: bool) -> None:
    """Print the times of train, learn and evaluate by number of processes and threads."""
    data, model, samples, steps = ("digits", "resnet9:width=4", 100, 5)
    if not small:
        data, model, samples, steps = (save_quarter(folder), "resnet9:width=16", 500, 100)
    threat = ("--data", data, "--threat", "Linf 8/255", "--device", "cpu")
    fitted = (*threat, "--epochs", 1, "--precision", "float32")
    attack = (*threat, "--samples", samples, "--steps", steps, "--precision", "float32")
    trains = ("train", "--model", model, *fitted, "--lr", 0.1, "-o")
    time_command(folder, [*trains, "a.safetensors"], 1, 1)
    tunes = ("train", "--from", "a.safetensors", *fitted, "--lr", 0.01, "-o", "b.safetensors")
    time_command(folder, list(tunes), 1, 1)
    print("\n| processes x threads | train | learn | evaluate |\n|---|---|---|---|")
    verdicts: dict[str, np.ndarray] = {}
    for name in SMALL_LAYOUTS if small else LAYOUTS:
        processes, threads = LAYOUTS[name]
        place = name.replace(" ", "")
        commands = (
            [*trains, f"{place}.safetensors"],
            ["learn", "a.safetensors", "b.safetensors", *fitted, "-o", f"learned-{place}"],
            ["evaluate", "b.safetensors", *attack, "-o", f"evaluated-{place}"],
        )
        seconds = [time_command(folder, list(words), processes, threads) for words in commands]
        print(f"| {name} | {' | '.join(f'{value:.1f} s' for value in seconds)} |", flush=True)
        verdicts[name] = load_verdicts(folder / f"evaluated-{place}")
    first = next(iter(verdicts.values()))
    if not all(np.array_equal(first, other) for other in verdicts.values()):
        sys.exit("verdicts differ between numbers of processes")
    print(f"\nThe verdicts ({len(first)} bytes) are the same for all of them.")


def save_quarter(folder: Path) -> str:
    """Write a quarter of CIFAR-10's training images and 1,000 test images; return their name."""
    data = rs.load_data("cifar10")
    arrays = {
        f"{kind}_{split}": values.numpy()
        for split, part, rows in (
            ("train", data.train, slice(None, None, 4)),
            ("test", data.test, slice(1000)),
        )
        for kind, values in (("x", part.images[rows]), ("y", part.labels[rows]))
    }
    np.savez(folder / "quarter.npz", **arrays)
    return "npz:quarter.npz"


def load_verdicts(folder: Path) -> np.ndarray:
    """Return the bytes of all arrays of the evaluation in a folder."""
    (path,) = folder.rglob("*.npz")
    with np.load(path) as arrays:
        parts = [arrays[name].tobytes() for name in sorted(arrays.files)]
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def print_bytes(folder: Path, *, small: bool) -> None:
    """Print the bytes that a process exchanges in a step."""
    print("\n| network | parameters | work | bytes a step |\n|---|---|---|---|", flush=True)
    script = Path(__file__).parent.absolute() / "exchanged_bytes.py"
    model = "resnet9:width=4" if small else "resnet9:width=16"
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, model]
    rows = finish(start(folder, words), folder).splitlines()
    print("\n".join(row for row in rows if row.startswith("|")))


def run_recipe(folder: Path, name: str, words: tuple[str, ...], *, kill: bool = False) -> float:
    """Run the recipe into a store of its own and return the seconds."""
    store = folder / f"{name}.store"
    command = ["robustsoup", "run", "scale.toml", *ON_CPU, "-o", name, *words]
    started = time.perf_counter()
    process = start(folder, command, ROBUSTSOUP_STORE=str(store), RAY_USAGE_STATS_ENABLED="0")
    if kill:
        os.kill(find_worker(store, process), signal.SIGKILL)
    finish(process, folder)
    if kill and "lost its worker" not in (folder / name / "log.txt").read_text():
        sys.exit("no worker was lost")
    return time.perf_counter() - started


def predict_seconds(folder: Path) -> tuple[float, float]:
    """Return the seconds that `plan` predicts for the recipe in one process and in two."""
    command = ["robustsoup", "plan", "scale.toml", *ON_CPU, "--devices", 2, "--json"]
    plan = json.loads(finish(start(folder, command), folder))
    return plan["seconds"], plan["prediction"]["seconds"]


def find_worker(store: Path, process: Any) -> int:
    """Return the process that works on a step of which a part is done."""
    while process.poll() is None:
        for path in store.glob(".run.*/*.json"):
            try:
                status = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if status["done"]:
                return int(status["place"].rpartition("process ")[2])
        time.sleep(0.02)
    sys.exit("the run ended before a worker could be killed")


def compare_pools(folder: Path, *, small: bool) -> None:
    """Print the times of a recipe in one process, on Ray, on Ray with a loss, and by submitit."""
    sizes = {"width": 2, "epochs": 20, "steps": 3} if small else {}
    recipe = RECIPE.format(**({"width": 8, "epochs": 30, "steps": 50} | sizes))
    (folder / "scale.toml").write_text(recipe)
    pools = {"one": (), "ray": ("--ray", "local"), "jobs": ("--slurm", "local")}
    alone, shared = predict_seconds(folder)
    predicted = {"one": alone, "ray": shared, "jobs": shared}
    seconds = {name: run_recipe(folder, name, words) for name, words in pools.items()}
    seconds["killed"] = run_recipe(folder, "killed", pools["ray"], kill=True)
    results = {name: read_results(folder / name / "results.json") for name in seconds}
    if not all(found == results["one"] for found in results.values()):
        sys.exit("results differ between one process and the pools")
    log = (folder / "one" / "log.txt").read_text()
    steps = len(re.findall(r"^\S+ \d+/\d+ ", log, re.MULTILINE))
    print(
        "\n| steps of one thread | seconds | predicted | sum of steps | more a step |"
        "\n|---|---|---|---|---|"
    )
    inside = {name: sum_steps(folder / f"{name}.store") for name in seconds}
    for name, title in (
        *(("one", "one process"), ("ray", "Ray, local"), ("killed", "Ray, a worker killed")),
        ("jobs", "submitit, local"),
    ):
        workers = 1 if name == "one" else os.cpu_count() or 1
        more = (workers * seconds[name] - inside[name]) / max(steps, 1)
        plan = f"{predicted[name]:.1f}" if name in predicted else "-"
        print(f"| {title} | {seconds[name]:.1f} | {plan} | {inside[name]:.1f} | {more:.2f} s |")
    print(
        f"\n{steps} steps. More a step: the workers' time that no step took, start-up, idleness at "
        f"the end and figures included. Lost to a killed worker: "
        f"{seconds['killed'] - seconds['ray']:.1f} s. Results are the same."
    )


def sum_steps(store: Path) -> float:
    """Return the seconds of all steps of a store."""
    return sum(json.loads(path.read_text())["seconds"] for path in store.glob("*/*/step.json"))


def read_results(path: Path) -> Any:
    """Return results.json without times."""
    return without_times(json.loads(path.read_text(encoding="utf-8")))


def without_times(content: Any) -> Any:
    """Return JSON without what says when and how long."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in TIMES}
    return [without_times(item) for item in content] if isinstance(content, list) else content


def main() -> None:
    """Print the tables."""
    options = parse_arguments(__doc__)
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        time_layouts(folder, small=options.small)
        print_bytes(folder, small=options.small)
        compare_pools(folder, small=options.small)


if __name__ == "__main__":
    main()

"""Learning 72 ingredients within the memory of training one of them, enforced by the operating system.

    python benchmarks/learning_memory.py [--ingredients 72] [--width 64] [--batch 128] [--steps 3] [--folder /tmp/soup72]

One process trains resnet18 adversarially and watches its private writable memory (VmData: what RLIMIT_DATA limits) and its
anonymous resident memory (RssAnon). A second one learns a soup of all files under RLIMIT_DATA = that peak plus twice the
largest layer: if it needed more, the system would refuse and it would fail. A third does it the paper's way, without a limit.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

PAGE = 2**10


def memory(kind: str) -> int:
    """This process's VmData or RssAnon now, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * PAGE
    raise SystemExit(f"{kind}: not in /proc/self/status; this needs Linux")


def peaks(work) -> tuple[int, int]:
    """The highest VmData and RssAnon while `work` runs, looked at every two milliseconds."""
    seen, over = [(memory("VmData"), memory("RssAnon"))], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append((memory("VmData"), memory("RssAnon")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return tuple(map(max, zip(*seen, strict=True)))


def child(kind: str, folder: Path, batch: int, steps: int, limit: int) -> None:
    """Take a few steps of one kind under a limit (0: none), and print the peaks."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import learning as bench
    import torch

    import robustsoup as rs

    paths = sorted(folder.glob("*.safetensors"))
    data = rs.load_data("cifar10").train.first(batch * steps)

    def work() -> None:
        if kind == "train":
            rs.train(paths[0], data, threat=bench.LINF, epochs=1, batch_size=batch, lr=0.01)
        elif kind == "learn":
            rs.learn(paths, data, threat=bench.LINF, epochs=1, batch_size=batch, place="files")
        else:
            run = bench.Stacked(paths, bench.resolve_precision("auto", torch.device("cpu")))
            for x, y, _ in rs.data.batches(data, batch, seed=0, epoch=0):
                run.take_step(x.contiguous(memory_format=torch.channels_last), y)

    print(*peaks(work))


def main() -> None:
    """Run the three processes and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"ingredients": 72, "width": 64, "batch": 128, "steps": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/soup72"))
    asked = parser.parse_args()

    def measured(kind: str, limit: int = 0) -> tuple[int, int]:
        command = [
            sys.executable,
            __file__,
            "--child",
            kind,
            asked.folder,
            asked.batch,
            asked.steps,
            limit,
        ]
        out = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        return tuple(int(number) for number in out.stdout.split()[-2:])

    import learning as bench

    import robustsoup as rs

    try:
        first = rs.Checkpoint.open(
            bench.make_ingredients(asked.folder, asked.ingredients, asked.width)[0]
        )
        largest = max(first.tensors[name].nbytes for name in first.parameters)
        whole = sum(first.tensors[name].nbytes for name in first.parameters)
        one = measured("train")
        limit = one[0] + 2 * largest
        rows = {
            "adversarial training of one": one,
            f"learning {asked.ingredients}, under the limit": measured("learn", limit),
        }
        rows[f"the paper's way, {asked.ingredients}"] = measured("stacked")
    finally:
        shutil.rmtree(asked.folder, ignore_errors=True)
    print(
        f"{bench.machine()}\nresnet18:width={asked.width} ({whole / 2**20:.1f} MiB, largest layer {largest / 2**20:.1f}), "
        f"batch {asked.batch}, {asked.steps} steps; the limit is {limit / 2**20:.0f} MiB of RLIMIT_DATA\n"
    )
    print("| | peak VmData | peak RssAnon |\n|---|---|---|")
    for name, (data, anonymous) in rows.items():
        print(f"| {name} | {data / 2**20:.0f} MiB | {anonymous / 2**20:.0f} MiB |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
    else:
        main()

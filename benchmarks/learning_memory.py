"""Learning 72 ingredients within the memory of training one, enforced by the operating system.

    python benchmarks/learning_memory.py [--ingredients 72] [--width 64] [--batch 128] [--steps 3]
                                         [--small]

One process trains resnet18 adversarially and watches its private writable memory (VmData: what
RLIMIT_DATA limits) and its anonymous resident memory (RssAnon). A second process learns a soup of
all files under RLIMIT_DATA = that peak plus twice the largest layer: with a larger demand the
process would fail. A third process learns the paper's way, without a limit. Linux only.
"""

import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

KIB = 2**10


def process_memory(kind: str) -> int:
    """Return this process's VmData or RssAnon in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * KIB
    raise SystemExit(f"{kind}: not in /proc/self/status; this script requires Linux")


def measure_peaks(work: Callable[[], None]) -> tuple[int, int]:
    """Return the highest VmData and RssAnon while `work` runs, sampled every two milliseconds."""
    samples = [(process_memory("VmData"), process_memory("RssAnon"))]
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.002):
            samples.append((process_memory("VmData"), process_memory("RssAnon")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        finished.set()
        watcher.join()
    return max(data for data, _ in samples), max(anonymous for _, anonymous in samples)


def run_child(kind: str, folder: Path, batch: int, steps: int, limit: int) -> None:
    """Take a few steps of one kind under a limit (0: none), and print the peaks."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from common import CPU, LINF, channels_last
    from learning import StackedSoup, make_data

    import robustsoup as rs
    from robustsoup.device import resolve_precision

    paths = sorted(folder.glob("*.safetensors"))
    data = make_data(batch * steps)
    common = {"threat": LINF, "epochs": 1, "batch_size": batch}

    def work() -> None:
        if kind == "train":
            rs.train(paths[0], data, lr=0.01, device="cpu", **common)
        elif kind == "learn":
            rs.learn(paths, data, place="files", allow_leakage=True, device="cpu", **common)
        else:
            soup = StackedSoup(paths, resolve_precision("auto", CPU))
            for x, y in zip(data.images.split(batch), data.labels.split(batch), strict=True):
                soup.take_step(channels_last(x / 255), y)

    print(*measure_peaks(work))


def main() -> None:
    """Run the three processes and print a row for each."""
    from common import describe_machine, make_near_copies, parse_arguments

    import robustsoup as rs

    options = parse_arguments(__doc__, ingredients=72, width=64, batch=128, steps=3)
    if options.small:
        options.ingredients, options.width, options.batch, options.steps = 3, 8, 8, 2
    n, model = options.ingredients, f"resnet18:width={options.width}"
    with tempfile.TemporaryDirectory() as folder:
        first = rs.Checkpoint.open(make_near_copies(Path(folder), n, model)[0])
        sizes = [first.tensors[name].nbytes for name in first.parameters]

        def measure(kind: str, limit: int = 0) -> tuple[int, int]:
            numbers = [str(number) for number in (options.batch, options.steps, limit)]
            command = [sys.executable, __file__, "--child", kind, folder, *numbers]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            data, anonymous = out.stdout.split()[-2:]
            return int(data), int(anonymous)

        train = measure("train")
        limit = train[0] + 2 * max(sizes)
        rows = {
            "adversarial training of one": train,
            f"learning {n}, under the limit": measure("learn", limit),
            f"the paper's way, {n}": measure("stacked"),
        }
    print(
        f"{describe_machine()}\n{model} ({sum(sizes) / 2**20:.1f} MiB, largest layer "
        f"{max(sizes) / 2**20:.1f}), batch {options.batch}, {options.steps} steps; the limit is "
        f"{limit / 2**20:.0f} MiB of RLIMIT_DATA\n\n| | peak VmData | peak RssAnon |\n|---|---|---|"
    )
    for name, (data, anonymous) in rows.items():
        print(f"| {name} | {data / 2**20:.0f} MiB | {anonymous / 2**20:.0f} MiB |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], Path(sys.argv[3]), *(int(text) for text in sys.argv[4:]))
    else:
        main()

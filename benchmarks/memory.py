"""Peak memory of an attack on 500 images, beyond the network's own: against pyautoattack.

    python benchmarks/memory.py [--images 500] [--small]

Each tool runs in a separate process that loads only the network and the images. The script prints
the largest growth of resident memory during the attack. Linux only.
"""

import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from common import describe_machine, first_images, freeze, parse_arguments, workload
from torch import Tensor

import robustsoup as rs


def resident_memory() -> float:
    """Return this process's resident memory in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure_growth(work: Callable[[], object]) -> float:
    """Return the largest growth of resident memory in MiB, sampled every millisecond."""
    before, samples, finished = resident_memory(), [resident_memory()], threading.Event()

    def watch() -> None:
        while not finished.wait(0.001):
            samples.append(resident_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    finished.set()
    watcher.join()
    return max(samples) - before


def attack_once(tool: str, folder: Path) -> None:
    """Attack the images of the folder with one tool, and print the growth."""
    network = freeze(rs.Checkpoint.load(folder / "network.safetensors").network())
    x, y, eps = torch.load(folder / "images.pt", weights_only=True)
    threat = rs.ThreatModel("Linf", eps)
    with torch.no_grad():
        network(x[:8])
    print(measure_growth(lambda: run_tool(tool, network, x, y, threat)))


def run_tool(
    tool: str, network: torch.nn.Module, x: Tensor, y: Tensor, threat: rs.ThreatModel
) -> None:
    """Attack with pyautoattack, or with robustsoup in the precision that `tool` names."""
    if tool == "pyautoattack":
        from pyautoattack.autopgd_base import APGDAttack

        attack = APGDAttack(
            network, n_iter=10, norm="Linf", eps=threat.eps, loss="ce", device="cpu", seed=0
        )
        attack.perturb(x, y)
    else:
        rs.apgd(network, x, y, threat, steps=10, precision=tool, batch_size=len(x))


def main() -> None:
    """Print a row for each tool."""
    options = parse_arguments(__doc__, images=500)
    task, growth = workload(small=options.small), {}
    count = 64 if options.small else options.images
    with tempfile.TemporaryDirectory() as folder:
        task.train_ingredient(8).save(Path(folder) / "network.safetensors")
        x, y = first_images(task.load_data().test, count)
        torch.save((x, y, task.threat.eps), Path(folder) / "images.pt")
        for tool in ("pyautoattack", "float32", "bfloat16"):
            command = [sys.executable, __file__, "--child", tool, folder]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            growth[tool] = float(out.stdout.split()[-1])
    print(
        f"{describe_machine()}\n{count} images in one batch, growth of the peak resident memory"
        "\n\n| | MiB |\n|---|---|"
    )
    for tool, value in growth.items():
        print(f"| {tool if tool == 'pyautoattack' else f'robustsoup, {tool}'} | {value:.0f} |")
    if growth["float32"] > 0:
        ratio = growth["pyautoattack"] / growth["float32"]
        print(f"\npyautoattack takes {ratio:.1f} x as much as robustsoup in float32")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        attack_once(sys.argv[2], Path(sys.argv[3]))
    else:
        main()

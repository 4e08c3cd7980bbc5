"""Peak memory of an attack on 500 images, beyond the network's own: against pyautoattack.

    python benchmarks/memory.py [--images 500] [--small]

Each tool runs in a separate process that loads only the network and the images. The script prints
the largest growth of resident memory during the attack. On a CPU robustsoup passes at most 32
images through the network at once; pyautoattack takes all at once, or as many as robustsoup.
Linux only.
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
from robustsoup.attacks.forward import CPU_PASS_SIZE

PEER_BATCHES = {
    "pyautoattack, all images at once": None,
    f"pyautoattack, batches of {CPU_PASS_SIZE}": CPU_PASS_SIZE,
}
OURS = ("robustsoup, float32", "robustsoup, bfloat16")


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
    """Attack with one of PEER_BATCHES or OURS."""
    if tool in PEER_BATCHES:
        from pyautoattack.autopgd_base import APGDAttack

        attack = APGDAttack(
            network, n_iter=10, norm="Linf", eps=threat.eps, loss="ce", device="cpu", seed=0
        )
        batch = PEER_BATCHES[tool] or len(x)
        for images, labels in zip(x.split(batch), y.split(batch), strict=True):
            attack.perturb(images, labels)
    else:
        precision = tool.removeprefix("robustsoup, ")
        rs.apgd(network, x, y, threat, steps=10, precision=precision, batch_size=len(x))


def main() -> None:
    """Print a row for each tool."""
    options = parse_arguments(__doc__, images=500)
    task, growth = workload(small=options.small), {}
    count = 64 if options.small else options.images
    with tempfile.TemporaryDirectory() as folder:
        task.train_ingredient(8).save(Path(folder) / "network.safetensors")
        x, y = first_images(task.load_data().test, count)
        torch.save((x, y, task.threat.eps), Path(folder) / "images.pt")
        for tool in (*PEER_BATCHES, *OURS):
            command = [sys.executable, __file__, "--child", tool, folder]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            growth[tool] = float(out.stdout.split()[-1])
    print(
        f"{describe_machine()}\n{count} images, growth of the peak resident memory"
        "\n\n| | MiB |\n|---|---|"
    )
    for tool, value in growth.items():
        print(f"| {tool} | {value:.0f} |")
    if growth[OURS[0]] > 0:
        ratios = " and ".join(f"{growth[tool] / growth[OURS[0]]:.1f} x" for tool in PEER_BATCHES)
        print(f"\npyautoattack takes {ratios} as much as robustsoup in float32")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        attack_once(sys.argv[2], Path(sys.argv[3]))
    else:
        main()

"""Peak memory of an attack on 500 images, over the network's own: ours against pyautoattack at a batch of 500.

    python benchmarks/memory.py

Each runs in a process of its own that loads nothing but the network and the images; what is told is by how much
its resident memory grows at most during the attack.
"""

import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from common import LINF, checkpoint, frozen, images, machine

import robustsoup as rs


def resident():
    """This process's resident memory now, in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def growth(work):
    """By how much the resident memory grows at most while `work` runs, looked at every millisecond."""
    before, seen, over = resident(), [], threading.Event()

    def watch():
        while not over.wait(0.001):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    over.set()
    watcher.join()
    return max(seen) - before


def child(folder, tool):
    """Attack, and print the growth of the peak."""
    network = frozen(rs.Checkpoint.load(folder / "network.safetensors").network())
    x, y = torch.load(folder / "images.pt")
    with torch.no_grad():
        network(x[:8])
    if tool == "pyautoattack":
        from pyautoattack.autopgd_base import APGDAttack

        attack = APGDAttack(
            network, n_iter=10, norm="Linf", eps=LINF.eps, loss="ce", device="cpu", seed=0
        )
        print(growth(lambda: attack.perturb(x, y)))
    else:
        from robustsoup.attacks import Settings, run_attack

        settings = Settings(steps=10, precision=tool, batch_size=500)
        print(growth(lambda: run_attack(network, x, y, LINF, settings)))


def main():
    """Print a row for each tool."""
    grown = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint("eps8").save(Path(folder) / "network.safetensors")
        torch.save(images(500), Path(folder) / "images.pt")
        for tool in ("pyautoattack", "float32", "bfloat16"):
            command = [sys.executable, __file__, folder, tool]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            grown[tool] = float(out.stdout.split()[-1])
    print(
        f"{machine()}\n500 images, batch size 500, growth of the peak resident memory\n\n| | MiB |\n|---|---|"
    )
    for tool, value in grown.items():
        print(f"| {tool if tool == 'pyautoattack' else f'robustsoup, {tool}'} | {value:.0f} |")
    print(f"\npyautoattack takes {grown['pyautoattack'] / grown['float32']:.1f} x ours in float32")


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main()

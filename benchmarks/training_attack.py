"""The training attack, APGD-2 on a batch of 128: against torchattacks' APGD and pyautoattack (best_loss=True).

    pip install --no-deps torchattacks    # it would drag in torchvision
    python benchmarks/training_attack.py [--batch 128] [--rounds 15]

torchattacks and pyautoattack return the start for what is misclassified already; ours the point of highest loss for every
sample. Each is given the network as its users have it: theirs NCHW float32, ours channels_last.
"""

import time

import torch
import torchattacks
from common import LINF, arguments, checkpoint, frozen, images, machine, ratio, table
from pyautoattack.autopgd_base import APGDAttack

from robustsoup import apgd_train


def main():
    """Time all in turn, print medians and ratios."""
    wanted = arguments(__doc__, batch=128, rounds=15)
    plain = frozen(checkpoint("eps8").network())
    network = frozen(checkpoint("eps8").network()).to(memory_format=torch.channels_last)
    x, y = images(wanted.batch)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    reference = APGDAttack(
        plain, n_iter=2, norm="Linf", eps=LINF.eps, loss="ce", device="cpu", seed=0
    )
    peer = torchattacks.APGD(plain, eps=LINF.eps, steps=2)
    work = {
        "robustsoup, float32": lambda: apgd_train(network, nhwc, y, LINF, steps=2),
        "robustsoup, bfloat16": lambda: apgd_train(
            network, nhwc, y, LINF, steps=2, precision="bfloat16"
        ),
        "torchattacks APGD": lambda: peer(x, y),
        "pyautoattack, best_loss=True": lambda: reference.perturb(x, y, best_loss=True),
    }
    times = {name: [] for name in work}
    for number in range(wanted.rounds + 2):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    print(
        f"{machine()}\nAPGD-2, batch {wanted.batch}, {LINF}, {wanted.rounds} rounds; medians [least, most]\n"
    )
    print("| | time a batch | |\n|---|---|---|")
    table(times)
    for ours in ("robustsoup, float32", "robustsoup, bfloat16"):
        told = ", ".join(
            f"{ratio(times, other, ours):.1f} x as fast as {other}" for other in list(work)[2:]
        )
        print(f"{ours}: {told}")


if __name__ == "__main__":
    main()

"""The training attack, APGD-2 on a batch of 128: against torchattacks and pyautoattack.

    pip install --no-deps torchattacks    # its dependencies would bring in torchvision
    python benchmarks/training_attack.py [--batch 128] [--rounds 15] [--small]

torchattacks and pyautoattack (best_loss=True) return the start for samples that are already
misclassified; robustsoup returns the point of highest loss for every sample. Each tool gets the
network as its users have it: NCHW float32 for the peers, channels_last for robustsoup. A peer that
is not installed is left out and named.
"""

import time
from typing import TYPE_CHECKING

import torch
from common import (
    channels_last,
    describe_machine,
    first_images,
    freeze,
    installed_version,
    parse_arguments,
    print_times,
    ratio,
    workload,
)
from pyautoattack.autopgd_base import APGDAttack

import robustsoup as rs

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    """Time all tools in turn, and print medians and ratios."""
    options = parse_arguments(__doc__, batch=128, rounds=15)
    if options.small:
        options.batch, options.rounds = 32, 2
    task = workload(small=options.small)
    checkpoint, threat = task.train_ingredient(8), task.threat
    plain, fast = (freeze(checkpoint.network()) for _ in range(2))
    fast = fast.to(memory_format=torch.channels_last)
    x, y = first_images(task.load_data().test, options.batch)
    nhwc = channels_last(x)
    reference = APGDAttack(
        plain, n_iter=2, norm="Linf", eps=threat.eps, loss="ce", device="cpu", seed=0
    )
    work: dict[str, Callable[[], object]] = {
        f"robustsoup, {precision}": lambda precision=precision: rs.apgd_train(
            fast, nhwc, y, threat, steps=2, precision=precision
        )
        for precision in ("float32", "bfloat16")
    }
    work["pyautoattack, best_loss=True"] = lambda: reference.perturb(x, y, best_loss=True)
    if installed_version("torchattacks"):
        import torchattacks

        peer = torchattacks.APGD(plain, eps=threat.eps, steps=2)
        work["torchattacks APGD"] = lambda: peer(x, y)
    else:
        print("torchattacks is not installed and left out")
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(options.rounds + 2):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    print(
        f"{describe_machine()}\nAPGD-2, batch {options.batch}, {threat}, {options.rounds} rounds; "
        "medians [minimum, maximum]\n\n| | time a batch | |\n|---|---|---|"
    )
    print_times(times)
    peers = list(work)[2:]
    for ours in list(work)[:2]:
        ratios = ", ".join(f"{ratio(times, peer, ours):.1f} x as fast as {peer}" for peer in peers)
        print(f"{ours}: {ratios}")


if __name__ == "__main__":
    main()

"""APGD-CE-100 on a robust network: against the physical limit, and against pyautoattack at its best batch size.

    python benchmarks/attack.py [--samples 1000] [--rounds 3]

Each round times, in turn: one pass (forward and gradient by the input) at both precisions, at the best of several batch
sizes; robustsoup in float32 and with bfloat16 search; pyautoattack at batches of 64, 125, 250 and 500. The physical limit is
the passes that cannot be avoided (every attacked sample's, up to the step that breaks it) times the time of one.
"""

import statistics
import time

import torch
from common import LINF, arguments, checkpoint, frozen, images, machine, ratio, table
from pyautoattack.autopgd_base import APGDAttack

from robustsoup.attacks import Settings, run_attack
from robustsoup.attacks.forward import gradient
from robustsoup.attacks.losses import ce

STEPS = 100
BATCHES = (64, 125, 250, 500)


def one_pass(network, x, y, precision):
    """Seconds for one image's forward and gradient, at the best of the batch sizes."""
    best = float("inf")
    for batch in BATCHES:
        part = x[:batch].contiguous(memory_format=torch.channels_last)
        times = []
        for _ in range(7):
            started = time.perf_counter()
            gradient(network, part, y[:batch], ce, precision)
            times.append(time.perf_counter() - started)
        best = min(best, statistics.median(times[2:]) / len(part))
    return best


def theirs(network, x, y, batch):
    """Robust or not, by pyautoattack, in chunks."""
    attack = APGDAttack(
        network, n_iter=STEPS, norm="Linf", eps=LINF.eps, loss="ce", device="cpu", seed=0
    )
    points = torch.cat(
        [attack.perturb(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)]
    )
    with torch.no_grad():
        return torch.cat([network(part).argmax(1) for part in points.split(250)]) == y


def main():
    """Time everything in turn, and print medians and ratios."""
    wanted = arguments(__doc__, samples=1000, rounds=3)
    plain = frozen(checkpoint("eps8").network())
    network = frozen(checkpoint("eps8").network()).to(memory_format=torch.channels_last)
    x, y = images(wanted.samples)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    times, robust, passes = {}, {}, {}

    def timed(name, work):
        started = time.perf_counter()
        result = work()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    for _ in range(wanted.rounds):
        for precision in ("float32", "bfloat16"):
            settings = Settings(steps=STEPS, precision=precision)
            result = timed(
                f"robustsoup, {precision}", lambda s=settings: run_attack(network, nhwc, y, LINF, s)
            )
            attacked = result.step[result.by >= 0]
            robust[precision] = ~result.broken
            passes[precision] = int((attacked + 1).sum()) + STEPS * int((~result.broken).sum())
            limit = passes[precision] * one_pass(network, x, y, precision)
            times.setdefault(f"limit, {precision}", []).append(limit)
        for batch in BATCHES:
            robust[batch] = timed(
                f"pyautoattack, batch {batch}", lambda b=batch: theirs(plain, x, y, b)
            )
    print(
        f"{machine()}\n{wanted.samples} images, APGD-CE-{STEPS}, {LINF}, {wanted.rounds} rounds; medians [least, most]\n"
    )
    shares = {f"robustsoup, {p}": robust[p] for p in ("float32", "bfloat16")}
    shares |= {f"pyautoattack, batch {b}": robust[b] for b in BATCHES}
    print("| | time | robust |\n|---|---|---|")
    table(
        times,
        lambda name: f"{100 * float(shares[name].float().mean()):.1f} %" if name in shares else "",
    )
    best = min(BATCHES, key=lambda b: statistics.median(times[f"pyautoattack, batch {b}"]))
    differ = int((robust["float32"] != robust[best]).sum())
    print(
        f"\nbest batch of pyautoattack: {best}; verdicts that differ from its in float32: {differ} of {len(y)}"
    )
    for precision in ("float32", "bfloat16"):
        ours = f"robustsoup, {precision}"
        print(
            f"{precision}: {ratio(times, ours, f'limit, {precision}'):.2f} x the limit; "
            f"{ratio(times, f'pyautoattack, batch {best}', ours):.2f} x as fast as pyautoattack"
        )


if __name__ == "__main__":
    main()

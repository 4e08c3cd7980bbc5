"""A grid of 21 soups: `search` with screening against a loop of pyautoattack over the soups.

    python benchmarks/grid.py [--samples 1000]

The soups of the small recipe's three ingredients at a step of 0.2, APGD-CE-100. Ours confirms its front in full ("front"), or
only what can win one choice ("choice": the most robust soup with clean accuracy of at least 60 %). Theirs attacks every
soup, at the best of two batch sizes. The choices are compared by their verdicts, paired.
"""

import statistics
import time

import torch
from attack import STEPS, theirs
from common import LINF, arguments, checkpoint, frozen, images, machine

import robustsoup as rs
from robustsoup.evaluation.intervals import Accuracy, Difference
from robustsoup.soups.grid import candidates

REQUIRE = 0.6


def chosen(scores):
    """The name with the highest robust count among those clean enough; scores: name -> (clean, robust) masks."""
    least = REQUIRE * len(next(iter(scores.values()))[0])
    meeting = {name: masks for name, masks in scores.items() if int(masks[0].sum()) >= least}
    return max(meeting, key=lambda name: (int(meeting[name][1].sum()), int(meeting[name][0].sum())))


def main():
    """Time both, print the ratio and how far the choices are apart."""
    wanted = arguments(__doc__, samples=1000)
    ingredients = [checkpoint(name) for name in ("eps4", "eps8", "eps16")]
    split = rs.load_data("cifar10").test.first(wanted.samples)
    x, y = images(wanted.samples)
    asked = {"steps": STEPS, "precision": "bfloat16", "screen": True, "allow_leakage": True}
    took, found = {}, {}
    for mode, extra in (
        ("front", {}),
        ("choice", {"maximise": LINF, "require": [f"clean>={REQUIRE}"], "point": True}),
    ):
        started = time.perf_counter()
        found[mode] = rs.search(ingredients, split, [LINF], **asked, **extra)
        took[mode] = time.perf_counter() - started
        confirmed = sum(c.confirmed for c in found[mode])
        print(
            f"robustsoup, {mode}: {took[mode]:.0f} s, {confirmed} of {len(found[mode])} soups attacked in full",
            flush=True,
        )
    networks = {
        c.name: frozen(rs.mix(ingredients, alpha, buffers="average").network())
        for c, alpha in zip(found["front"], candidates("grid", 3, 0.2), strict=True)
    }
    first = next(iter(networks.values()))
    speed = {}
    for batch in (125, 250):
        started = time.perf_counter()
        theirs(first, x[:250], y[:250], batch)
        speed[batch] = time.perf_counter() - started
    batch = min(speed, key=speed.get)
    times, loop = [], {}
    for name, network in networks.items():
        started = time.perf_counter()
        robust = theirs(network, x, y, batch)
        times.append(time.perf_counter() - started)
        with torch.no_grad():
            clean = torch.cat([network(part).argmax(1) for part in x.split(250)]) == y
        loop[name] = (clean, robust)
    print(
        f"pyautoattack, batch {batch}: {sum(times):.0f} s, {statistics.median(times):.1f} s a soup\n{machine()}\n"
    )
    best = chosen(loop)
    for mode in took:
        ours = {
            c.name: (
                c.evaluation.prediction == c.evaluation.labels,
                c.evaluation.threats[str(LINF)].robust,
            )
            for c in found[mode]
            if c.confirmed
        }
        name = chosen(ours)
        a, b = loop[best][1], loop[name][1]
        n = len(y)
        apart = Difference(
            Accuracy(int(a.sum()), n),
            Accuracy(int(b.sum()), n),
            int((a & ~b).sum()),
            int((b & ~a).sum()),
        )
        print(
            f"{mode}: {sum(times) / took[mode]:.1f} x as fast; chosen {name}, by the loop {best}; "
            f"robust, by the loop's verdicts: {apart}"
        )
    front = [c for c in found["front"] if c.confirmed]
    gaps = [
        float(c.evaluation.accuracy[LINF]) - float(loop[c.name][1].float().mean()) for c in front
    ]
    print(
        f"confirmed soups: robust less the loop's, points: {100 * min(gaps):+.1f} to {100 * max(gaps):+.1f}"
    )


if __name__ == "__main__":
    main()

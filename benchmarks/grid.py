"""A grid of 21 soups: `search` with screening against a loop of pyautoattack over the soups.

    python benchmarks/grid.py [--samples 1000] [--small]

The soups of three ingredients (Linf 4, 8 and 16/255) at a step of 0.2, attacked by APGD-CE-100.
robustsoup attacks in full only the soups that can still win: the choice is the most robust soup
with clean accuracy of at least 60 %. The loop attacks every soup, at the faster of two batch sizes.
The choices of both are compared, paired, by the loop's verdicts.
"""

import statistics
import time

import torch
from attack import attack_with_pyautoattack
from common import Workload, describe_machine, first_images, freeze, parse_arguments, workload
from torch import Tensor, nn

import robustsoup as rs
from robustsoup.data import Split
from robustsoup.evaluation.intervals import Difference
from robustsoup.soups.grid import candidates

REQUIRED_CLEAN = 0.6
Masks = tuple[Tensor, Tensor]
"""Two masks (n,) bool: whether each sample is classified correctly, clean and under attack."""


def choose(scores: dict[str, Masks]) -> str:
    """Return the soup with the highest robust accuracy and the required clean accuracy.

    Chooses among all soups if none has the required clean accuracy.
    """
    n = len(next(iter(scores.values()))[0])
    eligible = {
        name: masks for name, masks in scores.items() if int(masks[0].sum()) >= REQUIRED_CLEAN * n
    } or scores
    return max(
        eligible, key=lambda name: (int(eligible[name][1].sum()), int(eligible[name][0].sum()))
    )


def attack_every_soup(
    networks: dict[str, nn.Module], split: Split, threat: rs.ThreatModel, steps: int
) -> tuple[dict[str, Masks], list[float], int]:
    """Attack all soups in a loop; return their masks, the seconds of each, and the batch size."""
    x, y = first_images(split, len(split))
    first = next(iter(networks.values()))
    speed = {}
    for batch in (125, 250):
        started = time.perf_counter()
        attack_with_pyautoattack(first, x[:250], y[:250], threat, steps, batch=batch)
        speed[batch] = time.perf_counter() - started
    batch = min(speed, key=lambda size: speed[size])
    scores, seconds = {}, []
    for name, network in networks.items():
        started = time.perf_counter()
        robust = attack_with_pyautoattack(network, x, y, threat, steps, batch=batch)
        seconds.append(time.perf_counter() - started)
        with torch.no_grad():
            clean = torch.cat([network(part).argmax(1) for part in x.split(250)]) == y
        scores[name] = (clean, robust)
    return scores, seconds, batch


def search_with_screening(
    task: Workload, ingredients: list[rs.Checkpoint], split: Split, steps: int
) -> tuple[tuple[rs.Candidate, ...], float]:
    """Search for one choice with screening; return the candidates and the seconds."""
    started = time.perf_counter()
    tried = rs.search(
        ingredients,
        split,
        [task.threat],
        maximise=task.threat,
        require=[f"clean>={REQUIRED_CLEAN}"],
        point=True,
        steps=steps,
        precision="bfloat16",
        screen=True,
        allow_leakage=True,
        device="cpu",
    ).candidates
    seconds = time.perf_counter() - started
    confirmed = sum(candidate.confirmed for candidate in tried)
    print(
        f"robustsoup: {seconds:.1f} s, {confirmed} of {len(tried)} soups attacked in full",
        flush=True,
    )
    return tried, seconds


def main() -> None:
    """Time both, and print the ratio of times and the difference of the choices."""
    options = parse_arguments(__doc__, samples=1000, steps=100)
    if options.small:
        options.samples, options.steps = 64, 5
    task = workload(small=options.small)
    ingredients = [task.train_ingredient(eps) for eps in (4, 8, 16)]
    test = task.load_data().test
    split = test.first(min(options.samples, len(test)))
    tried, seconds = search_with_screening(task, ingredients, split, options.steps)
    networks = {
        candidate.name: freeze(rs.mix(ingredients, alpha, buffers="average").network())
        for candidate, alpha in zip(tried, candidates("grid", 3, 0.2), strict=True)
    }
    loop, times, batch = attack_every_soup(networks, split, task.threat, options.steps)
    print(
        f"pyautoattack, batch {batch}: {sum(times):.1f} s, {statistics.median(times):.2f} s a soup"
        f"\n{describe_machine()}\n"
    )
    best, confirmed = choose(loop), [candidate for candidate in tried if candidate.confirmed]
    name = choose(
        {
            c.name: (c.evaluation.hits()["clean"], c.evaluation.hits()[str(task.threat)])
            for c in confirmed
        }
    )
    print(
        f"{sum(times) / seconds:.1f} x as fast; chosen {name}, by the loop {best}; "
        f"robust, by the loop's verdicts: {difference(loop[best][1], loop[name][1])}"
    )
    gaps = [
        c.evaluation.accuracy[task.threat].value - float(loop[c.name][1].float().mean())
        for c in confirmed
    ]
    print(
        "confirmed soups: robust accuracy minus the loop's, in points: "
        f"{100 * min(gaps):+.1f} to {100 * max(gaps):+.1f}"
    )


def difference(a: Tensor, b: Tensor) -> Difference:
    """Return the paired difference b - a of two masks."""
    n = len(a)
    return Difference(
        rs.Accuracy(int(a.sum()), n),
        rs.Accuracy(int(b.sum()), n),
        int((a & ~b).sum()),
        int((b & ~a).sum()),
    )


if __name__ == "__main__":
    main()

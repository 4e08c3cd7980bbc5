"""What came out of recipes/two_cores/learning.toml for several seeds: tables for docs/results.md.

    python benchmarks/ablations.py runs/learning-0 runs/learning-1 runs/learning-2 [--figures docs/figures]
        [--buffers runs/buffers-0 runs/buffers-1 runs/buffers-2]

A cell is the mean over the run folders, each one seed, and its 95 % interval: Student's t over the seeds of the difference to
the reference of the same seed (so what a seed does to both cancels), in points, on test. "outside" is how far a soup lies above
the line between the ingredients with the least and the greatest eps, in points of robust accuracy at its clean accuracy.
--figures draws, for the first folder, what was learned and where the dial lies. --buffers: run folders of
recipes/two_cores/learning_buffers.toml of the same seeds, for the table of statistics while learning.
"""

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

from common import T95
from matplotlib import rc_context

import robustsoup as rs
from robustsoup.reports import draw_dial, save
from robustsoup.reports.style import STYLE
from robustsoup.reports.tradeoff import draw_tradeoff

REFERENCE = "learned-linf-8-255-ce"
LEAST, GREATEST = "eps4", "eps16"


class Run:
    """One run folder: its rows by name."""

    def __init__(self, folder: Path, other: Path | None = None) -> None:
        self.folder = folder
        self.results = json.loads((folder / "results.json").read_text())
        self.rows = {row["name"]: row for row in self.results["rows"]}
        if other:
            theirs = json.loads((other / "results.json").read_text())
            assert theirs["data"]["split_digest"] == self.results["data"]["split_digest"], (
                f"{other}: another seed"
            )
            self.rows = {row["name"]: row for row in theirs["rows"]} | self.rows
        self.threat = next(t for t in self.results["protocol"]["threats"] if t != "clean")

    def point(self, name: str) -> tuple[float, float]:
        """Clean and robust accuracy on test, in percent."""
        return tuple(100 * self.rows[name]["test"][key]["value"] for key in ("clean", self.threat))

    def outside(self, name: str) -> float:
        """Robust accuracy less that of the line between two ingredients at the same clean accuracy, in points."""
        (c0, r0), (c1, r1) = self.point(LEAST), self.point(GREATEST)
        clean, robust = self.point(name)
        return robust - (r0 + (clean - c0) * (r1 - r0) / (c1 - c0))

    def coefficients(self, name: str) -> rs.Coefficients:
        """What was learned."""
        return rs.Coefficients.load(self.folder / self.rows[name]["coefficients_file"])


def spread(values: list[float]) -> str:
    """Mean and half the 95 % interval of Student's t over the seeds."""
    n = len(values)
    if n == 1:
        return f"{values[0]:+.1f}"
    return (
        f"{statistics.mean(values):+.1f} ± {T95[n] * statistics.stdev(values) / math.sqrt(n):.1f}"
    )


def mean(values: list[float], digits: int = 1) -> str:
    """Mean over the seeds, and the least and the most."""
    return (
        f"{statistics.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
    )


def compared(runs: list[Run], names: list[str], reference: str) -> None:
    """Each network, and how it differs from the reference."""
    print(
        f"| | clean | robust | clean, less {reference} | robust, less {reference} | outside |\n|---|---|---|---|---|---|"
    )
    every = runs
    for name in [reference, *(n for n in names if n != reference)]:
        runs = [run for run in every if name in run.rows]
        points, base = ([run.point(n) for run in runs] for n in (name, reference))
        cells = [mean([p[k] for p in points]) for k in (0, 1)]
        cells += [
            ""
            if name == reference
            else spread([p[k] - b[k] for p, b in zip(points, base, strict=True)])
            for k in (0, 1)
        ]
        shown = name + (f" ({len(runs)} seed)" if len(runs) < len(every) else "")
        print(f"| {shown} | {' | '.join(cells)} | {spread([run.outside(name) for run in runs])} |")


def measures(coefficients: rs.Coefficients) -> dict[str, float]:
    """Entropy as a share of log n, movement and slope, of all layers and of their first and last third."""
    c, third = coefficients, max(len(coefficients.layers) // 3, 1)
    return {
        "entropy / log n": float(c.entropy().mean()) / math.log(c.alpha.shape[1]),
        "moved": float(c.movement().mean()),
        "moved, first third": float(c.movement()[:third].mean()),
        "moved, last third": float(c.movement()[-third:].mean()),
        "slope, first third": float(c.slopes[:third].mean()),
        "slope, last third": float(c.slopes[-third:].mean()),
    }


def learned(runs: list[Run], names: list[str]) -> None:
    """What was learned, by name of the soup."""
    for number, name in enumerate(names):
        found = [measures(run.coefficients(name)) for run in runs]
        if number == 0:
            print(f"| | {' | '.join(found[0])} |\n|{'---|' * (len(found[0]) + 1)}")
        cells = [mean([f[key] for f in found], 4 if "slope" in key else 2) for key in found[0]]
        print(f"| {name} | {' | '.join(cells)} |")


def draw(run: Run, folder: Path) -> None:
    """What was learned under several settings, and the dial between the grid and soups learned one by one."""
    shown = {
        REFERENCE: "reference",
        "zeros-linf-8-255": "zeros",
        "lr0.1-linf-8-255": "lr 0.1",
        "detach0-linf-8-255": "detach 0",
        "learned-linf-8-255-mixed-0.5": "mixed 0.5",
        "learned-linf-8-255-mixed-1": "clean",
    }
    names = run.rows[REFERENCE]["ingredients"]
    plot = draw_dial(
        [(label, run.coefficients(name)) for name, label in shown.items()],
        names,
        "what was learned",
    )
    save(replace(plot, stem="learning_two_cores_coefficients"), folder)
    rows = [
        r
        for r in run.results["rows"]
        if r["role"] == "ingredient" or r["soup"] in ("grid", "learned", "dial")
    ]
    with rc_context(STYLE):
        (plot,), _ = draw_tradeoff(run.results | {"rows": rows, "name": "the dial"}, run.folder)
    save(replace(plot, stem="learning_two_cores_dial"), folder)


def main() -> None:
    """Print every table that the run folders have rows for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--buffers", nargs="+", type=Path)
    asked = parser.parse_args()
    runs = [
        Run(*both)
        for both in zip(asked.folders, asked.buffers or [None] * len(asked.folders), strict=True)
    ]
    if asked.figures:
        draw(runs[0], asked.figures)
    rows = runs[0].results["rows"]
    print(
        f"{len(runs)} seeds, {runs[0].results['protocol']['samples']['test']} test samples, {runs[0].threat}\n"
    )
    single = [r["name"] for r in rows if r["role"] == "learned" and "-base-" not in r["name"]]
    single = [
        name
        for name in single
        if not any(p in name for p in ("learned-average", "learned-recal", "learned-adv"))
    ]
    print("### Ingredients and learned soups, one setting changed at a time\n")
    compared(runs, ["pretrained", "eps4", "eps8", "eps16", *single], REFERENCE)
    print("\n### What was learned\n")
    learned(runs, single)
    for title, reference, prefix in (
        ("Statistics of learned soups", REFERENCE, "learned-"),
        ("Statistics of the grid", "half-average", "half-"),
    ):
        print(f"\n### {title}\n")
        if prefix == "learned-":
            names = [
                r["name"]
                for r in rows
                if r["role"] == "learned" and r["name"].endswith("linf-8-255")
            ]
            compared(runs, [n for n in names if n.startswith("learned-")], reference)
        else:
            grid_policies(runs)
    if asked.buffers:
        print("\n### Statistics while learning\n")
        compared(runs, [name for name in runs[0].rows if name.startswith("learned-on-")], REFERENCE)
    print("\n### The dial, soups learned one by one, and the grid\n")
    compared(
        runs,
        [r["name"] for r in rows if r["role"] == "dial"]
        + [n for n in single if n.startswith("learned-")],
        REFERENCE,
    )
    print()
    frontier(runs)
    for name in (REFERENCE, "model-linf-8-255"):
        less = spread([best_of_grid(run) - run.outside(name) for run in runs])
        print(f"\nthe grid's best lies farther outside than {name} by {less} points")


def grid_policies(runs: list[Run]) -> None:
    """The grid at a step of a half under each policy: mean over ingredients or over midpoints, less that of the average."""
    for title, points in (
        ("midpoints", ["0-0.5-0.5", "0.5-0-0.5", "0.5-0.5-0"]),
        ("ingredients", ["0-0-1", "0-1-0", "1-0-0"]),
    ):
        print(
            f"\n| the three {title} | clean | robust | clean, less average | robust, less average |\n|---|---|---|---|---|"
        )
        policies(runs, points)


def policies(runs: list[Run], mids: list[str]) -> None:
    """A row for each policy."""
    for policy in ("average", "base", "recalibrate", "adversarial"):
        scores = [
            [statistics.mean(run.point(f"half-{policy}-{mid}")[k] for mid in mids) for run in runs]
            for k in (0, 1)
        ]
        base = [
            [statistics.mean(run.point(f"half-average-{mid}")[k] for mid in mids) for run in runs]
            for k in (0, 1)
        ]
        less = [spread([a - b for a, b in zip(scores[k], base[k], strict=True)]) for k in (0, 1)]
        print(
            f"| {policy} | {mean(scores[0])} | {mean(scores[1])} | {' | '.join(less if policy != 'average' else ['', ''])} |"
        )


def frontier(runs: list[Run]) -> None:
    """How far outside the line each way lies: its points' mean, and how much of the grid's frontier it reaches."""
    ways = {
        "grid": lambda row: row["role"] == "grid" and row["soup"] == "grid",
        "learned one by one": lambda row: row["soup"] == "learned",
        "dial": lambda row: row["soup"] == "dial",
        "dial, tracked": lambda row: row["soup"] == "dial-tracked",
        "dial, eps": lambda row: row["soup"] == "dial-eps",
    }
    print("| | points | best outside | mean outside | clean from | to |\n|---|---|---|---|---|---|")
    for way, belongs in ways.items():
        cells: dict[str, list[float]] = {"best": [], "mean": [], "low": [], "high": []}
        for run in runs:
            names = [row["name"] for row in run.results["rows"] if belongs(row)]
            if not names:
                continue
            found = len(names)
            outside = [run.outside(name) for name in names]
            cleans = [run.point(name)[0] for name in names]
            for key, value in (
                ("best", max(outside)),
                ("mean", statistics.mean(outside)),
                ("low", min(cleans)),
                ("high", max(cleans)),
            ):
                cells[key].append(value)
        row = [
            spread(cells["best"]),
            spread(cells["mean"]),
            mean(cells["low"]),
            mean(cells["high"]),
        ]
        print(f"| {way} | {found} | {' | '.join(row)} |")


def best_of_grid(run: Run) -> float:
    """The farthest that a soup of the grid lies outside the line."""
    return max(run.outside(row["name"]) for row in run.results["rows"] if row["soup"] == "grid")


if __name__ == "__main__":
    main()

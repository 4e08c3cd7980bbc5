"""The paper's claims on grids, lines, learned soups and planes, as numbers from run folders: tables for docs/results.md.

    python benchmarks/claims.py [--every] RUN_DIR [RUN_DIR ...]

Folders of one recipe with several seeds are put together. What is best is chosen on val (on test under the paper's protocol)
and measured on test. With one seed an interval is a percentile bootstrap over the test samples, drawn jointly for all networks
of a folder (so differences are paired), 5,000 draws; with several it is Student's t over the seeds. All are 95 %, in points.
A gap is robust accuracy less that of a straight line between two networks at the same clean accuracy.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from common import T95

from robustsoup.reports.surface import survey

DRAWS = 5000
Row = dict


class Run:
    """One run folder: accuracies on the split that selects, and draws of those on test, the last one the estimate."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, json.loads((folder / "results.json").read_text())
        protocol = self.results["protocol"]
        self.select_on, self.report_on = protocol["select_on"], protocol["report_on"]
        self.threats = [threat for threat in protocol["threats"] if threat != "clean"]
        self.rows: dict[str, Row] = {row["name"]: row for row in self.results["rows"]}
        self._draws: dict[str, dict[str, np.ndarray]] = {}
        self._weights: np.ndarray | None = None

    def section(self, role: str) -> dict[str, list[Row]]:
        """Rows of a role by their section of the recipe."""
        found: dict[str, list[Row]] = {}
        for row in self.results["rows"]:
            if row["role"] == role:
                found.setdefault(row["soup"], []).append(row)
        return found

    def chosen(self, rows: list[Row], measure: str) -> str:
        """The best of rows at a measure, on the split that selects."""
        return max(rows, key=lambda row: row[self.select_on][measure]["value"])["name"]

    def on(self, name: str, measure: str) -> np.ndarray:
        """Accuracy on test in percent: (DRAWS + 1,)."""
        if name not in self._draws:
            with np.load(self.folder / "evaluations" / f"{name}.{self.report_on}.npz") as file:
                right = {"clean": file["prediction"] == file["labels"]}
                right |= {threat: file[f"robust_{k}"] for k, threat in enumerate(self.threats)}
            n = len(right["clean"])
            if self._weights is None:
                drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS)
                self._weights = np.vstack([drawn, np.ones(n)]) / n
            self._draws[name] = {key: 100 * (self._weights @ value) for key, value in right.items()}
        return self._draws[name][measure]

    def seen_gap(self, name: str, ends: tuple[str, str], threat: str) -> float:
        """The gap on the split that selects; 0 where the ends are equally clean."""
        points = [
            [self.rows[n][self.select_on][k]["value"] for k in ("clean", threat)]
            for n in (*ends, name)
        ]
        (c0, r0), (c1, r1), (c, r) = points
        return r - (r0 + (c - c0) * (r1 - r0) / (c1 - c0)) if c1 != c0 else 0.0

    def gap(self, name: str, ends: tuple[str, str], threat: str) -> np.ndarray:
        """Points of robust accuracy above the line between two networks."""
        (c0, c1), (r0, r1) = ([self.on(end, key) for end in ends] for key in ("clean", threat))
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.on(name, threat) - (
                r0 + (self.on(name, "clean") - c0) * (r1 - r0) / (c1 - c0)
            )


def seeds(runs: list) -> str:
    """How many runs there are."""
    return "one seed" if len(runs) == 1 else f"{len(runs)} seeds"


def told(values: list[np.ndarray], sign: bool = True) -> str:
    """One seed: estimate [bootstrap]; several: mean ± t."""
    plus = "+" if sign else ""
    ends = [float(value[-1]) for value in values]
    if len(values) == 1:
        drawn = values[0][:-1]
        if not np.isfinite(drawn).all():
            return "-"
        low, high = np.percentile(drawn, [2.5, 97.5])
        return f"{ends[0]:{plus}.1f} [{low:{plus}.1f}, {high:{plus}.1f}]"
    half = T95[len(ends)] * statistics.stdev(ends) / math.sqrt(len(ends))
    return f"{statistics.mean(ends):{plus}.1f} ± {half:.1f}"


def grids(runs: list[Run]) -> Iterator[str]:
    """F2, F3: where the best soup of each grid lies, and what mixing adds to the best corner."""
    for soup in runs[0].section("grid"):
        yield f"\n**{runs[0].results['name']}, {soup}** ({seeds(runs)})\n"
        yield "| measure | best on val | best mixture less best corner | R² of a quadratic |\n|---|---|---|---|"
        for measure in ("clean", *runs[0].threats):
            best, less, smooth = [], [], []
            for run in runs:
                if measure not in run.rows[run.section("grid")[soup][0]["name"]][run.report_on]:
                    continue
                rows = run.section("grid")[soup]
                corner = run.chosen([row for row in rows if max(row["coefficients"]) == 1], measure)
                inner = run.chosen([row for row in rows if max(row["coefficients"]) < 1], measure)
                best.append(run.chosen(rows, measure).removeprefix(f"{soup}-"))
                less.append(run.on(inner, measure) - run.on(corner, measure))
                smooth.append(quadratic(rows, [run.on(row["name"], measure)[-1] for row in rows]))
            r2 = ", ".join(f"{value:.2f}" for value in smooth)
            yield f"| {measure} | {'; '.join(best)} | {told(less)} | {r2} |"


def quadratic(rows: list[Row], values: list[float]) -> float:
    """How much of the variance over a grid a quadratic in the coefficients explains."""
    alpha = np.array([row["coefficients"] for row in rows])[:, :-1]
    k = alpha.shape[1]
    terms = [
        np.ones(len(alpha)),
        *alpha.T,
        *(alpha[:, i] * alpha[:, j] for i in range(k) for j in range(i, k)),
    ]
    design, y = np.stack(terms, axis=1), np.array(values)
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return 1 - float((left**2).sum() / ((y - y.mean()) ** 2).sum())


def lines(runs: list[Run]) -> Iterator[str]:
    """F4: how far each line bends outward, at the point that bends most on the split that selects."""
    run = runs[0]
    for threat in run.threats:
        yield f"\n**{run.results['name']}, {threat}**\n"
        yield "| to | clean | robust | bends most on val at | gap there, on test | gap at the middle |\n|---|---|---|---|---|---|"
        for rows in run.section("line").values():
            rows = sorted(rows, key=lambda row: row["coefficients"][1])
            ends = (rows[0]["name"], rows[-1]["name"])

            most = max(
                rows[1:-1],
                key=lambda row, ends=ends, threat=threat: run.seen_gap(row["name"], ends, threat),
            )
            middle = [
                told([run.gap(row["name"], ends, threat)])
                for row in rows[len(rows) // 2 - 1 : len(rows) // 2 + 1]
            ]
            to = [f"{run.on(ends[1], key)[-1]:.1f}" for key in ("clean", threat)]
            gap = told([run.gap(most["name"], ends, threat)])
            cells = [
                rows[0]["ingredients"][1],
                *to,
                f"{most['coefficients'][1]:g}",
                gap,
                "; ".join(middle),
            ]
            yield f"| {' | '.join(cells)} |"


def learned(runs: list[Run], every: bool) -> Iterator[str]:
    """F5, F6: learned soups, or all of them, against the two best soups of the grid."""
    threat = runs[0].threats[0]
    grid = next(iter(runs[0].section("grid")))
    ends = [
        tuple(run.chosen(run.section("grid")[grid], key) for key in ("clean", threat))
        for run in runs
    ]
    best = "; ".join(map(" and ".join, ends))
    yield f"\n**{runs[0].results['name']}, {threat}** ({seeds(runs)}); the grid's two best: {best}\n"
    yield "| soup | clean | robust | gap to the line | robust less grid's best | clean less grid's best |"
    yield "|---|---|---|---|---|---|"
    names = [
        row["name"]
        for row in runs[0].results["rows"]
        if every or row["role"] in ("ingredient", "learned")
    ]
    for name in [*(f"the grid's best {k}" for k in ("clean", "robust")), *names]:
        who = [
            (run, end)
            for run, end in zip(runs, ends, strict=True)
            if name in run.rows or name.startswith("the grid")
        ]

        def pick(end: tuple[str, str], name: str = name) -> str:
            return {"the grid's best clean": end[0], "the grid's best robust": end[1]}.get(
                name, name
            )

        cells = [
            told([run.on(pick(end), key) for run, end in who], sign=False)
            for key in ("clean", threat)
        ]
        cells.append(told([run.gap(pick(end), end, threat) for run, end in who]))
        cells.append(told([run.on(pick(end), threat) - run.on(end[1], threat) for run, end in who]))
        cells.append(
            told([run.on(pick(end), "clean") - run.on(end[0], "clean") for run, end in who])
        )
        few = f" ({seeds(who)})" * (len(who) < len(runs))
        yield f"| {name}{few} | {' | '.join(cells)} |"
    yield from spans(runs, threat)


def spans(runs: list[Run], threat: str) -> Iterator[str]:
    """How much of clean and robust accuracy each learned section goes over."""
    yield "\n| section | clean, from least to most | robust, from least to most |\n|---|---|---|"
    for soup in runs[0].section("learned"):
        cells = []
        for key in ("clean", threat):
            ranges = []
            for run in runs:
                if rows := run.section("learned").get(soup):
                    every = np.stack([run.on(row["name"], key) for row in rows])
                    low, high = every[:, -1].argmin(), every[:, -1].argmax()
                    ranges.append(every[high] - every[low])
            cells.append(told(ranges))
        yield f"| {soup} | {' | '.join(cells)} |"


def planes(runs: list[Run]) -> Iterator[str]:
    """F7: whether the robust loss is convex on planes."""
    run = runs[0]
    yield f"\n**{run.results['name']}**\n"
    yield "| plane | loss, least to most | minima inside | not convex, triangle | largest | not convex, all | largest |"
    yield "|---|---|---|---|---|---|---|"
    for entry in run.results["planes"]:
        held = json.loads((run.folder / entry["file"]).read_text())
        for key, what in (("loss", "robust"), ("clean_loss", "clean")):
            x, y, loss = (np.array(held[k], dtype=float) for k in ("x", "y", key))
            frame = np.array(
                [[x[0], y[0]], [3 * x[-1], y[0]], [x[0], 3 * y[-1]]]
            )  # a triangle around the whole grid
            inner, whole = (
                survey(x, y, loss, np.array(held["positions"])),
                survey(x, y, loss, frame),
            )
            depths = [depth(loss, *at) for at in whole.minima]
            deep = f"{len(depths)}, at most {max(depths):.4f} deep" if depths else "0"
            cells = [f"{np.nanmin(loss):.3f} to {np.nanmax(loss):.3f}", deep]
            for found in (inner, whole):
                cells += [f"{found.violations} of {found.triples}", f"{found.worst:.3f}"]
            yield f"| {entry['name']}, {what} | {' | '.join(cells)} |"


def depth(loss: np.ndarray, row: int, column: int) -> float:
    """How far a minimum lies below the lowest of its eight neighbours."""
    around = loss[row - 1 : row + 2, column - 1 : column + 2].ravel()
    return float(np.delete(around, 4).min() - loss[row, column])


def main() -> None:
    """Print every table that the folders have rows for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument(
        "--every", action="store_true", help="compare every network with the grid's two best soups"
    )
    asked = parser.parse_args()
    groups: dict[str, list[Run]] = {}
    for folder in asked.folders:
        run = Run(folder)
        groups.setdefault(run.results["name"], []).append(run)
    for runs in groups.values():
        parts: dict[str, Callable[[list[Run]], Iterator[str]]]
        parts = {"grid": grids, "line": lines, "learned": partial(learned, every=asked.every)}
        for role, part in parts.items():
            if runs[0].section(role):
                for line in part(runs):
                    print(line)
        if runs[0].results.get("planes"):
            for line in planes(runs):
                print(line)


if __name__ == "__main__":
    main()

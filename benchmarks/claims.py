"""The paper's claims on grids, lines, learned soups and planes, measured from run folders.

    python benchmarks/claims.py [--every] RUN_DIR [RUN_DIR ...]
    python benchmarks/claims.py --small

Prints the tables of docs/results.md. Folders of one recipe with several seeds are combined, except
in the tables of lines and planes, of which each seed has its own. The best network is chosen on val
(on test under the paper's protocol) and measured on test. For one seed, intervals are percentile
bootstraps over the test samples with 5,000 draws, which all networks of a folder share, so that
differences are paired. For several seeds, intervals are Student's t over the seeds. All intervals
are 95 %, in points. A gap is robust accuracy minus that of a straight line between two networks at
the same clean accuracy. --small runs tiny recipes on digits first.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import half_interval, run_recipe_small

from robustsoup.reports.convexity import survey_loss

DRAWS = 5000
Row = dict[str, Any]
Ends = tuple[str, str]
SMALL_RECIPES = ("eps_soups", "wise_ft", "landscape")


class RunResults:
    """Results of one run folder, with bootstrap draws of the accuracies on test.

    `draw_accuracy` returns DRAWS bootstrap values followed by the estimate itself. Verdicts of
    another folder can take the place of the run's own, for the networks that they are of.
    """

    def __init__(self, folder: Path, verdicts: Path | None = None) -> None:
        self.folder, self.verdicts = folder, verdicts or folder / "evaluations"
        try:
            self.results = json.loads((folder / "results.json").read_text())
        except OSError as error:
            sys.exit(f"{folder}: no folder of a finished run: {error.strerror}")
        protocol = self.results["protocol"]
        self.select_on, self.report_on = protocol["select_on"], protocol["report_on"]
        self.threats = [threat for threat in protocol["threats"] if threat != "clean"]
        if verdicts:
            rows = [r for r in self.results["rows"] if self.verdict_path(r["name"]).exists()]
            if not rows:
                sys.exit(f"{verdicts}: no verdicts on {self.report_on} of networks of {folder}")
            self.results["rows"] = rows
        self.rows: dict[str, Row] = {row["name"]: row for row in self.results["rows"]}
        self._accuracies: dict[str, dict[str, np.ndarray]] = {}
        self._weights: np.ndarray | None = None

    def verdict_path(self, name: str) -> Path:
        """Return the record of a network's evaluation on the split that reports."""
        return self.verdicts / f"{name}.{self.report_on}.json"

    def rows_by_section(self, role: str) -> dict[str, list[Row]]:
        """Return the rows of a role, grouped by their section of the recipe."""
        sections: dict[str, list[Row]] = {}
        for row in self.results["rows"]:
            if row["role"] == role:
                sections.setdefault(row["soup"], []).append(row)
        return sections

    def best_row(self, rows: Sequence[Row], measure: str) -> str:
        """Return the name of the best row at a measure, on the split that selects."""
        return max(rows, key=lambda row: row[self.select_on][measure]["value"])["name"]

    def draw_accuracy(self, name: str, measure: str) -> np.ndarray:
        """Return the accuracy on test in percent, (DRAWS + 1,)."""
        if name not in self._accuracies:
            with np.load(self.verdict_path(name).with_suffix(".npz")) as arrays:
                hits = {"clean": arrays["prediction"] == arrays["labels"]}
                hits |= {
                    threat: arrays[f"robust_{self._number(name, threat)}"]
                    for threat in self.threats
                }
            weights = self._sample_weights(len(hits["clean"]))
            self._accuracies[name] = {key: 100 * (weights @ value) for key, value in hits.items()}
        return self._accuracies[name][measure]

    def _number(self, name: str, threat: str) -> int:
        """Return the number of a threat in the evaluation of a network."""
        path = self.verdict_path(name)
        listed = json.loads(path.read_text("utf-8"))["threats"]
        threats = [item for item in listed if item != "clean"]
        if threat not in threats:
            sys.exit(f"{path}: got verdicts under {', '.join(threats)}, expected {threat}")
        return threats.index(threat)

    def _sample_weights(self, n: int) -> np.ndarray:
        if self._weights is None:
            drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS)
            self._weights = np.vstack([drawn, np.ones(n)]) / n
        return self._weights

    def gap_on_selection(self, name: str, ends: Ends, threat: str) -> float:
        """Return the gap on the split that selects; 0 where the ends are equally clean."""
        (clean0, robust0), (clean1, robust1), (clean, robust) = (
            [self.rows[row][self.select_on][key]["value"] for key in ("clean", threat)]
            for row in (*ends, name)
        )
        if clean1 == clean0:
            return 0.0
        return robust - (robust0 + (clean - clean0) * (robust1 - robust0) / (clean1 - clean0))

    def draw_gap(self, name: str, ends: Ends, threat: str) -> np.ndarray:
        """Return the points of robust accuracy above the line between two networks, on test."""
        clean0, clean1 = (self.draw_accuracy(end, "clean") for end in ends)
        robust0, robust1 = (self.draw_accuracy(end, threat) for end in ends)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = (robust1 - robust0) / (clean1 - clean0)
            line = robust0 + (self.draw_accuracy(name, "clean") - clean0) * slope
        return self.draw_accuracy(name, threat) - line


def count_seeds(runs: Sequence[object]) -> str:
    """Return "one seed", "3 seeds" and so on."""
    return "one seed" if len(runs) == 1 else f"{len(runs)} seeds"


def format_interval(draws: list[np.ndarray], *, sign: bool = True) -> str:
    """Return estimate [bootstrap interval] for one seed, mean ± half interval for several.

    "-" stands for what is not defined in a draw or seed.
    """
    plus = "+" if sign else ""
    estimates = [float(values[-1]) for values in draws]
    if len(draws) == 1:
        if not np.isfinite(draws[0][:-1]).all():
            return "-"
        low, high = np.percentile(draws[0][:-1], [2.5, 97.5])
        return f"{estimates[0]:{plus}.1f} [{low:{plus}.1f}, {high:{plus}.1f}]"
    if not np.isfinite(estimates).all():
        return "-"
    return f"{statistics.mean(estimates):{plus}.1f} ± {half_interval(estimates):.1f}"


def table_head(*columns: str) -> str:
    """Return the header of a Markdown table."""
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def grid_tables(runs: list[RunResults]) -> Iterator[str]:
    """Figures 2 and 3: the best soup of each grid, and the gain of mixing over the best corner."""
    for soup in runs[0].rows_by_section("grid"):
        yield f"\n**{runs[0].results['name']}, {soup}** ({count_seeds(runs)})\n"
        yield table_head(
            "measure", "best on val", "best mixture less best corner", "R² of a quadratic"
        )
        for measure in ("clean", *runs[0].threats):
            best, gains, fits = [], [], []
            for run in runs:
                rows = run.rows_by_section("grid")[soup]
                if measure not in run.rows[rows[0]["name"]][run.report_on]:
                    continue
                corners = [row for row in rows if max(row["coefficients"]) == 1]
                mixtures = [row for row in rows if max(row["coefficients"]) < 1]
                corner, mixture = (run.best_row(part, measure) for part in (corners, mixtures))
                best.append(run.best_row(rows, measure).removeprefix(f"{soup}-"))
                gains.append(
                    run.draw_accuracy(mixture, measure) - run.draw_accuracy(corner, measure)
                )
                values = [run.draw_accuracy(row["name"], measure)[-1] for row in rows]
                fits.append(fit_quadratic(rows, values))
            r2 = ", ".join(f"{value:.2f}" for value in fits)
            yield f"| {measure} | {'; '.join(best)} | {format_interval(gains)} | {r2} |"


def fit_quadratic(rows: Sequence[Row], values: Sequence[float]) -> float:
    """Return the share of the variance that a quadratic in the coefficients explains."""
    alpha = np.array([row["coefficients"] for row in rows])[:, :-1]
    n = alpha.shape[1]
    products = [alpha[:, i] * alpha[:, j] for i in range(n) for j in range(i, n)]
    design = np.stack([np.ones(len(alpha)), *alpha.T, *products], axis=1)
    y = np.array(values)
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - float((residual**2).sum()) / total if total > 1e-12 else 1.0


def line_tables(runs: list[RunResults]) -> Iterator[str]:
    """Figure 4: the gap above each line, at the point with the largest gap on val, by seed."""
    for run, threat in itertools.product(runs, runs[0].threats):
        yield f"\n**{run.results['name']}, {threat}** (seed {run.results['recipe']['seed']})\n"
        yield table_head(
            "to",
            "clean",
            "robust",
            "bends most on val at",
            "gap there, on test",
            "gap at the middle",
        )
        for section in run.rows_by_section("line").values():
            rows = sorted(section, key=lambda row: row["coefficients"][1])
            yield line_row(run, rows, threat)


def line_row(run: RunResults, rows: list[Row], threat: str) -> str:
    """Return one row of the table of lines; `rows` are in order from one end to the other."""
    ends = (rows[0]["name"], rows[-1]["name"])
    most = max(rows[1:-1], key=lambda row: run.gap_on_selection(row["name"], ends, threat))
    middle = rows[len(rows) // 2 - 1 : len(rows) // 2 + 1]
    cells = [
        rows[0]["ingredients"][1],
        *(f"{run.draw_accuracy(ends[1], key)[-1]:.1f}" for key in ("clean", threat)),
        f"{most['coefficients'][1]:g}",
        format_interval([run.draw_gap(most["name"], ends, threat)]),
        "; ".join(format_interval([run.draw_gap(row["name"], ends, threat)]) for row in middle),
    ]
    return f"| {' | '.join(cells)} |"


def learned_tables(runs: list[RunResults], *, every: bool) -> Iterator[str]:
    """Figures 5 and 6: learned soups (or all networks) against the two best soups of the grid."""
    threat = runs[0].threats[0]
    grid = next(iter(runs[0].rows_by_section("grid")))
    ends = []
    for run in runs:
        rows = run.rows_by_section("grid")[grid]
        ends.append((run.best_row(rows, "clean"), run.best_row(rows, threat)))
    best = "; ".join(map(" and ".join, ends))
    yield (
        f"\n**{runs[0].results['name']}, {threat}** ({count_seeds(runs)}); "
        f"the grid's two best: {best}\n"
    )
    yield table_head(
        "soup",
        "clean",
        "robust",
        "gap to the line",
        "robust less grid's best",
        "clean less grid's best",
    )
    names = [
        row["name"]
        for row in runs[0].results["rows"]
        if every or row["role"] in ("ingredient", "learned")
    ]
    for label, place in (("the grid's best clean", 0), ("the grid's best robust", 1)):
        chosen = [(run, end, end[place]) for run, end in zip(runs, ends, strict=True)]
        yield learned_row(label, chosen, threat, len(runs))
    for name in names:
        chosen = [(run, end, name) for run, end in zip(runs, ends, strict=True) if name in run.rows]
        yield learned_row(name, chosen, threat, len(runs))
    yield from span_table(runs, threat)


def learned_row(
    label: str, chosen: list[tuple[RunResults, Ends, str]], threat: str, seeds: int
) -> str:
    """Return one row: the network of each run against the two best soups of that run's grid."""
    clean = [run.draw_accuracy(name, "clean") for run, _, name in chosen]
    robust = [run.draw_accuracy(name, threat) for run, _, name in chosen]
    gaps = [run.draw_gap(name, end, threat) for run, end, name in chosen]
    best_robust = [run.draw_accuracy(end[1], threat) for run, end, _ in chosen]
    best_clean = [run.draw_accuracy(end[0], "clean") for run, end, _ in chosen]
    cells = [
        format_interval(clean, sign=False),
        format_interval(robust, sign=False),
        format_interval(gaps),
        format_interval([a - b for a, b in zip(robust, best_robust, strict=True)]),
        format_interval([a - b for a, b in zip(clean, best_clean, strict=True)]),
    ]
    note = f" ({count_seeds(chosen)})" if len(chosen) < seeds else ""
    return f"| {label}{note} | {' | '.join(cells)} |"


def span_table(runs: list[RunResults], threat: str) -> Iterator[str]:
    """Yield the range of clean and robust accuracy that each learned section spans."""
    yield "\n" + table_head("section", "clean, from least to most", "robust, from least to most")
    for soup in runs[0].rows_by_section("learned"):
        cells = []
        for key in ("clean", threat):
            spans = []
            for run in runs:
                if rows := run.rows_by_section("learned").get(soup):
                    values = np.stack([run.draw_accuracy(row["name"], key) for row in rows])
                    spans.append(values[values[:, -1].argmax()] - values[values[:, -1].argmin()])
            cells.append(format_interval(spans))
        yield f"| {soup} | {' | '.join(cells)} |"


def plane_table(run: RunResults) -> Iterator[str]:
    """Figure 7: whether the robust loss is convex on the planes of a run."""
    yield f"\n**{run.results['name']}** (seed {run.results['recipe']['seed']})\n"
    yield table_head(
        "plane",
        "loss, least to most",
        "minima inside",
        "not convex, triangle",
        "largest",
        "not convex, all",
        "largest",
    )
    for entry in run.results["planes"]:
        landscape = json.loads((run.folder / entry["file"]).read_text())
        for key, kind in (("loss", "robust"), ("clean_loss", "clean")):
            x, y, loss = (np.array(landscape[k], dtype=float) for k in ("x", "y", key))
            # A triangle around the whole grid makes survey_loss count all points.
            around = np.array([[x[0], y[0]], [3 * x[-1], y[0]], [x[0], 3 * y[-1]]])
            inside = survey_loss(x, y, loss, np.array(landscape["positions"]))
            everywhere = survey_loss(x, y, loss, around)
            depths = [minimum_depth(loss, *place) for place in everywhere.minima]
            minima = f"{len(depths)}, at most {max(depths):.4f} deep" if depths else "0"
            cells = [f"{np.nanmin(loss):.3f} to {np.nanmax(loss):.3f}", minima]
            for shape in (inside, everywhere):
                cells += [f"{shape.violations} of {shape.triples}", f"{shape.worst:.3f}"]
            yield f"| {entry['name']}, {kind} | {' | '.join(cells)} |"


def minimum_depth(loss: np.ndarray, row: int, column: int) -> float:
    """Return how far a minimum lies below the lowest of its eight neighbours."""
    around = loss[row - 1 : row + 2, column - 1 : column + 2].ravel()
    return float(np.delete(around, 4).min() - loss[row, column])


def print_tables(folders: Sequence[Path], *, every: bool) -> None:
    """Print all tables for which the folders have rows."""
    groups: dict[str, list[RunResults]] = {}
    for folder in folders:
        run = RunResults(folder)
        groups.setdefault(run.results["name"], []).append(run)
    for runs in groups.values():
        lines: list[str] = []
        if runs[0].rows_by_section("grid"):
            lines += grid_tables(runs)
        if runs[0].rows_by_section("line"):
            lines += line_tables(runs)
        if runs[0].rows_by_section("learned") and runs[0].rows_by_section("grid"):
            lines += learned_tables(runs, every=every)
        if runs[0].results.get("planes"):
            lines += itertools.chain.from_iterable(map(plane_table, runs))
        print("\n".join(lines))


def main() -> None:
    """Parse the options and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument(
        "--every", action="store_true", help="compare every network with the grid's two best soups"
    )
    parser.add_argument("--small", action="store_true", help="run tiny recipes on digits first")
    options = parser.parse_args()
    if bool(options.folders) == options.small:
        parser.error("requires run folders, or --small")
    if not options.small:
        return print_tables(options.folders, every=options.every)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [run_recipe_small(name, Path(temporary) / name) for name in SMALL_RECIPES]
        return print_tables(folders, every=options.every)


if __name__ == "__main__":
    main()

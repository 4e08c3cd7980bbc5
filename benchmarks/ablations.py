"""Tables of docs/results.md from run folders of recipes/two_cores/learning.toml.

    python benchmarks/ablations.py runs/learning-0 runs/learning-1 runs/learning-2
        [--figures docs/figures] [--buffers runs/buffers-0 runs/buffers-1 runs/buffers-2]
    python benchmarks/ablations.py --small

Each run folder is one seed. Accuracies are means over the seeds with minimum and maximum, on test.
Differences to the reference are paired by seed, which cancels the effect of a seed on both; they
have 95 % intervals of Student's t, in points. "outside" is the robust accuracy of a soup above the
line between the ingredients with the smallest and the largest eps, at equal clean accuracy, in
points. --figures draws the learned coefficients and the dial of the first folder. --buffers takes
run folders of recipes/two_cores/learning_buffers.toml with the same seeds, for the table of
statistics while learning. --small runs both recipes on digits first.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import half_interval, run_recipe_small
from matplotlib import rc_context

import robustsoup as rs
from robustsoup.reports import StoredRun, draw_dial, save_plot
from robustsoup.reports.style import STYLE
from robustsoup.reports.tradeoff import draw_tradeoff
from robustsoup.runs.results import Results

REFERENCE = "learned-linf-8-255-ce"
SMALLEST_EPS, LARGEST_EPS = "eps4", "eps16"
POLICIES = ("average", "base", "recalibrate", "adversarial")
Row = dict[str, Any]
Point = tuple[float, float]
"""Clean and robust accuracy in percent."""


class SeedRun:
    """The rows of one run folder by name, joined with those of a second folder of the same seed."""

    def __init__(self, folder: Path, buffers_folder: Path | None = None) -> None:
        self.folder = folder
        self.results = json.loads((folder / "results.json").read_text())
        self.rows: dict[str, Row] = {row["name"]: row for row in self.results["rows"]}
        if buffers_folder:
            second = json.loads((buffers_folder / "results.json").read_text())
            if second["data"]["split_digest"] != self.results["data"]["split_digest"]:
                raise SystemExit(f"{buffers_folder}: its seed differs from that of {folder}")
            self.rows = {row["name"]: row for row in second["rows"]} | self.rows
        self.threat = next(t for t in self.results["protocol"]["threats"] if t != "clean")

    def point(self, name: str) -> Point:
        """Return clean and robust accuracy on test, in percent."""
        test = self.rows[name]["test"]
        return 100 * test["clean"]["value"], 100 * test[self.threat]["value"]

    def gap_above_line(self, name: str) -> float:
        """Return the robust accuracy above the line between two ingredients, in points."""
        (clean0, robust0), (clean1, robust1) = self.point(SMALLEST_EPS), self.point(LARGEST_EPS)
        clean, robust = self.point(name)
        if clean1 == clean0:
            return robust - robust0
        return robust - (robust0 + (clean - clean0) * (robust1 - robust0) / (clean1 - clean0))

    def coefficients(self, name: str) -> rs.Coefficients:
        """Return the coefficients of a learned soup."""
        return rs.Coefficients.load(self.folder / self.rows[name]["coefficients_file"])

    def names(self, keep: Callable[[Row], bool]) -> list[str]:
        """Return the names of the rows for which `keep` holds."""
        return [row["name"] for row in self.results["rows"] if keep(row)]


def format_difference(values: Sequence[float]) -> str:
    """Return the mean and half the 95 % interval of Student's t over the seeds."""
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    return f"{statistics.mean(values):+.1f} ± {half_interval(values):.1f}"


def format_range(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean over the seeds with minimum and maximum."""
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table_head(*columns: str) -> str:
    """Return the header of a Markdown table."""
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def print_comparison(runs: Sequence[SeedRun], names: Sequence[str], reference: str) -> None:
    """Print each network and its difference to the reference."""
    differences = (f"clean, less {reference}", f"robust, less {reference}")
    print(table_head("", "clean", "robust", *differences, "outside"))
    for name in [reference, *(n for n in names if n != reference)]:
        with_name = [run for run in runs if name in run.rows]
        points = [run.point(name) for run in with_name]
        references = [run.point(reference) for run in with_name]
        cells = [format_range([point[axis] for point in points]) for axis in (0, 1)]
        for axis in (0, 1):
            gains = [p[axis] - r[axis] for p, r in zip(points, references, strict=True)]
            cells.append("" if name == reference else format_difference(gains))
        cells.append(format_difference([run.gap_above_line(name) for run in with_name]))
        note = f" ({len(with_name)} seed)" if len(with_name) < len(runs) else ""
        print(f"| {name}{note} | {' | '.join(cells)} |")


def summarise_coefficients(coefficients: rs.Coefficients) -> dict[str, float]:
    """Return entropy (as a share of log n), movement and slope, for all layers and thirds."""
    third = max(len(coefficients.layers) // 3, 1)
    moved, slopes = coefficients.movement(), coefficients.slopes
    assert moved is not None, "the coefficients were not learned"
    assert slopes is not None, "the coefficients were not learned"
    return {
        "entropy / log n": float(coefficients.entropy().mean())
        / math.log(coefficients.alpha.shape[1]),
        "moved": float(moved.mean()),
        "moved, first third": float(moved[:third].mean()),
        "moved, last third": float(moved[-third:].mean()),
        "slope, first third": float(slopes[:third].mean()),
        "slope, last third": float(slopes[-third:].mean()),
    }


def print_learned(runs: Sequence[SeedRun], names: Sequence[str]) -> None:
    """Print a summary of the coefficients of each learned soup."""
    for number, name in enumerate(names):
        summaries = [summarise_coefficients(run.coefficients(name)) for run in runs]
        if number == 0:
            print(table_head("", *summaries[0]))
        cells = [
            format_range([summary[key] for summary in summaries], 4 if "slope" in key else 2)
            for key in summaries[0]
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def draw_figures(run: SeedRun, folder: Path) -> None:
    """Draw the learned coefficients of several settings, and the dial beside grid and soups."""
    labels = {
        REFERENCE: "reference",
        "zeros-linf-8-255": "zeros",
        "lr0.1-linf-8-255": "lr 0.1",
        "detach0-linf-8-255": "detach 0",
        "learned-linf-8-255-mixed-0.5": "mixed 0.5",
        "learned-linf-8-255-mixed-1": "clean",
    }
    ingredients = run.rows[REFERENCE]["ingredients"]
    panels = [(label, run.coefficients(name)) for name, label in labels.items()]
    plot = draw_dial(panels, ingredients, "what was learned")
    save_plot(replace(plot, stem="learning_two_cores_coefficients"), folder)
    results = Results.from_json(run.results, str(run.folder / "results.json"))
    rows = tuple(
        row
        for row in results.rows
        if row.role == "ingredient" or row.soup in ("grid", "learned", "dial")
    )
    with rc_context(STYLE):
        dial = replace(results, rows=rows, name="the dial")
        (plot,), _ = draw_tradeoff(StoredRun(dial, run.folder))
    save_plot(replace(plot, stem="learning_two_cores_dial"), folder)


def print_grid_policies(runs: Sequence[SeedRun]) -> None:
    """Print the grid of step 1/2 under each policy, and its difference to the average policy."""
    for title, points in (
        ("midpoints", ("0-0.5-0.5", "0.5-0-0.5", "0.5-0.5-0")),
        ("ingredients", ("0-0-1", "0-1-0", "1-0-0")),
    ):
        columns = ("clean", "robust", "clean, less average", "robust, less average")
        print("\n" + table_head(f"the three {title}", *columns))
        means = {
            policy: [
                [mean_of_points(run, f"half-{policy}", points, axis) for run in runs]
                for axis in (0, 1)
            ]
            for policy in POLICIES
        }
        for policy, scores in means.items():
            cells = [format_range(scores[axis]) for axis in (0, 1)]
            for axis in (0, 1):
                pairs = zip(scores[axis], means["average"][axis], strict=True)
                gains = [a - b for a, b in pairs]
                cells.append("" if policy == "average" else format_difference(gains))
            print(f"| {policy} | {' | '.join(cells)} |")


def mean_of_points(run: SeedRun, prefix: str, points: Sequence[str], axis: int) -> float:
    """Return the mean clean (axis 0) or robust (axis 1) accuracy of some soups of a grid."""
    return statistics.mean(run.point(f"{prefix}-{point}")[axis] for point in points)


def print_frontier(runs: Sequence[SeedRun]) -> None:
    """Print how far the soups of each method lie above the line."""
    methods: dict[str, Callable[[Row], bool]] = {
        "grid": lambda row: row["role"] == "grid" and row["soup"] == "grid",
        "learned one by one": lambda row: row["soup"] == "learned",
        "dial": lambda row: row["soup"] == "dial",
        "dial, tracked": lambda row: row["soup"] == "dial-tracked",
        "dial, eps": lambda row: row["soup"] == "dial-eps",
    }
    print(table_head("", "points", "best outside", "mean outside", "clean from", "to"))
    for method, belongs in methods.items():
        names = {run.folder: run.names(belongs) for run in runs}
        present = [run for run in runs if names[run.folder]]
        outside = [[run.gap_above_line(name) for name in names[run.folder]] for run in present]
        clean = [[run.point(name)[0] for name in names[run.folder]] for run in present]
        if not present:
            continue
        cells = [
            format_difference([max(values) for values in outside]),
            format_difference([statistics.mean(values) for values in outside]),
            format_range([min(values) for values in clean]),
            format_range([max(values) for values in clean]),
        ]
        print(f"| {method} | {len(outside[-1])} | {' | '.join(cells)} |")


def best_of_grid(run: SeedRun) -> float:
    """Return how far the best soup of the grid lies above the line."""
    return max(run.gap_above_line(name) for name in run.names(lambda row: row["soup"] == "grid"))


def print_tables(runs: Sequence[SeedRun], *, with_buffers: bool) -> None:
    """Print every table."""
    results = runs[0].results
    samples = results["protocol"]["samples"]["test"]
    print(f"{len(runs)} seeds, {samples} test samples, {runs[0].threat}\n")
    learned = runs[0].names(lambda row: row["role"] == "learned" and "-base-" not in row["name"])
    policies = ("learned-average", "learned-recal", "learned-adv")
    single = [name for name in learned if not name.startswith(policies)]
    print("### Ingredients and learned soups, one setting changed at a time\n")
    print_comparison(runs, ["pretrained", "eps4", "eps8", "eps16", *single], REFERENCE)
    print("\n### What was learned\n")
    print_learned(runs, single)
    print("\n### Statistics of learned soups\n")
    by_policy = runs[0].names(
        lambda row: (
            row["role"] == "learned"
            and row["name"].startswith("learned-")
            and row["name"].endswith("linf-8-255")
        )
    )
    print_comparison(runs, by_policy, REFERENCE)
    print("\n### Statistics of the grid\n")
    print_grid_policies(runs)
    if with_buffers:
        print("\n### Statistics while learning\n")
        on_policies = [name for name in runs[0].rows if name.startswith("learned-on-")]
        print_comparison(runs, on_policies, REFERENCE)
    print("\n### The dial, soups learned one by one, and the grid\n")
    dials = runs[0].names(lambda row: row["role"] == "dial")
    one_by_one = [name for name in single if name.startswith("learned-")]
    print_comparison(runs, [*dials, *one_by_one], REFERENCE)
    print()
    print_frontier(runs)
    for name in (REFERENCE, "model-linf-8-255"):
        gains = format_difference([best_of_grid(run) - run.gap_above_line(name) for run in runs])
        print(f"\nthe grid's best soup lies {gains} points farther above the line than {name}")


def main() -> None:
    """Parse the options and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--buffers", nargs="+", type=Path)
    parser.add_argument("--small", action="store_true", help="run tiny recipes on digits first")
    options = parser.parse_args()
    if bool(options.folders) == options.small:
        parser.error("requires run folders, or --small")
    with tempfile.TemporaryDirectory() as temporary:
        if options.small:
            recipes = ("learning", "learning_buffers")
            folder, buffers = (run_recipe_small(name, Path(temporary) / name) for name in recipes)
            options.folders, options.buffers = [folder], [buffers]
            options.figures = Path(temporary) / "figures"
        buffers_folders = options.buffers or [None] * len(options.folders)
        runs = [SeedRun(*pair) for pair in zip(options.folders, buffers_folders, strict=True)]
        if options.figures:
            draw_figures(runs[0], options.figures)
        print_tables(runs, with_buffers=bool(options.buffers))


if __name__ == "__main__":
    main()

"""Which merging method survives an attack? Reads run folders of recipes named merging*.toml.

    robustsoup run recipes/two_cores/merging.toml -o RUN
    python benchmarks/merging.py RUN [RUN ...]
    python benchmarks/merging.py RUN --verdicts FOLDER
    python benchmarks/merging.py --small

Each section of soups that is no grid or line is compared with the front of the grid of the same
ingredients: the most robust grid soup at the same clean accuracy, interpolated between neighbours.
Where there is no grid, as with many ingredients, the front is that of the ingredients themselves.
The front is chosen on the split that selects and measured, as the methods are, on the split that
reports. A method that is less clean than the whole front is compared with the front's most robust
soup, one that is cleaner with its cleanest, which understates it. For one comparison, intervals
are percentile bootstraps over the samples (5,000 draws shared by all networks); for several seeds
(folders, or sections METHOD-1, METHOD-2 and so on), Student's t over the seeds. All intervals are
95 %, in points. Seconds are those of merging or learning, as the store says.
"""

import re
import statistics
from collections.abc import Mapping

import numpy as np
from claims import Row, RunResults, format_interval, table_head
from common import read_step_seconds
from fine_tunes import describe_script, draw_on_line, open_runs

SECTION = re.compile(r"(.+?)(?:-\d+)?")
"""A section of soups: its method, and the number of the seed of its ingredients."""
GRIDS = ("grid", "line")


def find_front(run: RunResults, ingredients: list[str], threat: str) -> list[str]:
    """Return the Pareto front of some ingredients and their grid, on the split that selects."""
    rows = [row for row in run.rows.values() if row["ingredients"] == ingredients]
    rows = [row for row in rows if row["role"] in GRIDS]
    points = {
        row["name"]: [row[run.select_on][key]["value"] for key in ("clean", threat)]
        for row in (*rows, *(run.rows[name] for name in ingredients if name in run.rows))
    }
    return [
        name
        for name, (clean, robust) in points.items()
        if not any(
            c >= clean and r >= robust and (c, r) != (clean, robust) for c, r in points.values()
        )
    ]


def draw_gain(run: RunResults, row: Row, threat: str) -> np.ndarray:
    """Return the robust accuracy of a soup less that of the front at its clean accuracy."""
    front = find_front(run, row["ingredients"], threat)
    clean, robust = (run.draw_accuracy(row["name"], key) for key in ("clean", threat))
    on_front = draw_on_line(run, front, clean, threat)
    cleans = np.stack([run.draw_accuracy(name, "clean") for name in front])
    cleanest, most_robust = (  # chosen on the split that selects, as the front is
        run.draw_accuracy(run.best_row([run.rows[name] for name in front], key), threat)
        for key in ("clean", threat)
    )
    on_front = np.where(clean > cleans.max(0), cleanest, on_front)
    return robust - np.where(clean < cleans.min(0), most_robust, on_front)


def list_methods(runs: list[RunResults]) -> dict[str, list[tuple[RunResults, Row]]]:
    """Return the soups of each method, with their runs, by what the table calls them."""
    methods: dict[str, list[tuple[RunResults, Row]]] = {}
    for run in runs:
        for row in run.results["rows"]:
            if row["soup"] is None or row["role"] in GRIDS:
                continue
            match = SECTION.fullmatch(row["soup"])
            name = match[1] if match else row["soup"]
            if row["role"] == "learned":
                name += f", {row['threat']}"
            methods.setdefault(name, []).append((run, row))
    return methods


def find_seconds(row: Row, run: RunResults, seconds: Mapping[str, float]) -> float:
    """Return the seconds of merging or learning a soup; NaN if the store no longer knows."""
    names = (row["checkpoint"], row["coefficients_file"])
    digests = [run.results["files"][name]["sha256"] for name in names if name]
    return next((seconds[digest] for digest in digests if digest in seconds), float("nan"))


def print_table(runs: list[RunResults]) -> None:
    """Print each method beside the front of its grid."""
    seconds = read_step_seconds()
    for threat in runs[0].threats:
        names = sorted({run.results["name"] for run in runs})
        print(f"\n**{', '.join(names)}, {threat}**\n")
        print(table_head("method", "soups", "clean", "robust", "against the grid", "seconds"))
        for method, soups in list_methods(runs).items():
            cleans, robusts = (
                [run.draw_accuracy(row["name"], key) for run, row in soups]
                for key in ("clean", threat)
            )
            gains = [draw_gain(run, row, threat) for run, row in soups]
            taken = statistics.mean(find_seconds(row, run, seconds) for run, row in soups)
            cells = [format_interval(draws, sign=False) for draws in (cleans, robusts)]
            cells += [format_interval(gains), f"{taken:.0f}" if np.isfinite(taken) else "-"]
            print(f"| {method} | {len(soups)} | {' | '.join(cells)} |")


def main() -> None:
    """Print the table of run folders."""
    parser = describe_script(__doc__)
    parser.add_argument("--swap", action="store_true", help="exchange the two splits' roles")
    with open_runs(parser, "merging") as (options, runs):
        if options.swap and options.verdicts:
            parser.error("--swap reads a run's own verdicts; leave --verdicts out")
        if options.swap:
            for run in runs:
                run.select_on, run.report_on = run.report_on, run.select_on
        print_table(runs)


if __name__ == "__main__":
    main()

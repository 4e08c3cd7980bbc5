"""Is a soup worth a fine-tune of its own? Reads the run folder of a recipe named fine_tunes.toml.

    robustsoup run recipes/two_cores/fine_tunes.toml -o RUN
    python benchmarks/fine_tunes.py RUN [--pack TABLE.npz]
    python benchmarks/fine_tunes.py --small

Each [soups.line-S] is a line of soups between two networks that were fine-tuned with seed S. Every
other ingredient NAME-S is a network fine-tuned for one point of the trade-off. The table compares
it with the line at the same clean accuracy on the split that reports, interpolated between
neighbouring soups. Other lines of two ingredients, such as [soups.far], are compared with the
networks of the first seed, and the mean of several networks, as [soups.seeds], with each of them.
For one or two seeds, each has a row of its own, and intervals are percentile bootstraps over the
samples (5,000 draws shared by all networks, so clean accuracies and interpolation vary with them);
for three seeds or more, Student's t over the seeds. All intervals are 95 %, in points. --pack also
writes the verdicts of all networks, one bit each.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from claims import Row, RunResults, count_seeds, format_interval, table_head
from common import run_recipe_small

import robustsoup as rs
from robustsoup.evaluation.hit_tables import HitTable

FEWEST_SEEDS = 3
"""Fewer seeds say too little of their spread for an interval over them."""


def draw_on_line(run: RunResults, line: list[str], clean: np.ndarray, threat: str) -> np.ndarray:
    """Return the robust accuracy of a line of soups at a clean accuracy, (DRAWS + 1,).

    NaN where the clean accuracy lies outside the line.
    """
    cleans = np.stack([run.draw_accuracy(name, "clean") for name in line])
    robusts = np.stack([run.draw_accuracy(name, threat) for name in line])
    order = np.argsort(cleans, axis=0)
    points = zip(
        clean,
        np.take_along_axis(cleans, order, axis=0).T,
        np.take_along_axis(robusts, order, axis=0).T,
        strict=True,
    )
    return np.array([np.interp(at, x, y, left=np.nan, right=np.nan) for at, x, y in points])


def list_lines(run: RunResults) -> dict[str, list[str]]:
    """Return the names of the networks of each [soups.line-S], with its ends, by S."""
    return {
        section.removeprefix("line-"): list_networks(rows)
        for section, rows in run.rows_by_section("line").items()
        if section.startswith("line-")
    }


def list_networks(rows: Sequence[Row]) -> list[str]:
    """Return the names of the ends of a line and of its soups."""
    return [*rows[0]["ingredients"], *(row["name"] for row in rows)]


def list_points(run: RunResults, lines: dict[str, list[str]]) -> Iterator[str]:
    """Yield the names, without the seed, of the networks fine-tuned for points of the lines."""
    first, line = next(iter(lines.items()))
    for row in run.results["rows"]:
        name, _, seed = row["name"].rpartition("-")
        if row["role"] == "ingredient" and seed == first and row["name"] not in line:
            yield name


def print_table(run: RunResults) -> None:
    """Print the networks fine-tuned for a point beside the line at the same clean accuracy."""
    lines = list_lines(run)
    seeds = [RunResults(run.folder) for _ in lines]
    for threat in run.threats:
        print(f"\n**{run.results['name']}, {threat}** ({count_seeds(seeds)} of fine-tuning)\n")
        print(table_head("fine-tuned", "clean", "robust", "line, robust", "line minus fine-tuned"))
        rows = [list(lines)] if len(lines) >= FEWEST_SEEDS else [[seed] for seed in lines]
        for point, row in itertools.product(list_points(run, lines), rows):
            cleans, robusts, on_lines = [], [], []
            for seed in row:
                cleans.append(run.draw_accuracy(f"{point}-{seed}", "clean"))
                robusts.append(run.draw_accuracy(f"{point}-{seed}", threat))
                on_lines.append(draw_on_line(run, lines[seed], cleans[-1], threat))
            gains = [line - own for line, own in zip(on_lines, robusts, strict=True)]
            cells = [format_interval(draws, sign=False) for draws in (cleans, robusts, on_lines)]
            name = point if row == list(lines) else f"{point}, seed {row[0]}"
            print(f"| {name} | {' | '.join(cells)} | {format_interval(gains)} |")
        print_other_lines(run, threat, seed=next(iter(lines)))
        print_means(run, threat)


def print_other_lines(run: RunResults, threat: str, seed: str) -> None:
    """Print the networks of one seed beside the lines that are not named after a seed."""
    for section, rows in run.rows_by_section("line").items():
        if section.startswith("line-"):
            continue
        print(f"\n**[soups.{section}], {', '.join(rows[0]['ingredients'])}** (one seed)\n")
        print(table_head("fine-tuned", "clean", "robust", "line, robust", "line minus fine-tuned"))
        for row in run.results["rows"]:
            name = row["name"]
            if row["role"] != "ingredient" or name.rpartition("-")[2] != seed:
                continue
            clean, robust = (run.draw_accuracy(name, measure) for measure in ("clean", threat))
            line = draw_on_line(run, list_networks(rows), clean, threat)
            cells = [format_interval([draws], sign=False) for draws in (clean, robust, line)]
            print(f"| {name} | {' | '.join(cells)} | {format_interval([line - robust])} |")


def print_means(run: RunResults, threat: str) -> None:
    """Print the means of several networks minus each of them, and minus their mean accuracy."""
    for section, (row,) in run.rows_by_section("uniform").items():
        print(f"\n**[soups.{section}]** (one soup)\n")
        print(table_head("soup minus", "clean", "robust"))
        draws = {
            name: [run.draw_accuracy(name, measure) for measure in ("clean", threat)]
            for name in (row["name"], *row["ingredients"])
        }
        soup = draws.pop(row["name"])
        draws["their mean"] = list(np.mean(list(draws.values()), axis=0))
        for name, other in draws.items():
            gains = [format_interval([a - b]) for a, b in zip(soup, other, strict=True)]
            print(f"| {name} | {' | '.join(gains)} |")


def pack(run: RunResults) -> HitTable:
    """Return the verdicts of all networks on the split that reports."""
    rows = list(run.results["rows"])
    evaluations = {row["name"]: rs.Evaluation.load(run.verdict_path(row["name"])) for row in rows}
    ingredients = [name for row in rows for name in row["ingredients"] or ()]
    columns = list(dict.fromkeys([*evaluations, *ingredients]))
    coefficients = np.zeros((len(rows), len(columns)))
    for number, row in enumerate(rows):
        parts = {row["name"]: 1.0}  # a network of its own, or coefficients by layer
        if row["coefficients"]:
            parts = dict(zip(row["ingredients"], row["coefficients"], strict=True))
        for name, weight in parts.items():
            coefficients[number, columns.index(name)] = weight
    record = {
        "run": run.results["name"],
        "protocol": run.results["protocol"]
        | {"select_on": run.select_on, "report_on": run.report_on},
        "attack": evaluations[rows[0]["name"]].record["attack"],
        "columns": columns,
    }
    return HitTable.of(evaluations, coefficients.tolist(), record)


@contextmanager
def open_runs(
    parser: argparse.ArgumentParser, recipe: str
) -> Iterator[tuple[argparse.Namespace, list[RunResults]]]:
    """Parse the arguments of a script that reads run folders, and yield them and the runs.

    Adds the folders, --verdicts, --pack, which is done after the script, and --small to the parser.

    Args:
        parser: The parser with the script's own options.
        recipe: The recipe that --small runs, by its name under recipes/two_cores.
    """
    parser.add_argument("folders", nargs="*", type=Path, help="run folders")
    parser.add_argument(
        "--verdicts",
        type=Path,
        help="folder of `robustsoup evaluate -o`, such as verdicts of AutoAttack, to read in place "
        "of the one run's own; tables have only the networks that were evaluated",
    )
    parser.add_argument("--pack", type=Path, help="table of the first folder's verdicts to write")
    parser.add_argument("--small", action="store_true", help="run in seconds on digits")
    options = parser.parse_args()
    if not options.small and not options.folders:
        parser.error("a run folder is required")
    if options.verdicts and len(options.folders) != 1:
        parser.error("--verdicts requires one run folder")
    with tempfile.TemporaryDirectory() as temporary:
        folders = options.folders
        if options.small:
            folders = [run_recipe_small(recipe, Path(temporary))]
        runs = [RunResults(folder, options.verdicts) for folder in folders]
        yield options, runs
        if options.pack:
            print(pack(runs[0]).save(options.pack))


def describe_script(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the text of a script."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def main() -> None:
    """Print the table of each run folder."""
    with open_runs(describe_script(__doc__), "fine_tunes") as (_, runs):
        for run in runs:
            print_table(run)


if __name__ == "__main__":
    main()

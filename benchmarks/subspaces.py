"""Is a line that is trained as a whole better than one between two fine-tuned ends?

    robustsoup run recipes/two_cores/subspaces.toml -o RUN
    python benchmarks/subspaces.py RUN [RUN ...] [--pack TABLE.npz]
    python benchmarks/subspaces.py --small

[soups.line] is the line between ends that were fine-tuned apart. Every network that is not on it,
points of [soups.subspace] and ingredients such as "single", is compared with it: robust accuracy
less that of the line at the same clean accuracy, interpolated between neighbouring soups. A network
that is cleaner or less clean than the whole line has no comparison. The recipe gives all of them
the same total epochs. For one folder, intervals are percentile bootstraps over the samples (5,000
draws shared by all networks); for several, which differ by seed, Student's t. All intervals are
95 %, in points.
"""

from claims import RunResults, count_seeds, format_interval, table_head
from fine_tunes import describe_script, draw_on_line, open_runs

LINE = "line"


def line_names(run: RunResults) -> list[str]:
    """Return the soups between the ends that were fine-tuned apart."""
    return [row["name"] for row in run.rows_by_section("line")[LINE]]


def compared_names(run: RunResults) -> list[str]:
    """Return the networks that are not on the line, less its ends and what all started from."""
    left_out = [*line_names(run), *run.rows[line_names(run)[0]]["ingredients"]]
    return [
        name
        for name, row in run.rows.items()
        if name not in left_out and row["role"] != "pretrained"
    ]


def print_table(runs: list[RunResults]) -> None:
    """Print the line, and every other network beside it."""
    for threat in runs[0].threats:
        print(f"\n**{runs[0].results['name']}, {threat}** ({count_seeds(runs)} of fine-tuning)\n")
        print(table_head("network", "clean", "robust", "less the line at this clean accuracy"))
        for name in [*line_names(runs[0]), *compared_names(runs[0])]:
            cleans, robusts = (
                [run.draw_accuracy(name, measure) for run in runs] for measure in ("clean", threat)
            )
            cells = [format_interval(draws, sign=False) for draws in (cleans, robusts)]
            gains = [
                robust - draw_on_line(run, line_names(run), clean, threat)
                for run, clean, robust in zip(runs, cleans, robusts, strict=True)
            ]
            gain = "" if name in line_names(runs[0]) else format_interval(gains)
            print(f"| {name} | {' | '.join(cells)} | {gain} |")


def main() -> None:
    """Print the table of run folders that differ by seed."""
    with open_runs(describe_script(__doc__), "subspaces") as (_, runs):
        print_table(runs)


if __name__ == "__main__":
    main()

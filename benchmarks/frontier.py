"""How far the soups of a run lie outside the straight line between the grid's two best points, with 95 % intervals.

    python benchmarks/frontier.py RUN_DIR

The two points (best clean, best robust) are chosen on val; everything is measured on test. The gap of a soup is its robust
accuracy less the line's at the same clean accuracy, in points. Intervals: percentile bootstrap over the test samples, drawn
jointly for all networks (so differences are paired), 5,000 draws, seed 0.
"""

import json
import sys
from pathlib import Path

import numpy as np

DRAWS = 5000


def verdicts(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(clean right, robust) of each test sample."""
    with np.load(folder / "evaluations" / f"{name}.test.npz") as file:
        return file["prediction"] == file["labels"], file["robust_0"]


def main(folder: Path) -> None:
    """Print a Markdown table of gaps and of paired differences in robust accuracy."""
    results = json.loads((folder / "results.json").read_text())
    threat = results["protocol"]["threats"][0]
    grid = [row for row in results["rows"] if row["role"] == "grid"]
    ends = [max(grid, key=lambda row: row["val"][key]["value"])["name"] for key in ("clean", threat)]
    rows = [row["name"] for row in results["rows"]]
    data = {name: verdicts(folder, name) for name in rows}
    n = len(data[rows[0]][0])
    draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS) / n
    clean = {name: np.append(draws @ data[name][0], data[name][0].mean()) for name in rows}
    robust = {name: np.append(draws @ data[name][1], data[name][1].mean()) for name in rows}
    a, b = ends
    slope = (robust[b] - robust[a]) / (clean[b] - clean[a])
    print(f"best clean on val: {a}; best robust on val: {b}; {n} test samples, {threat}\n")
    print("| network | gap to the line (points) | robust less that of the grid's best (points) |")
    print("|---|---|---|")
    for name in rows:
        gap = robust[name] - (robust[a] + slope * (clean[name] - clean[a]))
        print(f"| {name} | {interval(gap)} | {interval(robust[name] - robust[b])} |")


def interval(values: np.ndarray) -> str:
    """The estimate (last value) and its 95 % percentile interval, in points."""
    low, high = np.percentile(values[:-1], [2.5, 97.5]) * 100
    return f"{values[-1] * 100:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

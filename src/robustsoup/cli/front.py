"""Print the Pareto front of a run: a small table and a plot of characters."""

from collections.abc import Sequence
from dataclasses import dataclass

from robustsoup.cli.terminal import print_line, print_table
from robustsoup.evaluation.verdicts import CLEAN_KEY
from robustsoup.runs.results import SOUP_ROLES, ResultRow, Results
from robustsoup.soups.selection import find_front

WIDTH, HEIGHT = 60, 15
"""Characters and lines inside the axes of the plot."""
MOST_ROWS = 12
"""Most rows of the table."""


@dataclass(frozen=True)
class Mark:
    """A point of the plot.

    Attributes:
        x, y: Coordinates.
        symbol: One character; later marks cover earlier ones.
    """

    x: float
    y: float
    symbol: str


def print_front(results: Results) -> None:
    """Print the front of clean and robust accuracy on the split that selects.

    Nothing is printed for fewer than three measured networks, or without an attack.
    """
    measure = _robust_measure(results)
    rows = _comparable_rows(results, measure) if measure else []
    if measure is None or len(rows) < 3 or not any(row.role in SOUP_ROLES for row in rows):
        return
    split, chosen = results.protocol.select_on, _chosen(results)
    label = results.selection.choice_word if results.selection else "chosen"
    points = {row.name: _point(row, split, measure) for row in rows}
    front = [rows[i] for i in find_front(list(points.values()))]
    front.sort(key=lambda row: -points[row.name][0])
    print_table(
        ("the front", CLEAN_KEY, measure, ""),
        [
            (
                row.name,
                str(row.accuracy(split, CLEAN_KEY)),
                str(row.accuracy(split, measure)),
                label if row.name == chosen else "",
            )
            for row in _thin(front, chosen)
        ],
        f"{len(front)} of {len(rows)} networks are on the front, on {split}",
    )
    on_front = {row.name for row in front}
    marks = [Mark(*point, "o" if name in on_front else ".") for name, point in points.items()]
    marks += [Mark(*points[row.name], "x") for row in rows if row.role == "ingredient"]
    marks += [Mark(*points[chosen], "@")] if chosen in points else []
    for line in draw_plot(marks, x_label=f"{CLEAN_KEY} (%)", y_label=f"{measure} (%)"):
        print_line(line)
    print_line(f"@ {label}   x ingredient   o on the front   . other")


def _comparable_rows(results: Results, measure: str) -> list[ResultRow]:
    """Return the networks with confirmed accuracies, without soups that equal an ingredient."""
    split = results.protocol.select_on
    return [
        row
        for row in results.distinct_rows
        if row.accuracy(split, measure) is not None and not row.screened
    ]


def _chosen(results: Results) -> str | None:
    """Return the name of the choice; where it is an ingredient itself, that of the ingredient."""
    if results.selection is None:
        return None
    chosen = results.selection.chosen
    return next((row.ingredient for row in results.rows if row.name == chosen), None) or chosen


def _robust_measure(results: Results) -> str | None:
    """Return the attacked measure that is maximised, else the first threat."""
    threats = [name for name in results.protocol.threats if not name.startswith(CLEAN_KEY)]
    maximised = results.selection.maximise if results.selection else None
    if maximised in threats or maximised == "union":
        return maximised
    return threats[0] if threats else None


def _point(row: ResultRow, split: str, measure: str) -> tuple[float, float]:
    clean, robust = row.accuracy(split, CLEAN_KEY), row.accuracy(split, measure)
    return (clean.value if clean else 0.0, robust.value if robust else 0.0)


def _thin(front: Sequence[ResultRow], chosen: str | None) -> list[ResultRow]:
    """Return rows at equal distances along a long front, its ends and the chosen one among them."""
    if len(front) <= MOST_ROWS:
        return list(front)
    last = len(front) - 1
    kept = {round(i * last / (MOST_ROWS - 1)) for i in range(MOST_ROWS)}
    return [row for i, row in enumerate(front) if i in kept or row.name == chosen]


def draw_plot(
    marks: Sequence[Mark], *, x_label: str, y_label: str, width: int = WIDTH, height: int = HEIGHT
) -> list[str]:
    """Return a scatter plot of characters, with the ends of both axes in percent.

    Args:
        marks: At least one; later marks cover earlier ones.
        x_label: What x is.
        y_label: What y is.
        width: Characters inside the axes.
        height: Lines inside the axes.
    """
    lows = min(mark.x for mark in marks), min(mark.y for mark in marks)
    highs = max(mark.x for mark in marks), max(mark.y for mark in marks)
    cells = [[" "] * width for _ in range(height)]
    for mark in marks:
        column = _place(mark.x, lows[0], highs[0], width)
        line = height - 1 - _place(mark.y, lows[1], highs[1], height)
        cells[line][column] = mark.symbol
    ends = [f"{100 * value:.1f}" for value in (*lows, *highs)]
    margin = max(len(ends[1]), len(ends[3]))
    labels = [ends[3], *[""] * (height - 2), ends[1]]
    lines = [f"{y_label}"]
    lines += [
        f"{label:>{margin}} |{''.join(row)}".rstrip()
        for label, row in zip(labels, cells, strict=True)
    ]
    lines.append(f"{'':>{margin}} +{'-' * width}")
    between = width - len(ends[0]) - len(ends[2])
    lines.append(f"{'':>{margin}}  {ends[0]}{x_label:^{between}}{ends[2]}")
    return lines


def _place(value: float, low: float, high: float, cells: int) -> int:
    """Return the cell of a value; the middle one if all values are equal."""
    if high <= low:
        return cells // 2
    return round((value - low) / (high - low) * (cells - 1))

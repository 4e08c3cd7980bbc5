"""Tables that notebooks show: plain HTML, every text of them escaped."""

import html
import math
from collections.abc import Iterable, Sequence

from robustsoup.printable import make_printable

MAX_ROWS = 40
"""Most rows of a table; the number of the others is said below it."""


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()
) -> str:
    """Return a table as HTML.

    Args:
        title: Caption.
        columns: Heads of the columns; without them, the first cell of each row is its head.
        rows: Cells by row, shown as `str` has them; at most MAX_ROWS rows are shown.
        notes: Lines below the table.
    """
    listed = list(rows)
    shown, left_out = listed[:MAX_ROWS], len(listed) - MAX_ROWS
    lines = [f"<table><caption>{_escape(title)}</caption>"]
    if columns:
        lines.append(f"<thead>{_row(columns, heads=len(columns))}</thead>")
    heads = 0 if columns else 1
    lines += ["<tbody>", *(_row(row, heads=heads) for row in shown), "</tbody></table>"]
    below = [f"and {left_out:,} more"] if left_out > 0 else []
    lines += [f"<div>{_escape(note)}</div>" for note in (*below, *notes)]
    return "\n".join(lines)


def _row(cells: Sequence[object], *, heads: int) -> str:
    tags = ["th" if number < heads else "td" for number in range(len(cells))]
    texts = [f"<{tag}>{_escape(str(cell))}</{tag}>" for tag, cell in zip(tags, cells, strict=True)]
    return f"<tr>{''.join(texts)}</tr>"


def _escape(text: str) -> str:
    return html.escape(make_printable(text))


def svg_points(points: Sequence[tuple[str, float, float]], *, chosen: str, x: str, y: str) -> str:
    """Return a picture of named points, such as soups by two accuracies, as SVG.

    Args:
        points: Name, x and y of each, in [0, 1]; at least one. A pointer over a point shows its
            name and its values.
        chosen: Name of the point to mark.
        x: What x is.
        y: What y is.
    """
    size, margin = 320, 40  # pixels
    low, high = _span([value for _, *pair in points for value in pair])
    scale = (size - 2 * margin) / (high - low)
    parts = [
        f'<svg width="{size}" height="{size}" font-size="11" role="img">',
        f'<path d="M{margin} {margin}V{size - margin}H{size - margin}" fill="none" stroke="gray"/>',
        f'<text x="{margin}" y="{margin - 8}">{_escape(y)}, {low:.0%} to {high:.0%}</text>',
        f'<text x="{margin}" y="{size - margin + 18}">{_escape(x)}, {low:.0%} to {high:.0%}</text>',
    ]
    for name, right, up in points:
        colour, radius = ("#D55E00", 5) if name == chosen else ("#0072B2", 3)
        left, top = margin + (right - low) * scale, size - margin - (up - low) * scale
        parts.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{radius}" fill="{colour}">'
            f"<title>{_escape(name)}: {right:.1%}, {up:.1%}</title></circle>"
        )
    return "\n".join([*parts, "</svg>"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return a range, in tenths, that holds all values in [0, 1]."""
    low = min(math.floor(10 * min(values)), 9)
    return low / 10, max(math.ceil(10 * max(values)), low + 1) / 10

"""Tables that notebooks show: plain HTML, every text of them escaped."""

import html
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

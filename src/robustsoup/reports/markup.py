"""Text of strangers in Markdown and YAML: nothing in it is markup, a link or code."""

import json
import re
from collections.abc import Mapping, Sequence

from robustsoup.printable import make_printable
from robustsoup.reports.file_names import hide_folders

YamlValue = str | int | float | None | Sequence["YamlValue"] | Mapping[str, "YamlValue"]

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|~#!&$^@])")
_LINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)
_ACTIVE = re.compile(r"[<>&\[\]`]")
"""What could be markup where a header is shown as Markdown; YAML reads its escapes as it was."""


def escape_markdown(text: str) -> str:
    """Return one line of Markdown that shows a text as it is."""
    return _LINK.sub(r"\\\g<0>", _MARKUP.sub(r"\\\1", make_printable(hide_folders(text))))


def quote_code(text: str) -> str:
    """Return a span of code for a cell of a table or a sentence."""
    text = make_printable(hide_folders(text)) or " "
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in text or text.isspace() else ""
    return f"{fence}{space}{text.replace('|', chr(92) + '|')}{space}{fence}"


def make_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, whose cells are Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def render_yaml(content: Mapping[str, YamlValue], depth: int = 0) -> list[str]:
    """Return the lines of a YAML mapping. Text is quoted as in JSON, which YAML contains.

    Args:
        content: The mapping; its keys are names of this program. Lists hold either plain values
            or mappings.
        depth: How deep it is in others.
    """
    lines: list[str] = []
    for key, value in content.items():
        start = f"{'  ' * depth}{key}:"
        if isinstance(value, Mapping):
            lines += [start, *render_yaml(value, depth + 1)]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            lines += [start, *(line for item in value for line in _render_item(item, depth))]
        else:
            lines.append(f"{start} {_render_value(value)}")
    return lines


def _render_item(item: YamlValue, depth: int) -> list[str]:
    if not isinstance(item, Mapping):
        return [f"{'  ' * depth}- {_render_value(item)}"]
    first, *others = render_yaml(item, depth + 1)
    return [f"{'  ' * depth}- {first.lstrip()}", *others]


def _render_value(value: YamlValue) -> str:
    if isinstance(value, str):
        quoted = json.dumps(make_printable(hide_folders(value)), ensure_ascii=False)
        return _ACTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
    return json.dumps(value)

"""JSON and TOML from files that anybody may have written: bounded, and plain data or an error.

Whatever the bytes are, a call here returns or raises OSError or ValueError with a short reason. The
content has limits on its size, depth and numbers, so that later code can convert, print and store
each value.
"""

import json
import math
import os
import re
import tomllib
from collections import Counter
from typing import Any

from robustsoup.files import read_regular

JSON_LIMIT = 16 * 2**20
"""Largest JSON file that is read, in bytes."""

TOML_LIMIT = 256 * 2**10
"""Largest TOML file that is read, in bytes."""

MAX_DEPTH = 32
"""Most levels of tables and lists."""

MAX_SEPARATORS = 600_000
"""Most commas and colons in JSON, which bound the time that it takes."""

_MAX_INTEGER_DIGITS = 19
# tomllib takes time that is quadratic in the number of the parts of a key.
_LONG_KEY = re.compile(
    rb"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){%d}""" % MAX_DEPTH
)


def read_json(
    path: str | os.PathLike[str], limit: int = JSON_LIMIT, separators: int = MAX_SEPARATORS
) -> Any:
    """Read a JSON file.

    Args:
        path: A regular file.
        limit: Largest size in bytes.
        separators: Most commas and colons.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is larger than `limit`.
        ValueError: The content is not such JSON as `parse_json` accepts.
    """
    return parse_json(read_regular(path, limit), separators)


def parse_json(text: bytes | str, separators: int = MAX_SEPARATORS) -> Any:
    """Parse JSON that anybody may have written.

    Raises:
        ValueError: The text is not JSON in UTF-8, is deeper than MAX_DEPTH, repeats a key, or holds
            a number that is not finite, an integer beyond 64 bits, or text that is not Unicode, or
            has more than `separators` commas and colons.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if (count := text.count(",") + text.count(":")) > separators:
            raise ValueError(f"{count:,} commas and colons; at most {separators:,} are read")
        content = json.loads(
            text, object_pairs_hook=_unique_keys, parse_int=_parse_integer, parse_constant=_refuse
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_values(content)
    return content


def read_toml(path: str | os.PathLike[str], limit: int = TOML_LIMIT) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: A regular file.
        limit: Largest size in bytes.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is larger than `limit`.
        ValueError: The content is not such TOML as `parse_toml` accepts.
    """
    return parse_toml(read_regular(path, limit))


def parse_toml(text: bytes | str) -> dict[str, Any]:
    """Parse TOML that anybody may have written.

    Raises:
        ValueError: The text is not TOML in UTF-8 (with or without a mark), is deeper than
            MAX_DEPTH, or holds a number that is not finite or an integer beyond 64 bits.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if _LONG_KEY.search(raw):
        raise ValueError(_TOO_DEEP)
    try:
        content = tomllib.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        if "digits" in str(error):  # Python's limit of digits; its message advises to raise it
            raise ValueError("an integer beyond 64 bits") from None
        raise
    _check_values(content)
    return content


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {repeated[:60]!r} stands twice in one object")
    return table


def _parse_integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits; expected at most 64 bits")
    return _check_integer(int(digits))


def _check_integer(number: int) -> int:
    if not -(2**63) <= number < 2**63:
        raise ValueError("an integer beyond 64 bits")
    return number


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check_values(content: Any) -> None:
    """Check the depth, the numbers and the text of parsed content, without recursion."""
    level, depth = [content], 0
    while level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value)
                below.extend(value.values())
            if isinstance(value, (dict, list)) and depth == MAX_DEPTH:
                raise ValueError(_TOO_DEEP)
            if isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str):
                _check_text(value)
            elif isinstance(value, int):
                _check_integer(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number that is not finite")
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text with a lone surrogate, {text[error.start]!r}") from None

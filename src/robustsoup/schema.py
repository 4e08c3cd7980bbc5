"""Checks of values that were parsed from a file: types and ranges, before code reads them.

A check is a function of a value and its place in the file; it raises `MisfitError` where the value
does not fit. Checks are combined: `list_of(text)`, `table({"digest": text}, {"file": text})`.
"""

import math
import reprlib
from collections.abc import Callable, Mapping

Check = Callable[[object, str], None]
"""check(value, place); the place is text such as "parents[0].digest"."""

LONGEST_TEXT = 200
"""Characters of a text from a file that a message shows."""


class MisfitError(Exception):
    """A value does not fit; the text names its place, the value and what was expected."""

    def __init__(self, place: str, value: object, expected: str) -> None:
        super().__init__(f"{place}: got {describe_value(value)}, expected {expected}")


def describe_value(value: object) -> str:
    """Return a value as one short line without control characters, for messages."""
    described = reprlib.Repr()
    described.maxstring = LONGEST_TEXT
    return described.repr(value)


def text(value: object, place: str) -> None:
    """Accept text."""
    if not isinstance(value, str):
        raise MisfitError(place, value, "text")


def file_name(value: object, place: str) -> None:
    """Accept the name of a file without a folder."""
    if not isinstance(value, str) or not value or value in (".", "..") or set(value) & set("/\\\0"):
        raise MisfitError(place, value, "the name of a file, without a folder")


def number(value: object, place: str) -> None:
    """Accept a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise MisfitError(place, value, "a finite number")


def boolean(value: object, place: str) -> None:
    """Accept true and false."""
    if not isinstance(value, bool):
        raise MisfitError(place, value, "true or false")


def integer(low: int, high: int) -> Check:
    """Accept integers from `low` to `high`."""

    def check(value: object, place: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise MisfitError(place, value, f"an integer from {low:,} to {high:,}")

    return check


MOST_COUNT = 2**53
"""A float holds each smaller integer exactly."""
count = integer(0, MOST_COUNT)
"""Accept the number of things that were counted."""


def anything(_value: object, _place: str) -> None:
    """Accept every value; for entries that no code reads."""


def choice(*choices: str) -> Check:
    """Accept a few texts."""

    def check(value: object, place: str) -> None:
        if value not in choices:
            raise MisfitError(place, value, f"one of {', '.join(choices)}")

    return check


def nullable(check: Check) -> Check:
    """Accept null, and what another check accepts."""

    def check_unless_null(value: object, place: str) -> None:
        if value is not None:
            check(value, place)

    return check_unless_null


def list_of(check: Check) -> Check:
    """Accept lists whose items all pass a check."""

    def check_items(value: object, place: str) -> None:
        if not isinstance(value, (list, tuple)):
            raise MisfitError(place, value, "a list")
        for position, item in enumerate(value):
            check(item, f"{place}[{position}]")

    return check_items


def mapping_of(check: Check) -> Check:
    """Accept tables with any keys whose values all pass a check."""

    def check_values(value: object, place: str) -> None:
        for key, item in _items(value, place):
            check(item, f"{place}[{describe_value(key)}]")

    return check_values


def table(
    required: Mapping[str, Check], optional: Mapping[str, Check], *, closed: bool = False
) -> Check:
    """Accept tables with known keys.

    Args:
        required: The check of each key that must exist.
        optional: The check of each key that may exist.
        closed: Whether other keys are refused.
    """
    known = {**required, **optional}

    def check_table(value: object, place: str) -> None:
        entries = dict(_items(value, place))
        unknown = set(entries) - set(known)
        if set(required) - set(entries) or (closed and unknown):
            raise MisfitError(
                place, list(entries), f"the keys {', '.join(known if closed else required)}"
            )
        for key, check in known.items():
            if key in entries:
                check(entries[key], f"{place}.{key}")

    return check_table


def _items(value: object, place: str) -> list[tuple[str, object]]:
    if not isinstance(value, Mapping):
        raise MisfitError(place, value, "a table")
    for key in value:
        text(key, f"{place}: a key")
    return list(value.items())

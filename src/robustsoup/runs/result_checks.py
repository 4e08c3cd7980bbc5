"""The checks of results.json: the types and ranges of all entries that code reads."""

from robustsoup.errors import RequestError
from robustsoup.schema import (
    MOST_COUNT,
    MisfitError,
    anything,
    boolean,
    choice,
    count,
    integer,
    list_of,
    mapping_of,
    nullable,
    number,
    table,
    text,
)
from robustsoup.soups.goal import Requirement

ROLES = (
    "pretrained",
    "ingredient",
    "uniform",
    "greedy",
    "line",
    "grid",
    "learned",
    "dial",
    "merge",
)
"""What the network of a row is; the roles from the third on are soups."""


def share(value: object, place: str) -> None:
    """Accept numbers from 0 to 1."""
    number(value, place)
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise MisfitError(place, value, "a number from 0 to 1")


_accuracy_entries = table(
    {"value": share, "low": share, "high": share, "n": integer(1, MOST_COUNT)},
    {"hits": count, "drawn": count, "missed": count},
)


def accuracy(value: object, place: str) -> None:
    """Accept an accuracy with its interval, whose hits are at most its samples."""
    _accuracy_entries(value, place)
    if isinstance(value, dict) and value.get("hits", 0) > value["n"]:
        raise MisfitError(f"{place}.hits", value["hits"], f"at most n, {value['n']}")


row = table(
    {"name": text, "role": choice(*ROLES)},
    {
        "soup": nullable(text),
        "ingredients": nullable(list_of(text)),
        "coefficients": nullable(list_of(number)),
        "threat": nullable(text),
        "objective": nullable(text),
        "at": nullable(share),
        "ingredient": nullable(text),
        "checkpoint": nullable(text),
        "coefficients_file": nullable(text),
        "val": nullable(mapping_of(accuracy)),
        "test": nullable(mapping_of(accuracy)),
        "screened": boolean,
        "attacked": count,
        "left_after": count,
        "warnings": list_of(text),
        "masking_check": list_of(text),
    },
)

protocol = table(
    {
        "select_on": choice("val", "test"),
        "report_on": choice("val", "test"),
        "threats": list_of(text),
    },
    {
        "attack": text,
        "loss": text,
        "steps": count,
        "restarts": count,
        "precision": text,
        "search_precision": text,
        "screened": boolean,
        "seed": integer(-(2**63), 2**63 - 1),
        "samples": mapping_of(nullable(count)),
    },
)


def requirement(value: object, place: str) -> None:
    """Accept a requirement as text."""
    text(value, place)
    try:
        Requirement.parse(str(value))
    except RequestError:
        raise MisfitError(place, value, 'a requirement such as "clean>=0.85"') from None


_checks = list_of(
    table({"require": requirement, "estimate": accuracy, "low": number, "met": boolean}, {})
)
_differences = mapping_of(
    table({"a": accuracy, "b": accuracy, "only_a": count, "only_b": count}, {"z": number})
)
_other = table(
    {
        "name": text,
        "description": text,
        "gain": table({"value": number, "low": number, "high": number}, {}),
        "why": text,
    },
    {"samples_to_separate": nullable(count)},
)

selection = table(
    {"chosen": text, "maximise": text},
    {
        "description": text,
        "require": list_of(text),
        "met": boolean,
        "point": boolean,
        "selected_on": text,
        "best_ingredient": nullable(text),
        "distinguishable": nullable(boolean),
        "better_soup": nullable(text),
        "unbeaten": list_of(text),
        "comparisons": count,
        "left_out": count,
        "unfinished": count,
        "meeting_unconfirmed": count,
        "checks": _checks,
        "accuracy": mapping_of(accuracy),
        "fresh_accuracy": nullable(mapping_of(accuracy)),
        "fresh_split": nullable(text),
        "against": list_of(
            table({"ingredient": text, "meets": boolean, "differences": _differences}, {})
        ),
        "runner_up": nullable(_other),
        "refused": nullable(_other),
        "samples_to_prove": nullable(count),
        "obstacle": nullable(text),
        "test": nullable(_checks),
        "guarantee": table(
            {},
            {
                "method": text,
                "candidates": count,
                "samples": count,
                "seed": integer(-(2**63), 2**63 - 1),
                "critical": nullable(number),
                "leaves_out": list_of(text),
            },
        ),
        "message": text,
        "held_on_test": nullable(boolean),
    },
)
"""Accept an answer."""

examples = table({"network": text, "split": choice("val", "test"), "file": text}, {})

plane = table({"name": text, "file": text}, {"checkpoints": list_of(text)})

surrogate = table({"section": text, "message": text}, {"rows": list_of(mapping_of(anything))})

results = table(
    {"name": text, "protocol": protocol, "rows": list_of(row)},
    {
        "created": text,
        "recipe": nullable(mapping_of(anything)),
        "data": nullable(mapping_of(anything)),
        "model": nullable(text),
        "leakage": nullable(table({}, {"status": text, "why": text})),
        "duplicates": nullable(list_of(mapping_of(anything))),
        "warnings": list_of(text),
        "figures": nullable(list_of(text)),
        "versions": nullable(mapping_of(anything)),
        "seconds": nullable(number),
        "planes": nullable(list_of(plane)),
        "surrogates": nullable(list_of(surrogate)),
        "examples": nullable(examples),
        "selection": nullable(selection),
        "soup": nullable(text),
    },
)
"""Accept the content of results.json; other keys are ignored."""

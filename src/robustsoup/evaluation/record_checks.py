"""The checks of the record of an evaluation: the types of all entries that code reads."""

from robustsoup.schema import (
    MisfitError,
    anything,
    boolean,
    count,
    list_of,
    mapping_of,
    nullable,
    number,
    table,
    text,
)


def _distinct_texts(value: object, place: str) -> None:
    """Accept lists of different texts."""
    list_of(text)(value, place)
    if isinstance(value, (list, tuple)) and len(set(value)) < len(value):
        raise MisfitError(place, value, "each text once")


def _verdicts(value: object, place: str) -> None:
    """Accept a text of 0 and 1."""
    if not isinstance(value, str) or not value or set(value) - {"0", "1"}:
        raise MisfitError(place, value, "a text of 0 and 1")


_finding = table({"hits": count, "n": count, "low": number, "high": number, "flagged": boolean}, {})

check_record = table(
    {
        "threats": _distinct_texts,
        "broken_by": _distinct_texts,
        "accuracy": mapping_of(anything),
    },
    {
        "warnings": list_of(text),
        "data": table(
            {}, {"name": nullable(text), "digest": nullable(text), "classes": list_of(text)}
        ),
        "split": nullable(text),
        "shift": table(
            {
                "folder": text,
                "corruptions": mapping_of(list_of(number)),
                "right": _verdicts,
            },
            {"accuracy": mapping_of(anything), "digest": text, "part": text, "samples": count},
        ),
        "certificate": mapping_of(
            table(
                {
                    "points": count,
                    "outside": count,
                    "tolerance": number,
                    "largest_excess": nullable(number),
                },
                {},
            )
        ),
        "subset": table({"samples": count, "seed": anything, "missed": mapping_of(count)}, {}),
        "masking_check": mapping_of(
            table(
                {}, dict.fromkeys(("square", "transfer", "unbounded", "gradient", "tied"), _finding)
            )
        ),
    },
)
"""Accept the content of the JSON file of an evaluation; other entries are shown, not used."""

"""The provenance record of a soup."""

from collections.abc import Sequence
from typing import Any

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import inherited_sketches
from robustsoup.soups.coefficients import EVERY_LAYER, Coefficients

SHARED_ENTRIES = ("network", "parameters", "tied", "statistics")
"""Entries that a soup has in common with its first ingredient."""


def make_soup_record(
    ingredients: Sequence[Checkpoint], coefficients: Coefficients
) -> dict[str, Any]:
    """Make the provenance record of a soup from those of its ingredients and its coefficients."""
    first = ingredients[0].provenance
    record = {key: first[key] for key in SHARED_ENTRIES if key in first}
    record |= _data_entries(ingredients, coefficients)
    sources = [*(item.provenance for item in ingredients), coefficients.record]
    record["trained_on"] = sorted(
        {split for source in sources for split in source.get("trained_on", [])}
    )
    if sketches := inherited_sketches(sources):
        record["fitted_images"] = sketches
    record["parents"] = [
        {"digest": item.digest, "file": item.path.name if item.path else None}
        for item in ingredients
    ]
    rows = coefficients.alpha.tolist()
    if coefficients.layers == (EVERY_LAYER,):
        record["coefficients"] = rows[0]
    else:
        record["coefficients"] = dict(zip(coefficients.layers, rows, strict=True))
    record["learned"] = coefficients.record or None
    return record


def _data_entries(ingredients: Sequence[Checkpoint], coefficients: Coefficients) -> dict[str, Any]:
    """Return the records of the data behind the ingredients, their ancestors and coefficients."""
    entries: dict[str, Any] = {}
    records: list[dict[str, Any]] = [item.provenance.get("data") or {} for item in ingredients]
    first = records[0]
    if all(record == first for record in records):
        if first:
            entries["data"] = first
    elif all(records) and all(record["digest"] == first["digest"] for record in records):
        # Together, the ingredients were trained on the samples of several splits of one data set.
        entries["data"] = {**first, "split_digest": "several"}
    earlier = [data for item in ingredients for data in item.provenance.get("earlier_data", [])]
    learned_on = coefficients.record.get("data")
    if learned_on and learned_on != first:
        earlier.append(learned_on)
    if earlier:
        entries["earlier_data"] = [
            data for i, data in enumerate(earlier) if data not in earlier[:i]
        ]
    return entries

"""compare: two evaluations of the same samples, sample by sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustsoup.display import html_table
from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy, Difference
from robustsoup.evaluation.two_phase import SUBSET_KEY
from robustsoup.evaluation.verdicts import (
    SHIFT_KEY,
    UNION_KEY,
    Evaluation,
    Record,
    as_evaluations,
)

ATTACK_KEYS = (
    "attack",
    "version",
    "code",
    "loss",
    "steps",
    "restarts",
    "targets",
    "n_queries",
    "trial_queries",
    "eot",
    "seed",
    "search_precision",
)
"""Keys that describe an attack; robust accuracies are comparable if both records agree on them."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """How evaluation b differs from evaluation a on their n common samples.

    Attributes:
        rows: Differences by measure: "clean", each threat model of both, "union".
        n: Number of common samples.
        notes: Caveats about how the two evaluations were made, one line each.
    """

    rows: dict[str, Difference]
    n: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return one line: the differences."""
        rows = ", ".join(f"{name} {difference}" for name, difference in self.rows.items())
        return f"Comparison({self.n} paired samples, b - a: {rows})"

    def _repr_html_(self) -> str:
        columns = ("", "a", "b", "b - a in points, 95 % interval")
        rows = (
            (name, f"{row.a.value:.1%}", f"{row.b.value:.1%}", row)
            for name, row in self.rows.items()
        )
        return html_table(f"{self.n:,} paired samples", columns, rows, self.notes)

    def to_json(self) -> Record:
        """Return the differences with intervals and p-values, n and the notes, for json.dumps."""
        rows = {name: difference.to_json() for name, difference in self.rows.items()}
        return {"n": self.n, "comparisons": len(rows), "notes": list(self.notes), "rows": rows}


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two evaluations sample by sample: b less a.

    Samples are matched by id; samples of only one evaluation are dropped, with a note.
    Intervals are Tango's score intervals for paired shares; p-values are McNemar's, exact, and not
    adjusted for the number of rows. Both generalise to other samples, not to other training seeds.

    Args:
        a: The first evaluation.
        b: The second evaluation, on the same split of the same data.

    Returns:
        Differences of clean accuracy, of robust accuracy under each threat model of both, and
        under their union; notes name warnings, and settings in which the two attacks differ.

    Raises:
        RequestError: If data or split differ, no sample is common, or a label differs.
    """
    for position, evaluation in (("first", a), ("second", b)):
        as_evaluations([evaluation], f"compare: the {position}")
    _check_same_split(a, b)
    ids, *indices = np.intersect1d(a.ids.numpy(), b.ids.numpy(), return_indices=True)
    if not len(ids):
        raise RequestError(
            f"compare: got no common sample among {len(a.ids)} in the first and {len(b.ids)} in "
            "the second; evaluate both on the same samples"
        )
    in_a, in_b = (torch.from_numpy(index) for index in indices)
    _check_same_labels(ids.tolist(), a.labels[in_a], b.labels[in_b])
    hits_a, hits_b = a.hits(), b.hits()
    names = [name for name in hits_a if name in hits_b and _is_comparable(name, a, b)]
    rows = {name: pair_hits(hits_a[name][in_a], hits_b[name][in_b]) for name in names}
    return Comparison(rows, len(ids), tuple(_comparison_notes(a, b, len(ids), names)))


def _is_comparable(measure: str, a: Evaluation, b: Evaluation) -> bool:
    """Return whether a measure of both means the same, row by row."""
    if measure == UNION_KEY:
        return set(a.threats) == set(b.threats)
    if measure == SHIFT_KEY:
        copies = [[e.record["shift"].get(key) for key in ("digest", "part")] for e in (a, b)]
        return copies[0] == copies[1] and torch.equal(a.ids, b.ids)
    return True


def _check_same_split(a: Evaluation, b: Evaluation) -> None:
    identities = [(e.record.get("data", {}).get("digest"), e.record.get("split")) for e in (a, b)]
    for position, (digest, split) in zip(("first", "second"), identities, strict=True):
        if digest is None or split is None:
            raise RequestError(
                f"compare: the record of the {position} names no data or split; evaluate it again"
            )
    if identities[0] != identities[1]:
        first, second = (
            f"{split} of {e.record['data'].get('name', 'unnamed data')} ({digest[:8]})"
            for e, (digest, split) in zip((a, b), identities, strict=True)
        )
        raise RequestError(
            f"compare: got {first} and {second}, expected one split of the same data; "
            "evaluate both on the same split"
        )


def _check_same_labels(ids: Sequence[int], labels_a: Tensor, labels_b: Tensor) -> None:
    different = (labels_a != labels_b).nonzero().flatten().tolist()
    if different:
        row = different[0]
        raise RequestError(
            f"compare: sample {ids[row]}: got label {int(labels_a[row])} in the first and "
            f"{int(labels_b[row])} in the second, expected the same; use one class numbering"
        )


def pair_hits(hits_a: Tensor, hits_b: Tensor) -> Difference:
    """Return the difference of two accuracies on the same samples, from their (n,) bool hits."""
    return Difference(
        Accuracy(int(hits_a.sum()), len(hits_a)),
        Accuracy(int(hits_b.sum()), len(hits_b)),
        only_a=int((hits_a & ~hits_b).sum()),
        only_b=int((hits_b & ~hits_a).sum()),
    )


def _comparison_notes(a: Evaluation, b: Evaluation, n: int, names: list[str]) -> Iterator[str]:
    attacked = len(names) > 1
    yield from _notes_on_coverage(a, b, n, names)
    yield from _notes_on_settings(a, b, attacked=attacked)
    for position, record in (("first", a.record), ("second", b.record)):
        if attacked and record.get("screened"):
            yield f"the {position} was screened; its robust accuracies may be too high"
        if attacked and (part := record.get(SUBSET_KEY)):
            yield (
                f"the {position} was attacked in full on {part['samples']:,} samples alone; "
                "its robust accuracies may be too high"
            )
        yield from (f"the {position}: {warning}" for warning in record.get("warnings", ()))
    if attacked:
        yield f"{len(names)} comparisons; the p-values are not adjusted for their number"


def _notes_on_coverage(a: Evaluation, b: Evaluation, n: int, names: list[str]) -> Iterator[str]:
    if len(a.ids) != n or len(b.ids) != n:
        yield f"on {n} common samples, of {len(a.ids)} in the first and {len(b.ids)} in the second"
    for position, threats, other_threats in (
        ("first", a.threats, b.threats),
        ("second", b.threats, a.threats),
    ):
        if unmatched := [name for name in threats if name not in other_threats]:
            yield f"only the {position} has {', '.join(unmatched)}"
    if len(a.threats) > 1 and len(b.threats) > 1 and UNION_KEY not in names:
        yield "no union: the threat models differ"


def _notes_on_settings(a: Evaluation, b: Evaluation, *, attacked: bool) -> Iterator[str]:
    for key in (*(ATTACK_KEYS if attacked else ()), "precision"):
        if key in a.record and key in b.record and a.record[key] != b.record[key]:
            accuracies = "accuracies" if key == "precision" else "robust accuracies"
            yield (
                f"different {key}: {a.record[key]} and {b.record[key]}; "
                f"the {accuracies} are not comparable"
            )

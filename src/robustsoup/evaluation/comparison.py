"""compare: two evaluations of the same samples, sample by sample."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy, Difference
from robustsoup.evaluation.verdicts import UNION_KEY, Evaluation

ATTACK_KEYS = (
    "attack",
    "version",
    "loss",
    "steps",
    "restarts",
    "targets",
    "eot",
    "seed",
    "search_precision",
)
"""What a record says of its attack; robust figures are made the same way where all that both say is equal."""
CUT_SHORT_KEYS = ("screened", "stopped")


@dataclass(frozen=True)
class Comparison:
    """How b differs from a on the n samples that both judged.

    rows: "clean", each threat (as text) that both have, "union" -> Difference; notes: what a reader must know of how
    the two were made, one line each, their warnings among them.
    """

    rows: dict[str, Difference]
    n: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The differences with intervals and p-values, n and the notes, ready for json.dumps."""
        rows = {
            name: {
                "a": row.a.to_json(),
                "b": row.b.to_json(),
                "only_a": row.only_a,
                "only_b": row.only_b,
                "value": row.value,
                "low": row.low,
                "high": row.high,
                "p": row.p,
            }
            for name, row in self.rows.items()
        }
        return {"n": self.n, "comparisons": len(rows), "notes": list(self.notes), "rows": rows}


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """b less a, sample by sample: clean, under each threat that both have, and under their union.

    Samples are matched by id; those that only one judged are left out, and a note says so. The interval is Tango's
    score interval for paired shares and p is McNemar's, exact, not adjusted for the number of rows. Both speak of these
    two networks on other samples; not of other training seeds. Notes also name what was attacked differently.

    Raises RequestError for another data set or split, no common sample, or a sample that has two labels.
    """
    _check_same_data(a, b)
    ids, *places = np.intersect1d(a.ids.numpy(), b.ids.numpy(), return_indices=True)
    if not len(ids):
        raise RequestError(
            f"compare: got no sample that both judged, {len(a.ids)} in the first and {len(b.ids)} in the second; "
            "evaluate both on the same samples"
        )
    in_a, in_b = (torch.from_numpy(place) for place in places)
    wrong = (a.labels[in_a] != b.labels[in_b]).nonzero().flatten()
    if len(wrong):
        row = wrong[0]
        raise RequestError(
            f"compare: sample {ids[row]}: got label {a.labels[in_a][row]} in the first and {b.labels[in_b][row]} in the "
            "second, expected one; were the classes numbered alike?"
        )
    hits_a, hits_b = (
        {name: hits[rows] for name, hits in e.hits().items()} for e, rows in ((a, in_a), (b, in_b))
    )
    names = [
        name
        for name in hits_a
        if name in hits_b and (name != UNION_KEY or set(a.threats) == set(b.threats))
    ]
    rows = {name: _difference(hits_a[name], hits_b[name]) for name in names}
    return Comparison(rows, len(ids), tuple(_notes(a, b, len(ids), names)))


def _check_same_data(a: Evaluation, b: Evaluation) -> None:
    found = [(e.record.get("data", {}).get("digest"), e.record.get("split")) for e in (a, b)]
    for which, (digest, split) in zip(("first", "second"), found, strict=True):
        if digest is None or split is None:
            raise RequestError(
                f"compare: the {which}: the record names no data or split; evaluate it again"
            )
    if found[0] != found[1]:
        first, second = (
            f"{split} of {e.record['data'].get('name', 'unnamed data')} ({digest[:8]})"
            for e, (digest, split) in zip((a, b), found, strict=True)
        )
        raise RequestError(
            f"compare: got {first} and {second}, expected one split of the same data; evaluate both on the same split"
        )


def _difference(a: Tensor, b: Tensor) -> Difference:
    accuracies = (Accuracy(int(hits.sum()), len(hits)) for hits in (a, b))
    return Difference(*accuracies, only_a=int((a & ~b).sum()), only_b=int((b & ~a).sum()))


def _notes(a: Evaluation, b: Evaluation, n: int, names: list[str]) -> Iterator[str]:
    if len(a.ids) != n or len(b.ids) != n:
        yield f"on the {n} common samples, of {len(a.ids)} in the first and {len(b.ids)} in the second"
    for which, threats, others in (
        ("first", a.threats, b.threats),
        ("second", b.threats, a.threats),
    ):
        if alone := [name for name in threats if name not in others]:
            yield f"only the {which} has {', '.join(alone)}"
    if len(a.threats) > 1 and len(b.threats) > 1 and UNION_KEY not in names:
        yield "no union: the two are of different threats"
    attacked = len(names) > 1
    for key in (*(ATTACK_KEYS if attacked else ()), "precision"):
        if key in a.record and key in b.record and a.record[key] != b.record[key]:
            what = "figures" if key == "precision" else "robust figures"
            yield f"different {key}: {a.record[key]} and {b.record[key]}; the {what} are not made the same way"
    for which, record in (("first", a.record), ("second", b.record)):
        if attacked and (cut := [key for key in CUT_SHORT_KEYS if record.get(key)]):
            yield f"the {which} was {' and '.join(cut)}; its robust figures may be too high"
        yield from (f"the {which}: {warning}" for warning in record.get("warnings", ()))
    if len(names) > 1:
        yield f"{len(names)} comparisons; the p-values are not adjusted for their number"

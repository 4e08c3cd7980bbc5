"""The record of an evaluation: a verdict per sample, accuracies and provenance."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustsoup.arrays import read_arrays, write_arrays
from robustsoup.data.splits import MAX_CLASSES
from robustsoup.digests import digest_json
from robustsoup.display import html_table
from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError, RequestError, ThreatError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.record_checks import check_record
from robustsoup.evaluation.two_phase import SUBSET_KEY, attacked_rows, estimate_accuracy
from robustsoup.file_bytes import DamageError, digest_tensors
from robustsoup.files import open_regular, write_text
from robustsoup.paths import user_path
from robustsoup.printable import make_printable
from robustsoup.schema import MisfitError
from robustsoup.stamp import is_stamped, stamp_record, unstamp_record
from robustsoup.threats import ThreatModel

CLEAN_KEY = "clean"
UNION_KEY = "union"
SHIFT_KEY = "shift"

Record = dict[str, Any]
"""Settings and provenance, ready for JSON."""

VERDICT_ARRAYS = ("robust", "by", "step", "norm", "margin")
SAMPLE_ARRAYS = ("ids", "labels", "prediction", "margin")
ARRAY_TYPES = {
    "ids": torch.int64,
    "labels": torch.int64,
    "prediction": torch.int64,
    "margin": torch.float32,
    "robust": torch.bool,
    "by": torch.int64,
    "step": torch.int64,
    "norm": torch.float32,
}
DIGESTS_KEY = "digests"
"""The entry of the JSON file with the sha256 of the record, the arrays and the points."""


def parse_measure(text: str | ThreatModel) -> str:
    """Return the canonical spelling of a measure: a threat model as text, or one of three names.

    These are "clean", "union" (robust to every threat model) and "shift" (natural shift: the mean
    over corrupted copies).

    Raises:
        ThreatError: If `text` is not a measure.
    """
    names = (CLEAN_KEY, UNION_KEY, SHIFT_KEY)
    return str(text) if str(text) in names else str(ThreatModel.parse(text))


@dataclass(frozen=True, repr=False)
class Verdicts:
    """The verdicts of an attack under one threat model on n samples.

    Attributes:
        robust: (n,) bool, correct without and under attack.
        by: (n,) int64, the cause that broke the sample, as an index of the record's "broken_by" (0:
            wrong without an attack); -1 where robust.
        step: (n,) int64, the step that broke the sample (0: wrong without an attack, or fooled by
            the starting point); -1 where robust or where the attack does not report it.
        norm: (n,) float32, norm of the perturbation; 0 if wrong without an attack.
        margin: (n,) float32, smallest logit margin under attack; below 0 where broken.
        x_adv: (n, c, h, w) float32, the adversarial images, if they were kept.
    """

    robust: Tensor
    by: Tensor
    step: Tensor
    norm: Tensor
    margin: Tensor
    x_adv: Tensor | None = None

    def __repr__(self) -> str:
        """Return one line: how many samples are robust."""
        return f"Verdicts({int(self.robust.sum())} of {len(self.robust)} samples robust)"


class Accuracies(Mapping[str, Accuracy]):
    """Accuracies by measure: "clean", a threat model, "union" (all of them) or "shift"."""

    def __init__(self, accuracies: Mapping[str, Accuracy]) -> None:
        self._accuracies = dict(accuracies)

    def __getitem__(self, key: str | ThreatModel) -> Accuracy:
        """Return the accuracy for a measure, given as text or as a threat model."""
        try:
            return self._accuracies[parse_measure(key)]
        except ThreatError as error:
            raise KeyError(str(error)) from None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the measures as text."""
        return iter(self._accuracies)

    def __len__(self) -> int:
        """Return the number of measures."""
        return len(self._accuracies)

    def __repr__(self) -> str:
        """Return the accuracies as a dictionary."""
        return repr(self._accuracies)

    def __str__(self) -> str:
        """Return the accuracies in one line, in percent."""
        return ", ".join(f"{measure} {accuracy}" for measure, accuracy in self.items())

    def _repr_html_(self) -> str:
        return html_table("Accuracy in percent, 95 % interval", (), self.items())


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Verdicts for n samples, and the record of how they were made.

    Attributes:
        ids: (n,) int64 sample ids.
        labels: (n,) int64.
        prediction: (n,) int64, predicted class without an attack.
        margin: (n,) float32, the label's logit minus the largest other logit, without an attack.
        threats: Verdicts by threat model as text.
        record: Settings and provenance, ready for JSON; "warnings" is among its keys.
    """

    ids: Tensor
    labels: Tensor
    prediction: Tensor
    margin: Tensor
    threats: dict[str, Verdicts]
    record: Record = field(default_factory=dict)

    def hits(self) -> dict[str, Tensor]:
        """Return (n,) bool masks of correct samples: clean, for each threat, and their union.

        "union" is present where there are two threats or more, "shift" where the corrupted copies
        of as many images were evaluated; its row i is that of the copies' image i.
        """
        robust = {name: verdicts.robust for name, verdicts in self.threats.items()}
        hits = {CLEAN_KEY: self.prediction == self.labels, **robust}
        if len(robust) > 1:
            hits[UNION_KEY] = torch.stack(list(robust.values())).all(0)
        if len(shifted := self._shift_hits()) == len(self.ids):
            hits[SHIFT_KEY] = shifted
        return hits

    def _shift_hits(self) -> Tensor:
        """Return (m,) bool, right or wrong under natural shift; empty if it was not measured."""
        right = self.record.get("shift", {}).get("right", "")
        return torch.from_numpy(np.frombuffer(right.encode(), dtype=np.uint8) == ord("1"))

    @property
    def accuracy(self) -> Accuracies:
        """The share of each mask of `hits`, with its interval; "shift" too if it was measured.

        Where the last attack ran on a part of the samples, accuracies under attack are estimates
        (`two_phase`), and the masks hold the verdicts of the earlier attack on the other samples.
        """
        masks = self.hits()
        if len(shifted := self._shift_hits()):
            masks[SHIFT_KEY] = shifted
        missed = self.record.get(SUBSET_KEY, {"missed": {}})["missed"]
        attacked = attacked_rows(self.ids, self.record)
        return Accuracies(
            {
                name: estimate_accuracy(hits, attacked, missed[name])
                if name in missed
                else Accuracy(int(hits.sum()), len(hits))
                for name, hits in masks.items()
            }
        )

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt the numbers."""
        return list(self.record.get("warnings", ()))

    def __repr__(self) -> str:
        """Return one line: the samples and the accuracies."""
        return make_printable(f"Evaluation({self._describe_samples()}: {self.accuracy})")

    def _repr_html_(self) -> str:
        notes = (f"warning: {warning}" for warning in self.warnings)
        rows = self.accuracy.items()
        return html_table(f"Evaluation, {self._describe_samples()}", (), rows, notes)

    def _describe_samples(self) -> str:
        data, split = self.record.get("data", {}).get("name"), self.record.get("split")
        source = " ".join(filter(None, (data, split)))
        return f"{len(self.ids):,} samples" + (f" of {source}" if source else "")

    def after_each(self, threat: ThreatModel | str) -> dict[str, Accuracy]:
        """Return the accuracy that remains after each attempt of the attack, in order, by name."""
        by = self.threats[parse_measure(threat)].by
        remaining = {}
        for number, name in enumerate(self.record["broken_by"]):
            broken = (by >= 0) & (by <= number)
            remaining[name] = Accuracy(int((~broken).sum()), len(by))
        return remaining

    def without_points(self) -> "Evaluation":
        """Return the evaluation without its adversarial images."""
        threats = {name: replace(item, x_adv=None) for name, item in self.threats.items()}
        return replace(self, threats=threats)

    def to_json(self) -> Record:
        """Return the record and the accuracies with their intervals, ready for json.dumps."""
        return {
            **self.record,
            "accuracy": {name: accuracy.to_json() for name, accuracy in self.accuracy.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the evaluation to NAME.json, NAME.npz and, with kept points, NAME.points.npz.

        Args:
            path: Path of NAME.json, which is written last.

        Returns:
            The path.

        Raises:
            RequestError: The path does not end in .json.
        """
        path = user_path(path)
        if path.suffix != ".json":  # a.1 and a.2 would share a.npz
            raise RequestError(f"{path}: got the ending {path.suffix!r}, expected .json")
        points = self._points()
        points_path = path.with_suffix(".points.npz")
        if points:
            write_arrays(points_path, points, compressed=False)
        else:  # `load` would read the points of an earlier evaluation as those of this one
            points_path.unlink(missing_ok=True)
        arrays = self._arrays()
        write_arrays(path.with_suffix(".npz"), arrays, compressed=True)
        content = stamp_record(self.to_json())
        content[DIGESTS_KEY] = {
            "record": digest_json(content),
            "arrays": digest_tensors(arrays),
            **({"points": digest_tensors(points)} if points else {}),
        }
        write_text(path, json.dumps(content, indent=1) + "\n")
        return path

    def _arrays(self) -> dict[str, Tensor]:
        arrays = {name: getattr(self, name) for name in SAMPLE_ARRAYS}
        for number, verdicts in enumerate(self.threats.values()):
            for name in VERDICT_ARRAYS:
                arrays[f"{name}_{number}"] = getattr(verdicts, name)
        return arrays

    def _points(self) -> dict[str, Tensor]:
        return {
            str(number): verdicts.x_adv
            for number, verdicts in enumerate(self.threats.values())
            if verdicts.x_adv is not None
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Read an evaluation that `save` wrote.

        Args:
            path: Path of the JSON file.

        Raises:
            CheckpointError: If a file is missing, broken or in a newer format; names the JSON file.
        """
        path = user_path(path)
        try:
            content = read_json(path)
            check_record(content, "the record")
            record = unstamp_record(content, path)
            digests = record.pop(DIGESTS_KEY, None)
            if digests is not None or is_stamped(content):
                _verify_record(content, digests)
            record.pop("accuracy")
            arrays = _read_digested(path.with_suffix(".npz"), digests, "arrays")
            points_path = path.with_suffix(".points.npz")
            points: dict[str, Tensor] = {}
            if points_path.exists():
                points = _read_digested(points_path, digests, "points")
            return _assemble(record, arrays, points)
        except (KeyError, MisfitError, OSError, TypeError, ValueError) as error:
            reason = f"no array {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{path}: not an evaluation that robustsoup wrote: {reason}"
            ) from None


def as_evaluations(value: object, place: str) -> tuple[Evaluation, ...]:
    """Return a list of evaluations, or a single one, as a tuple.

    Args:
        value: What a user passes.
        place: Names it in errors.

    Raises:
        RequestError: It is something else.
    """
    evaluations: list[Evaluation] = []
    for item in value if isinstance(value, Iterable) else (value,):
        if not isinstance(item, Evaluation):
            raise RequestError(
                f"{place}: got {type(item).__name__}, expected an evaluation, as evaluate and "
                "Evaluation.load return it"
            )
        evaluations.append(item)
    return tuple(evaluations)


def _assemble(
    record: Record, arrays: Mapping[str, Tensor], points: Mapping[str, Tensor]
) -> Evaluation:
    """Return an evaluation after checking its arrays against each other.

    Raises:
        ValueError: An array has another type or number of samples, there are no samples, or a
            number stands for no class or cause.
        KeyError: An array is missing.
    """
    shape = arrays["ids"].shape
    if not arrays["ids"].numel():
        raise ValueError("no samples")
    samples = [_check_array(arrays, name, shape) for name in SAMPLE_ARRAYS]
    classes = record.get("data", {}).get("classes")
    for name in ("labels", "prediction"):
        _check_range(arrays, name, 0, MAX_CLASSES if classes is None else len(classes))
    threats: dict[str, Verdicts] = {}
    for number, name in enumerate(record["threats"]):
        parts = [_check_array(arrays, f"{part}_{number}", shape) for part in VERDICT_ARRAYS]
        _check_range(arrays, f"by_{number}", -1, len(record["broken_by"]))
        x_adv = points.get(str(number))
        if x_adv is not None and (x_adv.dtype != torch.float32 or x_adv.shape[:1] != shape):
            raise ValueError(f"points of type {x_adv.dtype} and shape {tuple(x_adv.shape)}")
        threats[name] = Verdicts(*parts, x_adv=x_adv)
    return Evaluation(*samples, threats=threats, record=record)


def _check_array(arrays: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    array, dtype = arrays[name], ARRAY_TYPES[name.partition("_")[0]]
    if array.dtype != dtype or array.shape != shape or array.ndim != 1:
        raise ValueError(
            f"{name} has the type {array.dtype} and the shape {tuple(array.shape)}, "
            f"expected {dtype} and {tuple(shape[:1])}"
        )
    return array


def _check_range(arrays: Mapping[str, Tensor], name: str, low: int, end: int) -> None:
    found = int(arrays[name].min()), int(arrays[name].max())
    if found[0] < low or found[1] >= end:
        raise ValueError(f"{name} holds {found[0]} to {found[1]}, expected {low} to {end - 1}")


def _read_digested(path: Path, digests: Mapping[str, str] | None, part: str) -> dict[str, Tensor]:
    """Read an .npz file and compare it with the digest in the record, if the record has some."""
    with open_regular(path) as file:
        arrays = read_arrays(file)
    if digests is not None and digests.get(part) != digest_tensors(arrays):
        raise DamageError(f"{path.name} belongs to another evaluation, or was changed")
    return arrays


def _verify_record(content: Record, digests: object) -> None:
    """Compare a JSON file with its digest; each file that robustsoup wrote has one."""
    stated = {key: value for key, value in content.items() if key != DIGESTS_KEY}
    if not isinstance(digests, dict) or digests.get("record") != digest_json(stated):
        raise DamageError("its record was changed after it was written")

"""The record of an evaluation: a verdict per sample, accuracies and provenance."""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.record_checks import check_record
from robustsoup.files import atomic_path, write_text
from robustsoup.schema import MisfitError
from robustsoup.stamp import stamp_record, unstamp_record
from robustsoup.threats import ThreatModel

CLEAN_KEY = "clean"
UNION_KEY = "union"

Record = dict[str, Any]
"""Settings and provenance, ready for JSON."""

VERDICT_ARRAYS = ("robust", "by", "step", "norm", "margin")
SAMPLE_ARRAYS = ("ids", "labels", "prediction", "margin")


def parse_measure(text: str | ThreatModel) -> str:
    """Return the canonical spelling of a measure: "clean", "union" or a threat model as text.

    Raises:
        ThreatError: If `text` is not a measure.
    """
    return str(text) if str(text) in (CLEAN_KEY, UNION_KEY) else str(ThreatModel.parse(text))


@dataclass(frozen=True)
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


class Accuracies(Mapping[str, Accuracy]):
    """Accuracies by measure: "clean", "union" (robust to every threat), or a threat model."""

    def __init__(self, accuracies: Mapping[str, Accuracy]) -> None:
        self._accuracies = dict(accuracies)

    def __getitem__(self, key: str | ThreatModel) -> Accuracy:
        """Return the accuracy for a measure, given as text or as a threat model."""
        return self._accuracies[str(key)]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the measures as text."""
        return iter(self._accuracies)

    def __len__(self) -> int:
        """Return the number of measures."""
        return len(self._accuracies)

    def __repr__(self) -> str:
        """Return the accuracies as a dictionary."""
        return repr(self._accuracies)


@dataclass(frozen=True)
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

        "union" is present where there are two threats or more.
        """
        robust = {name: verdicts.robust for name, verdicts in self.threats.items()}
        hits = {CLEAN_KEY: self.prediction == self.labels, **robust}
        if len(robust) > 1:
            hits[UNION_KEY] = torch.stack(list(robust.values())).all(0)
        return hits

    @property
    def accuracy(self) -> Accuracies:
        """The share of each mask of `hits`, with its interval."""
        return Accuracies(
            {name: Accuracy(int(hits.sum()), len(hits)) for name, hits in self.hits().items()}
        )

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt the numbers."""
        return list(self.record.get("warnings", ()))

    def after_each(self, threat: ThreatModel | str) -> dict[str, Accuracy]:
        """Return the accuracy that remains after each attempt of the attack, in order, by name."""
        by = self.threats[str(threat)].by
        remaining = {}
        for number, name in enumerate(self.record["broken_by"]):
            broken = (by >= 0) & (by <= number)
            remaining[name] = Accuracy(int((~broken).sum()), len(by))
        return remaining

    def to_json(self) -> Record:
        """Return the record and the accuracies with their intervals, ready for json.dumps."""
        return {
            **self.record,
            "accuracy": {name: accuracy.to_json() for name, accuracy in self.accuracy.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the evaluation to PATH.json, PATH.npz and, with kept points, PATH.points.npz.

        Args:
            path: Path of the JSON file, which is written last.

        Returns:
            The path.
        """
        path = Path(path)
        self._save_points(path.with_suffix(".points.npz"))
        arrays = {name: getattr(self, name).numpy() for name in SAMPLE_ARRAYS}
        for number, verdicts in enumerate(self.threats.values()):
            for name in VERDICT_ARRAYS:
                arrays[f"{name}_{number}"] = getattr(verdicts, name).numpy()
        with atomic_path(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        write_text(path, json.dumps(stamp_record(self.to_json()), indent=1) + "\n")
        return path

    def _save_points(self, path: Path) -> None:
        points: dict[str, Any] = {
            str(number): verdicts.x_adv.numpy()
            for number, verdicts in enumerate(self.threats.values())
            if verdicts.x_adv is not None
        }
        if not points:  # `load` would read the points of an earlier evaluation as those of this one
            path.unlink(missing_ok=True)
            return
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **points)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Read an evaluation that `save` wrote.

        Args:
            path: Path of the JSON file.

        Raises:
            CheckpointError: If a file is missing, broken or in a newer format; names the JSON file.
        """
        path = Path(path)
        try:
            content = read_json(path)
            check_record(content, "the record")
            record = unstamp_record(content, path)
            record.pop("accuracy")
            arrays = _load_arrays(path.with_suffix(".npz"))
            points_path = path.with_suffix(".points.npz")
            points = _load_arrays(points_path) if points_path.exists() else {}
            threats = {
                name: Verdicts(
                    *(arrays[f"{part}_{number}"] for part in VERDICT_ARRAYS),
                    x_adv=points.get(str(number)),
                )
                for number, name in enumerate(record["threats"])
            }
            samples = [arrays[name] for name in SAMPLE_ARRAYS]
        except (
            AttributeError,
            EOFError,
            KeyError,
            MisfitError,
            OSError,
            TypeError,
            ValueError,
            zipfile.BadZipFile,
        ) as error:
            raise CheckpointError(
                f"{path}: not an evaluation that robustsoup wrote: {error}"
            ) from None
        return cls(*samples, threats=threats, record=record)


def _load_arrays(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as raw, np.load(raw) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}

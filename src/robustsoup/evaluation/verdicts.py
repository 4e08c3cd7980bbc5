"""The record of an evaluation: a verdict per sample, accuracies and provenance."""

import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustsoup.errors import CheckpointError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.files import atomic_path, write_text
from robustsoup.threats import ThreatModel

CLEAN_KEY = "clean"
UNION_KEY = "union"


def parse_measure(text: str | ThreatModel) -> str:
    """Return a measure in its one spelling: "clean", "union" or a threat model as text.

    Raises:
        ThreatError: if `text` is none of them.
    """
    return str(text) if str(text) in (CLEAN_KEY, UNION_KEY) else str(ThreatModel.parse(text))


@dataclass(frozen=True)
class Verdicts:
    """What one threat model did to each of n samples.

    robust: (n,) bool, right without and under attack; by: (n,) int64, what broke it, as an index of the record's
    "broken_by" (0: wrong without an attack), -1 where robust; step: (n,) int64, the step that broke it (0: wrong clean, or
    fooled by the starting point), -1 where robust or where the attack does not tell; norm: (n,) float32 norm of the
    perturbation that was found, 0 if wrong clean; margin: (n,) float32, the least margin seen under attack, below 0 where
    broken; x_adv: (n, c, h, w) float32, the points themselves, if they were kept.
    """

    robust: Tensor
    by: Tensor
    step: Tensor
    norm: Tensor
    margin: Tensor
    x_adv: Tensor | None = None


PARTS = ("robust", "by", "step", "norm", "margin")


class Accuracies(dict[str, Accuracy]):
    """Accuracies by "clean", "union" (robust to every threat), or a threat model, as an object or as text."""

    def __getitem__(self, key: str | ThreatModel) -> Accuracy:
        return super().__getitem__(str(key))


@dataclass(frozen=True)
class Evaluation:
    """Verdicts per sample, and who made them how.

    ids, labels, prediction: (n,) int64; margin: (n,) float32, the right logit less the largest other, without attack;
    threats: threat (as text) -> Verdicts; record: JSON-able settings and provenance, among them "warnings".
    """

    ids: Tensor
    labels: Tensor
    prediction: Tensor
    margin: Tensor
    threats: dict[str, Verdicts]
    record: dict[str, Any] = field(default_factory=dict)

    def hits(self) -> dict[str, Tensor]:
        """(n,) bool, what is right: clean, under each threat, and (with two threats or more) under their union."""
        robust = {name: verdicts.robust for name, verdicts in self.threats.items()}
        hits = {CLEAN_KEY: self.prediction == self.labels, **robust}
        if len(robust) > 1:
            hits[UNION_KEY] = torch.stack(list(robust.values())).all(0)
        return hits

    @property
    def accuracy(self) -> Accuracies:
        """The share of `hits` under each name, with its interval."""
        return Accuracies(
            {name: Accuracy(int(hits.sum()), len(hits)) for name, hits in self.hits().items()}
        )

    @property
    def warnings(self) -> list[str]:
        """What makes these numbers doubtful; they stay with the result."""
        return list(self.record.get("warnings", ()))

    def after_each(self, threat: ThreatModel | str) -> dict[str, Accuracy]:
        """The accuracy that is left after each attempt of the attack, in order, by its name."""
        by = self.threats[str(threat)].by
        left = {}
        for number, name in enumerate(self.record["broken_by"]):
            gone = (by >= 0) & (by <= number)
            left[name] = Accuracy(int((~gone).sum()), len(by))
        return left

    def to_json(self) -> dict[str, Any]:
        """The record and the accuracies with their intervals, ready for json.dumps."""
        return {
            **self.record,
            "accuracy": {name: accuracy.to_json() for name, accuracy in self.accuracy.items()},
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write PATH (.json) and, first, the verdicts per sample beside it as .npz, and kept points as .points.npz."""
        path = Path(path)
        arrays = {
            "ids": self.ids,
            "labels": self.labels,
            "prediction": self.prediction,
            "margin": self.margin,
        }
        for number, verdicts in enumerate(self.threats.values()):
            arrays |= {
                f"{name}_{number}": value for name, value in vars(verdicts).items() if name in PARTS
            }
        points = {
            str(n): v.x_adv.numpy()
            for n, v in enumerate(self.threats.values())
            if v.x_adv is not None
        }
        if points:
            with (
                atomic_path(path.with_suffix(".points.npz")) as temporary,
                open(temporary, "wb") as file,
            ):
                np.savez(file, **points)
        else:  # those of an earlier evaluation would pass for this one's
            path.with_suffix(".points.npz").unlink(missing_ok=True)
        with atomic_path(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **{name: value.numpy() for name, value in arrays.items()})
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Evaluation":
        """Read what `save` wrote. Raises CheckpointError naming the file."""
        path = Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            with open(path.with_suffix(".npz"), "rb") as raw, np.load(raw) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            names = record["threats"]
            record.pop("accuracy")
            kept = _load_points(path.with_suffix(".points.npz"))
            threats = {
                name: Verdicts(
                    *(arrays[f"{part}_{number}"] for part in PARTS), kept.get(str(number))
                )
                for number, name in enumerate(names)
            }
            samples = [arrays[part] for part in ("ids", "labels", "prediction", "margin")]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path}: not an evaluation that robustsoup wrote: {error}"
            ) from None
        return cls(*samples, threats, record)


def _load_points(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    with open(path, "rb") as raw, np.load(raw) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}

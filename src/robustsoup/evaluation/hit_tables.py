"""Hit tables: the verdicts of many soups on the same samples, one bit each, in one file.

A table is one compressed .npz file of five kinds of arrays:

- `coefficients`: (N, n) float64, one row for each soup.
- `ids`: (samples,) int64, the ids of the samples.
- `bits_0`, `bits_1`, ...: (N, ceil(samples / 8)) uint8, one array for each measure. The first
  sample is the highest bit of the first byte (`numpy.packbits`); 1 means right, and under a threat
  model right without and under attack.
- `about`: uint8, a UTF-8 JSON object with the names of the soups ("names"), of the measures in
  their order ("measures") and the protocol ("record").
- `digest`: (32,) uint8, the sha256 over the other arrays.

10,000 verdicts take 1,250 bytes, so the verdicts of whole grids can be kept as evidence and
replayed without a network.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustsoup.arrays import read_arrays
from robustsoup.errors import RequestError
from robustsoup.evaluation.verdicts import Evaluation, Record
from robustsoup.file_bytes import digest_tensors
from robustsoup.files import atomic_path, open_regular
from robustsoup.paths import user_path

Hits = NDArray[np.bool_]
"""Whether samples are right: (N, samples) or (samples,)."""


@dataclass(frozen=True, eq=False)
class HitTable:
    """The verdicts of N soups on the same samples.

    Attributes:
        names: Names of the soups.
        coefficients: (N, n) float64 coefficients of the n ingredients.
        ids: (samples,) int64 ids of the samples.
        hits: (N, samples) bool by measure: "clean", threat models as text, "union".
        record: How the verdicts were made, ready for JSON.
    """

    names: tuple[str, ...]
    coefficients: NDArray[np.float64]
    ids: NDArray[np.int64]
    hits: Mapping[str, Hits]
    record: Record = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        evaluations: Mapping[str, Evaluation],
        coefficients: Sequence[Sequence[float]],
        record: Record | None = None,
    ) -> "HitTable":
        """Return the table of evaluations by name, all on the same samples.

        Raises:
            RequestError: The evaluations are on different samples or under different threats.
        """
        first = next(iter(evaluations.values()))
        for name, item in evaluations.items():
            if not torch.equal(item.ids, first.ids) or list(item.threats) != list(first.threats):
                raise RequestError(
                    f"{name}: evaluated on other samples or under other threats than the first "
                    "soup; evaluate all soups alike"
                )
        rows = [item.hits() for item in evaluations.values()]
        hits = {key: torch.stack([row[key] for row in rows]).numpy() for key in rows[0]}
        array = np.asarray(coefficients, dtype=np.float64)
        return cls(tuple(evaluations), array, first.ids.numpy(), hits, record or {})

    def row(self, name: str) -> dict[str, Hits]:
        """Return the hits of one soup by measure."""
        number = self.names.index(name)
        return {measure: hits[number] for measure, hits in self.hits.items()}

    def take(self, rows: Sequence[int]) -> "HitTable":
        """Return the table of some of the soups."""
        chosen = list(rows)
        return HitTable(
            tuple(self.names[row] for row in chosen),
            self.coefficients[chosen],
            self.ids,
            {measure: hits[chosen] for measure, hits in self.hits.items()},
            self.record,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table to an .npz file and return its path."""
        path = user_path(path)
        arrays: dict[str, Any] = self._arrays()
        arrays["digest"] = _digest(arrays)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return path

    def _arrays(self) -> dict[str, NDArray[np.generic]]:
        about = {"names": self.names, "measures": list(self.hits), "record": self.record}
        bits = {f"bits_{i}": np.packbits(h, axis=1) for i, h in enumerate(self.hits.values())}
        return {
            "coefficients": np.ascontiguousarray(self.coefficients),
            "ids": np.ascontiguousarray(self.ids),
            "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
            **bits,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HitTable":
        """Read a table that `save` wrote.

        Raises:
            RequestError: The file is missing, damaged or no hit table.
        """
        path = user_path(path)
        try:
            with open_regular(path) as file:
                arrays = {name: array.numpy() for name, array in read_arrays(file).items()}
            digest = arrays.pop("digest")
            if not np.array_equal(digest, _digest(arrays)):
                raise ValueError("its content is not what its digest says")
            about = json.loads(arrays["about"].tobytes())
            samples, soups = len(arrays["ids"]), len(about["names"])
            hits = {
                measure: _unpack(arrays[f"bits_{number}"], soups, samples)
                for number, measure in enumerate(about["measures"])
            }
            coefficients = arrays["coefficients"]
            if coefficients.ndim != 2 or len(coefficients) != soups:
                raise ValueError(f"coefficients of shape {coefficients.shape} for {soups} soups")
            return cls(tuple(about["names"]), coefficients, arrays["ids"], hits, about["record"])
        except (KeyError, OSError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise RequestError(f"{path}: not a hit table that robustsoup wrote: {reason}") from None


def _unpack(bits: NDArray[np.generic], soups: int, samples: int) -> Hits:
    if bits.dtype != np.uint8 or bits.shape != (soups, -(-samples // 8)):
        raise ValueError(f"bits of shape {bits.shape} for {soups} soups and {samples} samples")
    return np.unpackbits(bits.astype(np.uint8), axis=1, count=samples).astype(bool)


def _digest(arrays: Mapping[str, NDArray[np.generic]]) -> NDArray[np.uint8]:
    tensors = {name: torch.tensor(array) for name, array in sorted(arrays.items())}
    return np.frombuffer(bytes.fromhex(digest_tensors(tensors)), dtype=np.uint8)

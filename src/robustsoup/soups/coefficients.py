"""Coefficients: what mixes checkpoints, one row of weights for each layer."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustsoup.checkpoints import read_tensors, write_tensors
from robustsoup.errors import CoefficientError

EVERY_LAYER = "*"
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Coefficients:
    """alpha: (layers, n) float64, each row sums to 1. layers: names of parameters, or ("*",) for the whole network.

    ingredients: the digests of the n ingredients in the order of the columns; empty where they are not fixed.
    record: how they were made. tracked: the BatchNorm statistics followed while learning, by name.
    """

    alpha: Tensor
    layers: tuple[str, ...] = (EVERY_LAYER,)
    ingredients: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    tracked: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, alpha: "Coefficients | Tensor | Sequence[float] | Mapping[str, Sequence[float]]") -> "Coefficients":
        """From (n,) numbers for the whole network, or {parameter name: (n,)}; Coefficients are returned as they are."""
        if isinstance(alpha, Coefficients):
            return alpha
        try:
            if isinstance(alpha, Mapping):
                rows = [torch.as_tensor(row, dtype=torch.float64) for row in alpha.values()]
                return cls(torch.stack([row.reshape(-1) for row in rows]), tuple(alpha))
            return cls(torch.as_tensor(alpha, dtype=torch.float64).reshape(1, -1))
        except (ValueError, TypeError, RuntimeError) as error:
            raise CoefficientError(
                f"coefficients: got {alpha!r}, expected n numbers or rows by name: {error}"
            ) from None

    def row(self, layer: str) -> list[float]:
        """The n weights of `layer`. Raises CoefficientError if there are none for it."""
        if self.layers == (EVERY_LAYER,):
            return self.alpha[0].tolist()
        try:
            return self.alpha[self.layers.index(layer)].tolist()
        except ValueError:
            raise CoefficientError(f"coefficients: none for layer {layer}; they are for another network") from None

    def check(self, n: int, *, affine: bool = False) -> None:
        """Raise CoefficientError unless there are n weights a row, finite, at least 0 (not if affine), summing to 1."""
        if self.alpha.shape[1] != n:
            raise CoefficientError(f"coefficients: got {self.alpha.shape[1]}, expected {n}, one for each ingredient")
        for layer, row in zip(self.layers, self.alpha.tolist(), strict=True):
            where = "" if layer == EVERY_LAYER else f"{layer}: "
            if not all(map(math.isfinite, row)) or abs(sum(row) - 1) > TOLERANCE:
                raise CoefficientError(
                    f"coefficients: {where}got {_short(row)} with sum {sum(row):.6g}, expected sum 1"
                )
            if not affine and min(row) < 0:
                raise CoefficientError(f"coefficients: {where}got {_short(row)}, expected none below 0")

    def for_ingredients(self, digests: Sequence[str]) -> "Coefficients":
        """The same coefficients with columns in the order of `digests`.

        Raises CoefficientError if they were made for other ingredients.
        """
        if not self.ingredients or tuple(digests) == self.ingredients:
            return self
        if sorted(digests) != sorted(self.ingredients):
            raise CoefficientError(
                "coefficients: they were made for other ingredients; expected the checkpoints with digests "
                + ", ".join(digest[:12] for digest in self.ingredients)
            )
        columns = [self.ingredients.index(digest) for digest in digests]
        return Coefficients(self.alpha[:, columns], self.layers, tuple(digests), self.record, self.tracked)

    def entropy(self) -> Tensor:
        """(layers,): the entropy of each row in nats; log(n) is the uniform soup, 0 a single ingredient."""
        return -torch.special.xlogy(self.alpha, self.alpha).sum(1)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one .safetensors file, whole or not at all."""
        tensors = {"alpha": self.alpha, **{f"tracked.{name}": tensor for name, tensor in self.tracked.items()}}
        write_tensors(
            path, tensors,
            {"kind": "coefficients", "layers": list(self.layers), "ingredients": list(self.ingredients), **self.record},
        )  # fmt: skip
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Coefficients":
        """Read what `save` wrote. Raises CheckpointError or CoefficientError, naming the file."""
        tensors, record = read_tensors(path)
        if record.get("kind") != "coefficients" or "alpha" not in tensors:
            raise CoefficientError(f"{path}: not a coefficients file; expected what `robustsoup learn` writes")
        layers, ingredients = tuple(record.pop("layers")), tuple(record.pop("ingredients"))
        record.pop("kind")
        tracked = {name.removeprefix("tracked."): t for name, t in tensors.items() if name.startswith("tracked.")}
        return cls(tensors["alpha"], layers, ingredients, record, tracked)


def uniform(n: int) -> Coefficients:
    """1/n for each of n ingredients."""
    return Coefficients.of([1 / n] * n)


def _short(row: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in row) + "]"

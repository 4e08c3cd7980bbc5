"""Coefficients: what mixes checkpoints, one row of weights for each layer."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustsoup.checkpoints.formats import read_tensors, write_tensors
from robustsoup.errors import CoefficientError

EVERY_LAYER = "*"
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Coefficients:
    """alpha: (layers, n) float64, each row sums to 1. layers: names of parameters or of groups of them; "*" is all.

    ingredients: the digests of the n ingredients in the order of the columns; empty where they are not fixed.
    record: how they were made. tracked: the BatchNorm statistics followed while learning, by name.
    parameters: parameter -> its layer, where that has another name. start: (layers, n), alpha before learning.
    slopes: (layers,), the mean norm of dL/dlogits over the steps that the layer took part in.
    """

    alpha: Tensor
    layers: tuple[str, ...] = (EVERY_LAYER,)
    ingredients: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    tracked: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    start: Tensor | None = None
    slopes: Tensor | None = None

    @classmethod
    def of(
        cls, alpha: "Coefficients | Tensor | Sequence[float] | Mapping[str, Sequence[float]]"
    ) -> "Coefficients":
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

    def row(self, parameter: str) -> list[float]:
        """The n weights of a parameter. Raises CoefficientError if there are none for it."""
        if self.layers == (EVERY_LAYER,):
            return self.alpha[0].tolist()
        try:
            return self.alpha[self.layers.index(self.parameters.get(parameter, parameter))].tolist()
        except ValueError:
            raise CoefficientError(
                f"coefficients: none for layer {parameter}; they are for another network"
            ) from None

    def check(self, n: int, *, affine: bool = False) -> None:
        """Raise CoefficientError unless there are n weights a row, finite, at least 0 (not if affine), summing to 1."""
        if self.alpha.shape[1] != n:
            raise CoefficientError(
                f"coefficients: got {self.alpha.shape[1]}, expected {n}, one for each ingredient"
            )
        for layer, row in zip(self.layers, self.alpha.tolist(), strict=True):
            where = "" if layer == EVERY_LAYER else f"{layer}: "
            if not all(map(math.isfinite, row)) or abs(sum(row) - 1) > TOLERANCE:
                raise CoefficientError(
                    f"coefficients: {where}got {_short(row)} with sum {sum(row):.6g}, expected sum 1"
                )
            if not affine and min(row) < 0:
                raise CoefficientError(
                    f"coefficients: {where}got {_short(row)}, expected none below 0"
                )

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
        start = self.start if self.start is None else self.start[:, columns]
        return replace(self, alpha=self.alpha[:, columns], ingredients=tuple(digests), start=start)

    def entropy(self) -> Tensor:
        """(layers,): the entropy of each row in nats; log(n) is the uniform soup, 0 a single ingredient."""
        return -torch.special.xlogy(self.alpha, self.alpha).sum(1)

    def movement(self) -> Tensor | None:
        """(layers,): the share that moved from one ingredient to another while learning, 0 to 1; None if not learned."""
        return None if self.start is None else (self.alpha - self.start).abs().sum(1) / 2

    def save(self, path: str | os.PathLike) -> Path:
        """Write one .safetensors file, whole or not at all."""
        return _save(self, path, {"kind": "coefficients", "alpha": self.alpha})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Coefficients":
        """Read what `save` wrote. Raises CheckpointError or CoefficientError, naming the file."""
        return _load(cls, path, "coefficients", "alpha")


@dataclass(frozen=True)
class Dial:
    """A line of coefficients: logits(t) = a + b (2t - 1) for each layer, t in [0, 1] from robust (0) to clean (1).

    line: (2, layers, n) float64, a and b; start: the same before learning. The rest as in Coefficients.
    """

    line: Tensor
    layers: tuple[str, ...]
    ingredients: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)
    tracked: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    start: Tensor | None = None
    slopes: Tensor | None = None

    def at(self, t: float) -> Coefficients:
        """The coefficients at t. Raises CoefficientError for t outside [0, 1]."""
        if not 0 <= t <= 1:
            raise CoefficientError(f"--at: got {t}, expected a number from 0 (robust) to 1 (clean)")

        order = sorted(
            range(len(self.ingredients)), key=lambda i: self.ingredients[i]
        )  # so that permuting changes no bit
        back = [order.index(i) for i in range(len(order))]

        def alpha(line: Tensor) -> Tensor:
            return torch.softmax((line[0] + line[1] * (2 * t - 1))[:, order], 1)[:, back]

        start = None if self.start is None else alpha(self.start)
        return Coefficients(
            alpha(self.line),
            self.layers,
            self.ingredients,
            {**self.record, "at": t},
            self.tracked,
            self.parameters,
            start,
            self.slopes,
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Write one .safetensors file, whole or not at all."""
        return _save(self, path, {"kind": "dial", "line": self.line})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Dial":
        """Read what `save` wrote. Raises CheckpointError or CoefficientError, naming the file."""
        return _load(cls, path, "dial", "line")


def load_coefficients(path: str | os.PathLike, at: float | None = None) -> Coefficients:
    """Coefficients from a file of them, or of a dial at t. Raises CoefficientError where `at` and the file do not go together."""
    if at is not None:
        return Dial.load(path).at(at)
    return Coefficients.load(path)


def uniform(n: int) -> Coefficients:
    """1/n for each of n ingredients."""
    return Coefficients.of([1 / n] * n)


def _save(item: Coefficients | Dial, path: str | os.PathLike, own: dict[str, Any]) -> Path:
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    tensors |= {
        name: getattr(item, name) for name in ("start", "slopes") if getattr(item, name) is not None
    }
    tensors |= {f"tracked.{name}": tensor for name, tensor in item.tracked.items()}
    record = {
        "kind": own["kind"],
        "layers": list(item.layers),
        "ingredients": list(item.ingredients),
    }
    write_tensors(path, tensors, {**record, "of_parameters": dict(item.parameters), **item.record})
    return Path(path)


def _load(cls: type, path: str | os.PathLike, kind: str, main: str) -> Any:
    tensors, record = read_tensors(path)
    got = record.pop("kind", None)
    if got == "dial" and kind == "coefficients":
        raise CoefficientError(
            f"{path}: a dial, a whole line of soups; say which with --at, from 0 (robust) to 1 (clean)"
        )
    if got != kind or main not in tensors:
        made = "learn --dial" if kind == "dial" else "learn"
        raise CoefficientError(
            f"{path}: not a {kind} file; expected what `robustsoup {made}` writes"
        )
    layers, ingredients = tuple(record.pop("layers")), tuple(record.pop("ingredients"))
    tracked = {
        name.removeprefix("tracked."): t
        for name, t in tensors.items()
        if name.startswith("tracked.")
    }
    parameters = record.pop("of_parameters", {})
    return cls(
        tensors[main],
        layers,
        ingredients,
        record,
        tracked,
        parameters,
        tensors.get("start"),
        tensors.get("slopes"),
    )


def _short(row: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in row) + "]"

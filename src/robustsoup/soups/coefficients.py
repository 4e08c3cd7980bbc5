"""Mixing coefficients: for each layer, one row with the weight of every ingredient."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustsoup.checkpoints.formats import (
    is_finite,
    read_tensors,
    refuse_non_finite,
    write_tensors,
)
from robustsoup.checkpoints.record import check_entries
from robustsoup.display import html_table
from robustsoup.errors import CoefficientError
from robustsoup.paths import user_path
from robustsoup.schema import MisfitError

EVERY_LAYER = "*"
"""Name of the layer of coefficients that apply to the whole network."""
SUM_TOLERANCE = 1e-6
"""Maximum difference between the sum of a row and 1."""


@dataclass(frozen=True, repr=False)
class Coefficients:
    """The weights of n ingredients in a soup, for the whole network or for each layer.

    Attributes:
        alpha: (layers, n) float64, each row sums to 1.
        layers: Names of parameters or of groups of them; ("*",) for the whole network.
        ingredients: Digests of the n ingredients, in the order of the columns; empty if they are
            not fixed.
        record: How the coefficients were computed.
        tracked: BatchNorm statistics that learning tracked, by name.
        parameters: Layer of each parameter that is not named like its layer.
        start: (layers, n), alpha before learning; None if not learned.
        slopes: (layers,), mean norm of dL/dlogits over the steps that updated the layer.
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
        """Return coefficients from plain numbers.

        Args:
            alpha: (n,) numbers for the whole network, {parameter name: (n,)}, or Coefficients,
                which are returned as they are.

        Raises:
            CoefficientError: If alpha is none of these.
        """
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

    def __repr__(self) -> str:
        """Return one line: the row of the whole network, or the mean over the layers."""
        shares = _format_row(self.alpha.mean(0).tolist())
        if self.layers == (EVERY_LAYER,):
            return f"Coefficients({shares})"
        return f"Coefficients({len(self.layers)} layers, mean {shares})"

    def _repr_html_(self) -> str:
        whole = self.layers == (EVERY_LAYER,)
        names = ["whole network"] if whole else self.layers
        rows = (
            (name, *(f"{share:.3f}" for share in row))
            for name, row in zip(names, self.alpha.tolist(), strict=True)
        )
        columns = ("layer", *_name_columns(self.ingredients, self.alpha.shape[1]))
        return html_table("Coefficients", columns, rows)

    def row(self, parameter: str) -> list[float]:
        """Return the n weights of a parameter.

        Raises:
            CoefficientError: If no layer holds the parameter.
        """
        if self.layers == (EVERY_LAYER,):
            return self.alpha[0].tolist()
        layer = self.parameters.get(parameter, parameter)
        if layer not in self.layers:
            raise CoefficientError(
                f"coefficients: none for layer {parameter}; they belong to another network"
            )
        return self.alpha[self.layers.index(layer)].tolist()

    @property
    def affine(self) -> bool:
        """Whether the weights were learned as ones that may be negative."""
        learning = self.record.get("learning")
        return isinstance(learning, Mapping) and learning.get("affine") is True

    def check(self, n: int, *, affine: bool = False) -> None:
        """Check that each row holds n finite weights that sum to 1.

        Args:
            n: Number of ingredients.
            affine: Allow negative weights, as weights that were learned to be affine always may be.

        Raises:
            CoefficientError: Names the first row that is wrong.
        """
        if self.alpha.shape[1] != n:
            raise CoefficientError(
                f"coefficients: got {self.alpha.shape[1]}, expected {n}, one for each ingredient"
            )
        for layer, row in zip(self.layers, self.alpha.tolist(), strict=True):
            where = "" if layer == EVERY_LAYER else f"{layer}: "
            got = f"coefficients: {where}got {_format_row(row)}"
            if not all(map(math.isfinite, row)) or abs(sum(row) - 1) > SUM_TOLERANCE:
                raise CoefficientError(f"{got} with sum {sum(row):.6g}, expected sum 1")
            if not (affine or self.affine) and min(row) < 0:
                raise CoefficientError(f"{got}, expected none below 0")

    def for_ingredients(self, digests: Sequence[str]) -> "Coefficients":
        """Return the same coefficients with columns in the order of `digests`.

        Raises:
            CoefficientError: If the coefficients were computed for other ingredients.
        """
        if not self.ingredients or tuple(digests) == self.ingredients:
            return self
        if sorted(digests) != sorted(self.ingredients):
            expected = ", ".join(digest[:12] for digest in self.ingredients)
            raise CoefficientError(
                "coefficients: computed for other ingredients; "
                f"expected the checkpoints with digests {expected}"
            )
        places: dict[str, list[int]] = {}
        for place, digest in enumerate(self.ingredients):
            places.setdefault(digest, []).append(place)
        columns = [places[digest].pop(0) for digest in digests]  # each once, also of equal ones
        start = None if self.start is None else self.start[:, columns]
        return replace(self, alpha=self.alpha[:, columns], ingredients=tuple(digests), start=start)

    def entropy(self) -> Tensor:
        """Return the entropy of each row in nats, (layers,), from 0 (one ingredient) to log(n).

        That of the absolute weights, scaled to sum 1, where some are negative.
        """
        shares = self.alpha.abs() / self.alpha.abs().sum(1, keepdim=True)
        return -torch.special.xlogy(shares, shares).sum(1)

    def movement(self) -> Tensor | None:
        """Return the share of weight that learning moved between ingredients, (layers,) in [0, 1].

        None if the coefficients were not learned.
        """
        return None if self.start is None else (self.alpha - self.start).abs().sum(1) / 2

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one .safetensors file atomically and return its path."""
        return _save_layered(self, path, "coefficients", "alpha")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Coefficients":
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: If the file cannot be read.
            CoefficientError: If the file holds no coefficients; a dial requires --at.
        """
        return cls(**_load_layered(path, "coefficients", "alpha"))


@dataclass(frozen=True, repr=False)
class Dial:
    """A line of soups from t = 0 (robust) to t = 1 (clean): logits(t) = a + b (2t - 1) per layer.

    Attributes:
        line: (2, layers, n) float64, a and b.
        layers: Names of parameters or of groups of them.
        ingredients: Digests of the n ingredients, in the order of the columns.
        record: How the dial was learned.
        tracked: BatchNorm statistics that learning tracked, by name.
        parameters: Layer of each parameter that is not named like its layer.
        start: (2, layers, n), the line before learning; None if unknown.
        slopes: (layers,), mean norm of dL/dlogits over the steps that updated the layer.
    """

    line: Tensor
    layers: tuple[str, ...]
    ingredients: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)
    tracked: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    start: Tensor | None = None
    slopes: Tensor | None = None

    def __repr__(self) -> str:
        """Return one line: the mean coefficients at both ends."""
        robust, clean = (_format_row(self.at(t).alpha.mean(0).tolist()) for t in (0, 1))
        return f"Dial({len(self.layers)} layers, mean {robust} at t = 0, {clean} at t = 1)"

    def _repr_html_(self) -> str:
        rows = (
            (f"t = {t:g}", *(f"{share:.3f}" for share in self.at(t).alpha.mean(0).tolist()))
            for t in (0, 0.25, 0.5, 0.75, 1)
        )
        columns = ("mean over the layers", *_name_columns(self.ingredients, self.line.shape[-1]))
        return html_table("Dial, from robust (t = 0) to clean (t = 1)", columns, rows)

    def at(self, t: float) -> Coefficients:
        """Return the coefficients at t.

        Args:
            t: From 0 (robust) to 1 (clean).

        Raises:
            CoefficientError: If t is outside [0, 1].
        """
        if not 0 <= t <= 1:
            raise CoefficientError(f"--at: got {t}, expected a number from 0 (robust) to 1 (clean)")
        return Coefficients(
            self._alpha_at(self.line, t),
            self.layers,
            self.ingredients,
            {**self.record, "at": t},
            self.tracked,
            self.parameters,
            None if self.start is None else self._alpha_at(self.start, t),
            self.slopes,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one .safetensors file atomically and return its path."""
        return _save_layered(self, path, "dial", "line")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Dial":
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: If the file cannot be read.
            CoefficientError: If the file holds no dial.
        """
        return cls(**_load_layered(path, "dial", "line"))

    def _alpha_at(self, line: Tensor, t: float) -> Tensor:
        """Return (layers, n); the softmax sums in digest order, so permuting changes no bit."""
        order = sorted(range(len(self.ingredients)), key=lambda i: self.ingredients[i])
        columns = [order.index(i) for i in range(len(order))]
        logits = line[0] + line[1] * (2 * t - 1)
        return torch.softmax(logits[:, order], 1)[:, columns]


def load_coefficients(path: str | os.PathLike[str], at: float | None = None) -> Coefficients:
    """Read coefficients from a file, or from a dial at position t.

    Args:
        path: File of coefficients, or of a dial if `at` is set.
        at: Position t on the dial, from 0 (robust) to 1 (clean).

    Raises:
        CoefficientError: If the file is a dial without `at`, or no dial with `at`.
    """
    if at is not None:
        return Dial.load(path).at(at)
    return Coefficients.load(path)


def uniform_coefficients(n: int) -> Coefficients:
    """Return coefficients of 1/n for each of n ingredients."""
    return Coefficients.of([1 / n] * n)


def _save_layered(
    item: Coefficients | Dial, path: str | os.PathLike[str], kind: str, tensor_name: str
) -> Path:
    """Write coefficients or a dial; `tensor_name` is the attribute with their values."""
    tensors: dict[str, Tensor] = {tensor_name: getattr(item, tensor_name)}
    tensors |= {f"tracked.{name}": tensor for name, tensor in item.tracked.items()}
    if item.start is not None:
        tensors["start"] = item.start
    if item.slopes is not None:
        tensors["slopes"] = item.slopes
    record = {
        "kind": kind,
        "layers": list(item.layers),
        "ingredients": list(item.ingredients),
        "of_parameters": dict(item.parameters),
        **item.record,
    }
    refuse_non_finite(tensors, path)
    write_tensors(path, tensors, record)
    return user_path(path)


def _load_layered(path: str | os.PathLike[str], kind: str, tensor_name: str) -> dict[str, Any]:
    """Return the attributes that `_save_layered` wrote, by name."""
    tensors, record = read_tensors(path)
    got = record.pop("kind", None)
    if got == "dial" and kind == "coefficients":
        raise CoefficientError(
            f"{path}: a dial, which holds a line of soups; "
            "choose one of them with --at, from 0 (robust) to 1 (clean)"
        )
    if got != kind or tensor_name not in tensors:
        command = "learn --dial" if kind == "dial" else "learn"
        raise CoefficientError(
            f"{path}: not a {kind} file; expected what `robustsoup {command}` writes"
        )
    layers = _pop_texts(record, "layers", path)
    ingredients = _pop_texts(record, "ingredients", path)
    try:
        check_entries(record)
    except MisfitError as misfit:
        raise CoefficientError(f"{path}: record: {misfit}; write the file again") from None
    _check_layered(tensors, tensor_name, len(layers), len(ingredients), path)
    return {
        tensor_name: tensors[tensor_name],
        "layers": layers,
        "ingredients": ingredients,
        "parameters": _pop_parameters(record, layers, path),
        "record": record,
        "tracked": {
            name.removeprefix("tracked."): tensor
            for name, tensor in tensors.items()
            if name.startswith("tracked.")
        },
        "start": tensors.get("start"),
        "slopes": tensors.get("slopes"),
    }


def _pop_texts(record: dict[str, Any], key: str, path: str | os.PathLike[str]) -> tuple[str, ...]:
    texts = record.pop(key, None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CoefficientError(f"{path}: the record has no list of texts {key}")
    if len(set(texts)) < len(texts) and key == "layers":
        raise CoefficientError(f"{path}: a layer stands twice")
    return tuple(texts)


def _pop_parameters(
    record: dict[str, Any], layers: tuple[str, ...], path: str | os.PathLike[str]
) -> dict[str, str]:
    parameters = record.pop("of_parameters", {})
    if not isinstance(parameters, dict) or not set(map(str, parameters.values())) <= set(layers):
        raise CoefficientError(f"{path}: of_parameters does not name the layers of parameters")
    return parameters


def _check_layered(
    tensors: Mapping[str, Tensor],
    tensor_name: str,
    layers: int,
    n: int,
    path: str | os.PathLike[str],
) -> None:
    """Check types, shapes and numbers of the tensors of coefficients or a dial.

    Args:
        tensors: name -> tensor.
        tensor_name: "alpha" or "line".
        layers: Number of layers.
        n: Number of ingredients; 0 if alpha is not fixed to some.
        path: The file, for the error.

    Raises:
        CoefficientError: Names the first tensor that is wrong.
    """
    values = tensors[tensor_name]
    n = values.shape[-1] if tensor_name == "alpha" and not n and values.ndim else n
    shape = (layers, n) if tensor_name == "alpha" else (2, layers, n)
    expected = {tensor_name: shape, "start": shape, "slopes": (layers,)}
    for name, tensor in tensors.items():
        if name in expected and (tensor.shape != expected[name] or not tensor.numel()):
            raise CoefficientError(
                f"{path}: {name}: got shape {tuple(tensor.shape)}, expected {expected[name]}, "
                f"with at least one layer and one ingredient"
            )
        if name in expected and not tensor.is_floating_point():
            raise CoefficientError(f"{path}: {name}: got {tensor.dtype}, expected float64")
        if not is_finite(tensor):
            raise CoefficientError(f"{path}: {name} holds NaN or infinity")


def _name_columns(digests: Sequence[str], n: int) -> list[str]:
    """Return the beginnings of the ingredients' digests, or their numbers."""
    return [digest[:12] for digest in digests] or [f"ingredient {i + 1}" for i in range(n)]


def _format_row(row: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in row) + "]"

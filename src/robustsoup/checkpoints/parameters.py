"""What the tensors of a file are: parameters, statistics, or vectors of power iterations."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

_RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_PARAMETRIZED = ".parametrizations."


@dataclass(frozen=True)
class PowerVectors:
    """The names of a weight under `spectral_norm` and of the vectors of its power iteration.

    Attributes:
        weight: The parameter, before the normalisation; None if other parametrizations come before
            it, so that the matrix that is normalised is no tensor of the file.
        u: The left vector, with one number for each row of the weight as a matrix.
        v: The right vector.
    """

    weight: str | None
    u: str
    v: str


def find_power_vectors(tensors: Mapping[str, Tensor]) -> list[PowerVectors]:
    """Return the weights under `spectral_norm`, in its old form and as a parametrization."""
    found = []
    for name in tensors:
        if name.endswith("_orig"):
            stem = name.removesuffix("_orig")
            names = PowerVectors(name, f"{stem}_u", f"{stem}_v")
        elif name.endswith("._u") and _PARAMETRIZED in f".{name}":
            layer = name.removesuffix("_u")
            weight = f"{layer.removesuffix('0.')}original" if layer.endswith(".0.") else ""
            names = PowerVectors(weight if weight in tensors else None, name, f"{layer}_v")
        else:
            continue
        if names.u in tensors and names.v in tensors:
            found.append(names)
    return found


def is_inexact(tensor: Tensor) -> bool:
    """Return whether a tensor holds real or complex numbers, which can be averaged."""
    return tensor.is_floating_point() or tensor.is_complex()


def parameters_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a network, then its buffers, each under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def list_averageable(model: nn.Module) -> set[str]:
    """Return the names of a network's parameters and buffers that can be averaged.

    They are those of real or complex numbers without infinity, which only constants may hold: the
    difference of two infinities is NaN.
    """
    tensors = parameters_and_buffers(model).items()
    return {name for name, item in tensors if is_inexact(item) and item.isfinite().all()}


def inexact_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> dict[str, nn.Parameter]:
    """Return the parameters of a network that can be averaged, by name; tables of integers cannot.

    Args:
        model: The network.
        remove_duplicate: Whether to return a tied parameter under its first name alone.
    """
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return {name: parameter for name, parameter in named if is_inexact(parameter)}


def guess_parameters(tensors: Mapping[str, Tensor], tied: Collection[str]) -> list[str]:
    """Return the tensors of a file without a record that are probably parameters.

    They are float or complex, and neither running statistics, nor the constants and vectors of
    parametrizations, nor masks, nor aliases.

    Args:
        tensors: name -> tensor.
        tied: Aliases of other tensors.
    """
    vectors = {vector for names in find_power_vectors(tensors) for vector in (names.u, names.v)}
    return [
        name
        for name, tensor in tensors.items()
        if is_inexact(tensor)
        and name.rpartition(".")[2] not in _RUNNING_STATISTICS
        and name not in tied
        and name not in vectors
        and not _is_constant_of_parametrization(name)
        and not is_pruning_mask(name, tensors)
        and not _is_attention_mask(name, tensor)
    ]


def find_constants(
    tensors: Mapping[str, Tensor], parameters: Iterable[str], tied: Iterable[str]
) -> set[str]:
    """Return the names of buffers that are neither statistics nor vectors of a known weight.

    Mixing copies these, and they alone may hold infinity.

    Args:
        tensors: name -> tensor.
        parameters: Names of the parameters.
        tied: Aliases of other tensors.
    """
    recomputed = [names for names in find_power_vectors(tensors) if names.weight is not None]
    others = {*parameters, *tied, *(name for names in recomputed for name in (names.u, names.v))}
    return {
        name
        for name in tensors
        if name not in others and name.rpartition(".")[2] not in _RUNNING_STATISTICS
    }


def find_owners_of_statistics(
    names: Iterable[str], parameters: Sequence[str], tied: Mapping[str, str]
) -> dict[str, str]:
    """Map each running mean and variance to the weight beside it, else to the parameter before.

    Args:
        names: Names of all tensors, in the order of the network.
        parameters: Names of the parameters.
        tied: The parameter of each alias.
    """
    all_parameters = set(parameters)
    latest = parameters[0] if parameters else None
    owners: dict[str, str] = {}
    for name in names:
        if name in all_parameters:
            latest = name
        elif name.rpartition(".")[2] in ("running_mean", "running_var") and latest is not None:
            weight = _weight_beside(name, tied)
            owners[name] = weight if weight in all_parameters else latest
    return owners


def find_unweighted_statistics(
    names: Iterable[str], parameters: Sequence[str], tied: Mapping[str, str]
) -> dict[str, str]:
    """Return those owners of statistics that depend on the order of the names."""
    owners = find_owners_of_statistics(names, parameters, tied)
    return {name: owner for name, owner in owners.items() if owner != _weight_beside(name, tied)}


def _weight_beside(name: str, tied: Mapping[str, str]) -> str:
    prefix = name.rpartition(".")[0]
    weight = f"{prefix}.weight" if prefix else "weight"
    return tied.get(weight, weight)


def is_pruning_mask(name: str, tensors: Collection[str]) -> bool:
    """Return whether a name is that of the mask that torch.nn.utils.prune puts on a weight."""
    return name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in tensors


def has_scale(name: str, tensors: Collection[str]) -> bool:
    """Return whether a quantized weight has its scale beside it, under one of the usual names."""
    module = name.removesuffix(name.rpartition(".")[2])
    return any(scale in tensors for scale in (f"{name}_scale", f"{name}_scale_inv", f"{module}SCB"))


def _is_attention_mask(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is called a mask and holds zeros and infinities alone."""
    if "mask" not in name.rpartition(".")[2].lower() or tensor.dtype.itemsize == 1:
        return False
    infinite = tensor.isinf()
    return bool(infinite.any() and not infinite.all() and not tensor[~infinite].any())


def _is_constant_of_parametrization(name: str) -> bool:
    """Return whether a name is the `base` of an orthogonal parametrization, or the like."""
    _, found, rest = f".{name}".rpartition(_PARAMETRIZED)
    parts = rest.split(".")
    return bool(found) and len(parts) == 3 and parts[1].isdecimal() and parts[2] == "base"

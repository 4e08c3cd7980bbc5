"""Fit the names of a file to those of a network."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robustsoup.checkpoints.parameters import is_inexact
from robustsoup.checkpoints.weight_sets import is_average, read_versions, with_versions
from robustsoup.errors import ModelError
from robustsoup.printable import first_line

OPTIONAL = ("num_batches_tracked",)
"""Last parts of names that a file may lack: BatchNorm's counters, which PyTorch 0.4.1 added."""

_INVISIBLE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts that wrappers of PyTorch (torch.compile, FSDP) put anywhere into names."""

_PROFILER_BUFFERS = ("total_ops", "total_params")
_MOST_CHANNELS = 4
"""Of images whose normalisation is recognised."""


@dataclass(frozen=True)
class NamesFit:
    """How a file supplies the tensors of a network.

    Attributes:
        names: Name in the network -> name in the file. Names of one tied tensor may share one.
        surplus: Names in the file that the network lacks.
        prefix: What the names of the file have before those of the network.
        other_prefixes: Prefixes of further complete sets in the file.
    """

    names: dict[str, str]
    surplus: tuple[str, ...]
    prefix: str
    other_prefixes: tuple[str, ...]


def network_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network by name, without other state that its modules save.

    Raises:
        ModelError: A `state_dict` of the user's own does not take `keep_vars`.
    """
    try:
        state = model.state_dict(keep_vars=True)
    except TypeError as error:
        raise ModelError(
            f"network: its state_dict cannot be read: {first_line(error)}; one of your own must "
            "take the arguments of that of torch.nn.Module"
        ) from error
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], versions: Mapping[str, int] | None = None
) -> None:
    """Copy tensors into a network by their names; what they leave out stays.

    Args:
        model: The network.
        tensors: name -> tensor.
        versions: Versions of modules that the tensors were saved by, by name; by default those of
            the network. Modules that changed between versions load by them.
    """
    of_network = read_versions(model.state_dict(keep_vars=True))
    state = with_versions(tensors, {**of_network, **(versions or {})})
    model.load_state_dict(state, strict=False)


def has_no_values(tensor: Tensor) -> bool:
    """Return whether a tensor of a network is on the meta device, or lazy and not built yet."""
    return tensor.is_meta or is_lazy(tensor)


def has_other_shape(tensor: Tensor, wanted: Tensor) -> bool:
    """Return whether a tensor does not fit one of a network; one that is lazy takes any shape."""
    return not is_lazy(wanted) and tensor.shape != wanted.shape


def holds_other_numbers(tensor: Tensor, wanted: Tensor) -> bool:
    """Return whether integers stand for weights, or complex numbers for real ones."""
    return (wanted.is_floating_point() and not tensor.is_floating_point()) or (
        wanted.is_complex() and not is_inexact(tensor)
    )


def find_aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return alias -> first name for names of one tensor of a network (see network_tensors)."""
    first_names: dict[int, str] = {}
    owners = {name: first_names.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: owner for name, owner in owners.items() if owner != name}


def find_neutral_constants(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return constants of normalisation that change nothing: means of zeros and deviations of ones.

    A network that was fine-tuned from a file without such constants has them.
    """
    constants: dict[str, Tensor] = {}
    for name, mean in tensors.items():
        std = tensors.get(f"{name.removesuffix('.mean')}.std")
        if not name.endswith(".mean") or std is None or mean.shape != std.shape or mean.dim() != 4:
            continue
        if bool((mean == 0).all()) and bool((std == 1).all()):
            constants |= {name: mean, f"{name.removesuffix('.mean')}.std": std}
    return constants


def find_normalisation(tensors: Mapping[str, object]) -> dict[str, Tensor]:
    """Return a mean and a deviation, by their names, by which a network may normalise its inputs.

    Args:
        tensors: name -> tensor, or anything else.

    Returns:
        The first such pair, mean first; empty if there is none, or it changes nothing.
    """
    for name, mean in tensors.items():
        for end, other_end in (("mean", "std"), ("mu", "sigma")):
            other = f"{name.removesuffix(end)}{other_end}"
            std = tensors.get(other)
            if not name.endswith(end) or not isinstance(mean, Tensor):
                continue
            if isinstance(std, Tensor) and _may_normalise(mean, std):
                return {name: mean, other: std}
    return {}


def _may_normalise(mean: Tensor, std: Tensor) -> bool:
    if not (mean.is_floating_point() and std.is_floating_point()) or mean.shape != std.shape:
        return False
    if not 1 <= mean.numel() <= _MOST_CHANNELS:
        return False
    return bool((std > 0).all()) and not (bool((mean == 0).all()) and bool((std == 1).all()))


def fit_names(file: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> NamesFit | None:
    """Fit the names of a file to those of a network.

    A fit takes one chain of prefixes off the names of the file (and off those of the network, if
    all have it), looks through wrappers within names, and fills in aliases of tied tensors.
    Everything that the network needs must be there. Of several fits, one with the right shapes
    is taken, that of no average if possible, and the shortest prefix.

    Args:
        file: name -> tensor.
        network: name -> tensor, from `network_tensors`, or of another file.

    Returns:
        The fit; None if the file lacks a tensor, or has one more within the network's own modules.
    """
    aliases = find_aliases(network)
    for hidden in (_INVISIBLE, _INVISIBLE | {"module"}):
        visible = {_strip(name, hidden): name for name in reversed(list(file))}
        fits: list[NamesFit] = []
        for prefix, trimmed in _list_prefixes(visible, network, hidden):
            wanted = {name: _strip(name, hidden).removeprefix(trimmed) for name in network}
            names = _match(visible, wanted, aliases, prefix)
            if names is None or any(names == fit.names for fit in fits):
                continue
            taken = set(names.values())
            surplus = {name: file[name] for name in file if name not in taken}
            modules = {name.partition(".")[0] for name in wanted.values()}
            if all(
                _may_be_left(_strip(name, hidden), tensor, prefix, modules)
                for name, tensor in surplus.items()
            ):
                fits.append(NamesFit(names, tuple(surplus), prefix, ()))
        fits.sort(
            key=lambda fit: (
                not _shapes_agree(fit, file, network),
                is_average(fit.prefix),
                len(fit.prefix),
            )
        )
        if fits:
            others = tuple(fit.prefix for fit in fits[1:])
            return replace(fits[0], other_prefixes=others)
    return None


def _strip(name: str, hidden: frozenset[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in hidden)


def _list_prefixes(
    visible: Iterable[str], network: Mapping[str, Tensor], hidden: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """Yield each (prefix in the file, prefix of the network) at which the longest name occurs."""
    required = [_strip(name, hidden) for name in network if not name.endswith(OPTIONAL)]
    if not required:
        return
    anchor = max(required, key=len)
    parts = anchor.split(".")[:-1]
    for count in range(len(parts) + 1):
        trimmed = "".join(f"{part}." for part in parts[:count])
        if not all(name.startswith(trimmed) for name in required):
            return
        rest = anchor[len(trimmed) :]
        found = {
            name[: len(name) - len(rest)]
            for name in visible
            if name == rest or name.endswith(f".{rest}")
        }
        yield from ((prefix, trimmed) for prefix in sorted(found))


def _match(
    visible: Mapping[str, str], wanted: Mapping[str, str], aliases: Mapping[str, str], prefix: str
) -> dict[str, str] | None:
    """Return name in the network -> name in the file, or None if one is missing.

    Args:
        visible: Name without wrappers -> name in the file.
        wanted: Name in the network -> the same without wrappers and prefix.
        aliases: Alias -> first name of tied tensors of the network.
        prefix: Prefix in the file.
    """
    found = {
        name: visible[prefix + short] for name, short in wanted.items() if prefix + short in visible
    }
    by_owner: dict[str, str] = {}
    for name, source in found.items():
        by_owner.setdefault(aliases.get(name, name), source)
    names: dict[str, str] = {}
    for name in wanted:
        source = found.get(name) or by_owner.get(aliases.get(name, name))
        if source is not None:
            names[name] = source
        elif not name.endswith(OPTIONAL):
            return None
    return names


def _shapes_agree(fit: NamesFit, file: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> bool:
    return not any(
        has_other_shape(file[source], network[name]) for name, source in fit.names.items()
    )


def _may_be_left(name: str, tensor: Tensor, prefix: str, modules: set[str]) -> bool:
    """Return whether a tensor that the network lacks can be left aside.

    One within a module of the network, or one more of its numbered modules, means that the file
    holds another network, such as a deeper one. Integer buffers do not.

    Args:
        name: Its name in the file, without wrappers.
        tensor: The tensor.
        prefix: The prefix in the file.
        modules: First parts of the names of the network.
    """
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    if not name.startswith(prefix) or name.endswith(_PROFILER_BUFFERS):
        return True
    first = name[len(prefix) :].partition(".")[0]
    return first not in modules and not (first.isdecimal() and any(map(str.isdecimal, modules)))

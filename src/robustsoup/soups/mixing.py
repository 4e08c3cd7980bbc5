"""Mix checkpoints into a soup; weights are averaged nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.attacks.adaptation import copy_network
from robustsoup.catalog import BUFFER_POLICIES, Entry, check_call
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike, open_all
from robustsoup.checkpoints.formats import is_finite
from robustsoup.checkpoints.network import is_fitted
from robustsoup.checkpoints.wrapping import join_names, soup_wrapping
from robustsoup.data import Split, SplitLike, as_optional_split
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import CheckpointError, CoefficientError, ModelError, RequestError
from robustsoup.gradients import gradients_enabled
from robustsoup.settings import BufferSettings
from robustsoup.soups.ancestry import check_ingredients
from robustsoup.soups.batchnorm import average_statistics, running_statistics
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.constants import (
    describe_differing_constants,
    used_ingredients,
)
from robustsoup.soups.power_iteration import compute_power_vectors
from robustsoup.soups.soup_record import make_soup_record
from robustsoup.soups.summation import canonical_sum
from robustsoup.threats import CLEAN, ThreatModel

CoefficientsLike = Coefficients | Tensor | Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Calibration:
    """How a buffer policy measures BatchNorm statistics.

    Attributes:
        data: Training split, or None.
        samples: Maximum number of samples to measure on.
        threat: Threat model of the policies that attack the samples.
        attack_steps: APGD steps.
        precision: "float32" or "bfloat16".
        seed: Seed that draws the samples.
    """

    data: Split | None = None
    samples: int = 10_000
    threat: ThreatModel = CLEAN
    attack_steps: int = 2
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers, which become those of Python."""
        checked = BufferSettings(
            calibrate_samples=self.samples, attack_steps=self.attack_steps, seed=self.seed
        )
        object.__setattr__(self, "samples", checked.calibrate_samples)
        object.__setattr__(self, "attack_steps", checked.attack_steps)
        object.__setattr__(self, "seed", checked.seed)


@dataclass(frozen=True)
class UnfinishedSoup:
    """A soup whose running statistics a buffer policy has yet to supply.

    Attributes:
        ingredients: n checkpoints of one network.
        coefficients: Mixing coefficients, columns in the order of the ingredients.
        network: Returns the network with the soup's parameters, for policies that run it. A policy
            must copy the network before changing it.
        base: The checkpoint that the caller named as base, if any.
        calibration: How to measure statistics.
    """

    ingredients: Sequence[Checkpoint]
    coefficients: Coefficients
    network: Callable[[], nn.Module]
    base: CheckpointLike | None = None
    calibration: Calibration = field(default_factory=Calibration)


@dataclass(frozen=True)
class Buffers:
    """The result of a buffer policy.

    Attributes:
        tensors: Buffers by name; buffers that are not listed keep the value of the first
            ingredient with a coefficient other than 0.
        record: Entries for the soup's provenance record.
    """

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)


BufferPolicy = Callable[[UnfinishedSoup], Buffers]


@gradients_enabled()
def mix(
    ingredients: Sequence[CheckpointLike],
    alpha: CoefficientsLike,
    *,
    buffers: str | None = None,
    base: CheckpointLike | None = None,
    calibrate_on: SplitLike | None = None,
    calibrate_samples: int = 10_000,
    threat: ThreatModel | str = CLEAN,
    attack_steps: int = 2,
    affine: bool = False,
    network: nn.Module | None = None,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    seed: int = 0,
) -> Checkpoint:
    """Average the named parameters of the ingredients: theta_soup = sum_i alpha_i * theta_i.

    The sum runs in the order of the ingredients' digests and skips zero coefficients, so a one-hot
    mix equals its ingredient bit for bit, and permuting the ingredients changes no bit.

    Args:
        ingredients: n checkpoints or paths of one network.
        alpha: (n,), {parameter name: (n,)} or Coefficients; entries >= 0 unless affine, each row
            sums to 1 (atol 1e-6).
        buffers: Policy for BatchNorm's running statistics. By default "tracked" for the
            coefficients of a learned soup, "base" for an affine mix or if `base` is given, else
            "average". "base" copies those of `base`; "average" mixes them with the coefficients of
            their BatchNorm's weight (not for affine mixes); "recalibrate" measures them on
            `calibrate_on`; "recalibrate-adversarial" measures them on attacked samples of
            `calibrate_on`; "tracked" takes those that learning tracked. Integer buffers are never
            averaged.
        base: Checkpoint for the policy "base"; by default the common ancestor, if its file is next
            to an ingredient, else the first ingredient.
        calibrate_on: Training split, required by the recalibrating policies.
        calibrate_samples: Maximum number of samples of `calibrate_on` to measure on.
        threat: Threat model of "recalibrate-adversarial".
        attack_steps: APGD steps of "recalibrate-adversarial".
        affine: Allow negative coefficients; those that were learned as affine need no leave.
        network: The network, if the ingredients do not record theirs; not changed.
        device: Where to recalibrate.
        precision: Arithmetic of recalibration, "float32" or "bfloat16".
        seed: Seed that draws the calibration samples.

    Returns:
        A checkpoint with the names and dtypes of the first ingredient; sums are taken in at least
        float32. The policy is recorded in its provenance.

    Raises:
        IngredientMismatch: Names the first tensor whose name, shape or dtype differs.
        CoefficientError: If alpha does not fit the ingredients.
        CheckpointError: If a tensor of the soup would hold NaN or infinity; names it.
        RequestError: If the policy is unknown, requires data, a threat or tracked statistics that
            were not passed, or a number is out of range.

    Source: Wortsman et al. 2022, arXiv:2203.05482, section 2; by layer: Huang, Adversarial Learned
        Soups, section 2.
    """
    loaded = open_ingredients(ingredients, network)
    coefficients = Coefficients.of(alpha).for_ingredients([item.digest for item in loaded])
    coefficients.check(len(loaded), affine=affine)
    learned = default_buffer_policy(coefficients)
    affine = affine or coefficients.affine
    default = "base" if base is not None or (affine and learned == "average") else learned
    threat = ThreatModel.parse(threat)
    calibrate_on = as_optional_split(calibrate_on, "mix: calibrate_on")
    policy = check_buffer_policy(buffers or default, calibrate_on, threat)
    _check_policy_fits(policy, loaded[0], coefficients, affine=affine)
    for item in loaded:
        item.check_source()
    precision = resolve_precision(precision, resolve_device(device))
    calibration = Calibration(
        calibrate_on, calibrate_samples, threat, attack_steps, precision, seed
    )
    finish = BufferRequest(policy, base, calibration, network, device, affine=affine)
    return finish_soup(loaded, coefficients, _mix_parameters(loaded, coefficients), finish)


@dataclass(frozen=True)
class BufferRequest:
    """How a soup gets its running statistics, for `finish_soup`.

    Attributes:
        policy: Entry of `catalog.BUFFER_POLICIES`.
        base: The checkpoint that the caller named as base, if any.
        calibration: How to measure statistics.
        network: The network, if the ingredients do not record theirs; not changed.
        device: Where to measure.
        affine: Whether coefficients may be negative.
    """

    policy: Entry
    base: CheckpointLike | None = None
    calibration: Calibration = field(default_factory=Calibration)
    network: nn.Module | None = None
    device: torch.device | str = "cpu"
    affine: bool = False


def finish_soup(
    ingredients: Sequence[Checkpoint],
    coefficients: Coefficients,
    tensors: Mapping[str, Tensor],
    request: BufferRequest,
    entries: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Return the soup with the given parameters: add its running statistics and its record.

    Args:
        ingredients: n checkpoints of one network.
        coefficients: Mixing coefficients, columns in the order of the ingredients; they average
            statistics.
        tensors: All tensors of the soup by name; the parameters are final.
        request: How the soup gets its running statistics.
        entries: More entries of the provenance record.

    Raises:
        CheckpointError: If a tensor of the soup would hold NaN or infinity; names it.
    """
    first, policy = ingredients[0], request.policy
    tensors = dict(tensors)
    vectors = compute_power_vectors(ingredients, coefficients, tensors)
    tensors |= vectors
    if "data" in policy.facts.get("needs", ()) and not request.affine:
        tensors |= average_statistics(ingredients, coefficients)
    record = make_soup_record(ingredients, coefficients) | dict(entries or {})

    def build_network() -> nn.Module:
        soup = Checkpoint(
            tensors, record, wrapping=first.wrapping, named_network=first.named_network
        )
        given = request.network
        model = copy_network(given) if given is not None else soup.network()
        soup.load_into(model)
        return model.to(resolve_device(request.device))

    run_policy: BufferPolicy = policy.load()
    result = run_policy(
        UnfinishedSoup(ingredients, coefficients, build_network, request.base, request.calibration)
    )
    used = used_ingredients(ingredients, coefficients)
    if used[0] is not first:
        copied = first.constants.union(filter(_is_counter, first.tensors))
        tensors |= {name: used[0].tensors[name].clone() for name in copied}
    tensors |= {
        name: tensor.to(tensors[name].dtype, copy=True)
        for name, tensor in result.tensors.items()
        if name not in vectors and (name in tensors or not _is_counter(name))
    }
    _check_soup_is_finite(tensors, ingredients)
    source = "the base's" if policy.name == "base" else None
    if warnings := list(describe_differing_constants(used, source)):
        record["warnings"] = warnings
    wrapping, dropped = soup_wrapping([item.wrapping for item in ingredients])
    notes = list(dict.fromkeys(note for item in ingredients for note in item.notes))
    if dropped:
        notes.append(f"soup: left out {join_names(dropped)} (not mixed)")
    return Checkpoint(
        tensors,
        record | {"buffers": {"policy": policy.name, **result.record}},
        wrapping=wrapping,
        named_network=first.named_network,
        notes=tuple(notes),
    )


def _is_counter(name: str) -> bool:
    """Return whether a name is of a BatchNorm's counter, which files before PyTorch 0.4.1 lack."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def open_ingredients(
    ingredients: Sequence[CheckpointLike], network: nn.Module | None
) -> list[Checkpoint]:
    """Open checkpoints of one network without reading their tensors into memory.

    Args:
        ingredients: Checkpoints or paths.
        network: Comes before the records of the files, and determines their parameters; None if
            the files record their network or `with_network` named it.

    Raises:
        CheckpointError: If there are no ingredients, or a file cannot be read.
        IngredientMismatch: If the ingredients do not share names, shapes and dtypes.
    """
    opened = open_all(ingredients)
    if network is not None and not isinstance(network, nn.Module):
        raise RequestError(f"network: got {type(network).__name__}, expected an nn.Module")
    if network is not None:
        opened = [item.with_network_of(network) for item in opened]
    else:
        opened = fit_to_own_network(opened)
    opened = [item.with_names_like(opened[0]) for item in opened]
    check_ingredients(opened)
    return opened


def fit_to_own_network(ingredients: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Fit names to the network that the first checkpoint names, and record its parameters.

    Checkpoints that are fitted already, name no network or do not fit it stay as they are.
    """
    try:
        if not ingredients or is_fitted(ingredients):
            return list(ingredients)
        model = ingredients[0].network()
    except ModelError:  # whatever runs the network raises it again
        return list(ingredients)
    return [item.with_parameters_of(model) for item in ingredients]


def default_buffer_policy(coefficients: Coefficients) -> str:
    """Return "tracked" for those of one learned soup, else "base" if affine, else "average"."""
    if coefficients.tracked and "at" not in coefficients.record:
        return "tracked"
    return "base" if coefficients.affine else "average"


def check_buffer_policy(
    name: str, calibrate_on: Split | None, threat: ThreatModel, *, affine: bool = False
) -> Entry:
    """Return the entry of a buffer policy in the catalog.

    Args:
        name: The policy.
        calibrate_on: Training split, or None.
        threat: Threat model of the calibration.
        affine: Whether weights are learned that may be negative.

    Raises:
        RequestError: If the policy is unknown, requires data or a threat that is missing, or does
            not go with negative weights.
        ThreatError: If the radius is too large for images of this shape.
    """
    policy = BUFFER_POLICIES.get_entry(name)
    if ":" in name:
        check_call(policy.load(), ["soup"], label=f'buffers "{name}"')
    needs = policy.facts.get("needs", ())
    if "data" in needs and calibrate_on is None:
        raise RequestError(f'buffers "{name}": requires training data; give calibrate_on (--data)')
    if "threat" in needs and threat.is_clean:
        raise RequestError(
            f'buffers "{name}": requires a threat to attack the samples with; got clean'
        )
    if "threat" in needs and calibrate_on is not None:
        threat.check_shape(calibrate_on.images.shape[1:])
    if affine and not policy.facts.get("affine"):
        raise RequestError(
            f'buffers "{name}": averaged variances can turn negative with affine weights; '
            "choose another policy"
        )
    return policy


def _check_policy_fits(
    policy: Entry, first: Checkpoint, coefficients: Coefficients, *, affine: bool
) -> None:
    if affine and not policy.facts.get("affine"):
        raise CoefficientError(
            f'buffers "{policy.name}": averaged variances can turn negative in an affine mix; '
            "use base or recalibrate"
        )
    needs_tracked = "tracked" in policy.facts.get("needs", ())
    if needs_tracked and not coefficients.tracked and running_statistics(first):
        raise RequestError(
            f'buffers "{policy.name}": only coefficients made by `learn` carry tracked statistics'
        )
    if needs_tracked:
        _check_tracked(first, coefficients.tracked)


def _check_tracked(first: Checkpoint, tracked: Mapping[str, Tensor]) -> None:
    """Check that tracked statistics are all those of the network."""
    mixed = {*first.parameters, *first.tied}
    for name in (*running_statistics(first), *tracked):
        here = first.tensors.get(name) if name not in mixed else None
        if name not in tracked:
            raise CoefficientError(f"coefficients: no tracked statistics {name}; learn them again")
        if here is None or here.shape != tracked[name].shape:
            expected = "no such statistics" if here is None else f"shape {tuple(here.shape)}"
            raise CoefficientError(
                f"coefficients: tracked {name}: got shape {tuple(tracked[name].shape)}, the "
                f"network has {expected}; they were learned for another network"
            )
        if tracked[name].is_complex():
            raise CoefficientError(f"coefficients: tracked {name}: got complex numbers")
        if name.endswith("running_var") and bool((tracked[name] < 0).any()):
            raise CoefficientError(f"coefficients: tracked {name}: got a negative variance")


def _check_soup_is_finite(tensors: Mapping[str, Tensor], ingredients: Sequence[Checkpoint]) -> None:
    constants = ingredients[0].constants
    for name, tensor in tensors.items():
        or_infinite = name in constants
        if is_finite(tensor, or_infinite=or_infinite):
            continue
        broken = [
            item.name
            for item in ingredients
            if not is_finite(item.tensors[name], or_infinite=or_infinite)
        ]
        reason = f"so does {broken[0]}" if broken else f"the sum leaves the range of {tensor.dtype}"
        raise CheckpointError(
            f"soup: {name} holds NaN or infinity: {reason}; a soup of such weights is not made"
        )


def _mix_parameters(
    ingredients: Sequence[Checkpoint], coefficients: Coefficients
) -> dict[str, Tensor]:
    """Return the first ingredient's tensors, copied, with the parameters mixed."""
    first = ingredients[0]
    parameters, tied = set(first.parameters), first.tied
    tensors = {}
    for name, tensor in first.tensors.items():
        owner = tied.get(name, name)
        if owner in parameters:
            rows = [item.tensors[name] for item in ingredients]
            digests = [item.digest for item in ingredients]
            tensors[name] = canonical_sum(rows, coefficients.row(owner), digests).to(tensor.dtype)
        else:
            tensors[name] = tensor.clone()
    return tensors

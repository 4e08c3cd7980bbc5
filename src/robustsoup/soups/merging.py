"""Merge checkpoints by methods that go beyond one average: SLERP, TIES, Fisher and others.

A method is a function of a `Merge` that returns a `Merged`. To add one, write the function and
register it in `robustsoup.catalog.SOUP_METHODS` with the fact "needs": "merging".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.attacks import apgd_train
from robustsoup.attacks.adaptation import copy_network
from robustsoup.attacks.forward import set_mode
from robustsoup.catalog import SOUP_METHODS, Entry, check_call
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.checkpoints.formats import refuse_broken
from robustsoup.checkpoints.provenance import check_same_split
from robustsoup.data import Split, SplitLike, as_optional_split, passes
from robustsoup.data.sketches import sketch_split
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import CoefficientError, RequestError
from robustsoup.gradients import gradients_enabled
from robustsoup.models.fit import adapt_to
from robustsoup.settings import MergeSettings, accepts_settings, make_settings, to_record
from robustsoup.soups.ancestry import common_ancestor, fit_base
from robustsoup.soups.coefficients import EVERY_LAYER, Coefficients, uniform_coefficients
from robustsoup.soups.method_keys import NEEDS_MERGING, find_unread, is_merge, method_keys
from robustsoup.soups.mixing import (
    BufferRequest,
    Calibration,
    CoefficientsLike,
    check_buffer_policy,
    finish_soup,
    open_ingredients,
)
from robustsoup.soups.summation import as_real
from robustsoup.threats import CLEAN, ThreatModel


@dataclass(frozen=True)
class Merge:
    """The inputs of a merging method.

    Attributes:
        ingredients: n checkpoints of one network.
        weights: n weights of at least 0 that sum to 1.
        settings: The numbers of the method.
        base: The checkpoint that the ingredients were fine-tuned from, if the method requires it.
        data: Training samples on the device, if the method requires them.
        threat: Threat model to attack the samples with.
        attack_steps: APGD steps of that attack.
        network: network(i) returns a copy of the network with the weights of ingredient i, in eval
            mode on the device.
        precision: Arithmetic of the attack.
        seed: Seed of all draws.
    """

    ingredients: Sequence[Checkpoint]
    weights: tuple[float, ...]
    settings: MergeSettings
    base: Checkpoint | None
    data: Split | None
    threat: ThreatModel
    attack_steps: int
    network: Callable[[int], nn.Module]
    precision: str
    seed: int

    @property
    def parameters(self) -> dict[str, str]:
        """Map each tensor that is merged to its parameter: itself, or its owner if it is tied."""
        first = self.ingredients[0]
        owners = {name: first.tied.get(name, name) for name in first.tensors}
        parameters = set(first.parameters)
        return {name: owner for name, owner in owners.items() if owner in parameters}

    @property
    def digests(self) -> list[str]:
        """Digests of the ingredients."""
        return [item.digest for item in self.ingredients]

    def rows(self, name: str) -> list[Tensor]:
        """Return the tensor of that name of each ingredient.

        Complex numbers are pairs of real ones, in a last dimension of 2.
        """
        return [as_real(item.tensors[name].resolve_conj()) for item in self.ingredients]

    def base_row(self, name: str) -> Tensor:
        """Return the tensor of that name of the base; `merge` has checked that there is one."""
        if self.base is None:
            raise RequestError("merge: requires a base")
        return as_real(self.base.tensors[name].resolve_conj())

    def attacked_batches(self, network: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return attacked training images and their labels, the same images for every network."""
        if self.data is None:
            raise RequestError("merge: requires training samples")
        attacked = []
        count = min(self.settings.measure_samples, len(self.data))
        for x, y in passes(self.data.first(count)):
            x_adv = apgd_train(
                network, x, y, self.threat, steps=self.attack_steps, precision=self.precision
            )
            attacked.append((x_adv.detach(), y))
        return attacked


@dataclass(frozen=True)
class Merged:
    """The result of a merging method.

    Attributes:
        tensors: The merged tensors by name: every key of `Merge.parameters`.
        coefficients: What averages BatchNorm's statistics; None for the weights of the merge.
        record: Figures of the merge for the provenance record.
    """

    tensors: Mapping[str, Tensor]
    coefficients: Coefficients | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


MergeMethod = Callable[[Merge], Merged]


@accepts_settings(MergeSettings)
@gradients_enabled()
def merge(
    ingredients: Sequence[CheckpointLike],
    method: str | MergeMethod,
    weights: CoefficientsLike | None = None,
    settings: MergeSettings | None = None,
    *,
    base: CheckpointLike | None = None,
    data: SplitLike | None = None,
    threat: ThreatModel | str = CLEAN,
    attack_steps: int = 2,
    buffers: str = "average",
    calibrate_samples: int = 10_000,
    calibrate_threat: ThreatModel | str | None = None,
    allow_leakage: bool = False,
    network: nn.Module | None = None,
    device: torch.device | str = "auto",
    precision: str = "auto",
    seed: int = 0,
    **changes: Any,
) -> Checkpoint:
    """Merge ingredients into one checkpoint by a method of the catalog, such as "ties".

    Args:
        ingredients: n checkpoints or paths of one network.
        method: An entry of `catalog.SOUP_METHODS` that merges, or a function of a `Merge`.
        weights: (n,) weights of at least 0 that sum to 1, or Coefficients of the whole network;
            uniform by default.
        settings: The numbers of the method; MergeSettings() by default.
        base: The checkpoint that the ingredients were fine-tuned from; by default the common
            ancestor, if its file is next to an ingredient. The buffer policy "base" takes its
            statistics.
        data: Training split that fisher and regmean measure on, and the recalibrating policies.
        threat: Threat model of fisher and regmean.
        attack_steps: APGD steps of these attacks.
        buffers: Policy for BatchNorm's running statistics, as in `mix`; "average" averages them
            with the weights.
        calibrate_samples: Maximum number of samples that the recalibrating policies measure on.
        calibrate_threat: Threat model of the policy "recalibrate-adversarial"; by default `threat`.
        allow_leakage: Accept ingredients that were trained on another split of `data`.
        network: The network, if the ingredients do not record theirs; not changed.
        device: Where to attack and to measure.
        precision: Arithmetic of the attack, "auto", "float32" or "bfloat16".
        seed: Seed of the entries that dare drops and of the labels that fisher draws.
        **changes: Fields of MergeSettings, which override `settings`.

    Returns:
        A checkpoint with the names and dtypes of the first ingredient. Method, numbers and base
        are in the entry "merge" of its provenance.

    Raises:
        RequestError: If the method is unknown, requires a base, data, a threat or another number
            of ingredients, or does not read a number that is given.
        IngredientMismatch: Names the first tensor whose name, shape or dtype differs.
        CoefficientError: If the weights do not fit the ingredients.
    """
    settings = make_settings(MergeSettings, settings, changes)
    threat, data = ThreatModel.parse(threat), as_optional_split(data, "merge: data")
    entry = _find_method(method)
    check_numbers(entry, [*changes, *_list_changed(settings)])
    opened = open_ingredients(ingredients, network)
    check_merge(entry, len(opened), settings, data=data, threat=threat)
    coefficients = _take_weights(entry, weights, opened)
    calibrate_threat = threat if calibrate_threat is None else ThreatModel.parse(calibrate_threat)
    policy = check_buffer_policy(buffers, data, calibrate_threat)
    if policy.name == "tracked":
        raise RequestError('merge: buffers "tracked": only learned soups have tracked statistics')
    source = _find_base(entry, opened, base)
    if data is not None and _measures(entry, data):
        check_same_split(opened, data, allow=allow_leakage)
    place = resolve_device(device)
    calibration = Calibration(
        data,
        calibrate_samples,
        calibrate_threat,
        attack_steps,
        resolve_precision(precision, place),
        seed,
    )
    inputs = Merge(
        opened,
        tuple(coefficients.alpha[0].tolist()),
        settings,
        source,
        None if data is None else data.to(place),
        threat,
        calibration.attack_steps,
        partial(_build_network, opened, network, data, place),
        calibration.precision,
        calibration.seed,
    )
    run_method: MergeMethod = entry.load() if isinstance(method, str) else method
    check_call(run_method, ["merge"], label=f'method "{entry.name}"')
    merged = run_method(inputs)
    if not isinstance(merged, Merged):
        raise RequestError(
            f'method "{entry.name}": returned {type(merged).__name__}, expected a Merged'
        )
    request = BufferRequest(policy, base, calibration, network, place)
    averaging = merged.coefficients or coefficients
    return finish_soup(
        opened,
        replace(averaging, record=_fitted_record(entry, inputs, coefficients)),
        _complete_tensors(opened[0], inputs, merged),
        request,
        _make_entries(entry, inputs, merged),
    )


def check_numbers(entry: Entry, names: Iterable[str]) -> None:
    """Check that a merging method reads the numbers that are given; a user's may read all.

    Args:
        entry: The method.
        names: The fields of MergeSettings that are given.

    Raises:
        RequestError: Names the number that the method does not read.
    """
    unread = find_unread(names, [entry.name]) if is_merge(entry.name) else None
    if unread is not None:
        raise RequestError(f'{unread}: has no meaning with method "{entry.name}"')


def _list_changed(settings: MergeSettings) -> list[str]:
    """Return the names of the numbers that are not the default."""
    defaults = to_record(MergeSettings())
    return [name for name, value in to_record(settings).items() if value != defaults[name]]


def check_merge(
    entry: Entry,
    n: int,
    settings: MergeSettings,
    *,
    data: Split | None,
    threat: ThreatModel,
) -> None:
    """Check that a merging method has what it requires, except the base.

    Raises:
        RequestError: Names what is missing.
    """
    requires, name = entry.facts.get("requires", ()), f'method "{entry.name}"'
    expected = entry.facts.get("ingredients")
    if expected is not None and n != expected:
        raise RequestError(f"{name}: merges {expected} checkpoints, got {n}")
    if "data" in requires and data is None:
        raise RequestError(f"{name}: measures on training samples; give data (--data)")
    if "threat" in requires and threat.is_clean:
        raise RequestError(
            f"{name}: measures on attacked images, got clean; give a threat (--threat)"
        )
    if "threat" in requires and data is not None:
        threat.check_shape(data.images.shape[1:])
    if "blocks" in requires and not settings.blocks:
        raise RequestError(
            f"{name}: give the blocks to take from the second checkpoint (--blocks); "
            "`robustsoup check --layers` lists them with their cost"
        )


def _find_method(method: str | MergeMethod) -> Entry:
    if not isinstance(method, str):
        if not callable(method):
            raise RequestError(f"method: got {method!r}, expected a name or a function")
        return Entry(getattr(method, "__name__", "custom"), "", "A function of the caller.")
    entry = SOUP_METHODS.get_entry(method)
    if ":" not in method and not is_merge(method):
        merging = ", ".join(name for name in SOUP_METHODS if is_merge(name))
        raise RequestError(
            f'method: "{method}" is made by mix, search or learn; expected one of {merging}'
        )
    return entry


def _take_weights(
    entry: Entry, weights: CoefficientsLike | None, ingredients: Sequence[Checkpoint]
) -> Coefficients:
    """Return the weights as coefficients in the order of the ingredients.

    Raises:
        CoefficientError: If they do not fit the ingredients, or differ by layer.
        RequestError: If the method takes uniform weights alone.
    """
    n = len(ingredients)
    coefficients = uniform_coefficients(n) if weights is None else Coefficients.of(weights)
    coefficients = coefficients.for_ingredients([item.digest for item in ingredients])
    if coefficients.layers != (EVERY_LAYER,):
        raise CoefficientError(
            "coefficients: a merging method (--method) takes one weight for each checkpoint, such "
            "as 0.5,0.5; got coefficients by layer"
        )
    replace(coefficients, record={}).check(n)  # no method takes weights learned below 0
    alpha = coefficients.alpha[0]
    uniform = torch.allclose(alpha, alpha.mean().expand_as(alpha), rtol=0, atol=1e-6)
    if entry.facts.get("weights") == "uniform" and not uniform:
        raise RequestError(
            f'method "{entry.name}": all ingredients weigh the same, got '
            f"{', '.join(f'{value:g}' for value in alpha.tolist())}; leave the weights out"
        )
    return coefficients


def _find_base(
    entry: Entry,
    ingredients: Sequence[Checkpoint],
    base: CheckpointLike | None,
) -> Checkpoint | None:
    """Return the base in the names of the ingredients; None if the method takes none."""
    required = "base" in entry.facts.get("requires", ())
    if entry.facts.get("needs") == NEEDS_MERGING and not required:
        return None
    found = Checkpoint.open(base) if base is not None else common_ancestor(ingredients)
    if found is None and required:
        raise RequestError(
            f'method "{entry.name}": requires the checkpoint that the ingredients were fine-tuned '
            "from, which lies beside none of them; give base (--base)"
        )
    if found is None:
        return None
    found = fit_base(found, ingredients[0])
    refuse_broken(found.tensors, found.name, found.constants)
    return found


def _build_network(
    ingredients: Sequence[Checkpoint],
    network: nn.Module | None,
    data: Split | None,
    device: torch.device,
    i: int,
) -> nn.Module:
    model = ingredients[i].network() if network is None else copy_network(network)
    ingredients[i].load_into(model)
    model = model.to(device)
    set_mode(model, training=False)
    if data is not None:
        adapt_to(model, data)
    return model


def _complete_tensors(first: Checkpoint, inputs: Merge, merged: Merged) -> dict[str, Tensor]:
    """Return all tensors of the soup, in the dtypes of the first ingredient."""
    names = inputs.parameters
    if set(merged.tensors) != set(names):
        missing = sorted(set(names) ^ set(merged.tensors))
        raise RequestError(f"merge: the method must return each parameter; differs in {missing[0]}")
    return {
        name: _as_type(merged.tensors[name], tensor) if name in names else tensor.clone()
        for name, tensor in first.tensors.items()
    }


def _as_type(merged: Tensor, like: Tensor) -> Tensor:
    """Return a merged tensor in the dtype of the ingredients', which may be complex."""
    if like.is_complex() and not merged.is_complex():
        merged = torch.view_as_complex(merged.contiguous())
    return merged.to(like.dtype)


def _make_entries(entry: Entry, inputs: Merge, merged: Merged) -> dict[str, Any]:
    """Return the entries of the provenance record that tell how the merge was made."""
    details: dict[str, Any] = {
        "method": entry.name,
        **_read_numbers(entry, inputs.settings),
        "weights": list(inputs.weights),
        "base": inputs.base and inputs.base.digest,
        "seed": inputs.seed,
        **merged.record,
    }
    if _measures(entry, inputs.data):
        details |= {"threat": str(inputs.threat), "attack_steps": inputs.attack_steps}
    return {"merge": details, "learned": None}


def _read_numbers(entry: Entry, settings: MergeSettings) -> dict[str, Any]:
    """Return the numbers that a method reads; a function of the user's may read all."""
    numbers = to_record(settings)
    if not is_merge(entry.name):
        return numbers
    return {name: value for name, value in numbers.items() if name in method_keys(entry.name)}


def _measures(entry: Entry, data: Split | None) -> bool:
    """Return whether a method measures on the data; a function of the user's may."""
    is_known = entry.facts.get("needs") == NEEDS_MERGING
    return "data" in entry.facts.get("requires", ()) if is_known else data is not None


def _fitted_record(entry: Entry, inputs: Merge, weights: Coefficients) -> dict[str, Any]:
    """Return the samples behind a merge beyond those of its ingredients.

    They are those of the base, of weights that were learned, and the data.
    """
    base = inputs.base.provenance if inputs.base is not None else {}
    sources = [base, weights.record]
    if inputs.data is not None and _measures(entry, inputs.data):
        data = inputs.data
        sketches = [sketch_split(data)]
        sources.append({"data": data.record, "trained_on": [data.name], "fitted_images": sketches})
    record: dict[str, Any] = {}
    for source in sources:
        record |= {"data": source["data"]} if "data" in source else {}
        for name in ("trained_on", "fitted_images"):
            if name in source:
                record[name] = [*record.get(name, []), *source[name]]
    if "trained_on" in record:
        record["trained_on"] = sorted(set(record["trained_on"]))
    return record

"""mix: the one place where weights are averaged."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split
from robustsoup.device import resolve_device
from robustsoup.errors import CheckpointError, CoefficientError, IngredientMismatch, RequestError
from robustsoup.soups.batchnorm import recalibrate, running_statistics
from robustsoup.soups.coefficients import Coefficients
from robustsoup.threats import CLEAN, ThreatModel

POLICIES = ("base", "average", "recalibrate", "recalibrate-adversarial", "tracked")


def mix(
    ingredients: Sequence[Checkpoint | str | os.PathLike],
    alpha: Coefficients | Tensor | Sequence[float] | Mapping[str, Sequence[float]],
    *,
    buffers: str | None = None,
    base: Checkpoint | str | os.PathLike | None = None,
    calibrate_on: Split | None = None,
    calibrate_samples: int = 10_000,
    threat: ThreatModel = CLEAN,
    attack_steps: int = 2,
    affine: bool = False,
    network: nn.Module | None = None,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    seed: int = 0,
) -> Checkpoint:
    """Average the named parameters of the ingredients: theta_soup = sum_i alpha_i * theta_i.

    alpha: (n,), {parameter name: (n,)} or Coefficients; entries at least 0 unless affine, each row sums to 1 (1e-6).
    Summed in at least float32 whatever the stored dtype, in the order of the ingredients' digests and without zero
    coefficients, so a one-hot mix is its ingredient bit for bit and permuting changes no bit. Integer buffers are
    copied, never averaged.

    buffers, the running statistics' policy, recorded in the soup; by default "tracked" for the coefficients of a learned
    soup, "base" for an affine mix or where `base` is given, else "average". "base" copies those of `base` (default: the
    common ancestor, if its file lies beside the ingredients, else the first ingredient); "average" mixes them with the
    coefficients of their BatchNorm's weight (not for affine); "recalibrate" measures them on `calibrate_samples` samples
    of `calibrate_on`; "recalibrate-adversarial" does so on samples attacked under `threat`; "tracked" takes those followed
    while learning.
    network: the network to recalibrate with, where the ingredients do not say what it is.

    Raises IngredientMismatch, naming the first parameter whose name, shape or dtype differs; CoefficientError;
    RequestError for a policy that lacks what it needs.
    Source: Wortsman et al. 2022, arXiv:2203.05482, section 2; by layer: Huang, Adversarial Learned Soups, section 2.
    """
    loaded = [Checkpoint.open(item) for item in ingredients]
    if network is not None:
        loaded = [item.described_by(network) for item in loaded]
    check_ingredients(loaded)
    coefficients = Coefficients.of(alpha).for_ingredients([item.digest for item in loaded])
    coefficients.check(len(loaded), affine=affine)
    buffers = buffers or ("base" if affine or base is not None else default_buffers(coefficients))
    check_policy(buffers, calibrate_on, threat)
    if buffers == "average" and affine:
        raise CoefficientError(
            "buffers: averaged variances can turn negative in an affine mix; use base or recalibrate"
        )
    if buffers == "tracked" and not coefficients.tracked and running_statistics(loaded[0]):
        raise RequestError(
            'buffers "tracked": only coefficients that `learn` made carry tracked statistics'
        )
    for item in loaded:
        item.check_source()
    tensors = _mixed_tensors(
        loaded, coefficients, average=buffers not in ("base", "tracked") and not affine
    )
    record = _record(loaded, coefficients, buffers)
    if buffers == "base":
        source = Checkpoint.open(base) if base is not None else common_ancestor(loaded) or loaded[0]
        check_ingredients([loaded[0], source])
        tensors |= {
            name: source.tensors[name].clone()
            for name in tensors
            if name not in _mixed_names(loaded[0])
        }
        record["buffers"]["base"] = source.digest
    if buffers == "tracked":
        tensors |= {
            name: tensor.to(tensors[name].dtype, copy=True)
            for name, tensor in coefficients.tracked.items()
        }
    soup = Checkpoint(tensors, record, wrapping=loaded[0].wrapping)
    if buffers.startswith("recalibrate"):
        attacked = threat if buffers == "recalibrate-adversarial" else CLEAN
        model = copy.deepcopy(network) if network is not None else soup.network()
        soup.load_into(model)
        measured = recalibrate(
            model.to(resolve_device(device)),
            calibrate_on,
            threat=attacked,
            attack_steps=attack_steps,
            samples=calibrate_samples,
            seed=seed,
            precision=precision,
        )
        record["buffers"] |= {
            "samples": min(calibrate_samples, len(calibrate_on)),
            "threat": str(attacked),
            "attack_steps": attack_steps,
        }
        measured = {name: tensor.to(tensors[name].dtype) for name, tensor in measured.items()}
        soup = Checkpoint({**tensors, **measured}, record, wrapping=loaded[0].wrapping)
    return soup


def default_buffers(coefficients: Coefficients) -> str:
    """The policy that is used where none is asked for: tracked statistics where one soup was learned, else averaged ones."""
    return "tracked" if coefficients.tracked and "at" not in coefficients.record else "average"


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights[i] * tensors[i] in at least float32, without zero weights; one weight of 1 is a copy.

    The result has the promoted dtype of the tensors and float32, unless it is a copy.
    """
    terms = [
        (tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0
    ]
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0].clone()
    dtype = torch.promote_types(terms[0][0].dtype, torch.float32)
    total = terms[0][0].to(dtype) * terms[0][1]
    for tensor, weight in terms[1:]:
        total.add_(tensor.to(dtype), alpha=weight)
    return total


def check_ingredients(ingredients: Sequence[Checkpoint]) -> None:
    """Raise IngredientMismatch, naming the first tensor whose name, shape or dtype differs from the first ingredient's."""
    if not ingredients:
        raise CheckpointError("ingredients: got none, expected at least one checkpoint")
    first = ingredients[0]
    for other in ingredients[1:]:
        for name in [*first.tensors, *other.tensors]:
            for one, two in ((first, other), (other, first)):
                if name not in two.tensors:
                    raise IngredientMismatch(
                        f"{name}: {one.name} has it, {two.name} does not; not the same network"
                    )
            a, b = first.tensors[name], other.tensors[name]
            if a.shape != b.shape or a.dtype != b.dtype:
                raise IngredientMismatch(
                    f"{name}: {tuple(a.shape)} {a.dtype} in {first.name}, {tuple(b.shape)} {b.dtype} in {other.name}; "
                    "ingredients must share names, shapes and dtypes"
                )


def common_ancestor(ingredients: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint that all ingredients were fine-tuned from, if their records agree and its file can be found."""
    parents = [
        {p["digest"]: p.get("file") for p in item.provenance.get("parents", [])}
        for item in ingredients
    ]
    digests = {item.digest for item in ingredients}
    lines = [
        set(known) | ({item.digest} & digests)
        for known, item in zip(parents, ingredients, strict=True)
    ]
    shared = set.intersection(*lines) if len(ingredients) > 1 else set(parents[0])
    for digest in sorted(shared):
        for item in ingredients:
            if item.digest == digest:
                return item
        for item, known in zip(ingredients, parents, strict=True):
            if item.path and known.get(digest):
                path = Path(item.path).parent / known[digest]
                if path.is_file() and (found := Checkpoint.open(path)).digest == digest:
                    return found
    return None


def canonical_order(digests: Sequence[str]) -> list[int]:
    """The order in which ingredients are summed: by digest, whatever the order they were given in."""
    return sorted(range(len(digests)), key=lambda i: digests[i])


def _mixed_names(ingredient: Checkpoint) -> set[str]:
    return {*ingredient.parameters, *ingredient.tied}


def _mixed_tensors(
    ingredients: list[Checkpoint], coefficients: Coefficients, *, average: bool
) -> dict[str, Tensor]:
    first = ingredients[0]
    digests = [item.digest for item in ingredients]
    parameters, tied = set(first.parameters), first.tied
    owners = running_statistics(first) if average else {}
    tensors = {}
    for name, tensor in first.tensors.items():
        layer = tied.get(name, name)
        if layer not in parameters:
            layer = owners.get(name)
        if layer is None:
            tensors[name] = tensor.clone()
        else:
            row = coefficients.row(layer)
            order = sorted(range(len(row)), key=lambda i: (digests[i], row[i]))
            mixed = weighted_sum(
                [ingredients[i].tensors[name] for i in order], [row[i] for i in order]
            )
            tensors[name] = mixed.to(tensor.dtype)
    return tensors


def check_policy(buffers: str, calibrate_on: Split | None, threat: ThreatModel) -> None:
    """Raise RequestError for an unknown policy of statistics, or one that lacks the data or the threat that it needs."""
    if buffers not in POLICIES:
        raise RequestError(f'buffers: got "{buffers}", expected one of {", ".join(POLICIES)}')
    if buffers.startswith("recalibrate") and calibrate_on is None:
        raise RequestError(
            f'buffers "{buffers}": no data to measure on; give calibrate_on (--data)'
        )
    if buffers == "recalibrate-adversarial" and threat.is_clean:
        raise RequestError(
            'buffers "recalibrate-adversarial": give the threat that the samples are attacked with'
        )


def _record(
    ingredients: list[Checkpoint], coefficients: Coefficients, buffers: str
) -> dict[str, Any]:
    """The soup's provenance: what all ingredients agree on, and what was mixed."""
    first = ingredients[0].provenance
    record = {
        key: first[key]
        for key in ("network", "parameters", "tied", "data", "trained_on")
        if key in first
    }
    known = [item.provenance.get("data") for item in ingredients]
    if any(data != known[0] for data in known):
        record.pop("data", None)
        if (
            all(known) and len({data["digest"] for data in known}) == 1
        ):  # one split or the other saw every sample
            record["data"] = {**known[0], "split_digest": "several"}
    earlier = [data for item in ingredients for data in item.provenance.get("earlier_data", [])]
    if earlier:
        record["earlier_data"] = [data for i, data in enumerate(earlier) if data not in earlier[:i]]
    record["trained_on"] = sorted(
        {split for item in ingredients for split in item.provenance.get("trained_on", [])}
    )
    record["parents"] = [
        {"digest": i.digest, "file": Path(i.path).name if i.path else None} for i in ingredients
    ]
    if coefficients.layers == ("*",):
        record["coefficients"] = coefficients.alpha[0].tolist()
    else:
        record["coefficients"] = dict(
            zip(coefficients.layers, coefficients.alpha.tolist(), strict=True)
        )
    record["learned"] = coefficients.record or None
    record["buffers"] = {"policy": buffers}
    return record

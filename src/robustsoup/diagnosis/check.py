"""Check up front that checkpoints can be mixed: one network, one split, one loss basin."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from robustsoup.attacks.adaptation import copy_network, set_memory_format
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike, open_all
from robustsoup.data import Split, SplitLike, as_optional_split
from robustsoup.device import resolve_device
from robustsoup.diagnosis.barriers import LINE_POINTS, Pair, measure_curves
from robustsoup.diagnosis.cost import Cost, measure_cost, measure_step_seconds
from robustsoup.diagnosis.geometry import Geometry, measure_geometry
from robustsoup.diagnosis.rules import (
    Finding,
    check_ancestor,
    check_constant_buffers,
    check_count,
    check_curves,
    check_duplicates,
    check_same_network,
    check_split,
    check_statistics,
    compare_splits,
    group_duplicates,
    list_tensor_differences,
)
from robustsoup.diagnosis.running_statistics import RunningStatistics, compare_running_statistics
from robustsoup.display import html_table
from robustsoup.errors import CheckpointError, RequestError
from robustsoup.gradients import gradients_enabled
from robustsoup.models.fit import check_fit
from robustsoup.progress import Progress
from robustsoup.soups.ancestry import common_ancestor
from robustsoup.soups.mixing import fit_to_own_network
from robustsoup.threats import ThreatModel


@dataclass(frozen=True, repr=False)
class Soupability:
    """The result of `check`.

    Attributes:
        names: Names of the checkpoints.
        differences: Name of a checkpoint -> its differences from the first one.
        duplicates: Groups of checkpoints (by number) with equal weights.
        split: Whether the checkpoints were trained on one split: "same", "unknown" or "different".
        statistics: Differences of the running statistics; None if the networks differ.
        geometry: Norms of task vectors or weights; None if the networks differ.
        pairs: All pairs in order; empty if the networks differ.
        measured: Number of pairs with curves.
        samples: Number of samples that curves were measured on; None without curves.
        cost: Memory, disk space and learning time of the checkpoints.
        findings: All problems and warnings, as ("problem" | "warning", text).
    """

    names: tuple[str, ...]
    differences: dict[str, list[str]]
    duplicates: list[list[int]]
    split: str
    statistics: RunningStatistics | None
    geometry: Geometry | None
    pairs: list[Pair]
    measured: int
    samples: int | None
    cost: Cost
    findings: list[Finding]

    def __repr__(self) -> str:
        """Return one line: whether the checkpoints can be mixed."""
        verdict = "can be mixed" if self.soupable else "cannot be mixed"
        findings = f"{len(self.problems)} problems, {len(self.warnings)} warnings"
        return f"Soupability({len(self.names)} checkpoints {verdict}: {findings})"

    def _repr_html_(self) -> str:
        verdict = "can be mixed" if self.soupable else "cannot be mixed"
        threats = list(self.pairs[0].curves) if self.pairs else []
        columns = ("first", "second", "distance", *(f"barrier, {threat}" for threat in threats))
        rows = (
            (
                self.names[pair.a],
                self.names[pair.b],
                f"{pair.distance:.3g}",
                *(f"{pair.curves[t].barrier:.3f}" if t in pair.curves else "-" for t in threats),
            )
            for pair in self.pairs
        )
        notes = (f"{kind}: {text}" for kind, text in self.findings)
        return html_table(f"{len(self.names)} checkpoints {verdict}", columns, rows, notes)

    @property
    def problems(self) -> list[str]:
        """Reasons why the checkpoints cannot be mixed."""
        return [text for kind, text in self.findings if kind == "problem"]

    @property
    def warnings(self) -> list[str]:
        """Reasons why a mix of the checkpoints is doubtful."""
        return [text for kind, text in self.findings if kind == "warning"]

    @property
    def soupable(self) -> bool:
        """Whether the checkpoints can be mixed: no problem was detected."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Convert the result for json.dumps; numbers that are not finite become null."""
        content = asdict(self)
        del content["findings"]
        for entry, pair in zip(content["pairs"], self.pairs, strict=True):
            for key, curve in pair.curves.items():
                entry["curves"][key] |= {
                    "t": LINE_POINTS,
                    "barrier": curve.barrier,
                    "drop": curve.drop,
                }
        content["soupable"] = self.soupable
        content["problems"] = self.problems
        content["warnings"] = self.warnings
        return _replace_non_finite(content)


@gradients_enabled()
def check(
    checkpoints: Sequence[CheckpointLike],
    *,
    data: SplitLike | None = None,
    threat: ThreatModel | str = "clean",
    base: CheckpointLike | None = None,
    samples: int = 256,
    network: nn.Module | None = None,
    device: str = "auto",
    pairs: int = 15,
    on_progress: Progress | None = None,
) -> Soupability:
    """Check whether checkpoints can be mixed, and explain why not.

    Without data, only the files are compared. With data, pairs of checkpoints are mixed at t = 0,
    1/4, 1/2, 3/4 and 1 with averaged statistics and evaluated in float32 and eval mode, on clean
    inputs and under `threat` (APGD of 10 steps, at the points of highest loss).

    A pair is a problem if clean accuracy falls more than 10 points below the line between its ends,
    or more than 5 while the clean barrier exceeds half of log(classes) less the mean loss of the
    ends. More than 5 points alone, a barrier above a quarter, and robust accuracy 10 points below
    the line are warnings. A barrier alone is no problem: the soup of a confident and an unsure
    network is unsure but correct. Differences of running statistics are reported, but never a
    problem.

    Args:
        checkpoints: At least one checkpoint or path.
        data: Samples to measure the loss between the checkpoints on. Nothing is selected on them,
            so any split is allowed.
        threat: Threat to evaluate under, besides clean inputs.
        base: The checkpoint that the others were fine-tuned from; by default the common ancestor
            in their records, if its file is next to one of them.
        samples: Evaluate on the first `samples` samples (all, if there are fewer).
        network: The module to run, if the files do not record their network; it is not changed.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        pairs: Measure at most this many pairs, the most distant ones.
        on_progress: Receives the number of evaluated networks and their total.

    Returns:
        All measurements, problems and warnings.

    Raises:
        CheckpointError: There is no checkpoint, or a file is missing or broken.
        IngredientMismatch: The base is another network.
        ModelError: The network does not fit the data.
        RequestError: Fewer than 1 sample or pair.

    Source: barrier: Frankle et al. 2020, arXiv:1912.05671; task vectors: Ilharco et al. 2023,
        arXiv:2212.04089.
    """
    threat = ThreatModel.parse(threat)
    data = as_optional_split(data, "check")
    if samples < 1 or pairs < 1:
        raise RequestError(
            f"check: got samples {samples}, pairs {pairs}, expected at least 1 of each"
        )
    opened = _open_checkpoints(checkpoints, network)
    if not opened:
        raise CheckpointError(
            "check: got no checkpoint, expected at least one; pass the checkpoints to mix"
        )
    result = _compare_files(opened)
    if result.differences:
        return result
    ancestor = _find_ancestor(opened) if base is None else _open_base(base, opened[0], network)
    result = _add_distances(result, opened, ancestor)
    if data is None:
        return result
    subset = data.first(min(samples, len(data)))
    model = build_model(opened[0], network, subset, threat, device)
    measured_pairs = measure_curves(
        opened,
        result.pairs,
        limit=pairs,
        model=model,
        data=subset,
        threat=threat,
        on_progress=on_progress,
    )
    step_seconds = measure_step_seconds(model, subset, threat)
    measured = sum(bool(pair.curves) for pair in measured_pairs)
    return replace(
        result,
        pairs=measured_pairs,
        measured=measured,
        samples=len(subset) if measured else None,
        cost=replace(result.cost, step_seconds=step_seconds),
        findings=[*result.findings, *check_curves(opened, measured_pairs, subset)],
    )


def _compare_files(checkpoints: Sequence[Checkpoint]) -> Soupability:
    """Apply the rules that require neither one network nor data."""
    first = checkpoints[0]
    differences = {
        item.name: texts
        for item in checkpoints[1:]
        if (texts := list_tensor_differences(first, item))
    }
    duplicates, split = group_duplicates(checkpoints), compare_splits(checkpoints)
    return Soupability(
        names=tuple(item.name for item in checkpoints),
        differences=differences,
        duplicates=duplicates,
        split=split,
        statistics=None,
        geometry=None,
        pairs=[],
        measured=0,
        samples=None,
        cost=measure_cost(checkpoints),
        findings=[
            *check_count(checkpoints),
            *check_same_network(checkpoints, differences),
            *check_duplicates(checkpoints, duplicates),
            *check_split(checkpoints, split),
            *check_statistics(checkpoints),
        ],
    )


def _add_distances(
    result: Soupability, checkpoints: Sequence[Checkpoint], ancestor: Checkpoint | None
) -> Soupability:
    """Add running statistics, geometry and pairs, for checkpoints of one network."""
    statistics = compare_running_statistics(checkpoints)
    geometry, pairs = measure_geometry(checkpoints, ancestor)
    findings = [
        *result.findings,
        *check_constant_buffers(checkpoints),
        *check_ancestor(checkpoints, geometry, pairs),
    ]
    return replace(result, statistics=statistics, geometry=geometry, pairs=pairs, findings=findings)


def _open_checkpoints(
    items: Sequence[CheckpointLike], network: nn.Module | None
) -> list[Checkpoint]:
    """Open checkpoints in the names of the network, or of the first one, as `mix` does."""
    opened = open_all(items)
    if network is None:
        opened = fit_to_own_network(opened)
    else:
        opened = [item.with_parameters_of(network) for item in opened]
    return [item.with_names_like(opened[0]) for item in opened]


def _open_base(base: CheckpointLike, first: Checkpoint, network: nn.Module | None) -> Checkpoint:
    """Open the base in the names and dtypes of the first checkpoint."""
    opened = Checkpoint.open(base)
    if network is not None:
        opened = opened.with_parameters_of(network)
    return opened.with_names_like(first).with_dtypes_like(first)


def _find_ancestor(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """Find the common ancestor; None if it is another network, such as one with more classes."""
    first, ancestor = checkpoints[0], common_ancestor(checkpoints)
    if ancestor is None:
        return None
    ancestor = ancestor.with_names_like(first).with_dtypes_like(first)
    return None if list_tensor_differences(first, ancestor) else ancestor


def build_model(
    first: Checkpoint,
    network: nn.Module | None,
    data: Split,
    threat: ThreatModel,
    device: str,
) -> nn.Module:
    """Return the network with the weights of a checkpoint, on the device, if it fits the data.

    Raises:
        ModelError: The network does not fit the data.
    """
    model = copy_network(network) if network is not None else first.network()
    first.load_into(model)
    check_fit(model, data, [threat])
    return set_memory_format(model.to(resolve_device(device)))


def _replace_non_finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _replace_non_finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_replace_non_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

"""Rules that decide whether checkpoints can be mixed; each rule yields problems and warnings."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split
from robustsoup.diagnosis.barriers import Curve, Pair
from robustsoup.diagnosis.geometry import Geometry
from robustsoup.diagnosis.running_statistics import counter_names
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.soups.ancestry import common_ancestor
from robustsoup.soups.batchnorm import running_statistics
from robustsoup.soups.constants import describe_differing_constants
from robustsoup.threats import CLEAN

MAX_RELATIVE_BARRIER = 0.5
"""A barrier is high above this fraction of the loss range: log(classes) less the ends' loss."""
MAX_ACCURACY_DROP = 0.10
"""A larger drop of clean accuracy below the chord means two basins; half, at a high barrier."""
MIN_WEIGHT_COSINE = 0.9
"""Networks with a lower cosine of weights were probably not fine-tuned from one checkpoint."""
MIN_SAMPLES_TO_CALL_GUESSING = 50
MAX_LISTED_DIFFERENCES = 10

Finding = tuple[Literal["problem", "warning"], str]
"""Kind and text. With a problem, checkpoints cannot be mixed; with a warning, a mix is doubtful."""
SplitAgreement = Literal["same", "unknown", "different"]


def list_tensor_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    """List all differences in names, shapes and dtypes, each as "tensor: got ..., expected ..."."""
    differences = []
    for name in dict.fromkeys([*first.tensors, *other.tensors]):
        got, expected = (_describe_tensor(item.tensors.get(name)) for item in (other, first))
        if got != expected:
            differences.append(f"{name}: got {got}, expected {expected}")
    return differences


def group_duplicates(checkpoints: Sequence[Checkpoint]) -> list[list[int]]:
    """Group the numbers of checkpoints with equal weights; a group has two members or more."""
    by_digest: dict[str, list[int]] = {}
    for number, item in enumerate(checkpoints):
        by_digest.setdefault(item.digest, []).append(number)
    return [group for group in by_digest.values() if len(group) > 1]


def compare_splits(checkpoints: Sequence[Checkpoint]) -> SplitAgreement:
    """Compare the training splits of checkpoints; "unknown" if one is not recorded."""
    records = [item.provenance.get("data") for item in checkpoints]
    splits = {_split_digests(record) for record in records if record}
    if len(splits) > 1 or any(split == "several" for _, split in splits):
        return "different"
    return "same" if all(records) else "unknown"


def check_count(checkpoints: Sequence[Checkpoint]) -> Iterator[Finding]:
    """Warn about a single checkpoint."""
    if len(checkpoints) == 1:
        yield _warning(
            f"{checkpoints[0].name}: got one checkpoint, expected two or more: nothing to mix"
        )


def check_same_network(
    checkpoints: Sequence[Checkpoint], differences: dict[str, list[str]]
) -> Iterator[Finding]:
    """Reject checkpoints whose tensors differ from the first one's in name, shape or dtype."""
    for name, texts in differences.items():
        unlisted = len(texts) - MAX_LISTED_DIFFERENCES
        listed = "; ".join(texts[:MAX_LISTED_DIFFERENCES])
        listed += f"; and {unlisted} more" if unlisted > 0 else ""
        yield _problem(
            f"{name}: not the same network as {checkpoints[0].name}, {len(texts)} tensors differ: "
            f"{listed}. Mix only checkpoints of one architecture, saved in one dtype"
        )


def check_duplicates(
    checkpoints: Sequence[Checkpoint], duplicates: Sequence[Sequence[int]]
) -> Iterator[Finding]:
    """Warn about checkpoints with equal weights."""
    for group in duplicates:
        names = _join_first_names([checkpoints[number].name for number in group])
        yield _warning(
            f"{names}: the same weights {len(group)} times; a soup counts them {len(group)} times: "
            "remove all but one"
        )


def check_split(checkpoints: Sequence[Checkpoint], agreement: SplitAgreement) -> Iterator[Finding]:
    """Reject different training splits; warn where a split is unknown."""
    records = {item.name: item.provenance.get("data") for item in checkpoints}
    if agreement == "unknown":
        names = _join_first_names([name for name, record in records.items() if not record])
        yield _warning(
            f"{names}: no record of the training samples, so no split is known to be fresh for all "
            "checkpoints. Select on samples that none of them was trained on"
        )
    if agreement == "different":
        texts: dict[tuple[str | None, str | None], str] = {}
        for name, record in records.items():
            if record:
                text = f"{name} on {record.get('name')}, {_describe_split(record)}"
                texts.setdefault(_split_digests(record), text)
        yield _problem(
            "trained on different splits, so no validation sample is fresh for all checkpoints; "
            f"got {'; '.join(texts.values())}; expected one split. Fine-tune all ingredients on "
            "one split (the same --data and --seed)"
        )


def check_statistics(checkpoints: Sequence[Checkpoint]) -> Iterator[Finding]:
    """Reject running statistics that are not finite, negative or never tracked."""
    for item in checkpoints:
        values = {name: item.tensors[name].double() for name in running_statistics(item)}
        yield from _check_statistics_values(item, values)
        yield from _check_batch_counters(item, values)


def _check_statistics_values(item: Checkpoint, values: dict[str, Tensor]) -> Iterator[Finding]:
    variances = {name: value for name, value in values.items() if name.endswith("running_var")}
    broken = [name for name, value in values.items() if not bool(value.isfinite().all())]
    broken += [name for name, value in variances.items() if bool((value < 0).any())]
    dead = [name for name, value in variances.items() if bool((value == 0).any())]
    if broken:
        yield _problem(
            f"{item.name}: {_join_first_names(broken)}: got NaN, infinity or a variance below 0, "
            "expected finite values and variances above 0; the network outputs NaN. "
            "Mix it with --buffers recalibrate, or save it again"
        )
    elif dead:
        yield _warning(
            f"{item.name}: {_join_first_names(dead)}: got variance 0 in a channel, expected above "
            "0; the channel is dead"
        )


def _check_batch_counters(item: Checkpoint, values: dict[str, Tensor]) -> Iterator[Finding]:
    untracked = [name for name in counter_names(item) if not bool(item.tensors[name].any())]
    initial = [
        name
        for name in untracked
        if _all_equal(values.get(name.removesuffix("num_batches_tracked") + "running_mean"), 0)
        and _all_equal(values.get(name.removesuffix("num_batches_tracked") + "running_var"), 1)
    ]
    if initial:
        yield _problem(
            f"{item.name}: {_join_first_names(initial)}: got 0 batches, mean 0 and variance 1 "
            "(never tracked), expected statistics of training; saving may have lost them. "
            "Mix it with --buffers recalibrate"
        )
    elif untracked:
        yield _warning(
            f"{item.name}: {_join_first_names(untracked)}: got 0 although the statistics are not "
            "the initial ones; they may have been copied in. If they belong to other weights, mix "
            "it with --buffers recalibrate"
        )


def check_constant_buffers(checkpoints: Sequence[Checkpoint]) -> Iterator[Finding]:
    """Warn where buffers differ that are not averaged but copied from the first checkpoint."""
    yield from map(_warning, describe_differing_constants(checkpoints))


def check_ancestor(
    checkpoints: Sequence[Checkpoint], geometry: Geometry, pairs: Sequence[Pair]
) -> Iterator[Finding]:
    """Warn if no common ancestor is known, its file is not available or of another network."""
    if geometry.base is not None or len(checkpoints) == 1:
        return
    ancestor = _recorded_ancestor(checkpoints)
    if ancestor is not None:
        reason, advice = "its file is not next to the checkpoints", "; pass it with --base"
        if common_ancestor(checkpoints) is not None:
            reason, advice = "it is another network", ""
        yield _warning(
            f"the records name a common ancestor, {ancestor}, but {reason}, so distances are "
            f"between weights, not between task vectors{advice}"
        )
        return
    yield _warning(
        "no common ancestor is known: soups of networks that were not fine-tuned from one "
        "checkpoint usually collapse; pass the ancestor with --base, and measure the loss between "
        "the checkpoints with --data"
    )
    yield from _check_cosines(checkpoints, pairs)


def _check_cosines(checkpoints: Sequence[Checkpoint], pairs: Sequence[Pair]) -> Iterator[Finding]:
    unrelated = [
        (pair.cosine, pair.a, pair.b)
        for pair in pairs
        if pair.cosine is not None and pair.cosine < MIN_WEIGHT_COSINE
    ]
    if unrelated:
        cosine, a, b = min(unrelated)
        yield _warning(
            f"{checkpoints[a].name} and {checkpoints[b].name}: the cosine of their weights is "
            f"{cosine:.2f}, expected above {MIN_WEIGHT_COSINE} for networks fine-tuned gently from "
            f"one checkpoint ({len(unrelated)} of {len(pairs)} pairs are below)"
        )


def check_curves(
    checkpoints: Sequence[Checkpoint], pairs: Sequence[Pair], data: Split
) -> Iterator[Finding]:
    """Reject pairs in different loss basins; warn about networks that guess and weak soups."""
    guessing: set[int] = set()
    for pair in pairs:
        if not pair.curves:
            continue
        clean = pair.curves[str(CLEAN)]
        for number, accuracy in ((pair.a, clean.accuracy[0]), (pair.b, clean.accuracy[-1])):
            if number not in guessing and _is_guessing(accuracy, data):
                guessing.add(number)
                yield _warning(
                    f"{checkpoints[number].name}: {accuracy:.1%} correct on {len(data)} samples of "
                    f"{data.name} is no better than guessing, so its barriers mean little; does it "
                    "need --normalize MEAN STD, or other data?"
                )
        names = f"{checkpoints[pair.a].name} and {checkpoints[pair.b].name}"
        yield from check_basin(names, clean, data.classes)
        yield from check_robust_drop(names, pair.curves)


def check_basin(names: str, clean: Curve, classes: int) -> Iterator[Finding]:
    """Reject a pair whose clean accuracy or loss breaks down between its ends."""
    barrier, drop = clean.relative_barrier(classes), clean.drop
    high = barrier > MAX_RELATIVE_BARRIER
    measured = (
        f"the clean loss between them rises by {clean.barrier:.2f} ({barrier:.0%} of the range up "
        f"to guessing) and clean accuracy falls {100 * drop:.0f} points below the line"
    )
    points = 100 * MAX_ACCURACY_DROP
    if math.isinf(barrier) or drop > MAX_ACCURACY_DROP or (high and drop > MAX_ACCURACY_DROP / 2):
        yield _problem(
            f"{names}: the pair does not share a basin: {measured}; expected at most "
            f"{points:.0f} points, or {points / 2:.0f} where the loss rises by more than "
            f"{MAX_RELATIVE_BARRIER:.0%}. Mix only networks fine-tuned from one checkpoint, or "
            "fine-tune with a lower learning rate or fewer epochs"
        )
    elif barrier > MAX_RELATIVE_BARRIER / 2 or drop > MAX_ACCURACY_DROP / 2:
        yield _warning(
            f"{names}: the pair hardly shares a basin: {measured}, expected below "
            f"{MAX_RELATIVE_BARRIER / 2:.0%} and {points / 2:.0f} points; --buffers recalibrate or "
            "coefficients by layer may help"
        )


def check_robust_drop(names: str, curves: dict[str, Curve]) -> Iterator[Finding]:
    """Warn where accuracy under attack breaks down between the ends of a pair."""
    for threat, curve in curves.items():
        if threat != str(CLEAN) and curve.drop > MAX_ACCURACY_DROP:
            yield _warning(
                f"{names}: under {threat} accuracy falls {100 * curve.drop:.0f} points below the "
                f"line between them, expected below {100 * MAX_ACCURACY_DROP:.0f}: their soups "
                "lose robustness; evaluate a soup (robustsoup search) before you use it"
            )


def _problem(text: str) -> Finding:
    return ("problem", text)


def _warning(text: str) -> Finding:
    return ("warning", text)


def _describe_tensor(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def _split_digests(record: dict[str, Any]) -> tuple[str | None, str | None]:
    return record.get("digest"), record.get("split_digest")


def _describe_split(record: dict[str, Any]) -> str:
    digest = record.get("split_digest") or "unnamed"
    if digest == "several":
        return "several splits"
    return f"seed {record.get('seed')} (split {digest[:8]})"


def _all_equal(values: Tensor | None, number: float) -> bool:
    return values is not None and bool((values == number).all())


def _recorded_ancestor(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Name the first parent that the records of all checkpoints share."""
    records = [item.provenance.get("parents", []) for item in checkpoints]
    shared = set.intersection(*({parent["digest"] for parent in parents} for parents in records))
    for parent in records[0]:
        if parent["digest"] in shared:
            return parent.get("file") or f"checkpoint {parent['digest'][:12]}"
    return None


def _is_guessing(accuracy: float, data: Split) -> bool:
    """Return whether an accuracy may be that of guessing; few samples cannot show this."""
    if len(data) < MIN_SAMPLES_TO_CALL_GUESSING:
        return False
    return Accuracy(round(accuracy * len(data)), len(data)).low <= 1 / data.classes


def _join_first_names(names: Sequence[str]) -> str:
    """Join the first three names and count the rest."""
    unlisted = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + unlisted

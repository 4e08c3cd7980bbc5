"""check: whether checkpoints can be mixed at all, before any work: one network, one split, sound statistics, one basin."""

import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.attacks import apgd_train
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split, to_float
from robustsoup.device import resolve_device
from robustsoup.diagnosis.barriers import ALONG, Curve, Pair, walk
from robustsoup.diagnosis.geometry import Geometry, measure
from robustsoup.errors import CheckpointError, RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.models.fit import check_fit
from robustsoup.progress import Progress
from robustsoup.soups.batchnorm import running_statistics
from robustsoup.soups.mixing import common_ancestor
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.adversarial_loss import objective_loss
from robustsoup.training.objectives import mixed

LOSS_SHARE = 0.5
"""A barrier above this share of log(classes) - (mean loss of the ends), what parts them from guessing, is high."""
POINTS = 0.10
"""A clean accuracy this far below the line between the ends parts two basins; so does half of it with a high barrier."""
UNRELATED = 0.9
"""A cosine of two networks' weights below which they do not look fine-tuned from one checkpoint. Seen on digits: 0.94 and more
where they were, with a learning rate up to 0.1, and 0.65 to 0.68 where not (BatchNorm weights near 1 keep it above 0)."""
LISTED = 10
BATCH = 128
PROBLEM, WARNING = "problem", "warning"

Finding = tuple[str, str]


@dataclass(frozen=True)
class RunningStatistics:
    """The running statistics of BatchNorm. layers: how many keep any.

    difference: the largest over layers and files of |s_i - mean s| / |scale|, as norms over the channels, with the mean over
    the files; scale is the root of the mean variance for a running mean, the mean variance for a variance.
    tensor, file: where that is; None for one file, and where nothing differs.
    """

    layers: int
    difference: float | None
    tensor: str | None
    file: str | None


@dataclass(frozen=True)
class Cost:
    """bytes: of every file's tensors; on_disk: of its file (None for one in memory); layers: parameter tensors.

    largest_layer: the name and the bytes of the largest parameter. step_seconds: one step of `learn` at a batch of 128 (APGD
    of 2 steps and one training pass in float32, without reading the ingredients), measured; None without data.
    """

    bytes: tuple[int, ...]
    on_disk: tuple[int | None, ...]
    layers: int
    largest_layer: tuple[str, int]
    step_seconds: float | None


@dataclass(frozen=True)
class Soupability:
    """What `check` found. names: of the files; differences: file -> all that differs from the first one.

    duplicates: files (by number) that hold the same weights. split: "same", "unknown" or "different".
    statistics, geometry: None where the files differ; pairs: all of them, in order, empty where the files differ.
    measured: how many of the pairs were walked along, on `samples` samples. findings: ("problem" | "warning", text).
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

    @property
    def problems(self) -> list[str]:
        """Why these checkpoints cannot be mixed."""
        return [text for kind, text in self.findings if kind == PROBLEM]

    @property
    def warnings(self) -> list[str]:
        """What makes mixing them doubtful."""
        return [text for kind, text in self.findings if kind == WARNING]

    @property
    def soupable(self) -> bool:
        """Whether nothing speaks against mixing them."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for json.dumps: numbers that are not finite become null."""
        content = asdict(self)
        del content["findings"]
        for entry, pair in zip(content["pairs"], self.pairs, strict=True):
            for key, curve in pair.curves.items():
                entry["curves"][key] |= {"t": ALONG, "barrier": curve.barrier, "drop": curve.drop}
        return _finite(
            {
                **content,
                "soupable": self.soupable,
                "problems": self.problems,
                "warnings": self.warnings,
            }
        )


def check(
    checkpoints: Sequence[Checkpoint | str | os.PathLike],
    *,
    data: Split | None = None,
    threat: ThreatModel | str = "clean",
    base: Checkpoint | str | os.PathLike | None = None,
    samples: int = 256,
    network: nn.Module | None = None,
    device: str = "auto",
    pairs: int = 15,
    on_progress: Progress | None = None,
) -> Soupability:
    """Say whether checkpoints can be mixed, and why not: what they are, how far apart, what lies between them.

    Without data only the files are read. With data every pair (the `pairs` farthest apart, if there are more) is mixed at t = 0,
    1/4, 1/2, 3/4 and 1 with averaged statistics, and judged in float32 and eval mode on the first `samples` samples (all, if
    there are fewer): clean, and under `threat` at the points of highest loss that APGD finds in 10 steps. Any split will do,
    as nothing is selected on it.

    A pair is a problem if clean accuracy falls more than 10 points below the line between its ends, or more than 5 while the
    clean barrier is above half of log(classes) - (mean loss of its ends); more than 5 points alone, or a barrier above a
    quarter, is a warning. A barrier alone is no problem, as a soup of a confident and an unsure network is unsure and right.
    Robust accuracy 10 points below the line is a warning. Seen on digits (resnet9 of width 4 and 8, 256 samples of val):
    fine-tuned from one robust network for 2 epochs at up to 0.1, clean to Linf 96/255, barriers of 0 to 22 % and at most 3
    points; trained apart, 98 to 105 % and 63 to 87 points; fine-tuned for 4 epochs at 0.3 and 1.0 from one standard
    network, one clean and one at Linf 96/255, 71 to 103 % and 26 to 55 points.
    How far running statistics differ is told, not judged: 87 to 96 % for networks trained apart, 34 to 170 % for such that
    mix well.

    base: what they were fine-tuned from; else the common ancestor that their records name, if its file lies beside them.
    network: the module to run, where the files do not say what they are; it is not changed.
    on_progress(done, total, figures) counts the networks that are judged.

    Raises CheckpointError for no file or a broken one, IngredientMismatch for a base of another network, ModelError for
    data that the network does not take, RequestError for fewer than 1 sample or pair.
    Source of the barrier: Frankle et al. 2020, arXiv:1912.05671; of task vectors: Ilharco et al. 2023, arXiv:2212.04089.
    """
    threat = ThreatModel.parse(threat)
    if samples < 1 or pairs < 1:
        raise RequestError(
            f"check: got samples {samples}, pairs {pairs}, expected at least 1 of each"
        )
    files = [_described(Checkpoint.open(item), network) for item in checkpoints]
    if not files:
        raise CheckpointError(
            "check: got no checkpoint, expected at least one; give the files that are to be mixed"
        )
    differences = {
        item.name: found for item in files[1:] if (found := _differences(files[0], item))
    }
    duplicates = _duplicates(files)
    split = _split_of(files)
    findings = [
        *_judge_structure(files, differences),
        *_judge_duplicates(files, duplicates),
        *_judge_split(files, split),
        *_judge_statistics(files),
    ]
    spread, geometry, found, measured, seconds = None, None, [], 0, None
    if not differences:
        spread = _statistics(files)
        ancestor = (
            _described(Checkpoint.open(base), network) if base is not None else _ancestor(files)
        )
        geometry, found = measure(files, ancestor)
        findings += [*_judge_constants(files), *_judge_geometry(files, geometry, found)]
        if data is not None:
            model = _runnable(files[0], network, data, device)
            data = data.first(min(samples, len(data)))
            found, measured = walk(files, found, pairs, model, data, threat, on_progress)
            findings += _judge_curves(files, found, data)
            seconds = _step_seconds(model, data, threat)
    return Soupability(
        tuple(item.name for item in files),
        differences,
        duplicates,
        split,
        spread,
        geometry,
        found,
        measured,
        len(data) if measured else None,
        _cost(files, seconds),
        findings,
    )


# what the files hold


def _described(item: Checkpoint, network: nn.Module | None) -> Checkpoint:
    """The checkpoint under the network's own names, with its parameters told from its buffers."""
    if network is None:
        return item
    return item.described_by(network)


def _differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    """All that differs in names, shapes and dtypes: "name: what"."""
    found = []
    for name in dict.fromkeys([*first.tensors, *other.tensors]):
        got, expected = (_kind(item.tensors.get(name)) for item in (other, first))
        if got != expected:
            found.append(f"{name}: got {got}, expected {expected}")
    return found


def _kind(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def _judge_structure(
    files: Sequence[Checkpoint], differences: dict[str, list[str]]
) -> Iterator[Finding]:
    if len(files) == 1:
        yield _warning(
            f"{files[0].name}: one file alone: there is nothing to mix; give two or more"
        )
    for name, found in differences.items():
        more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
        yield _problem(
            f"{name}: not the same network as {files[0].name}, {len(found)} tensors differ: {'; '.join(found[:LISTED])}{more}. "
            "Mix only checkpoints of one architecture, saved in one dtype"
        )


def _duplicates(files: Sequence[Checkpoint]) -> list[list[int]]:
    by_digest: dict[str, list[int]] = {}
    for number, item in enumerate(files):
        by_digest.setdefault(item.digest, []).append(number)
    return [same for same in by_digest.values() if len(same) > 1]


def _judge_duplicates(
    files: Sequence[Checkpoint], duplicates: list[list[int]]
) -> Iterator[Finding]:
    for same in duplicates:
        named = _some([files[number].name for number in same])
        yield _warning(
            f"{named}: the same weights {len(same)} times; a soup would count them so often; leave all but one out"
        )


def _split_of(files: Sequence[Checkpoint]) -> str:
    """ "same", "unknown" (a file has no record) or "different"."""
    records = [item.provenance.get("data") for item in files]
    splits = {_split_key(record) for record in records if record}
    if len(splits) > 1 or any(split == "several" for _, split in splits):
        return "different"
    return "same" if all(records) else "unknown"


def _split_key(record: dict[str, Any]) -> tuple[str | None, str | None]:
    return record.get("digest"), record.get("split_digest")


def _judge_split(files: Sequence[Checkpoint], split: str) -> Iterator[Finding]:
    records = {item.name: item.provenance.get("data") for item in files}
    if split == "unknown":
        without = [name for name, record in records.items() if not record]
        yield _warning(
            f"{_some(without)}: no record of the samples they were trained on; no split can be known to be fresh to all. "
            "Select on samples that you know none of them saw"
        )
    if split == "different":
        known = {}
        for name, record in records.items():
            if record:
                known.setdefault(
                    _split_key(record), f"{name} on {record.get('name')}, {_split_words(record)}"
                )
        yield _problem(
            f"trained on different splits: no validation sample is fresh to all; got {'; '.join(known.values())}; "
            "expected one. Fine-tune all ingredients on one split (one --data and one --seed)"
        )


def _split_words(record: dict[str, Any]) -> str:
    digest = record.get("split_digest") or "unnamed"
    return (
        "several splits"
        if digest == "several"
        else f"seed {record.get('seed')} (split {digest[:8]})"
    )


def _judge_constants(files: Sequence[Checkpoint]) -> Iterator[Finding]:
    """What is neither mixed nor a running statistic comes from the first file alone."""
    first = files[0]
    kept = set(first.tensors) - {
        *first.parameters,
        *first.tied,
        *_running(first),
        *_counters(first),
    }
    for item in files[1:]:
        unequal = sorted(
            name for name in kept if not torch.equal(first.tensors[name], item.tensors[name])
        )
        if unequal:
            yield _warning(
                f"{item.name}: {_some(unequal)} differs from that of {first.name}; it is not averaged, so a soup has the first "
                "file's. If it normalises the input, the networks expect different inputs"
            )
        theirs, ours = item.provenance.get("network"), first.provenance.get("network")
        if theirs and ours and theirs.get("normalize") != ours.get("normalize"):
            yield _warning(
                f"{item.name}: normalises its input by {theirs.get('normalize')}, {first.name} by {ours.get('normalize')}; "
                "a soup does as the first file; fine-tune all ingredients with one normalisation"
            )


# running statistics


def _running(item: Checkpoint) -> list[str]:
    """Names of the running means and variances."""
    return list(running_statistics(item))


def _counters(item: Checkpoint) -> list[str]:
    return [name for name in item.tensors if name.rpartition(".")[2] == "num_batches_tracked"]


def _judge_statistics(files: Sequence[Checkpoint]) -> Iterator[Finding]:
    for item in files:
        values = {name: item.tensors[name].double() for name in _running(item)}
        variances = {name: value for name, value in values.items() if name.endswith("running_var")}
        broken = [name for name, value in values.items() if not bool(value.isfinite().all())]
        broken += [name for name, value in variances.items() if bool((value < 0).any())]
        if broken:
            yield _problem(
                f"{item.name}: {_some(broken)}: got NaN, infinity or a variance below 0, expected finite and above 0; "
                "the network answers NaN. Mix it with --buffers recalibrate, or save it anew"
            )
        elif dead := [name for name, value in variances.items() if bool((value == 0).any())]:
            yield _warning(
                f"{item.name}: {_some(dead)}: variance 0 in a channel, which is dead; expected above 0"
            )
        yield from _judge_counters(item, values)


def _judge_counters(item: Checkpoint, values: dict[str, Tensor]) -> Iterator[Finding]:
    never = [name for name in _counters(item) if not bool(item.tensors[name].any())]
    start = {"running_mean": 0, "running_var": 1}
    initial = [
        name
        for name in never
        if all(
            (kept := values.get(name.removesuffix("num_batches_tracked") + k)) is not None
            and bool((kept == v).all())
            for k, v in start.items()
        )
    ]
    if initial:
        yield _problem(
            f"{item.name}: {_some(initial)}: got 0, with mean 0 and variance 1 (never tracked), expected the "
            "statistics of training. Were they lost on saving? Mix it with --buffers recalibrate"
        )
    elif never:
        yield _warning(
            f"{item.name}: {_some(never)} is 0 though the statistics are not the initial ones; were they copied in? "
            "If they are of other weights, mix it with --buffers recalibrate"
        )


def _statistics(files: Sequence[Checkpoint]) -> RunningStatistics:
    names = set(_running(files[0]))
    layers = [
        name.removesuffix("running_var")
        for name in _running(files[0])
        if name.endswith("running_var")
    ]
    layers = [layer for layer in layers if layer + "running_mean" in names]
    worst: tuple[float, str | None, str | None] = (0.0, None, None)
    for layer in layers:
        means, variances = (
            torch.stack([item.tensors[layer + kind].double() for item in files])
            for kind in ("running_mean", "running_var")
        )
        scale = variances.mean(0)
        for name, values, norm in (
            ("running_mean", means, scale.clamp(min=0).sqrt().norm()),
            ("running_var", variances, scale.norm()),
        ):
            apart = (values - values.mean(0)).norm(dim=1) / norm.clamp(
                min=torch.finfo(torch.float64).tiny
            )
            if float(apart.max()) > worst[0]:
                worst = float(apart.max()), layer + name, files[int(apart.argmax())].name
    return RunningStatistics(
        len(layers), worst[0] if layers and len(files) > 1 else None, *worst[1:]
    )


# distances


def _ancestor(files: Sequence[Checkpoint]) -> Checkpoint | None:
    """The common ancestor, unless it is another network, as one with other classes would be."""
    found = common_ancestor(files)
    return found if found is not None and not _differences(files[0], found) else None


def _judge_geometry(
    files: Sequence[Checkpoint], geometry: Geometry, pairs: Sequence[Pair]
) -> Iterator[Finding]:
    if geometry.base is not None or len(files) == 1:
        return
    shared = set.intersection(
        *({parent["digest"] for parent in i.provenance.get("parents", [])} for i in files)
    )
    if shared:
        parents = files[0].provenance["parents"]
        file = next(
            p.get("file") or f"checkpoint {p['digest'][:12]}"
            for p in parents
            if p["digest"] in shared
        )
        yield _warning(
            f"the records name one common ancestor, {file}, but no such network lies beside them: distances are of the weights, "
            "not of what fine-tuning changed; give it (--base)"
        )
        return
    yield _warning(
        "no common ancestor is known: soups of networks that were not fine-tuned from one checkpoint usually collapse; "
        "give it (--base), and measure what lies between them (--data)"
    )
    far = [pair for pair in pairs if pair.cosine is not None and pair.cosine < UNRELATED]
    if far:
        pair = min(far, key=lambda pair: pair.cosine)
        yield _warning(
            f"{files[pair.a].name} and {files[pair.b].name}: the cosine of their weights is {pair.cosine:.2f}, expected above "
            f"{UNRELATED} of networks fine-tuned gently from one checkpoint ({len(far)} of {len(pairs)} pairs are below)"
        )


# what lies between


def _runnable(first: Checkpoint, network: nn.Module | None, data: Split, device: str) -> nn.Module:
    model = copy.deepcopy(network) if network is not None else first.network()
    first.load_into(model)
    check_fit(model, data)
    return model.to(resolve_device(device), memory_format=torch.channels_last)


def _judge_curves(
    files: Sequence[Checkpoint], pairs: Sequence[Pair], data: Split
) -> Iterator[Finding]:
    guessing = set()
    for pair in pairs:
        if not pair.curves:
            continue
        clean = pair.curves[str(CLEAN)]
        for number, accuracy in ((pair.a, clean.accuracy[0]), (pair.b, clean.accuracy[-1])):
            if _guesses(accuracy, data) and number not in guessing:
                guessing.add(number)
                yield _warning(
                    f"{files[number].name}: right on {accuracy:.1%} of {len(data)} samples of {data.name}, which is guessing; "
                    "does it expect --normalize MEAN STD, or is this not its data? Its barriers say little"
                )
        yield from _judge_pair(
            f"{files[pair.a].name} and {files[pair.b].name}", pair.curves, data.classes
        )


def _guesses(accuracy: float, data: Split) -> bool:
    return (
        len(data) >= 50 and Accuracy(round(accuracy * len(data)), len(data)).low <= 1 / data.classes
    )


def _judge_pair(names: str, curves: dict[str, Curve], classes: int) -> Iterator[Finding]:
    clean = curves[str(CLEAN)]
    share = clean.share(classes)
    apart = (
        math.isinf(share) or clean.drop > POINTS or (share > LOSS_SHARE and clean.drop > POINTS / 2)
    )
    seen = (
        f"the clean loss between them rises by {clean.barrier:.2f} ({share:.0%} of what parts them from guessing) and clean "
        f"accuracy falls {100 * clean.drop:.0f} points below the line"
    )
    if apart:
        yield _problem(
            f"{names}: the pair does not share a basin: {seen}; expected at most {100 * POINTS:.0f} points, "
            f"{100 * POINTS / 2:.0f} where the loss rises by more than {LOSS_SHARE:.0%}. "
            "Mix only networks fine-tuned from one checkpoint, at a lower learning rate or for fewer epochs"
        )
    elif share > LOSS_SHARE / 2 or clean.drop > POINTS / 2:
        yield _warning(
            f"{names}: nearly in two basins: {seen}, expected below {LOSS_SHARE / 2:.0%} and {100 * POINTS / 2:.0f} points; "
            "--buffers recalibrate or coefficients by layer may help"
        )
    for key, curve in curves.items():
        if key != str(CLEAN) and curve.drop > POINTS:
            yield _warning(
                f"{names}: under {key} accuracy falls {100 * curve.drop:.0f} points below the line between them, expected below "
                f"{100 * POINTS:.0f}: their soups lose robustness; judge them (robustsoup search) before you trust one"
            )


# cost


def _cost(files: Sequence[Checkpoint], seconds: float | None) -> Cost:
    parameters = {
        name: files[0].tensors[name].nbytes
        for name in files[0].parameters
        if name in files[0].tensors
    }
    largest = max(parameters.items(), key=lambda entry: entry[1], default=("", 0))
    return Cost(
        tuple(sum(tensor.nbytes for tensor in item.tensors.values()) for item in files),
        tuple(
            os.path.getsize(item.path) if item.path and item.path.is_file() else None
            for item in files
        ),
        len(parameters),
        largest,
        seconds,
    )


def _step_seconds(model: nn.Module, data: Split, threat: ThreatModel) -> float:
    """Seconds of one step of `learn` at a batch of 128: the median of up to three, after one that warms up."""
    model = copy.deepcopy(model)
    data = data.first(min(BATCH, len(data))).to(next(model.parameters()).device)
    x, y = to_float(data.images).contiguous(memory_format=torch.channels_last), data.labels
    times_over = math.ceil(BATCH / len(x))
    x, y = x.repeat(times_over, 1, 1, 1)[:BATCH], y.repeat(times_over)[:BATCH]
    threat = ThreatModel("Linf", 8 / 255) if threat.is_clean else threat
    times: list[float] = []
    while len(times) < 2 or (len(times) < 4 and sum(times) < 5):
        started = time.perf_counter()
        x_adv = apgd_train(model, x, y, threat, steps=2)
        loss = objective_loss(model, x, x_adv, y, mixed(0), "float32")
        torch.autograd.grad(
            loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _problem(text: str) -> Finding:
    return PROBLEM, text


def _warning(text: str) -> Finding:
    return WARNING, text


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

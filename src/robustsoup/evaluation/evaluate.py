"""evaluate: clean and robust verdicts of one network, sample by sample."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustsoup import distributed
from robustsoup.attacks.attempts import AttackProgress
from robustsoup.attacks.forward import frozen_eval, predict_logits
from robustsoup.attacks.losses import logit_margin
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.data import Split, SplitLike, as_split, to_float
from robustsoup.data.corruptions import CorruptionPart, Corruptions, open_corruptions
from robustsoup.errors import Diverged, ModelError
from robustsoup.evaluation.attackers import Target
from robustsoup.evaluation.doubts import (
    certify_points,
    join_certificates,
    warn_of_attacks,
    warn_of_flat_logits,
    warn_of_masking,
    warn_of_outputs,
    warn_of_points_outside,
)
from robustsoup.evaluation.masking import check_masking
from robustsoup.evaluation.normalization import GOOD_ACCURACY, find_better_inputs
from robustsoup.evaluation.request import CheckedRequest, check_request
from robustsoup.evaluation.reuse import (
    POOL,
    Reuse,
    copy_verdicts,
    pool_points,
    try_pool,
)
from robustsoup.evaluation.sharing import (
    Share,
    SharedState,
    check_same_request,
    hide_samples,
    predict_shared,
)
from robustsoup.evaluation.shift import measure_shift
from robustsoup.evaluation.two_phase import SUBSET_KEY, subset_rows
from robustsoup.evaluation.verdicts import (
    CLEAN_KEY,
    UNION_KEY,
    Evaluation,
    Record,
    Verdicts,
    as_evaluations,
)
from robustsoup.gradients import gradients_enabled
from robustsoup.progress import Progress
from robustsoup.seeding import global_random_state
from robustsoup.settings import AttackSettings, accepts_settings, make_settings, plain_number
from robustsoup.threats import ThreatModel

FEWEST_TO_DOUBT = 50
"""Fewer samples say nothing about a network that is near chance."""
BETTER_INPUTS = "better_inputs"
"""Entry of a record: the warning that another normalisation of the inputs is clearly better."""


@accepts_settings(AttackSettings)
@gradients_enabled()
def evaluate(
    network: nn.Module | CheckpointLike,
    data: SplitLike,
    threats: Sequence[ThreatModel | str] = (),
    settings: AttackSettings | None = None,
    *,
    samples: int | None = None,
    device: str = "auto",
    keep_points: bool = False,
    pool: Sequence[Evaluation] = (),
    others: Sequence[Evaluation] = (),
    after: Evaluation | None = None,
    subset: int | None = None,
    shift: str | os.PathLike[str] | None = None,
    shift_part: CorruptionPart = "all",
    state_path: str | os.PathLike[str] | None = None,
    keep_state: bool = False,
    on_progress: Progress | None = None,
    **changes: Any,
) -> Evaluation:
    """Evaluate one network on a split, without an attack and under each threat model.

    The network is evaluated in eval mode; a module is left unchanged. A sample that is wrong
    without an attack counts as broken and is not attacked. Every verdict is computed in float32,
    and depends only on the seed, the sample's id and the pass shape. The record holds the
    protocol, a certificate that every point lies in the ball and the box (computed in float64),
    the findings of the masking check, and warnings. The masking check looks for gradients that
    mislead the attack; it takes at most 6 % of the attack's passes and never changes a verdict.

    Args:
        network: Module, checkpoint or path.
        data: Split to evaluate on, or your own samples: a pair (images, labels) of tensors or
            arrays, or a data set of PyTorch; see `Split.from_tensors`.
        threats: Threat models to attack with, one after the other; clean ones add nothing.
        settings: The attack; AttackSettings() if None.
        samples: Number of samples to evaluate on, the first of the split (of your own samples, the
            first of a fixed shuffle, whose rows `ids` names); all in their order if None.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        keep_points: Keep the adversarial images, for `pool`; `after` must have kept its own.
        pool: Evaluations of other networks on the same samples, with points; these points are
            tried on top of the attack.
        others: Evaluations of other networks on the same samples, with points; only the masking
            check tries these points.
        after: Earlier evaluation of the same network on the same samples. Its clean predictions
            are reused, samples that it broke stay broken, and samples that survived an identical
            attack are not attacked again.
        subset: Attack this many samples alone, the first of a random order that depends on the
            attack's seed and the samples' ids. For the others stand the verdicts of `after`, else
            those without an attack. Accuracies under attack are then estimates, see `two_phase`,
            and record["subset"] holds what the attack added.
        shift: Folder of corrupted copies of the test set in the format of CIFAR-10-C (labels.npy
            and one .npy file for each corruption, five severities); accuracy["shift"] is then
            the clean accuracy on them, on the first samples of each severity, and
            record["shift"] holds that on each.
        shift_part: Copies of which images: "all"; "select", every second one from the first on,
            to select soups by; "report", the others, to report the chosen one on; "search" and
            "confirm", two of three and the third of the selecting ones, if finalists are
            confirmed.
        state_path: File for the progress so far; a killed evaluation resumes from it.
        keep_state: Leave this file when the evaluation is complete, so that nothing is lost until
            the caller has saved the result.
        on_progress: Called as on_progress(done, total, figures); counts samples times
            (1 + number of threats), and corrupted copies.
        **changes: Fields of AttackSettings, which override `settings`.

    Returns:
        Verdicts for each sample, with the record.

    Raises:
        RequestError: For invalid settings, before any work.
        ModelError: If the network does not fit the data.
        Diverged: If the clean logits hold NaN or infinity.
    """
    request = check_request(
        network,
        as_split(data, "evaluate").first(samples),
        threats,
        make_settings(AttackSettings, settings, changes),
        reuse=_parse_reuse(pool, after, others, keep_points=keep_points, subset=subset),
        device=device,
    )
    corruptions = None if shift is None else open_corruptions(shift, request.data, shift_part)
    check_same_request(request)
    saved = SharedState(state_path, request.fingerprint() if state_path is not None else "")
    started = time.perf_counter()
    with frozen_eval(request.model):
        clean = _predict_clean(request)
        progress = _EvaluationProgress(request, clean, corruptions, on_progress)
        progress.report_clean()
        attacked = _attack_with_threats(request, clean, saved, progress)
        shifted: Record = {}
        if corruptions is not None:
            saved.save(attacked.outcomes)  # a kill from here on must not lose the attack
            shifted["shift"] = measure_shift(request, corruptions, progress.report_shift)
        hint = _doubt_inputs(request, clean)
    verdicts = {
        name: _build_verdicts(outcome, clean) for name, outcome in attacked.outcomes.items()
    }
    record = _make_record(request, clean, attacked, time.perf_counter() - started)
    record |= shifted
    if hint is not None:
        record |= {BETTER_INPUTS: hint, "warnings": [hint, *record["warnings"]]}
    evaluation = Evaluation(
        request.data.ids.cpu(), clean.labels, clean.prediction, clean.margin, verdicts, record
    )
    if subset is not None:
        record[SUBSET_KEY] = _describe_subset(request, evaluation)
    if not keep_state:
        saved.clear()
    return evaluation


def _parse_reuse(
    pool: Sequence[Evaluation],
    after: Evaluation | None,
    others: Sequence[Evaluation],
    *,
    keep_points: bool,
    subset: int | None,
) -> Reuse:
    """Return the work shared with other evaluations, after a check of its types."""
    if after is not None:
        as_evaluations([after], "after")
    return Reuse(
        keep_points,
        as_evaluations(pool, "pool"),
        after,
        plain_number(subset),
        as_evaluations(others, "others"),
    )


@dataclass(frozen=True)
class AttackedPart:
    """What the attack on a part of an evaluation's samples found.

    Attributes:
        outcomes: Snapshots of the outcome for each threat model, for the samples of the part.
        fingerprint: Identifies the evaluation, which resumes from all of its parts together.
    """

    outcomes: dict[str, dict[str, Tensor]]
    fingerprint: str


def attack_part(
    network: nn.Module | CheckpointLike,
    data: SplitLike,
    threats: Sequence[ThreatModel | str],
    settings: AttackSettings,
    rows: range,
    *,
    keep_points: bool = False,
    device: str = "auto",
    state_path: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> AttackedPart:
    """Attack a part of the samples of an evaluation, for another process to evaluate them all.

    Args:
        network: As for `evaluate`.
        data: All samples of the evaluation.
        threats: As for `evaluate`.
        settings: The attack, which must take each sample by itself.
        rows: The samples of the part.
        keep_points: As for `evaluate`.
        device: As for `evaluate`.
        state_path: File for the progress so far, from which a killed call resumes; it stays.
        on_progress: As for `evaluate`, for the samples of the part.
    """
    whole = check_request(
        network,
        as_split(data, "evaluate"),
        threats,
        settings,
        reuse=Reuse(keep_points, (), None, None),
        device=device,
    )
    taken = torch.zeros(len(whole.data), dtype=torch.bool)
    taken[rows.start : rows.stop] = True
    unchecked = replace(whole.settings, masking_check=False)  # the whole is checked
    request = replace(whole, data=whole.data.take(taken), settings=unchecked)
    saved = SharedState(state_path, request.fingerprint() if state_path is not None else "")
    with frozen_eval(request.model):
        clean = _predict_clean(request)
        progress = _EvaluationProgress(request, clean, None, on_progress)
        progress.report_clean()
        attacked = _attack_with_threats(request, clean, saved, progress)
    snapshots = {name: outcome.snapshot() for name, outcome in attacked.outcomes.items()}
    return AttackedPart(snapshots, whole.fingerprint())


@dataclass(frozen=True)
class _CleanPass:
    """Predictions without an attack, for n samples, on the CPU.

    Attributes:
        labels, prediction: (n,) int64.
        margin: (n,) float32, the label's logit minus the largest other logit.
        logits: (n, classes); None if the predictions of an earlier evaluation are reused.
        call_difference: Relative difference between two calls; None if it was not measured.
        draws_numbers: Whether the network drew random numbers.
    """

    labels: Tensor
    prediction: Tensor
    margin: Tensor
    logits: Tensor | None = None
    call_difference: float | None = None
    draws_numbers: bool = False

    @property
    def correct(self) -> Tensor:
        """(n,) bool, correct without an attack."""
        return self.prediction == self.labels


def _predict_clean(request: CheckedRequest) -> _CleanPass:
    """Predict without an attack, or reuse the predictions of an earlier evaluation."""
    data, after = request.data, request.reuse.after
    n, labels = len(data), data.labels.cpu()
    if after is not None and not request.needs_logits():
        return _CleanPass(labels, after.prediction[:n], after.margin[:n])
    model, size, device = request.model, request.pass_size, request.device
    state = global_random_state(device)
    logits = predict_shared(model, request.fetch, n, size, device)
    draws_numbers = global_random_state(device) != state
    if not bool(logits.isfinite().all()):
        raise Diverged(
            "evaluate: the network's logits hold NaN or infinity; "
            "its weights or statistics are broken"
        )
    repeated = predict_logits(model, request.fetch, min(n, size), size, device)
    change = (repeated - logits[: len(repeated)]).abs().max()
    relative_change = float(change / logits.abs().max().clamp(min=1e-6))
    margin = logit_margin(logits, labels).float()
    return _CleanPass(labels, logits.argmax(1), margin, logits, relative_change, draws_numbers)


def _doubt_inputs(request: CheckedRequest, clean: _CleanPass) -> str | None:
    """Return what to change about the normalisation of the inputs, if that clearly helps."""
    hits, n = int(clean.correct.sum()), len(request.data)
    if request.reuse.after is not None or n < FEWEST_TO_DOUBT or hits >= GOOD_ACCURACY * n:
        return None
    return find_better_inputs(request.model, request.data, request.network_settings)


class _EvaluationProgress:
    """Reports progress in samples times (1 + number of threats), and in corrupted copies."""

    def __init__(
        self,
        request: CheckedRequest,
        clean: _CleanPass,
        corruptions: Corruptions | None,
        on_progress: Progress | None,
    ) -> None:
        self.n = len(request.data)
        self.attacked = self.n * (1 + len(request.threats))
        copies = 0 if corruptions is None else corruptions.count_copies(request.data)
        self.total = self.attacked + copies
        self.wrong = self.n - int(clean.correct.sum())
        self.figures = f"clean {float(clean.correct.float().mean()):.1%}"
        self.on_progress = on_progress

    def report_clean(self) -> None:
        """Report that the clean pass is done."""
        if self.on_progress is not None:
            self.on_progress(self.n, self.total, self.figures)

    def report_attack(self, number: int, done: int, total: int) -> None:
        """Report threat `number`, of which this rank has attacked `done` of `total` parts."""
        if self.on_progress is not None:
            settled = (self.n - self.wrong) * done // max(total, 1)
            self.on_progress((number + 1) * self.n + self.wrong + settled, self.total, self.figures)

    def report_shift(self, copies: int) -> None:
        """Report how many corrupted copies are done."""
        if self.on_progress is not None:
            self.on_progress(self.attacked + copies, self.total, self.figures)


@dataclass(frozen=True)
class _Attacked:
    """The results of the attacks, by the threat model as text.

    Attributes:
        outcomes: The outcome for each threat model.
        masking: The findings of the masking check; empty without the check.
    """

    outcomes: dict[str, Outcome]
    masking: dict[str, Record]


def _attack_with_threats(
    request: CheckedRequest,
    clean: _CleanPass,
    saved: SharedState,
    progress: _EvaluationProgress,
) -> _Attacked:
    """Attack with each threat model in turn, resuming from the saved state."""
    stored = saved.load()
    samples = _target_samples(request, clean)
    target = Target(request.model, samples, request.device, request.pass_size)
    outcomes: dict[str, Outcome] = {}
    masking: dict[str, Record] = {}
    try:
        for number, threat in enumerate(request.threats):
            with saved.refuse_malformed():
                outcome = _start_outcome(request, threat, stored.get(str(threat)))
            outcomes[str(threat)] = outcome
            if request.reuse.pool:
                try_pool(
                    target,
                    threat,
                    pool_points(request.reuse.pool, threat),
                    outcome,
                    attempts=len(request.attacker.attempts),
                    by=request.broken_by.index(POOL) - 1,
                )
            share = Share(
                samples,
                outcome,
                attempts=len(request.attacker.attempts),
                together=request.attacker.together,
            )
            poll = _make_poll(number, outcomes, saved, progress)
            request.attacker.attack(replace(target, samples=share.samples), threat, outcome, poll)
            share.merge(outcome)
            if request.checks_masking:
                masking[str(threat)] = _check_masking(request, target, threat, outcome)
    except BaseException:
        saved.save(outcomes)
        raise
    return _Attacked(outcomes, masking)


def _check_masking(
    request: CheckedRequest, target: Target, threat: ThreatModel, outcome: Outcome
) -> Record:
    """Check for masked gradients, or copy the check of an identical attack."""
    earlier = request.find_masking_check(threat)
    if earlier is not None:
        return earlier
    return distributed.from_first(
        lambda: check_masking(
            target,
            threat,
            request.settings,
            outcome,
            attack_passes=request.attacker.count_passes(target.samples.correct, outcome),
            others=pool_points(request.reuse.others, threat),
        )
    )


def _target_samples(request: CheckedRequest, clean: _CleanPass) -> AttackedSamples:
    logits = clean.logits
    if logits is None:  # only their argmax is used
        logits = functional.one_hot(clean.prediction, request.data.classes).float()
    ids, reuse = request.data.ids.cpu(), request.reuse
    samples = AttackedSamples(request.fetch, clean.labels, ids, logits)
    if reuse.subset is None:
        return samples
    return hide_samples(samples, ~subset_rows(ids, reuse.subset, seed=request.settings.seed))


def _start_outcome(
    request: CheckedRequest, threat: ThreatModel, state: dict[str, Tensor] | None
) -> Outcome:
    """Return an outcome from the saved state, from an earlier evaluation, or blank."""
    data, reuse, attempts = request.data, request.reuse, len(request.attacker.attempts)
    images = to_float(data.images.cpu()) if reuse.keep_points else None
    outcome = Outcome.blank(len(data), images)
    if state is not None:
        outcome.restore(state, attempts)
    elif reuse.after is not None:
        copy_verdicts(reuse.after, threat, outcome, protocol=request.protocol(), attempts=attempts)
    return outcome


def _make_poll(
    number: int,
    outcomes: Mapping[str, Outcome],
    saved: SharedState,
    progress: _EvaluationProgress,
) -> AttackProgress:
    """Return a callback for threat `number` that reports progress and saves the state when due."""

    def poll(done: int, total: int) -> None:
        progress.report_attack(number, done, total)
        if saved.due():
            saved.save(outcomes)

    return poll


def _build_verdicts(outcome: Outcome, clean: _CleanPass) -> Verdicts:
    correct = clean.correct
    return Verdicts(
        robust=correct & ~outcome.broken,
        by=torch.where(correct, torch.where(outcome.broken, outcome.by + 1, -1), 0),
        step=torch.where(correct, outcome.step, 0),
        norm=outcome.norm,
        margin=torch.where(correct, outcome.margin, clean.margin),
        x_adv=outcome.x_adv,
    )


def _make_record(
    request: CheckedRequest,
    clean: _CleanPass,
    attacked: _Attacked,
    seconds: float,
) -> Record:
    outcomes = attacked.outcomes
    certificate, after = certify_points(request.threats, outcomes), request.reuse.after
    if after is not None and request.continues(after):
        certificate = join_certificates(certificate, after.record.get("certificate", {}))
    warnings = [
        *request.warnings,
        *warn_of_outputs(clean.logits, clean.call_difference, draws_numbers=clean.draws_numbers),
        *(warn_of_flat_logits(clean.logits, request.settings) if request.threats else ()),
        *warn_of_attacks(
            list(outcomes.values()), attacked.masking, request.settings, request.data.classes
        ),
        *warn_of_masking(attacked.masking, request.settings, request.data.classes),
        *warn_of_points_outside(certificate),
        *(after.warnings if after is not None else []),
    ]
    record = {
        "kind": "evaluation",
        "split": request.data.name,
        "data": request.data.record,
        "samples": len(request.data),
        "threats": [str(threat) for threat in request.threats],
        **request.protocol(),
        "precision": "float32",
        "device": request.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "checkpoint": request.checkpoint_digest,
        "certificate": certificate,
        "warnings": list(dict.fromkeys(warnings)),
    }
    if distributed.world() > 1:
        record["processes"] = distributed.world()
    if attacked.masking:
        record["masking_check"] = attacked.masking
    return record


def _describe_subset(request: CheckedRequest, evaluation: Evaluation) -> Record:
    """Return the size of the subset, its seed, and the survivors that the attack broke in it."""
    after, hits = request.reuse.after, evaluation.hits()
    measures = [name for name in hits if name in evaluation.threats or name == UNION_KEY]
    before = dict.fromkeys(measures, hits[CLEAN_KEY]) if after is None else after.hits()
    earlier = {} if after is None else after.record.get(SUBSET_KEY, {"missed": {}})["missed"]
    return {
        "samples": request.reuse.subset,
        "seed": request.settings.seed,
        "missed": {
            name: int((before[name] & ~hits[name]).sum()) + earlier.get(name, 0)
            for name in measures
        },
    }


@dataclass(frozen=True)
class Doubt:
    """A reason to doubt that a network fits the data.

    Attributes:
        text: The reason, and what to do.
        near_chance: Whether the network is no more accurate than guessing.
    """

    text: str
    near_chance: bool


def doubt_network(
    network: nn.Module | Checkpoint, data: Split, *, device: str = "auto"
) -> Doubt | None:
    """Return a reason to doubt that the network fits the data, or None.

    The reason is that another normalisation of the inputs is clearly better, or that the network is
    no more accurate than guessing. At most 1,000 samples are used; fewer than 50 say nothing.

    Args:
        network: Module or checkpoint.
        data: Split to evaluate on.
        device: Device to run the network on.
    """
    evaluation = evaluate(network, data, samples=min(len(data), 1000), device=device)
    clean = evaluation.accuracy[CLEAN_KEY]
    if clean.n < FEWEST_TO_DOUBT:
        return None
    chance = 1 / data.classes
    near_chance = clean.low <= chance
    if hint := evaluation.record.get(BETTER_INPUTS):
        return Doubt(hint, near_chance)
    if not near_chance:
        return None
    text = (
        f"clean accuracy {clean} is near chance ({chance:.1%}), and no usual --normalize helps; "
        "are these the weights of a collapsed soup, or of another data set or order of classes?"
    )
    return Doubt(text, near_chance)


def check_above_chance(
    network: nn.Module | Checkpoint, data: Split, name: str, *, device: str = "auto"
) -> str | None:
    """Check that a network is more accurate than guessing, and return another doubt as text.

    Raises:
        ModelError: If it is not; see `doubt_network`.
    """
    doubt = doubt_network(network, data, device=device)
    if doubt is None:
        return None
    if doubt.near_chance:
        raise ModelError(f"{name}: {doubt.text}")
    return f"{name}: {doubt.text}"

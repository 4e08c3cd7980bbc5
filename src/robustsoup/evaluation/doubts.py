"""Reasons to doubt an evaluation: points outside the ball, and warning signs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from robustsoup.attacks.losses import scale_free_loss
from robustsoup.attacks.outcome import Outcome
from robustsoup.evaluation.verdicts import Record
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

CERTIFICATE_TOLERANCE = 1e-6
"""How far a point may leave the ball or the box, relative to max(1, eps)."""

FINDING_TEXTS = {
    "square": "Square further breaks {hits} of {n} survivors",
    "transfer": "points of other networks further break {hits} of {n} survivors",
    "unbounded": "the whole box does not suffice to break {hits} of {n} survivors",
    "gradient": "the gradient misleads at {hits} of {n} survivors",
    "tied": "the two highest logits tie at {hits} of {n} survivors",
}
"""The tests of the masking check in words, in the order of text."""

FEWEST_SIGMOIDS = 20
"""Samples whose outputs must all lie between 0 and 1 before these count as probabilities."""

FLAT_LOGITS = 0.05
"""Spread of an image's logits, but for the highest, below which cross-entropy weights all wrong
classes alike."""

STOCHASTIC_DIFFERENCE = 1e-4
"""Relative difference of two calls above which a network counts as stochastic."""


def certificate_tolerance(threat: ThreatModel) -> float:
    """Return how far a point may leave the ball or the box."""
    return CERTIFICATE_TOLERANCE * max(1.0, threat.eps)


def certify_points(
    threats: Sequence[ThreatModel], outcomes: Mapping[str, Outcome]
) -> dict[str, Record]:
    """Count the adversarial points that leave the ball or the box, computed in float64.

    Args:
        threats: Threat models of the evaluation.
        outcomes: The outcome of each, by the threat model as text.

    Returns:
        For each threat model the number of points, how many are outside by more than the
        tolerance, the tolerance, and the largest excess (None without points).
    """
    certificate = {}
    for threat in threats:
        excess = outcomes[str(threat)].excess
        excess = excess[~excess.isnan()]
        tolerance = certificate_tolerance(threat)
        certificate[str(threat)] = {
            "points": len(excess),
            "outside": int((excess > tolerance).sum()),
            "tolerance": tolerance,
            "largest_excess": float(excess.max()) if len(excess) else None,
        }
    return certificate


def join_certificates(a: Mapping[str, Record], b: Mapping[str, Record]) -> dict[str, Record]:
    """Return the certificate of the points of two parts of one attack."""
    joined: dict[str, Record] = {}
    for threat, counts in a.items():
        others = b.get(threat, {"points": 0, "outside": 0})
        excesses = [part["largest_excess"] for part in (counts, others) if part["points"]]
        joined[threat] = {
            "points": counts["points"] + others["points"],
            "outside": counts["outside"] + others["outside"],
            "tolerance": counts["tolerance"],
            "largest_excess": max(excesses, default=None),
        }
    return joined


def warn_of_outputs(
    logits: Tensor | None, call_difference: float | None, *, draws_numbers: bool = False
) -> list[str]:
    """Warn of a stochastic network and of outputs that are probabilities.

    Args:
        logits: (n, classes) clean outputs, or None if they were not computed.
        call_difference: Relative difference between two calls, or None if it was not measured.
        draws_numbers: Whether the network drew random numbers; two calls may be equal by chance.
    """
    warnings = []
    if call_difference is not None and call_difference > STOCHASTIC_DIFFERENCE:
        warnings.append(
            "the network's outputs differ between two calls; attack it with eot above 1"
        )
    elif draws_numbers:
        warnings.append(
            "the network draws random numbers, so its outputs may differ between two calls; attack "
            "it with eot above 1"
        )
    if logits is not None and _are_probabilities(logits):
        warnings.append(
            "the network's outputs sum to 1: probabilities, not logits; they hide the gradient "
            "from the attack"
        )
    elif logits is not None and _are_sigmoids(logits):
        warnings.append(
            "the network's outputs all lie between 0 and 1, as after a sigmoid: probabilities, not "
            "logits; they hide the gradient from the attack"
        )
    return warnings


def warn_of_flat_logits(logits: Tensor | None, settings: AttackSettings) -> list[str]:
    """Warn of logits so close that cross-entropy cannot tell the nearest wrong class.

    Args:
        logits: (n, classes) clean outputs, or None if they were not computed.
        settings: The attack.
    """
    uses_ce = settings.is_queued and settings.loss_name == "ce"
    if logits is None or logits.shape[1] < 3 or not uses_ce:
        return []
    second = logits.topk(2, dim=1).values[:, 1]
    spread = float((second - logits.amin(1)).median())
    if not 0 < spread < FLAT_LOGITS:
        return []
    warning = (
        f"the logits of the wrong classes differ by {spread:.1g} at half of the images, or less: "
        "cross-entropy is almost flat and weakens the attack; try loss dlr"
    )
    return [warning]


def warn_of_attacks(
    outcomes: Sequence[Outcome],
    findings: Mapping[str, Record],
    settings: AttackSettings,
    classes: int,
) -> list[str]:
    """Warn of gradients that vanish and of logits that hold NaN.

    Args:
        outcomes: The outcome for each threat model.
        findings: The findings of the masking check for each threat model as text.
        settings: The attack.
        classes: Number of classes.
    """
    attacked = sum(int(outcome.attacked.sum()) for outcome in outcomes)
    zero_gradients = sum(int(outcome.zero_gradient.sum()) for outcome in outcomes)
    nan = sum(int(outcome.nan.sum()) for outcome in outcomes)
    warnings = []
    if zero_gradients:
        dlr_helps = [record["dlr_helps"] for record in findings.values() if "dlr_helps" in record]
        tries_dlr = settings.loss_name == "ce" and (any(dlr_helps) or not dlr_helps)
        loss = f"try loss {scale_free_loss(classes)}, or attack square"
        hint = loss if tries_dlr else "try attack square"
        warnings.append(
            f"the gradient is exactly zero at the start for {zero_gradients} of {attacked} "
            f"attacked samples; robust accuracy may be too high; {hint}"
        )
    if nan:
        warnings.append(f"the logits held NaN at {nan} attacked points")
    return warnings


def warn_of_masking(
    findings: Mapping[str, Record], settings: AttackSettings, classes: int
) -> list[str]:
    """Warn of what the masking check flagged, with what to try next.

    Args:
        findings: The findings for each threat model as text.
        settings: The attack.
        classes: Number of classes.
    """
    warnings = []
    for threat, record in findings.items():
        flagged = {name: record[name] for name in FINDING_TEXTS if _is_flagged(record, name)}
        if not flagged:
            continue
        counts = "; ".join(describe_finding(name, finding) for name, finding in flagged.items())
        warnings.append(
            f"{threat}: robust accuracy is probably too high: {counts}; "
            f"{_hint(flagged, settings, classes, dlr_helps=record.get('dlr_helps', False))}"
        )
    return warnings


def describe_masking(record: Record) -> list[str]:
    """Return the findings of the masking check in one line for each threat model.

    Args:
        record: The record of an evaluation.
    """
    return [
        f"{threat}: "
        + (
            "; ".join(
                describe_finding(name, findings[name]) for name in FINDING_TEXTS if name in findings
            )
            or "no test; too few survivors or passes"
        )
        for threat, findings in record.get("masking_check", {}).items()
    ]


def describe_finding(name: str, finding: Record) -> str:
    """Return the counts of one test of the masking check with their interval."""
    interval = f"[{100 * finding['low']:.1f}, {100 * finding['high']:.1f}] %"
    return FINDING_TEXTS[name].format(**finding) + f" {interval}"


def _is_flagged(record: Record, name: str) -> bool:
    return name in record and bool(record[name]["flagged"])


def _hint(
    flagged: Mapping[str, Record], settings: AttackSettings, classes: int, *, dlr_helps: bool
) -> str:
    """Return what to try next, given the tests that flagged the network."""
    if "gradient" in flagged and dlr_helps:
        loss = scale_free_loss(classes)
        return f"the loss is flat and that of {loss} is not: try loss {loss}"
    if "gradient" in flagged or "unbounded" in flagged:
        return (
            "the gradients mislead the attack: try attack square, or an attack of your own with a "
            "differentiable stand-in for what masks them"
        )
    if "tied" in flagged:
        return (
            "the logits saturate, which hides the gradient: attack the network without what bounds "
            "its logits"
        )
    if settings.is_queued:
        return "the attack is too weak or misled: raise steps and restarts, or try autoattack"
    return "the attack is too weak or misled: try autoattack"


def warn_of_points_outside(certificate: Mapping[str, Record]) -> list[str]:
    """Warn of points outside the ball or the box."""
    return [
        f"{counts['outside']} points lie outside the ball or the box of {threat}"
        for threat, counts in certificate.items()
        if counts["outside"]
    ]


def _are_probabilities(outputs: Tensor) -> bool:
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-4).all())


def _are_sigmoids(outputs: Tensor) -> bool:
    """Return whether outputs spread over (0, 1) and stay in it, as logits hardly ever do."""
    within = bool((outputs >= 0).all()) and bool((outputs <= 1).all())
    return within and len(outputs) >= FEWEST_SIGMOIDS and float(outputs.std()) > 0

"""Reasons to doubt an evaluation: points outside the ball, and warning signs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from robustsoup.attacks.outcome import Outcome
from robustsoup.evaluation.verdicts import Record, Verdicts
from robustsoup.threats import ThreatModel

CERTIFICATE_TOLERANCE = 1e-6
"""How far a point may leave the ball or the box, relative to max(1, eps)."""

STOCHASTIC_DIFFERENCE = 1e-4
"""Relative difference of two calls above which a network counts as stochastic."""


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
        tolerance = CERTIFICATE_TOLERANCE * max(1.0, threat.eps)
        certificate[str(threat)] = {
            "points": len(excess),
            "outside": int((excess > tolerance).sum()),
            "tolerance": tolerance,
            "largest_excess": float(excess.max()) if len(excess) else None,
        }
    return certificate


def warn_of_outputs(logits: Tensor | None, call_difference: float | None) -> list[str]:
    """Warn of a stochastic network and of outputs that are probabilities.

    Args:
        logits: (n, classes) clean outputs, or None if they were not computed.
        call_difference: Relative difference between two calls, or None if it was not measured.
    """
    warnings = []
    if call_difference is not None and call_difference > STOCHASTIC_DIFFERENCE:
        warnings.append(
            "the network's outputs differ between two calls; attack it with eot above 1"
        )
    if logits is not None and _are_probabilities(logits):
        warnings.append(
            "the network's outputs sum to 1: probabilities, not logits; they hide the gradient "
            "from the attack"
        )
    return warnings


def warn_of_attacks(outcomes: Sequence[Outcome]) -> list[str]:
    """Warn of gradients that vanish and of logits that hold NaN."""
    attacked = sum(int(outcome.attacked.sum()) for outcome in outcomes)
    zero_gradients = sum(int(outcome.zero_gradient.sum()) for outcome in outcomes)
    nan = sum(int(outcome.nan.sum()) for outcome in outcomes)
    warnings = []
    if zero_gradients:
        warnings.append(
            f"the gradient is exactly zero at the start for {zero_gradients} of {attacked} "
            "attacked samples; robust accuracy may be too high; try loss dlr, or autoattack"
        )
    if nan:
        warnings.append(f"the logits held NaN at {nan} attacked points")
    return warnings


def warn_of_points_outside(certificate: Mapping[str, Record]) -> list[str]:
    """Warn of points outside the ball or the box."""
    return [
        f"{counts['outside']} points lie outside the ball or the box of {threat}"
        for threat, counts in certificate.items()
        if counts["outside"]
    ]


def warn_above_clean(correct: Tensor, verdicts: Mapping[str, Verdicts]) -> list[str]:
    """Warn where robust accuracy is above clean accuracy: the network may be stochastic.

    Args:
        correct: (n,) bool, correct without an attack.
        verdicts: Verdicts by threat model.
    """
    return [
        f"accuracy under {threat} is above clean accuracy "
        f"({v.robust.float().mean():.1%}, {correct.float().mean():.1%})"
        for threat, v in verdicts.items()
        if int(v.robust.sum()) > int(correct.sum())
    ]


def _are_probabilities(outputs: Tensor) -> bool:
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-4).all())

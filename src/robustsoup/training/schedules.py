"""Learning-rate schedules: functions of the completed part of a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustsoup.errors import RequestError

Schedule = str | Mapping[str, Any]
"""A name, or {"milestones": [epochs], "gamma": factor}."""

WARM_UP = 0.25
"""Share of a run in which one-cycle rises, as in Rade and Wang et al.; PyTorch's default is 0.3."""


def check_schedule(schedule: Schedule) -> None:
    """Check that a schedule is known and complete.

    Args:
        schedule: "constant", "cosine", "one-cycle", "one-cycle P", "cyclic" or a mapping with
            "milestones" and "gamma".

    Raises:
        RequestError: For anything else.
    """
    if isinstance(schedule, str):
        is_known = (
            schedule in ("constant", "cosine", "cyclic") or _warm_up_share(schedule) is not None
        )
    else:
        is_known = _is_milestones(schedule)
    if not is_known:
        raise RequestError(
            f'schedule: got {schedule!r}, expected "constant", "cosine", "one-cycle" '
            '(or "one-cycle P" with P the share of the run in which the rate rises), "cyclic" '
            "or {milestones = [75, 113], gamma = 0.1}"
        )


def learning_rate(
    schedule: Schedule, lr: float, epochs_done: float, epochs: int, steps_per_epoch: int = 1
) -> float:
    """Return the learning rate of the next step.

    cosine: lr/2 * (1 + cos(pi * epochs_done / epochs)), changed every step. milestones:
    lr * gamma^(milestones reached). one-cycle: from lr/25 up to lr in a quarter of the run (share P
    for "one-cycle P"), then down to lr/250000, both along cosines and step for step as PyTorch's
    OneCycleLR; momentum is constant. cyclic: linearly up from 0 to lr in two fifths of the run,
    then linearly down to 0 at its last step.

    Args:
        schedule: A valid schedule; see `check_schedule`.
        lr: The peak rate.
        epochs_done: Completed epochs, including the fraction of the current epoch.
        epochs: Epochs of the whole run.
        steps_per_epoch: Steps of each epoch.

    Source: one-cycle: Smith and Topin 2018, arXiv:1708.07120, as in Wang et al. 2023,
        arXiv:2302.04638; cyclic: Wong et al. 2020, arXiv:2001.03994.
    """
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        return 0.5 * lr * (1 + math.cos(math.pi * epochs_done / epochs))
    if schedule == "cyclic":
        done = (epochs_done + 1 / steps_per_epoch) / epochs
        return lr * max(min(done / 0.4, (1 - done) / 0.6), 0.0)
    if isinstance(schedule, str):
        step, steps = round(epochs_done * steps_per_epoch), epochs * steps_per_epoch
        return _one_cycle_rate(lr, _warm_up_share(schedule) or WARM_UP, step, steps)
    reached = sum(epochs_done >= milestone for milestone in schedule["milestones"])
    return lr * schedule["gamma"] ** reached


def _is_milestones(schedule: Any) -> bool:
    if not isinstance(schedule, Mapping) or set(schedule) != {"milestones", "gamma"}:
        return False
    milestones = schedule["milestones"]
    if not isinstance(milestones, Sequence):
        return False
    return all(_is_finite_number(value) for value in [*milestones, schedule["gamma"]])


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _warm_up_share(schedule: str) -> float | None:
    """Return P of "one-cycle P", WARM_UP for "one-cycle", None for anything else."""
    name, _, rest = schedule.strip().partition(" ")
    if name != "one-cycle":
        return None
    try:
        share = float(rest) if rest else WARM_UP
    except ValueError:
        return None
    return share if 0 < share < 1 else None


def _one_cycle_rate(lr: float, warm_up: float, step: int, steps: int) -> float:
    """Return the rate of a step: lr / 25 at step 0, the peak lr at step warm_up * steps - 1."""
    peak, start, end = warm_up * steps - 1, lr / 25, lr / 25 / 1e4
    if step <= peak and peak > 0:
        return _cosine_between(start, lr, step / peak)
    return _cosine_between(lr, end, (step - max(peak, 0)) / max(steps - 1 - max(peak, 0), 1))


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

"""Learning-rate schedules, as functions of how far a run has come."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustsoup.errors import RequestError

Schedule = str | Mapping[str, Any]


WARM_UP = 0.25
"""The share of a run in which one-cycle rises, as in Rade's and Wang et al.'s training; PyTorch's own default is 0.3."""


def check_schedule(schedule: Schedule) -> None:
    """Raise RequestError unless it is "constant", "cosine", "one-cycle", "one-cycle P", "cyclic" or {"milestones", "gamma"}."""
    known = isinstance(schedule, str) and (
        schedule in ("constant", "cosine", "cyclic") or _warm_up(schedule) is not None
    )
    if not (known or _is_steps(schedule)):
        raise RequestError(
            f'schedule: got {schedule!r}, expected "constant", "cosine", "one-cycle" (or "one-cycle P", rising in the share '
            'P of the run), "cyclic" or {milestones = [75, 113], gamma = 0.1}'
        )


def _is_steps(schedule: Schedule) -> bool:
    if not isinstance(schedule, Mapping) or set(schedule) != {"milestones", "gamma"}:
        return False
    milestones = schedule["milestones"]
    return isinstance(milestones, Sequence) and all(
        map(_is_number, [*milestones, schedule["gamma"]])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def rate(
    schedule: Schedule, lr: float, epochs_done: float, epochs: int, per_epoch: int = 1
) -> float:
    """The learning rate after `epochs_done` (a fraction counts) of `epochs`, of `per_epoch` steps each.

    cosine: lr/2 * (1 + cos(pi * done)), changed every step; milestones: lr * gamma^(milestones reached); one-cycle: from
    lr/25 up to lr in a quarter of the run (or "one-cycle P", the share P of it), then down to lr/250000, both along
    cosines, to the step as PyTorch's OneCycleLR, momentum left alone; cyclic: straight up from 0 to lr in two fifths of the
    run, straight down to 0 at its last step.
    Sources: one-cycle: Smith and Topin 2018, arXiv:1708.07120, as Wang et al. 2023, arXiv:2302.04638, train; cyclic:
    Wong et al. 2020, arXiv:2001.03994.
    """
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        return 0.5 * lr * (1 + math.cos(math.pi * epochs_done / epochs))
    if schedule == "cyclic":
        done = (epochs_done + 1 / per_epoch) / epochs
        return lr * max(min(done / 0.4, (1 - done) / 0.6), 0.0)
    if isinstance(schedule, str):
        return _one_cycle(
            lr, _warm_up(schedule), round(epochs_done * per_epoch), epochs * per_epoch
        )
    return lr * schedule["gamma"] ** sum(
        epochs_done >= milestone for milestone in schedule["milestones"]
    )


def _warm_up(schedule: str) -> float | None:
    """P of "one-cycle P", 0.25 where it does not say; None for anything else."""
    name, _, rest = schedule.strip().partition(" ")
    if name != "one-cycle":
        return None
    try:
        share = float(rest) if rest else WARM_UP
    except ValueError:
        return None
    return share if 0 < share < 1 else None


def _one_cycle(lr: float, warm_up: float, step: int, steps: int) -> float:
    """Step 0 has the least rate of the rise, step warm_up * steps - 1 the highest, the last step the lowest."""
    peak, low, end = warm_up * steps - 1, lr / 25, lr / 25 / 1e4
    if step <= peak and peak > 0:
        return _along_cosine(low, lr, step / peak)
    return _along_cosine(lr, end, (step - max(peak, 0)) / max(steps - 1 - max(peak, 0), 1))


def _along_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

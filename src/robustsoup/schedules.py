"""Learning-rate schedules, as functions of how far a run has come."""

import math
from collections.abc import Mapping
from typing import Any

from robustsoup.errors import RequestError

Schedule = str | Mapping[str, Any]


def check_schedule(schedule: Schedule) -> None:
    """Raise RequestError unless it is "constant", "cosine" or {"milestones": [epochs], "gamma": factor}."""
    known = isinstance(schedule, str) and schedule in ("constant", "cosine")
    steps = isinstance(schedule, Mapping) and set(schedule) == {"milestones", "gamma"}
    if not (known or steps):
        raise RequestError(
            f'schedule: got {schedule!r}, expected "constant", "cosine" or {{milestones = [75, 113], gamma = 0.1}}'
        )


def rate(schedule: Schedule, lr: float, epochs_done: float, epochs: int) -> float:
    """The learning rate after `epochs_done` (a fraction counts) of `epochs`.

    cosine: lr/2 * (1 + cos(pi * done)), changed every step; milestones: lr * gamma^(milestones reached).
    """
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        return 0.5 * lr * (1 + math.cos(math.pi * epochs_done / epochs))
    return lr * schedule["gamma"] ** sum(epochs_done >= milestone for milestone in schedule["milestones"])

"""The attack "strong": PMA, MALT and Square in turn, each on the samples that survived so far.

Where gradients lead, Square is behind them for long, and breaks nothing that they leave; where
gradients are masked it is soon ahead. So it leaves the samples whose margin it has lowered by less
than 80 % of what the gradients did after a trial, and by less than they did after twice as many
queries.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from robustsoup.attacks.attempts import (
    AttackProgress,
    list_attempts,
    prepare_attempts,
)
from robustsoup.attacks.engine import SampleQueue, run_in_turn
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.attacks.square import first_square_search, search_squares, square_attempts
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel


def strong_attempts(settings: AttackSettings, classes: int) -> tuple[str, ...]:
    """Return the names of the attempts, in order."""
    names = (attempt.name for attempt in list_attempts(settings, classes))
    return (*names, *square_attempts(settings.restarts))


def run_strong(
    model: nn.Module,
    samples: AttackedSamples,
    threat: ThreatModel,
    settings: AttackSettings,
    outcome: Outcome,
    *,
    device: torch.device,
    poll: AttackProgress | None = None,
) -> None:
    """Attack every sample that is classified correctly and not settled yet.

    Args:
        model: Network in eval mode; see `frozen_eval`.
        samples: The samples.
        threat: Threat model with eps above 0.
        settings: The attack "strong".
        outcome: Read to resume, and written as samples are settled.
        device: Device of the network.
        poll: Receives progress.
    """
    attempts = len(strong_attempts(settings, samples.classes))
    first_square = attempts - settings.restarts
    run_attempt = prepare_attempts(
        model, samples, threat, settings, outcome, attempts=attempts, device=device
    )
    search = first_square_search(
        model, samples, threat, settings, attempts=attempts, device=device, index=first_square
    )

    def run_any(index: int, queue: SampleQueue, report: Callable[[], None] | None) -> None:
        if index < first_square:
            run_attempt(index, queue, report)
        else:
            restart = index - first_square
            # A further restart could only be compared with Square itself.
            trial = None if restart else settings.trial_queries
            square = replace(search, restart=restart, index=index, trial=trial)
            search_squares(square, queue, outcome, report)

    run_in_turn(run_any, attempts, samples, outcome, poll=poll)

"""Searches among learned soups: what is learned, how it is called, and what `all` joins.

`search` in Python learns these soups in its own process. `robustsoup search` writes them into the
tables of a recipe, so they become steps of a run.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from robustsoup.catalog import SOUP_METHODS
from robustsoup.errors import RequestError
from robustsoup.settings import ALL_METHODS, DialSettings, LearnSettings
from robustsoup.threats import ThreatModel

SHARES = (0.25, 0.5, 1.0, 2.0)
"""Radii that method "learned" learns against, as shares of the radius of the first threat."""
WEIGHTS = tuple(number / 5 for number in range(6))
"""Weights of the clean loss that method "learned" learns with if it sweeps alpha."""
POSITIONS = tuple(number / 10 for number in range(11))
"""Positions of the dial that method "dial" evaluates."""
LEARNING = ("learned", "dial")
"""The methods that learn."""
TOGETHER = ("surrogate", "learned", "dial", "greedy")
"""The methods that "all" joins, in this order."""


@dataclass(frozen=True)
class LearnedFamily:
    """What a method learns: one soup for each threat and objective, or one dial for each threat.

    Attributes:
        threats: Threat models to learn against.
        objectives: Objectives to learn with.
        positions: Positions of the dial that are evaluated; empty for soups.
    """

    threats: tuple[ThreatModel, ...]
    objectives: tuple[str, ...] = ("ce",)
    positions: tuple[float, ...] = ()

    @classmethod
    def of(cls, method: str, threats: Sequence[ThreatModel], sweep: str = "eps") -> "LearnedFamily":
        """Return what a method learns for a search.

        Args:
            method: "learned" or "dial".
            threats: The threat models of the search; soups are learned against the first.
            sweep: What "learned" varies: "eps", the radius, or "alpha", the weight of the clean
                loss.

        Raises:
            RequestError: There is no threat to learn against.
        """
        attacked = [threat for threat in threats if not threat.is_clean]
        if not attacked:
            raise RequestError(
                f'method "{method}" learns under attack; give a threat with a radius above 0'
            )
        first = attacked[0]
        if method == "dial":
            return cls((first,), positions=POSITIONS)
        if sweep == "alpha":
            objectives = [f"mixed {weight:g}" if weight else "ce" for weight in WEIGHTS]
            return cls((first,), tuple(objectives))
        largest = 1.0 if first.norm == "Linf" else math.inf
        radii = dict.fromkeys(min(share * first.eps, largest) for share in SHARES)
        clean = ThreatModel.parse("clean")
        return cls((clean, *(replace(first, eps=eps) for eps in radii)))

    def list_settings(self, learn: LearnSettings) -> list[LearnSettings]:
        """Return the settings that learn each soup, by threat and objective, or the dial.

        Args:
            learn: The settings but for threat, objective and dial. The soup that is learned without
                an attack combines no threats, has no limit on its clean loss, and measures its
                statistics without one.

        Raises:
            RequestError: A setting does not go with this method.
        """
        if self.positions:
            dial = learn.dial or DialSettings()
            of_dial = {"objective": "ce", "early_stop": None, "dial": dial}
            return [replace(learn, threat=threat, **of_dial) for threat in self.threats]
        unattacked: dict[str, Any] = {"also": (), "combine": None, "clean_limit": None}
        if learn.buffers == "recalibrate-adversarial":
            unattacked["buffers"] = "recalibrate"
        return [
            replace(
                learn,
                threat=threat,
                objective=objective,
                dial=None,
                **(unattacked if threat.is_clean else {}),
            )
            for threat, objective in itertools.product(self.threats, self.objectives)
        ]

    @property
    def size(self) -> int:
        """Number of soups."""
        return len(self.threats) * len(self.objectives) * max(1, len(self.positions))


def name_learned(
    section: str, threats: Sequence[ThreatModel], objectives: Sequence[str]
) -> list[str]:
    """Return names of learned soups: "learned-linf-8-255", with several objectives "...-ce"."""
    several = len(objectives) > 1
    return [
        f"{section}-{threat_slug(threat)}" + (f"-{slug(objective)}" if several else "")
        for threat in threats
        for objective in objectives
    ]


def name_positions(
    section: str, threats: Sequence[ThreatModel], positions: Sequence[float]
) -> list[str]:
    """Return names of the soups of dials: "dial-t0.5", with several threats the threat too."""
    return [
        f"{section}{f'-{threat_slug(threat)}' if len(threats) > 1 else ''}-t{t:g}"
        for threat in threats
        for t in positions
    ]


def slug(text: str) -> str:
    """Convert text into a part of a file name: "Linf 8/255" -> "linf-8-255"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def threat_slug(threat: ThreatModel) -> str:
    """Convert a threat into a part of a file name: "L1 12.0" -> "l1-12"."""
    return slug(str(threat).removesuffix(".0"))


def why_not_screened(method: str) -> str | None:
    """Return why `screen` has no meaning with a method, in words; None if it has."""
    if method in ("surrogate", ALL_METHODS):
        return "which attacks few soups by a rule of its own"
    entry = SOUP_METHODS.find(method)
    if entry is not None and entry.facts.get("needs") is not None:
        return "which evaluates each soup in full"
    return None

"""Threat models: a norm and a radius, and the geometry of the ball intersected with the box [0, 1]."""

import math
import re
from dataclasses import dataclass

from robustsoup.errors import ThreatError

NORMS = ("Linf", "L2", "L1")
_EXAMPLES = '"Linf 8/255", "L2 0.5", "L1 12" or "clean"'


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do: perturb x in [0,1] by at most `eps` in `norm`, staying in [0,1].

    norm: "Linf", "L2" or "L1"; eps: radius in units of x, at least 0. eps = 0 means no attack ("clean").
    `ThreatModel.parse(str(threat)) == threat`.

    Raises ThreatError for another norm, a negative or non-finite eps.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ThreatError(f'norm: got "{self.norm}", expected one of {", ".join(NORMS)}')
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ThreatError(f"eps: got {self.eps}, expected a finite number of at least 0")
        object.__setattr__(self, "eps", float(self.eps))  # a numpy float's repr does not parse
        if self.eps == 0:  # no attack is the same in every norm
            object.__setattr__(self, "norm", "Linf")

    @classmethod
    def parse(cls, text: "str | ThreatModel") -> "ThreatModel":
        """Read "Linf 8/255", "L2 0.5", "L1 12" or "clean" (which is Linf 0); a ThreatModel is returned as it is."""
        if isinstance(text, ThreatModel):
            return text
        if str(text).strip() == "clean":
            return CLEAN
        match = re.fullmatch(r"\s*(\w+)\s+([^\s/]+)\s*(?:/\s*([^\s/]+))?\s*", str(text))
        if not match:
            raise ThreatError(f'threat model: got "{text}", expected {_EXAMPLES}')
        norm, numerator, denominator = match.groups()
        known = {name.lower(): name for name in NORMS}
        try:
            eps = float(numerator) / (float(denominator) if denominator else 1.0)
        except (ValueError, ZeroDivisionError):
            raise ThreatError(
                f'threat model "{text}": the radius is not a number; expected {_EXAMPLES}'
            ) from None
        if norm.lower() not in known:
            raise ThreatError(
                f'threat model "{text}": norm {norm} is unknown; expected {_EXAMPLES}'
            )
        try:
            return cls(known[norm.lower()], eps)
        except ThreatError as error:
            raise ThreatError(f'threat model "{text}": {error}') from None

    @property
    def is_clean(self) -> bool:
        """Whether nothing may be perturbed."""
        return self.eps == 0

    def __str__(self) -> str:
        if self.is_clean:
            return "clean"
        if self.norm == "Linf" and round(self.eps * 255) / 255 == self.eps:
            return f"Linf {round(self.eps * 255)}/255"
        return f"{self.norm} {self.eps!r}"


CLEAN = ThreatModel("Linf", 0.0)

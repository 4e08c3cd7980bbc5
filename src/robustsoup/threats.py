"""Threat models: how far an attacker may perturb an input."""

import math
import re
from dataclasses import dataclass

from robustsoup.errors import ThreatError

NORMS = ("Linf", "L2", "L1")
_EXAMPLES = '"Linf 8/255", "L2 0.5", "L1 12" or "clean"'


@dataclass(frozen=True)
class ThreatModel:
    """The set of allowed perturbations: an lp ball around x, intersected with the box [0, 1].

    `ThreatModel.parse(str(threat)) == threat` holds for every threat model.

    Attributes:
        norm: "Linf", "L2" or "L1"; always "Linf" if eps is 0.
        eps: Radius of the ball in units of x, at least 0; 0 means no attack ("clean").

    Raises:
        ThreatError: If the norm is unknown, or eps is negative or not finite.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        """Check the values and normalise them."""
        if self.norm not in NORMS:
            raise ThreatError(f'norm: got "{self.norm}", expected one of {", ".join(NORMS)}')
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ThreatError(f"eps: got {self.eps}, expected a finite number of at least 0")
        # A NumPy float would print as "np.float64(0.03)", which parse cannot read.
        object.__setattr__(self, "eps", float(self.eps))
        if self.eps == 0:
            object.__setattr__(self, "norm", "Linf")

    @classmethod
    def parse(cls, text: "str | ThreatModel") -> "ThreatModel":
        """Parse "Linf 8/255", "L2 0.5", "L1 12" or "clean" (Linf 0).

        The norm may be in lower case. A ThreatModel is returned unchanged.

        Raises:
            ThreatError: If the text is not a threat model.
        """
        if isinstance(text, ThreatModel):
            return text
        stripped = f"{text}".strip()
        if stripped == "clean":
            return CLEAN
        match = re.fullmatch(r"(\w+)\s+([^\s/]+)\s*(?:/\s*([^\s/]+))?", stripped)
        if not match:
            raise ThreatError(f'threat model: got "{text}", expected {_EXAMPLES}')
        norm, numerator, denominator = match.groups()
        try:
            eps = float(numerator) / (float(denominator) if denominator else 1.0)
        except (ValueError, ZeroDivisionError):
            raise ThreatError(
                f'threat model "{text}": the radius is not a number; expected {_EXAMPLES}'
            ) from None
        canonical_norm = {name.lower(): name for name in NORMS}.get(norm.lower())
        if canonical_norm is None:
            raise ThreatError(
                f'threat model "{text}": norm {norm} is unknown; expected {_EXAMPLES}'
            )
        try:
            return cls(canonical_norm, eps)
        except ThreatError as error:
            raise ThreatError(f'threat model "{text}": {error}') from None

    @property
    def is_clean(self) -> bool:
        """Whether the radius is 0, so that nothing may be perturbed."""
        return self.eps == 0

    def __str__(self) -> str:
        if self.is_clean:
            return "clean"
        if self.norm == "Linf" and round(self.eps * 255) / 255 == self.eps:
            return f"Linf {round(self.eps * 255)}/255"
        return f"{self.norm} {self.eps!r}"


CLEAN = ThreatModel("Linf", 0.0)

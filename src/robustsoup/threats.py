"""Threat models: how far an attacker may perturb an input."""

import math
import re
from collections.abc import Iterable, Sequence
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
        eps: Radius of the ball in units of x, at least 0; 0 means no attack ("clean"). Linf 1 is
            the unbounded attack.

    Raises:
        ThreatError: If the norm is unknown, eps is negative or not finite, or Linf is above 1.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        """Check the values and normalise them."""
        if self.norm not in NORMS:
            raise ThreatError(f'norm: got "{self.norm}", expected one of {", ".join(NORMS)}')
        if isinstance(self.eps, (str, bytes)) or not hasattr(self.eps, "__float__"):
            raise ThreatError(f"eps: got {self.eps!r}, expected a number, such as 8 / 255")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ThreatError(f"eps: got {self.eps}, expected a finite number of at least 0")
        if self.norm == "Linf" and self.eps > 1:
            is_whole = self.eps == round(self.eps)
            raise ThreatError(
                f"eps: got Linf {self.eps:g}, more than the whole of [0, 1]; expected at most 1"
                + (f"; did you mean Linf {self.eps:g}/255?" if is_whole else "")
            )
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

    def check_shape(self, shape: Sequence[int]) -> None:
        """Check that the ball around an image does not always hold every image.

        Args:
            shape: Shape of one image.

        Raises:
            ThreatError: If it does in L2 (eps >= sqrt(d), d values) or L1 (eps >= d). Linf 1, the
                unbounded attack, passes.
        """
        values = math.prod(shape)
        largest = {"L2": math.sqrt(values), "L1": float(values)}.get(self.norm)
        if largest is not None and self.eps >= largest:
            raise ThreatError(
                f"threat model {self}: the ball holds every image of shape {tuple(shape)}; "
                f"expected a radius below {largest:g}; images are in [0, 1], not in pixel values; "
                "use Linf 1 for an unbounded attack"
            )

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


def first_attacked(threats: Sequence[ThreatModel | str]) -> ThreatModel:
    """Return the first threat model with a radius; clean without one."""
    return next((t for t in map(ThreatModel.parse, threats) if not t.is_clean), CLEAN)


def parse_threats(threats: object) -> tuple[ThreatModel, ...]:
    """Parse a list of threat models, or a single one.

    Raises:
        ThreatError: If the argument is neither, or a text is not a threat model.
    """
    if isinstance(threats, (str, ThreatModel)):
        return (ThreatModel.parse(threats),)
    if not isinstance(threats, Iterable) or getattr(threats, "shape", None) == ():
        raise ThreatError(
            f"threats: got {type(threats).__name__}, expected a list such as {_EXAMPLES}"
        )
    return tuple(ThreatModel.parse(threat) for threat in threats)

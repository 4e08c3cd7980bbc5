"""The objectives that training and learning minimise."""

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustsoup import fingerprint
from robustsoup.attacks.losses import Loss, ce, kl
from robustsoup.errors import ThreatError

Combined = Callable[..., Tensor]
"""loss(clean, attacked, y): logits (b, classes), None where the objective needs none, and y (b,) -> (b,), or their mean."""

SPELLINGS = '"ce", "mixed A" as in "mixed 0.4", "trades", "trades B" as in "trades 5", or "package.module:function"'


@dataclass(frozen=True)
class Objective:
    """What training and learning minimise: a function of the clean and the attacked batch's logits.

    loss: see Combined; its logits are at least float32, and where the threat is clean both are one tensor. clean,
    attacked: whether it needs that batch; with both, one train-mode pass sees the two together. climbs: the loss that
    its attack climbs, from x; compares: it is called as climbs(logits, y, clean), clean being the clean logits in eval
    mode, and the attack starts beside x, where a divergence from clean has no gradient. clean_weight: A of "mixed A", 0
    for "ce", None for all others.
    """

    loss: Combined = field(compare=False)
    name: str = ""
    clean: bool = True
    attacked: bool = True
    climbs: Loss = ce
    compares: bool = False
    clean_weight: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss) or not (self.clean or self.attacked):
            raise ThreatError(
                f"objective: got {self.loss!r}, expected a function that needs a clean or an attacked batch"
            )
        object.__setattr__(self, "name", self.name or _name(self.loss))

    @classmethod
    def parse(cls, given: "str | Objective | Combined") -> "Objective":
        """Read "ce", "mixed 0.4", "trades", "trades 5" or "package.module:function"; or take a function as it is.

        A function needs both batches and its attack climbs the cross-entropy; for anything else make an Objective of it
        (which "package.module:name" may name too).

        Raises ThreatError.
        """
        if isinstance(given, Objective):
            return given
        if callable(given):
            return cls(given)
        text = str(given).strip()
        if (weight := clean_weight(text)) is not None:
            return mixed(weight)
        name, _, rest = text.partition(" ")
        if name == "trades" and (not rest or _number(rest) is not None):
            return trades(_number(rest) if rest else 6.0)
        if ":" in text:
            return _found(text)
        raise ThreatError(f'objective: got "{text}", expected {SPELLINGS}')

    def smoothed(self, label_smoothing: float) -> "Objective":
        """The same with its labels smoothed. Raises ThreatError for a function that has no parameter label_smoothing."""
        if not label_smoothing:
            return self
        if "label_smoothing" not in inspect.signature(self.loss).parameters:
            raise ThreatError(
                f"label_smoothing: the objective {self} takes none; give it a parameter label_smoothing, or leave it out"
            )
        return replace(self, loss=partial(self.loss, label_smoothing=label_smoothing))

    @property
    def mark(self) -> str | None:
        """What tells two objectives of one name apart: a digest of their code and flags, or None for a built-in one."""
        if isinstance(self.loss, partial) and self.loss.func in _OWN:
            return None
        climbs = self.climbs.__name__ if self.climbs in (ce, kl) else fingerprint.mark(self.climbs)
        flags = (self.clean, self.attacked, self.compares, climbs)
        return hashlib.sha256(f"{fingerprint.mark(self.loss)} {flags}".encode()).hexdigest()[:32]

    def __str__(self) -> str:
        return self.name


def clean_weight(text: str) -> float | None:
    """A of "mixed A", 0 for "ce", and None for any other objective, which is not even looked for."""
    name, _, rest = str(text).strip().partition(" ")
    if name == "ce" and not rest:
        return 0.0
    return _number(rest) if name == "mixed" else None


def mixed(weight: float) -> Objective:
    """weight * L(clean) + (1 - weight) * L(attack), the paper's Eq. 1 (weight 0, called "ce") and Eq. 2.

    The paper calls the second TRADES; it is not the KL objective of Zhang et al. 2019, which is `trades`.
    """
    if not 0 <= weight <= 1:
        raise ThreatError(f"objective: the clean weight is {weight}, expected a number in [0, 1]")
    return Objective(
        partial(_mixed, weight=weight),
        f"mixed {weight:g}" if weight else "ce",
        clean=weight > 0,
        attacked=weight < 1,
        clean_weight=weight,
    )


def trades(beta: float = 6.0) -> Objective:
    """L(clean) + beta * KL(p_clean || p_attacked), whose attack climbs the KL; the gradient goes through both.

    Source: Zhang et al. 2019, arXiv:1901.08573, Eq. 5.
    """
    if not 0 <= beta < math.inf:
        raise ThreatError(
            f"objective: trades has the weight {beta}, expected a number of at least 0"
        )
    return Objective(partial(_trades, beta=beta), f"trades {beta:g}", climbs=kl, compares=True)


def _mixed(
    clean: Tensor | None,
    attacked: Tensor | None,
    y: Tensor,
    *,
    weight: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    parts = [ce(logits, y, label_smoothing) for logits in (clean, attacked) if logits is not None]
    if len(parts) == 1 or clean is attacked:
        return parts[0]
    of_clean, of_attacked = torch.stack(parts).mean(1)
    return weight * of_clean + (1 - weight) * of_attacked


def _trades(
    clean: Tensor, attacked: Tensor, y: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    return ce(clean, y, label_smoothing) + beta * kl(attacked, y, clean)


_OWN = (_mixed, _trades)


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or '?'}:{name}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _found(text: str) -> Objective:
    """The function, or Objective, that "package.module:name" names, under that name."""
    module, _, name = text.partition(":")
    try:
        there = importlib.import_module(module)
    except (ImportError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ThreatError(
            f'objective "{text}": {reason}; is it on the Python path? Else expected {SPELLINGS}'
        ) from None
    if (found := getattr(there, name, None)) is None:
        raise ThreatError(f'objective "{text}": module "{module}" has no "{name}"')
    if not isinstance(found, Objective) and not callable(found):
        raise ThreatError(f'objective "{text}": got {type(found).__name__}, expected a function')
    return replace(found, name=text) if isinstance(found, Objective) else Objective(found, text)

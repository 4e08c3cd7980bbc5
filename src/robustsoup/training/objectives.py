"""The objectives that training and learning minimise."""

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, stack

from robustsoup.attacks.losses import Loss, ce, kl
from robustsoup.catalog import OBJECTIVES, check_call, import_by_name, import_path
from robustsoup.errors import ThreatError
from robustsoup.fingerprint import code_fingerprint

ObjectiveLoss = Callable[..., Tensor]
"""loss(clean, attacked, y): logits (b, classes), None for a batch that the objective does not use,
and labels y (b,); returns the loss of each sample (b,), or their mean."""


@dataclass(frozen=True)
class Objective:
    """An objective of training and learning: a function of the logits of two batches.

    Attributes:
        loss: See ObjectiveLoss. The logits are at least float32. If the threat is clean, both
            batches are one tensor.
        name: Name for records and messages; by default that of the function.
        uses_clean: Whether the loss needs the clean batch.
        uses_attacked: Whether the loss needs the attacked batch.
        separate_passes: Whether each batch is normalised by its own BatchNorm statistics, in three
            train-mode passes: clean without gradient, attacked, clean. So running statistics see
            the clean batch twice and the attacked batch once. Otherwise an objective that uses both
            batches sees them concatenated, in one train-mode pass.
        attack_loss: The loss that the attack maximises, starting from x.
        attack_compares_with_clean: Call attack_loss(logits, y, clean) with the clean logits in eval
            mode, and start the attack at x plus small noise: at x, a divergence from the clean
            logits has no gradient.
        clean_weight: A of "mixed A", 0 for "ce", None for any other objective.

    Raises:
        ThreatError: If loss is not a function, or neither batch is used.
    """

    loss: ObjectiveLoss = field(compare=False)
    name: str = ""
    uses_clean: bool = True
    uses_attacked: bool = True
    separate_passes: bool = False
    attack_loss: Loss = ce
    attack_compares_with_clean: bool = False
    clean_weight: float | None = None

    def __post_init__(self) -> None:
        """Check the loss and name the objective after it."""
        if not callable(self.loss) or not (self.uses_clean or self.uses_attacked):
            raise ThreatError(
                f"objective: got {self.loss!r}, expected a function "
                "that needs a clean or an attacked batch"
            )
        object.__setattr__(self, "name", self.name or import_path(self.loss))
        batches = ["clean", "attacked", "y"]
        check_call(self.loss, batches, label=f'objective "{self.name}"', error=ThreatError)

    @classmethod
    def parse(cls, value: "str | Objective | ObjectiveLoss") -> "Objective":
        """Return the objective that a text or a function describes.

        Args:
            value: A spelling of the catalog such as "ce", "mixed 0.4", "trades" or "trades 5";
                "package.module:name", which names a loss function or an Objective; or either of
                these themselves. A plain function gets both batches, and its attack maximises the
                cross-entropy.

        Raises:
            ThreatError: If the text names no objective or its numbers are out of range.
        """
        if isinstance(value, Objective):
            return value
        if callable(value):
            return cls(value)
        text = str(value).strip()
        if ":" in text:
            return _import_objective(text)
        name, *numbers = text.split() or [""]
        entry = OBJECTIVES.find(name)
        if entry is None or not all(map(_is_number, numbers)):
            raise _unknown_objective(text)
        build, parameters = entry.load(), [float(number) for number in numbers]
        try:
            inspect.signature(build).bind(*parameters)
        except TypeError:
            raise _unknown_objective(text) from None
        return build(*parameters)

    def with_label_smoothing(self, label_smoothing: float) -> "Objective":
        """Return the objective with smoothed labels.

        Args:
            label_smoothing: Share of each label that is spread over all classes, in [0, 1).

        Raises:
            ThreatError: If the loss has no parameter label_smoothing.
        """
        if not label_smoothing:
            return self
        if "label_smoothing" not in inspect.signature(self.loss).parameters:
            raise ThreatError(
                f"label_smoothing: the objective {self} does not support it; "
                "give its function a parameter label_smoothing, or leave it out"
            )
        return replace(self, loss=partial(self.loss, label_smoothing=label_smoothing))

    @property
    def fingerprint(self) -> str | None:
        """Digest of the code and flags of a user's objective; None for a built-in one."""
        if isinstance(self.loss, partial) and self.loss.func in (mixed_loss, trades_loss):
            return None
        if self.attack_loss in (ce, kl):
            attack_loss = self.attack_loss.__name__
        else:
            attack_loss = code_fingerprint(self.attack_loss)
        flags = (
            self.uses_clean,
            self.uses_attacked,
            self.separate_passes,
            self.attack_compares_with_clean,
            attack_loss,
        )
        return hashlib.sha256(f"{code_fingerprint(self.loss)} {flags}".encode()).hexdigest()[:32]

    def __str__(self) -> str:
        """Return the name."""
        return self.name


def cross_entropy() -> Objective:
    """Return the cross-entropy on attacked images, the paper's Eq. 1: "ce"."""
    return mixed(0.0)


def mixed(clean_weight: float) -> Objective:
    """Return A * L(clean) + (1 - A) * L(attacked), the paper's Eq. 2: "mixed A".

    The paper calls it TRADES; the KL objective of Zhang et al. 2019 is `trades`.

    Args:
        clean_weight: A, in [0, 1]; 0 is "ce".

    Raises:
        ThreatError: If the weight is outside [0, 1].

    Source: Huang, Adversarial Learned Soups, Eq. 2.
    """
    if not 0 <= clean_weight <= 1:
        raise ThreatError(
            f"objective: the clean weight is {clean_weight}, expected a number in [0, 1]"
        )
    return Objective(
        partial(mixed_loss, weight=clean_weight),
        f"mixed {clean_weight:g}" if clean_weight else "ce",
        uses_clean=clean_weight > 0,
        uses_attacked=clean_weight < 1,
        clean_weight=clean_weight,
    )


def trades(beta: float = 6.0) -> Objective:
    """Return L(clean) + B * KL(p_clean || p_attacked), "trades B"; its attack maximises the KL.

    The gradient flows through both distributions. As in the authors' code, clean and attacked
    images pass separately in train mode, and running statistics are updated by the clean batch,
    the attacked batch and the clean batch again.

    Args:
        beta: B, at least 0 and finite.

    Raises:
        ThreatError: If beta is out of range.

    Source: Zhang et al. 2019, arXiv:1901.08573, Eq. 5.
    """
    if not 0 <= beta < math.inf:
        raise ThreatError(
            f"objective: trades has the weight {beta}, expected a number of at least 0"
        )
    return Objective(
        partial(trades_loss, beta=beta),
        f"trades {beta:g}",
        separate_passes=True,
        attack_loss=kl,
        attack_compares_with_clean=True,
    )


def mixed_loss(
    clean: Tensor | None,
    attacked: Tensor | None,
    y: Tensor,
    *,
    weight: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the loss of `mixed`: (b,) if one batch is used, else the weighted mean, a scalar."""
    losses = [ce(logits, y, label_smoothing) for logits in (clean, attacked) if logits is not None]
    if len(losses) == 1 or clean is attacked:
        return losses[0]
    clean_mean, attacked_mean = stack(losses).mean(1)
    return weight * clean_mean + (1 - weight) * attacked_mean


def trades_loss(
    clean: Tensor, attacked: Tensor, y: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Return the loss of `trades` for each sample, (b,)."""
    return ce(clean, y, label_smoothing) + beta * kl(attacked, y, clean)


def clean_weight(text: str) -> float | None:
    """Return A of "mixed A", 0 for "ce", None for any other objective, without importing it."""
    name, _, rest = text.strip().partition(" ")
    if name == "ce" and not rest:
        return 0.0
    return float(rest) if name == "mixed" and _is_number(rest) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown_objective(text: str) -> ThreatError:
    spellings = OBJECTIVES.spellings()
    return ThreatError(
        f'objective: got "{text}", expected one of {spellings}, or package.module:function'
    )


def _import_objective(text: str) -> Objective:
    """Return the loss function or the Objective called "package.module:name", under that name."""
    label = f'objective "{text}"'
    value = import_by_name(text, label=label, error=ThreatError)
    if isinstance(value, Objective):
        return replace(value, name=text)
    if not callable(value):
        raise ThreatError(f"{label}: got {type(value).__name__}, expected a function")
    return Objective(value, text)

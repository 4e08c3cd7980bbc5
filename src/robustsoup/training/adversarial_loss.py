"""The attack and the loss of one adversarial training step, and their means over a split."""

from functools import partial

import torch
from torch import Tensor, nn

from robustsoup.attacks import apgd_train
from robustsoup.attacks.folding import folded
from robustsoup.attacks.forward import frozen_eval
from robustsoup.attacks.losses import ce
from robustsoup.attacks.projections import project
from robustsoup.data import Split, passes
from robustsoup.device import autocast
from robustsoup.errors import ThreatError
from robustsoup.seeding import keyed_generator
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.objectives import Objective

BESIDE = 0.001
"""How far from x, in standard deviations a pixel, an attack begins that has no gradient at x."""


def attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    objective: Objective,
    steps: int,
    precision: str,
    key: tuple[str | int, ...],
) -> Tensor:
    """What the objective's robust part is computed on: x itself where it has none. key: seeds the noise, where there is some."""
    if not objective.attacked or threat.is_clean:
        return x
    ask = partial(
        apgd_train, model, x, y, threat, steps=steps, loss=objective.climbs, precision=precision
    )
    if not objective.compares:
        return ask()
    with frozen_eval(model), torch.no_grad(), autocast(x.device, precision):
        clean = model(x)
    noise = torch.randn(x.shape, generator=keyed_generator("beside", *key)).to(x)
    start = project(x + BESIDE * noise, x, x.new_full((len(x),), threat.eps), threat.norm)
    return ask(start=start, target=_at_least_float32(clean))


def objective_loss(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, objective: Objective, precision: str
) -> Tensor:
    """The objective, a scalar: one train-mode pass, over the clean and the attacked batch together where it needs both."""
    model.train()
    return _objective(model, x, x_adv, y, objective, precision)


def _objective(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, objective: Objective, precision: str
) -> Tensor:
    both = objective.clean and objective.attacked and x_adv is not x
    with autocast(x.device, precision):
        logits = model(torch.cat([x, x_adv]) if both else x_adv if objective.attacked else x)
    logits = _at_least_float32(logits)
    clean, robust = logits.chunk(2) if both else (logits, logits)
    each = objective.loss(
        clean if objective.clean else None, robust if objective.attacked else None, y
    )
    if not isinstance(each, Tensor) or each.shape not in ((), y.shape):
        got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
        raise ThreatError(
            f"objective {objective}: returned {got} for {len(y)} samples, expected a loss for each, ({len(y)},)"
        )
    return each.mean()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def robust_loss(
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    *,
    steps: int = 10,
    precision: str = "float32",
) -> tuple[float, float]:
    """Mean highest loss and accuracy under the training form of APGD, over a whole split, in eval mode.

    The attack runs in `precision`; what it finds is judged in float32.
    """
    model.eval()
    searched = model if threat.is_clean else _for_search(model, data, precision)
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in passes(data):
        x_adv = apgd_train(searched, x, y, threat, steps=steps, precision=precision)
        with torch.no_grad():
            logits = model(x_adv)
        sums += torch.stack(
            [ce(logits, y).sum().double(), (logits.argmax(1) == y).sum().double()]
        ).cpu()
    loss, accuracy = (sums / len(data)).tolist()
    return loss, accuracy


def objective_on(
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    objective: Objective,
    *,
    steps: int = 10,
    precision: str = "float32",
) -> float:
    """The objective on a whole split, in eval mode: its attack is the training form of APGD with `steps` steps."""
    weight, total = objective.clean_weight, 0.0
    if weight is None:
        return _own_objective_on(model, data, threat, objective, steps, precision)
    if weight:
        total += weight * robust_loss(model, data, CLEAN, precision=precision)[0]
    if weight < 1:
        total += (1 - weight) * robust_loss(model, data, threat, steps=steps, precision=precision)[
            0
        ]
    return total


def _own_objective_on(
    model: nn.Module,
    data: Split,
    threat: ThreatModel,
    objective: Objective,
    steps: int,
    precision: str,
) -> float:
    model.eval()
    searched, total = _for_search(model, data, precision), 0.0
    for number, (x, y) in enumerate(passes(data)):
        x_adv = attacked(searched, x, y, threat, objective, steps, precision, ("val", number))
        with torch.no_grad():
            total += len(x) * float(_objective(model, x, x_adv, y, objective, "float32"))
    return total / len(data)


def _for_search(model: nn.Module, data: Split, precision: str) -> nn.Module:
    """A network in eval mode as it is searched in `precision`: what is found is judged by the network itself."""
    return folded(model, next(passes(data))[0][:2]) if precision == "bfloat16" else model

"""AutoPGD as adversarial training uses it. The evaluation form is in `queue`; they are not the same function."""

from functools import partial

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import frozen_eval, gradient
from robustsoup.attacks.lanes import in_lanes, lane_count
from robustsoup.attacks.losses import Loss, ce
from robustsoup.attacks.steps import Schedule, advance, column, observe, start_rows
from robustsoup.errors import RequestError
from robustsoup.threats import ThreatModel

LEAST = 16
"""The fewest images that a lane is worth."""


def apgd_train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 2,
    loss: Loss = ce,
    precision: str = "float32",
    start: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """APGD as adversarial training uses it: from x itself, the point of highest loss, for every sample.

    x: (b, ...) float in [0,1]; y: (b,) int64. Samples already misclassified, or never fooled, are perturbed too.
    start: (b, ...) points in the ball and the box to begin at instead of x. target: (b, ...), one row a sample, for a
    loss that is to be called as loss(logits, y, target).
    The network is attacked in eval mode and left as it was. `steps` steps take steps + 1 forward passes and `steps`
    gradients by the input. eps = 0 returns x. No randomness. On a CPU the batch is shared out among its cores.

    Raises RequestError for steps below 1.
    Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208.
    """
    if threat.is_clean:
        return x
    if steps < 1:
        raise RequestError(f"attack steps: got {steps}, expected at least 1")
    given = [x, y, x if start is None else start, *([] if target is None else [target])]

    def attack(x: Tensor, y: Tensor, start: Tensor, target: Tensor | None = None) -> Tensor:
        return _highest_loss(model, x, y, start, target, threat, steps, loss, precision)

    parts = max(1, min(lane_count(x.device), len(x) // LEAST))
    with frozen_eval(model):
        if parts == 1:
            return attack(*given)
        shares = zip(*(tensor.tensor_split(parts) for tensor in given), strict=True)
        return torch.cat(in_lanes([partial(attack, *share) for share in shares], x.device))


def _highest_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    target: Tensor | None,
    threat: ThreatModel,
    steps: int,
    loss: Loss,
    precision: str,
) -> Tensor:
    schedule = Schedule.of(threat, steps, staged=False)
    rows = start_rows(x, y, threat.eps, start, schedule, topk=0.05)
    periods = schedule.checks().to(x.device)
    for _ in range(steps):
        _, value, grad = gradient(model, rows.x_adv, y, loss, precision, target=target)
        observe(rows, value, grad, periods, threat.norm)
        advance(rows, threat.norm)
    _, value, _ = gradient(model, rows.x_adv, y, loss, precision, needed=False, target=target)
    return torch.where(column(value > rows.loss_best, x), rows.x_adv, rows.x_best)

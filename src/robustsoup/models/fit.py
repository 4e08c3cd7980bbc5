"""Check that a network and threat models fit a data set."""

from collections.abc import Iterable

import torch
from torch import nn

from robustsoup.attacks.forward import frozen_eval
from robustsoup.data import Split, to_float
from robustsoup.errors import ModelError
from robustsoup.threats import ThreatModel


def check_fit(model: nn.Module, data: Split, threats: Iterable[ThreatModel] = ()) -> None:
    """Check that a network takes the images of a data set and has as many classes.

    Args:
        model: The network; its training mode stays.
        data: Any split with at least one sample.
        threats: Threat models, whose balls must not hold every image.

    Raises:
        ThreatError: A radius is too large for images of this shape.
        ModelError: The network cannot take images of this shape, or its logits are not
            (b, classes).
    """
    for threat in threats:
        threat.check_shape(data.images.shape[1:])
    x = to_float(data.images[:2]).to(next(model.parameters()).device)
    try:
        with frozen_eval(model), torch.no_grad():
            logits = model(x)
    except (RuntimeError, ValueError) as error:
        shape = tuple(data.images.shape[1:])
        reason = str(error).splitlines()[0]
        raise ModelError(f"network: does not take images of shape {shape}: {reason}") from None
    if logits.dim() != 2 or logits.shape[1] != data.classes:
        raise ModelError(
            f"network: got logits of shape {tuple(logits.shape)} for {len(x)} images, "
            f"expected {data.classes} classes as in {data.record['name']}"
        )

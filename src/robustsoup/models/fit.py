"""Check that a network fits a data set."""

import torch
from torch import nn

from robustsoup.attacks.forward import frozen_eval
from robustsoup.data import Split, to_float
from robustsoup.errors import ModelError


def check_fit(model: nn.Module, data: Split) -> None:
    """Check that a network takes the images of a data set and has as many classes.

    Args:
        model: The network; its training mode stays.
        data: Any split with at least one sample.

    Raises:
        ModelError: The network cannot take images of this shape, or its logits are not
            (b, classes).
    """
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

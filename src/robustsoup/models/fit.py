"""Whether a network fits a data set."""

import torch
from torch import nn

from robustsoup.data import Split, to_float
from robustsoup.errors import ModelError


def check_fit(model: nn.Module, data: Split) -> None:
    """Raise ModelError unless the network takes the data's images and has as many classes as they have."""
    modes = [(module, module.training) for module in model.modules()]
    probe = to_float(data.images[:2]).to(next(model.parameters()).device)
    try:
        with torch.no_grad():
            logits = model.eval()(probe)
    except (RuntimeError, ValueError) as error:
        shape = tuple(data.images.shape[1:])
        raise ModelError(
            f"network: does not take images of shape {shape}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        for module, mode in modes:
            module.training = mode
    if logits.dim() != 2 or logits.shape[1] != data.classes:
        raise ModelError(
            f"network: got logits of shape {tuple(logits.shape)} for {len(probe)} images, expected {data.classes} classes, "
            f"as {data.record['name']} has"
        )

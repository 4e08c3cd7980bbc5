"""Check that a network and threat models fit a data set."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from robustsoup.attacks.adaptation import adapt_network, check_train_mode
from robustsoup.data import Split, to_float
from robustsoup.errors import ModelError
from robustsoup.threats import ThreatModel


def adapt_to(model: nn.Module, data: Split) -> Tensor:
    """Adapt a network in place to the images and classes of data, see `adapt_network`.

    Returns:
        The logits of the first two images, in eval mode.
    """
    x = to_float(data.images[:2]).to(_device_of(model))
    return adapt_network(model, x, data.classes, inferred=data.inferred)


def check_fit(model: nn.Module, data: Split, threats: Iterable[ThreatModel] = ()) -> int:
    """Adapt a network to the images of a data set, and check that it has as many classes.

    Args:
        model: The network; adapted in place, see `adapt_network`. Its training mode stays.
        data: Any split with at least one sample.
        threats: Threat models, whose balls must not hold every image.

    Returns:
        The network's number of classes; more than the data's only if that number is inferred.

    Raises:
        ThreatError: A radius is too large for images of this shape.
        ModelError: The network cannot take images of this shape, or its logits are not
            (b, classes).
    """
    for threat in threats:
        threat.check_shape(data.images.shape[1:])
    logits = adapt_to(model, data)
    fits = logits.dim() == 2 and data.with_classes(logits.shape[1]).classes == logits.shape[1]
    if not fits:
        hint = ""
        if logits.dim() == 2 and logits.shape[1] == data.classes - 1 and int(data.labels.min()) > 0:
            hint = "; no label is 0: if classes are numbered from 1, subtract 1"
        raise ModelError(
            f"network: got logits of shape {tuple(logits.shape)} for {min(len(data), 2)} images, "
            f"expected {data.classes} classes as in {data.record['name']}{hint}"
        )
    return logits.shape[1]


def check_training(model: nn.Module, data: Split, batch_size: int) -> None:
    """Check that a network that fits takes a batch of the data in train mode.

    Args:
        model: The network; its state stays.
        data: The training split.
        batch_size: Images in a batch.

    Raises:
        ModelError: The network fails.
    """
    count = min(batch_size, len(data), 2)  # BatchNorm fails on one image, or takes any number
    check_train_mode(model, to_float(data.images[:count]).to(_device_of(model)))


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")

"""Find out whether a network expects other inputs: a forgotten or doubled normalisation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import frozen_eval
from robustsoup.data import Split, to_float
from robustsoup.evaluation.intervals import wilson
from robustsoup.models.network import NetworkSettings

SAMPLES = 500
GOOD_ACCURACY = 0.7
"""Clean accuracy from which on the inputs are not doubted."""
LEAST_KNOWLEDGE = 0.2
"""How far above always naming the most common class, of the way to 1, an accuracy must be."""
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_BATCH = 100


@dataclass(frozen=True)
class _Inputs:
    """Other inputs that a network may expect: (x - mean) / std, by channel.

    Attributes:
        mean: (channels,).
        std: (channels,).
        hint: What to do if the network is better with them.
    """

    mean: Tensor
    std: Tensor
    hint: str


def find_better_inputs(
    model: nn.Module, data: Split, settings: NetworkSettings | None
) -> str | None:
    """Return what to change about the normalisation, if that raises clean accuracy clearly.

    The usual normalisations are tried on at most 500 samples, and the removal of the one that is
    set. One helps if the intervals of the accuracies with and without it do not overlap and the
    network knows something with it: the lower bound lies a fifth of the way from the share of the
    most common class to 1, or higher. Networks that were never trained vary by a few points from
    one normalisation to the next. Nothing is tried on a network that is right on 70 %.

    Args:
        model: The network, on any device.
        data: The split.
        settings: The settings of the network; their `normalize` happens inside `model`.

    Returns:
        "15.0 % are correct, and 97.0 % with ...", or None if nothing helps.
    """
    part = data.first(min(SAMPLES, len(data)))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x, y = to_float(part.images).to(device), part.labels.to(device)
    present = _count_hits(model, x, y)
    if present >= GOOD_ACCURACY * len(y):
        return None
    _, high = wilson(present, len(y))
    commonest = y.bincount().max().item() / len(y)
    required = max(high, commonest + LEAST_KNOWLEDGE * (1 - commonest))
    best_hits, best_hint = 0, None
    for inputs in _list_inputs(x, settings):
        shape = (1, -1, 1, 1)
        changed = (x - inputs.mean.to(x).view(shape)) / inputs.std.to(x).view(shape)
        try:
            hits = _count_hits(model, changed, y)
        except Exception:  # a network that checks its inputs does not expect these
            continue
        low, _ = wilson(hits, len(y))
        if low > required and hits > best_hits:
            best_hits, best_hint = hits, inputs.hint
    if best_hint is None:
        return None
    now, then = 100 * present / len(y), 100 * best_hits / len(y)
    return f"{now:.1f} % of {len(y)} images are correct, and {then:.1f} % {best_hint}"


def _list_inputs(x: Tensor, settings: NetworkSettings | None) -> list[_Inputs]:
    channels = x.shape[1]
    if settings is not None and settings.normalize is not None:
        mean, std = (torch.tensor(part) for part in settings.normalize)
        # The inverse of what the network does first.
        undone = "without --normalize: the network normalises its inputs itself"
        return [_Inputs(-mean / std, 1 / std, undone)]
    own = (x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).clamp(min=1 / 255).tolist())
    constants = [
        own,
        ([0.5] * channels, [0.5] * channels),
        ([0.0] * channels, [1 / 255] * channels),
    ]
    if channels == len(IMAGENET[0]):
        constants.append(IMAGENET)
    return [
        _Inputs(
            torch.tensor(mean),
            torch.tensor(std),
            f"with --normalize {_join(mean)} {_join(std)}; was the network trained with it?",
        )
        for mean, std in constants
    ]


def _join(values: list[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


@torch.no_grad()
def _count_hits(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with frozen_eval(model):
        logits = torch.cat([model(batch) for batch in x.split(_BATCH)])
    return int((logits.argmax(1) == y).sum())

"""A few attacked samples of one network, for pictures: originals, perturbations, predictions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustsoup.arrays import read_arrays, write_arrays
from robustsoup.attacks.forward import frozen_eval, predict_logits
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split, to_float
from robustsoup.errors import RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.files import open_regular
from robustsoup.progress import Progress
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

MOST_VALUES = 2**20
"""Most values of all originals together; fewer samples are attacked where images are large."""


@dataclass(frozen=True)
class AttackedExamples:
    """k samples under one threat model.

    Attributes:
        delta: (k, c, h, w) float16, the perturbations.
        prediction: (k,) int64, predicted class of the attacked samples.
        robust: (k,) bool, correct without and under attack.
    """

    delta: Tensor
    prediction: Tensor
    robust: Tensor


@dataclass(frozen=True)
class Examples:
    """The first k samples of a split, and how an attack changes them.

    Attributes:
        images: (k, c, h, w) uint8, the originals.
        labels: (k,) int64.
        prediction: (k,) int64, predicted class without an attack.
        attacked: The samples under each threat model, in the order of the protocol.
    """

    images: Tensor
    labels: Tensor
    prediction: Tensor
    attacked: tuple[AttackedExamples, ...]

    def save(self, path: Path) -> None:
        """Write the examples to an .npz file."""
        arrays = {name: getattr(self, name) for name in ("images", "labels", "prediction")}
        for number, item in enumerate(self.attacked):
            arrays |= {f"{name}_{number}": value for name, value in vars(item).items()}
        write_arrays(path, arrays, compressed=True)

    @classmethod
    def load(cls, path: Path) -> "Examples":
        """Read examples that `save` wrote.

        Raises:
            RequestError: The file is missing or broken.
        """
        try:
            with open_regular(path) as file:
                return _assemble(read_arrays(file))
        except FileNotFoundError:
            raise RequestError(f"{path}: no such file; run the recipe again") from None
        except (KeyError, OSError, ValueError) as error:
            reason = f"no array {error}" if isinstance(error, KeyError) else error
            raise RequestError(f"{path}: no examples ({reason}); run the recipe again") from None


def _assemble(arrays: Mapping[str, Tensor]) -> Examples:
    images = _take(arrays, "images", torch.uint8, 4)
    shape = tuple(images.shape)
    attacked: list[AttackedExamples] = []
    while f"delta_{len(attacked)}" in arrays:
        number = len(attacked)
        item = AttackedExamples(
            delta=_take(arrays, f"delta_{number}", torch.float16, 4),
            prediction=_take(arrays, f"prediction_{number}", torch.int64, 1),
            robust=_take(arrays, f"robust_{number}", torch.bool, 1),
        )
        if item.delta.shape != images.shape or len(item.prediction) != len(item.robust):
            raise ValueError(f"perturbations of shape {tuple(item.delta.shape)}, not {shape}")
        attacked.append(item)
    labels = _take(arrays, "labels", torch.int64, 1)
    prediction = _take(arrays, "prediction", torch.int64, 1)
    lengths = {len(labels), len(prediction), *(len(item.robust) for item in attacked)}
    if lengths != {len(images)} or shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images of shape {shape}, and {sorted(lengths)} verdicts")
    return Examples(images, labels, prediction, tuple(attacked))


def _take(arrays: Mapping[str, Tensor], name: str, dtype: torch.dtype, ndim: int) -> Tensor:
    array = arrays[name]
    if array.dtype != dtype or array.ndim != ndim:
        raise ValueError(f"{name} has the type {array.dtype} and {array.ndim} axes")
    return array


def count_examples(split: Split, wanted: int) -> int:
    """Return the number of samples to attack: at most `wanted`, fewer where images are large."""
    values = split.images[0].numel()
    return min(wanted, len(split), max(1, MOST_VALUES // values))


def attack_examples(
    checkpoint: Checkpoint,
    data: Split,
    threats: tuple[ThreatModel, ...],
    settings: AttackSettings,
    *,
    device: torch.device,
    on_progress: Progress | None = None,
) -> Examples:
    """Attack all samples of a small split and keep what the attack did to them.

    Args:
        checkpoint: The network.
        data: The samples.
        threats: Threat models; clean ones are left out.
        settings: The attack.
        device: Device of the network.
        on_progress: Called with (done, total, figures).

    Returns:
        The examples.
    """
    model = checkpoint.network().to(device)
    evaluation = evaluate(
        model,
        data,
        threats,
        settings,
        device=str(device),
        keep_points=True,
        masking_check=False,
        on_progress=on_progress,
    )
    originals = to_float(data.images.cpu())
    attacked = []
    with frozen_eval(model):
        for verdicts in evaluation.threats.values():
            x_adv = originals if verdicts.x_adv is None else verdicts.x_adv

            def fetch(samples: Tensor, points: Tensor = x_adv) -> Tensor:
                return points[samples].to(device)

            logits = predict_logits(model, fetch, len(data), len(data), device)
            delta = (x_adv - originals).to(torch.float16)
            attacked.append(AttackedExamples(delta, logits.argmax(1), verdicts.robust))
    return Examples(data.images.cpu(), data.labels.cpu(), evaluation.prediction, tuple(attacked))

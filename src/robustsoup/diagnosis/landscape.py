"""The plane through three networks, and the loss on it (Garipov et al. 2018)."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from robustsoup import distributed
from robustsoup.attacks.adaptation import copy_network
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.data import Split, SplitLike, as_optional_split, as_split
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.diagnosis.geometry import gram_matrix
from robustsoup.digests import digest_json
from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError, CoefficientError
from robustsoup.files import write_text
from robustsoup.gradients import gradients_enabled
from robustsoup.models import network_fingerprint
from robustsoup.models.fit import adapt_to
from robustsoup.paths import user_path
from robustsoup.printable import make_printable
from robustsoup.progress import Progress, SavedState
from robustsoup.schema import MisfitError, list_of, nullable, number, table, text
from robustsoup.settings import LandscapeSettings
from robustsoup.soups.ancestry import check_ingredients
from robustsoup.soups.mixing import check_buffer_policy, mix, open_ingredients
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.adversarial_loss import measure_robust_loss

GridValue = TypeVar("GridValue")

GRID_START, GRID_END = -0.2, 1.2
"""Ends of the grid, in multiples of ||w2 - w0|| along x and of the height of w1 along y."""
MIN_RELATIVE_HEIGHT = 1e-4
"""Networks count as collinear if the height of w1 is below this fraction of the longest side."""


LARGEST_NUMBER = 1e30
"""Largest coordinate or loss of a saved landscape, in absolute value."""


def _moderate_number(value: object, place: str) -> None:
    """Accept numbers that stay finite where a figure computes with them."""
    number(value, place)
    if isinstance(value, (int, float)) and abs(value) > LARGEST_NUMBER:
        raise MisfitError(place, value, f"a number of at most {LARGEST_NUMBER:g}")


_numbers = list_of(_moderate_number)
_grid = list_of(list_of(nullable(_moderate_number)))
check_landscape = table(
    {
        "checkpoints": list_of(text),
        "x": _numbers,
        "y": _numbers,
        "positions": list_of(_numbers),
        "loss": _grid,
    },
    {
        "accuracy": nullable(_grid),
        "clean_loss": nullable(_grid),
        "clean_accuracy": nullable(_grid),
        "threat": nullable(text),
        "attack_steps": nullable(_moderate_number),
        "samples": nullable(_moderate_number),
        "split": nullable(text),
        "buffers": nullable(text),
        "seed": nullable(_moderate_number),
        "precision": nullable(text),
    },
)
"""Accept the content of the JSON file of a landscape."""


@dataclass(frozen=True)
class WeightPlane:
    """The plane through w0, w1 and w2, with w0 at the origin and w2 on the x axis.

    Lengths are Euclidean over the parameters.

    Attributes:
        width: ||w2 - w0||, the x coordinate of w2.
        foot: The x coordinate of w1.
        height: The y coordinate of w1.
    """

    width: float
    foot: float
    height: float

    @property
    def positions(self) -> tuple[tuple[float, float], ...]:
        """(x, y) of w0, w1 and w2."""
        return (0.0, 0.0), (self.foot, self.height), (self.width, 0.0)

    def axes(self, points: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Space `points` coordinates evenly along x and along y, from GRID_START to GRID_END."""
        fractions = torch.linspace(GRID_START, GRID_END, points, dtype=torch.float64)
        return tuple((fractions * self.width).tolist()), tuple((fractions * self.height).tolist())

    def alpha(self, x: float, y: float) -> tuple[float, float, float]:
        """Compute the coefficients of w0, w1, w2 at a point; they sum to 1 and may be negative."""
        alpha_1 = y / self.height
        alpha_2 = (x - alpha_1 * self.foot) / self.width
        return 1 - alpha_1 - alpha_2, alpha_1, alpha_2


def plane_through(checkpoints: Sequence[Checkpoint]) -> WeightPlane:
    """Compute the plane through three checkpoints from the inner products of their differences.

    Args:
        checkpoints: Three checkpoints of one network.

    Returns:
        The plane.

    Raises:
        CoefficientError: There are not three checkpoints, or they lie on one line.
        IngredientMismatch: The checkpoints belong to different networks.

    Source: Garipov et al. 2018, arXiv:1802.10026, section 3: u = (w2 - w0) / ||w2 - w0||; v is
        w1 - w0 without its component along u.
    """
    if len(checkpoints) != 3:
        raise CoefficientError(f"plane: got {len(checkpoints)} checkpoints, expected 3")
    check_ingredients(checkpoints)
    w0, w1, w2 = checkpoints
    names = [name for name in w0.parameters if w0.tensors[name].is_floating_point()]
    gram = gram_matrix([w1, w2], w0, names)
    width = math.sqrt(float(gram[1, 1]))
    foot = float(gram[0, 1]) / width if width else 0.0
    height = math.sqrt(max(float(gram[0, 0]) - foot**2, 0.0))
    longest = max(width, math.sqrt(float(gram[0, 0])))
    if not math.isfinite(longest) or min(width, height) <= MIN_RELATIVE_HEIGHT * longest:
        raise CoefficientError(
            f"plane: {', '.join(item.name for item in checkpoints)} lie on one line (or two are "
            "equal), so they define no plane; choose three that were fine-tuned differently"
        )
    return WeightPlane(width, foot, height)


@dataclass(frozen=True, repr=False)
class Landscape:
    """Losses and accuracies of the networks on a plane; rows go along y, columns along x.

    Attributes:
        checkpoints: Names of w0, w1 and w2.
        x: Coordinates along x, as in WeightPlane.
        y: Coordinates along y.
        positions: (x, y) of the three checkpoints.
        loss: (len(y), len(x)) mean loss in nats under attack; None where not finite.
        accuracy: (len(y), len(x)) accuracy in [0, 1] under attack.
        clean_loss: (len(y), len(x)) mean loss in nats on clean inputs; None where not finite.
        clean_accuracy: (len(y), len(x)) accuracy in [0, 1] on clean inputs.
        threat: The threat model, as text.
        attack_steps: Steps of APGD.
        samples: Number of samples.
        split: Name of the split that the samples are drawn from.
        buffers: Policy for the running statistics of BatchNorm.
        seed: Seed of the samples and of recalibration.
        precision: Precision of the attack.
    """

    checkpoints: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    positions: tuple[tuple[float, float], ...]
    loss: tuple[tuple[float | None, ...], ...]
    accuracy: tuple[tuple[float, ...], ...]
    clean_loss: tuple[tuple[float | None, ...], ...]
    clean_accuracy: tuple[tuple[float, ...], ...]
    threat: str
    attack_steps: int
    samples: int
    split: str
    buffers: str
    seed: int
    precision: str

    def __repr__(self) -> str:
        """Return one line: the checkpoints, the number of points and the range of the loss."""
        finite = [value for row in self.loss for value in row if value is not None]
        span = f"{min(finite):.3f} to {max(finite):.3f}" if finite else "not finite"
        names, points = ", ".join(self.checkpoints), f"{len(self.y)} x {len(self.x)}"
        return make_printable(
            f"Landscape({names}: {points} points, loss under {self.threat} {span})"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the landscape atomically as one JSON file, with a digest of its content."""
        path, content = user_path(path), asdict(self)
        write_text(path, json.dumps({**content, "digest": digest_json(content)}))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Landscape":
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: The file is missing or holds no landscape.
        """
        try:
            return cls(**read_landscape(path))
        except (MisfitError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a saved landscape: {error}") from None


def read_landscape(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields of a saved landscape, compared with their digest if the file has one.

    Raises:
        OSError: The file cannot be read.
        MisfitError: The file holds no landscape.
        ValueError: The file is no JSON, or its content changed.
    """
    content = read_json(path)
    check_landscape(content, "the plane")
    digest = content.pop("digest", None)
    if digest is not None and digest != digest_json(content):
        raise ValueError("its content changed after it was written")
    return content


@gradients_enabled()
def landscape(
    checkpoints: Sequence[CheckpointLike],
    data: SplitLike,
    *,
    threat: ThreatModel | str,
    points: int = 21,
    attack_steps: int = 10,
    samples: int = 2000,
    buffers: str = "recalibrate",
    base: CheckpointLike | None = None,
    calibrate_on: SplitLike | None = None,
    calibrate_samples: int = 10_000,
    network: nn.Module | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    state_path: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> Landscape:
    """Measure clean and robust loss on a grid in the plane through three networks.

    The grid has points x points points, each an affine mix of the three checkpoints. All points are
    evaluated on the same samples, under the training form of APGD: the highest loss of every sample
    counts, including samples that are already misclassified. Losses and accuracies are computed in
    float32.

    Args:
        checkpoints: Three checkpoints of one network, or their paths.
        data: The split to draw samples from.
        threat: Threat model of the attack.
        points: Points along each axis, at least 2.
        attack_steps: Steps of APGD, at least 1.
        samples: Number of samples, drawn by `seed`; all of `data` if it has fewer.
        buffers: Running statistics of every point: "base", "recalibrate" or
            "recalibrate-adversarial". Averaged variances can be negative outside the triangle.
        base: Source of the statistics under "base"; by default the first checkpoint.
        calibrate_on: Training split, required by the recalibrating policies.
        calibrate_samples: Number of samples to recalibrate on.
        network: The module to run, if the files do not record their network; it is not changed.
        seed: Seed of the samples and of recalibration.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        precision: Precision of the attack: "auto", "float32" or "bfloat16".
        state_path: File for the finished points; an interrupted run resumes from it.
        on_progress: Receives the number of finished points and their total.

    Returns:
        Losses and accuracies at every point, with the settings that produced them.

    Raises:
        CoefficientError: The checkpoints lie on one line.
        RequestError: A setting is out of range.

    Source: Garipov et al. 2018, arXiv:1802.10026; Huang 2023, Adversarial Learned Soups, section
        4.3.
    """
    settings = LandscapeSettings(
        threat=ThreatModel.parse(threat),
        attack_steps=attack_steps,
        points=points,
        samples=samples,
        buffers=buffers,
        calibrate_samples=calibrate_samples,
        seed=seed,
        precision=precision,
    )
    grid = open_plane(
        checkpoints,
        data,
        settings,
        base=base,
        calibrate_on=calibrate_on,
        network=network,
        device=device,
    )
    return grid.measure(state_path, on_progress)


def open_plane(
    checkpoints: Sequence[CheckpointLike],
    data: SplitLike,
    settings: LandscapeSettings,
    *,
    base: CheckpointLike | None = None,
    calibrate_on: SplitLike | None = None,
    network: nn.Module | None = None,
    device: str = "auto",
) -> "PlaneGrid":
    """Check the arguments of `landscape` and return the grid, of which no point is measured."""
    data = as_split(data, "landscape")
    calibrate_on = as_optional_split(calibrate_on, "landscape: calibrate_on")
    resolved = resolve_device(device)
    settings = replace(
        settings,
        samples=min(settings.samples, len(data)),
        precision=resolve_precision(settings.precision, resolved),
    )
    check_buffer_policy(settings.buffers, calibrate_on, settings.threat)
    settings.threat.check_shape(data.images.shape[1:])
    opened = open_ingredients(checkpoints, network)
    plane = plane_through(opened)
    subset, source = data.sample(settings.samples, settings.seed), None
    if settings.buffers == "base":
        source = Checkpoint.open(base) if base is not None else opened[0]
    model = copy_network(network) if network is not None else opened[0].network()
    fingerprint = [
        asdict(settings) | {"threat": str(settings.threat)},
        subset.fingerprint,
        calibrate_on and calibrate_on.fingerprint,
        source and source.digest,
        network_fingerprint(model),
        *(item.digest for item in opened),
    ]
    model = model.to(resolved)
    adapt_to(model, subset)
    return PlaneGrid(
        settings=settings,
        plane=plane,
        checkpoints=opened,
        base=source,
        calibrate_on=calibrate_on,
        network=network,
        model=model,
        data=subset.to(resolved),
        fingerprint=json.dumps(fingerprint, sort_keys=True),
    )


PointValues = tuple[float, float, float, float]
"""Clean loss, clean accuracy, robust loss and robust accuracy at a point."""


@dataclass(frozen=True)
class PlaneGrid:
    """Measures the networks on a grid of points of a plane.

    Attributes:
        settings: The settings of the landscape.
        plane: The plane through the checkpoints.
        checkpoints: The three checkpoints.
        base: Source of the running statistics under the policy "base".
        calibrate_on: Training split of the recalibrating policies.
        network: The module that the caller passed, or None.
        model: A network on the device; its weights are overwritten.
        data: The samples, on the device.
        fingerprint: Identifies the work, for saved states.
    """

    settings: LandscapeSettings
    plane: WeightPlane
    checkpoints: Sequence[Checkpoint]
    base: Checkpoint | None
    calibrate_on: Split | None
    network: nn.Module | None
    model: nn.Module
    data: Split
    fingerprint: str

    def measure_rows(
        self,
        rows: range,
        state_path: str | os.PathLike[str] | None = None,
        on_progress: Progress | None = None,
    ) -> list[PointValues]:
        """Measure the points of some rows, row by row.

        Args:
            rows: Numbers of the rows; a state belongs to the rows that it was saved for.
            state_path: File for the finished points; an interrupted call resumes from it.
            on_progress: Receives the number of finished points and their total.
        """
        x, y = self.plane.axes(self.settings.points)
        points = [(u, y[row]) for row in rows for u in x]
        own_path = state_path if distributed.is_first() else None
        saved = SavedState(own_path, self.fingerprint)
        state = distributed.from_first(saved.load)
        with saved.refuse_malformed():
            values = [_point_values(value) for value in state["values"]] if state else []
        try:
            for point in points[len(values) :]:
                values.append(self.measure_point(*point))
                if saved.due():
                    saved.save({"values": values})
                if on_progress:
                    on_progress(len(values), len(points), f"robust loss {values[-1][2]:.3f}")
        finally:
            saved.save({"values": values})
        return values

    def measure(
        self, state_path: str | os.PathLike[str] | None, on_progress: Progress | None
    ) -> Landscape:
        """Measure all points; the arguments are those of `measure_rows`."""
        settings, columns = self.settings, self.settings.points
        x, y = self.plane.axes(columns)
        values = self.measure_rows(range(columns), state_path, on_progress)
        clean_loss, clean_accuracy, loss, accuracy = zip(*values, strict=True)
        return Landscape(
            checkpoints=tuple(item.name for item in self.checkpoints),
            x=x,
            y=y,
            positions=self.plane.positions,
            loss=_split_losses(loss, columns),
            accuracy=_split_rows(accuracy, columns),
            clean_loss=_split_losses(clean_loss, columns),
            clean_accuracy=_split_rows(clean_accuracy, columns),
            threat=str(settings.threat),
            attack_steps=settings.attack_steps,
            samples=settings.samples,
            split=self.data.name,
            buffers=settings.buffers,
            seed=settings.seed,
            precision=settings.precision,
        )

    def measure_point(self, x: float, y: float) -> PointValues:
        """Measure one point."""
        settings = self.settings
        soup = mix(
            self.checkpoints,
            self.plane.alpha(x, y),
            affine=True,
            buffers=settings.buffers,
            base=self.base,
            calibrate_on=self.calibrate_on,
            calibrate_samples=settings.calibrate_samples,
            threat=settings.threat,
            attack_steps=min(settings.attack_steps, 2),
            network=self.network,
            device=self.data.images.device,
            precision=settings.precision,
            seed=settings.seed,
        )
        soup.load_into(self.model)
        clean = measure_robust_loss(self.model, self.data, CLEAN)
        robust = measure_robust_loss(
            self.model,
            self.data,
            settings.threat,
            steps=settings.attack_steps,
            precision=settings.precision,
        )
        return (*clean, *robust)


def _point_values(values: Sequence[float]) -> PointValues:
    """Return the four values of a finished point of a saved state."""
    clean_loss, clean_accuracy, loss, accuracy = map(float, values)
    return clean_loss, clean_accuracy, loss, accuracy


def _split_losses(losses: Sequence[float], columns: int) -> tuple[tuple[float | None, ...], ...]:
    """Split losses into rows; a loss that is not finite becomes None."""
    return _split_rows([loss if math.isfinite(loss) else None for loss in losses], columns)


def _split_rows(values: Sequence[GridValue], columns: int) -> tuple[tuple[GridValue, ...], ...]:
    starts = range(0, len(values), columns)
    return tuple(tuple(values[start : start + columns]) for start in starts)

"""The plane through three networks, and the loss on it (Garipov et al. 2018)."""

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.diagnosis.geometry import gram
from robustsoup.errors import CheckpointError, CoefficientError, RequestError
from robustsoup.files import write_text
from robustsoup.fingerprint import network_mark
from robustsoup.progress import Progress, SavedState
from robustsoup.soups.mixing import POLICIES, check_ingredients, check_policy, mix
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.adversarial_loss import robust_loss

LEAST, MOST = -0.2, 1.2
"""The part of the plane that is looked at, in multiples of ||w2 - w0|| along x and of w1's height along y."""
FLAT = 1e-4
"""Three networks count as collinear where w1 is nearer to the line through w0 and w2 than this share of the longest side."""


@dataclass(frozen=True)
class Plane:
    """The plane through w0, w1 and w2 with w0 at the origin and w2 on the x axis; lengths are Euclidean over the parameters.

    width: ||w2 - w0||, the x of w2; foot, height: the x and y of w1.
    """

    width: float
    foot: float
    height: float

    @property
    def positions(self) -> tuple[tuple[float, float], ...]:
        """(x, y) of w0, w1 and w2."""
        return (0.0, 0.0), (self.foot, self.height), (self.width, 0.0)

    def axes(self, points: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """`points` coordinates along x and along y, evenly from LEAST to MOST times the width and the height."""
        shares = torch.linspace(LEAST, MOST, points, dtype=torch.float64)
        return tuple((shares * self.width).tolist()), tuple((shares * self.height).tolist())

    def alpha(self, x: float, y: float) -> tuple[float, float, float]:
        """The coefficients of w0, w1 and w2 at a point: they sum to 1 and may be negative."""
        one = y / self.height
        two = (x - one * self.foot) / self.width
        return 1 - one - two, one, two


def plane_through(checkpoints: Sequence[Checkpoint]) -> Plane:
    """The plane through three checkpoints of one network, from the inner products of their differences.

    Raises CoefficientError where they are not three, or lie on one line, IngredientMismatch where they are not one network.
    Source: Garipov et al. 2018, arXiv:1802.10026, section 3: u = (w2 - w0) / ||w2 - w0||, v = w1 - w0 without its part along u.
    """
    if len(checkpoints) != 3:
        raise CoefficientError(f"plane: got {len(checkpoints)} checkpoints, expected 3")
    check_ingredients(checkpoints)
    w0, w1, w2 = checkpoints
    names = [name for name in w0.parameters if w0.tensors[name].is_floating_point()]
    inner = gram([w1, w2], w0, names)
    width = math.sqrt(float(inner[1, 1]))
    foot = float(inner[0, 1]) / width if width else 0.0
    height = math.sqrt(max(float(inner[0, 0]) - foot**2, 0.0))
    longest = max(width, math.sqrt(float(inner[0, 0])))
    if not math.isfinite(longest) or min(width, height) <= FLAT * longest:
        names = ", ".join(item.name for item in checkpoints)
        raise CoefficientError(
            f"plane: {names} lie on one line (or two are the same), so no plane is defined; "
            "give three that were fine-tuned apart"
        )
    return Plane(width, foot, height)


@dataclass(frozen=True)
class Landscape:
    """Losses (nats) and accuracies (0 to 1) of the networks on a plane; rows go along y, columns along x.

    checkpoints: names of w0, w1, w2; x, y: coordinates as in Plane; positions: theirs. loss, accuracy: under attack;
    clean_loss, clean_accuracy: without. A loss that is not finite is None.
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

    def save(self, path: str | os.PathLike) -> Path:
        """Write it as one JSON file, whole or not at all."""
        write_text(Path(path), json.dumps(asdict(self)))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Landscape":
        """Read what `save` wrote. Raises CheckpointError for anything else."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a landscape that robustsoup saved: {error}"
            ) from None


def landscape(
    checkpoints: Sequence[Checkpoint | str | os.PathLike],
    data: Split,
    *,
    threat: ThreatModel | str,
    points: int = 21,
    attack_steps: int = 10,
    samples: int = 2000,
    buffers: str = "recalibrate",
    base: Checkpoint | str | os.PathLike | None = None,
    calibrate_on: Split | None = None,
    calibrate_samples: int = 10_000,
    network: nn.Module | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    state_path: str | os.PathLike | None = None,
    on_progress: Progress | None = None,
) -> Landscape:
    """The loss of points x points networks on the plane through three checkpoints, clean and under attack.

    Every point is an affine mix of the three; buffers: whose running statistics it has ("base": those of `base`, else
    of the first checkpoint; "recalibrate", on calibrate_on; "recalibrate-adversarial"). Judged on the same `samples`
    samples of data (all, if there are fewer), drawn by seed, under the training form of APGD: the highest loss of every
    sample, nobody left out. The attack runs in `precision`; losses and accuracies are float32's. state_path: where the
    points that are done are kept, so that a killed run goes on.
    on_progress(done, total, figures) counts points.

    Raises CoefficientError for three on one line, RequestError for points below 2 or a policy that does not fit.
    Source: Garipov et al. 2018, arXiv:1802.10026; Huang, Adversarial Learned Soups, section 4.3.
    """
    threat, where = ThreatModel.parse(threat), resolve_device(device)
    precision = resolve_precision(precision, where)
    opened = [Checkpoint.open(item) for item in checkpoints]
    check_settings(points, attack_steps, buffers)
    check_policy(buffers, calibrate_on, threat)
    plane = plane_through(opened)
    x, y = plane.axes(points)
    samples = min(samples, len(data))
    judged = data.sample(samples, seed)
    base = (Checkpoint.open(base) if base is not None else opened[0]) if buffers == "base" else None
    model = copy.deepcopy(network) if network is not None else opened[0].network()
    settings = {
        "threat": str(threat),
        "attack_steps": attack_steps,
        "samples": samples,
        "split": data.name,
        "buffers": buffers,
        "seed": seed,
        "precision": precision,
    }
    mark = [
        settings,
        points,
        judged.digest,
        calibrate_samples,
        calibrate_on and calibrate_on.digest,
        base and base.digest,
    ]
    mark += [network_mark(model), *(item.digest for item in opened)]
    saved = SavedState(state_path, json.dumps(mark, sort_keys=True))
    state = saved.load()
    values: list[list[float]] = state["values"] if state else []
    model, judged = model.to(where, memory_format=torch.channels_last), judged.to(where)
    todo = [(u, v) for v in y for u in x]
    for u, v in todo[len(values) :]:
        soup = mix(
            opened,
            plane.alpha(u, v),
            affine=True,
            buffers=buffers,
            base=base,
            calibrate_on=calibrate_on,
            calibrate_samples=calibrate_samples,
            threat=threat,
            attack_steps=min(attack_steps, 2),
            network=network,
            device=where,
            precision=precision,
            seed=seed,
        )
        soup.load_into(model)
        clean = robust_loss(model, judged, CLEAN)
        values.append(
            [*clean, *robust_loss(model, judged, threat, steps=attack_steps, precision=precision)]
        )
        if saved.due():
            saved.save({"values": values})
        if on_progress:
            on_progress(len(values), len(todo), f"robust loss {values[-1][2]:.3f}")
    saved.save({"values": values})
    clean_loss, clean_accuracy, loss, accuracy = (
        _grid(column, points) for column in zip(*values, strict=True)
    )
    names = tuple(item.name for item in opened)
    return Landscape(
        names, x, y, plane.positions, loss, accuracy, clean_loss, clean_accuracy, **settings
    )


def check_settings(points: int, attack_steps: int, buffers: str) -> None:
    """Raise RequestError for settings that no landscape can have."""
    if points < 2 or attack_steps < 1:
        raise RequestError(
            f"landscape: got points {points}, attack_steps {attack_steps}; expected at least 2 points and 1 step"
        )
    if buffers not in POLICIES or buffers in ("average", "tracked"):
        raise RequestError(
            f'landscape: buffers: got "{buffers}", expected base, recalibrate or recalibrate-adversarial '
            "(averaged variances can turn negative outside the triangle)"
        )


def _grid(column: Sequence[float], points: int) -> tuple[tuple[Any, ...], ...]:
    finite = [value if math.isfinite(value) else None for value in column]
    return tuple(tuple(finite[row * points : (row + 1) * points]) for row in range(points))

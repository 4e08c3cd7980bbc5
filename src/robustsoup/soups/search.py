"""Which coefficients to try (uniform, grid, line), and judging every candidate on one split."""

import copy
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from robustsoup.checkpoints import Checkpoint
from robustsoup.data import Split
from robustsoup.errors import CoefficientError
from robustsoup.evaluation import Evaluation, evaluate
from robustsoup.leakage import check_leakage
from robustsoup.progress import Progress
from robustsoup.soups.mixing import mix
from robustsoup.threats import ThreatModel

Alpha = tuple[float, ...]
LIMIT = 2000


def grid(n: int, step: float = 0.2) -> list[Alpha]:
    """Every (alpha_1..alpha_n) of multiples of `step` that sum to 1: 6, 21, 56, 126 of them for n = 2..5 at 0.2.

    Raises CoefficientError if `step` is not a fraction of 1, or for more than 2,000 candidates.
    """
    parts = round(1 / step) if step > 0 else 0
    if n < 1 or parts < 1 or abs(parts * step - 1) > 1e-9:
        raise CoefficientError(
            f"grid: got n {n} and step {step}, expected n of at least 1 and a step such as 0.2 or 0.25"
        )
    count = 1
    for i in range(1, n):
        count = count * (parts + i) // i
    if count > LIMIT:
        raise CoefficientError(f"grid: {n} ingredients at step {step} are {count:,} soups, expected at most {LIMIT:,}")
    bars = itertools.combinations(range(parts + n - 1), n - 1)
    points = []
    for bar in bars:
        edges = (-1, *bar, parts + n - 1)
        points.append(tuple((right - left - 1) / parts for left, right in itertools.pairwise(edges)))
    return points


def candidates(method: str, n: int, step: float = 0.2) -> list[Alpha]:
    """The coefficients that a method tries: "uniform", "grid", or "line" (wise-ft, n = 2). Raises CoefficientError."""
    if method == "uniform":
        return [(1 / n,) * n]
    if method == "line" and n != 2:
        raise CoefficientError(f"line: got {n} ingredients, expected 2")
    if method in ("grid", "line"):
        return grid(n, step)
    raise CoefficientError(f'method: got "{method}", expected "grid", "line" or "uniform"')


@dataclass(frozen=True)
class Candidate:
    """A soup that was tried: its coefficients and what it scored."""

    name: str
    alpha: Alpha
    evaluation: Evaluation


def alpha_name(alpha: Sequence[float]) -> str:
    """A name for files and tables: (0.2, 0.4, 0.4) -> "0.2-0.4-0.4"."""
    return "-".join(f"{value:.6g}" for value in alpha)


def search(
    ingredients: Sequence[Checkpoint | str | os.PathLike], data: Split, threats: Sequence[ThreatModel | str], *,
    method: str = "grid", step: float = 0.2, buffers: str = "average", calibrate_on: Split | None = None,
    steps: int = 100, samples: int | None = None, seed: int = 0, allow_leakage: bool = False,
    network: nn.Module | None = None, device: str = "auto", precision: str = "float32",
    on_progress: Progress | None = None,
) -> list[Candidate]:  # fmt: skip
    """Evaluate every soup of a method on `data` (the validation split) and return them all; `select` picks one.

    buffers, calibrate_on, network: as in `mix`; steps, samples, seed, precision: as in `evaluate`.
    Raises LeakageError if an ingredient was trained on samples of `data`, unless allow_leakage.
    """
    loaded = [Checkpoint.load(item) for item in ingredients]
    check_leakage(loaded, data, allow=allow_leakage)
    points = candidates(method, len(loaded), step)
    found = []
    for number, alpha in enumerate(points):
        soup = mix(loaded, alpha, buffers=buffers, calibrate_on=calibrate_on, network=network, device=device, seed=seed)
        model = copy.deepcopy(network) if network is not None else soup.network()
        soup.load_into(model)
        evaluation = evaluate(
            model, data, threats, steps=steps, samples=samples, seed=seed, device=device, precision=precision
        )
        found.append(Candidate(alpha_name(alpha), alpha, evaluation))
        if on_progress:
            clean = evaluation.accuracy["clean"]
            on_progress(number + 1, len(points), f"{alpha_name(alpha)} clean {clean.value:.1%}")
    return found

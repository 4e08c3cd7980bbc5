"""Which coefficients to try (uniform, grid, line), and judging every candidate on one split."""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import check_leakage
from robustsoup.data import Split
from robustsoup.errors import RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.progress import Progress
from robustsoup.soups.grid import Alpha, alpha_name, candidates, corners
from robustsoup.soups.mixing import mix
from robustsoup.soups.screening import (
    Contender,
    EvaluationRequest,
    Results,
    Screening,
    mark_screened,
    run_screening,
)
from robustsoup.soups.selection import Candidate, Goal, Score
from robustsoup.threats import ThreatModel

SCREEN = {"steps": 10, "precision": "auto"}
"""How a soup is screened: a short attack, on top of the points that broke the ingredients."""


def greedy(
    alone: Sequence[Evaluation], judge: Callable[[Alpha], Evaluation], score: Score | str
) -> list[Candidate]:
    """The greedy soup: from the best ingredient on, keep each further one, best first, unless the score falls.

    alone: what each ingredient scored; judge(alpha): what a soup scores, on the same samples, which must be held-out ones.
    Returns the ingredients in their order and every soup that was tried; the last one is the greedy soup.
    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """
    score, n = Score.parse(score), len(alone)
    tried = [Candidate(alpha_name(a), a, e) for a, e in zip(corners(n), alone, strict=True)]
    order = sorted(range(n), key=lambda i: -score.of(alone[i].accuracy))
    kept, best = [order[0]], tried[order[0]]
    for i in order[1:]:
        members = {*kept, i}
        alpha = tuple(float(j in members) / len(members) for j in range(n))
        candidate = Candidate(alpha_name(alpha), alpha, judge(alpha))
        tried.append(candidate)
        if score.of(candidate.evaluation.accuracy) >= score.of(best.evaluation.accuracy):
            kept, best = [*kept, i], candidate
    return [c for c in tried if c is not best] + [best]


def search(
    ingredients: Sequence[Checkpoint | str | os.PathLike],
    data: Split,
    threats: Sequence[ThreatModel | str],
    *,
    method: str = "grid",
    step: float = 0.2,
    buffers: str = "average",
    calibrate_on: Split | None = None,
    attack: str = "apgd",
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    samples: int | None = None,
    seed: int = 0,
    screen: bool = False,
    screen_steps: int = SCREEN["steps"],
    maximise: ThreatModel | str | None = None,
    point: bool = False,
    require: Sequence[str] = (),
    score: str | None = None,
    allow_leakage: bool = False,
    network: nn.Module | None = None,
    device: str = "auto",
    precision: str = "float32",
    on_progress: Progress | None = None,
) -> list[Candidate]:
    """Evaluate every soup of a method on `data` (the validation split) and return them all; `select` picks one.

    buffers, calibrate_on, network: as in `mix`; attack to seed, precision: as in `evaluate`.

    screen: attack the ingredients in full; try their adversarial points on every soup alike, with a short attack
    (screen_steps, bfloat16 where the device has it); then confirm the front in full, but for soups that the samples cannot
    tell from one that is confirmed (see `worth_confirming`). The others' figures are upper bounds
    (`Candidate.confirmed` is False, the record says "screened").
    score: what method "greedy" must not lose, as in `Score`; else the first threat. Its last candidate is the greedy soup.
    maximise, require (of clean accuracy, as in `select`): with screen, confirm only what can still win the choice, and stop a
    soup as soon as it has lost.

    Raises LeakageError if an ingredient was trained on samples of `data`, unless allow_leakage.
    """
    if screen and attack == "autoattack":
        raise RequestError(
            "search: soups are screened by a short apgd or pgd; screen does not go with autoattack"
        )
    if method == "greedy" and screen:
        raise RequestError(
            "search: a greedy soup is judged in full at each turn; screen does not go with it"
        )
    loaded = [Checkpoint.open(item) for item in ingredients]
    check_leakage(loaded, data, allow=allow_leakage)
    mixed = {
        "buffers": buffers,
        "calibrate_on": calibrate_on,
        "network": network,
        "device": device,
        "seed": seed,
    }
    full = {
        "attack": attack,
        "loss": loss,
        "steps": steps,
        "restarts": restarts,
        "precision": precision,
    }
    short = full | {"steps": screen_steps, "restarts": 1, "precision": SCREEN["precision"]}
    judge = _Judge(
        loaded,
        data,
        threats,
        mixed,
        {"samples": samples, "seed": seed, "device": device},
        full,
        on_progress,
    )
    if method == "greedy":
        judge.total = 2 * len(loaded) - 1
        alone = [judge(alpha) for alpha in corners(len(loaded))]
        return greedy(alone, judge, str(score or next(iter(threats), "clean")))
    points = {alpha_name(alpha): alpha for alpha in candidates(method, len(loaded), step)}
    if not screen:
        judge.total = len(points)
        return [Candidate(name, alpha, judge(alpha)) for name, alpha in points.items()]
    judge.total = len(points) + len(loaded)
    names = [alpha_name(alpha) for alpha in corners(len(loaded))]
    alphas = points | dict(zip(names, corners(len(loaded)), strict=True))
    screening = Screening(
        tuple(names),
        tuple(Contender(name, name if name in names else None) for name in points),
        Goal.parse(maximise, require, point=point),
    )

    def run_request(request: EvaluationRequest, results: Results) -> Evaluation:
        settings = {
            "keep_points": request.keep_points,
            "pool": [results[item] for item in request.pool],
            "after": None if request.after is None else results[request.after],
            "stop_below": request.stop_below,
        }
        alpha = alphas[request.candidate]
        if request.mode == "short":
            return mark_screened(judge(alpha, **short, **settings))
        if request in first:
            return judge(alpha, **settings)
        return judge.silently(alpha, **full, **settings)

    first = set(screening.first_requests())
    final = run_screening(screening, run_request)
    return [Candidate(name, alpha, final[name]) for name, alpha in points.items()]


class _Judge:
    """Mixes a soup and judges it; called with coefficients alone, in full."""

    def __init__(
        self,
        loaded: Sequence[Checkpoint],
        data: Split,
        threats: Sequence[ThreatModel | str],
        mixed: dict[str, Any],
        shared: dict[str, Any],
        full: dict[str, Any],
        on_progress: Progress | None,
    ) -> None:
        self.loaded, self.data, self.threats, self.mixed = loaded, data, threats, mixed
        self.shared, self.full, self.on_progress = shared, full, on_progress
        self.done, self.total = 0, 0

    def __call__(self, alpha: Alpha, **settings: Any) -> Evaluation:
        found = self.silently(alpha, **(self.full | settings))
        self.done += 1
        if self.on_progress:
            figures = f"{alpha_name(alpha)} clean {found.accuracy['clean'].value:.1%}"
            self.on_progress(self.done, self.total, figures)
        return found

    def silently(self, alpha: Alpha, **settings: Any) -> Evaluation:
        """Judge and tell nobody: for what is judged once more."""
        soup, network = mix(self.loaded, alpha, **self.mixed), self.mixed["network"]
        model = copy.deepcopy(network) if network is not None else soup.network()
        soup.load_into(model)
        return evaluate(model, self.data, self.threats, **self.shared, **settings)

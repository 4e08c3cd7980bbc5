"""Which coefficients to try (uniform, grid, line), and judging every candidate on one split."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import check_leakage
from robustsoup.data import Split
from robustsoup.errors import RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.progress import Progress
from robustsoup.soups.grid import alpha_name, candidates, corners
from robustsoup.soups.mixing import mix
from robustsoup.soups.selection import (
    Alpha,
    Candidate,
    Requirement,
    Score,
    select,
    worth_confirming,
)
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


def screened(evaluation: Evaluation) -> Evaluation:
    """The same evaluation, marked as a screening: its robust figures are upper bounds."""
    return replace(evaluation, record={**evaluation.record, "screened": True})


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
    screening = _Screening(judge, points, short)
    wanted = [Requirement.parse(text) for text in require]
    maximised = (
        maximise if maximise in (None, "clean", "union") else str(ThreatModel.parse(maximise))
    )
    if screening.measures == [maximised] and all(r.key == "clean" for r in wanted):
        screening.confirm_choice(maximised, wanted, point)
    else:
        screening.confirm_front(maximise, wanted, point)
    return screening.candidates()


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


class _Screening:
    """Every soup tried with the ingredients' points and a short attack, and those that are confirmed in full."""

    def __init__(self, judge: _Judge, points: dict[str, Alpha], short: dict[str, Any]) -> None:
        self.judge, self.points = judge, points
        alone = {alpha: judge(alpha, keep_points=True) for alpha in corners(len(judge.loaded))}
        self.pool = list(alone.values())
        self.measures = list(self.pool[0].threats)
        self.tried = {
            name: judge(alpha, pool=self.pool, after=alone[alpha])
            if alpha in alone
            else screened(judge(alpha, **short, pool=self.pool))
            for name, alpha in points.items()
        }

    def candidates(self) -> list[Candidate]:
        """Every soup with what is known of it now."""
        return [Candidate(name, alpha, self.tried[name]) for name, alpha in self.points.items()]

    def confirm_front(
        self, maximise: ThreatModel | str | None, wanted: Sequence[Requirement], point: bool
    ) -> None:
        """Confirm what the samples cannot tell from one another otherwise, and what would be chosen."""
        every = self.candidates()
        leading = {c.name for c in worth_confirming(every)}
        if maximise is not None:
            best = select(
                every, maximise=maximise, require=wanted, point=point, unconfirmed=True
            ).best
            leading |= {best.name} if not best.confirmed else set()
        for name in leading:
            self._confirm(name)

    def confirm_choice(self, key: str, wanted: Sequence[Requirement], point: bool) -> None:
        """Confirm only what can still be the most robust under `key`, and stop it as soon as it has lost."""
        tried = self.tried
        meeting = [
            n for n, e in tried.items() if all(r.met_by(e.accuracy, point=point) for r in wanted)
        ] or list(tried)
        best = max(
            (tried[n].accuracy[key].hits for n in meeting if not tried[n].record.get("screened")),
            default=-1,
        )
        for name in sorted(meeting, key=lambda n: -tried[n].accuracy[key].hits):
            if tried[name].record.get("screened") and tried[name].accuracy[key].hits >= best:
                self._confirm(name, max(best, 0))
                best = max(best, tried[name].accuracy[key].hits)

    def _confirm(self, name: str, stop_below: int | None = None) -> None:
        more = {"pool": self.pool, "after": self.tried[name], "stop_below": stop_below}
        self.tried[name] = self.judge.silently(self.points[name], **self.judge.full, **more)

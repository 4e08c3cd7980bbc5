"""evaluate: clean and robust verdicts of one network, sample by sample."""

import copy
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.attacks import ATTACKS, Settings
from robustsoup.attacks.attack import Samples, run_attempts, try_points
from robustsoup.attacks.autoattack import attack_chunk, plan_autoattack
from robustsoup.attacks.engine import Outcome, excess_of, margin_of
from robustsoup.attacks.forward import frozen_eval, pass_rows, predict
from robustsoup.attacks.projections import norms
from robustsoup.checkpoints.checkpoint import Checkpoint, as_network
from robustsoup.data import Split, to_float
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import DataError, Diverged, ModelError, RequestError
from robustsoup.evaluation.verdicts import CLEAN_KEY, Evaluation, Verdicts
from robustsoup.models.fit import check_fit
from robustsoup.progress import Progress, SavedState
from robustsoup.threats import ThreatModel

POOL = "pool"
TOLERANCE = 1e-6
CHUNK = 500
"""How many samples AutoAttack is given at once; what it does to one depends on the others."""


SAME = (
    "attack",
    "version",
    "loss",
    "steps",
    "restarts",
    "targets",
    "eot",
    "seed",
    "search_precision",
    "rows",
    "chunk",
    "stopped",
)
"""What two evaluations have in common if the same attack made them."""


def evaluate(
    network: nn.Module | Checkpoint | str | os.PathLike,
    data: Split,
    threats: Sequence[ThreatModel | str] = (),
    *,
    attack: str = "apgd",
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    eot: int = 1,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    keep_points: bool = False,
    pool: Sequence[Evaluation] = (),
    after: Evaluation | None = None,
    stop_below: int | None = None,
    state_path: str | os.PathLike | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Clean and robust verdicts of one network on a split, sample by sample, in eval mode.

    threats: what it is attacked with, one after the other; clean ones add nothing. samples: only the first so many.
    attack: "apgd", "pgd", or "autoattack" (the standard four, by pyautoattack); loss ("ce", "dlr", "targeted dlr"), steps,
    restarts, targets and eot: as in `apgd`, cold starts seeded by (seed, sample id, restart). A sample that is wrong clean
    counts as broken and is not attacked. precision: of the search, "float32", "bfloat16" or "auto"; every verdict is
    float32's. batch_size: the most images in a pass.

    keep_points: keep the adversarial images too. pool: evaluations that kept theirs, of the same samples; their points are
    tried on top of the attack. after: an earlier evaluation of the same network on the same samples: its clean
    predictions are taken over, what it broke stays broken, and what survived the very same attack is not attacked again.
    stop_below: give up once fewer samples survive the one threat (then robust accuracy is an upper bound, and the record
    says "stopped").
    state_path: where what is settled is kept, so that a killed evaluation continues, sample by sample.
    on_progress(done, total, figures) counts samples times (threats + 1).

    A module that is given is not changed. The record holds the protocol, a certificate that every point lies in the ball
    and the box (judged in float64), and warnings.

    Raises ModelError if the network does not fit the data, Diverged if its logits hold NaN, RequestError for a wrong
    setting, before any attack.
    """
    parsed = list(dict.fromkeys(t for t in map(ThreatModel.parse, threats) if not t.is_clean))
    if attack not in ATTACKS:
        raise RequestError(f'attack: got "{attack}", expected one of {", ".join(ATTACKS)}')
    where = resolve_device(device)
    settings = Settings(
        "apgd" if attack == "autoattack" else attack,
        loss,
        steps,
        restarts,
        targets,
        eot,
        seed,
        resolve_precision(precision, where),
        batch_size,
        stop_below,
    ).check(data.classes)
    if stop_below is not None and len(parsed) != 1:
        raise RequestError(f"stop_below: got {len(parsed)} threats, expected one")
    data = data.first(samples)
    _check_labels(data)
    standard = (
        plan_autoattack(data.classes, parsed[0]) if attack == "autoattack" and parsed else None
    )
    if not isinstance(network, nn.Module):
        network = Checkpoint.load(network)
    model = copy.deepcopy(network) if isinstance(network, nn.Module) else as_network(network)
    warnings = []
    if isinstance(network, nn.Module) and any(module.training for module in network.modules()):
        warnings.append("the network was in train mode; it was judged in eval mode")
    model = model.to(where, memory_format=torch.channels_last)
    check_fit(model, data)
    run = _Run(model, data, parsed, settings, standard, where, keep_points, pool, after)
    fingerprint = ""
    if state_path is not None:
        fingerprint = json.dumps(
            [
                run.protocol(),
                data.digest,
                keep_points,
                after and after.to_json(),
                [one.to_json() for one in pool],
                network.digest if isinstance(network, Checkpoint) else Checkpoint.of(model).digest,
            ],
            sort_keys=True,
        )
    saved = SavedState(state_path, fingerprint)
    started = time.perf_counter()
    with frozen_eval(model):
        run.judge_clean(on_progress)
        run.attack(saved, on_progress)
    record = {
        "kind": "evaluation",
        "split": data.name,
        "data": data.record,
        "samples": len(data),
        "threats": [str(threat) for threat in parsed],
        **run.protocol(),
        "precision": "float32",
        "device": where.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - started,
        "checkpoint": network.digest if isinstance(network, Checkpoint) else None,
        "certificate": run.certificate(),
        "warnings": warnings + run.warnings(),
    }
    if run.stopped:
        record["stopped"] = True
    if after is not None:
        record["warnings"] = list(dict.fromkeys([*record["warnings"], *after.warnings]))
    return Evaluation(
        data.ids.cpu(), run.labels, run.prediction, run.margin, run.verdicts(), record
    )


class _Run:
    """One evaluation: what is asked, and what has come out so far."""

    def __init__(
        self,
        model: nn.Module,
        data: Split,
        threats: list[ThreatModel],
        settings: Settings,
        standard: Any,
        device: torch.device,
        keep_points: bool,
        pool: Sequence[Evaluation],
        after: Evaluation | None,
    ) -> None:
        self.model, self.data, self.threats, self.settings, self.standard = (
            model,
            data,
            threats,
            settings,
            standard,
        )
        self.device, self.rows, self.pool = device, pass_rows(device, settings.batch_size), pool
        self.keep_points, self.after = keep_points, after
        for one in [*pool, *([after] if after else [])]:
            if not torch.equal(one.ids[: len(data)], data.ids.cpu()) or len(one.ids) < len(data):
                raise RequestError(
                    "evaluate: pool and after must be evaluations of the same samples"
                )
        self.labels, self.stopped = data.labels.cpu(), False
        self.outcomes: dict[str, Outcome] = {}
        self.pooled = [self._pool_points(threat) for threat in threats] if pool else []

    def fetch(self, at: Tensor) -> Tensor:
        """Samples as float images on the device; only these rows of the split are read."""
        x = to_float(self.data.images[at.to(self.data.images.device)]).to(self.device)
        return x.contiguous(memory_format=torch.channels_last)

    def own_names(self) -> list[str]:
        """The attempts of this attack, in order."""
        return (
            list(self.standard.attacks)
            if self.standard
            else [attempt.name for attempt in self.settings.attempts(self.data.classes)]
        )

    def names(self) -> list[str]:
        """What can break a sample: its own attempts first."""
        earlier = self.after.record["broken_by"] if self.after else []
        return list(
            dict.fromkeys([CLEAN_KEY, *self.own_names(), *([POOL] if self.pool else []), *earlier])
        )

    def protocol(self) -> dict[str, Any]:
        """The settings that decide the numbers."""
        s = self.settings
        shared = {"seed": s.seed, "broken_by": self.names()}
        if self.after:
            shared["after"] = {key: self.after.record.get(key) for key in SAME}
        if self.standard:
            return shared | {
                "attack": "autoattack",
                "version": self.standard.label,
                "targets": self.standard.targets,
                "chunk": CHUNK,
                "search_precision": "float32",
            }
        return shared | {
            "attack": s.attack,
            "loss": s.loss_name,
            "steps": s.steps,
            "restarts": s.restarts,
            "eot": s.eot,
            "search_precision": s.precision,
            "rows": self.rows,
            "l1_schedule": "3eps,2eps,eps",
            **({"targets": s.targets} if s.loss == "targeted dlr" else {}),
            **({"stop_below": s.stop_below} if s.stop_below is not None else {}),
        }

    def judge_clean(self, on_progress: Progress | None) -> None:
        """Predict without an attack, or take the predictions over."""
        n, known = len(self.data), self.after
        self.random, self.logits = None, None
        if known is not None and self.settings.loss != "targeted dlr":
            self.prediction, self.margin = known.prediction[:n], known.margin[:n]
        else:
            self.logits = predict(self.model, self.fetch, n, self.rows, self.device)
            if not bool(self.logits.isfinite().all()):
                raise Diverged(
                    "evaluate: the network's logits hold NaN or infinity; its weights or statistics are broken"
                )
            self.prediction, self.margin = (
                self.logits.argmax(1),
                margin_of(self.logits, self.labels).float(),
            )
            again = predict(self.model, self.fetch, min(n, self.rows), self.rows, self.device)
            self.random = float(
                (again - self.logits[: len(again)]).abs().max()
                / self.logits.abs().max().clamp(min=1e-6)
            )
        self.correct = self.prediction == self.labels
        if on_progress:
            on_progress(
                n, n * (1 + len(self.threats)), f"clean {float(self.correct.float().mean()):.1%}"
            )

    def attack(self, saved: SavedState, on_progress: Progress | None) -> None:
        """Attack with every threat in turn, from where `saved` is."""
        total = len(self.own_names())
        state = saved.load() or {}
        logits = self.logits  # or any that say the same
        if logits is None:
            logits = torch.nn.functional.one_hot(self.prediction, self.data.classes).float()
        samples = Samples(self.fetch, self.labels, self.data.ids.cpu(), logits)
        try:
            for number, threat in enumerate(self.threats):
                outcome = Outcome.blank(
                    len(self.data), self._blank_points() if self.keep_points else None
                )
                self.outcomes[str(threat)] = outcome
                if str(threat) in state.get("outcomes", {}):
                    outcome.restore(state["outcomes"][str(threat)], total)
                elif self.after:
                    self._take_over(str(threat), outcome, total)
                poll = self._poll(saved, on_progress, number, total)
                if self.pool:
                    self._try_pool(number, samples, outcome, total)
                if self.standard:
                    self._autoattack(threat, samples, outcome, poll)
                else:
                    run_attempts(
                        self.model, samples, threat, self.settings, outcome, self.device, poll=poll
                    )
                    self.stopped |= bool((outcome.settled[self.correct] < total).any())
        except BaseException:
            if any(bool(outcome.settled.any()) for outcome in self.outcomes.values()):
                saved.save(self._state())
            raise
        saved.clear()

    def _state(self) -> dict[str, Any]:
        return {"outcomes": {name: outcome.snapshot() for name, outcome in self.outcomes.items()}}

    def _take_over(self, threat: str, outcome: Outcome, attempts: int) -> None:
        """What an earlier evaluation broke stays broken; what survived the very same attack is not attacked again."""
        n, earlier = len(self.data), self.after.threats.get(threat)
        if earlier is None:
            return
        mine = self.protocol()
        same = all(self.after.record.get(key) == mine.get(key) for key in SAME)
        renamed = torch.tensor(
            [self.names().index(name) - 1 for name in self.after.record["broken_by"]]
        )
        by = earlier.by[:n]
        broken = by > 0
        over = broken | (same & (by == -1))
        outcome.by[broken] = renamed[by[broken]]
        outcome.broken[broken], outcome.settled[over] = True, attempts
        for name in ("step", "norm"):
            getattr(outcome, name)[over] = getattr(earlier, name)[:n][over]
        outcome.margin[by != 0] = earlier.margin[:n][by != 0]
        if outcome.x_adv is not None and earlier.x_adv is not None:
            outcome.x_adv[over] = earlier.x_adv[:n][over]

    def _poll(
        self, saved: SavedState, on_progress: Progress | None, number: int, attempts: int
    ) -> Callable[[int, int], None]:
        n = len(self.data)
        figures = f"clean {float(self.correct.float().mean()):.1%}"
        wrong = n - int(self.correct.sum())

        def poll(done: int, of: int) -> None:
            if on_progress:
                on_progress(
                    (number + 1) * n + wrong + done // attempts,
                    n * (len(self.threats) + 1),
                    figures,
                )
            if saved.due():
                saved.save(self._state())

        return poll

    def _blank_points(self) -> Tensor:
        return to_float(self.data.images.cpu())

    def _pool_points(self, threat: ThreatModel) -> list[Tensor]:
        points = []
        for evaluation in self.pool:
            verdicts = evaluation.threats.get(str(threat))
            if verdicts is None or verdicts.x_adv is None:
                raise RequestError(
                    f"pool: an evaluation kept no points for {threat}; make it with keep_points=True"
                )
            points.append(verdicts.x_adv)
        return points

    def _try_pool(self, number: int, samples: Samples, outcome: Outcome, attempts: int) -> None:
        """Points that were found against other networks; what they break needs no attack of its own."""
        threat = self.threats[number]
        for points in self.pooled[number]:
            which = (self.correct & ~outcome.broken).nonzero().flatten()

            def fetch(at: Tensor, points: Tensor = points) -> Tensor:
                return points[at].to(self.device).contiguous(memory_format=torch.channels_last)

            broken, margin = try_points(self.model, samples, fetch, which, self.rows, self.device)
            self._settle(
                outcome,
                which[broken],
                fetch,
                threat,
                attempts,
                self.names().index(POOL) - 1,
                margin[broken],
            )

    def _settle(
        self,
        outcome: Outcome,
        at: Tensor,
        fetch: Callable[[Tensor], Tensor],
        threat: ThreatModel,
        attempts: int,
        by: int,
        margin: Tensor,
    ) -> None:
        """Write down ready-made points that broke samples `at`."""
        for part, least in zip(at.split(CHUNK), margin.split(CHUNK), strict=True):
            x, points = self.fetch(part), fetch(part)
            outcome.norm[part] = norms(points - x, threat.norm).float().cpu()
            outcome.excess[part] = excess_of(points, x, threat).cpu()
            outcome.margin[part] = least
            if outcome.x_adv is not None:
                outcome.x_adv[part] = points.cpu()
        outcome.by[at], outcome.broken[at], outcome.settled[at] = by, True, attempts

    def _autoattack(
        self,
        threat: ThreatModel,
        samples: Samples,
        outcome: Outcome,
        poll: Callable[[int, int], None],
    ) -> None:
        """The standard attacks, a chunk of samples at a time; a chunk that is settled stays so."""
        attacks = len(self.standard.attacks)
        every = self.correct.nonzero().flatten()
        total = len(every) * attacks
        for start in range(0, len(every), CHUNK):
            chunk = every[start : start + CHUNK]
            seed = self.settings.seed + int(samples.ids[chunk[0]])
            chunk = chunk[
                outcome.settled[chunk] < attacks
            ]  # less what the pool or an earlier evaluation broke
            if not len(chunk):
                continue
            x = self.fetch(chunk)
            y = self.labels[chunk].to(self.device)
            points, by = attack_chunk(
                self.model,
                x,
                y,
                threat,
                standard=self.standard,
                seed=seed,
                on_progress=lambda done, of, start=start: poll(start * attacks + done, total),
            )
            by = by.cpu()
            outcome.norm[chunk] = norms(points - x, threat.norm).float().cpu()
            outcome.excess[chunk] = excess_of(points, x, threat).cpu()
            if outcome.x_adv is not None:
                outcome.x_adv[chunk] = points.cpu()
            _, margin = try_points(
                self.model,
                samples,
                lambda at, points=points, chunk=chunk: points[torch.searchsorted(chunk, at)],
                chunk,
                self.rows,
                self.device,
            )
            outcome.margin[chunk], outcome.by[chunk], outcome.broken[chunk] = margin, by, by >= 0
            outcome.settled[chunk] = attacks
            poll(int(outcome.settled[every].sum()), total)

    def verdicts(self) -> dict[str, Verdicts]:
        """What came out, by threat."""
        found = {}
        for name, outcome in self.outcomes.items():
            robust = self.correct & ~outcome.broken
            by = torch.where(self.correct, torch.where(outcome.broken, outcome.by + 1, -1), 0)
            step = torch.where(self.correct, outcome.step, 0)
            margin = torch.where(self.correct, outcome.margin, self.margin)
            found[name] = Verdicts(robust, by, step, outcome.norm, margin, outcome.x_adv)
        return found

    def certificate(self) -> dict[str, dict[str, Any]]:
        """Whether every point lies in the ball and the box, judged in float64, by threat."""
        made = {}
        for threat, outcome in zip(self.threats, self.outcomes.values(), strict=True):
            excess = outcome.excess[~outcome.excess.isnan()]
            allowed = TOLERANCE * max(1.0, threat.eps)
            made[str(threat)] = {
                "points": len(excess),
                "outside": int((excess > allowed).sum()),
                "tolerance": allowed,
                "largest_excess": float(excess.max()) if len(excess) else None,
            }
        return made

    def warnings(self) -> list[str]:
        """What makes the numbers doubtful."""
        attacked, zeros, nan = (
            sum(int(getattr(outcome, what).sum()) for outcome in self.outcomes.values())
            for what in ("attacked", "blind", "nan")
        )
        found = []
        if self.random and self.random > 1e-4:
            found.append(
                "the network's outputs differ between two calls; attack it with eot above 1"
            )
        if self.logits is not None and _are_probabilities(self.logits):
            found.append(
                "the network's outputs sum to 1: probabilities, not logits; they hide the gradient from the attack"
            )
        if zeros:
            found.append(
                f"the gradient is exactly zero at the start for {zeros} of {attacked} attacked samples; "
                "robust accuracy may be too high; try loss dlr, or autoattack"
            )
        if nan:
            found.append(f"the logits held NaN at {nan} attacked points")
        for name, certificate in self.certificate().items():
            if certificate["outside"]:
                found.append(
                    f"{certificate['outside']} points lie outside the ball or the box of {name}"
                )
        return found + _above_clean(self.correct, self.verdicts())


def _are_probabilities(outputs: Tensor) -> bool:
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-4).all())


def _above_clean(correct: Tensor, verdicts: Mapping[str, Verdicts]) -> list[str]:
    """A sign of a network that answers at random, or of an attack that helps it."""
    return [
        f"accuracy under {name} is above clean accuracy ({v.robust.float().mean():.1%}, {correct.float().mean():.1%})"
        for name, v in verdicts.items()
        if int(v.robust.sum()) > int(correct.sum())
    ]


def _check_labels(data: Split) -> None:
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= data.classes:
        raise DataError(
            f"labels: got {low}..{high}, expected 0..{data.classes - 1}, as the data has classes"
        )


def refuse_chance(
    network: nn.Module | Checkpoint, data: Split, name: str, *, device: str = "auto"
) -> None:
    """Raise ModelError if clean accuracy cannot be told from guessing: the sign of a wrong normalisation or class order.

    Judged on at most 1,000 samples; fewer than 50 are too few to say so.
    """
    clean = evaluate(network, data, samples=min(len(data), 1000), device=device).accuracy[CLEAN_KEY]
    classes = data.classes
    if clean.low <= 1 / classes and clean.n >= 50:
        raise ModelError(
            f"{name}: clean accuracy {clean} is near chance ({1 / classes:.1%}); does the network expect --normalize MEAN "
            "STD, or another order of the classes?"
        )

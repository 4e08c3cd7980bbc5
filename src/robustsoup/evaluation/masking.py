"""The masking check: signs that the gradients of a network mislead its attack.

A network can look robust because its gradients point nowhere. After an attack, the check takes a
random part of the samples that survived it, and tests five things:

- *gradient*: steps along the gradient raise the loss about as much as the gradient promises, steps
  in a random direction change it as much, and pixels without a gradient do not change it;
- *unbounded*: with the whole box allowed, following the gradient breaks every sample;
- *transfer*: points found for other networks break no further samples, if the caller has any;
- *square*: Square, which uses no gradient, breaks no further samples;
- *tied*: the attack seldom ends where the two highest logits are equal, as saturated ones are.

The check takes about 5 % of the passes of the attack, at most 6 %. It never changes a verdict.

Source: Athalye et al. 2018, arXiv:1802.00420, section 3.1; Carlini et al. 2019, arXiv:1902.06705.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from robustsoup.attacks.apgd import highest_loss_points
from robustsoup.attacks.attempts import check_points, queued_loss
from robustsoup.attacks.engine import SampleQueue
from robustsoup.attacks.forward import CPU_PASS_SIZE, input_gradient, loss_without_gradient
from robustsoup.attacks.lanes import run_in_lanes
from robustsoup.attacks.losses import Loss, ce, scale_free_loss
from robustsoup.attacks.outcome import Outcome
from robustsoup.attacks.square import SquareSearch, search_squares
from robustsoup.attacks.steps import (
    StepSchedule,
    advance,
    cold_noise,
    observe,
    start_first_stage,
)
from robustsoup.catalog import LOSSES
from robustsoup.evaluation.attackers import Target
from robustsoup.evaluation.intervals import binomial_tail, wilson
from robustsoup.evaluation.two_phase import sample_order
from robustsoup.evaluation.verdicts import Record
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

BUDGET_SHARE = 0.05
"""Share of the passes of an attack that its check may take."""
SIGNIFICANCE = 1e-3
"""Probability below which a count of hits is no coincidence."""
KEPT_PROMISE = 0.05
"""Share of the promised rise of the loss below which a gradient counts as misleading."""
KEPT_NEARBY = 0.5
"""The same share after a quarter of that step, where the loss of honest networks is straight."""
HIDDEN_EFFECT = 0.1
"""Change of the loss above which pixels without a gradient count as hidden. It is relative to
1 / sqrt(n) of the rise that a step of the same size along the gradient promises, n being the values
of an image: random steps change the loss by about this much."""
MISSED_CHANGE = 1.0
"""Change between two opposite random steps that a gradient may miss, relative to the usual size of
the change that it promises there."""
FEWEST_HIDDEN = 0.05
"""Share of an image's pixels without a gradient below which they are not tried."""
LOSS_ROUNDING = 2.0**-20
"""Bound on the rounding of a loss in float32, relative to the largest logit."""
STEP_PASSES = 6
"""Passes of two steps along the gradient and two random ones: a gradient counts as two, and each
step is one. Images with pixels without a gradient take one more."""
TIED_MARGIN = 1e-3
"""Margin, relative to the range of the clean logits, below which the two highest ones are tied."""
DLR_SAMPLES = 5
"""Samples on which the gradient of DLR (of the margin, for 2 classes) is tried where that of
cross-entropy misleads."""
UNBOUNDED_STEPS = 5
UNBOUNDED_PASSES = 2 * UNBOUNDED_STEPS + 2
SQUARE_SAMPLES, SQUARE_QUERIES = 16, 400
"""Square attacks 16 samples, and 16 more whenever each of them gets 400 queries: whole passes, for
one or two cores."""
CPU_PART = 8
"""Images in a pass of the check on a CPU: a test takes few samples, and all lanes share them."""
MOST_QUERIES = 5000
MOST_POINT_BYTES = 64 * 2**20
"""Largest size of an evaluation's points that are kept only for the check of other networks."""
MOST_OTHERS = 8
"""Most networks whose points are tried."""
WHOLE_BOX = ThreatModel("Linf", 1.0)


@dataclass(frozen=True)
class Limits:
    """The limits of one test of the check.

    Attributes:
        tolerated: Share of hits that is tolerated; honest networks stay below it.
        fewest: With fewer samples, not even hits at all of them would be significant.
        most: Largest number of samples.
        budget_share: Largest share of the budget; Square takes what is left.
    """

    tolerated: float
    fewest: int
    most: int
    budget_share: float = 1.0


GRADIENT = Limits(tolerated=0.2, fewest=5, most=64, budget_share=0.7)
TOLERATED_UNDER_CE = 0.1
"""Share of broken promises of the gradient of cross-entropy that is tolerated: its loss rises
along a gradient even where it curves, unlike that of DLR or the margin."""
UNBOUNDED = Limits(tolerated=0.05, fewest=3, most=16, budget_share=0.2)
TRANSFER = Limits(tolerated=0.05, fewest=3, most=128, budget_share=0.1)
SQUARE = Limits(tolerated=0.05, fewest=3, most=128)
TIED = Limits(tolerated=0.05, fewest=3, most=128)


@dataclass(frozen=True)
class Finding:
    """The result of one test.

    Attributes:
        hits: Samples that speak for masked gradients.
        n: Samples that were tested.
        passes: Passes of one image that the test took; a gradient counts as two.
        tolerated: Share of hits that is tolerated.
        queries: Queries of each sample, for Square.
    """

    hits: int
    n: int
    passes: int
    tolerated: float
    queries: int | None = None

    @property
    def flagged(self) -> bool:
        """Whether chance does not explain hits above the tolerated share (one-sided, exact)."""
        return binomial_tail(self.hits, self.n, self.tolerated) < SIGNIFICANCE

    def to_json(self) -> Record:
        """Return the counts with the 95 % Wilson interval of the share, ready for json.dumps."""
        low, high = wilson(self.hits, self.n)
        record: Record = {"hits": self.hits, "n": self.n, "low": low, "high": high}
        if self.queries is not None:
            record["queries"] = self.queries
        return record | {"passes": self.passes, "flagged": self.flagged}


def check_masking(
    target: Target,
    threat: ThreatModel,
    settings: AttackSettings,
    outcome: Outcome,
    *,
    attack_passes: int,
    others: Sequence[Tensor] = (),
) -> Record:
    """Look for masked gradients on a random part of the samples that survived an attack.

    The part depends on the seed and the ids of the survivors alone.

    Args:
        target: The network and its samples.
        threat: Threat model of the attack.
        settings: The attack.
        outcome: The outcome of the attack; only read.
        attack_passes: Passes of one image that the attack took; a gradient counts as two.
        others: Points (n, c, h, w) that were found for other networks.

    Returns:
        The number of survivors, the budget in passes, and the finding of each test that the budget
        allowed, by name. Where the gradient of cross-entropy misleads, "dlr_helps" says whether
        that of DLR (of the margin, for 2 classes) does not.
    """
    survivors = (target.samples.correct & ~outcome.broken).nonzero().flatten()
    order = sample_order(target.samples.ids[survivors], seed=settings.seed, purpose="masking")
    survivors = survivors[order].tolist()
    subject = _Subject(target, threat, settings, survivors)
    total = int(BUDGET_SHARE * attack_passes)
    record: Record = {"survivors": len(survivors), "budget": total}
    findings: dict[str, Finding] = {}
    left = total

    def take(limits: Limits, passes_each: int) -> list[int]:
        return subject.take(limits, min(int(limits.budget_share * total), left), passes_each)

    if settings.attack != "square":
        if part := take(GRADIENT, STEP_PASSES):
            findings["gradient"] = subject.follow_one_step(part, subject.loss)
            left -= findings["gradient"].passes
            few = part[: min(DLR_SAMPLES, left // STEP_PASSES)]
            if findings["gradient"].flagged and subject.uses_ce and few:
                with_dlr = subject.follow_one_step(few, subject.scale_free_loss)
                record["dlr_helps"] = with_dlr.hits <= with_dlr.tolerated * with_dlr.n
                left -= with_dlr.passes
        if part := take(UNBOUNDED, UNBOUNDED_PASSES):
            findings["unbounded"] = subject.follow_through_the_box(part)
            left -= findings["unbounded"].passes
    if others and (part := take(TRANSFER, len(others))):
        findings["transfer"] = subject.try_points(part, others)
        left -= findings["transfer"].passes
    if settings.attack not in ("square", "autoattack", "strong"):
        queries, part = subject.plan_square(left)
        if part:
            findings["square"] = subject.query_squares(part, queries)
    if part := take(TIED, 0):
        findings["tied"] = subject.count_ties(part, outcome.margin)
    return record | {name: finding.to_json() for name, finding in findings.items()}


@dataclass(frozen=True)
class _Subject:
    """A network whose attack is over, and the samples that survived.

    Attributes:
        target: The network and its samples.
        threat: Threat model of the attack.
        settings: The attack.
        survivors: The samples in the random order in which they are tested.
    """

    target: Target
    threat: ThreatModel
    settings: AttackSettings
    survivors: list[int]

    @property
    def pass_size(self) -> int:
        """Images in one pass of the check."""
        size = self.target.pass_size
        return min(size, CPU_PART) if self.target.device.type == "cpu" else size

    @property
    def loss(self) -> Loss:
        """The loss whose gradient is tested: that of the attack, else cross-entropy."""
        if not self.settings.is_queued:
            return ce
        loss = queued_loss(self.settings, self.target.samples.classes)
        if not isinstance(loss, str):
            return loss
        entry = LOSSES[loss]
        is_targeted = entry.facts.get("targeted", False)
        return self.scale_free_loss if is_targeted else entry.load()

    @property
    def scale_free_loss(self) -> Loss:
        """DLR, or the margin for 2 classes."""
        loss: Loss = LOSSES[scale_free_loss(self.target.samples.classes)].load()
        return loss

    @property
    def uses_ce(self) -> bool:
        """Whether the attack uses cross-entropy and could use a scale-free loss instead."""
        return self.settings.is_queued and self.settings.loss_name == "ce"

    def take(self, limits: Limits, budget: int, passes_each: int) -> list[int]:
        """Return the samples of a test, or none if the budget does not allow enough of them."""
        affordable = budget // passes_each if passes_each else limits.most
        count = min(len(self.survivors), affordable, limits.most)
        return self.survivors[:count] if count >= limits.fewest else []

    def plan_square(self, budget: int) -> tuple[int, list[int]]:
        """Return the queries of each sample after its starting point, and the samples."""
        groups = max(budget // (SQUARE_QUERIES * SQUARE_SAMPLES), 1)
        count = min(groups * SQUARE_SAMPLES, len(self.survivors), SQUARE.most, budget // 2)
        if count < SQUARE.fewest:
            return 0, []
        return min(budget // count - 1, MOST_QUERIES), self.survivors[:count]

    def follow_one_step(self, part: list[int], loss: Loss) -> Finding:
        """Count the samples at which a step along the gradient breaks the gradient's promise.

        A quarter of the step is tried too. It tells a gradient of other pixels, such as that of the
        mirrored image, from a loss that curves. Two opposite random steps find what the gradient
        lacks, such as the part of a detached branch. Pixels without a gradient take random steps of
        the quarter's size: if they change the loss, their gradient is hidden. An L1 step changes
        few pixels, and a quarter of it would stay below the levels of a network that rounds its
        images.
        """

        @torch.no_grad()
        def follow(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
            settings, norm, eps = self.settings, self.threat.norm, self.threat.eps
            # PGD in 10 steps: the first goes a quarter of the radius along the gradient.
            schedule = StepSchedule(norm, ((eps, 10),), adaptive=False)
            noise = cold_noise(x, norm, seed=settings.seed, ids=ids)
            state = start_first_stage(x, y, noise.to(x.device), schedule)
            model, start = self.target.model, state.x_adv.clone()
            logits, before, grad = input_gradient(
                model, start, y, loss, "float32", eot=settings.eot
            )
            observe(state, before, grad, schedule.check_periods().to(x.device), norm)
            advance(state, norm, momentum=False)
            rounding = LOSS_ROUNDING * logits.abs().amax(1)

            def promise(points: Tensor) -> Tensor:
                return (grad.double() * (points - start).double()).flatten(1).sum(1)

            def rise(points: Tensor) -> Tensor:
                after = loss_without_gradient(model, points, y, loss, "float32")
                return after.double() - before.double()

            def keeps(points: Tensor, share: float, tolerance: Tensor | float) -> Tensor:
                promised = promise(points)
                # Comparisons with NaN are false.
                return (promised > 0) & (rise(points) + tolerance > share * promised)

            promise_kept = keeps(state.x_adv, KEPT_PROMISE, 0.0)
            if norm != "L1":
                step = (state.x_adv - start) / 4
                if settings.eot == 1:  # a stochastic network changes without any step
                    ends = _step_both_ways(start, noise.to(x.device), state.x_adv - start)
                    change = model(ends[0]).double() - model(ends[1]).double()
                    promise_kept &= _foresees(
                        grad, ends[0] - ends[1], change, _logit_gradient(loss, logits, y), rounding
                    )
                promise_kept &= keeps(start + step, KEPT_NEARBY, rounding)
                hidden = grad == 0
                if bool((hidden.flatten(1).float().mean(1) > FEWEST_HIDDEN).any()):
                    moved = _move_pixels(start, hidden, noise.to(x.device), step)
                    usual = promise(start + step) / x[0].numel() ** 0.5
                    promise_kept &= rise(moved).abs() <= HIDDEN_EFFECT * usual + rounding
            return ~promise_kept

        is_ce = loss is ce
        limits = replace(GRADIENT, tolerated=TOLERATED_UNDER_CE) if is_ce else GRADIENT
        return self._count(follow, part, passes_each=STEP_PASSES, limits=limits)

    def follow_through_the_box(self, part: list[int]) -> Finding:
        """Count the samples that survive an attack that may change every pixel at will."""
        schedule = StepSchedule(WHOLE_BOX.norm, ((WHOLE_BOX.eps, UNBOUNDED_STEPS),))

        @torch.no_grad()
        def follow(x: Tensor, y: Tensor, _ids: Tensor) -> Tensor:
            points = highest_loss_points(
                self.target.model, x, y, x, schedule=schedule, loss=self.loss, precision="float32"
            )
            return self.target.model(points).argmax(1) == y

        return self._count(follow, part, passes_each=UNBOUNDED_PASSES, limits=UNBOUNDED)

    def try_points(self, part: list[int], others: Sequence[Tensor]) -> Finding:
        """Count the samples that points found for other networks break."""
        target, selected = self.target, torch.tensor(part)
        broken = torch.zeros(len(part), dtype=torch.bool)
        for points in others:

            def fetch(samples: Tensor, points: Tensor = points) -> Tensor:
                on_device = points[samples].to(target.device)
                return on_device.contiguous(memory_format=torch.channels_last)

            broken |= check_points(
                target.model,
                target.samples,
                fetch,
                selected,
                size=self.pass_size,
                device=target.device,
            )[0]
        passes = len(part) * len(others)
        return Finding(int(broken.sum()), len(part), passes, TRANSFER.tolerated)

    def count_ties(self, part: list[int], margins: Tensor) -> Finding:
        """Count the samples whose two highest logits the attack made equal, but not swapped.

        Args:
            part: The samples.
            margins: (n,) smallest margin of every sample under attack.
        """
        rows = torch.tensor(part)
        logits = self.target.samples.logits[rows]
        tied = margins[rows] < TIED_MARGIN * (logits.amax(1) - logits.amin(1))
        return Finding(int(tied.sum()), len(part), 0, TIED.tolerated)

    def query_squares(self, part: list[int], queries: int) -> Finding:
        """Count the samples that Square breaks."""
        target = self.target
        search = SquareSearch(
            target.model,
            target.samples,
            self.threat,
            queries,
            self.settings.seed,
            restart=0,
            index=0,
            attempts=1,
            # A GPU need not fill its whole pass for a few samples.
            pass_size=min(self.pass_size, -(-len(part) // CPU_PASS_SIZE) * CPU_PASS_SIZE),
            device=target.device,
        )
        outcome = Outcome.blank(len(target.samples.y))
        search_squares(search, SampleQueue(part), outcome)
        steps = torch.where(outcome.broken, outcome.step, queries)[torch.tensor(part)]
        passes = int((steps + 1).sum())
        hits = int(outcome.broken.sum())
        return Finding(hits, len(part), passes, SQUARE.tolerated, queries)

    def _count(
        self,
        test: Callable[[Tensor, Tensor, Tensor], Tensor],
        part: list[int],
        *,
        passes_each: int,
        limits: Limits,
    ) -> Finding:
        """Run a test in passes of fixed size, and count the samples for which it returns true."""
        target, size = self.target, self.pass_size

        def run_pass(rows: list[int]) -> int:
            padded = torch.tensor(rows + rows[:1] * (size - len(rows)))
            samples = target.samples
            y = samples.y[padded].to(target.device)
            hits = test(samples.fetch(padded), y, samples.ids[padded])
            return int(hits[: len(rows)].sum())

        passes = [partial(run_pass, part[i : i + size]) for i in range(0, len(part), size)]
        hits = sum(run_in_lanes(passes, target.device))
        return Finding(hits, len(part), passes_each * len(part), limits.tolerated)


def _logit_gradient(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """Return the gradient (b, classes) of a loss with respect to the logits."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, y).sum(), leaf)[0]


def _foresees(
    grad: Tensor, moved: Tensor, change: Tensor, logit_grad: Tensor, rounding: Tensor
) -> Tensor:
    """Return whether a gradient foresees the change of the loss between two images, (b,) bool.

    The change is that of the logits, weighted by the gradient of the loss with respect to them: the
    loss itself curves where the network does not.

    Args:
        grad: (b, c, h, w) gradient of the loss halfway between the images.
        moved: (b, c, h, w) difference of the images, in a random direction.
        change: (b, classes) difference of their logits.
        logit_grad: (b, classes) gradient of the loss with respect to the logits.
        rounding: (b,) bound on the rounding of a logit.
    """
    parts = (grad.double() * moved.double()).flatten(1)
    missed = (logit_grad.double() * change).sum(1) - parts.sum(1)
    return missed.abs() <= MISSED_CHANGE * parts.norm(dim=1) + rounding * logit_grad.abs().sum(1)


def _step_both_ways(x: Tensor, noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return images after a random step and its opposite; arguments as for `_move_pixels`."""
    everywhere = torch.ones_like(x, dtype=torch.bool)
    return _move_pixels(x, everywhere, noise, step), _move_pixels(x, everywhere, -noise, step)


def _move_pixels(x: Tensor, pixels: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """Return images some of whose pixels took random steps, inside the box.

    Args:
        x: (b, c, h, w) images in [0, 1].
        pixels: (b, c, h, w) bool, the pixels.
        noise: (b, c, h, w) random numbers of both signs.
        step: (b, c, h, w) steps of the other pixels; its root mean square is the size of a step.
    """
    size = step.flatten(1).square().mean(1).sqrt()[:, None, None, None]
    return torch.where(pixels, (x + size * noise.sign()).clamp(0, 1), x)

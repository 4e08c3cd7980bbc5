"""Square, a random search that queries only the network's outputs, as a function and as a search.

Each query changes one random square window of the best point so far, and keeps the change if the
logit margin falls. The search uses no gradient, so masked gradients do not stop it.

Every sample draws its windows and signs from its own generator, in the order of the reference
implementation, and every pass has one fixed size. So the points of a sample depend on neither the
batch nor the number of threads, and equal those of the reference for a batch of one image.

Source: Andriushchenko et al. 2020, arXiv:1912.00049; L1: Croce and Hein 2021, arXiv:2103.01208.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from robustsoup.attacks.engine import Flags, Numbers, SampleQueue, run_in_turn, run_lanes
from robustsoup.attacks.forward import (
    ImageBatch,
    LabelBatch,
    as_attack_inputs,
    call_network,
    check_inputs,
    frozen_eval,
    pass_size,
    predict_logits,
)
from robustsoup.attacks.losses import judge, logit_margin
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.attacks.projections import as_column, move_inside, norms, project
from robustsoup.attacks.steps import as_arrays, copy_rows, set_rows
from robustsoup.errors import DataError, RequestError
from robustsoup.gradients import gradients_enabled
from robustsoup.seeding import keyed_generator
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

WINDOW_AREA = 0.8
"""Share of the image that the first windows cover."""
TRIALS = ((1, 0.8), (2, 1.0))
"""Multiples of a trial, and the share of the margin's fall under earlier attempts needed there."""
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the area of a window halves."""
_BLOCK = 64
"""Queries whose random numbers a sample draws at once."""


@gradients_enabled()
def square(
    model: nn.Module | Callable[[Tensor], object],
    x: ImageBatch,
    y: LabelBatch,
    threat: ThreatModel | str,
    *,
    n_queries: int = 5000,
    restarts: int = 1,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Attack images with Square, which minimises the logit margin without gradients.

    The result for an image depends only on the image, its id and the seed. An image that the
    network misclassifies is returned unchanged. The network is attacked in eval mode and left as
    it was; no global random state is used.

    Args:
        model: Network or function that maps (b, c, h, w) images to (b, classes) logits; as for
            `apgd`.
        x: (n, c, h, w) float32 or float64 images in [0, 1], on the network's device; a tensor or an
            array.
        y: (n,) integer labels; a tensor, an array or a list.
        threat: Norm and radius in units of x, such as "Linf 8/255"; "clean" returns a copy of x.
        n_queries: Queries of each restart after its starting point, at least 1.
        restarts: Number of searches; each attacks the images that no earlier one broke.
        seed: Seed of the random numbers.
        ids: (n,) int64 sample numbers, which seed each image's numbers; 0..n-1 by default.
        batch_size: Largest number of images in a pass; 32 on a CPU (which is also the most it
            takes) and 500 on a GPU by default.

    Returns:
        (n, c, h, w) images in [0, 1] and within eps of x: the first misclassified point of each
        search, else the point of smallest margin of the first.

    Raises:
        RequestError: If a setting is invalid.
        DataError: If x is not (n, c, h, w) float32 or float64 in [0, 1], or x, y and ids differ in
            length.
        ModelError: As for `apgd`.
        Diverged: If the network's logits contain NaN or infinity.

    Source: Andriushchenko et al. 2020, arXiv:1912.00049.
    """
    settings = AttackSettings(
        attack="square", n_queries=n_queries, restarts=restarts, seed=seed, batch_size=batch_size
    )
    threat = ThreatModel.parse(threat)
    model, x, y = as_attack_inputs(model, x, y)
    if x.dim() != 4:
        raise DataError(f"x: got shape {tuple(x.shape)}, expected (n, c, h, w) images")
    threat.check_shape(x.shape[1:])
    check_inputs(model, x, y)
    if ids is not None and len(ids) != len(x):
        raise RequestError(f"ids: got {len(ids)}, expected {len(x)}, one for each image")
    points = x.clone()
    if threat.is_clean or len(x) == 0:
        return points

    def fetch(samples: Tensor) -> Tensor:
        return x[samples.to(x.device)]

    size = pass_size(x.device, batch_size)
    with frozen_eval(model):
        logits = predict_logits(model, fetch, len(x), size, x.device)
        numbers = torch.arange(len(x)) if ids is None else ids.cpu()
        samples = AttackedSamples(fetch, y.cpu(), numbers, logits)
        outcome = Outcome.blank(len(x), points)
        run_square(model, samples, threat, settings, outcome, device=x.device)
    return points


def square_attempts(restarts: int) -> tuple[str, ...]:
    """Return the name of each restart."""
    return tuple(f"square restart {i + 1}" if i else "square" for i in range(restarts))


@dataclass(frozen=True)
class SquareSearch:
    """The network, samples and settings of one restart.

    Attributes:
        model: Network in eval mode.
        samples: All samples of the attack.
        threat: Threat model with eps above 0.
        n_queries: Queries after the starting point.
        seed: Seed of the random numbers.
        restart: Number of the restart, from 0.
        index: Index of the restart among all attempts of the attack.
        attempts: Number of attempts of the attack.
        pass_size: Number of images in every pass.
        device: Device of the network.
        trial: Queries after which a sample is left if its margin fell much less than under earlier
            attempts (see TRIALS); None: never.
    """

    model: nn.Module
    samples: AttackedSamples
    threat: ThreatModel
    n_queries: int
    seed: int
    restart: int
    index: int
    attempts: int
    pass_size: int
    device: torch.device
    trial: int | None = None

    def generator(self, sample: int) -> torch.Generator:
        """Return the generator of a sample's random numbers."""
        return keyed_generator("square", self.seed, int(self.samples.ids[sample]), self.restart)


def run_square(
    model: nn.Module,
    samples: AttackedSamples,
    threat: ThreatModel,
    settings: AttackSettings,
    outcome: Outcome,
    *,
    device: torch.device,
    poll: Callable[[int, int], None] | None = None,
) -> None:
    """Attack every sample that is classified correctly and not settled yet.

    Args:
        model: Network in eval mode; see `frozen_eval`.
        samples: The samples.
        threat: Threat model with eps above 0.
        settings: The attack; `n_queries`, `restarts`, `seed` and `batch_size` count.
        outcome: Read to resume, and written as samples are settled.
        device: Device of the network.
        poll: Called several times a second with (settled, total), which count samples times
            restarts.
    """
    search = first_square_search(
        model, samples, threat, settings, attempts=settings.restarts, device=device
    )

    def run_restart(restart: int, queue: SampleQueue, report: Callable[[], None] | None) -> None:
        search_squares(replace(search, restart=restart, index=restart), queue, outcome, report)

    run_in_turn(run_restart, settings.restarts, samples, outcome, poll=poll)


def first_square_search(
    model: nn.Module,
    samples: AttackedSamples,
    threat: ThreatModel,
    settings: AttackSettings,
    *,
    attempts: int,
    device: torch.device,
    index: int = 0,
) -> SquareSearch:
    """Return the first restart; the arguments are those of `run_square` and `SquareSearch`."""
    return SquareSearch(
        model,
        samples,
        threat,
        settings.n_queries,
        settings.seed,
        restart=0,
        index=index,
        attempts=attempts,
        pass_size=pass_size(device, settings.batch_size),
        device=device,
    )


def search_squares(
    search: SquareSearch,
    queue: SampleQueue,
    outcome: Outcome,
    poll: Callable[[], None] | None = None,
) -> None:
    """Attack the samples of the queue until it is empty or stopped, writing to `outcome`.

    Args:
        search: The restart to run.
        queue: The samples to attack; each must be classified correctly and not broken yet.
        outcome: Written as samples are settled.
        poll: Called in this thread several times a second.
    """
    run_lane = partial(_run_square_lane, search, queue, outcome)
    run_lanes(run_lane, queue, search.pass_size, search.device, poll=poll)


@torch.no_grad()
def _run_square_lane(search: SquareSearch, queue: SampleQueue, outcome: Outcome) -> None:
    samples = queue.take(search.pass_size)
    if samples:
        SquareLane(search, queue, outcome, samples).run()


class SquareLane:
    """A fixed number of rows, refilled from the queue; all rows query the network together.

    Args:
        search: The restart to run.
        queue: Source of new samples.
        outcome: Receives the results.
        first: The first samples, at least 1 and at most the size of a pass.
    """

    def __init__(
        self, search: SquareSearch, queue: SampleQueue, outcome: Outcome, first: list[int]
    ) -> None:
        self.search, self.queue, self.outcome = search, queue, outcome
        size, device = search.pass_size, search.device
        # Rows that stay free hold copies of the first samples, so that every pass is full.
        filling = torch.tensor(first)[torch.arange(size) % len(first)]
        self.x = search.samples.fetch(filling)
        self.y = search.samples.y[filling].to(device)
        shape = (int(self.x.shape[1]), int(self.x.shape[2]), int(self.x.shape[3]))
        self.proposals = SquareProposals(shape, search.threat, search.n_queries, device)
        self.bounds = self.proposals.bounds(self.x)
        self.best = self.x.clone()
        self.margin = torch.full((size,), torch.inf, device=device, dtype=self.x.dtype)
        self.nan = torch.zeros(size, dtype=torch.bool, device=device)
        # The host's view of the rows: sample (-1: free), and queries so far.
        self.sample = np.full(size, -1, dtype=np.int64)
        self.query = np.zeros_like(self.sample)
        self.generators: list[torch.Generator | None] = [None] * size
        self.uniforms = torch.zeros(size, _BLOCK, self.proposals.draws, device=device)
        self.rows = torch.arange(size, device=device)
        self._place(list(range(len(first))), first)

    def run(self) -> None:
        """Attack until the queue is empty and every row is settled, or until it is stopped."""
        while not self.queue.stopped and (self.sample >= 0).any():
            self._query()
            free = (self.sample < 0).nonzero()[0].tolist()
            samples = self.queue.take(len(free))
            if samples:
                self._place(free[: len(samples)], samples)

    def _place(self, rows: list[int], samples: list[int]) -> None:
        """Put new samples into free rows, each at its starting point."""
        search, numbers = self.search, torch.tensor(samples)
        x = search.samples.fetch(numbers)
        generators = [search.generator(sample) for sample in samples]
        uniforms = torch.stack(
            [torch.rand(self.proposals.start_draws, generator=item) for item in generators]
        )
        device_rows = torch.tensor(rows, device=search.device)
        self.x[device_rows] = x
        for bound, values in zip(self.bounds, self.proposals.bounds(x), strict=True):
            bound[device_rows] = values
        self.y[device_rows] = search.samples.y[numbers].to(search.device)
        self.best[device_rows] = self.proposals.start(x, uniforms.to(search.device))
        self.margin[device_rows], self.nan[device_rows] = torch.inf, False
        self.sample[rows], self.query[rows] = samples, 0
        for row, generator in zip(rows, generators, strict=True):
            self.generators[row] = generator
        self.outcome.attacked[numbers] = True

    def _query(self) -> None:
        """Query the network once for every row, and settle the rows that end."""
        points, search = self._next_points(), self.search
        logits = call_network(search.model, points)
        margin, fooled = judge(logits, self.y)
        margin = margin.to(self.margin)
        busy = self.sample >= 0
        is_broken = fooled.cpu().numpy() & busy
        if is_broken.any():
            points, margin, fooled = self._move_hits_inside(points, margin, fooled)
            is_broken = fooled.cpu().numpy() & busy
        self.nan |= margin.isnan()
        is_fooled, margins, lowest_margins = as_arrays(fooled, margin, self.margin)
        accepted = (margins < lowest_margins) | is_fooled  # NaN is never followed
        copy_rows(accepted, points, self.best)
        set_rows(accepted, margins, lowest_margins)
        ended = ((self.query >= search.n_queries) | self._find_trailing()) & busy & ~is_broken
        self._settle(is_broken.nonzero()[0], is_broken=True)
        self._settle(ended.nonzero()[0], is_broken=False)
        self.query += 1

    def _find_trailing(self) -> Flags:
        """Return the rows that are too far behind earlier attempts to continue."""
        trailing = np.zeros_like(self.query, dtype=bool)
        if self.search.trial is None:
            return trailing
        for multiple, share in TRIALS:
            due = (self.query == multiple * self.search.trial) & (self.sample >= 0)
            if due.any():
                trailing[due] = self._is_behind(due.nonzero()[0], share)
        return trailing

    def _is_behind(self, rows: Numbers, share: float) -> Flags:
        """Return whether the margin of some rows fell by less than a share of its fall before."""
        samples, known = torch.from_numpy(self.sample[rows]), self.search.samples
        clean = logit_margin(known.logits[samples], known.y[samples]).float()
        needed = clean + share * (self.outcome.margin[samples] - clean)
        margin = self.margin[torch.from_numpy(rows).to(self.margin.device)].float().cpu()
        is_behind: Flags = (margin > needed).numpy()
        return is_behind

    def _move_hits_inside(
        self, points: Tensor, margin: Tensor, fooled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Move hits that rounding left outside the ball inside, where they must fool again."""
        inside = move_inside(points, self.x, self.search.threat)
        is_moved = fooled & (inside != points).flatten(1).any(1)
        if not bool(is_moved.any()):
            return points, margin, fooled
        points = torch.where(as_column(is_moved, points), inside, points)
        moved_margin, moved_fooled = judge(call_network(self.search.model, points), self.y)
        margin = torch.where(is_moved, moved_margin.to(margin), margin)
        return points, margin, torch.where(is_moved, moved_fooled, fooled)

    def _next_points(self) -> Tensor:
        """Return the starting points of new rows, and the proposals of the others."""
        busy, query = self.sample >= 0, self.query
        for row in (busy & (query % _BLOCK == 1)).nonzero()[0].tolist():
            draws = torch.rand(_BLOCK, self.proposals.draws, generator=self.generators[row])
            self.uniforms[row] = draws.to(self.uniforms)
        block = torch.from_numpy((query - 1) % _BLOCK).to(self.uniforms.device)
        uniforms = self.uniforms[self.rows, block]
        proposals = self.proposals.propose(self.x, self.best, self.bounds, query - 1, uniforms)
        is_start = query == 0
        if not is_start.any():
            return proposals
        starts = torch.from_numpy(is_start).to(self.x.device)
        return torch.where(as_column(starts, self.x), self.best, proposals)

    def _settle(self, rows: Numbers, *, is_broken: bool) -> None:
        """Write the result of this restart for some rows, and free them."""
        if not len(rows):
            return
        search, outcome = self.search, self.outcome
        samples = torch.from_numpy(self.sample[rows])
        device_rows = torch.from_numpy(rows).to(search.device)
        if is_broken or search.index == 0:
            x = self.x[device_rows]
            points = move_inside(self.best[device_rows], x, search.threat)
            outcome.record_points(samples, points, x, search.threat)
        margin = self.margin[device_rows].float().cpu()
        outcome.nan[samples] |= self.nan[device_rows].cpu()
        outcome.margin[samples] = torch.fmin(outcome.margin[samples], margin)
        if is_broken:
            outcome.step[samples] = torch.from_numpy(self.query[rows])
            outcome.by[samples] = search.index
            outcome.broken[samples] = True
        # Written last: a snapshot relies on all other results of a settled sample.
        outcome.settled[samples] = search.attempts if is_broken else search.index + 1
        self.sample[rows], self.query[rows] = -1, 0


class SquareProposals:
    """The starting points and the proposals of the search, from uniform random numbers.

    Args:
        shape: Shape of an image, (c, h, w).
        threat: Threat model with eps above 0.
        n_queries: Queries after the starting point.
        device: Device of the images.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        threat: ThreatModel,
        n_queries: int,
        device: torch.device,
    ) -> None:
        self.channels, self.height, self.width = shape
        self.threat, self.is_linf = threat, threat.norm == "Linf"
        sides = [window_side(query, n_queries, shape, threat.norm) for query in range(n_queries)]
        self.sides = np.array(sides, dtype=np.int64)
        self.row_numbers = torch.arange(self.height, device=device).view(1, 1, -1, 1)
        self.column_numbers = torch.arange(self.width, device=device).view(1, 1, 1, -1)
        self.tile = max(self.height // 5, 1)
        self.bumps: dict[int, Tensor] = {}
        if not self.is_linf:
            for side in {self.tile, *sides}:
                self.bumps[side] = opposite_bumps(side, threat.norm).to(device)

    @property
    def start_draws(self) -> int:
        """Random numbers that a starting point takes."""
        if self.is_linf:
            return self.channels * self.width
        return (self.height // self.tile) * (self.width // self.tile) * (1 + self.channels)

    @property
    def draws(self) -> int:
        """Random numbers that a proposal takes."""
        return (2 if self.is_linf else 5) + self.channels

    def start(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Return the starting points of images.

        Args:
            x: (b, c, h, w) clean images.
            uniforms: (b, start_draws) numbers in [0, 1).

        Returns:
            (b, c, h, w): vertical stripes at the bounds of the Linf ball; a tiling with bumps in
            the other norms.
        """
        if self.is_linf:
            stripes = _signs(uniforms).view(-1, self.channels, 1, self.width)
            return (x + self.threat.eps * stripes.to(x)).clamp(0.0, 1.0)
        delta, tile = torch.zeros_like(x), self.tile
        margin = (self.height - 5 * tile) // 2 if self.height >= 5 else 0
        draws = iter(uniforms.split(1 + self.channels, dim=1))
        for top in range(margin, margin + self.height // tile * tile, tile):
            for left in range(margin, margin + self.width // tile * tile, tile):
                part = delta[:, :, top : top + tile, left : left + tile]
                bumps, signs = self._oriented_bumps(tile, next(draws))
                bumps = bumps[:, None, : part.shape[2], : part.shape[3]]
                part += (bumps * signs[:, :, None, None]).to(x)
        return self._into_ball(x, delta)

    def bounds(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the smallest and largest values in the Linf ball and the box; else nothing."""
        if not self.is_linf:
            return ()
        return (x - self.threat.eps).clamp(min=0.0), (x + self.threat.eps).clamp(max=1.0)

    def propose(
        self, x: Tensor, best: Tensor, bounds: tuple[Tensor, ...], query: Numbers, uniforms: Tensor
    ) -> Tensor:
        """Return the next point of each search, which changes one window of the best point.

        Args:
            x: (b, c, h, w) clean images.
            best: (b, c, h, w) best points so far.
            bounds: See `bounds`.
            query: (b,) numbers of the proposals, from 0.
            uniforms: (b, draws) numbers in [0, 1).

        Returns:
            (b, c, h, w) points in the ball and the box.
        """
        sides = self.sides[query.clip(0, len(self.sides) - 1)]  # free rows count on
        if self.is_linf:
            return self._change_square(best, bounds, torch.from_numpy(sides), uniforms)
        proposals = torch.empty_like(best)
        for side in set(sides.tolist()):
            rows = torch.from_numpy((sides == side).nonzero()[0]).to(x.device)
            proposals[rows] = self._move_mass(x[rows], best[rows], side, uniforms[rows])
        return proposals

    def _window(self, side: Tensor | int, top: Tensor, left: Tensor) -> Tensor:
        """Return where windows lie, (b, 1, h, w) bool; `top` and `left` are uniform numbers."""
        side = torch.as_tensor(side).to(top).expand(len(top))  # positions round as in the reference
        sides, tops, lefts, rows, columns = as_arrays(
            side, top, left, self.row_numbers, self.column_numbers
        )
        sides, tops, lefts = (vector[:, None, None, None] for vector in (sides, tops, lefts))
        tops, lefts = (self.height - sides) * tops // 1, (self.width - sides) * lefts // 1
        inside_rows = (rows >= tops) & (rows < tops + sides)
        return torch.as_tensor(inside_rows & (columns >= lefts) & (columns < lefts + sides))

    def _change_square(
        self, best: Tensor, bounds: tuple[Tensor, ...], sides: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Return the best points with one square moved to the bounds of the Linf ball."""
        window = self._window(sides, uniforms[:, 0], uniforms[:, 1])
        signs = 2 * self.threat.eps * _signs(uniforms[:, 2:])
        change = torch.where(window, signs[:, :, None, None].to(best), 0.0)
        return torch.clamp(best + change, *bounds)

    def _move_mass(self, x: Tensor, best: Tensor, side: int, uniforms: Tensor) -> Tensor:
        """Return the best points with the mass of a second window moved into a first one.

        The first window receives two opposite bumps on top of its own content, and with them the
        norm of both windows and the unused norm of the ball.
        """
        delta, channels, eps = best - x, self.channels, self.threat.eps
        first = self._window(side, uniforms[:, 0], uniforms[:, 1])
        second = self._window(side, uniforms[:, 2], uniforms[:, 3])
        bumps, signs = self._oriented_bumps(side, uniforms[:, 4:])
        inside = torch.where(first, delta, 0.0)
        inside = inside / (1e-12 + self._channel_norms(inside))
        # masked_scatter reads the bumps in the order of the pixels of each window.
        placed = bumps[:, None] * signs[:, :, None, None]
        blank = torch.zeros(delta.shape, device=delta.device, dtype=delta.dtype)
        inside = inside + blank.masked_scatter(first, placed.to(delta))
        norm = as_column(norms(delta, self.threat.norm), delta)
        available = self._channel_norms(torch.where(first | second, delta, 0.0))
        if self.threat.norm == "L2":
            mass = ((eps**2 - norm**2).clamp(min=0) / channels + available**2).sqrt()
        else:
            mass = ((eps - norm).clamp(min=0) / channels + available) * channels
        inside = inside / (1e-12 + self._channel_norms(inside)) * mass
        return self._into_ball(x, torch.where(first, inside, torch.where(second, 0.0, delta)))

    def _oriented_bumps(self, side: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Return bumps (b, side, side), side by side or on top of each other, and signs (b, c)."""
        bumps = self.bumps[side]
        turned = (uniforms[:, 0] > 0.5)[:, None, None]
        return torch.where(turned, bumps.mT, bumps), _signs(uniforms[:, 1:])

    def _channel_norms(self, delta: Tensor) -> Tensor:
        """Return the norm of each channel of `delta`, (b, c, 1, 1)."""
        values = norms(delta.flatten(0, 1), self.threat.norm)
        return values.view(*delta.shape[:2], 1, 1)

    def _into_ball(self, x: Tensor, delta: Tensor) -> Tensor:
        """Return points on the L2 sphere (then clamped to the box), or in the L1 ball and box."""
        eps = self.threat.eps
        if self.threat.norm == "L1":
            return project(x + delta, x, torch.full_like(x[:, 0, 0, 0], eps), "L1")
        length = as_column(norms(delta, "L2"), delta) + 1e-12
        return (x + delta / length * eps).clamp(0.0, 1.0)


def window_side(query: int, n_queries: int, shape: tuple[int, int, int], norm: str) -> int:
    """Return the side in pixels of the window that proposal `query` changes.

    The area halves on a schedule for 10,000 queries, which is scaled to `n_queries`. In L2 and L1
    the side is odd and at least 3.

    Args:
        query: Number of the proposal, from 0.
        n_queries: Number of proposals.
        shape: Shape of an image, (c, h, w).
        norm: "Linf", "L2" or "L1".
    """
    _, height, width = shape
    scaled = int(query / n_queries * 10_000)
    share = WINDOW_AREA / 2 ** sum(scaled > bound for bound in _HALVINGS)
    side = max(round(math.sqrt(share * height * width)), 1 if norm == "Linf" else 3)
    if norm != "Linf" and side % 2 == 0:
        side += 1
    return min(side, height, width)


def opposite_bumps(side: int, norm: str) -> Tensor:
    """Return two rectangular bumps of opposite sign, one above the other, of norm 1 together.

    Args:
        side: Side of the square that they fill.
        norm: "L2" or "L1".

    Returns:
        (side, side) float32.

    Source: Andriushchenko et al. 2020, arXiv:1912.00049, section 3.3 (the function eta).
    """
    upper, lower = _bump(side // 2, side, norm), _bump(side - side // 2, side, norm)
    bumps = torch.cat([upper, -lower])
    return bumps / norms(bumps[None], norm)


def _bump(height: int, width: int, norm: str) -> Tensor:
    """Return a bump of nested rectangles around the middle, of norm 1."""
    bump = torch.zeros(height, width)
    if not height:
        return bump
    middle_row, middle_column = height // 2, width // 2
    power = 2 if norm == "L2" else 4
    for ring in range(max(middle_row, middle_column) + 1):
        rows = slice(max(middle_row - ring, 0), middle_row + ring + 1)
        columns = slice(max(middle_column - ring, 0), middle_column + ring + 1)
        bump[rows, columns] += 1.0 / (ring + 1) ** power
    return bump / norms(bump[None], norm)


def _signs(uniforms: Tensor) -> Tensor:
    return (2 * uniforms - 1).sign()

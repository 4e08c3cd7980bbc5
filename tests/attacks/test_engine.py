"""The attack engine: verdicts depend only on the sample and are computed in float32."""

import itertools

import pytest
import torch
from digits import check_inside, digits_network
from linear import LINEAR_THREATS, linear_problem, weights
from markers import thinned
from torch import nn
from torch.nn import functional

from robustsoup.attacks import losses, pgd, run_attack, steps
from robustsoup.attacks.attempts import check_points, list_attempts
from robustsoup.attacks.engine import DeviceRows, SampleQueue, Search, take_step
from robustsoup.attacks.forward import frozen_eval, pass_size, predict_logits
from robustsoup.attacks.losses import ce
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.attacks.projections import norms, random_start
from robustsoup.attacks.steps import StepSchedule, cold_noise, initial_state
from robustsoup.catalog import LOSSES
from robustsoup.data import load_data, to_float
from robustsoup.models import load_model
from robustsoup.settings import AttackSettings
from robustsoup.threats import NORMS, ThreatModel

N = 100  # more than one pass, so that rows are refilled
THREATS = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.7), ThreatModel("L1", 1.0)]
by_threat = pytest.mark.parametrize("threat", THREATS, ids=str)
PRECISIONS = ("float32", "bfloat16")
by_precision = pytest.mark.parametrize("precision", PRECISIONS)
RESULT_FIELDS = ("broken", "step", "by", "x_adv")


@pytest.fixture(scope="module")
def trained():
    """A small network in float32 that classifies digits, and 100 digits."""
    data = load_data("digits")
    model = digits_network(4)
    x, y = to_float(data.test.images[:N]), data.test.labels[:N].clone()
    with torch.no_grad():
        assert float((model(x).argmax(1) == y).float().mean()) > 0.8
    return model, x, y


@pytest.fixture
def set_threads():
    """Sets PyTorch's number of threads, and so the number of lanes; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def attack(model, x, y, threat, *, ids=None, **changes):
    return run_attack(model, x, y, threat, AttackSettings(**{"steps": 10, **changes}), ids=ids)


def classified_correctly(model, x, y):
    """Return (n,) bool, computed in passes of the shape that verdicts use."""
    with frozen_eval(model):
        logits = predict_logits(model, lambda at: x[at], len(x), pass_size(x.device), x.device)
    return logits.argmax(1) == y


def check_broken(model, result, x, y, threat):
    """`broken` holds exactly the samples misclassified in float32 at a feasible x_adv."""
    assert torch.equal(result.broken, ~classified_correctly(model, result.x_adv, y))
    check_inside(result.x_adv, x, threat)


def equals_part(partial_result, full_result, rows):
    """Return whether the partial result is bit-equal to `rows` of the full result."""
    return all(
        torch.equal(getattr(partial_result, f), getattr(full_result, f)[rows])
        for f in RESULT_FIELDS
    )


# a verdict depends on the sample alone


@thinned(("threat", "loss", "precision"), THREATS, LOSSES, PRECISIONS, one_in=3)
def test_verdicts_are_bit_equal_for_any_batch_order_and_number_of_lanes(
    trained, set_threads, threat, loss, precision
):
    model, x, y = trained
    ids = torch.arange(N) * 7 + 3
    settings = {"steps": 6, "loss": loss, "targets": 2, "precision": precision}
    set_threads(1)
    full_result = attack(model, x, y, threat, ids=ids, **settings)
    assert 0 < int(full_result.broken.sum()) < N
    assert len(set(full_result.step.tolist())) > 2
    everything = torch.arange(N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shards = [(shard, None) for shard in order.split(61)]
    for rows, batch_size in [(order, None), *shards, (everything, 32), (order, 250)]:
        partial_result = attack(
            model, x[rows], y[rows], threat, ids=ids[rows], batch_size=batch_size, **settings
        )
        assert equals_part(partial_result, full_result, rows), (len(rows), batch_size)
    set_threads(2)
    assert equals_part(attack(model, x, y, threat, ids=ids, **settings), full_result, everything)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numpy_judges_logits_as_pytorch_does(dtype):
    """Ties, infinities and NaN too: the first of the highest logits is the prediction."""
    special = [0.0, 1.0, -torch.inf, torch.inf, torch.nan]
    some = torch.tensor(list(itertools.product(special, repeat=3)))
    logits = torch.cat([some, torch.rand(75, 3)]).to(dtype)
    y = torch.arange(len(logits)) % 3
    margin, fooled = losses.judge(logits, y)
    assert margin.dtype == dtype
    torch.testing.assert_close(
        margin, losses.logit_margin(logits, y), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(fooled, logits.argmax(1) != y)


@by_precision
@by_threat
def test_rows_that_numpy_keeps_are_those_of_pytorch(trained, monkeypatch, threat, precision):
    model, x, y = trained
    settings = {"steps": 20, "precision": precision}
    by_numpy = attack(model, x, y, threat, **settings)
    monkeypatch.setattr(steps, "is_numpy_like", lambda _: False)  # as on a GPU
    by_pytorch = attack(model, x, y, threat, **settings)
    assert equals_part(by_pytorch, by_numpy, torch.arange(N))


@by_precision
def test_every_pass_has_one_shape(trained, precision):
    model, x, y = trained
    shapes, x = [], x[:45]

    class RecordsShapes(nn.Module):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            return model(x)

    attack(RecordsShapes(), x, y[:45], THREATS[0], precision=precision, steps=4)
    assert shapes[0] == (2, 1, 8, 8)  # the probe of the network
    assert shapes.count((16, 1, 8, 8)) == (precision == "bfloat16")  # folding
    assert set(shapes[1:]) - {(16, 1, 8, 8)} == {(32, 1, 8, 8)}


def test_other_ids_give_other_verdicts(trained):
    """The tests above would also pass without noise, or with one noise for all samples."""
    model, x, y = trained
    first, second = (
        attack(model, x, y, THREATS[0], ids=torch.arange(N) + shift) for shift in (0, 1)
    )
    assert not equals_part(first, second, torch.arange(N))


@pytest.mark.parametrize("batch_size", [1, 5, 31])
def test_smaller_passes_give_the_same_verdicts(trained, batch_size):
    """Passes of another shape round differently; in float64 no verdict depends on that."""
    model, x, y = digits_network(4).double(), trained[1][:30].double(), trained[2][:30]
    full_result = attack(model, x, y, THREATS[0], steps=4)
    small = attack(model, x, y, THREATS[0], steps=4, batch_size=batch_size)
    assert torch.equal(small.broken, full_result.broken)
    torch.testing.assert_close(small.x_adv, full_result.x_adv, rtol=0, atol=1e-4)


# a search in bfloat16, checked in float32


class RecordsPasses(nn.Module):
    """Records of each pass whether autocast was on and whether a gradient was required."""

    def __init__(self, network, passes):
        super().__init__()
        self.network, self.record = network, passes.append

    def forward(self, x):
        self.record((torch.is_autocast_enabled("cpu"), x.requires_grad))
        return self.network(x)


@by_precision
def test_only_the_search_runs_in_bfloat16(trained, precision):
    model, x, y = trained
    passes = []
    # A bound method survives the copy that folding makes of the network.
    attack(RecordsPasses(model, passes), x, y, THREATS[0], steps=3, precision=precision)
    searched = {autocast for autocast, needs_gradient in passes if needs_gradient}
    checked = {autocast for autocast, needs_gradient in passes if not needs_gradient}
    assert searched == {precision == "bfloat16"}
    assert checked == {False}


@thinned(("threat", "loss"), THREATS, LOSSES, one_in=3)
def test_samples_that_a_bfloat16_search_broke_are_misclassified_in_float32(trained, threat, loss):
    model, x, y = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = attack(model, x, y, threat, loss=loss, precision="bfloat16")
    check_broken(model, result, x, y, threat)
    exact = attack(model, x, y, threat, loss=loss)
    assert not equals_part(result, exact, torch.arange(N))  # the search was another one
    assert abs(int(result.broken.sum()) - int(exact.broken.sum())) <= 8  # and hardly weaker
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def doubtful_problem(threat, gap, autocast_error):
    w = weights(0, two_largest=True)
    return linear_problem(threat, w, n=20, gap=gap, autocast_error=autocast_error)


@pytest.mark.parametrize("threat", LINEAR_THREATS, ids=str)
def test_hits_of_bfloat16_alone_do_not_count(threat):
    """Every point of the search is a hit, but none is in float32: each search runs to its end."""
    model, x, y = doubtful_problem(threat, gap=0.1, autocast_error=100.0)
    result = attack(model, x, y, threat, precision="bfloat16", steps=12)
    assert not bool(result.broken.any())
    assert bool((result.step == -1).all())
    exact = attack(model, x, y, threat, steps=12)
    with torch.no_grad():
        found, goal = ce(model(result.x_adv), y), ce(model(exact.x_adv), y)
    torch.testing.assert_close(found, goal, rtol=2e-2, atol=0)  # refuted hits cost no strength


def test_refuted_hits_continue_beside_the_last_searches():
    """If a hit waited until the other search has ended, its own would add steps of its own."""
    w, searched, steps = weights(0), [], 12
    w[0, 4, 4] = 0
    network, x, y = linear_problem(LINEAR_THREATS[0], w, n=2, gap=0.1)
    x[:, 0, 4, 4] = torch.tensor([0.0, 1.0])

    class SeesHits(nn.Module):
        """Under autocast, an image that is bright in the corner looks misclassified."""

        def forward(self, points):
            searched.append(points.requires_grad)
            is_marked = (points[:, 0, 4, 4] > 0.5) & torch.is_autocast_enabled("cpu")
            return network(points) + is_marked[:, None] * torch.tensor([0.0, 100.0])

    result = attack(SeesHits(), x, y, LINEAR_THREATS[0], precision="bfloat16", steps=steps)
    assert not bool(result.broken.any())
    assert sum(searched) == steps


@pytest.mark.parametrize("threat", LINEAR_THREATS, ids=str)
def test_hits_that_bfloat16_misses_are_found_at_the_end(threat):
    """No point of the search is a hit; the last and the best point are checked nevertheless."""
    model, x, y = doubtful_problem(threat, gap=-0.1, autocast_error=-5.0)
    result = attack(model, x, y, threat, precision="bfloat16", steps=12)
    check_broken(model, result, x, y, threat)
    exact = attack(model, x, y, threat, steps=12)
    assert int(exact.broken.sum()) == 20
    assert int(result.broken.sum()) == 20
    assert bool((result.step >= exact.step).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_point_of_a_bfloat16_search_is_checked_too(seed):
    """The search oversteps a target again and again: the best point is a hit, not the last."""
    w = torch.randn(25, generator=torch.Generator().manual_seed(seed))

    class Target(nn.Module):
        def forward(self, x):
            gain = 0.02 - (((x.flatten(1) - 0.5) * w).sum(1) - 0.31).abs()
            seen = gain - 5.0 * torch.is_autocast_enabled("cpu")
            return torch.stack([torch.zeros_like(gain), seen, gain - 100.0], 1)

    def true_gain(logits, y):
        return logits[:, 2]

    x, y = torch.full((40, 1, 5, 5), 0.5), torch.zeros(40, dtype=torch.long)
    threat = ThreatModel("L2", 0.3)
    exact, found = (
        attack(Target(), x, y, threat, steps=8, precision=precision, loss=true_gain)
        for precision in ("float32", "bfloat16")
    )
    assert torch.equal(found.broken, exact.broken)
    assert len(set(found.step[found.broken].tolist())) > 1  # not all at the last point
    check_broken(Target(), found, x, y, threat)


# attempts: restarts, targets, stochastic networks


def test_names_of_attempts():
    settings = AttackSettings(loss="targeted dlr", targets=2, restarts=2)
    assert [attempt.name for attempt in list_attempts(settings, 10)] == [
        "apgd-t target 1",
        "apgd-t target 2",
        "apgd-t target 1 restart 2",
        "apgd-t target 2 restart 2",
    ]
    settings = AttackSettings(attack="pgd", loss="dlr", restarts=2)
    names = [attempt.name for attempt in list_attempts(settings, 10)]
    assert names == ["pgd-dlr", "pgd-dlr restart 2"]
    names = [attempt.name for attempt in list_attempts(AttackSettings(targets=3), 10)]
    assert names == ["apgd-ce"]
    for classes, targets in ((4, 3), (7, 6), (10, 9), (100, 9)):
        attempts = list_attempts(AttackSettings(loss="targeted dlr"), classes)
        assert [attempt.target_rank for attempt in attempts] == list(range(1, targets + 1))


@by_threat
def test_restarts_keep_what_was_broken(trained, threat):
    model, x, y = trained
    weak = ThreatModel(threat.norm, threat.eps * 0.7)
    results = [attack(model, x, y, weak, steps=3, restarts=restarts) for restarts in (1, 2, 6)]
    later_names = [f"apgd-ce restart {number}" for number in range(2, 7)]
    assert results[2].attempts == ("apgd-ce", *later_names)
    for fewer, pass_options in itertools.pairwise(results):
        rows = fewer.broken
        assert bool((pass_options.broken | ~rows).all())
        for field in RESULT_FIELDS:
            assert torch.equal(getattr(pass_options, field)[rows], getattr(fewer, field)[rows])
    check_broken(model, results[2], x, y, weak)
    late = results[2].broken & ~results[0].broken
    assert bool((results[2].by[late] >= 1).all())
    wrong = ~classified_correctly(model, x, y)
    assert bool((results[2].by[wrong] == -1).all())
    assert bool((results[2].by[~results[2].broken] == -1).all())


class FlatOnOneSide(nn.Module):
    """Only where a weighted sum of the pixels is positive, the logits depend on the input."""

    def forward(self, x):
        signs = torch.tensor([1.0, -1.0]).repeat(x[0].numel() // 2)
        rise = torch.relu((x.flatten(1) - 0.5) @ signs)
        return torch.stack([torch.full_like(rise, 1e-3), rise], 1)


@by_threat
def test_restarts_break_what_a_start_on_flat_ground_missed(threat):
    """About half of all starts lie where the gradient is exactly zero."""
    x, y = torch.full((64, 1, 4, 4), 0.5), torch.zeros(64, dtype=torch.long)
    once, often = (attack(FlatOnOneSide(), x, y, threat, restarts=count) for count in (1, 6))
    assert 0 < int(once.broken.sum()) < int(often.broken.sum())


@pytest.mark.parametrize("norm", NORMS)
def test_every_restart_seed_and_sample_has_its_own_start(norm):
    x = torch.full((3, 1, 6, 6), 0.5)
    eps = torch.full((3,), 0.2)
    starts = [
        random_start(
            x, cold_noise(x, norm, seed=seed, ids=torch.tensor(ids), restart=restart), eps, norm
        )
        for seed, ids, restart in (
            (0, [1, 2, 3], 0),
            (1, [1, 2, 3], 0),
            (0, [1, 2, 3], 1),
            (0, [4, 5, 6], 0),
        )
    ]
    points = torch.cat(starts).flatten(1)
    assert len({tuple(point.tolist()) for point in points}) == 12
    assert float(norms(points.double() - 0.5, norm).max()) <= 0.2 + 1e-6
    alone = cold_noise(x[:1], norm, seed=0, ids=torch.tensor([2]))
    alone = random_start(x[:1], alone, eps[:1], norm)
    assert torch.equal(alone[0], starts[0][1])  # whatever samples stand beside it


def test_more_targets_break_no_less_and_no_target_is_the_label(trained, monkeypatch):
    model, x, y = trained
    threat, targeted_dlr, calls = ThreatModel("Linf", 0.06), losses.targeted_dlr, []

    def spy(logits, labels, target):
        calls.append((labels.clone(), target.clone()))
        return targeted_dlr(logits, labels, target)

    monkeypatch.setattr(losses, "targeted_dlr", spy)
    one, three = (
        attack(model, x, y, threat, loss="targeted dlr", targets=targets) for targets in (1, 3)
    )
    assert three.attempts == ("apgd-t target 1", "apgd-t target 2", "apgd-t target 3")
    assert bool((three.broken | ~one.broken).all())
    assert {1, 2} & set(three.by.tolist())
    assert calls
    assert all(bool((labels != target).all()) for labels, target in calls)


def test_targets_are_the_most_likely_other_classes(monkeypatch):
    """Class k scores 1 - k / 10, and the label 1 more: ranks skip the label."""
    target_of_label = []

    def spy(logits, labels, target):
        target_of_label.append(dict(zip(labels.tolist(), target.tolist(), strict=True)))
        return logits[:, 0] * 0

    class Scores(nn.Module):
        def forward(self, x):
            label = functional.one_hot((x[:, 0, 0, 0] * 5).long(), 5)
            return x.flatten(1).sum(1, keepdim=True) * 0 + 1 - torch.arange(5) / 10 + label

    monkeypatch.setattr(losses, "targeted_dlr", spy)
    x, y = (torch.arange(3.0) / 5 + 0.1).view(3, 1, 1, 1), torch.arange(3)
    threat = ThreatModel("Linf", 1e-3)
    attack(Scores(), x, y, threat, loss="targeted dlr", targets=3, steps=1)
    assert [target_of_label[0], target_of_label[2], target_of_label[4]] == [
        {0: 1, 1: 0, 2: 0},
        {0: 2, 1: 2, 2: 1},
        {0: 3, 1: 3, 2: 3},
    ]


def test_eot_finds_a_gradient_that_noise_hides():
    """A linear network whose gradient drowns in noise; the average of 30 passes shows it."""
    w = torch.randn(36, generator=torch.Generator().manual_seed(2))
    w = w / w.norm()

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x):
            noise = torch.randn(36, generator=self.generator) * x.requires_grad
            gain = x.flatten(1) @ (w + noise) - 0.5 * float(w.sum() + noise.sum()) - 2.0
            return torch.stack([torch.zeros_like(gain), gain], 1)

    x, y = torch.full((40, 1, 6, 6), 0.5), torch.zeros(40, dtype=torch.long)
    gains = []
    for eot in (1, 30):
        points = pgd(Noisy(), x, y, "L2 0.1", steps=10, eot=eot).flatten(1) - 0.5
        gains.append(float((points @ w).mean()))
    assert gains[1] > gains[0] + 0.02


# PGD in the engine


@thinned(("threat", "precision"), THREATS, PRECISIONS, one_in=2)
def test_pgd_breaks_samples_and_stays_in_the_ball(trained, threat, precision):
    model, x, y = trained
    broken = [~classified_correctly(model, x, y)]
    for scale in (1e-6, 0.7, 3.0):
        scaled = ThreatModel(threat.norm, threat.eps * scale)
        result = attack(model, x, y, scaled, attack="pgd", steps=20, precision=precision)
        assert result.attempts == ("pgd-ce",)
        check_broken(model, result, x, y, scaled)
        assert torch.equal(pgd(model, x, y, scaled, precision=precision), result.x_adv)
        broken.append(result.broken)
    wrong, nearby, _, far = broken
    assert torch.equal(nearby, wrong)
    assert wrong.sum() + 10 <= far.sum()


# the queue, and ready-made points


def test_the_queue_hands_out_every_sample_once_and_stops_on_request():
    queue = SampleQueue(range(5))
    assert queue.take(2) == [0, 1]
    assert queue.take(9) == [2, 3, 4]
    assert queue.take(1) == []
    assert not queue.stopped
    queue.stop()
    assert queue.stopped


@by_threat
def test_ready_made_points_are_checked_in_float32(trained, threat):
    model, x, y = trained
    found = attack(model, x, y, threat)
    samples = AttackedSamples(lambda at: x[at], y, torch.arange(N), model(x))
    selected, pass_options = torch.arange(5, 97), {"size": 32, "device": x.device}
    broken, margin = check_points(
        model, samples, lambda at: found.x_adv[at], selected, **pass_options
    )
    assert torch.equal(broken, found.broken[selected])
    assert torch.equal(margin < 0, broken)
    nothing, _ = check_points(
        model, samples, lambda at: found.x_adv[at], selected[:0], **pass_options
    )
    assert len(nothing) == 0
    assert nothing.dtype == torch.bool


def test_a_restored_outcome_drops_what_was_only_partly_written():
    """Sample 0 is broken and settled; sample 1 was being written when the snapshot was taken."""
    outcome = Outcome.blank(3)
    outcome.broken[:2], outcome.by[:2], outcome.step[:2] = True, 0, 4
    outcome.settled[0] = 2
    restored = Outcome.blank(3)
    restored.restore(outcome.snapshot(), attempts=2)
    assert restored.settled.tolist() == [2, 0, 0]
    assert restored.broken.tolist() == [True, False, False]
    assert restored.by.tolist() == [0, -1, -1]
    assert restored.step.tolist() == [4, -1, -1]


# steps that a GPU takes without waiting for the host


def search_of(model, samples, threat, settings):
    """The work of the first attempt, on the device of the labels."""
    schedule = StepSchedule.for_threat(threat, settings.steps, adaptive=settings.attack == "apgd")
    return Search(
        model=model,
        search_model=model,
        samples=samples,
        attempt=list_attempts(settings, 10)[0],
        index=0,
        attempts=1,
        schedule=schedule,
        seed=settings.seed,
        precision=settings.precision,
        eot=settings.eot,
        pass_size=6,
        device=samples.y.device,
    )


@thinned(("threat", "loss", "form"), THREATS, LOSSES, ["apgd", "pgd"], one_in=3)
def test_a_step_never_reads_a_value_from_the_device(threat, loss, form):
    """Tensors on PyTorch's "meta" device have no values: reading one raises an error."""
    meta = torch.device("meta")
    x, y = torch.empty(6, 1, 8, 8, device=meta), torch.empty(6, dtype=torch.long, device=meta)
    model = load_model("resnet9:width=2", channels=1).eval().requires_grad_(False).to(meta)
    settings = AttackSettings(attack=form, loss=loss, steps=20, eot=2)
    search = search_of(model, AttackedSamples(lambda rows: x[rows], y, y, y), threat, settings)
    schedule = search.schedule
    rows = DeviceRows.from_state(initial_state(x, y, schedule.stages[0][0], x, schedule, target=y))
    with pytest.raises(RuntimeError):
        bool(rows.hit.any())  # reading a value does raise
    assert search.window > 1
    with torch.no_grad():
        for _ in range(search.window):
            take_step(search, rows, schedule.check_periods().to(meta))


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 20, 50, 97, 100])
@by_threat
def test_the_window_divides_every_stage(threat, steps):
    nothing = torch.empty(0, device="meta")
    samples = AttackedSamples(lambda rows: rows, nothing, nothing, nothing)
    search = search_of(nn.Identity(), samples, threat, AttackSettings(steps=steps))
    assert 1 <= search.window <= 10
    assert all(count % search.window == 0 for _, count in search.schedule.stages)
    if steps == 100:
        assert search.window == 10

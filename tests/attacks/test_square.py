"""Square: parity with the official implementation, its ball and box, and its independence."""

import pytest
import torch
from digits import check_inside
from torch import nn

from robustsoup.attacks.engine import SampleQueue
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.attacks.square import (
    SquareProposals,
    SquareSearch,
    search_squares,
    square,
    window_side,
)
from robustsoup.errors import DataError, RequestError
from robustsoup.models import load_model
from robustsoup.seeding import keyed_generator
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

THREATS = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.5), ThreatModel("L1", 3.0)]


class Scripted(nn.Module):
    """A two-class network whose margin depends on the number of the query alone.

    So the same proposals are accepted whatever the rounding of the points.
    """

    def __init__(self, margins):
        super().__init__()
        self.margins, self.points = margins, []

    def forward(self, x):
        self.points.append(x.clone())
        margin = self.margins(len(self.points))
        return torch.tensor([[margin, 0.0]]).repeat(len(x), 1)


def accept_two_of_three(query):
    return 1000.0 - query if query % 3 else 2000.0


def accept_none(query):
    return 1000.0 + query


def our_queries(x, threat, margins, n_queries):
    network, y = Scripted(margins), torch.zeros(1, dtype=torch.long)
    samples = AttackedSamples(lambda rows: x[rows], y, torch.tensor([7]), torch.tensor([[1.0, 0]]))
    search = SquareSearch(network, samples, threat, n_queries, 3, 0, 0, 1, 1, torch.device("cpu"))
    search_squares(search, SampleQueue([0]), Outcome.blank(1))
    return torch.cat(network.points)


def reference_attack(network, threat, n_queries, sample_id, seed):
    """Return pyautoattack's Square, with the random numbers that we give a sample."""
    reference = pytest.importorskip("pyautoattack.square")
    numbers = keyed_generator("square", seed, sample_id, 0).initial_seed()
    return reference.SquareAttack(
        network, norm=threat.norm, eps=threat.eps, n_queries=n_queries, seed=numbers, device="cpu"
    )


def reference_queries(x, threat, margins, n_queries):
    network = Scripted(margins)
    attack = reference_attack(network, threat, n_queries, sample_id=7, seed=3)
    attack.init_hyperparam(x)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(attack.seed)
        attack.attack_single_run(x, torch.zeros(1, dtype=torch.long))
    return torch.cat(network.points)


@pytest.mark.parametrize(
    ("threat", "margins", "shape"),
    [
        (THREATS[0], accept_two_of_three, (1, 8, 8)),
        (THREATS[0], accept_two_of_three, (3, 32, 32)),
        (THREATS[1], accept_two_of_three, (1, 8, 8)),
        (THREATS[1], accept_two_of_three, (3, 32, 32)),
        # In L1 the reference projects by bisection; windows of almost no mass amplify its error.
        (THREATS[2], accept_none, (1, 8, 8)),
        (THREATS[2], accept_none, (3, 10, 10)),
    ],
)
def test_every_query_is_that_of_the_reference(threat, margins, shape):
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    ours = our_queries(x, threat, margins, n_queries=100)
    reference = reference_queries(x, threat, margins, n_queries=100)
    assert len(ours) == 101
    if threat.norm == "Linf":
        assert torch.equal(ours, reference)
    else:
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 15, 20), (1, 20, 15)])
def test_linf_queries_of_other_rectangles_are_those_of_the_reference(shape):
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    queries = (x, THREATS[0], accept_two_of_three, 100)
    assert torch.equal(our_queries(*queries), reference_queries(*queries))


def test_windows_lie_where_float32_puts_them():
    """Where the product of a float32 number and a length rounds up to a whole number."""
    proposals = SquareProposals((3, 32, 32), THREATS[0], 10, torch.device("cpu"))
    uniforms = (torch.arange(1, 31) / 31).float()
    expected = (31 * uniforms).long()
    exact = (31 * uniforms.double()).long()
    assert not torch.equal(expected, exact)
    sides = torch.ones(30, dtype=torch.int64)
    window = proposals._window(sides, uniforms, uniforms.flip(0))
    assert torch.equal(window.flatten(1).sum(1), sides)
    assert torch.equal(window.any(3).flatten(1).int().argmax(1), expected)
    assert torch.equal(window.any(2).flatten(1).int().argmax(1), expected.flip(0))


@pytest.mark.parametrize("n_queries", [100, 5000, 10_000])
def test_the_schedule_of_window_sizes_is_that_of_the_reference(n_queries):
    attack = reference_attack(None, THREATS[0], n_queries, 0, 0)
    for query in range(0, n_queries, 7):
        side = max(round((attack.p_selection(query) * 32 * 32) ** 0.5), 1)
        assert window_side(query, n_queries, (3, 32, 32), "Linf") == min(side, 32)


@pytest.fixture(scope="module")
def problem():
    """A random network, 12 images and its predictions."""
    model = load_model("resnet9:width=4", seed=3).eval()
    x = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def test_an_attack_of_single_images_breaks_what_the_reference_breaks(problem):
    """With one image in a pass, the passes have the same shape, so the logits the same bits."""
    model, x, y = problem
    points = square(model, x, y, "Linf 16/255", n_queries=60, batch_size=1)
    with torch.no_grad():
        broken = torch.cat([model(point).argmax(1) for point in points.split(1)]) != y
    for number in range(len(x)):
        attack = reference_attack(model, ThreatModel("Linf", 16 / 255), 60, number, seed=0)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            expected = attack.perturb(x[number : number + 1], y[number : number + 1])[0]
        assert bool(broken[number]) == (not torch.equal(expected, x[number]))
        if broken[number]:
            torch.testing.assert_close(points[number], expected, rtol=0, atol=1e-6)
    assert int(broken.sum()) > 0


@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 5, 5), (3, 14, 14), (2, 9, 13), (1, 23, 8)])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_points_lie_in_the_ball_and_the_box(threat, shape):
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(2))
    x[0], x[1] = 0.0, 1.0
    network = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3))
    with torch.no_grad():
        y = network(x).argmax(1)
    check_inside(square(network, x, y, threat, n_queries=30), x, threat)


def test_a_point_depends_on_neither_batch_nor_order_nor_threads(problem):
    model, x, y = problem
    ids = torch.arange(100, 100 + len(x))
    settings = {"n_queries": 15, "seed": 2}
    points = square(model, x, y, "L2 0.5", ids=ids, **settings)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = square(model, x[order], y[order], "L2 0.5", ids=ids[order], **settings)
    assert torch.equal(shuffled, points[order])
    alone = square(model, x[3:4], y[3:4], "L2 0.5", ids=ids[3:4], **settings)
    assert torch.equal(alone, points[3:4])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = square(model, x, y, "L2 0.5", ids=ids, batch_size=4, **settings)
        torch.set_num_threads(1)
        assert torch.equal(square(model, x, y, "L2 0.5", ids=ids, batch_size=4, **settings), many)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(square(model, x, y, "L2 0.5", n_queries=15, seed=3), points)


def test_restarts_break_more_and_leave_the_rest_alone(problem):
    model, x, y = problem
    once = square(model, x, y, "Linf 4/255", n_queries=10)
    often = square(model, x, y, "Linf 4/255", n_queries=10, restarts=4)
    with torch.no_grad():
        broken = model(once).argmax(1) != y
        assert bool((model(often).argmax(1) != y)[broken].all())
        unbroken = model(often).argmax(1) == y
    assert torch.equal(often[broken | unbroken], once[broken | unbroken])


def test_a_gradient_is_never_needed(problem):
    """The network has no gradient, and every change of the first pixel row breaks it."""

    class Threshold(nn.Module):
        def forward(self, x):
            changed = (x.detach()[:, :, 0].flatten(1) - 0.5).abs().amax(1) > 0.01
            return torch.stack([(~changed).float(), changed.float()], 1)

    x, y = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
    points = square(Threshold(), x, y, "Linf 0.1", n_queries=1)
    assert bool((Threshold()(points).argmax(1) == 1).all())


@pytest.mark.parametrize("wrap", [lambda logits: (logits, 0), lambda logits: {"logits": logits}])
def test_functions_arrays_and_wrapped_logits_are_accepted(problem, wrap):
    model, x, y = problem
    expected = square(model, x, y, "L2 0.5", n_queries=20)

    def function(x):
        return wrap(model(x))

    points = square(function, x.numpy(), y.tolist(), "L2 0.5", n_queries=20)
    assert torch.equal(points, expected)


def test_images_without_height_and_width_are_refused():
    x, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(DataError, match=r"x: got shape \(3, 4\), expected \(n, c, h, w\) images"):
        square(nn.Linear(4, 2), x, y, "Linf 0.1", n_queries=1)


def test_wrong_settings_are_refused(problem):
    model, x, y = problem
    with pytest.raises(RequestError, match="n_queries: got 0, expected at least 1"):
        square(model, x, y, THREATS[0], n_queries=0)
    with pytest.raises(RequestError, match="ids: got 2, expected 12, one for each image"):
        square(model, x, y, THREATS[0], ids=torch.arange(2))
    with pytest.raises(RequestError, match='loss: got "dlr" with attack "square"'):
        AttackSettings(attack="square", loss="dlr")
    assert torch.equal(square(model, x, y, "clean"), x)

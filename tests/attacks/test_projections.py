"""Norms, projections and random starts: the ball intersected with the box [0, 1]."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.attacks.projections import (
    as_column,
    constraint_excess,
    move_inside,
    norms,
    project,
    random_start,
    sort_rows,
)
from robustsoup.threats import NORMS, ThreatModel

few_examples = settings(max_examples=30, deadline=None)
ORD = {"Linf": torch.inf, "L2": 2, "L1": 1}


def length(delta, norm):
    """The norm of each row, in float64 and by torch's own code."""
    return torch.linalg.vector_norm(delta.double().flatten(1), ORD[norm], dim=1)


def images(seed, rows, size, dtype=torch.float32):
    """Images in [0, 1]; a third of the pixels are exactly 0 and a sixth exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, *size, generator=generator, dtype=torch.float64)
    pick = torch.rand(x.shape, generator=generator)
    return torch.where(pick < 1 / 3, 0.0, torch.where(pick > 5 / 6, 1.0, x)).to(dtype)


def add_noise(x, seed, scale):
    generator = torch.Generator().manual_seed(seed + 1)
    return x + scale * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


problems = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(NORMS),
        "eps": st.one_of(st.sampled_from([0.0, 8 / 255, 0.5, 12.0]), st.floats(1e-3, 30)),
        "seed": st.integers(0, 2**31),
        "scale": st.sampled_from([1e-4, 0.03, 0.3, 3.0]),
        "size": st.sampled_from([(1,), (7,), (1, 4, 4), (3, 8, 8)]),
    }
)


def problem(norm, eps, seed, scale, size, dtype=torch.float32):
    x = images(seed, 4, size, dtype)
    return x, add_noise(x, seed, scale), torch.full((4,), eps, dtype=dtype), norm


def check_feasible(found, x, eps, norm):
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert bool(found.isfinite().all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    over = (length(found.double() - x.double(), norm) - eps.double()) / eps.double().clamp(min=1)
    assert float(over.max()) <= 1e-6


# norms and projections


@few_examples
@given(norm=st.sampled_from(NORMS), seed=st.integers(0, 2**31))
def test_norms_equal_those_of_torch(norm, seed):
    delta = add_noise(torch.zeros(5, 3, 4, 4, dtype=torch.float64), seed, 1.0)
    torch.testing.assert_close(norms(delta, norm), length(delta, norm))


@few_examples
@given(problems)
def test_a_projection_is_feasible_and_idempotent(drawn):
    x, z, eps, norm = problem(**drawn)
    once = project(z, x, eps, norm)
    check_feasible(once, x, eps, norm)
    torch.testing.assert_close(project(once, x, eps, norm), once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [8 / 255, 0.5, 1.0, 12.0])
@pytest.mark.parametrize("content", ["noise", "one colour"])
def test_a_projection_of_whole_images_is_feasible(norm, eps, content):
    """A uniform colour with a uniform shift rounds 3,072 times in the same direction."""
    x = images(3, 8, (3, 32, 32)) if content == "noise" else torch.full((8, 3, 32, 32), 0.7)
    moved = (
        add_noise(x, 3, 0.01)
        if content == "noise"
        else x + 0.01 * add_noise(torch.zeros_like(x), 3, 1.0).sign()
    )
    radius = torch.full((8,), eps)
    check_feasible(project(moved, x, radius, norm), x, radius, norm)


@few_examples
@given(problems)
def test_a_feasible_point_is_not_moved(drawn):
    x, z, eps, norm = problem(**drawn, dtype=torch.float64)
    inside = x + 0.99 * (project(z, x, eps, norm) - x)
    torch.testing.assert_close(project(inside, x, eps, norm), inside, rtol=0, atol=1e-11)


@few_examples
@given(problems)
def test_each_row_is_projected_on_its_own(drawn):
    x, z, eps, norm = problem(**drawn)
    eps = eps * torch.tensor([1.0, 0.5, 2.0, 0.0])
    all_projected = project(z, x, eps, norm)
    for row in range(4):
        at = slice(row, row + 1)
        torch.testing.assert_close(
            project(z[at], x[at], eps[at], norm), all_projected[at], rtol=0, atol=1e-6
        )
    assert torch.equal(all_projected[3], x[3])


def nearest_in_l1(z, x, eps):
    """Brute force in float64: find the shift t of sign(d) clamp(|d| - t, 0, room) by bisection."""
    delta = (z - x).flatten(1).double()
    room = torch.where(delta > 0, 1 - x.flatten(1).double(), x.flatten(1).double())

    def shifted(t):
        return torch.minimum((delta.abs() - t).clamp(min=0), room)

    low, high = torch.zeros(len(x), 1, dtype=torch.float64), delta.abs().amax(1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        over = shifted(middle).sum(1, keepdim=True) > eps.double().view(-1, 1)
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    t = torch.where(
        shifted(torch.zeros_like(low)).sum(1, keepdim=True) > eps.double().view(-1, 1), high, 0.0
    )
    return x.double() + (delta.sign() * shifted(t)).view_as(x)


@settings(max_examples=60, deadline=None)
@given(problems)
def test_the_l1_projection_is_the_nearest_point(drawn):
    for dtype, atol in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        x, z, eps, _ = problem(**{**drawn, "norm": "L1"}, dtype=dtype)
        torch.testing.assert_close(
            project(z, x, eps, "L1").double(), nearest_in_l1(z, x, eps), rtol=0, atol=atol
        )


@pytest.mark.parametrize(
    ("x", "delta", "eps", "nearest"),
    [  # computed by hand
        ([0.5, 0.5], [0.4, 0.1], 1.0, [0.4, 0.1]),  # inside
        ([0.5, 0.5], [0.4, -0.1], 0.2, [0.2, 0.0]),  # one pixel takes the whole budget
        ([0.5, 0.5], [0.4, -0.3], 0.3, [0.2, -0.1]),  # both shrink by 0.2
        (
            [0.9, 0.0, 0.5],
            [5.0, 0.6, 0.0],
            0.5,
            [0.1, 0.4, 0.0],
        ),  # the box stops the first pixel, the second shrinks alone
        ([0.9, 0.0, 0.5], [5.0, 0.6, 0.0], 0.05, [0.05, 0.0, 0.0]),
        ([1.0, 0.0], [3.0, -3.0], 0.5, [0.0, 0.0]),  # the box leaves no room
        ([0.0, 0.0], [3.0, 3.0], 9.0, [1.0, 1.0]),  # the whole box is inside
    ],
)
def test_l1_projections_computed_by_hand(x, delta, eps, nearest):
    x, delta, nearest = (
        torch.tensor([values], dtype=torch.float64) for values in (x, delta, nearest)
    )
    projected = project(x + delta, x, torch.tensor([eps], dtype=torch.float64), "L1") - x
    torch.testing.assert_close(projected, nearest, rtol=0, atol=1e-12)


def test_the_brute_force_beats_random_feasible_points():
    x = images(5, 1, (6,), torch.float64)
    z, eps = add_noise(x, 5, 1.0), torch.tensor([0.7], dtype=torch.float64)
    best = (nearest_in_l1(z, x, eps) - z).norm()
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(20_000, 6, generator=generator, dtype=torch.float64)
    near = x + (points - x) * torch.rand(20_000, 1, generator=generator, dtype=torch.float64)
    feasible = near[(near - x).abs().sum(1) <= 0.7]
    assert len(feasible) > 1000
    assert float((feasible - z).norm(dim=1).min()) >= float(best)


@few_examples
@given(problems)
def test_the_linf_projection_is_the_nearest_point(drawn):
    x, z, eps, _ = problem(**{**drawn, "norm": "Linf"}, dtype=torch.float64)
    low, high = (x - as_column(eps, x)).clamp(min=0), (x + as_column(eps, x)).clamp(max=1)
    torch.testing.assert_close(
        project(z, x, eps, "Linf"), torch.min(torch.max(z, low), high), rtol=0, atol=1e-15
    )


@few_examples
@given(problems)
def test_the_l2_projection_scales_and_then_clamps(drawn):
    x, z, eps, _ = problem(**{**drawn, "norm": "L2"}, dtype=torch.float64)
    share = (eps / length(z - x, "L2")).clamp(max=1)
    torch.testing.assert_close(
        project(z, x, eps, "L2"), (x + (z - x) * as_column(share, x)).clamp(0, 1), rtol=0, atol=1e-9
    )


# exactly inside

SHAPES = [(3, 32, 32), (1, 8, 8), (3, 4, 4), (5,), (1,)]
RADII = {"Linf": [2 / 255, 8 / 255, 0.1, 1.0], "L2": [0.1, 0.5, 1.7], "L1": [0.3, 1.5, 12.0]}


def excess_in_float64(points, x, norm, eps):
    """By how much points leave the ball and the box, by torch's own norm and without tolerance."""
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1
    return float((length(points.double() - x.double(), norm) - eps).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_no_returned_point_of_100_000_is_outside_in_float64(norm, dtype):
    """Together with the other dtypes and norms, more than 10^5 points; no tolerance."""
    for number, shape in enumerate(SHAPES):
        rows = 200 if number == 0 else 1500
        for eps in RADII[norm]:
            x = images(number, rows, shape, dtype)
            z = add_noise(x, number, 0.3)
            points = project(z, x, torch.full((rows,), eps, dtype=dtype), norm)
            inside = move_inside(points, x, ThreatModel(norm, eps))
            assert inside.dtype == dtype
            assert excess_in_float64(inside, x, norm, eps) <= 0
            if norm == "L1":  # the projection itself is exact
                assert torch.equal(inside, points)
            else:
                limit = 4 * max(torch.finfo(dtype).eps, 1e-12)
                assert float((inside.double() - points.double()).abs().max()) <= limit
            assert torch.equal(move_inside(inside, x, ThreatModel(norm, eps)), inside)


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_inside_is_not_moved(norm):
    x = images(4, 100, (3, 8, 8))
    points = x + 0.5 * (project(add_noise(x, 4, 1.0), x, torch.full((100,), 0.2), norm) - x)
    assert torch.equal(move_inside(points, x, ThreatModel(norm, 0.2)), points)
    assert torch.equal(move_inside(x, x, ThreatModel(norm, 0.2)), x)


# random starts


@few_examples
@given(problems)
def test_a_random_start_is_feasible(drawn):
    x, z, eps, norm = problem(**drawn)
    check_feasible(random_start(x, z - x, eps, norm), x, eps, norm)


@few_examples
@given(seed=st.integers(0, 2**31), norm=st.sampled_from(["Linf", "L2"]), eps=st.floats(0.01, 0.5))
def test_a_random_start_inside_the_box_is_on_the_sphere(seed, norm, eps):
    x = torch.full((4, 3, 5, 5), 0.5)
    noise = add_noise(torch.zeros_like(x), seed, 1.0)
    start = random_start(x, noise, torch.full((4,), eps), norm)
    torch.testing.assert_close(
        length(start - x, norm), torch.full((4,), eps).double(), rtol=1e-5, atol=1e-6
    )
    along = torch.nn.functional.cosine_similarity((start - x).flatten(1), noise.flatten(1))
    torch.testing.assert_close(along, torch.ones(4), rtol=0, atol=1e-5)


def test_a_random_start_is_clamped_to_the_box():
    x = images(9, 4, (3, 4, 4), torch.float64)
    noise, eps = add_noise(torch.zeros_like(x), 9, 1.0), torch.full((4,), 0.4, dtype=torch.float64)
    for norm in ("Linf", "L2"):
        expected = (x + 0.4 * noise / as_column(length(noise, norm), x)).clamp(0, 1)
        torch.testing.assert_close(random_start(x, noise, eps, norm), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        random_start(x, noise, eps, "L1"), nearest_in_l1(x + noise, x, eps), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("norm", NORMS)
def test_without_noise_the_start_is_x(norm):
    x = images(1, 2, (3, 4, 4))
    assert torch.equal(random_start(x, torch.zeros_like(x), torch.full((2,), 0.5), norm), x)


# feasibility


@pytest.mark.parametrize("norm", NORMS)
def test_the_excess_of_ball_and_box(norm):
    x, threat = torch.full((5, 1, 1, 1), 0.5), ThreatModel(norm, 0.25)
    points = torch.tensor([0.5, 0.7, 0.875, 1.25, torch.nan]).view(5, 1, 1, 1)
    excess = constraint_excess(points, x, threat)
    assert excess.dtype == torch.float64
    expected = torch.tensor([-0.25, -0.05, 0.125, 0.5, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(excess, expected, equal_nan=True, rtol=0, atol=1e-7)
    outside = torch.tensor([-0.125, 1.125]).view(2, 1, 1, 1)
    excess = constraint_excess(outside, outside.clamp(0, 1), ThreatModel(norm, 0.5))
    torch.testing.assert_close(excess, torch.tensor([0.125, 0.125], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_row_is_sorted(dtype):
    values = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:, ::7] = 0
    assert torch.equal(sort_rows(values), values.sort(dim=1).values)

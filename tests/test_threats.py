"""Threat models: how they are written, and the geometry of the ball intersected with the box."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.attacks.projections import norms, project, random_start
from robustsoup.errors import RequestError, ThreatError
from robustsoup.threats import CLEAN, NORMS, ThreatModel

few = settings(max_examples=30, deadline=None)
ORD = {"Linf": torch.inf, "L2": 2, "L1": 1}


def length(delta, norm):
    """The norm of each row, in float64 and by torch's own code."""
    return torch.linalg.vector_norm(delta.double().flatten(1), ORD[norm], dim=1)


def column(values, like):
    return values.view(-1, *[1] * (like.dim() - 1))


def images(seed, rows, size, dtype=torch.float32):
    """Images in [0,1], a third of whose pixels are exactly 0 and a sixth exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, *size, generator=generator, dtype=torch.float64)
    pick = torch.rand(x.shape, generator=generator)
    return torch.where(pick < 1 / 3, 0.0, torch.where(pick > 5 / 6, 1.0, x)).to(dtype)


def far(x, seed, scale):
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
    return x, far(x, seed, scale), torch.full((4,), eps, dtype=dtype), norm


def check_feasible(found, x, eps, norm):
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert bool(found.isfinite().all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    over = (length(found.double() - x.double(), norm) - eps.double()) / eps.double().clamp(min=1)
    assert float(over.max()) <= 1e-6


# text


@few
@given(norm=st.sampled_from(NORMS), eps=st.floats(0, 1e9, exclude_min=True))
def test_what_is_written_reads_back_the_same(norm, eps):
    threat = ThreatModel(norm, eps)
    assert ThreatModel.parse(str(threat)) == threat
    assert ThreatModel.parse(threat) is threat


@few
@given(level=st.integers(1, 255))
def test_linf_is_written_in_255ths(level):
    assert str(ThreatModel("Linf", level / 255)) == f"Linf {level}/255"
    assert ThreatModel.parse(f"Linf {level}/255") == ThreatModel("Linf", level / 255)


@pytest.mark.parametrize("norm", NORMS)
def test_eps_0_is_clean_in_every_norm_and_reads_back_the_same(norm):
    nothing = ThreatModel(norm, 0.0)
    assert nothing.is_clean
    assert str(nothing) == "clean"
    assert ThreatModel.parse(f"{norm} 0").is_clean
    assert ThreatModel.parse(str(nothing)) == nothing


@pytest.mark.parametrize("number", [np.float64, np.float32, int])
def test_other_numbers_are_written_so_that_they_read_back(number):
    threat = ThreatModel("L2", number(2))
    assert str(threat) == "L2 2.0" or str(threat) == "L2 2"
    assert ThreatModel.parse(str(threat)) == threat


@pytest.mark.parametrize(
    ("text", "threat"),
    [
        ("Linf 8/255", ThreatModel("Linf", 8 / 255)),
        ("linf  8 / 255 ", ThreatModel("Linf", 8 / 255)),
        ("L2 0.5", ThreatModel("L2", 0.5)),
        ("l1 12", ThreatModel("L1", 12.0)),
        ("L1 1e1", ThreatModel("L1", 10.0)),
        ("clean", CLEAN),
        (" clean ", CLEAN),
    ],
)
def test_known_spellings(text, threat):
    assert ThreatModel.parse(text) == threat


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Linf",
        "8/255",
        "L3 0.5",
        "Linf eight",
        "Linf 8/0",
        "Linf 8/255 now",
        "Linf 8/255/2",
        "Clean 1",
        None,
        5,
        "L2 nan",
        "L2 inf",
    ],
)
def test_a_wrong_text_is_told_in_one_line_what_is_right(text):
    with pytest.raises(ThreatError) as told:
        ThreatModel.parse(text)
    message = str(told.value)
    assert isinstance(told.value, RequestError)
    assert "\n" not in message
    assert str(text) in message
    assert "Linf 8/255" in message or "expected a finite number of at least 0" in message


@pytest.mark.parametrize("text", ["Linf -8/255", "L2 -0.5", "L1 12/-1"])
def test_eps_below_0_is_refused(text):
    with pytest.raises(ThreatError, match=f'"{text}".*eps: got -.*at least 0'):
        ThreatModel.parse(text)


@pytest.mark.parametrize(
    ("norm", "eps"),
    [("L0", 1.0), ("linf", 1.0), ("L2", -1.0), ("L2", float("nan")), ("L1", float("inf"))],
)
def test_a_wrong_threat_cannot_be_built(norm, eps):
    with pytest.raises(ThreatError, match=r"norm: got|eps: got"):
        ThreatModel(norm, eps)


# norms and projections


@few
@given(**{"norm": st.sampled_from(NORMS), "seed": st.integers(0, 2**31)})
def test_norms_are_those_of_torch(norm, seed):
    delta = far(torch.zeros(5, 3, 4, 4, dtype=torch.float64), seed, 1.0)
    torch.testing.assert_close(norms(delta, norm), length(delta, norm))


@few
@given(problems)
def test_a_projection_is_feasible_and_projecting_again_changes_nothing(given_problem):
    x, z, eps, norm = problem(**given_problem)
    once = project(z, x, eps, norm)
    check_feasible(once, x, eps, norm)
    torch.testing.assert_close(project(once, x, eps, norm), once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [8 / 255, 0.5, 1.0, 12.0])
@pytest.mark.parametrize("content", ["noise", "one colour"])
def test_a_projection_of_whole_images_is_feasible(norm, eps, content):
    """One colour, moved by the same amount everywhere, rounds 3,072 times in the same direction."""
    x = images(3, 8, (3, 32, 32)) if content == "noise" else torch.full((8, 3, 32, 32), 0.7)
    moved = (
        far(x, 3, 0.01)
        if content == "noise"
        else x + 0.01 * far(torch.zeros_like(x), 3, 1.0).sign()
    )
    radius = torch.full((8,), eps)
    check_feasible(project(moved, x, radius, norm), x, radius, norm)


@few
@given(problems)
def test_a_point_inside_stays_where_it_is(given_problem):
    x, z, eps, norm = problem(**given_problem, dtype=torch.float64)
    inside = x + 0.99 * (project(z, x, eps, norm) - x)
    torch.testing.assert_close(project(inside, x, eps, norm), inside, rtol=0, atol=1e-11)


@few
@given(problems)
def test_each_row_is_projected_by_itself(given_problem):
    x, z, eps, norm = problem(**given_problem)
    eps = eps * torch.tensor([1.0, 0.5, 2.0, 0.0])
    whole = project(z, x, eps, norm)
    for row in range(4):
        at = slice(row, row + 1)
        torch.testing.assert_close(
            project(z[at], x[at], eps[at], norm), whole[at], rtol=0, atol=1e-6
        )
    assert torch.equal(whole[3], x[3])


def nearest_in_l1(z, x, eps):
    """Brute force in float64: the shift t of sign(d) clamp(|d| - t, 0, room) is found by halving an interval 200 times."""
    delta = (z - x).flatten(1).double()
    room = torch.where(delta > 0, 1 - x.flatten(1).double(), x.flatten(1).double())

    def at(t):
        return torch.minimum((delta.abs() - t).clamp(min=0), room)

    low, high = torch.zeros(len(x), 1, dtype=torch.float64), delta.abs().amax(1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        over = at(middle).sum(1, keepdim=True) > eps.double().view(-1, 1)
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    t = torch.where(
        at(torch.zeros_like(low)).sum(1, keepdim=True) > eps.double().view(-1, 1), high, 0.0
    )
    return x.double() + (delta.sign() * at(t)).view_as(x)


@settings(max_examples=60, deadline=None)
@given(problems)
def test_the_l1_projection_is_the_nearest_point(given_problem):
    for dtype, atol in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        x, z, eps, _ = problem(**{**given_problem, "norm": "L1"}, dtype=dtype)
        torch.testing.assert_close(
            project(z, x, eps, "L1").double(), nearest_in_l1(z, x, eps), rtol=0, atol=atol
        )


@pytest.mark.parametrize(
    ("x", "delta", "eps", "nearest"),
    [  # worked by hand
        ([0.5, 0.5], [0.4, 0.1], 1.0, [0.4, 0.1]),  # inside
        ([0.5, 0.5], [0.4, -0.1], 0.2, [0.2, 0.0]),  # one pixel takes all
        ([0.5, 0.5], [0.4, -0.3], 0.3, [0.2, -0.1]),  # both shrink by 0.2
        (
            [0.9, 0.0, 0.5],
            [5.0, 0.6, 0.0],
            0.5,
            [0.1, 0.4, 0.0],
        ),  # the first is stopped by the box, the second shrinks alone
        ([0.9, 0.0, 0.5], [5.0, 0.6, 0.0], 0.05, [0.05, 0.0, 0.0]),
        ([1.0, 0.0], [3.0, -3.0], 0.5, [0.0, 0.0]),  # nowhere to go
        ([0.0, 0.0], [3.0, 3.0], 9.0, [1.0, 1.0]),  # the whole box is inside
    ],
)
def test_l1_projections_worked_by_hand(x, delta, eps, nearest):
    x, delta, nearest = (
        torch.tensor([values], dtype=torch.float64) for values in (x, delta, nearest)
    )
    found = project(x + delta, x, torch.tensor([eps], dtype=torch.float64), "L1") - x
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-12)


def test_the_brute_force_itself_is_nearest_among_random_feasible_points():
    x = images(5, 1, (6,), torch.float64)
    z, eps = far(x, 5, 1.0), torch.tensor([0.7], dtype=torch.float64)
    best = (nearest_in_l1(z, x, eps) - z).norm()
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(20_000, 6, generator=generator, dtype=torch.float64)
    near = x + (points - x) * torch.rand(20_000, 1, generator=generator, dtype=torch.float64)
    feasible = near[(near - x).abs().sum(1) <= 0.7]
    assert len(feasible) > 1000
    assert float((feasible - z).norm(dim=1).min()) >= float(best)


@few
@given(problems)
def test_the_linf_projection_is_the_nearest_point(given_problem):
    x, z, eps, _ = problem(**{**given_problem, "norm": "Linf"}, dtype=torch.float64)
    low, high = (x - column(eps, x)).clamp(min=0), (x + column(eps, x)).clamp(max=1)
    torch.testing.assert_close(
        project(z, x, eps, "Linf"), torch.min(torch.max(z, low), high), rtol=0, atol=1e-15
    )


@few
@given(problems)
def test_the_l2_projection_scales_and_then_clamps(given_problem):
    x, z, eps, _ = problem(**{**given_problem, "norm": "L2"}, dtype=torch.float64)
    share = (eps / length(z - x, "L2")).clamp(max=1)
    torch.testing.assert_close(
        project(z, x, eps, "L2"), (x + (z - x) * column(share, x)).clamp(0, 1), rtol=0, atol=1e-9
    )


# random starts


@few
@given(problems)
def test_a_random_start_is_feasible(given_problem):
    x, z, eps, norm = problem(**given_problem)
    check_feasible(random_start(x, z - x, eps, norm), x, eps, norm)


@few
@given(seed=st.integers(0, 2**31), norm=st.sampled_from(["Linf", "L2"]), eps=st.floats(0.01, 0.5))
def test_a_random_start_is_on_the_sphere_where_the_box_does_not_bind(seed, norm, eps):
    x = torch.full((4, 3, 5, 5), 0.5)
    noise = far(torch.zeros_like(x), seed, 1.0)
    start = random_start(x, noise, torch.full((4,), eps), norm)
    torch.testing.assert_close(
        length(start - x, norm), torch.full((4,), eps).double(), rtol=1e-5, atol=1e-6
    )
    along = torch.nn.functional.cosine_similarity((start - x).flatten(1), noise.flatten(1))
    torch.testing.assert_close(along, torch.ones(4), rtol=0, atol=1e-5)


def test_a_random_start_in_the_box_is_the_point_of_the_sphere_clamped():
    x = images(9, 4, (3, 4, 4), torch.float64)
    noise, eps = far(torch.zeros_like(x), 9, 1.0), torch.full((4,), 0.4, dtype=torch.float64)
    for norm in ("Linf", "L2"):
        expected = (x + 0.4 * noise / column(length(noise, norm), x)).clamp(0, 1)
        torch.testing.assert_close(random_start(x, noise, eps, norm), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        random_start(x, noise, eps, "L1"), nearest_in_l1(x + noise, x, eps), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("norm", NORMS)
def test_no_noise_starts_at_x(norm):
    x = images(1, 2, (3, 4, 4))
    assert torch.equal(random_start(x, torch.zeros_like(x), torch.full((2,), 0.5), norm), x)

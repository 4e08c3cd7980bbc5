"""The coefficients that the uniform, grid and line methods try."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.errors import CoefficientError, RequestError
from robustsoup.settings import SearchSettings
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.grid import alpha_name, candidates, corners, grid, grid_size

few = settings(max_examples=30, deadline=None)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (2, 6), (3, 21), (4, 56), (5, 126)])
def test_the_grid_has_every_point_once(n, size):
    alphas = grid(n, 0.2)
    assert len(alphas) == len(set(alphas)) == grid_size(n, 0.2) == size
    for alpha in alphas:
        assert len(alpha) == n
        assert sum(alpha) == pytest.approx(1, abs=1e-12)
        assert all(value in (0, 0.2, 0.4, 0.6, 0.8, 1) for value in alpha)
    assert set(corners(n)) <= set(alphas)


@few
@given(n=st.integers(1, 4), parts=st.integers(1, 10))
def test_the_size_of_a_grid_is_counted_by_stars_and_bars(n, parts):
    alphas = grid(n, 1 / parts)
    assert len(set(alphas)) == math.comb(parts + n - 1, n - 1)
    assert all(round(value * parts) / parts == value for alpha in alphas for value in alpha)
    for alpha in alphas[:5]:
        Coefficients.of(alpha).check(n)


@pytest.mark.parametrize("step", [0, -0.2, 0.3, 0.15, 2, 1.5, math.nan, math.inf])
def test_a_step_that_is_no_fraction_of_1_is_refused(step):
    with pytest.raises(
        CoefficientError, match=f"got n 3 and step {step}, expected n >= 1 and a step such as"
    ):
        grid(3, step)


def test_a_grid_with_too_many_soups_is_refused_at_once():
    with pytest.raises(
        CoefficientError,
        match=r"10 ingredients at step 0\.05 make 10,015,005 soups, expected at most 2,000; take",
    ):
        grid(10, 0.05)
    with pytest.raises(CoefficientError, match="got n 0"):
        grid(0)
    with pytest.raises(CoefficientError, match=r"3 ingredients at step 0\.5 make 6 soups"):
        grid(3, 0.5, max_soups=5)
    assert len(grid(3, 0.5, max_soups=6)) == 6


def test_each_method_lists_its_coefficients():
    assert candidates("uniform", 4) == [(0.25,) * 4]
    assert candidates("line", 2) == [(0, 1), (0.2, 0.8), (0.4, 0.6), (0.6, 0.4), (0.8, 0.2), (1, 0)]
    assert candidates("grid", 3, 0.5) == grid(3, 0.5)
    with pytest.raises(CoefficientError, match="line: got 3 ingredients, expected 2"):
        candidates("line", 3)
    with pytest.raises(CoefficientError, match='got "best"'):
        candidates("best", 3)


def test_coefficients_are_named_by_their_digits():
    assert alpha_name((0.2, 0.4, 0.4)) == "0.2-0.4-0.4"
    assert alpha_name((1 / 3, 2 / 3)) == "0.333333-0.666667"


def corners_only(n, step, max_soups):
    """A soup method of the tests: each ingredient alone, as lists."""
    return [list(alpha) for alpha in corners(n)]


def test_a_function_is_a_method_too():
    assert candidates(corners_only, 3) == corners(3)
    settings = SearchSettings(method=corners_only)
    assert candidates(settings.method, 3) == corners(3)


@pytest.mark.parametrize("row", [torch.tensor([0.5, 0.5]), np.float32([0.5, 0.5]), ["0.5", 0.5]])
def test_rows_of_a_function_become_tuples_of_floats(row):
    assert candidates(lambda *_: [row], 2) == [(0.5, 0.5)]


@pytest.mark.parametrize(
    "row",
    [(1.0, 1.0, -1.0), (1.0, 0.2, 0.0), (1.0,), (0.0, 0.0, 0.0, 1.0), (math.nan, 1.0, 0.0), ()],
)
def test_a_row_that_is_no_mix_is_refused(row):
    with pytest.raises(CoefficientError, match=r'"<lambda>": got the row .* expected 3 co'):
        candidates(lambda *_: [row], 3)


@pytest.mark.parametrize("rows", [None, [0.5, 0.5], [("a", "b")]])
def test_a_method_that_lists_no_rows_is_refused(rows):
    with pytest.raises(CoefficientError, match="expected rows of 2 coefficients: "):
        candidates(lambda *_: rows, 2)


def test_a_method_can_be_named_by_its_module():
    method = SearchSettings(method="robustsoup.soups.grid:uniform").method
    assert candidates(method, 4) == [(0.25,) * 4]
    with pytest.raises(RequestError, match="no_such_module"):
        candidates("no_such_module:corners", 3)


@pytest.mark.parametrize(
    ("method", "need"), [("greedy", "evaluations"), ("learned", "training"), ("dial", "training")]
)
def test_methods_that_need_more_have_no_list(method, need):
    with pytest.raises(CoefficientError, match=f'method "{method}" needs {need}'):
        candidates(method, 3)

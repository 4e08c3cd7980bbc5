"""The model of the map: known functions are reproduced, and its intervals hold."""

import numpy as np
import pytest

from robustsoup.soups.grid import grid
from robustsoup.soups.surrogate import (
    HEIGHTS,
    LENGTHS,
    NOISES,
    Places,
    _fit_at,
    _kernel,
    _Scales,
    calibrate,
    fit_map,
    fit_p_value,
    spread_rows,
    to_logit,
    to_share,
)

MODELS = ("gaussian-process", "quadratic")


def corners_of(alphas):
    return [int(np.argmax(alphas[:, i])) for i in range(alphas.shape[1])]


def quadratic_map(alphas, rng):
    """Return a random polynomial of degree 2 over the simplex, in logits."""
    i, j = np.triu_indices(alphas.shape[1], 1)
    linear = alphas @ rng.normal(0, 0.3, alphas.shape[1])
    return linear + (alphas[:, i] * alphas[:, j]) @ rng.normal(0, 0.3, len(i))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_plane_is_reproduced_from_as_few_soups_as_define_it(model, n):
    alphas = np.array(grid(n, 0.2))
    values = alphas @ np.linspace(-0.4, 0.6, n)
    places = Places.of(alphas)
    rows = [*corners_of(alphas), *spread_rows(places, corners_of(alphas), 2)]
    fitted = fit_map(places, rows, values[rows], model)
    assert np.abs(fitted.predict() - values).max() < 0.01


def test_the_quadratic_is_reproduced_from_enough_soups():
    alphas = np.array(grid(3, 0.2))
    values = quadratic_map(alphas, np.random.default_rng(0))
    places = Places.of(alphas)
    rows = [*corners_of(alphas), *spread_rows(places, corners_of(alphas), 6, "quadratic")]
    for model in MODELS:
        fitted = fit_map(places, rows, values[rows], model)
        assert np.abs(fitted.predict() - values).max() < 0.02


def test_a_covariate_carries_what_the_coefficients_do_not():
    alphas = np.array(grid(3, 0.2))
    bumps = np.random.default_rng(1).normal(0, 0.3, len(alphas))
    rows = [*corners_of(alphas), *spread_rows(Places.of(alphas), corners_of(alphas), 6)]
    values = 0.5 * bumps
    with_it = fit_map(Places.of(alphas, bumps), rows, values[rows]).predict()
    without = fit_map(Places.of(alphas), rows, values[rows]).predict()
    assert np.abs(with_it - values).max() < 0.02 < np.abs(without - values).max()


def test_a_constant_covariate_is_left_out():
    assert Places.of(grid(2, 0.5), np.full(3, 2.0)).covariates.shape == (3, 0)


def test_leave_one_out_residuals_are_those_of_refits_without_the_soup():
    alphas = np.array(grid(3, 0.25))
    rng = np.random.default_rng(2)
    values = quadratic_map(alphas, rng) + rng.normal(0, 0.05, len(alphas))
    places, rows = Places.of(alphas), np.arange(0, 15, 2)
    centred = values[rows] - values[rows].mean()
    scales = _Scales("quadratic", LENGTHS[0], HEIGHTS[2], NOISES[1])
    fit = _fit_at(places, rows, centred, scales)
    gram = _kernel(places, rows, rows, scales) + scales.noise**2 * np.eye(len(rows))
    left_out, kept = gram[0, 1:], gram[1:, 1:]
    predicted = left_out @ np.linalg.solve(kept, centred[1:])
    stated = gram[0, 0] - left_out @ np.linalg.solve(kept, left_out)
    assert fit.residuals[0] == pytest.approx(centred[0] - predicted, abs=1e-6)
    assert fit.stated[0] == pytest.approx(stated, rel=1e-5)


@pytest.mark.parametrize(("n", "added"), [(3, 5), (4, 8)])
def test_intervals_of_smooth_maps_hold(n, added):
    alphas, rng = np.array(grid(n, 0.2)), np.random.default_rng(3)
    corners = corners_of(alphas)
    inside = []
    for _ in range(60):
        truth = quadratic_map(alphas, rng)
        places = Places.of(alphas, rng.normal(0, 0.1, len(alphas)) - truth)
        rows = [*corners, *spread_rows(places, corners, added)]
        fitted = fit_map(places, rows, truth[rows] + rng.normal(0, 0.015, len(rows)))
        error = np.abs(fitted.predict() - truth) / np.sqrt(fitted.variance)
        inside.append((error < 1.96).mean())
    assert np.mean(inside) > 0.93


def test_draws_have_the_stated_variance():
    alphas = np.array(grid(3, 0.2))
    values = quadratic_map(alphas, np.random.default_rng(4))
    rows = [*corners_of(alphas), *spread_rows(Places.of(alphas), corners_of(alphas), 3)]
    fitted = fit_map(Places.of(alphas), rows, values[rows])
    everywhere = np.arange(len(alphas))
    normals = np.random.default_rng(5).standard_normal((4000, len(alphas)))
    variance = fitted.draw(everywhere, normals).var(0)
    large = fitted.variance > fitted.variance.max() / 10
    assert np.abs(variance[large] / fitted.variance[large] - 1).max() < 0.15


def test_predictions_are_linear_in_the_values():
    alphas = np.array(grid(3, 0.25))
    values = quadratic_map(alphas, np.random.default_rng(6))
    rows = list(range(0, 15, 2))
    fitted = fit_map(Places.of(alphas), rows, values[rows])
    shifted = fitted.predict(np.stack([values[rows], values[rows] + 0.3]))
    assert np.allclose(shifted[0], fitted.predict())
    assert np.allclose(shifted[1], fitted.predict() + 0.3)


def test_a_map_with_a_cliff_fails_the_test_of_fit_and_a_smooth_one_passes():
    alphas = np.array(grid(3, 0.2))
    places, corners = Places.of(alphas), corners_of(alphas)
    rows = [*corners, *spread_rows(places, corners, 6)]
    tests = [row for row in range(len(alphas)) if row not in rows][:2]
    smooth = quadratic_map(alphas, np.random.default_rng(7))
    fitted = fit_map(places, rows, smooth[rows])
    assert fit_p_value(fitted, tests, smooth[tests]) > 0.05
    cliff = smooth.copy()
    cliff[tests] -= 1.5
    assert fit_p_value(fitted, tests, cliff[tests]) < 0.001


def test_the_tail_of_the_test_is_that_of_the_f_distribution():
    alphas = np.array(grid(3, 0.2))
    rows = [*corners_of(alphas), 7, 8, 9]
    fitted = fit_map(Places.of(alphas), rows, np.zeros(6))
    tests = [2, 13]
    error = np.sqrt(5.143253 * (fitted.variance[tests] + fitted.noise))  # 95 % of F(2, 6)
    assert fit_p_value(fitted, tests, fitted.predict()[tests] + error) == pytest.approx(0.05, 1e-4)


def test_the_test_of_fit_takes_two_soups():
    fitted = fit_map(Places.of(grid(2, 0.25)), [0, 2, 4], [0.0, 0.1, 0.2])
    with pytest.raises(ValueError, match="got 1 test soups, expected 2"):
        fit_p_value(fitted, [1], [0.0])


def test_the_calibration_widens_where_the_model_is_too_sure():
    assert calibrate(1.0, 10) == 1
    assert calibrate(9.0, 10) > 6
    assert 0 < calibrate(0.0, 4) < 1


def test_spread_rows_are_new_and_stop_with_the_soups():
    places = Places.of(grid(3, 0.5))
    corners = corners_of(places.coefficients)
    assert set(spread_rows(places, corners, 10)) == set(range(6)) - set(corners)


def test_logits_of_counts_are_finite_and_return_to_shares():
    logits = to_logit(np.array([0.0, 50.0, 100.0]), 100)
    assert np.isfinite(logits).all()
    assert to_share(logits)[1] == pytest.approx(0.5)

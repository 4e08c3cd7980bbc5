"""The shape of a loss on a grid, against functions whose shape is known."""

import numpy as np

from robustsoup.reports.convexity import mask_triangle, survey_loss

CORNERS = np.array([[0.0, 0.0], [1.6, 3.0], [4.0, 0.0]])


def grid_surface(function, size=21):
    x, y = np.linspace(-1, 5, size), np.linspace(-1, 4, size)
    return x, y, function(*np.meshgrid(x, y))


def test_a_quadratic_is_convex_with_one_minimum():
    x, y, loss = grid_surface(lambda x, y: 1 + (x - 1.5) ** 2 + 0.5 * (y - 1.5) ** 2 + 0.3 * x * y)
    shape = survey_loss(x, y, loss, CORNERS)
    assert len(shape.minima) == 1
    assert shape.minima[0] == np.unravel_index(loss.argmin(), loss.shape)
    assert (shape.violations, shape.worst) == (0, 0)
    assert shape.triples > 100
    inverted = survey_loss(x, y, -loss, CORNERS)
    assert inverted.minima == ()
    assert inverted.violations == inverted.triples == shape.triples


def test_two_wells_are_two_minima_and_violate_convexity():
    x, y, loss = grid_surface(
        lambda x, y: 2 - np.exp(-3 * ((x - 1) ** 2 + y**2)) - np.exp(-3 * ((x - 3) ** 2 + y**2))
    )
    shape = survey_loss(x, y, loss, CORNERS)
    assert len(shape.minima) == 2
    assert 0 < shape.violations < shape.triples
    assert shape.worst > 0.01


def test_violations_on_a_small_grid_match_a_count_by_hand():
    x = y = np.arange(3.0)
    loss = np.ones((3, 3))
    loss[1, 1] = 1.25
    corners = np.array([[-9.0, -9.0], [20.0, -9.0], [-9.0, 20.0]])
    shape = survey_loss(x, y, loss, corners, margin=0.2)
    assert (shape.triples, shape.violations, shape.worst, shape.minima) == (8, 4, 0.25, ())
    assert survey_loss(x, y, loss, corners, margin=0.25).violations == 0
    assert survey_loss(x, y, -loss, corners).minima == ((1, 1),)
    loss[0, 0] = np.nan
    assert (
        survey_loss(x, y, loss, corners).triples,
        survey_loss(x, y, loss, corners).violations,
    ) == (5, 3)
    assert survey_loss(x, y, -loss, corners).minima == ((1, 1),)
    loss[0, 0] = np.inf
    assert survey_loss(x, y, loss, corners).triples == 5
    assert survey_loss(x[:2], y[:2], loss[:2, :2], corners).minima == ()


def test_only_points_in_the_triangle_count():
    x = y = np.arange(3.0)
    corners = np.array([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    assert mask_triangle(x, y, corners).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
    ]
    assert survey_loss(x, y, np.zeros((3, 3)), corners).triples == 3

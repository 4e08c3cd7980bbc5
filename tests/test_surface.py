"""The shape of a loss on a grid, against functions whose shape is known."""

import numpy as np

from robustsoup.reports.surface import in_triangle, survey

CORNERS = np.array([[0.0, 0.0], [1.6, 3.0], [4.0, 0.0]])


def grid_surface(function, size=21):
    x, y = np.linspace(-1, 5, size), np.linspace(-1, 4, size)
    return x, y, function(*np.meshgrid(x, y))


def test_a_quadratic_is_convex_and_has_one_minimum():
    x, y, loss = grid_surface(lambda x, y: 1 + (x - 1.5) ** 2 + 0.5 * (y - 1.5) ** 2 + 0.3 * x * y)
    found = survey(x, y, loss, CORNERS)
    assert len(found.minima) == 1
    assert found.minima[0] == np.unravel_index(loss.argmin(), loss.shape)
    assert (found.violations, found.worst) == (0, 0)
    assert found.triples > 100
    bowl_upside_down = survey(x, y, -loss, CORNERS)
    assert bowl_upside_down.minima == ()
    assert bowl_upside_down.violations == bowl_upside_down.triples == found.triples


def test_two_wells_are_two_minima_and_bend_against_convexity_between_them():
    x, y, loss = grid_surface(
        lambda x, y: 2 - np.exp(-3 * ((x - 1) ** 2 + y**2)) - np.exp(-3 * ((x - 3) ** 2 + y**2))
    )
    found = survey(x, y, loss, CORNERS)
    assert len(found.minima) == 2
    assert 0 < found.violations < found.triples
    assert found.worst > 0.01


def test_the_violations_are_counted_by_hand_on_a_small_grid():
    x = y = np.arange(3.0)
    loss = np.ones((3, 3))
    loss[1, 1] = 1.25
    corners = np.array([[-9.0, -9.0], [20.0, -9.0], [-9.0, 20.0]])
    found = survey(x, y, loss, corners, margin=0.2)
    assert (found.triples, found.violations, found.worst, found.minima) == (8, 4, 0.25, ())
    assert survey(x, y, loss, corners, margin=0.25).violations == 0
    assert survey(x, y, -loss, corners).minima == ((1, 1),)
    loss[0, 0] = np.nan
    assert (survey(x, y, loss, corners).triples, survey(x, y, loss, corners).violations) == (5, 3)
    assert survey(x, y, -loss, corners).minima == ((1, 1),)
    loss[0, 0] = np.inf
    assert survey(x, y, loss, corners).triples == 5
    assert survey(x[:2], y[:2], loss[:2, :2], corners).minima == ()


def test_only_what_lies_in_the_triangle_counts():
    x = y = np.arange(3.0)
    corners = np.array([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    assert in_triangle(x, y, corners).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
    ]
    assert survey(x, y, np.zeros((3, 3)), corners).triples == 3

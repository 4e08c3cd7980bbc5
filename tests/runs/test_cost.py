"""What the ways to search would take, from one measured rate."""

import pytest
import torch
from tiny_runs import DATA, MODEL, planner_of

from robustsoup.cli.recipe_runs import describe_ways
from robustsoup.runs.context import Context
from robustsoup.runs.cost import WaysToSearch, compare_ways

CONTEXT = Context(DATA, MODEL, torch.device("cpu"))


def ways_of(*changes, step=0.05, screen_steps=10):
    """Return the ways to search a grid of two ingredients; a pass takes a second."""
    grid = {"method": "grid", "step": step}
    changes = [(("soups",), {"grid": grid}), (("evaluate", "screen_steps"), screen_steps), *changes]
    ways = compare_ways(planner_of(changes), CONTEXT, measure=lambda *_: 1.0)
    assert ways is not None
    return ways


def test_a_brief_attack_saves_time_only_beside_a_long_one():
    long = ways_of((("evaluate", "steps"), 100))
    assert long.soups == 21
    assert long.screen < long.grid / 2
    assert long.surrogate < long.grid
    short = ways_of((("evaluate", "steps"), 3))  # the brief attack has 10 steps all the same
    assert short.screen > short.grid
    assert ways_of((("evaluate", "steps"), 3), screen_steps=1).screen < short.screen


def test_the_first_round_of_the_race_is_counted():
    samples = [(("evaluate", "select_samples"), 64), (("evaluate", "steps"), 100)]
    few = ways_of(*samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustsoup.soups.racing.ROUND", 32)
        many = ways_of(*samples)
    assert few.grid == many.grid
    assert few.screen < many.screen < few.grid


def test_a_way_that_takes_as_long_as_the_grid_saves_nothing():
    ways = WaysToSearch(soups=21, grid=60.0, screen=20.0, surrogate=40.0)
    assert describe_ways(ways) == "21 soups: about 60 s; --screen: 20 s; --method surrogate: 40 s"
    ways = WaysToSearch(soups=21, grid=60.0, screen=61.0, surrogate=60.0)
    line = "21 soups: about 60 s; --screen: saves nothing here; "
    assert describe_ways(ways) == f"{line}--method surrogate: saves nothing here"

"""Soups of tables with a time limit: evaluated one by one, and left out if the time is over.

A soup is left out because of the clock alone, before any attack on it, so no verdict of another
depends on it. Surrogates have their own way (`robustsoup.runs.surrogates`): they predict the soups
that they did not attack.
"""

from collections.abc import Callable

from robustsoup.recipes import Recipe
from robustsoup.runs.plan import Plan, PlannedRow
from robustsoup.runs.planner import Planner
from robustsoup.soups.grid import spread_order
from robustsoup.soups.time_limit import TimeLimit


def limited_tables(recipe: Recipe) -> list[str]:
    """Return the names of the tables with a time limit that leaves soups out."""
    return [
        name
        for name, soup in recipe.soups.items()
        if soup["time_limit"] is not None and soup.method != "surrogate"
    ]


def _limited_rows(plan: Plan) -> list[PlannedRow]:
    """Return the soups that a time limit may leave out, in the order of their evaluation.

    Tables follow in the order of the recipe; within a grid, each soup is far from those before it.
    """
    rows: list[PlannedRow] = []
    for name in limited_tables(plan.recipe):
        section = [row for row in plan.rows if row.soup == name]
        alphas = [row.coefficients or () for row in section]
        order = spread_order(alphas) if all(alphas) else range(len(section))
        rows += [section[position] for position in order]
    return rows


def without_limited_rows(plan: Plan) -> Plan:
    """Return the part of a plan that runs whatever the time limits say."""
    limited = limited_tables(plan.recipe)
    return plan.part([row for row in plan.rows if row.soup not in limited])


def evaluate_in_time(planner: Planner, execute: Callable[[Plan], None], *, started: float) -> int:
    """Evaluate the soups of tables with a time limit, and leave out the rest of the plan.

    The first soup of the run is evaluated whatever the limit.

    Args:
        planner: The planner; the other soups are evaluated.
        execute: Runs the missing steps of a part of the plan.
        started: Start of the run on the clock of `TimeLimit`.

    Returns:
        How many soups were left out.
    """
    plan = planner.plan
    tables = limited_tables(plan.recipe)
    evaluated = any(row.soup is not None and row.soup not in tables for row in plan.rows)
    limits = {
        name: TimeLimit(soup["time_limit"], started) for name, soup in plan.recipe.soups.items()
    }
    late: list[PlannedRow] = []
    for row in _limited_rows(plan):
        limit = limits[str(row.soup)]
        if not limit.begin_soup() and evaluated:
            late.append(row)
            continue
        if row.dial is not None:  # learned once; the positions take less time
            execute(plan.part(keys=[row.dial]))
            limit.begin_soup()
        execute(plan.part([plan.row(row.name)]))
        limit.end_soup()
        evaluated = True
    if late:
        plan.leave_out(row.name for row in late)
    return len(late)


def tightest_limit(plan: Plan, *, started: float) -> TimeLimit:
    """Return the shortest time limit of a recipe, for what all tables share."""
    limits = [TimeLimit(soup["time_limit"], started) for soup in plan.recipe.soups.values()]
    return min(limits, key=lambda limit: float("inf") if limit.seconds is None else limit.seconds)

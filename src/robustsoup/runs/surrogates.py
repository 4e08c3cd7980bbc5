"""Search by surrogate in a run: the soups that the engine names become rows and steps."""

from collections.abc import Callable
from dataclasses import replace

import torch

from robustsoup.evaluation.hit_tables import Hits
from robustsoup.evaluation.verdicts import CLEAN_KEY
from robustsoup.runs.planner import Planner
from robustsoup.runs.soup_rows import plan_grid_soup
from robustsoup.runs.store import Store
from robustsoup.runs.surrogate_results import SurrogateResult
from robustsoup.runs.worker import load_evaluation, load_hits
from robustsoup.soups.confirmation import part_rows
from robustsoup.soups.goal import Goal
from robustsoup.soups.surrogate_search import (
    SurrogateSearch,
    choose_part,
    hits_by_name,
    make_search,
    requests_in_time,
)
from robustsoup.soups.time_limit import TimeLimit


def search_by_surrogate(
    planner: Planner, store: Store, section: str, execute: Callable[[], None], *, started: float
) -> SurrogateResult:
    """Attack the soups that the surrogate of a section names, until its answer is settled.

    Args:
        planner: The planner; the clean verdicts and the first soups of the section are finished.
        store: Finished steps.
        section: The section of the recipe.
        execute: Runs the missing steps of the plan.
        started: Start of the run on the clock of `time.monotonic`, for the time limit.

    Returns:
        What was attacked, how sure the answer is, and the prediction for every soup.
    """
    search = _make_engine(planner, store, section)
    limit = TimeLimit(planner.recipe.soups[section]["time_limit"], started)
    attacked = _load_hits(planner, store, search)
    while True:
        requests, late = requests_in_time(search, attacked, limit)
        if not requests:
            break
        for request in requests:
            row = plan_grid_soup(planner, section, request.candidate)
            planner.add_evaluated_row(replace(row, request=request))
        execute()
        limit.end_soup()
        attacked = _load_hits(planner, store, search)
    return SurrogateResult.of(section, search, attacked, late=late)


def _make_engine(planner: Planner, store: Store, section: str) -> SurrogateSearch:
    recipe = planner.recipe
    soup = recipe.soups[section]
    goal = recipe.goal or Goal()
    table = load_hits(store, planner.plan.surrogates[section])
    settings = planner.selecting_settings()
    steering = part_rows(torch.from_numpy(table.ids), settings.part, seed=settings.attack.seed)
    return make_search(
        recipe.soup_names(section),
        recipe.alphas_of(soup),
        table.hits[CLEAN_KEY][:, steering.numpy()],
        goal if goal.maximise else replace(goal, maximise=recipe.default_measure),
        part=choose_part(
            torch.from_numpy(table.ids)[steering], settings.attack, shift=settings.shift is not None
        ),
        step=soup["step"],
        tolerance=soup["tolerance"],
        seed=recipe.seed,
    )


def _load_hits(
    planner: Planner, store: Store, search: SurrogateSearch
) -> dict[str, dict[str, Hits]]:
    """Return the verdicts of the attacked soups, by name and measure."""
    rows = {row.name: row.val for row in planner.plan.rows if row.val is not None}
    names = [name for name in search.names if name in rows]
    return hits_by_name({name: load_evaluation(store, rows[name]) for name in names})

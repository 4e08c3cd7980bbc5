"""Search by surrogate in a run: the soups that the engine names become rows and steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from robustsoup.evaluation.hit_tables import Hits
from robustsoup.evaluation.verdicts import CLEAN_KEY
from robustsoup.runs.planner import Planner
from robustsoup.runs.soup_rows import plan_grid_soup
from robustsoup.runs.store import Store
from robustsoup.runs.surrogate_results import SurrogateResult
from robustsoup.runs.worker import load_evaluation, load_hits
from robustsoup.settings import parse_duration
from robustsoup.soups.selection import Goal
from robustsoup.soups.surrogate_search import SurrogateSearch, make_search


@dataclass
class Clock:
    """Decides whether the time limit of a search allows for one more soup.

    Attributes:
        limit: Seconds from `started`; None for no limit.
        started: Start of the search on the clock of `time.monotonic`.
        longest: The longest time that the attack on one soup took.
    """

    limit: float | None
    started: float
    longest: float = 0.0

    def allows_another(self) -> bool:
        """Return whether another soup would be attacked before the limit."""
        if self.limit is None:
            return True
        return time.monotonic() - self.started + self.longest <= self.limit


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
    limit = planner.recipe.soups[section]["time_limit"]
    clock = Clock(None if limit is None else parse_duration(limit), started)
    attacked = _load_hits(planner, store, search)
    late = False
    while names := search.next_soups(attacked):  # with a limit, one at a time
        late = not clock.allows_another()
        if late:
            break
        began = time.monotonic()
        for name in names if limit is None else names[:1]:
            planner.add_evaluated_row(plan_grid_soup(planner, section, name))
        execute()
        clock.longest = max(clock.longest, (time.monotonic() - began))
        attacked = _load_hits(planner, store, search)
    return SurrogateResult.of(section, search, attacked, late=late)


def _make_engine(planner: Planner, store: Store, section: str) -> SurrogateSearch:
    recipe = planner.recipe
    soup = recipe.soups[section]
    goal = recipe.goal or Goal()
    return make_search(
        recipe.soup_names(section),
        recipe.alphas_of(soup),
        load_hits(store, planner.plan.surrogates[section]).hits[CLEAN_KEY],
        goal if goal.maximise else replace(goal, maximise=recipe.default_measure),
        step=soup["step"],
        tolerance=soup["tolerance"],
        seed=recipe.seed,
    )


def _load_hits(
    planner: Planner, store: Store, search: SurrogateSearch
) -> dict[str, dict[str, Hits]]:
    """Return the verdicts of the attacked soups, by name and measure."""
    rows = {row.name: row.val for row in planner.plan.rows if row.val is not None}
    return {
        name: {key: hits.numpy() for key, hits in load_evaluation(store, rows[name]).hits().items()}
        for name in search.names
        if name in rows
    }

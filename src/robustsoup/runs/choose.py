"""Select a soup by the stored evaluations, and confirm screened soups first."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from robustsoup.runs.plan import Plan
from robustsoup.runs.planner import Planner
from robustsoup.runs.store import Store
from robustsoup.runs.worker import load_evaluation
from robustsoup.soups.selection import Candidate, Selection, select

if TYPE_CHECKING:
    from robustsoup.evaluation.verdicts import Evaluation
    from robustsoup.soups.screening import EvaluationRequest


def confirm_screened_soups(planner: Planner, store: Store, execute: Callable[[], None]) -> None:
    """Add the full evaluations of screened soups that can still win to the plan, and run them.

    Args:
        planner: The planner; its first evaluations are finished.
        store: Finished steps.
        execute: Runs the missing steps of the plan.
    """
    screening = planner.screening()
    results: dict[EvaluationRequest, Evaluation] = {}
    batch = screening.first_requests()
    while batch:
        for request in batch:
            results[request] = load_evaluation(store, planner.add_request(request))
        batch = screening.next_requests(results)
        for request in batch:
            planner.add_confirmation(request)
        if batch:
            execute()


def soup_candidates(plan: Plan, store: Store) -> list[Candidate]:
    """Return the soups of a plan with their evaluations on the split that selects."""
    return [
        Candidate(row.name, row.coefficients or (), load_evaluation(store, row.val))
        for row in plan.rows
        if row.soup is not None and row.val is not None
    ]


def select_soup(plan: Plan, store: Store) -> Selection | None:
    """Select a soup by the goal of the recipe; None without a goal or without soups."""
    goal, candidates = plan.recipe.goal, soup_candidates(plan, store)
    if goal is None or goal.maximise is None or not candidates:
        return None
    return select(candidates, maximise=goal.maximise, require=goal.require, point=goal.point)

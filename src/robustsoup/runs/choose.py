"""Select a soup by the stored evaluations, explain it, and confirm screened soups first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import Leakage, stopped_early_on
from robustsoup.evaluation.simultaneous import Hits
from robustsoup.evaluation.verdicts import CLEAN_KEY, Evaluation
from robustsoup.runs.plan import Plan, PlannedRow
from robustsoup.runs.planner import Planner
from robustsoup.runs.store import Store
from robustsoup.runs.tasks import LearnCoefficients
from robustsoup.runs.worker import CHECKPOINT, COEFFICIENTS, load_evaluation, load_hits, load_shares
from robustsoup.soups.answer import Answer
from robustsoup.soups.coefficients import load_coefficients
from robustsoup.soups.confirmation import confirm_finalists, judge_unattacked, order_finalists
from robustsoup.soups.explanation import (
    Explained,
    describe_gaps,
    describe_soup,
    explain,
    with_test,
)
from robustsoup.soups.goal import Goal
from robustsoup.soups.learned_search import LEARNING
from robustsoup.soups.selection import Candidate, Selection, prefer_confirmed, select
from robustsoup.soups.time_limit import Late, TimeLimit

if TYPE_CHECKING:
    from robustsoup.soups.screening import EvaluationRequest


def confirm_screened_soups(
    planner: Planner, store: Store, execute: Callable[[], None], limit: TimeLimit
) -> int:
    """Add the full evaluations of screened soups that can still win to the plan, and run them.

    Args:
        planner: The planner; its first evaluations are finished.
        store: Finished steps.
        execute: Runs the missing steps of the plan.
        limit: Time after which no further evaluation is added.

    Returns:
        How many soups could still win when the time was over.
    """
    screening, threats = planner.screening(), planner.recipe.evaluate.threats
    results: dict[EvaluationRequest, Evaluation] = {}
    batch = screening.first_requests()
    while batch:
        for request in batch:
            results[request] = load_evaluation(store, planner.add_request(request), threats)
        batch = screening.next_requests(results)
        if batch and not limit.begin_soup():
            return len(screening.pending(results))
        for request in batch:
            planner.add_full_evaluation(request)
        if batch:
            execute()
            limit.end_soup()
    return 0


def soup_candidates(plan: Plan, store: Store) -> list[Candidate]:
    """Return the soups of a plan with their evaluations on the split that selects."""
    threats = plan.recipe.evaluate.threats
    return [
        _make_candidate(plan, store, row, load_evaluation(store, key, threats))
        for row in plan.rows
        if row.soup is not None and (key := plan.selecting_evaluation(row)) is not None
    ]


def _make_candidate(plan: Plan, store: Store, row: PlannedRow, evaluation: Evaluation) -> Candidate:
    shares = load_shares(store, row) or ()
    ingredient = plan.find_equal_ingredient(row, shares)
    learning = plan.steps_by_key[row.learned].task if row.learned else None
    description = describe_soup(
        shares,
        row.ingredients or (),
        ingredient=ingredient,
        method=row.role,
        at=row.at,
        threats=learning.settings.threats if isinstance(learning, LearnCoefficients) else (),
        objective=row.objective,
        merged_by=plan.recipe.soups[row.soup].method if row.role == "merge" and row.soup else None,
    )
    return Candidate(row.name, shares, evaluation, description, ingredient)


@dataclass(frozen=True)
class Choice:
    """A selection, and what explains it.

    Attributes:
        selection: The choice, on the samples that select or confirm.
        ingredients: Evaluations of the ingredients on the same samples, by name.
        confirmed: Whether these samples did not steer the search.
    """

    selection: Selection
    ingredients: Mapping[str, Evaluation]
    confirmed: bool = False


def choose_soup(planner: Planner, store: Store, execute: Callable[[], None]) -> Choice | None:
    """Choose a soup by the goal of the recipe; None without a goal or without soups.

    Args:
        planner: The planner; the search is finished.
        store: Finished steps.
        execute: Runs the missing steps of the plan.
    """
    plan = planner.plan
    goal, candidates = plan.recipe.goal, soup_candidates(plan, store)
    if goal is None or goal.maximise is None or not candidates:
        return None
    if plan.recipe.confirms:
        return _choose_among_finalists(planner, store, execute, goal)
    selection = select(
        candidates,
        maximise=goal.maximise,
        require=goal.require,
        point=goal.point,
        seed=_statistics_seed(plan),
        looked_at=_find_looked_at(plan, store),
        dropped=_count_dropped(plan, store),
    )
    threats = plan.recipe.evaluate.threats
    ingredients = {
        row.name: load_evaluation(store, row.val, threats)
        for row in plan.ingredient_rows
        if row.val is not None
    }
    return Choice(selection, ingredients)


def _choose_among_finalists(
    planner: Planner, store: Store, execute: Callable[[], None], goal: Goal
) -> Choice:
    """Evaluate all soups without an attack and a few finalists on the confirm part, and choose."""
    plan = planner.plan
    soups = [row for row in plan.rows if row.soup is not None]
    clean_keys = {row.name: planner.add_clean_evaluation(row) for row in soups}
    execute()
    clean = judge_unattacked(
        [
            _make_candidate(plan, store, row, load_evaluation(store, clean_keys[row.name]))
            for row in soups
        ],
        goal,
        seed=_statistics_seed(plan),
        looked_at=_find_looked_at(plan, store),
    )
    samples = planner.confirming_settings().count_samples(planner.data)
    tried = prefer_confirmed(soup_candidates(plan, store))
    ordered = order_finalists(tried, goal, clean, confirm_samples=samples)
    rows = [*(plan.row(item.name) for item in ordered), *plan.ingredient_rows]
    keys = {row.name: planner.add_confirmation_of(row) for row in rows}
    execute()
    threats = plan.recipe.evaluate.threats
    evaluations = {name: load_evaluation(store, key, threats) for name, key in keys.items()}
    finalists = [replace(item, evaluation=evaluations[item.name]) for item in ordered]
    ingredients = {row.name: evaluations[row.name] for row in plan.ingredient_rows}
    return Choice(confirm_finalists(finalists, goal, clean), ingredients, confirmed=True)


def _find_looked_at(plan: Plan, store: Store) -> Hits | None:
    """Return the clean hits (n, k) of the soups that surrogates measured but did not attack."""
    columns = [
        hits
        for section, key in plan.surrogates.items()
        for name, hits in zip(
            plan.recipe.soup_names(section), load_hits(store, key).hits[CLEAN_KEY], strict=True
        )
        if name not in plan.rows_by_name
    ]
    return np.stack(columns, axis=1) if columns else None


def _count_dropped(plan: Plan, store: Store) -> int:
    """Return the number of soups that greedy searches evaluated and did not choose."""
    built = [row.learned for row in plan.rows if row.role == "greedy" and row.learned]
    records = (load_coefficients(store.file(key, COEFFICIENTS)).record for key in built)
    return sum(len(record["greedy"]["tried"]) - 1 for record in records)


def _statistics_seed(plan: Plan) -> int:
    """Return the seed of the bounds, which is that of the attack and of the confirm part."""
    return plan.recipe.evaluate.attack_settings(seed=plan.recipe.seed).seed


def explain_choice(
    planner: Planner, store: Store, choice: Choice, leakage: Leakage, late: Late
) -> Answer:
    """Explain a choice, with what the split says that reports, if it is another one.

    Args:
        planner: The planner; the row of the chosen soup is evaluated.
        store: Finished steps.
        choice: The choice.
        leakage: Whether networks were trained on samples that evaluate them.
        late: What a time limit left out.
    """
    plan = planner.plan
    context = Explained(
        ingredients=choice.ingredients,
        seed=_statistics_seed(plan),
        selected_on=plan.recipe.select_on,
        fresh_split=f"a part of {plan.recipe.select_on} kept aside" if choice.confirmed else None,
        leaves_out=tuple(_list_gaps(planner, store, leakage, confirmed=choice.confirmed)),
        late=late,
    )
    answer = explain(choice.selection, context)
    row = plan.row(answer.chosen)
    if row.test is None or row.test == plan.selecting_evaluation(row):
        return answer
    return with_test(answer, load_evaluation(store, row.test), split=plan.recipe.evaluate.report_on)


def _list_gaps(
    planner: Planner, store: Store, leakage: Leakage, *, confirmed: bool
) -> Iterator[str]:
    """Yield what the guarantee leaves out."""
    plan, split = planner.plan, planner.data.split(planner.recipe.select_on)
    soups, goal = plan.recipe.soups, plan.recipe.goal
    steered = bool(plan.surrogates) and goal is not None and goal.requires_attacked
    # Other samples decide than those that built a greedy soup or stopped learning.
    holds = confirmed and goal is not None and not goal.requires_unattacked
    yield from describe_gaps(
        split.name,
        stopped=[
            row.name
            for row in plan.ingredient_rows
            if stopped_early_on(_open_ingredient(plan, store, row), split)
        ],
        learned=[
            name
            for name, soup in soups.items()
            if soup.method in LEARNING and soup["early_stop"] and not holds
        ],
        greedy=[name for name, soup in soups.items() if soup.method == "greedy" and not holds],
        separate=confirmed and not holds,
        screened=(plan.recipe.evaluate.screens or steered) and not confirmed,
        fresh=leakage.status == "known",
    )


def _open_ingredient(plan: Plan, store: Store, row: PlannedRow) -> Checkpoint:
    checkpoint = plan.files.get(row.network)
    return checkpoint or Checkpoint.open(store.file(row.network, CHECKPOINT))

"""Plan the soups of a recipe: one function for each method."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Data
from robustsoup.models import NetworkSettings
from robustsoup.recipes import Recipe, Soup
from robustsoup.runs.plan import PlannedRow
from robustsoup.runs.planner import Planner
from robustsoup.runs.results import ROLES
from robustsoup.runs.tasks import (
    BuildGreedySoup,
    Key,
    LearnCoefficients,
    MergeSoup,
    MixSoup,
    stopping_split,
)
from robustsoup.soups.grid import Alpha
from robustsoup.soups.learned_search import threat_slug
from robustsoup.soups.screening import EvaluationRequest
from robustsoup.soups.surrogate_search import count_part, first_requests
from robustsoup.threats import CLEAN, ThreatModel


def plan_recipe(
    recipe: Recipe,
    data: Data,
    network: NetworkSettings,
    precision: str,
    part_samples: int | None = None,
    *,
    stand_ins: Mapping[str, Checkpoint] | None = None,
) -> Planner:
    """Plan all steps of a recipe that depend on no result.

    Args:
        recipe: The recipe.
        data: Its data.
        network: How the network is built.
        precision: Arithmetic of training on this device.
        part_samples: Samples of the parts that evaluations are divided into; see `Planner`.
        stand_ins: Checkpoints in place of those that the recipe names; see `Planner`.

    Returns:
        The planner, which can extend its plan.

    Raises:
        CheckpointError: A checkpoint cannot be used.
        DataError: Generated images cannot be used, or a split has fewer samples than the recipe
            evaluates.
    """
    planner = Planner(recipe, data, network, precision, part_samples, stand_ins=stand_ins)
    planner.add_base()
    for name in recipe.ingredients:
        planner.add_ingredient(name)
    for section, soup in recipe.soups.items():
        default = plan_merged_soups if soup.merges else plan_mixed_soups
        plan_soups = SOUP_PLANNERS.get(soup.method, default)
        for row in plan_soups(planner, section, soup):
            planner.add_row(row)
    planner.add_evaluations()
    for name, plane in recipe.planes.items():
        planner.add_plane(name, plane)
    return planner


def plan_mixed_soups(planner: Planner, section: str, soup: Soup) -> list[PlannedRow]:
    """Plan the soups of a method that lists coefficients; custom methods get the role "grid"."""
    recipe = planner.recipe
    pairs = zip(recipe.soup_names(section), recipe.alphas_of(soup), strict=True)
    return [_plan_mixed_soup(planner, section, name, alpha) for name, alpha in pairs]


def _plan_mixed_soup(planner: Planner, section: str, name: str, alpha: Alpha) -> PlannedRow:
    soup = planner.recipe.soups[section]
    ingredients, mixing = planner.ingredient_keys(soup), planner.mixing_of(soup)
    if mixing.policy == "average" and 1.0 in alpha:
        network = ingredients[alpha.index(1.0)]  # equals the soup bit for bit
    else:
        network = planner.add_step(name, MixSoup(ingredients, mixing, alpha))
    return PlannedRow(
        name=name,
        role=soup.method if soup.method in ROLES else "grid",
        network=network,
        soup=section,
        ingredients=planner.recipe.ingredients_of(soup),
        coefficients=alpha,
    )


def plan_surrogate(planner: Planner, section: str, soup: Soup) -> list[PlannedRow]:
    """Plan the clean verdicts of all soups, and the soups that are attacked before any result.

    With a time limit, these are the ingredients alone.
    """
    planner.plan.surrogates[section] = planner.add_clean_verdicts(section, soup)
    requests = first_surrogate_requests(planner, section)
    if soup["time_limit"] is not None:
        requests = requests[: len(planner.recipe.ingredients_of(soup))]
    rows = [(plan_grid_soup(planner, section, item.candidate), item) for item in requests]
    return [replace(row, request=item) for row, item in rows]


def first_surrogate_requests(planner: Planner, section: str) -> tuple[EvaluationRequest, ...]:
    """Return what a surrogate attacks first."""
    recipe, settings = planner.recipe, planner.selecting_settings()
    names, alphas = recipe.soup_names(section), recipe.alphas_of(recipe.soups[section])
    samples = settings.count_samples(planner.data)
    part = count_part(samples, settings.attack, shift=settings.shift is not None)
    return first_requests(names, alphas, part, seed=recipe.seed)


def plan_grid_soup(planner: Planner, section: str, name: str) -> PlannedRow:
    """Plan one soup of a section whose method lists coefficients."""
    recipe, soup = planner.recipe, planner.recipe.soups[section]
    alpha = recipe.alphas_of(soup)[recipe.soup_names(section).index(name)]
    return _plan_mixed_soup(planner, section, name, alpha)


def plan_merged_soups(planner: Planner, section: str, soup: Soup) -> list[PlannedRow]:
    """Plan the soups of a merging method: one for each threat it measures under, and weights."""
    recipe, ingredients = planner.recipe, planner.ingredient_keys(soup)
    measures = soup.requires("threat")
    threats = recipe.threats_of(soup) if measures else (CLEAN,)
    base = planner.merging_base(soup) if soup.requires("base") else None
    pairs = itertools.product(threats, recipe.alphas_of(soup))
    rows: list[PlannedRow] = []
    for name, (threat, weights) in zip(recipe.soup_names(section), pairs, strict=True):
        task = MergeSoup(
            soup.method,
            soup.merge_settings(),
            ingredients,
            weights,
            planner.mixing_of(soup),
            base,
            threat,
            soup["attack_steps"],
            soup.seed_or(recipe.seed),
            planner.precision if measures else "float32",
            recipe.fits_on_val,
        )
        rows.append(
            PlannedRow(
                name=name,
                role="merge",
                network=planner.add_step(name, task),
                soup=section,
                ingredients=recipe.ingredients_of(soup),
                coefficients=weights,
                threat=str(threat) if measures else None,
            )
        )
    return rows


def plan_learned_soups(planner: Planner, section: str, soup: Soup) -> list[PlannedRow]:
    """Plan a learned soup for each threat and objective."""
    recipe, ingredients = planner.recipe, planner.ingredient_keys(soup)
    mixing = planner.mixing_of(soup)
    rows: list[PlannedRow] = []
    pairs = itertools.product(recipe.threats_of(soup), soup.objectives)
    for name, (threat, objective) in zip(recipe.soup_names(section), pairs, strict=True):
        learned = _add_learning(planner, name, soup, threat, objective)
        rows.append(
            PlannedRow(
                name=name,
                role="learned",
                network=planner.add_step(name, MixSoup(ingredients, mixing, coefficients=learned)),
                soup=section,
                ingredients=recipe.ingredients_of(soup),
                learned=learned,
                threat=str(threat),
                objective=objective,
            )
        )
    return rows


def plan_dials(planner: Planner, section: str, soup: Soup) -> list[PlannedRow]:
    """Plan a dial for each threat, and a soup for each position."""
    recipe, ingredients = planner.recipe, planner.ingredient_keys(soup)
    mixing = planner.mixing_of(soup)
    rows: list[PlannedRow] = []
    names = iter(recipe.soup_names(section))
    for threat in recipe.threats_of(soup):
        dial = _add_learning(planner, f"{section} {threat}", soup, threat, "ce")
        for t in soup.at:
            name = next(names)
            network = planner.add_step(name, MixSoup(ingredients, mixing, coefficients=dial, at=t))
            rows.append(
                PlannedRow(
                    name=name,
                    role="dial",
                    network=network,
                    soup=section,
                    ingredients=recipe.ingredients_of(soup),
                    learned=network,
                    threat=str(threat),
                    at=t,
                    dial=dial,
                )
            )
    return rows


def plan_greedy_soup(planner: Planner, section: str, soup: Soup) -> list[PlannedRow]:
    """Plan the greedy soup of a section."""
    recipe, ingredients = planner.recipe, planner.ingredient_keys(soup)
    names, settings = recipe.ingredients_of(soup), planner.selecting_settings()
    mixing = planner.mixing_of(soup)
    evaluations: tuple[Key, ...] = ()
    if mixing.policy == "average":  # with other policies a one-hot soup differs from its ingredient
        evaluations = tuple(
            planner.add_evaluation(name, key, settings)
            for name, key in zip(names, ingredients, strict=True)
        )
    task = BuildGreedySoup(recipe.score_of(soup), ingredients, evaluations, mixing, settings)
    coefficients = planner.add_step(section, task)
    network = planner.add_step(section, MixSoup(ingredients, mixing, coefficients=coefficients))
    return [
        PlannedRow(
            name=section,
            role="greedy",
            network=network,
            soup=section,
            ingredients=names,
            learned=coefficients,
        )
    ]


SOUP_PLANNERS: Mapping[str, Callable[[Planner, str, Soup], list[PlannedRow]]] = {
    "surrogate": plan_surrogate,
    "greedy": plan_greedy_soup,
    "learned": plan_learned_soups,
    "dial": plan_dials,
}
"""Planners of the methods in `SOUP_METHODS` that need evaluations or training."""


def dial_file(row: PlannedRow) -> str:
    """Return the name of a dial's file in the run folder."""
    threat = threat_slug(ThreatModel.parse(row.threat or "clean"))
    return f"{row.soup}-{threat}.dial.safetensors"


def _add_learning(
    planner: Planner, name: str, soup: Soup, threat: ThreatModel, objective: str
) -> Key:
    recipe, ingredients = planner.recipe, planner.ingredient_keys(soup)
    settings = soup.learn_settings(threat, objective, seed=recipe.seed, precision=planner.precision)
    stops_on = None if settings.early_stop is None else planner.steering_part()
    stopping_split(settings.early_stop, stops_on, planner.data)  # DataError if there are too few
    task = LearnCoefficients(
        settings,
        ingredients,
        base=planner.base_key(ingredients) if settings.buffers == "base" else None,
        fits_on_val=recipe.fits_on_val and settings.early_stop is None,
        stops_on=stops_on,
    )
    return planner.add_step(name, task)

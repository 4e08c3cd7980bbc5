"""Coverage by simulation: the guarantee holds in at least 95 % of searches.

`make simulations` runs the whole table and prints it; docs/explanation/verdicts.md quotes it. The
default suite runs a small part of it.
"""

import numpy as np
import pytest
from simulated_searches import (
    BARELY,
    Population,
    layout,
    limit,
    list_cells,
    simulate_confirmation,
    simulate_gains,
    simulate_requirement,
)

THRESHOLD = 0.85


def show(capsys, text):
    """Print a line of the table past pytest's capture."""
    with capsys.disabled():
        print(f"\n{text}", end="")  # noqa: T201


# a part of the table


@pytest.mark.parametrize(
    ("shape", "correlation", "threshold"),
    [("flat", 0.0, 0.85), ("flat", 0.9, 0.5), ("crowded", 0.5, 0.85)],
)
def test_statements_are_wrong_in_at_most_one_search_in_twenty(shape, correlation, threshold):
    population = Population.equicorrelated(layout(shape, threshold, 8), correlation)
    outcome = simulate_requirement(population, threshold, 500, simulations=1000, draws=1000)
    assert outcome.wrong <= limit(1000)
    assert outcome.alone > outcome.wrong  # what candidates on their own would say


def test_few_expected_misses_are_tested_exactly():
    population = Population.equicorrelated([0.97 - BARELY] * 8, 0.5)
    outcome = simulate_requirement(population, 0.97, 500, simulations=500)
    assert outcome.wrong <= limit(500)


def test_differences_lie_in_all_their_intervals_in_nineteen_searches_of_twenty():
    population = Population.equicorrelated([0.5, 0.45, *[0.5] * 5], 0.9)
    assert simulate_gains(population, 500, simulations=500, draws=1000) <= limit(500)


def test_finalists_on_samples_kept_aside_are_wrong_in_at_most_one_search_in_twenty():
    population = Population.equicorrelated(layout("crowded", 0.45, 9), 0.9)
    wrong, answered = simulate_confirmation(population, 0.45, 900, simulations=300)
    assert wrong <= limit(300)
    population = Population.equicorrelated(np.linspace(0.3, 0.6, 9), 0.9)
    wrong, answered = simulate_confirmation(population, 0.45, 1500, simulations=100)
    assert wrong <= limit(100)
    assert answered > 0.9


def test_with_enough_samples_what_is_true_is_shown():
    population = Population.equicorrelated([0.8, 0.9, 0.9], 0.5)
    outcome = simulate_requirement(population, THRESHOLD, 3000, simulations=100, draws=1000)
    assert outcome.power > 0.99
    assert outcome.wrong == 0


# the whole table


@pytest.mark.simulations
@pytest.mark.parametrize(("shape", "correlation", "n"), list_cells())
def test_one_requirement(capsys, shape, correlation, n):
    population = Population.equicorrelated(layout(shape, THRESHOLD), correlation)
    outcome = simulate_requirement(population, THRESHOLD, n)
    show(
        capsys,
        f"| {shape} | {correlation:g} | {n:,} | {outcome.wrong:.1%} | {outcome.overstated:.1%} "
        f"| {outcome.alone:.1%} | {outcome.power:.1%} |",
    )
    assert outcome.wrong <= limit(2000)


@pytest.mark.simulations
@pytest.mark.parametrize(("threshold", "n"), [(0.3, 500), (0.5, 500), (0.95, 500), (0.97, 500)])
def test_other_thresholds(capsys, threshold, n):
    population = Population.equicorrelated(layout("flat", threshold), 0.9)
    outcome = simulate_requirement(population, threshold, n)
    show(capsys, f"| flat, threshold {threshold:g} | 0.9 | {n:,} | {outcome.wrong:.1%} |")
    assert outcome.wrong <= limit(2000)


@pytest.mark.simulations
@pytest.mark.parametrize(("ingredients", "step", "n"), [(3, 0.05, 1000), (4, 0.2, 2000)])
def test_the_clean_accuracy_of_a_fine_grid(capsys, ingredients, step, n):
    population = Population.soups(ingredients, step, THRESHOLD - BARELY)
    outcome = simulate_requirement(population, THRESHOLD, n)
    k = len(population.shares)
    show(
        capsys,
        f"| fine grid of {k} soups | {n:,} | {outcome.wrong:.1%} | {outcome.alone:.1%} |",
    )
    assert outcome.wrong <= limit(2000)


@pytest.mark.simulations
@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("n", [500, 2000])
def test_two_requirements(capsys, correlation, n):
    shares = np.concatenate([layout("flat", THRESHOLD), layout("flat", 0.45)])
    thresholds = np.repeat([THRESHOLD, 0.45], 21)
    population = Population.equicorrelated(shares, correlation)
    outcome = simulate_requirement(population, thresholds, n)
    show(capsys, f"| two requirements | {correlation:g} | {n:,} | {outcome.wrong:.1%} |")
    assert outcome.wrong <= limit(2000)


@pytest.mark.simulations
@pytest.mark.parametrize("shape", ["flat", "crowded", "spread"])
@pytest.mark.parametrize("n", [600, 3000])
def test_confirmed_finalists(capsys, shape, n):
    population = Population.equicorrelated(layout(shape, 0.45), 0.9)
    wrong, answered = simulate_confirmation(population, 0.45, n)
    show(capsys, f"| {shape}, finalists | 0.9 | {n:,} | {wrong:.1%} | {answered:.1%} |")
    assert wrong <= limit(2000)


@pytest.mark.simulations
@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("n", [500, 2000])
def test_differences(capsys, correlation, n):
    population = Population.equicorrelated(np.full(21, 0.45), correlation)
    wrong = simulate_gains(population, n)
    show(capsys, f"| a difference outside | {correlation:g} | {n:,} | {wrong:.1%} |")
    assert wrong <= limit(2000)

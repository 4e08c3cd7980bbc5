"""The search by surrogate: what it attacks, when it stops, and what it answers."""

import numpy as np
import pytest

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.soups.goal import Goal
from robustsoup.soups.grid import alpha_name, grid
from robustsoup.soups.surrogate_search import SurrogateSearch, coarse_names, lower_bounds

LINF, L2 = "Linf 8/255", "L2 0.5"
SAMPLES = 1000


class World:
    """Soups with known accuracies: sample i is right where its own level is below the map.

    Args:
        alphas: Coefficients of the soups.
        robust: (N,) accuracies under attack, in logits.
        clean: (N,) clean accuracies, in logits.
        seed: Seed of the samples.
    """

    def __init__(self, alphas, robust, clean, seed=0, second=None):
        rng = np.random.default_rng(seed)
        level = rng.logistic(size=SAMPLES)
        tilt = rng.normal(0, 0.3, (np.shape(alphas)[1], SAMPLES))
        own = level + np.asarray(alphas) @ tilt
        self.alphas = tuple(map(tuple, alphas))
        self.names = tuple(map(alpha_name, self.alphas))
        self.robust = np.asarray(robust)
        self.hits = {LINF: own < self.robust[:, None]}
        if second is not None:
            self.hits[L2] = own < np.asarray(second)[:, None]
        clean_hits = (own < np.asarray(clean)[:, None]) | self.hits[LINF]
        self.clean = tuple(Accuracy(int(row.sum()), SAMPLES) for row in clean_hits)

    def search(self, maximise=LINF, require=(), **options):
        goal = Goal.parse(maximise, require, point=True)
        thresholds = [item.threshold for item in goal.require if item.key == "clean"]
        options["shortfall"] = tuple(
            max(max(thresholds, default=0) - accuracy.value, 0) for accuracy in self.clean
        )
        return SurrogateSearch(self.names, self.alphas, self.clean, goal, **options)

    def run(self, search):
        """Run a search to its end; return the hits of the attacked soups by name."""
        attacked = {}
        while names := search.next_soups(attacked):
            assert not set(names) & set(attacked)
            attacked |= self.attack(names)
        return attacked

    def attack(self, names):
        rows = {name: self.names.index(name) for name in names}
        return {name: {m: h[row] for m, h in self.hits.items()} for name, row in rows.items()}

    def accuracy(self, name, measure=LINF):
        return self.hits[measure][self.names.index(name)].mean()


def smooth_world(n=3, step=0.2, seed=0):
    """Return soups whose clean accuracy falls where the robust one rises, with some curvature."""
    alphas, rng = np.array(grid(n, step)), np.random.default_rng([seed, 9])
    i, j = np.triu_indices(n, 1)
    slope = alphas @ np.linspace(-0.4, 0.4, n)
    bend = (alphas[:, i] * alphas[:, j]) @ rng.uniform(0.2, 0.8, len(i))
    return World(alphas, slope + bend - 0.4, 1.2 - slope + 0.5 * bend, seed)


@pytest.mark.parametrize(("n", "seed"), [(3, 0), (3, 1), (4, 0), (4, 1)])
def test_the_answer_is_within_the_tolerance_of_the_grids_at_fewer_attacks(n, seed):
    world = smooth_world(n, seed=seed)
    search = world.search(seed=seed)
    attacked = world.run(search)
    best = max(map(world.accuracy, world.names))
    assert best - max(map(world.accuracy, attacked)) <= 2 * search.tolerance
    assert len(attacked) < len(world.names) * 0.75
    assert search.state(attacked).stage == "settled"
    assert search.names[search.state(attacked).chosen] in attacked


def test_decisions_depend_on_the_verdicts_alone():
    world = smooth_world(4)
    attacked = world.run(world.search())
    backwards = dict(reversed(attacked.items()))
    assert world.search().state(attacked) == world.search().state(backwards)
    for count in range(9, len(attacked)):
        first = dict(list(attacked.items())[:count])
        assert world.search().next_soups(first) == tuple(attacked)[count : count + 1]
    assert len(attacked) > 9


def test_an_interrupted_beginning_asks_for_what_is_missing():
    world = smooth_world()
    search = world.search()
    first = search.first_soups()
    assert search.next_soups(world.attack(first[:2])) == first[2:]
    assert search.state({}).stage == "begin"


def test_the_first_soups_are_the_ingredients_spread_ones_and_two_tests_by_the_seed():
    world = smooth_world(4)
    search = world.search(seed=1)
    assert set(map(alpha_name, np.eye(4))) <= set(search.first_soups())
    assert len(search.first_soups()) == 4 + 3 + 2
    assert not set(search.test_rows) & set(search.first_rows)
    tests = {world.search(seed=seed).test_rows for seed in range(10)}
    assert len(tests) > 5


def test_soups_below_the_required_clean_accuracy_are_not_chosen():
    world = smooth_world()
    threshold = sorted(a.value for a in world.clean)[12]
    search = world.search(require=[f"clean>={threshold}"])
    attacked = world.run(search)
    chosen = search.state(attacked).chosen
    eligible = [
        name for name, a in zip(world.names, world.clean, strict=True) if a.value >= threshold
    ]
    assert world.names[chosen] in eligible
    best = max(map(world.accuracy, eligible))
    assert best - world.accuracy(world.names[chosen]) <= 2 * search.tolerance


def test_where_no_soup_meets_the_requirement_the_closest_is_chosen():
    world = smooth_world()
    search = world.search(require=["clean>=0.999"])
    attacked = world.run(search)
    assert search.state(attacked).chosen == int(np.argmax([a.value for a in world.clean]))


def test_a_requirement_under_attack_is_predicted_too():
    world = smooth_world()
    target = np.quantile(world.hits[LINF].mean(1), 0.6)
    search = world.search("clean", [f"{LINF}>={target}"])
    attacked = world.run(search)
    chosen = search.state(attacked).chosen
    assert world.accuracy(world.names[chosen]) >= target - 0.02
    reaching = [
        a.value
        for name, a in zip(world.names, world.clean, strict=True)
        if world.accuracy(name) >= target
    ]
    assert world.clean[chosen].value >= max(reaching) - 0.02


def test_two_threats_are_modelled_apart():
    alphas = np.array(grid(3, 0.2))
    slope = alphas @ np.array([-0.4, 0.0, 0.4])
    world = World(alphas, slope, slope * 0 + 1.5, second=-slope)
    search = world.search(require=[f"{L2}>={0.5}"])
    attacked = world.run(search)
    chosen = world.names[search.state(attacked).chosen]
    assert world.accuracy(chosen, L2) >= 0.48
    predicted = {soup.name: soup for soup in search.predict(attacked)}
    assert set(predicted[chosen].accuracy) == {LINF, L2}


def test_a_map_that_is_not_smooth_falls_back_to_the_grid():
    alphas = np.array(grid(3, 0.2))
    wild = np.random.default_rng(0).choice([-1.5, 1.5], len(alphas))
    world = World(alphas, wild, np.full(len(alphas), 3.0))
    search = world.search()
    attacked = world.run(search)
    assert set(attacked) == set(world.names)
    assert search.state(attacked).stage == "grid"


def test_the_fallback_leaves_out_soups_that_miss_a_requirement_on_clean_accuracy():
    alphas = np.array(grid(3, 0.2))
    wild = np.random.default_rng(0).choice([-1.5, 1.5], len(alphas))
    world = World(alphas, wild, np.where(alphas[:, 0] > 0.5, 3.0, 1.0))
    search = world.search(require=["clean>=0.9"])
    meeting = {name for name, alpha in zip(world.names, alphas, strict=True) if alpha[0] > 0.5}
    attacked = world.run(search)
    assert meeting < set(attacked) < set(world.names)
    assert search.state(attacked).stage == "grid"
    most_robust = max(meeting, key=world.accuracy)
    chosen = world.names[search.state(attacked).chosen]
    assert world.accuracy(chosen) == world.accuracy(most_robust)


def test_one_odd_test_soup_is_no_misfit_once_new_ones_are_predicted():
    """Each failure draws a new pair of test soups; the odd one then enters the model."""
    world = smooth_world(4)
    search = world.search()
    odd = world.names[search.test_rows[0]]
    hits = world.attack([odd])[odd][LINF].copy()
    hits[np.flatnonzero(hits)[: len(hits) // 16]] = False  # six points below the map
    attacked = world.attack(search.first_soups()) | {odd: {LINF: hits}}
    state = search.state(attacked)
    assert state.stage == "misfit"
    assert set(search.test_order[2:4]) <= set(state.next_rows)
    while (now := search.state(attacked)).stage == "misfit":
        attacked |= world.attack([world.names[row] for row in now.next_rows])
    assert now.stage == "search"
    assert now.p_value > state.p_value


def test_the_soups_that_test_the_model_enter_it_after_the_test():
    world = smooth_world()
    search = world.search()
    attacked = world.attack(search.first_soups())
    tests = [world.names[row] for row in search.test_rows]
    changed = {
        name: {LINF: ~hits[LINF]} if name in tests else hits for name, hits in attacked.items()
    }
    before, after = search.predict(attacked), search.predict(changed)
    for row in search.test_rows:
        moved = after[row].accuracy[LINF][0] - before[row].accuracy[LINF][0]
        flipped = changed[world.names[row]][LINF].mean() - world.accuracy(world.names[row])
        assert np.sign(moved) == np.sign(flipped)
    assert search.state(changed).stage == "misfit"
    assert search.state(attacked).stage != "misfit"


def test_the_fallback_of_a_fine_grid_is_the_coarse_one():
    alphas = np.array(grid(3, 0.1))
    wild = np.random.default_rng(0).choice([-1.5, 1.5], len(alphas))
    world = World(alphas, wild, np.full(len(alphas), 3.0))
    coarse = coarse_names(world.names, world.alphas, 0.2)
    assert len(coarse) == 21
    search = world.search(grid=coarse)
    attacked = world.run(search)
    assert coarse <= set(attacked)
    assert len(attacked) < len(world.names)


def test_a_grid_that_is_too_small_for_a_test_is_attacked_whole():
    world = smooth_world(2, step=0.25)
    assert set(world.run(world.search())) == set(world.names)


def test_positions_on_a_dial_are_a_line():
    t = np.linspace(0, 1, 41)
    world = World(np.stack([t, 1 - t], 1), 0.4 - 0.8 * t + 0.3 * t * (1 - t), 1 + t)
    names = tuple(f"t{value:.3f}" for value in t)
    world.names = names
    attacked = world.run(world.search())
    assert len(attacked) <= 12
    best = max(map(world.accuracy, names))
    assert best - max(map(world.accuracy, attacked)) <= 0.01


def test_hundreds_of_soups_of_six_ingredients_need_few_attacks():
    world = smooth_world(6)
    attacked = world.run(world.search())
    assert len(attacked) <= 60 < len(world.names) == 252
    best = max(map(world.accuracy, world.names))
    assert best - max(map(world.accuracy, attacked)) <= 0.01


def test_a_short_attack_on_every_soup_is_a_covariate():
    world = smooth_world()
    screened = tuple(
        Accuracy(min(SAMPLES, int(hits.sum()) + 20), SAMPLES) for hits in world.hits[LINF]
    )
    search = world.search(screened=screened)
    assert search.places.covariates.shape == (21, 2)
    assert len(world.run(search)) <= len(world.run(world.search())) + 2


def test_the_bands_hold_the_true_accuracies():
    inside = []
    for seed in range(25):
        world = smooth_world(seed=seed)
        search = world.search(seed=seed)
        predicted = search.predict(world.attack(search.first_soups()))
        # The level of a sample varies by its tilts too, so the truth is an average over samples.
        truth = World(world.alphas, world.robust, world.robust, seed + 1000)
        for soup in predicted:
            _, low, high = soup.accuracy[LINF]
            inside.append(low - 0.022 <= truth.accuracy(soup.name) <= high + 0.022)
    assert np.mean(inside) > 0.95


def test_the_bound_is_wilsons():
    accuracy = Accuracy(412, 1000)
    assert lower_bounds(np.array([0.412]), 1000)[0] == pytest.approx(accuracy.low)


def test_without_an_attacked_measure_only_the_answer_is_attacked():
    world = smooth_world()
    attacked = world.run(world.search("clean"))
    best = int(np.argmax([accuracy.value for accuracy in world.clean]))
    assert list(attacked) == [world.names[best]]
    assert world.search("clean").predict(attacked)[0].accuracy == {}

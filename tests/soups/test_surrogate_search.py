"""The search by surrogate: what it attacks, when it stops, and what it answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.settings import AttackSettings
from robustsoup.soups.confirmation import likely_to_pass
from robustsoup.soups.goal import Goal
from robustsoup.soups.grid import alpha_name, grid
from robustsoup.soups.surrogate import to_share
from robustsoup.soups.surrogate_refits import Refits
from robustsoup.soups.surrogate_search import (
    SurrogateSearch,
    choose_part,
    coarse_names,
    count_part,
    requests_in_time,
)
from robustsoup.soups.time_limit import TimeLimit

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
        self.clean_hits = (own < np.asarray(clean)[:, None]) | self.hits[LINF]
        self.clean = tuple(Accuracy(int(row.sum()), SAMPLES) for row in self.clean_hits)

    def search(self, maximise=LINF, require=(), **options):
        goal = Goal.parse(maximise, require, point=True)
        thresholds = [item.threshold for item in goal.require if item.key == "clean"]
        options["shortfall"] = tuple(
            max(max(thresholds, default=0) - accuracy.value, 0) for accuracy in self.clean
        )
        return SurrogateSearch(self.names, self.alphas, self.clean_hits, goal, **options)

    def run(self, search):
        """Run a search to its end; return the hits of the attacked soups by name."""
        attacked = {}
        while requests := search.next_requests(attacked):
            attacked |= self.answer(search, requests, attacked)
        return attacked

    def answer(self, search, requests, attacked=None):
        """Return the hits that requests ask for; none asks for what is known."""
        known, hits = attacked or {}, {}
        for request in requests:
            name = request.candidate
            assert (name in known) == (request.after is not None)
            taken = slice(None) if request.subset is None else search.part
            hits |= {name: {m: h[taken] for m, h in self.attack([name])[name].items()}}
            if name in known:
                assert {len(h) for h in known[name].values()} == {search.part_size}
        return hits

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


def some_part(seed=7):
    """Return a random third of the samples."""
    part = np.zeros(SAMPLES, bool)
    part[np.random.default_rng(seed).permutation(SAMPLES)[: SAMPLES // 3]] = True
    return part


def count_attacks(attacked):
    """Return the attacked samples in soups' worth."""
    return sum(len(hits[LINF]) for hits in attacked.values()) / SAMPLES


@pytest.mark.parametrize("part", [None, some_part()], ids=["whole", "part"])
@pytest.mark.parametrize(("n", "seed"), [(3, 0), (3, 1), (4, 0), (4, 1)])
def test_the_answer_is_within_the_tolerance_of_the_grids_at_fewer_attacks(n, seed, part):
    world = smooth_world(n, seed=seed)
    search = world.search(seed=seed, part=part)
    attacked = world.run(search)
    best = max(map(world.accuracy, world.names))
    assert best - max(map(world.accuracy, attacked)) <= 2 * search.tolerance
    assert count_attacks(attacked) < len(world.names) * (0.75 if part is None else 0.5)
    state = search.state(attacked)
    assert state.stage == "settled"
    assert state.chance <= 0.05
    chosen = world.names[state.chosen]
    assert len(attacked[chosen][LINF]) == SAMPLES
    in_full = [name for name, hits in attacked.items() if len(hits[LINF]) == SAMPLES]
    assert world.accuracy(chosen) == max(map(world.accuracy, in_full))


@pytest.mark.parametrize("part", [None, some_part()], ids=["whole", "part"])
def test_decisions_depend_on_the_verdicts_alone(part):
    world = smooth_world(4)
    search = world.search(part=part)
    attacked, steps = {}, 0
    while requests := search.next_requests(attacked):
        backwards = dict(reversed(attacked.items()))
        assert world.search(part=part).next_requests(backwards) == requests
        attacked |= world.answer(search, requests, attacked)
        steps += 1
    assert steps > 2
    assert search.state(attacked) == world.search(part=part).state(dict(reversed(attacked.items())))


def test_an_interrupted_beginning_asks_for_what_is_missing():
    world = smooth_world()
    search = world.search(part=some_part())
    first = search.first_requests()
    assert search.next_requests(world.answer(search, first[:2])) == first[2:]
    assert search.state({}).stage == "begin"


def test_the_ends_are_attacked_on_all_samples_and_others_on_the_part_first():
    world = smooth_world(4)
    search = world.search(part=some_part())
    subsets = {request.candidate: request.subset for request in search.first_requests()}
    ends = set(map(alpha_name, np.eye(4)))
    assert {name for name, subset in subsets.items() if subset is None} == ends
    assert {subset for name, subset in subsets.items() if name not in ends} == {SAMPLES // 3}
    attacked = world.run(search)
    in_full = {name for name, hits in attacked.items() if len(hits[LINF]) == SAMPLES}
    assert ends < in_full < set(attacked)


def test_what_the_part_says_of_a_soup_is_corrected_by_what_is_known_of_others():
    raw, corrected = [], []
    for seed in range(10):
        world = smooth_world()
        search = world.search(part=some_part(seed=seed))
        attacked = world.answer(search, search.first_requests())
        refits = Refits(search, attacked)
        estimates = to_share(refits.values[LINF])
        for row, estimate in zip(refits.rows, estimates, strict=True):
            name = world.names[row]
            if row in search.ends:
                assert estimate == pytest.approx(world.accuracy(name), abs=1e-3)
            else:
                raw.append(attacked[name][LINF].mean() - world.accuracy(name))
                corrected.append(estimate - world.accuracy(name))
    assert np.mean(np.square(corrected)) < 0.25 * np.mean(np.square(raw))


def test_without_time_the_finalists_as_they_stand_are_attacked_on_all_samples():
    world = smooth_world()
    search = world.search(part=some_part())
    assert search.last_requests({}) == ()
    attacked = world.answer(search, search.first_requests())
    last = search.last_requests(attacked)
    assert all(request.subset is None for request in last)
    assert {r.candidate in attacked for r in last} == {r.after is not None for r in last}
    attacked |= world.answer(search, last[:1], attacked)
    best = max(map(world.accuracy, world.names))
    assert best - world.accuracy(last[0].candidate) < 0.03


def test_a_part_is_a_third_and_only_for_attacks_of_single_samples():
    alone, together = AttackSettings(), AttackSettings(attack="autoattack")
    assert count_part(3000, alone) == 1000
    assert count_part(600, alone) == 256
    assert count_part(511, alone) is None
    assert count_part(3000, together) is None
    assert count_part(3000, alone, shift=True) is None
    ids = torch.arange(3000)
    part = choose_part(ids, alone)
    assert part.sum() == 1000
    assert not np.array_equal(part, choose_part(ids, AttackSettings(seed=1)))


def test_a_limit_leaves_time_for_an_answer_on_all_samples(monkeypatch):
    world, now = smooth_world(), [0.0]
    monkeypatch.setattr("robustsoup.soups.time_limit.clock", lambda: now[0])
    search, limit = world.search(part=some_part()), TimeLimit("8s")
    attacked, late = {}, False
    while True:
        requests, late = requests_in_time(search, attacked, limit)
        if not requests:
            break
        attacked |= world.answer(search, requests, attacked)
        now[0] += 1.5
        limit.end_soup()
    assert late
    assert now[0] <= 8
    assert sum(len(hits[LINF]) == SAMPLES for hits in attacked.values()) == 3
    assert len(attacked) == 4


def test_the_first_soups_are_the_ingredients_spread_ones_and_two_tests_by_the_seed():
    world = smooth_world(4)
    search = world.search(seed=1)
    first = [request.candidate for request in search.first_requests()]
    assert set(map(alpha_name, np.eye(4))) <= set(first)
    assert len(first) == 4 + 3 + 2
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
    chosen = search.state(attacked).chosen
    assert world.clean[chosen].value == max(a.value for a in world.clean)


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


def test_a_soup_meets_a_requirement_where_it_is_likely_to_be_confirmed():
    world = smooth_world()
    search = replace(world.search(), goal=Goal.parse("clean", [f"{LINF}>=0.4"]))
    least = likely_to_pass(0.4, SAMPLES // 2)
    shares = {"clean": np.full(2, 0.9), LINF: np.array([least - 1e-6, least + 1e-6])}
    below, above = Refits(search, world.attack(world.names)).utility(shares, np.array([0, 1]))
    assert (below < 0, above) == (True, 0.9)


def test_an_accuracy_of_just_what_is_required_meets_the_requirement():
    world = smooth_world()
    hits = {LINF: np.arange(SAMPLES) < 600}
    for threshold, meets in ((0.6, True), (0.601, False)):
        search = world.search("clean", [f"{LINF}>={threshold}"])
        attacked = world.answer(search, search.first_requests())
        end = world.names[search.ends[0]]
        refits = Refits(search, attacked | {end: hits})
        rows = np.array(refits.rows)
        shares = {"clean": refits.shares["clean"][rows], LINF: to_share(refits.values[LINF])}
        utility = refits.utility(shares, rows)[refits.rows.index(search.ends[0])]
        assert (utility > 0) == meets


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
    wild = np.random.default_rng(1).choice([-1.5, 1.5], len(alphas))
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
    attacked = world.answer(search, search.first_requests()) | {odd: {LINF: hits}}
    state = search.state(attacked)
    assert state.stage == "misfit"
    second = {world.names[row] for row in search.test_order[2:4]}
    assert second <= {request.candidate for request in state.next}
    while (now := search.state(attacked)).stage == "misfit":
        attacked |= world.answer(search, now.next)
    assert now.stage == "search"
    assert now.p_value > state.p_value


def test_the_soups_that_test_the_model_enter_it_after_the_test():
    world = smooth_world()
    search = world.search()
    attacked = world.answer(search, search.first_requests())
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


@pytest.mark.parametrize("part", [None, some_part()], ids=["whole", "part"])
def test_the_bands_hold_the_true_accuracies(part):
    inside = []
    for seed in range(25):
        world = smooth_world(seed=seed)
        search = world.search(seed=seed, part=part)
        predicted = search.predict(world.answer(search, search.first_requests()))
        # The level of a sample varies by its tilts too, so the truth is an average over samples.
        truth = World(world.alphas, world.robust, world.robust, seed + 1000)
        for soup in predicted:
            _, low, high = soup.accuracy[LINF]
            inside.append(low - 0.022 <= truth.accuracy(soup.name) <= high + 0.022)
    assert np.mean(inside) > 0.95


def test_without_an_attacked_measure_only_the_answer_is_attacked():
    world = smooth_world()
    attacked = world.run(world.search("clean"))
    best = int(np.argmax([accuracy.value for accuracy in world.clean]))
    assert list(attacked) == [world.names[best]]
    assert world.search("clean").predict(attacked)[0].accuracy == {}


def test_without_an_attacked_measure_an_answer_attacked_on_the_part_is_attacked_on_the_rest():
    """The first soups of a run are attacked before its clean verdicts are known."""
    world = smooth_world()
    search = world.search("clean", part=some_part())
    best = world.names[int(np.argmax([accuracy.value for accuracy in world.clean]))]
    part = {best: {LINF: world.attack([best])[best][LINF][search.part]}}
    (request,) = search.next_requests(part)
    assert (request.candidate, request.subset) == (best, None)
    assert request.after is not None
    assert request.after.subset == search.part_size
    assert search.next_requests(part | world.answer(search, (request,), part)) == ()

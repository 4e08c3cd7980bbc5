"""A plan is pure, and every key follows from what its step depends on."""

import dataclasses
import importlib
import json
import linecache
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from corruptions import write_corruptions
from tiny_runs import (
    DATA,
    LEARNED,
    MODEL,
    ROWS,
    SCREENED,
    keys_of,
    plan_of,
    planner_of,
    recipe_of,
    recipe_of_files,
    steps_of,
)

import robustsoup
from robustsoup.catalog import SOUP_METHODS
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Augmentation, load_data
from robustsoup.data.transforms import ImageTransform
from robustsoup.errors import DataError, RequestError
from robustsoup.models import load_model
from robustsoup.recipes import load_recipe, with_files
from robustsoup.runs.run import prepare_run
from robustsoup.runs.soup_rows import SOUP_PLANNERS, plan_recipe
from robustsoup.runs.tasks import stopping_split
from robustsoup.soups.confirmation import take_part
from robustsoup.soups.learned_search import slug, threat_slug
from robustsoup.soups.method_keys import METHOD_KEYS
from robustsoup.soups.screening import EvaluationRequest
from robustsoup.threats import ThreatModel

SHIPPED = [
    Path(robustsoup.__file__).parent / "quickstart.toml",
    *sorted((Path(__file__).parents[2] / "recipes").rglob("[!_]*.toml")),
]


def test_planning_writes_no_file_and_draws_no_random_number(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    generator = torch.random.get_rng_state()
    prepared = prepare_run(recipe_of(), device="cpu")
    assert [row.name for row in prepared.plan.rows] == ROWS
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(generator, torch.random.get_rng_state())


def test_parents_come_before_their_children():
    seen = set()
    for step in plan_of().steps:
        assert set(step.parents) <= seen, step.name
        assert step.passes >= 0
        seen.add(step.key)


def test_keys_are_the_same_in_another_process(tmp_path):
    assert keys_of(plan_of()) == keys_of(plan_of())
    path = tmp_path / "tiny.toml"
    path.write_text(recipe_of().to_toml())
    script = """
import json, sys
from robustsoup.recipes import load_recipe
from robustsoup.runs.run import prepare_run
plan = prepare_run(load_recipe(sys.argv[1]), device="cpu").plan
print(json.dumps([step.key for step in plan.steps]))
"""
    env = {**os.environ, "PYTHONHASHSEED": "7", "ROBUSTSOUP_STORE": str(tmp_path / "store")}
    command = [sys.executable, "-c", script, path]
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout) == list(keys_of(plan_of()).values())


def test_the_code_of_an_objective_is_in_the_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    change, keys = (("ingredients", "low", "objective"), "own_loss_of_runs:loss"), set()
    for factor in (1, 2):
        (tmp_path / "own_loss_of_runs.py").write_text(
            "from robustsoup.attacks.losses import ce\n"
            f"def loss(clean, attacked, y):\n    return {factor} * ce(attacked, y)\n"
        )
        linecache.clearcache()
        importlib.invalidate_caches()
        sys.modules.pop("own_loss_of_runs", None)
        keys.add(keys_of(plan_of(change))["finetune", "low"])
        assert keys_of(plan_of(change))["finetune", "low"] in keys
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ((("evaluate", "attack"), "own_code_of_runs:function"), "evaluate"),
        ((("soups", "grid", "buffers"), "own_code_of_runs:function"), "mix"),
    ],
)
def test_the_code_of_an_attack_or_buffer_policy_is_in_the_key(tmp_path, monkeypatch, change, kind):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for result in (1, 2, 2):
        code = f"def function(*_, **__):\n    return {result}\n"
        (tmp_path / "own_code_of_runs.py").write_text(code)
        importlib.invalidate_caches()
        sys.modules.pop("own_code_of_runs", None)
        steps = keys_of(plan_of(change))
        keys.append(next(key for (step_kind, _), key in steps.items() if step_kind == kind))
    assert keys[0] != keys[1] == keys[2]


def test_the_number_of_processes_is_in_the_key_where_each_normalises_its_share(monkeypatch):
    tables = [("pretrain",), ("finetune",), LEARNED]
    shared = [((*table, "batchnorm"), "sync") for table in tables]
    alone, alone_shared = keys_of(plan_of()), keys_of(plan_of(*shared))
    monkeypatch.setattr("robustsoup.distributed.world", lambda: 2)
    two = keys_of(plan_of())
    assert all(two[step] != alone[step] for step in alone)
    only_finetuned = keys_of(plan_of(shared[0], shared[2]))
    assert only_finetuned["pretrain", "pretrained"] == alone_shared["pretrain", "pretrained"]
    assert keys_of(plan_of(*shared)) == alone_shared


def test_the_content_of_synthetic_images_is_in_the_key(tmp_path):
    train, keys = load_data("digits").train.first(200), []
    images = train.images.permute(0, 2, 3, 1).numpy().copy()
    for folder, last_pixel in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "generated.npz"
        images[-1, 0, 0, 0] = last_pixel
        numpy.savez(path, image=images, label=train.labels.numpy())
        keys.append(keys_of(plan_of((("pretrain", "synthetic"), str(path)))))
    without = keys_of(plan_of())
    assert keys[0] == keys[1]
    assert all(keys[0][step] != keys[2][step] != without[step] for step in keys[0])


def test_a_one_hot_grid_point_is_its_ingredient():
    plan = plan_of()
    rows = plan.rows_by_name
    assert rows["grid-1-0"].network == rows["low"].network
    assert rows["grid-1-0"].val == rows["low"].val
    assert rows["grid-0-1"].test == rows["high"].test
    assert [name for kind, name in keys_of(plan) if kind == "mix"] == [
        "grid-0.5-0.5",
        "learned-linf-32-255",
    ]


MIXED_SOUPS = {"grid-0.5-0.5", "learned-linf-32-255"}


NETWORKS = {"pretrained", "low", "high", *MIXED_SOUPS}


@pytest.mark.parametrize(
    ("change", "changed", "evaluations_only"),
    [
        ((("name",), "other"), set(), False),
        ((("report", "figures"), []), set(), False),
        ((("select", "require"), []), set(), False),
        ((("pretrain", "lr"), 0.3), NETWORKS, False),
        ((("pretrain", "early_stop", "steps"), 3), NETWORKS, False),
        ((("finetune", "epochs"), 3), NETWORKS - {"pretrained"}, False),
        ((("finetune", "seed"), 1), NETWORKS - {"pretrained"}, False),
        ((("finetune", "label_smoothing"), 0.1), NETWORKS - {"pretrained"}, False),
        ((("finetune", "ema"), 0.0), set(), False),
        ((("pretrain", "ema"), 0.5), NETWORKS, False),
        ((("pretrain", "weight_decay_bn"), True), set(), False),
        ((("ingredients", "low", "nesterov"), True), {"low", *MIXED_SOUPS}, False),
        ((("ingredients", "low", "objective"), "trades"), {"low", *MIXED_SOUPS}, False),
        ((("ingredients", "high", "threat"), "L2 1.0"), {"high", *MIXED_SOUPS}, False),
        ((("ingredients", "low", "lr"), 0.01), {"low", *MIXED_SOUPS}, False),
        (((*LEARNED, "lr"), 5.0), {"learned-linf-32-255"}, False),
        (((*LEARNED, "detach"), 0.5), {"learned-linf-32-255"}, False),
        (((*LEARNED, "buffers"), "average"), {"mixed learned-linf-32-255"}, False),
        ((("soups", "grid", "buffers"), "recalibrate"), {"mixed grid-0.5-0.5"}, False),
        ((("seed",), 1), NETWORKS, False),
        ((("evaluate", "steps"), 4), NETWORKS, True),
        ((("evaluate", "seed"), 4), NETWORKS, True),
        ((("evaluate", "select_samples"), 65), {"val"}, True),
        ((("evaluate", "report_samples"), 65), {"test"}, True),
    ],
)
def test_a_setting_changes_the_keys_of_its_dependents_alone(change, changed, evaluations_only):
    before, after = keys_of(plan_of()), keys_of(plan_of(change))

    def depends_on_change(kind, name):
        output = name.rpartition(".")[0] if kind == "evaluate" else name
        if evaluations_only:
            split = name.rpartition(".")[2]
            return kind == "evaluate" and (output in changed or split in changed)
        mixed = f"mixed {output}" in changed and kind in ("mix", "evaluate")
        return output in changed or mixed

    for step in before:
        assert (before[step] != after.get(step, before[step])) == depends_on_change(*step), step
    # With other buffers, a one-hot grid point is no longer its ingredient: it is mixed too.
    added = {step for step in after if step not in before}
    assert all("grid-" in name for _, name in added)
    assert bool(added) == (change[0] == ("soups", "grid", "buffers"))


NETWORK_CODE = """
import torch

def net(classes, channels):  # of one layer
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * channels, classes))
"""


def test_the_code_of_a_network_is_in_all_keys(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_network_of_the_keys.py"
    model = dataclasses.replace(MODEL, spec="own_network_of_the_keys:net")

    def keys_with(code):
        file.write_text(code)
        return keys_of(plan_of(model=model))

    before = keys_with(NETWORK_CODE)
    other_comment = NETWORK_CODE.replace("of one layer", "of a single layer") + "\n\n"
    assert keys_with(other_comment) == before
    other_layers = "torch.nn.Flatten(), torch.nn.Identity()"
    after = keys_with(NETWORK_CODE.replace("torch.nn.Flatten()", other_layers))
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def test_the_papers_protocol_fits_on_val_and_selects_on_test():
    before, after = plan_of(), plan_of((("protocol",), "paper"))
    # Pre-training stops early on val, so it fits on train alone in both.
    pretrain = ("pretrain", "pretrained")
    assert keys_of(after)[pretrain] == keys_of(before)[pretrain]
    for name in ("low", "high"):
        step = after.step(keys_of(after)["finetune", name])
        assert step.task.fits_on_val
        assert step.passes > before.step(keys_of(before)["finetune", name]).passes
    for row in after.rows:
        assert row.val == row.test
        assert after.step(row.test).task.settings.split == "test"


def test_max_soups_allows_a_large_grid():
    changes = (("soups", "grid", "step"), 0.0004), (("soups", "grid", "max_soups"), 2501)
    assert sum(row.name.startswith("grid-") for row in plan_of(*changes).rows) == 2501


def test_the_masking_check_of_soups_tries_the_points_of_base_and_ingredients(monkeypatch):
    plan = plan_of()
    steps, keys = steps_of(plan), keys_of(plan)
    names = ("pretrained", "low", "high")
    others = tuple(keys["evaluate", f"{name}.val"] for name in names)
    for name in names:
        task = steps["evaluate", f"{name}.val"].task
        assert (task.keep_points, task.others) == (True, ())
    for name in ("grid-0.5-0.5", "learned-linf-32-255"):
        task = steps["evaluate", f"{name}.val"].task
        assert (task.keep_points, task.others) == (False, others)
        assert set(others) < set(task.parents)
    assert plan.row("grid-1-0").val == plan.row("low").val

    def list_others(*changes):
        tasks = [step.task for step in plan_of(*changes).steps if step.kind == "evaluate"]
        return [task for task in tasks if task.others or task.keep_points]

    # On test, where "report" says which networks are evaluated, none waits for another.
    assert {task.settings.split for task in list_others()} == {"val"}
    assert list_others((("evaluate", "masking_check"), False)) == []
    monkeypatch.setattr("robustsoup.runs.planner.MOST_POINT_BYTES", 64 * 64 * 4 - 1)
    assert list_others() == []


def test_another_ingredient_changes_no_evaluation_of_soups_without_it():
    pair = (("soups", "grid", "ingredients"), ["low", "high"])
    before = keys_of(plan_of(pair))
    after = keys_of(plan_of(pair, (("ingredients", "third"), {"threat": "Linf 32/255"})))
    assert after["evaluate", "grid-0.5-0.5.val"] == before["evaluate", "grid-0.5-0.5.val"]
    learned = ("evaluate", "learned-linf-32-255.val")
    assert after[learned] != before[learned]


def test_screened_soups_meet_the_ingredients_points_and_a_short_attack():
    plan = plan_of(*SCREENED)
    steps, keys = steps_of(plan), keys_of(plan)
    pool = tuple(keys["evaluate", f"{name}.pool.val"] for name in ("low", "high"))
    for name in ("low", "high"):
        task = steps["evaluate", f"{name}.pool.val"].task
        assert task.parents == (keys["finetune", name],)
        assert (task.keep_points, task.settings.attack.steps, task.pool) == (True, 3, ())
        task = steps["evaluate", f"{name}.val"].task
        assert task.parents == (keys["finetune", name], *pool)
        assert (task.after, task.short) == (keys["evaluate", f"{name}.pool.val"], False)
    for name in ("grid-0.25-0.75", "grid-0.5-0.5", "grid-0.75-0.25"):
        task = steps["evaluate", f"{name}.val"].task
        assert task.parents == (keys["mix", name], *pool)
        assert (task.settings.attack.steps, task.settings.attack.restarts) == (2, 1)
        assert (task.short, task.pool, task.after) == (True, pool, None)
    # A learned soup is the only one of its kind: there is nothing to screen it against.
    task = steps["evaluate", "learned-linf-32-255.val"].task
    assert (task.short, task.settings.attack.steps, task.pool) == (False, 3, pool)
    assert plan.row("grid-1-0").val == plan.row("low").val
    for step in plan.steps:
        if step.name.endswith(".test"):
            assert (step.task.pool, step.task.after, step.task.short) == ((), None, False)


def test_screening_changes_the_keys_of_selecting_evaluations_alone():
    before, after = keys_of(plan_of(SCREENED[2])), keys_of(plan_of(*SCREENED))
    changed = {step for step in before if before[step] != after[step]}
    assert changed == {step for step in before if step[1].endswith(".val")}
    assert set(after) - set(before) == {
        ("evaluate", f"{name}.pool.val") for name in ("low", "high")
    }
    shorter = keys_of(plan_of(*SCREENED, (("evaluate", "screen_steps"), 1)))
    changed = {name for kind, name in after if after[kind, name] != shorter[kind, name]}
    assert changed == {"grid-0.25-0.75.val", "grid-0.5-0.5.val", "grid-0.75-0.25.val"}


def test_a_screening_judges_with_the_seed_of_the_attack():
    assert planner_of((*SCREENED, (("seed",), 5))).screening().seed == 5


def test_a_confirmation_starts_from_the_screening():
    planner = planner_of(SCREENED)
    plan = planner.plan
    steps, rows, name = plan.steps, plan.rows, "grid-0.5-0.5"
    first = planner.screening().first_request(planner.contender(plan.row(name)))
    request = EvaluationRequest(name, after=first, subset=7)
    key = planner.add_full_evaluation(request)
    assert plan.steps[:-1] == steps
    (step,) = plan.steps[len(steps) :]
    before = next(row for row in rows if row.name == name)
    assert (plan.row(name).val, step.key, step.name) == (key, key, "grid-0.5-0.5.val")
    task = step.task
    assert (task.after, task.settings.attack.steps, task.short) == (before.val, 3, False)
    assert (task.subset, task.attacked_before, task.pool) == (7, False, ())
    assert set(task.parents) == {before.network, before.val}
    assert [row for row in plan.rows if row.name != name] == [r for r in rows if r.name != name]


def test_methods_that_need_more_than_coefficients_have_planners():
    needs = {name: entry.facts.get("needs") for name, entry in SOUP_METHODS.items()}
    needing = [name for name, need in needs.items() if need not in (None, "merging")]
    assert list(SOUP_PLANNERS) == needing
    assert list(METHOD_KEYS) == list(SOUP_METHODS)


def test_the_soups_of_a_users_method_are_planned_as_a_grid_and_screened(tmp_path, monkeypatch):
    (tmp_path / "soups_of_thirds.py").write_text("def thirds(*_):\n    return [[1 / 3, 2 / 3]]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    method = (("soups", "mine"), {"method": "soups_of_thirds:thirds"})
    plan = plan_of(method, (("evaluate", "screen"), True))
    (row,) = [row for row in plan.rows if row.soup == "mine"]
    assert (row.name, row.role) == ("mine-0.333333-0.666667", "grid")
    assert row.coefficients == (1 / 3, 2 / 3)
    assert plan.step(row.val).task.short


def test_data_network_and_precision_are_in_every_training_key():
    before = keys_of(plan_of())
    other_data = keys_of(plan_of(data=load_data("digits", seed=1)))
    other_model = keys_of(plan_of(model=dataclasses.replace(MODEL, spec="resnet9:width=4")))
    for after in (other_data, other_model):
        assert not set(before.values()) & set(after.values())
    bfloat16 = keys_of(plan_of(precision="bfloat16"))
    assert all(before[step] != bfloat16[step] for step in before)


def with_augmentation(**changes):
    """Return the data of the tests with another augmentation of the same samples."""
    train = dataclasses.replace(DATA.train, augmentation=Augmentation(**changes))
    return dataclasses.replace(DATA, train=train)


OWN_DATA = (("data",), "my_data:load")
AUGMENTATIONS = [
    {"pad": 1},
    {"flip": True},
    {"transform": ImageTransform.parse(lambda image: image.flip(2))},
]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda each: next(iter(each)))
def test_the_augmentation_of_a_users_data_is_in_the_keys_of_training(augmentation):
    before = keys_of(plan_of(OWN_DATA))
    after = keys_of(plan_of(OWN_DATA, data=with_augmentation(**augmentation)))
    assert {step for step in before if before[step] == after[step]} == set()
    assert keys_of(plan_of(data=with_augmentation(**augmentation))) == keys_of(plan_of())


def test_the_constants_of_a_users_data_are_in_the_keys_of_training():
    other = dataclasses.replace(DATA, record={**DATA.record, "mean": [0.5]})
    before, after = keys_of(plan_of(OWN_DATA)), keys_of(plan_of(OWN_DATA, data=other))
    assert {step for step in before if before[step] == after[step]} == set()
    assert keys_of(plan_of(data=other)) == keys_of(plan_of())


@pytest.mark.parametrize(
    ("buffers", "samples"),
    [("average", 10_000), ("recalibrate", 40), ("robustsoup.soups.buffers:average", 40)],
)
def test_a_policy_gets_the_settings_that_it_may_read(buffers, samples):
    soup = {"method": "uniform", "buffers": buffers, "calibrate_samples": 40}
    planner = planner_of([(("soups", "flat"), soup)])
    mixing = planner.mixing_of(planner.recipe.soups["flat"])
    assert mixing.buffers.calibrate_samples == samples


@pytest.mark.parametrize(("buffers", "is_same"), [("average", True), ("recalibrate", False)])
def test_a_soup_depends_on_augmentation_if_its_statistics_do(tmp_path, buffers, is_same):
    for seed, name in enumerate(("low", "high")):
        network = load_model("resnet9:width=2", channels=1, seed=seed)
        Checkpoint.of(network).save(tmp_path / f"{name}.safetensors")
    soups = {"flat": {"method": "uniform", "buffers": buffers}}
    recipe = recipe_of_files(tmp_path, data="my_data:load", soups=soups)
    keys = [
        keys_of(plan_recipe(recipe, data, MODEL, "float32").plan)
        for data in (DATA, with_augmentation(pad=1))
    ]
    assert (keys[0]["mix", "flat"] == keys[1]["mix", "flat"]) is is_same
    assert keys[0]["evaluate", "low.val"] == keys[1]["evaluate", "low.val"]


def test_slugs_are_file_names():
    assert slug("Linf 8/255") == "linf-8-255"
    assert slug("mixed 0.4") == "mixed-0.4"
    assert threat_slug(ThreatModel.parse("L1 12")) == "l1-12"
    assert threat_slug(ThreatModel.parse("Linf 8/255")) == "linf-8-255"


def test_the_base_of_the_running_statistics_is_in_the_key(tmp_path):
    """The common ancestor lies beside the ingredients in one of the folders."""
    base = Checkpoint.of(load_model("resnet9:width=2", channels=1, seed=9))
    steps = []
    for folder in (tmp_path / "alone", tmp_path / "beside"):
        folder.mkdir()
        paths = {f"i{seed}": str(folder / f"{seed}.safetensors") for seed in range(2)}
        for seed, path in enumerate(paths.values()):
            ingredient = Checkpoint.of(load_model("resnet9:width=2", channels=1, seed=seed))
            parents = [{"digest": base.digest, "file": "base.safetensors"}]
            ingredient.with_provenance(parents=parents).save(path)
        if folder.name == "beside":
            base.save(folder / "base.safetensors")
        plan = plan_of(
            (("pretrain",), None),
            (("finetune",), {}),
            (("soups",), {"flat": {"method": "uniform", "buffers": "base"}}),
            (("ingredients",), paths),
        )
        steps.append(steps_of(plan)["mix", "flat"])
    alone, beside = steps
    assert alone.key != beside.key
    assert beside.task.mixing.base == f"file:{base.digest}"


def test_a_planes_passes_follow_from_points_samples_and_steps():
    def passes(**more):
        plane = {
            "checkpoints": ["pretrained", "low", "high"],
            "points": 3,
            "samples": 10,
            "attack_steps": 4,
            "calibrate_samples": 100,
        }
        plan = plan_of((("planes",), {"p": plane | more}))
        return next(step.passes for step in plan.steps if step.kind == "plane")

    assert passes() == 9 * (10 * (2 * 4 + 3) + 100)
    assert passes(attack_steps=5) == 9 * (10 * (2 * 5 + 3) + 100)
    assert passes(points=5) == 25 * (10 * (2 * 4 + 3) + 100)
    assert passes(calibrate_samples=10**6) == 9 * (10 * (2 * 4 + 3) + len(DATA.train))
    assert passes(buffers="base") == 9 * 10 * (2 * 4 + 3)


@pytest.mark.parametrize("report", ["all", "chosen"])
def test_too_many_samples_are_refused_while_planning(report):
    for keys, split in (
        (("evaluate", "report_samples"), "test"),
        (("pretrain", "early_stop", "samples"), "val"),
        (("soups", "learned", "early_stop"), "val"),
    ):
        value = {"samples": 100_000} if keys[-1] == "early_stop" else 100_000
        expected = rf"digits {split}: requested 100000 samples, expected 1 to"
        with pytest.raises(DataError, match=expected):
            plan_of((("evaluate", "report"), report), (keys, value))


def test_early_stopping_of_learning_leaves_out_what_confirms_finalists():
    def learning(*changes):
        stop = (("soups", "learned", "early_stop"), {"samples": 32})
        plan = plan_of(stop, *changes)
        step = steps_of(plan)["learn", "learned-linf-32-255"]
        return step.key, step.task

    screen = (("evaluate", "screen"), True)
    confirmed = (("select", "require"), ["Linf 32/255>=0.1"])
    key, task = learning()
    same_key, same_task = learning(screen)
    other_key, other_task = learning(screen, confirmed)
    assert (same_key, task.stops_on, same_task.stops_on) == (key, None, None)
    assert other_key != key
    stopping = stopping_split(other_task.settings.early_stop, other_task.stops_on, DATA)
    aside = take_part(DATA.val.first(64), "confirm", seed=0)
    assert len(stopping) == 32
    assert not set(stopping.ids.tolist()) & set(aside.ids.tolist())
    many = (("soups", "learned", "early_stop"), {"samples": 64})
    with pytest.raises(DataError, match=r"early_stop.samples: got 64, expected at most 4\d: "):
        plan_of(many, screen, confirmed)


def test_the_mixing_of_a_greedy_soup_is_in_its_key():
    def key(**more):
        section = {"method": "greedy", "buffers": "recalibrate", "calibrate_samples": 40} | more
        return keys_of(plan_of((("soups", "greedy"), section)))["greedy", "greedy"]

    assert len({key(), key(calibrate_samples=41), key(buffers="base"), key(buffers="average")}) == 4
    assert key() == key()


def repeat_split(split, times):
    """Return a split whose samples appear several times, under ids of their own."""
    n = len(split) * times
    images, labels = split.images.repeat(times, 1, 1, 1), split.labels.repeat(times)
    return dataclasses.replace(split, images=images, labels=labels, ids=torch.arange(n))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_can_be_planned(path, tmp_path):
    """Digits stand in for CIFAR-10, and a small network for published checkpoints."""
    data = dataclasses.replace(
        DATA,
        train=repeat_split(DATA.train, 4),
        val=repeat_split(DATA.val, 20),
        test=repeat_split(DATA.test, 30),
    )
    checkpoint = tmp_path / "published.safetensors"
    Checkpoint.of(load_model("resnet9:width=2", channels=1)).save(checkpoint)
    recipe = with_files(load_recipe(path), lambda _: str(checkpoint))
    finetune = recipe.finetune.model_copy(update={"synthetic": None})
    recipe = recipe.model_copy(update={"finetune": finetune})
    plan = plan_recipe(recipe, data, MODEL, "float32").plan
    soups = [name for section in recipe.soups for name in recipe.soup_names(section)]
    assert [row.name for row in plan.rows if row.soup is not None] == soups
    assert list(plan.planes) == list(recipe.planes)
    assert all(row.val in plan.steps_by_key for row in plan.rows)


def test_each_part_of_the_samples_has_corrupted_copies_of_its_own(tmp_path):
    folder = str(write_corruptions(tmp_path / "digits-c"))
    changes = [(("evaluate", "shift"), folder), *SCREENED]
    plain = planner_of(changes).selecting_settings().shift
    require = [*changes, (("select", "require"), ["Linf 32/255>=0.1", "shift>=0"])]
    planner = planner_of(require)
    steering, confirming = planner.selecting_settings(), planner.confirming_settings()
    assert [s.part for s in (steering, confirming)] == ["search", "confirm"]
    shifts = (plain, steering.shift, confirming.shift, planner.reporting_settings().shift)
    assert [shift.part for shift in shifts] == ["select", "search", "confirm", "report"]
    assert plain.count == 64 * 10 == steering.shift.count + confirming.shift.count
    row = planner.plan.row("low")
    clean = planner.plan.steps_by_key[planner.add_clean_evaluation(row)].task.settings
    assert (clean.part, clean.shift) == ("all", plain)


def test_requirements_count_the_samples_that_have_corrupted_copies(tmp_path):
    """Copies of every second one of the 500 test images select."""
    folder = str(write_corruptions(tmp_path / "digits-c"))
    changes = [(("evaluate", "select_samples"), 290), (("select", "require"), ["clean>=0.983"])]
    prepare_run(recipe_of(changes), device="cpu")
    with pytest.raises(RequestError, match="250 samples cannot show"):
        prepare_run(recipe_of([*changes, (("evaluate", "shift"), folder)]), device="cpu")

"""Recipes and stores that anybody wrote: planned, resumed and chosen from, or one line says why."""

import json
import random
import shutil

import pytest
from json_mutations import choose_place, mutate, mutated_recipes, mutated_texts
from tiny_runs import (
    DATA,
    MODEL,
    SCREENED,
    TINY,
    planner_of,
    recipe_of,
    run_recipe,
    steps_of,
)

from robustsoup.digests import FileDigest, digest_json
from robustsoup.errors import RobustsoupError
from robustsoup.recipes import load_recipe
from robustsoup.runs.choose import choose_soup, confirm_screened_soups
from robustsoup.runs.soup_rows import plan_recipe
from robustsoup.runs.store import RECORD, Store, StoredStep
from robustsoup.soups.time_limit import TimeLimit


def sign_step(folder):
    """Write the digests of the files that a step's folder holds now, as a stranger can."""
    content = json.loads((folder / RECORD).read_text())
    files = {name: FileDigest.of(folder / name) for name in content.pop("files")}
    inputs = content.pop("inputs")
    content.pop("digest")
    key = content.pop("key")
    step = StoredStep(key, content, files, inputs)
    (folder / RECORD).write_text(json.dumps(step.to_json()))


def collect_refusals(work, texts):
    """Call a function with each text; return the one-line errors that it raises."""
    refusals = []
    for text in texts:
        try:
            work(text)
        except RobustsoupError as error:
            refusals.append(str(error))
    assert all(message.isprintable() for message in refusals)
    return refusals


def test_mutated_recipes_are_planned_or_refused_in_one_line(tmp_path):
    path, planned = tmp_path / "recipe.toml", []

    def plan(text):
        path.write_text(text, encoding="utf-8")
        planned.append(plan_recipe(load_recipe(path), DATA, MODEL, "float32").plan.steps)

    assert len(collect_refusals(plan, mutated_recipes(TINY, 100))) > 40
    assert planned


def read_unsigned(path):
    """Return the content of a stored evaluation without its digests and format."""
    content = json.loads(path.read_text())
    for entry in ("digests", "format", "robustsoup"):
        content.pop(entry)
    return content


@pytest.mark.parametrize("name", ["grid-0.5-0.5.val", "low.val"])
def test_choosing_from_mutated_evaluations_ends_in_one_line(copied, name):
    store, planner = Store(copied[1]), planner_of()
    key = steps_of(planner.plan)["evaluate", name].key
    path = store.path(key) / "evaluation.json"

    def choose(text):
        path.write_text(text, encoding="utf-8")
        sign_step(path.parent)
        assert choose_soup(planner, store, refuse_to_execute).selection.best

    assert len(collect_refusals(choose, mutated_texts(read_unsigned(path), 80))) > 20


def test_confirming_from_mutated_evaluations_ends_in_one_line(screened, tmp_path):
    shutil.copytree(screened.store, tmp_path / "store")
    store, planner = Store(tmp_path / "store"), planner_of(SCREENED)
    key = steps_of(planner.plan)["evaluate", "grid-0.5-0.5.val"].key
    path = store.path(key) / "evaluation.json"

    def confirm(text):
        path.write_text(text, encoding="utf-8")
        sign_step(path.parent)
        confirm_screened_soups(planner_of(SCREENED), store, refuse_to_execute, TimeLimit(None))

    assert len(collect_refusals(confirm, mutated_texts(read_unsigned(path), 40))) > 10


class NothingExecutedError(RobustsoupError):
    """A confirmation was asked for that the store does not hold."""


def refuse_to_execute():
    raise NothingExecutedError("not in the store")


def test_a_run_with_mutated_records_of_steps_repeats_them_or_ends_in_one_line(copied):
    """Records whose digest is right, and results of an earlier run in the folder."""
    folder, store = copied[0], Store(copied[1])
    key = steps_of(planner_of().plan)["mix", "grid-0.5-0.5"].key
    path, chance = store.path(key) / RECORD, random.Random(0)
    whole = json.loads(path.read_text())
    recipe = recipe_of([(("report", "figures"), [])])
    for _ in range(12):
        changed = mutate(whole, chance)
        step = {name: value for name, value in changed.items() if name != "digest"}
        path.write_text(json.dumps(changed | {"digest": digest_json(step)}))
        old = json.loads((folder / "results.json").read_text())
        table, place = choose_place(old, chance)
        table[place] = chance.choice([None, -1, "x", [], {"..": 1}])
        (folder / "results.json").write_text(json.dumps(old))
        collect_refusals(lambda _: run_recipe(recipe, folder), [None])
    path.write_text(json.dumps(whole))
    results, _, _ = run_recipe(recipe, folder)
    assert results["rows"]

"""Runs: a plan is pure and keyed by meaning; what is finished stays; a run that was killed equals one that was not."""

import dataclasses
import importlib
import json
import linecache
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy
import pytest
import torch

from robustsoup.catalog import SOUP_METHODS
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import Leakage, check_leakage
from robustsoup.cli.tables import print_results
from robustsoup.data import load_data
from robustsoup.diagnosis.landscape import landscape
from robustsoup.errors import (
    CheckpointError,
    DataError,
    Diverged,
    LeakageError,
    ModelError,
    StorageError,
)
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.models import NetworkSettings, load_model
from robustsoup.recipes import load_recipe, parse_recipe, slug
from robustsoup.recipes.sections import METHOD_KEYS
from robustsoup.runs.execute import StepClock
from robustsoup.runs.results import Results
from robustsoup.runs.run import prepare_run, run_prepared
from robustsoup.runs.soup_rows import SOUP_PLANNERS, plan_recipe
from robustsoup.runs.store import Store
from robustsoup.soups.coefficients import Coefficients, load_coefficients
from robustsoup.soups.mixing import mix
from robustsoup.soups.screening import EvaluationRequest
from robustsoup.training.train import train

TINY = """
name = "tiny"
data = "digits"
model = "resnet9:width=2"
precision = "float32"

[pretrain]
threat = "Linf 32/255"
epochs = 4
lr = 0.2
schedule = "cosine"
early_stop = { steps = 2, samples = 64 }

[finetune]
epochs = 2
lr = 0.05

[ingredients]
low = { threat = "Linf 16/255" }
high = { threat = "Linf 64/255" }

[soups.grid]
method = "grid"
step = 0.5

[soups.learned]
method = "learned"
threats = ["Linf 32/255"]
epochs = 2

[evaluate]
threats = ["Linf 32/255"]
steps = 3
select_samples = 64
report_samples = 64

[select]
require = ["clean>=0.01"]
"""
DATA = load_data("digits")
MODEL = NetworkSettings("resnet9:width=2", classes=10, channels=1)
ROWS = ["pretrained", "low", "high", "grid-0-1", "grid-0.5-0.5", "grid-1-0", "learned-linf-32-255"]


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self, stop_after=None):
        self.missing, self.done, self.shares, self.warned, self.stop_after = (
            [],
            [],
            [],
            [],
            stop_after,
        )

    def begin(self, plan, missing):
        self.missing.append([(step.kind, step.name) for step in missing])

    def progress(self, step, done, total, figures):
        self.shares.append(done / total)

    def warn(self, text):
        self.warned.append(text)

    def finished(self, step, figures, seconds):
        assert figures
        assert seconds >= 0
        self.done.append((step.kind, step.name))
        if len(self.done) == self.stop_after:
            raise KeyboardInterrupt


def recipe_of(changes=(), text=TINY):
    """The tiny recipe with some values replaced: (("finetune", "epochs"), 3)."""
    content = tomllib.loads(text)
    for place, value in changes:
        table = content
        for name in place[:-1]:
            table = table.setdefault(name, {})
        table[place[-1]] = value
    return parse_recipe(content, "tiny", Path("/nowhere"))


def plan_of(*changes, precision="float32"):
    return plan_recipe(recipe_of(changes), DATA, MODEL, precision).plan


def tree(folder):
    """Every file below a folder, and when it was last changed."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def leftovers(folder):
    return [
        str(p)
        for p in Path(folder).rglob("*")
        if p.name.startswith(".") or p.suffix in (".tmp", ".partial", ".lock", ".pt")
    ]


def run(recipe, folder, told=None):
    told = told or Told()
    results, selection = run_prepared(prepare_run(recipe, device="cpu"), folder, told)
    assert Results.load(folder / "results.json") == results
    return results.to_json(), selection, told


# plan


def keys(plan):
    return {(step.kind, step.name): step.key for step in plan.steps}


def test_a_plan_writes_nothing_and_draws_nothing(tmp_path, monkeypatch):
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


def test_the_same_recipe_has_the_same_keys_in_another_process_too(tmp_path):
    assert keys(plan_of()) == keys(plan_of())
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    script = "import sys, json; from robustsoup.recipes import load_recipe; from robustsoup.runs.run import prepare_run; "
    script += "print(json.dumps([s.key for s in prepare_run(load_recipe(sys.argv[1]), device='cpu').plan.steps]))"
    env = {**os.environ, "PYTHONHASHSEED": "7", "ROBUSTSOUP_STORE": str(tmp_path / "store")}
    told = subprocess.run(
        [sys.executable, "-c", script, path], env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(told.stdout) == list(keys(plan_of()).values())


def test_another_function_of_one_name_has_another_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    change, seen = (("ingredients", "low", "objective"), "own_loss_of_runs:loss"), set()
    for factor in (1, 2):
        source = f"from robustsoup.attacks.losses import ce\ndef loss(clean, attacked, y):\n    return {factor} * ce(attacked, y)\n"
        (tmp_path / "own_loss_of_runs.py").write_text(source)
        linecache.clearcache()
        importlib.invalidate_caches()
        sys.modules.pop("own_loss_of_runs", None)
        seen.add(keys(plan_of(change))["finetune", "low"])
        assert keys(plan_of(change))["finetune", "low"] in seen
    assert len(seen) == 2


def test_synthetic_images_are_in_the_key_by_their_content(tmp_path):
    train, found = load_data("digits").train.first(200), []
    images = train.images.permute(0, 2, 3, 1).numpy().copy()
    for place, last in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / place).mkdir()
        images[-1, 0, 0, 0] = last
        numpy.savez(tmp_path / place / "made.npz", image=images, label=train.labels.numpy())
        found.append(keys(plan_of((("pretrain", "synthetic"), str(tmp_path / place / "made.npz")))))
    assert found[0] == found[1]
    assert all(found[0][step] != found[2][step] != keys(plan_of())[step] for step in found[0])


def test_a_run_with_all_methods_of_training(tmp_path):
    train = load_data("digits").train.first(200)
    path = tmp_path / "made.npz"
    numpy.savez(path, image=train.images.permute(0, 2, 3, 1).numpy(), label=train.labels.numpy())
    ways = {
        "synthetic": str(path),
        "synthetic_fraction": 0.5,
        "ema": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "weight_decay_bn": False,
        "label_smoothing": 0.1,
        "clip_grad": 1.0,
        "objective": "trades 5",
        "schedule": "one-cycle",
    }
    changes = [(("pretrain", key), value) for key, value in ways.items()]
    changes += [
        (("ingredients", "high", "objective"), "trades"),
        (("soups", "learned", "objectives"), ["trades 2"]),
    ]
    results, _, _ = run(recipe_of(changes), tmp_path / "run")
    record = Checkpoint.load(tmp_path / "run" / "checkpoints" / "pretrained.safetensors").provenance
    kept = {key: value for key, value in ways.items() if key != "synthetic"}
    assert kept.items() <= record["training"].items()
    assert record["training"]["synthetic"] == record["synthetic"][0]["digest"]
    assert {row["objective"] for row in results["rows"]} >= {"trades", "trades 2", "ce"}


def test_a_one_hot_grid_point_is_its_ingredient():
    plan = plan_of()
    rows = {row.name: row for row in plan.rows}
    assert rows["grid-1-0"].network == rows["low"].network
    assert rows["grid-1-0"].val == rows["low"].val
    assert rows["grid-0-1"].test == rows["high"].test
    assert [name for kind, name in keys(plan) if kind == "mix"] == [
        "grid-0.5-0.5",
        "learned-linf-32-255",
    ]


SOUPS = {"grid-0.5-0.5", "learned-linf-32-255"}
EVERY = {"pretrained", "low", "high", *SOUPS}
LEARNED = ("soups", "learned")


@pytest.mark.parametrize(
    ("change", "changed", "judged_only"),
    [
        ((("name",), "other"), set(), False),
        ((("report", "figures"), []), set(), False),
        ((("select", "require"), []), set(), False),
        ((("pretrain", "lr"), 0.3), EVERY, False),
        ((("pretrain", "early_stop", "steps"), 3), EVERY, False),
        ((("finetune", "epochs"), 3), EVERY - {"pretrained"}, False),
        ((("finetune", "seed"), 1), EVERY - {"pretrained"}, False),
        ((("finetune", "label_smoothing"), 0.1), EVERY - {"pretrained"}, False),
        ((("finetune", "ema"), 0.0), set(), False),
        ((("pretrain", "ema"), 0.5), EVERY, False),
        ((("pretrain", "weight_decay_bn"), True), set(), False),
        ((("ingredients", "low", "nesterov"), True), {"low", *SOUPS}, False),
        ((("ingredients", "low", "objective"), "trades"), {"low", *SOUPS}, False),
        ((("ingredients", "high", "threat"), "L2 1.0"), {"high", *SOUPS}, False),
        ((("ingredients", "low", "lr"), 0.01), {"low", *SOUPS}, False),
        (((*LEARNED, "lr"), 5.0), {"learned-linf-32-255"}, False),
        (((*LEARNED, "detach"), 0.5), {"learned-linf-32-255"}, False),
        (((*LEARNED, "buffers"), "average"), {"mixed learned-linf-32-255"}, False),
        ((("soups", "grid", "buffers"), "recalibrate"), {"mixed grid-0.5-0.5"}, False),
        ((("seed",), 1), EVERY, False),
        ((("evaluate", "steps"), 4), EVERY, True),
        ((("evaluate", "seed"), 4), EVERY, True),
        ((("evaluate", "select_samples"), 65), {"val"}, True),
        ((("evaluate", "report_samples"), 65), {"test"}, True),
    ],
)
def test_a_setting_changes_exactly_the_keys_of_what_depends_on_it(change, changed, judged_only):
    before, after = keys(plan_of()), keys(plan_of(change))

    def depends(kind, name):
        made = name.rpartition(".")[0] if kind == "evaluate" else name
        if judged_only:
            return kind == "evaluate" and (made in changed or name.rpartition(".")[2] in changed)
        return made in changed or (f"mixed {made}" in changed and kind in ("mix", "evaluate"))

    for step in before:
        assert (before[step] != after.get(step, before[step])) == depends(*step), step
    new = {step for step in after if step not in before}
    assert all(
        "grid-" in name for _, name in new
    )  # with other buffers a one-hot point is mixed too
    assert bool(new) == (change[0] == ("soups", "grid", "buffers"))


OWN = """
import torch

def net(classes, channels):  # of one layer
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * channels, classes))
"""


def test_the_code_of_ones_own_network_is_in_the_keys_of_all_that_it_made(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_network_of_the_keys.py"

    def planned(code):
        file.write_text(code)
        return keys(
            plan_recipe(
                recipe_of(()),
                DATA,
                dataclasses.replace(MODEL, spec="own_network_of_the_keys:net"),
                "float32",
            ).plan
        )

    before = planned(OWN)
    assert planned(OWN.replace("of one layer", "of a single layer") + "\n\n") == before
    after = planned(OWN.replace("torch.nn.Flatten()", "torch.nn.Flatten(), torch.nn.Identity()"))
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


# plan, by the paper's protocol


def test_by_the_papers_protocol_ingredients_see_everything_and_test_selects():
    before, after = plan_of(), plan_of((("protocol",), "paper"))
    assert (
        keys(after)["pretrain", "pretrained"] == keys(before)["pretrain", "pretrained"]
    )  # it is early-stopped on val
    for name in ("low", "high"):
        step = after.step(keys(after)["finetune", name])
        assert step.task.fits_on_val
        assert step.passes > before.step(keys(before)["finetune", name]).passes
    for row in after.rows:
        assert row.val == row.test
        assert after.step(row.test).task.settings.split == "test"


def test_as_many_soups_as_are_asked_for_are_planned():
    changes = (("soups", "grid", "step"), 0.0004), (("soups", "grid", "max_soups"), 2501)
    assert sum(row.name.startswith("grid-") for row in plan_of(*changes).rows) == 2501


# plan, with screening


SCREENED = [
    (("evaluate", "screen"), True),
    (("evaluate", "screen_steps"), 2),
    (("soups", "grid", "step"), 0.25),
]


def steps_of(plan):
    return {(step.kind, step.name): step for step in plan.steps}


def test_screened_soups_get_the_ingredients_points_and_a_short_attack():
    plan = plan_of(*SCREENED)
    steps, made = steps_of(plan), keys(plan)
    pool = tuple(made["evaluate", f"{name}.pool.val"] for name in ("low", "high"))
    for name in ("low", "high"):
        task = steps["evaluate", f"{name}.pool.val"].task
        assert task.parents == (made["finetune", name],)
        assert (task.keep_points, task.settings.attack.steps, task.pool) == (True, 3, ())
        task = steps["evaluate", f"{name}.val"].task
        assert task.parents == (made["finetune", name], *pool)
        assert (task.after, task.short) == (made["evaluate", f"{name}.pool.val"], False)
    for name in ("grid-0.25-0.75", "grid-0.5-0.5", "grid-0.75-0.25"):
        task = steps["evaluate", f"{name}.val"].task
        assert task.parents == (made["mix", name], *pool)
        assert (task.settings.attack.steps, task.settings.attack.restarts) == (2, 1)
        assert (task.short, task.pool, task.after) == (True, pool, None)
    # A learned soup is the only one of its kind: there is nothing to screen it against.
    task = steps["evaluate", "learned-linf-32-255.val"].task
    assert (task.short, task.settings.attack.steps, task.pool) == (False, 3, pool)
    assert plan.row("grid-1-0").val == plan.row("low").val
    for step in plan.steps:
        if step.name.endswith(".test"):
            assert (step.task.pool, step.task.after, step.task.short) == ((), None, False)


def test_screening_changes_the_keys_of_what_selects_and_of_nothing_else():
    before, after = keys(plan_of(SCREENED[2])), keys(plan_of(*SCREENED))
    changed = {step for step in before if before[step] != after[step]}
    assert changed == {step for step in before if step[1].endswith(".val")}
    assert set(after) - set(before) == {
        ("evaluate", f"{name}.pool.val") for name in ("low", "high")
    }
    shorter = keys(plan_of(*SCREENED, (("evaluate", "screen_steps"), 1)))
    changed = {name for kind, name in after if after[kind, name] != shorter[kind, name]}
    assert changed == {"grid-0.25-0.75.val", "grid-0.5-0.5.val", "grid-0.75-0.25.val"}


def test_a_confirmation_starts_from_the_screening():
    planner = plan_recipe(recipe_of(SCREENED), DATA, MODEL, "float32")
    plan = planner.plan
    steps, rows, name = plan.steps, plan.rows, "grid-0.5-0.5"
    first = planner.screening().first_request(planner.contender(plan.row(name)))
    request = EvaluationRequest(name, pool=first.pool, after=first, stop_below=7)
    key = planner.add_confirmation(request)
    assert plan.steps[:-1] == steps
    (step,) = plan.steps[len(steps) :]
    before = next(row for row in rows if row.name == name)
    assert (plan.row(name).val, step.key, step.name) == (key, key, "grid-0.5-0.5.val")
    task = step.task
    assert (task.after, task.settings.attack.steps, task.short) == (before.val, 3, False)
    assert (task.stop_below, task.attacked_before) == (7, False)
    assert task.pool == plan.step(before.val).task.pool
    assert set(task.parents) == {before.network, before.val, *task.pool}
    assert [row for row in plan.rows if row.name != name] == [r for r in rows if r.name != name]


def test_methods_that_need_more_than_coefficients_have_planners():
    needing = [name for name, entry in SOUP_METHODS.items() if entry.facts.get("needs")]
    assert list(SOUP_PLANNERS) == needing
    assert list(METHOD_KEYS) == list(SOUP_METHODS)


def test_the_soups_of_a_users_method_are_planned_as_a_grid_and_screened(tmp_path, monkeypatch):
    (tmp_path / "my_soups.py").write_text("def thirds(*_):\n    return [[1 / 3, 2 / 3]]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    method = (("soups", "mine"), {"method": "my_soups:thirds"})
    plan = plan_of(method, (("evaluate", "screen"), True))
    (row,) = [row for row in plan.rows if row.soup == "mine"]
    assert (row.name, row.role) == ("mine-0.333333-0.666667", "grid")
    assert row.coefficients == (1 / 3, 2 / 3)
    assert plan.step(row.val).task.short


def test_data_network_and_precision_are_in_every_training_key():
    before = keys(plan_of())
    other_data = plan_recipe(recipe_of(), load_data("digits", seed=1), MODEL, "float32").plan
    other_model = plan_recipe(
        recipe_of(), DATA, dataclasses.replace(MODEL, spec="resnet9:width=4"), "float32"
    ).plan
    for after in (keys(other_data), keys(other_model)):
        assert not set(before.values()) & set(after.values())
    bfloat = keys(plan_of(precision="bfloat16"))
    assert all(before[step] != bfloat[step] for step in before)


def test_names_for_files():
    assert slug("Linf 8/255") == "linf-8-255"
    assert slug("mixed 0.4") == "mixed-0.4"


# a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run from its beginning to its end, on one thread: (folder, store, results, selection, what was told)."""
    place, threads = tmp_path_factory.mktemp("finished"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTSOUP_STORE", str(place / "store"))
        results, selection, told = run(recipe_of(), place / "run")
    torch.set_num_threads(threads)
    return place / "run", place / "store", results, selection, told


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """The finished run and its store, to do with as one likes."""
    folder, store, *_ = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "run", tmp_path / "store"


def test_a_run_does_every_step_once(finished):
    told = finished[4]
    assert told.missing == [told.done]
    assert told.done == list(keys(plan_of()))
    assert 0 < min(told.shares) <= max(told.shares) == 1


def test_results_are_complete(finished):
    folder, _, results, selection, _ = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [row["name"] for row in results["rows"]] == ROWS
    assert [row["role"] for row in results["rows"]] == [
        "pretrained",
        "ingredient",
        "ingredient",
        *["grid"] * 3,
        "learned",
    ]
    for row in results["rows"]:
        for split in ("val", "test"):
            assert row[split].keys() == {"clean", "Linf 32/255"}
            for accuracy in row[split].values():
                assert accuracy["n"] == 64
                assert (
                    0
                    <= accuracy["low"]
                    <= accuracy["value"]
                    == accuracy["hits"] / 64
                    <= accuracy["high"]
                    <= 1
                )
            assert row[split]["Linf 32/255"]["hits"] <= row[split]["clean"]["hits"]
    assert results["data"] == DATA.record
    assert results["leakage"] == {"status": "known", "why": ""}
    assert results["protocol"]["samples"] == {"val": 64, "test": 64}
    assert (results["protocol"]["steps"], results["protocol"]["threats"]) == (3, ["Linf 32/255"])
    assert results["versions"]["threads"] == 1
    assert results["selection"]["chosen"] == selection.best.name
    assert results["selection"]["met"] is True
    assert load_recipe(folder / "recipe.toml") == recipe_of()


def test_every_file_that_the_results_name_is_there_and_whole(finished):
    folder, _, results, _, _ = finished
    for row in results["rows"]:
        checkpoint = Checkpoint.load(folder / row["checkpoint"])
        for split in ("val", "test"):
            stored = Evaluation.load(folder / "evaluations" / f"{row['name']}.{split}.json")
            assert stored.record["checkpoint"] == checkpoint.digest
            assert stored.to_json()["accuracy"] == row[split]
    assert leftovers(folder) == []
    learned = results["rows"][-1]
    alpha = Coefficients.load(folder / learned["coefficients_file"])
    items = [
        Checkpoint.load(folder / "checkpoints" / f"{name}.safetensors") for name in ("low", "high")
    ]
    assert alpha.ingredients == tuple(item.digest for item in items)
    assert (
        mix(items, alpha, buffers="tracked").digest
        == Checkpoint.load(folder / learned["checkpoint"]).digest
    )
    half = mix(items, [0.5, 0.5], buffers="average").digest
    assert half == Checkpoint.load(folder / "checkpoints" / "grid-0.5-0.5.safetensors").digest


def test_the_figures_are_those_of_evaluate(finished):
    folder, _, results, _, _ = finished
    row = results["rows"][-1]
    again = evaluate(
        folder / row["checkpoint"], DATA.test, ["Linf 32/255"], steps=3, samples=64, device="cpu"
    )
    assert again.to_json()["accuracy"] == row["test"]


def test_the_chosen_soup_is_the_best_on_val_and_lies_in_the_folder(finished):
    folder, _, results, selection, _ = finished
    soups = [row for row in results["rows"] if row["role"] in ("grid", "learned")]
    best = max(
        soups, key=lambda row: (row["val"]["Linf 32/255"]["value"], row["val"]["clean"]["value"])
    )
    chosen = next(row for row in soups if row["name"] == selection.best.name)
    assert chosen["val"] == best["val"]
    soup = Checkpoint.load(folder / results["soup"])
    assert soup.digest == Checkpoint.load(folder / chosen["checkpoint"]).digest


def test_provenance_leads_back_to_the_data(finished):
    folder = finished[0]
    soup = Checkpoint.load(folder / "checkpoints" / "grid-0.5-0.5.safetensors").provenance
    base, low, high = (
        Checkpoint.load(folder / "checkpoints" / f"{n}.safetensors")
        for n in ("pretrained", "low", "high")
    )
    assert [parent["digest"] for parent in soup["parents"]] == [low.digest, high.digest]
    assert (
        low.provenance["parents"][0]["digest"]
        == high.provenance["parents"][0]["digest"]
        == base.digest
    )
    for record in (soup, low.provenance, base.provenance):
        assert (record["data"], record["trained_on"]) == (DATA.record, ["train"])
    assert base.provenance["early_stopped_at"] in (1, 2, 3, 4)


def test_running_again_does_nothing(copied):
    folder, store = copied
    run(recipe_of(), folder)  # what was copied is linked anew
    before = tree(store), tree(folder / "checkpoints"), tree(folder / "evaluations")
    results, _, told = run(recipe_of(), folder)
    assert (told.missing, told.done) == ([[]], [])
    assert before == (tree(store), tree(folder / "checkpoints"), tree(folder / "evaluations"))
    assert [row["name"] for row in results["rows"]] == ROWS
    assert leftovers(folder) == leftovers(store) == []


def test_two_recipes_share_what_they_have_in_common(copied):
    folder, store = copied
    before = tree(store)
    more = recipe_of(
        [
            (("name",), "more"),
            (("soups", "flat"), {"method": "uniform"}),
            (("ingredients", "high", "seed"), 0),
        ]
    )
    results, _, told = run(more, folder.parent / "more")
    assert told.done == []  # 1/2 and 1/2 was a point of the grid, and seed 0 is the recipe's
    other = recipe_of([(("name",), "other"), ((*LEARNED, "threats"), ["Linf 32/255", "clean"])])
    _, _, told = run(other, folder.parent / "other")
    assert told.done == [
        ("learn", "learned-clean"),
        ("mix", "learned-clean"),
        ("evaluate", "learned-clean.val"),
        ("evaluate", "learned-clean.test"),
    ]
    assert before.items() <= tree(store).items()
    assert results["rows"][-1]["val"] == results["rows"][4]["val"]


def test_by_the_papers_protocol_soups_are_learned_of_whatever_fits_on_less(copied):
    """The pre-trained network is stopped on val, and so saw another split than its soup is learned on."""
    mixed = recipe_of(
        [(("protocol",), "paper"), (("soups", "learned", "ingredients"), ["pretrained", "low"])]
    )
    folder, _ = copied
    results, _, _ = run(mixed, folder.with_name("fits-on-less"))
    assert any(row["role"] == "learned" for row in results["rows"])


def test_a_run_by_the_papers_protocol_says_so(copied, capsys, monkeypatch):
    folder, _ = copied
    results, selection, _ = run(recipe_of([(("protocol",), "paper")]), folder.with_name("paper"))
    assert results["protocol"]["select_on"] == results["protocol"]["report_on"] == "test"
    assert all(row["val"] is None and row["test"]["clean"]["n"] == 64 for row in results["rows"])
    low = Checkpoint.load(folder.with_name("paper") / "checkpoints" / "low.safetensors")
    assert low.provenance["data"]["val"] == 0
    assert low.provenance["data"]["split_digest"] != DATA.record["split_digest"]
    assert selection.best.evaluation.accuracy["clean"].n == 64
    with pytest.raises(LeakageError, match="trained on another split"):
        check_leakage([low], DATA.val)
    assert results["selection"]["require"]
    assert (
        results["selection"]["held_on_test"] is None
    )  # the samples that chose it cannot confirm it
    monkeypatch.setenv("COLUMNS", "200")
    print_results(Results.from_json(results, "results"), folder / "report.html")
    assert "the paper's protocol: selected on test" in capsys.readouterr().out


def test_one_run_leaves_several_ingredients(copied):
    folder, _ = copied
    changes = [
        (("ingredients",), {"run": {"epochs": 4, "checkpoint_every": 2}}),
        (("soups",), {}),
        (("select",), {}),
    ]
    _, _, told = run(recipe_of(changes), folder.with_name("continuous"))
    assert [name for kind, name in told.done if kind in ("finetune", "snapshot")] == [
        "run",
        "run-2",
        "run-4",
    ]
    first, last = (
        Checkpoint.load(folder.with_name("continuous") / "checkpoints" / f"run-{n}.safetensors")
        for n in (2, 4)
    )
    assert (first.provenance["epoch"], last.provenance["epoch"]) == (2, 4)
    assert len(first.provenance["history"]) == 2
    plain = [(("ingredients",), {"run": {"epochs": 4}}), (("soups",), {}), (("select",), {})]
    run(recipe_of(plain), folder.with_name("plain"))
    whole = Checkpoint.load(folder.with_name("plain") / "checkpoints" / "run.safetensors")
    assert whole.digest == last.digest != first.digest


def test_whose_statistics_a_soup_has_is_in_its_key(tmp_path):
    """The file that all were fine-tuned from is found beside them, or is not."""
    base = Checkpoint.of(load_model("resnet9:width=2", channels=1, seed=9))
    made = []
    for where in (tmp_path / "alone", tmp_path / "beside"):
        where.mkdir()
        for seed in range(2):
            item = Checkpoint.of(load_model("resnet9:width=2", channels=1, seed=seed))
            item.with_provenance(
                parents=[{"digest": base.digest, "file": "base.safetensors"}]
            ).save(where / f"{seed}.safetensors")
        if where.name == "beside":
            base.save(where / "base.safetensors")
        recipe = recipe_of(
            [
                (("pretrain",), None),
                (("finetune",), {}),
                (("soups",), {"flat": {"method": "uniform", "buffers": "base"}}),
                (
                    ("ingredients",),
                    {f"i{seed}": str(where / f"{seed}.safetensors") for seed in range(2)},
                ),
            ]
        )
        plan = plan_recipe(recipe, DATA, MODEL, "float32").plan
        made.append(
            (keys(plan)["mix", "flat"], plan.step(keys(plan)["mix", "flat"]).task.mixing.base)
        )
    assert made[0][0] != made[1][0]
    assert made[1][1] == f"file:{base.digest}"


def test_a_plane_costs_what_its_points_samples_and_steps_say():
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


def test_seconds_before_a_kill_count(tmp_path, monkeypatch):
    monkeypatch.setattr(StepClock, "SAVE_EVERY", 0.0)
    kept, told, step = tmp_path / "seconds.txt", Told(), plan_of().steps[0]
    killed = StepClock(kept, told, step)
    killed(1, 4, "")
    assert told.shares == [0.25]
    kept.write_text(f"{float(kept.read_text()) + 100:.3f}")  # as if it had worked so long
    assert 100 < StepClock(kept, told, step).stop() < 200
    assert not kept.exists()
    assert StepClock(kept, told, step).stop() < 100


def test_nothing_that_is_fitted_depends_on_test(tmp_path, monkeypatch):
    """Other test images, other verdicts on them, and every network bit for bit the same."""
    changes = [
        (("finetune", "early_stop"), {"steps": 1, "samples": 32}),
        (("soups", "grid", "buffers"), "recalibrate"),
        (("soups", "grid", "calibrate_samples"), 64),
        (("soups", "learned", "early_stop"), {"steps": 1, "samples": 32}),
        (
            ("planes",),
            {
                "p": {
                    "checkpoints": ["pretrained", "low", "high"],
                    "points": 2,
                    "samples": 16,
                    "attack_steps": 1,
                    "calibrate_samples": 64,
                }
            },
        ),
    ]
    noise = torch.randint(
        256, DATA.test.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    other = dataclasses.replace(DATA, test=dataclasses.replace(DATA.test, images=noise))
    calibrated, found = [], []

    def watched(*given, calibrate_on, **more):
        calibrated.append(calibrate_on.digest)
        return landscape(*given, calibrate_on=calibrate_on, **more)

    monkeypatch.setattr("robustsoup.runs.worker.landscape", watched)
    for name, data in (("own", DATA), ("noise", other)):
        monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / f"store-{name}"))
        monkeypatch.setattr("robustsoup.runs.run.load_data", lambda *given, data=data, **more: data)
        results, _, _ = run(recipe_of(changes), tmp_path / name)
        made = sorted((tmp_path / name / "checkpoints").glob("*.safetensors"))
        found.append(
            ({file.name: Checkpoint.load(file).digest for file in made}, results["rows"][0]["test"])
        )
    assert len(found[0][0]) == 7
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
    assert calibrated == [DATA.train.digest] * 2


def test_more_samples_than_there_are_is_said_before_any_work():
    for place, said in (
        (("evaluate", "report_samples"), "test"),
        (("pretrain", "early_stop", "samples"), "val"),
        (("soups", "learned", "early_stop"), "val"),
    ):
        value = {"samples": 100_000} if place[-1] == "early_stop" else 100_000
        with pytest.raises(
            DataError, match=rf"digits {said}: requested 100000 samples, expected 1 to"
        ):
            plan_of((place, value))


def test_a_folder_keeps_no_numbers_of_other_settings(copied):
    folder, _ = copied
    run(recipe_of([(("name",), "once")]), folder.with_name("twice"))
    assert (folder.with_name("twice") / "evaluations" / "low.val.json").exists()
    (folder.with_name("twice") / "evaluations" / "mine.json").write_text("{}")
    run(recipe_of([(("protocol",), "paper")]), folder.with_name("twice"))
    left = sorted(file.name for file in (folder.with_name("twice") / "evaluations").glob("*.json"))
    assert left == sorted(["mine.json", *(f"{name}.test.json" for name in ROWS)])


def test_a_plane_alone_looks_at_test_alone(copied):
    """Networks that saw val may be mapped: nothing selects on it."""
    folder, _ = copied
    made = [
        train(
            load_model("resnet9:width=2", channels=1, seed=seed),
            DATA.unsplit().first(64),
            threat="clean",
            epochs=1,
            lr=0.1,
            device="cpu",
        )
        for seed in range(3)
    ]
    for seed, network in enumerate(made):
        network.save(folder / f"saw{seed}.safetensors")
    names = [f"saw{seed}" for seed in range(3)]
    mapped = {
        "name": "mapped",
        "data": "digits",
        "model": "resnet9:width=2",
        "evaluate": {"threats": []},
        "ingredients": {name: str(folder / f"{name}.safetensors") for name in names},
        "planes": {
            "p": {
                "checkpoints": names,
                "threat": "clean",
                "points": 2,
                "samples": 16,
                "calibrate_samples": 32,
            }
        },
    }
    assert (
        prepare_run(parse_recipe(mapped, "mapped", Path("/nowhere")), device="cpu").leakage.status
        == "known"
    )
    with pytest.raises(LeakageError, match="another split"):
        prepare_run(
            parse_recipe(mapped | {"select": {"maximise": "clean"}}, "mapped", Path("/nowhere")),
            device="cpu",
        )


def test_a_run_judges_planes_once(copied):
    folder, _ = copied
    plane = {
        "checkpoints": ["pretrained", "low", "high"],
        "points": 2,
        "samples": 32,
        "attack_steps": 1,
        "calibrate_samples": 32,
    }
    recipe = recipe_of([(("planes",), {"far": plane})])
    results, _, told = run(recipe, folder)
    assert told.done == [("plane", "far")]
    (entry,) = results["planes"]
    found = json.loads((folder / entry["file"]).read_text())
    assert found["checkpoints"] == entry["checkpoints"] == ["pretrained", "low", "high"]
    assert len(found["loss"]) == len(found["loss"][0]) == 2
    assert run(recipe, folder)[2].done == []


def test_what_is_finished_stays_when_a_run_is_interrupted(tmp_path):
    told = Told(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(), tmp_path / "run", told)
    assert not (tmp_path / "run" / "results.json").exists()
    _, _, second = run(recipe_of(), tmp_path / "run")
    assert second.missing == [list(keys(plan_of()))[3:]]
    assert told.done + second.done == list(keys(plan_of()))


def test_a_failing_step_is_named_and_what_came_before_is_kept(tmp_path):
    wild = recipe_of([(("ingredients", "high", "lr"), 1e30)])
    with pytest.raises(Diverged, match=r"^high: train: the loss became"):
        run(wild, tmp_path / "run")
    _, _, told = run(recipe_of(), tmp_path / "run")
    assert ("pretrain", "pretrained") not in told.done
    assert ("finetune", "low") not in told.done
    assert ("finetune", "high") in told.done


def test_a_step_that_is_cut_short_is_not_taken_for_finished(copied):
    folder, store = copied
    plan = plan_of()
    step = next(s for s in plan.steps if s.name == "low")
    place = Store(store).path(step.key)
    (place / "step.json").unlink()
    (place / "checkpoint.safetensors").write_bytes(b"half")
    _, _, told = run(recipe_of(), folder)
    assert told.done == [("finetune", "low")]
    assert Checkpoint.load(folder / "checkpoints" / "low.safetensors")


def test_only_the_chosen_soup_is_judged_on_test_if_the_recipe_says_so(copied):
    folder, _ = copied
    results, selection, told = run(
        recipe_of([(("evaluate", "report"), "chosen")]), folder.parent / "chosen"
    )
    assert told.done == []
    assert [row["name"] for row in results["rows"] if row["test"]] == [selection.best.name]
    assert results["selection"]["held_on_test"] in (True, False)


def test_a_requirement_that_nothing_meets_is_an_answer(copied):
    folder, _ = copied
    results, selection, told = run(
        recipe_of([(("select", "require"), ["clean>=0.999"])]), folder.parent / "none"
    )
    assert (told.done, selection.met, results["selection"]["met"]) == ([], False, False)
    assert results["selection"]["message"].startswith("no candidate meets clean>=0.999")


@pytest.mark.parametrize("policy", ["base", "recalibrate", "recalibrate-adversarial"])
def test_every_policy_for_statistics_can_be_asked_for(copied, policy):
    folder, _ = copied
    changes = [(("soups", "grid", "buffers"), policy), ((*LEARNED, "buffers"), policy)]
    results, _, _ = run(recipe_of(changes), folder.parent / policy)
    for row in results["rows"][3:]:
        record = Checkpoint.load(folder.parent / policy / row["checkpoint"]).provenance["buffers"]
        assert record["policy"] == policy
        assert (policy == "recalibrate-adversarial") == (record.get("threat", "clean") != "clean")


GREEDY = [(("soups", "greedy"), {"method": "greedy", "score": "0.5 clean + 0.5 Linf 32/255"})]
DIAL = [
    (("soups", "dial"), {"method": "dial", "threats": ["Linf 32/255"], "epochs": 2, "at": [0, 1]})
]


def test_a_greedy_soup_in_a_run_shares_the_verdicts_of_its_ingredients(copied):
    folder, _ = copied
    results, _, told = run(recipe_of(GREEDY), folder.parent / "greedy")
    assert [step for step in told.done if step[0] == "greedy"] == [("greedy", "greedy")]
    assert not [
        step for step in told.done if step[0] == "evaluate" and not step[1].startswith("greedy.")
    ]
    row = next(row for row in results["rows"] if row["role"] == "greedy")
    alpha = Coefficients.load(folder.parent / "greedy" / row["coefficients_file"])
    assert row["coefficients"] == alpha.alpha[0].tolist()
    tried = alpha.record["greedy"]["tried"]
    assert alpha.record["greedy"]["split"] == "val"
    kept = {tuple(entry["alpha"]): entry["score"] for entry in tried}
    assert set(kept) == {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}
    judged = {row["name"]: row["val"] for row in results["rows"]}
    for name, key in (
        ("low", (1.0, 0.0)),
        ("high", (0.0, 1.0)),
        ("grid-0.5-0.5", (0.5, 0.5)),
        ("greedy", tuple(tried[-1]["alpha"])),
    ):
        scores = judged[name]
        assert kept[key] == pytest.approx(
            0.5 * scores["clean"]["value"] + 0.5 * scores["Linf 32/255"]["value"]
        ), name
    best = max(kept[1.0, 0.0], kept[0.0, 1.0])
    assert tried[-1]["score"] == (kept[0.5, 0.5] if kept[0.5, 0.5] >= best else best)


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("base", {}),
        ("recalibrate", {"calibrate_samples": 40}),
        ("recalibrate-adversarial", {"calibrate_threat": "Linf 64/255"}),
    ],
)
def test_a_greedy_soup_is_judged_with_the_statistics_that_it_is_written_with(copied, policy, more):
    folder, _ = copied
    section = {"method": "greedy", "score": "clean", "buffers": policy, **more}
    results, _, _ = run(recipe_of([(("soups", "greedy"), section)]), folder.parent / policy)
    row = next(row for row in results["rows"] if row["role"] == "greedy")
    alpha = Coefficients.load(folder.parent / policy / row["coefficients_file"])
    assert len(alpha.record["greedy"]["tried"]) == 3
    assert alpha.record["greedy"]["tried"][-1]["score"] == row["val"]["clean"]["value"]
    assert (
        max(entry["score"] for entry in alpha.record["greedy"]["tried"][:2])
        <= row["val"]["clean"]["value"]
    )


def test_what_a_greedy_soup_is_mixed_with_is_in_its_key():
    def key(**more):
        section = {"method": "greedy", "buffers": "recalibrate", "calibrate_samples": 40} | more
        return keys(plan_of((("soups", "greedy"), section)))["greedy", "greedy"]

    assert len({key(), key(calibrate_samples=41), key(buffers="base"), key(buffers="average")}) == 4
    assert key() == key()


def test_a_killed_greedy_step_keeps_its_verdicts(copied, monkeypatch):
    folder, store = copied
    more = [
        *GREEDY,
        (("ingredients", "mid"), {"threat": "Linf 32/255", "epochs": 1}),
        (("soups", "grid", "ingredients"), ["low", "high"]),
    ]

    class Killer(Told):
        def progress(self, step, done, total, figures):
            if step.kind == "greedy" and done == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(more), folder.parent / "greedy", Killer())
    before = {p: p.stat().st_mtime_ns for p in Path(store).rglob("0*.json")}
    assert len(before) == 1
    run(recipe_of(more), folder.parent / "greedy")
    after = {p.name: p.stat().st_mtime_ns for p in Path(store).rglob("0*.json")}
    assert after[next(iter(before)).name] == next(iter(before.values()))
    assert len(after) == 2


def test_a_dial_in_a_run_is_learned_once_and_gives_a_row_for_each_turn(copied):
    folder, _ = copied
    results, _, told = run(recipe_of(DIAL), folder.parent / "dial")
    assert told.done[0] == ("dial", "dial Linf 32/255")
    assert [step for step in told.done if step[0] == "mix"] == [
        ("mix", "dial-t0"),
        ("mix", "dial-t1"),
    ]
    rows = [row for row in results["rows"] if row["role"] == "dial"]
    assert [(row["name"], row["at"]) for row in rows] == [("dial-t0", 0.0), ("dial-t1", 1.0)]
    dial = folder.parent / "dial" / "coefficients" / "dial-linf-32-255.dial.safetensors"
    items = [
        Checkpoint.load(folder / "checkpoints" / f"{name}.safetensors") for name in ("low", "high")
    ]
    for row in rows:
        alpha = load_coefficients(dial, row["at"])
        assert torch.equal(
            Coefficients.load(folder.parent / "dial" / row["coefficients_file"]).alpha, alpha.alpha
        )
        soup = mix(items, alpha, buffers="average")
        assert soup.digest == Checkpoint.load(folder.parent / "dial" / row["checkpoint"]).digest


def test_more_turns_of_a_dial_need_no_more_learning(copied):
    folder, _ = copied
    run(recipe_of(DIAL), folder.parent / "dial")
    _, _, told = run(
        recipe_of([*DIAL, (("soups", "dial", "at"), [0, 0.5, 1])]), folder.parent / "dial"
    )
    assert told.done == [
        ("mix", "dial-t0.5"),
        ("evaluate", "dial-t0.5.val"),
        ("evaluate", "dial-t0.5.test"),
    ]


def test_learning_in_a_run_can_stop_early_on_val(copied):
    folder, _ = copied
    changes = [
        ((*LEARNED, "early_stop"), {"samples": 32, "steps": 2}),
        ((*LEARNED, "granularity"), "block"),
    ]
    results, _, _ = run(recipe_of(changes), folder.parent / "stopped")
    alpha = Coefficients.load(folder.parent / "stopped" / results["rows"][-1]["coefficients_file"])
    assert alpha.record["early_stopped_at"] in (1, 2)
    assert [set(entry) for entry in alpha.record["history"]] == [{"epoch", "loss", "val_loss"}] * 2
    assert alpha.layers == (
        "prep",
        "layer1",
        "residual1",
        "layer2",
        "layer3",
        "residual3",
        "linear",
    )


# a whole run, screened


@pytest.fixture(scope="module")
def screened(finished, tmp_path_factory):
    """The tiny run again, on the store of the finished one, its soups screened: (folder, store, results, selection, told)."""
    place = tmp_path_factory.mktemp("screened")
    shutil.copytree(finished[1], place / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTSOUP_STORE", str(place / "store"))
        results, selection, told = run(recipe_of(SCREENED), place / "run")
    return place / "run", place / "store", results, selection, told


def test_a_screened_run_confirms_what_may_be_chosen_and_marks_the_rest(screened):
    folder, _, results, selection, told = screened
    assert results["protocol"]["screened"] is True
    rows = {row["name"]: row for row in results["rows"]}
    marked = {name for name, row in rows.items() if row.get("screened")}
    soups = {"grid-0.25-0.75", "grid-0.5-0.5", "grid-0.75-0.25"}
    confirmed_ = {name.removesuffix(".val") for _, name in told.missing[1]}
    assert marked == soups - confirmed_
    assert marked
    assert confirmed_
    assert selection.best.name not in marked
    assert selection.best.confirmed
    for name in soups:
        found = Evaluation.load(folder / "evaluations" / f"{name}.val.json")
        assert found.to_json()["accuracy"] == rows[name]["val"]
        assert found.record["steps"] == (2 if name in marked else 3)
        assert "pool" in found.record["broken_by"]
        test = Evaluation.load(
            folder / "evaluations" / f"{name}.test.json"
        ).record  # what is reported is judged in full
        assert (test["steps"], test.get("screened"), test["broken_by"]) == (
            3,
            None,
            ["clean", "apgd-ce"],
        )
    assert len(told.missing) == 2
    assert told.missing[0] + told.missing[1] == told.done
    assert load_recipe(folder / "recipe.toml") == recipe_of(SCREENED)
    assert leftovers(folder) == []


def test_a_screened_run_finds_no_more_than_a_full_one(screened, finished):
    full = {row["name"]: row["val"]["Linf 32/255"]["hits"] for row in finished[2]["rows"]}
    for row in screened[2]["rows"]:
        if row["name"] in full and not row.get("screened"):
            assert (
                row["val"]["Linf 32/255"]["hits"] <= full[row["name"]]
            )  # the pool comes on top of the attack
        assert row["val"]["clean"]["hits"] >= row["val"]["Linf 32/255"]["hits"]


def test_running_a_screened_run_again_does_nothing(screened, tmp_path):
    _, store, results, selection, _ = screened
    shutil.copytree(store, tmp_path / "store")
    before = tree(tmp_path / "store")
    again, chosen, told = run(recipe_of(SCREENED), tmp_path / "run")
    assert told.done == []
    assert told.missing == [[], []]
    assert tree(tmp_path / "store") == before
    assert again["rows"] == results["rows"]
    assert chosen.best.name == selection.best.name


def test_a_screened_run_may_report_the_chosen_soup_alone(screened, tmp_path):
    shutil.copytree(screened[1], tmp_path / "store")
    results, selection, told = run(
        recipe_of([*SCREENED, (("evaluate", "report"), "chosen")]), tmp_path / "run"
    )
    assert told.done == []
    assert [row["name"] for row in results["rows"] if row["test"]] == [selection.best.name]


def test_a_screened_run_cut_off_goes_on(finished, screened, tmp_path):
    shutil.copytree(finished[1], tmp_path / "store")
    for stop_after in (2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(recipe_of(SCREENED), tmp_path / "run", Told(stop_after))
    results, _, told = run(recipe_of(SCREENED), tmp_path / "run")
    assert 2 + 3 + 4 + len(told.done) == len(screened[4].done)
    assert results["rows"] == screened[2]["rows"]


def test_warnings_are_told_and_kept(files, tmp_path):
    """Logits times 10,000 leave cross-entropy no gradient."""
    for name in ("low", "high"):
        one = Checkpoint.load(files / f"{name}.safetensors")
        tensors = {**one.tensors, "linear.weight": one.tensors["linear.weight"] * 10_000}
        dataclasses.replace(one, tensors=tensors).save(files / f"{name}.safetensors")
    recipe = of_files(
        files,
        select={},
        evaluate={
            "threats": ["Linf 8/255"],
            "steps": 2,
            "select_samples": 64,
            "report_samples": 64,
        },
    )
    results, _, told = run(recipe, tmp_path / "run")
    assert told.warned
    assert all(": the gradient is exactly zero at the start for " in text for text in told.warned)
    assert any(text.startswith("low.val: ") for text in told.warned)
    for row in results["rows"]:
        kept = Evaluation.load(
            tmp_path / "run" / "evaluations" / f"{row['name']}.val.json"
        ).warnings
        assert set(kept) <= set(row["warnings"])
        assert kept


def test_points_are_kept_in_the_run_folder_if_asked_for(copied):
    folder, _ = copied
    results, _, _ = run(recipe_of([(("evaluate", "keep_points"), True)]), folder.parent / "points")
    for row in results["rows"]:
        found = Evaluation.load(
            folder.parent / "points" / "evaluations" / f"{row['name']}.test.json"
        )
        assert found.threats["Linf 32/255"].x_adv.shape == (64, 1, 8, 8)


# checkpoints that exist already


@pytest.fixture
def files(finished, tmp_path):
    for name in ("low", "high"):
        shutil.copy(finished[0] / "checkpoints" / f"{name}.safetensors", tmp_path)
    return tmp_path


def of_files(folder, **changes):
    content = {
        "name": "files",
        "data": "digits",
        "ingredients": {n: str(folder / f"{n}.safetensors") for n in ("low", "high")},
        "soups": {"grid": {"method": "grid", "step": 0.5}},
        "evaluate": {"threats": ["Linf 32/255"], "steps": 2},
    }
    return parse_recipe(content | changes, "files", folder)


def test_a_recipe_of_files_names_them_by_their_weights(files):
    before = keys(prepare_run(of_files(files), device="cpu").plan)
    moved = files / "moved"
    moved.mkdir()
    for name in ("low", "high"):
        (files / f"{name}.safetensors").rename(moved / f"{name}.safetensors")
    assert keys(prepare_run(of_files(moved), device="cpu").plan) == before
    shutil.copy(moved / "low.safetensors", moved / "high.safetensors")
    assert keys(prepare_run(of_files(moved), device="cpu").plan) != before


def test_ingredients_that_saw_the_judging_samples_are_refused(files):
    with pytest.raises(LeakageError, match=r"another split \(seed 0\).*allow-leakage"):
        prepare_run(of_files(files, seed=1), device="cpu")
    assert (
        prepare_run(of_files(files, seed=1, allow_leakage=True), device="cpu").leakage.status
        == "violated"
    )
    assert prepare_run(of_files(files), device="cpu").leakage == Leakage()
    low = Checkpoint.load(files / "low.safetensors")
    low.with_provenance(trained_on=["train", "val"]).save(files / "low.safetensors")
    with pytest.raises(LeakageError, match="was trained on the val split itself"):
        prepare_run(of_files(files), device="cpu")
    dataclasses.replace(low, provenance={"network": MODEL.as_record()}).save(
        files / "low.safetensors"
    )
    assert prepare_run(of_files(files), device="cpu").leakage.status == "unknown"


def test_an_ingredient_near_chance_is_refused_with_a_hint(files, tmp_path):
    random_weights = Checkpoint.of(load_model("resnet9:width=2", channels=1))
    random_weights.save(files / "low.safetensors")
    with pytest.raises(ModelError, match=r"near chance \(10\.0%\).*--normalize"):
        run(of_files(files), tmp_path / "run")


def test_a_missing_file_is_named(files):
    (files / "low.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"low\.safetensors: no such file"):
        prepare_run(of_files(files), device="cpu")


# the store


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StorageError, match="store cannot be written"):
        run(recipe_of(), tmp_path / "run")


def test_a_step_is_finished_or_not_there(tmp_path):
    store, key = Store(tmp_path), "ab12"

    def fail():
        with store.filling(key, {"kind": "x"}) as folder:
            (folder / "state.pt").write_text("so far")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert not store.has(key)
    assert not store.path(key).exists()
    with store.filling(key, {"kind": "x"}) as folder:
        assert (folder / "state.pt").read_text() == "so far"
        (folder / "out").write_text("done")
    assert store.has(key)
    assert {p.name for p in store.path(key).iterdir()} == {"out", "step.json"}
    assert json.loads((store.path(key) / "step.json").read_text()) == {"kind": "x"}
    with store.filling(key, {}) as folder:
        assert folder is None


# kill -9


def robustsoup(arguments, store, **more):
    env = {**os.environ, "ROBUSTSOUP_STORE": str(store), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "robustsoup", *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def outcome(folder):
    """What must not depend on kills: the table, the choice, and the digests of all checkpoints."""
    results = json.loads((folder / "results.json").read_text())
    digests = {
        p.name: Checkpoint.load(p).digest for p in sorted((folder / "checkpoints").iterdir())
    }
    return results["rows"], results["selection"], digests


def test_a_run_killed_at_random_moments_equals_one_that_was_not(finished, tmp_path):
    """Each kill falls some time after work began; the run that was not killed is `finished`, on one thread too."""
    (tmp_path / "tiny.toml").write_text(TINY)
    folder, store = tmp_path / "run", tmp_path / "store"
    arguments = [
        "run",
        tmp_path / "tiny.toml",
        "--threads",
        1,
        "-o",
        folder,
        "--set",
        "report.figures=[]",
    ]
    seed = random.SystemRandom().randrange(10**6)
    draw, killed = random.Random(seed), 0
    for _ in range(3):
        process, before = robustsoup(arguments, store), tree(tmp_path)
        while process.poll() is None and tree(tmp_path) == before:
            time.sleep(0.02)
        try:
            process.wait(draw.uniform(0, 0.7))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate()
    last = robustsoup(arguments, store)
    _, said = last.communicate(timeout=300)
    assert last.returncode == 0, (seed, said)
    assert killed > 0, seed
    assert outcome(folder) == outcome(finished[0]), seed
    assert leftovers(folder) == [], seed
    assert [p for p in leftovers(store) if not p.endswith(".lock")] == [], seed
    assert (folder / "report.html").exists()


def test_a_kill_while_a_result_is_written_leaves_nothing_half(finished, tmp_path):
    """SIGKILL between writing results.json and giving it its name: the old file stays, the next run tidies up."""
    shutil.copytree(finished[1], tmp_path / "store")
    (tmp_path / "tiny.toml").write_text(TINY)
    script = """
import os, signal, sys
from robustsoup import files
from robustsoup.cli import main

rename = os.replace
def replace(source, target):
    if str(target).endswith("results.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

files.os.replace = replace
main(sys.argv[1:])
"""
    arguments = ["run", tmp_path / "tiny.toml", "--threads", "1", "-o", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("old")
    env = {**os.environ, "ROBUSTSOUP_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=env,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "results.json").read_text() == "old"
    results, _, _ = run(recipe_of(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == json.loads(
        json.dumps(results["rows"])
    )
    assert leftovers(tmp_path / "run") == []

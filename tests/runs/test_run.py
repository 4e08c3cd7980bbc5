"""A whole run: steps, results, files and selection."""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
from tiny_runs import (
    DATA,
    LEARNED,
    PLANE,
    ROWS,
    find_leftovers,
    keys_of,
    modification_times,
    plan_of,
    recipe_of,
    recipe_of_files,
    run_recipe,
)
from trained_seed import trained_seed

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import check_leakage
from robustsoup.cli.tables import print_results
from robustsoup.data import load_data
from robustsoup.diagnosis.landscape import open_plane
from robustsoup.errors import LeakageError, RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.models import load_model
from robustsoup.recipes import load_recipe, parse_recipe
from robustsoup.runs.examples import Examples
from robustsoup.runs.results import Results
from robustsoup.runs.run import prepare_run
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.mixing import mix
from robustsoup.stamp import installed_release, stamp_record
from robustsoup.training.train import train


def load_network(folder, name):
    """Load a checkpoint of a run folder."""
    return Checkpoint.load(folder / "checkpoints" / f"{name}.safetensors")


def test_a_run_executes_every_step_once(finished):
    reporter = finished.reporter
    assert reporter.missing == [reporter.finished_steps]
    assert reporter.finished_steps == list(keys_of(plan_of()))
    assert 0 < min(reporter.shares) <= max(reporter.shares) == 1


def test_results_are_complete(finished):
    folder, results, selection = finished.folder, finished.results, finished.selection
    stored = json.loads((folder / "results.json").read_text())
    assert stored.pop("digest")
    assert stored == json.loads(json.dumps(stamp_record(results)))
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
                assert accuracy["value"] == accuracy["hits"] / 64
                assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
            assert row[split]["Linf 32/255"]["hits"] <= row[split]["clean"]["hits"]
    assert results["data"] == DATA.record
    assert results["leakage"] == {"status": "known", "why": ""}
    assert results["duplicates"] == []
    assert results["protocol"]["samples"] == {"val": 64, "test": 64}
    assert (results["protocol"]["steps"], results["protocol"]["threats"]) == (3, ["Linf 32/255"])
    assert results["versions"]["threads"] == 1
    assert results["selection"]["chosen"] == selection.best.name
    assert results["selection"]["met"] is True
    assert load_recipe(folder / "recipe.toml") == recipe_of()


def test_every_file_that_the_results_name_is_complete(finished):
    folder, results = finished.folder, finished.results
    for row in results["rows"]:
        checkpoint = Checkpoint.load(folder / row["checkpoint"])
        for split in ("val", "test"):
            stored = Evaluation.load(folder / "evaluations" / f"{row['name']}.{split}.json")
            assert stored.record["checkpoint"] == checkpoint.digest
            assert stored.to_json()["accuracy"] == row[split]
    assert find_leftovers(folder) == []
    learned = results["rows"][-1]
    alpha = Coefficients.load(folder / learned["coefficients_file"])
    ingredients = [load_network(folder, name) for name in ("low", "high")]
    assert alpha.ingredients == tuple(item.digest for item in ingredients)
    learned_soup = mix(ingredients, alpha, buffers="tracked")
    assert learned_soup.digest == Checkpoint.load(folder / learned["checkpoint"]).digest
    half = mix(ingredients, [0.5, 0.5], buffers="average")
    assert half.digest == load_network(folder, "grid-0.5-0.5").digest


def test_accuracies_equal_those_of_evaluate(finished):
    folder, results = finished.folder, finished.results
    row = results["rows"][-1]
    again = evaluate(
        folder / row["checkpoint"], DATA.test, ["Linf 32/255"], steps=3, samples=64, device="cpu"
    )
    assert again.to_json()["accuracy"] == row["test"]


def test_the_chosen_soup_is_the_best_on_val_and_is_written(finished):
    folder, results, selection = finished.folder, finished.results, finished.selection
    soups = [row for row in results["rows"] if row["role"] in ("grid", "learned")]

    def robust_then_clean(row):
        return row["val"]["Linf 32/255"]["value"], row["val"]["clean"]["value"]

    best = max(soups, key=robust_then_clean)
    chosen = next(row for row in soups if row["name"] == selection.best.name)
    assert chosen["val"] == best["val"]
    soup = Checkpoint.load(folder / results["soup"])
    assert soup.digest == Checkpoint.load(folder / chosen["checkpoint"]).digest


def test_provenance_leads_back_to_the_data(finished):
    soup = load_network(finished.folder, "grid-0.5-0.5").provenance
    base, low, high = (load_network(finished.folder, n) for n in ("pretrained", "low", "high"))
    assert [parent["digest"] for parent in soup["parents"]] == [low.digest, high.digest]
    for ingredient in (low, high):
        assert ingredient.provenance["parents"][0]["digest"] == base.digest
    for record in (soup, low.provenance, base.provenance):
        assert (record["data"], record["trained_on"]) == (DATA.record, ["train"])
    assert base.provenance["early_stopped_at"] in (1, 2, 3, 4)


def test_running_again_executes_no_step(copied):
    folder, store = copied
    run_recipe(recipe_of(), folder)  # replaces copied files by links into the copied store
    places = (store, folder / "checkpoints", folder / "evaluations")
    before = [modification_times(place) for place in places]
    results, _, reporter = run_recipe(recipe_of(), folder)
    assert (reporter.missing, reporter.finished_steps) == ([[]], [])
    assert [modification_times(place) for place in places] == before
    assert [row["name"] for row in results["rows"]] == ROWS
    assert find_leftovers(folder) == find_leftovers(store) == []


@pytest.mark.parametrize("years", [-20, 20])
def test_files_of_another_time_repeat_no_step(copied, years):
    """The clock has jumped, or the files were copied from a machine whose clock is wrong."""
    folder, store = copied
    for path in (*folder.rglob("*"), *store.rglob("*")):
        moment = path.stat().st_mtime + years * 365 * 86_400
        os.utime(path, (moment, moment))
    _, _, reporter = run_recipe(recipe_of(), folder)
    assert (reporter.missing, reporter.finished_steps) == ([[]], [])


def test_a_source_tree_that_is_not_installed_runs_recipes(copied, monkeypatch):
    """Its version is not known: the run ended in an error once all its work was done."""

    def find_no_version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", find_no_version)
    installed_release.cache_clear()
    results, _, reporter = run_recipe(recipe_of(), copied[0].with_name("source-tree"))
    installed_release.cache_clear()
    assert reporter.finished_steps == []
    assert results["versions"]["robustsoup"] == "not installed"


def test_two_recipes_share_common_steps(copied):
    folder, store = copied
    before = modification_times(store)
    # The uniform soup is a point of the grid, and the recipe has this seed already.
    more = recipe_of(
        [
            (("name",), "more"),
            (("soups", "flat"), {"method": "uniform"}),
            (("ingredients", "high", "seed"), trained_seed()),
        ]
    )
    results, _, reporter = run_recipe(more, folder.parent / "more")
    assert reporter.finished_steps == []
    assert results["rows"][-1]["val"] == results["rows"][4]["val"]
    other = recipe_of([(("name",), "other"), ((*LEARNED, "threats"), ["Linf 32/255", "clean"])])
    _, _, reporter = run_recipe(other, folder.parent / "other")
    assert reporter.finished_steps == [
        ("learn", "learned-clean"),
        ("mix", "learned-clean"),
        ("evaluate", "learned-clean.val"),
        ("evaluate", "learned-clean.test"),
    ]
    assert before.items() <= modification_times(store).items()


def test_the_papers_protocol_learns_soups_of_networks_that_were_fitted_on_less(copied):
    """Pre-training stops early on val, so it fits on other samples than the soup."""
    folder, _ = copied
    ingredients = (("soups", "learned", "ingredients"), ["pretrained", "low"])
    recipe = recipe_of([(("protocol",), "paper"), ingredients])
    results, _, _ = run_recipe(recipe, folder.with_name("fits-on-less"))
    assert any(row["role"] == "learned" for row in results["rows"])


@pytest.mark.parametrize("screens", [False, True])
def test_a_soup_of_the_pretrained_network_is_compared_with_it(copied, screens):
    line = {"method": "line", "ingredients": ["low", "pretrained"], "step": 0.5}
    soups = (("soups",), {"line": line})
    changes = [soups, (("evaluate", "screen"), screens), (("select", "require"), [])]
    recipe = recipe_of([*changes, (("select", "maximise"), "clean")])
    results, selection, _ = run_recipe(recipe, copied[0].with_name(f"base-{screens}"))
    equal = {row["name"]: row["ingredient"] for row in results["rows"] if row["soup"]}
    assert equal == {"line-0-1": "pretrained", "line-0.5-0.5": None, "line-1-0": "low"}
    names = {item["ingredient"] for item in results["selection"]["against"]}
    assert names == {"pretrained", "low", "high"} - {selection.best.ingredient}
    assert selection.best.ingredient is None or "itself" in results["selection"]["message"]
    rows = Results.from_json(results, "results").distinct_rows
    assert [row.name for row in rows] == ["pretrained", "low", "high", "line-0.5-0.5"]


def test_results_name_the_papers_protocol(copied, capsys, monkeypatch):
    folder = copied[0].with_name("paper")
    results, selection, _ = run_recipe(recipe_of([(("protocol",), "paper")]), folder)
    assert results["protocol"]["select_on"] == results["protocol"]["report_on"] == "test"
    assert all(row["val"] is None and row["test"]["clean"]["n"] == 64 for row in results["rows"])
    low = load_network(folder, "low")
    assert low.provenance["data"]["val"] == 0
    assert low.provenance["data"]["split_digest"] != DATA.record["split_digest"]
    assert selection.best.evaluation.accuracy["clean"].n == 64
    with pytest.raises(LeakageError, match="trained on another split"):
        check_leakage([low], DATA.val)
    # The samples that chose the soup cannot confirm its requirement.
    assert results["selection"]["require"]
    assert results["selection"]["held_on_test"] is None
    monkeypatch.setenv("COLUMNS", "200")
    print_results(Results.from_json(results, "results"), folder)
    assert "the paper's protocol: selected on test" in capsys.readouterr().out


def test_checkpoint_every_makes_several_ingredients(copied):
    several, plain = copied[0].with_name("several"), copied[0].with_name("plain")

    def recipe_with(ingredient):
        no_soups = [(("soups",), {}), (("select",), {})]
        return recipe_of([(("ingredients",), {"run": ingredient}), *no_soups])

    recipe = recipe_with({"epochs": 4, "checkpoint_every": 2})
    _, _, reporter = run_recipe(recipe, several)
    kinds = ("finetune", "snapshot")
    names = [name for kind, name in reporter.finished_steps if kind in kinds]
    assert names == ["run", "run-2", "run-4"]
    first, last = (load_network(several, f"run-{epoch}") for epoch in (2, 4))
    assert (first.provenance["epoch"], last.provenance["epoch"]) == (2, 4)
    assert len(first.provenance["history"]) == 2
    run_recipe(recipe_with({"epochs": 4}), plain)
    assert load_network(plain, "run").digest == last.digest != first.digest


@pytest.mark.slow
def test_a_run_with_every_training_setting(tmp_path):
    train = load_data("digits").train.first(200)
    path = tmp_path / "generated.npz"
    numpy.savez(path, image=train.images.permute(0, 2, 3, 1).numpy(), label=train.labels.numpy())
    settings = {
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
    changes = [(("pretrain", key), value) for key, value in settings.items()]
    changes += [
        (("pretrain", "synthetic"), str(path)),
        (("ingredients", "high", "objective"), "trades"),
        (("soups", "learned", "objectives"), ["trades 2"]),
    ]
    results, _, _ = run_recipe(recipe_of(changes), tmp_path / "run")
    record = load_network(tmp_path / "run", "pretrained").provenance
    assert settings.items() <= record["training"].items()
    assert record["training"]["synthetic"] == record["synthetic"][0]["digest"]
    assert {row["objective"] for row in results["rows"]} >= {"trades", "trades 2", "ce"}


@pytest.mark.slow
def test_no_network_depends_on_test(tmp_path, monkeypatch):
    """With other test images, evaluations on them differ, and every network is bit-equal."""
    changes = [
        (("finetune", "early_stop"), {"steps": 1, "samples": 32}),
        (("soups", "grid", "buffers"), "recalibrate"),
        (("soups", "grid", "calibrate_samples"), 64),
        (("soups", "learned", "early_stop"), {"steps": 1, "samples": 32}),
        (("planes",), {"p": PLANE}),
    ]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, DATA.test.images.shape, generator=generator, dtype=torch.uint8)
    noisy = dataclasses.replace(DATA, test=dataclasses.replace(DATA.test, images=noise))
    calibrated_on, digests, scores = [], [], []

    def recording_plane(*arguments, calibrate_on, **settings):
        calibrated_on.append(calibrate_on.digest)
        return open_plane(*arguments, calibrate_on=calibrate_on, **settings)

    monkeypatch.setattr("robustsoup.runs.worker.open_plane", recording_plane)
    for name, data in (("own", DATA), ("noise", noisy)):
        monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / f"store-{name}"))
        monkeypatch.setattr("robustsoup.runs.run.load_data", lambda *_, data=data, **__: data)
        results, _, _ = run_recipe(recipe_of(changes), tmp_path / name)
        paths = sorted((tmp_path / name / "checkpoints").glob("*.safetensors"))
        digests.append({path.name: Checkpoint.load(path).digest for path in paths})
        scores.append(results["rows"][0]["test"])
    assert len(digests[0]) == 7
    assert digests[0] == digests[1]
    assert scores[0] != scores[1]
    assert calibrated_on == [DATA.train.digest] * 2


def test_a_run_removes_evaluations_of_other_settings(copied):
    folder = copied[0].with_name("twice")
    run_recipe(recipe_of([(("name",), "once")]), folder)
    assert (folder / "evaluations" / "low.val.json").exists()
    (folder / "evaluations" / "mine.json").write_text("{}")
    run_recipe(recipe_of([(("protocol",), "paper")]), folder)
    names = {path.name for path in (folder / "evaluations").glob("*.json")}
    assert names == {"mine.json", *(f"{name}.test.json" for name in ROWS)}


def test_a_recipe_of_planes_alone_checks_leakage_on_test_alone(copied):
    """Networks that were trained on val can be mapped: nothing selects on it."""
    folder, _ = copied
    names = [f"network{seed}" for seed in range(3)]
    for seed, name in enumerate(names):
        network = load_model("resnet9:width=2", channels=1, seed=seed)
        data = DATA.unsplit().first(64)
        trained = train(network, data, threat="clean", epochs=1, lr=0.1, device="cpu")
        trained.save(folder / f"{name}.safetensors")
    content = {
        "name": "mapped",
        "data": "digits",
        "model": "resnet9:width=2",
        "evaluate": {"threats": []},
        "ingredients": {name: str(folder / f"{name}.safetensors") for name in names},
        "planes": {"p": PLANE | {"checkpoints": names, "threat": "clean"}},
    }

    def prepare(content):
        return prepare_run(parse_recipe(content, "mapped", Path("/nowhere")), device="cpu")

    assert prepare(content).leakage.status == "known"
    with pytest.raises(LeakageError, match="another split"):
        prepare(content | {"select": {"maximise": "clean"}})


def test_a_plane_is_measured_once(copied):
    folder, _ = copied
    recipe = recipe_of([(("planes",), {"far": PLANE})])
    results, _, reporter = run_recipe(recipe, folder)
    assert reporter.finished_steps == [("plane", "far")]
    (entry,) = results["planes"]
    plane = json.loads((folder / entry["file"]).read_text())
    assert plane["checkpoints"] == entry["checkpoints"] == ["pretrained", "low", "high"]
    assert len(plane["loss"]) == len(plane["loss"][0]) == 2
    _, _, reporter = run_recipe(recipe, folder)
    assert reporter.finished_steps == []


def test_report_chosen_evaluates_the_chosen_soup_alone_on_test(copied):
    folder, _ = copied
    recipe = recipe_of([(("evaluate", "report"), "chosen")])
    results, selection, reporter = run_recipe(recipe, folder.parent / "chosen")
    assert reporter.finished_steps == []
    assert [row["name"] for row in results["rows"] if row["test"]] == [selection.best.name]
    assert results["selection"]["held_on_test"] is True  # an accuracy is always at least 0


def test_an_unmet_requirement_is_an_answer(copied):
    """Networks of two channels are far from so robust."""
    folder, _ = copied
    recipe = recipe_of([(("select", "require"), ["Linf 32/255>=0.9"])])
    results, selection, reporter = run_recipe(recipe, folder.parent / "none")
    assert reporter.finished_steps == []
    assert (selection.met, results["selection"]["met"]) == (False, False)
    assert results["selection"]["message"].startswith("no candidate meets Linf 32/255>=0.9")


def test_a_requirement_that_the_samples_cannot_show_is_refused_before_work(copied):
    recipe = recipe_of([(("select", "require"), ["clean>=0.999"])])
    with pytest.raises(RequestError, match=r"64 samples cannot show .*; evaluate 4,380 or more"):
        prepare_run(recipe, device="cpu")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("granularity", "re:nothing"), 'pattern "nothing" matches no parameter'),
        (("granularity", "re:("), 'got the pattern "\\("'),
    ],
)
def test_settings_of_learning_that_the_network_cannot_take_are_refused_before_work(
    setting, message
):
    with pytest.raises(RequestError, match=message):
        prepare_run(recipe_of([(("soups", "learned", setting[0]), setting[1])]), device="cpu")


def test_warnings_are_reported_and_stored(files, tmp_path):
    """Logits times 10,000 leave cross-entropy no gradient."""
    for name in ("low", "high"):
        path = files / f"{name}.safetensors"
        network = Checkpoint.load(path)
        weight = network.tensors["linear.weight"] * 10_000
        tensors = {**network.tensors, "linear.weight": weight}
        dataclasses.replace(network, tensors=tensors).save(path)
    samples = {"select_samples": 64, "report_samples": 64}
    evaluate = {"threats": ["Linf 8/255"], "steps": 2, **samples}
    recipe = recipe_of_files(files, select={}, evaluate=evaluate)
    results, _, reporter = run_recipe(recipe, tmp_path / "run")
    zero = ": the gradient is exactly zero at the start for "
    assert any(zero in text for text in reporter.warnings)
    assert any(text.startswith("low.val: ") for text in reporter.warnings)
    for row in results["rows"]:
        path = tmp_path / "run" / "evaluations" / f"{row['name']}.val.json"
        warnings = Evaluation.load(path).warnings
        assert warnings
        assert set(warnings) <= set(row["warnings"])
        assert any(text.startswith("val, Linf 8/255: ") for text in row["masking_check"])


def test_keep_points_stores_adversarial_images_in_the_run_folder(copied):
    folder = copied[0].with_name("points")
    results, _, _ = run_recipe(recipe_of([(("evaluate", "keep_points"), True)]), folder)
    for row in results["rows"]:
        evaluation = Evaluation.load(folder / "evaluations" / f"{row['name']}.test.json")
        assert evaluation.threats["Linf 32/255"].x_adv.shape == (64, 1, 8, 8)


def test_the_first_samples_of_the_chosen_soup_are_kept_attacked(copied):
    folder, _ = copied
    recipe = recipe_of([(("report", "examples"), 3)])
    results, selection, reporter = run_recipe(recipe, folder.parent / "examples")
    assert reporter.finished_steps == [("examples", f"{selection.best.name}.examples")]
    assert results["examples"] == {
        "network": selection.best.name,
        "split": "test",
        "file": "examples.npz",
    }
    examples = Examples.load(folder.parent / "examples" / "examples.npz")
    assert torch.equal(examples.images, DATA.test.images[:3])
    assert torch.equal(examples.labels, DATA.test.labels[:3])
    (attacked,) = examples.attacked
    assert 0 < float(attacked.delta.abs().max()) <= 32 / 255 + 1e-3
    broken = ~attacked.robust & (examples.prediction == examples.labels)
    assert not (attacked.prediction == examples.labels)[broken].any()
    assert (attacked.prediction == examples.labels)[attacked.robust].all()

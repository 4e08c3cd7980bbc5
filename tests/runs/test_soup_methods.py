"""Greedy soups, dials, early stopping and buffer policies in a run."""

import pytest
import torch
from tiny_runs import LEARNED, RecordingReporter, recipe_of, run_recipe

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.runs.choose import soup_candidates
from robustsoup.runs.run import prepare_run
from robustsoup.soups.coefficients import Coefficients, load_coefficients
from robustsoup.soups.mixing import mix

GREEDY = (("soups", "greedy"), {"method": "greedy", "score": "0.5 clean + 0.5 Linf 32/255"})
DIAL = (
    ("soups", "dial"),
    {"method": "dial", "threats": ["Linf 32/255"], "epochs": 2, "at": [0, 1]},
)


def find_row(results, role):
    return next(row for row in results["rows"] if row["role"] == role)


def steps_of_kind(reporter, kind):
    return [name for step_kind, name in reporter.finished_steps if step_kind == kind]


@pytest.mark.parametrize("policy", ["base", "recalibrate", "recalibrate-adversarial"])
def test_every_buffer_policy_runs(copied, policy):
    folder = copied[0].with_name(policy)
    changes = [(("soups", "grid", "buffers"), policy), ((*LEARNED, "buffers"), policy)]
    results, _, _ = run_recipe(recipe_of(changes), folder)
    for row in results["rows"][3:]:
        record = Checkpoint.load(folder / row["checkpoint"]).provenance["buffers"]
        assert record["policy"] == policy
        assert (policy == "recalibrate-adversarial") == (record.get("threat", "clean") != "clean")


def test_a_greedy_soup_reuses_the_evaluations_of_its_ingredients(copied):
    folder = copied[0].with_name("greedy")
    results, _, reporter = run_recipe(recipe_of([GREEDY]), folder)
    assert steps_of_kind(reporter, "greedy") == ["greedy"]
    assert all(name.startswith("greedy.") for name in steps_of_kind(reporter, "evaluate"))
    row = find_row(results, "greedy")
    coefficients = Coefficients.load(folder / row["coefficients_file"])
    assert row["coefficients"] == coefficients.alpha[0].tolist()
    record = coefficients.record["greedy"]
    assert record["split"] == "val"
    scores = {tuple(entry["alpha"]): entry["score"] for entry in record["tried"]}
    assert set(scores) == {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}
    val = {row["name"]: row["val"] for row in results["rows"]}
    best = record["tried"][-1]
    for name, alpha in (
        ("low", (1.0, 0.0)),
        ("high", (0.0, 1.0)),
        ("grid-0.5-0.5", (0.5, 0.5)),
        ("greedy", tuple(best["alpha"])),
    ):
        clean, robust = (val[name][measure]["value"] for measure in ("clean", "Linf 32/255"))
        assert scores[alpha] == pytest.approx(0.5 * clean + 0.5 * robust), name
    assert best["score"] == max(scores.values())
    soups = [row for row in results["rows"] if row["soup"]]
    ingredients = [row for row in results["rows"] if row["role"] == "ingredient"]
    looked_at = len(soups) + len(record["tried"]) - 1
    same = sum(row["ingredient"] is not None for row in soups)
    assert results["selection"]["comparisons"] == looked_at * len(ingredients) - same


def test_a_soup_of_one_ingredient_names_it_if_it_equals_it(copied):
    """A greedy soup of one ingredient is this ingredient too, unless its statistics are others."""
    folder = copied[0].with_name("alone")
    one = {"method": "greedy", "score": "clean", "ingredients": ["low"]}
    changes = [
        (("soups", "alone"), one),
        (("soups", "other"), one | {"buffers": "recalibrate", "calibrate_samples": 40}),
    ]
    results, _, _ = run_recipe(recipe_of(changes), folder)
    equal = {row["name"]: row["ingredient"] for row in results["rows"] if row["ingredient"]}
    assert equal == {"grid-1-0": "low", "grid-0-1": "high", "alone": "low"}
    rows = {row["name"]: row for row in results["rows"]}
    soup, low = (Checkpoint.load(folder / rows[name]["checkpoint"]) for name in ("alone", "low"))
    assert soup.tensors.keys() == low.tensors.keys()
    assert all(torch.equal(value, low.tensors[name]) for name, value in soup.tensors.items())
    prepared = prepare_run(recipe_of(changes), device="cpu")
    candidates = {c.name: c for c in soup_candidates(prepared.plan, prepared.store)}
    for name, words in (
        ("alone", "low itself"),
        ("other", "low with the soup's BatchNorm statistics"),
    ):
        assert (candidates[name].ingredient, candidates[name].description) == (
            equal.get(name),
            words,
        )


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("base", {}),
        ("recalibrate", {"calibrate_samples": 40}),
        ("recalibrate-adversarial", {"calibrate_threat": "Linf 64/255"}),
    ],
)
def test_a_greedy_soup_is_evaluated_with_the_statistics_it_is_written_with(
    copied, policy, settings
):
    folder = copied[0].with_name(policy)
    section = {"method": "greedy", "score": "clean", "buffers": policy, **settings}
    results, _, _ = run_recipe(recipe_of([(("soups", "greedy"), section)]), folder)
    row = find_row(results, "greedy")
    record = Coefficients.load(folder / row["coefficients_file"]).record["greedy"]
    scores = [entry["score"] for entry in record["tried"]]
    assert len(scores) == 3
    assert scores[-1] == max(scores) == row["val"]["clean"]["value"]


def test_a_killed_greedy_step_keeps_its_evaluations(copied):
    folder, store = copied
    recipe = recipe_of(
        [
            GREEDY,
            (("ingredients", "mid"), {"threat": "Linf 32/255", "epochs": 1}),
            (("soups", "grid", "ingredients"), ["low", "high"]),
        ]
    )

    class InterruptingReporter(RecordingReporter):
        def progress(self, step, done, total, figures):
            if step.kind == "greedy" and done == 1:
                raise KeyboardInterrupt

    def find_evaluations():
        return {path.name: path.stat().st_mtime_ns for path in store.rglob("0*.json")}

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, folder.with_name("greedy"), InterruptingReporter())
    before = find_evaluations()
    assert len(before) == 1
    run_recipe(recipe, folder.with_name("greedy"))
    after = find_evaluations()
    assert before.items() <= after.items()
    assert len(after) == 2


def test_a_dial_is_learned_once_and_has_a_row_for_each_position(copied):
    folder = copied[0].with_name("dial")
    results, _, reporter = run_recipe(recipe_of([DIAL]), folder)
    assert reporter.finished_steps[0] == ("dial", "dial Linf 32/255")
    assert steps_of_kind(reporter, "mix") == ["dial-t0", "dial-t1"]
    rows = [row for row in results["rows"] if row["role"] == "dial"]
    assert [(row["name"], row["at"]) for row in rows] == [("dial-t0", 0.0), ("dial-t1", 1.0)]
    dial = folder / "coefficients" / "dial-linf-32-255.dial.safetensors"
    ingredients = [
        Checkpoint.load(folder / "checkpoints" / f"{name}.safetensors") for name in ("low", "high")
    ]
    for row in rows:
        coefficients = load_coefficients(dial, row["at"])
        stored = Coefficients.load(folder / row["coefficients_file"])
        assert torch.equal(stored.alpha, coefficients.alpha)
        soup = mix(ingredients, coefficients, buffers="average")
        assert soup.digest == Checkpoint.load(folder / row["checkpoint"]).digest


def test_more_positions_of_a_dial_need_no_learning(copied):
    folder = copied[0].with_name("dial")
    run_recipe(recipe_of([DIAL]), folder)
    recipe = recipe_of([DIAL, (("soups", "dial", "at"), [0, 0.5, 1])])
    _, _, reporter = run_recipe(recipe, folder)
    assert reporter.finished_steps == [
        ("mix", "dial-t0.5"),
        ("evaluate", "dial-t0.5.val"),
        ("evaluate", "dial-t0.5.test"),
    ]


def test_learning_can_stop_early_on_val(copied):
    folder = copied[0].with_name("stopped")
    changes = [
        ((*LEARNED, "early_stop"), {"samples": 32, "steps": 2}),
        ((*LEARNED, "granularity"), "block"),
    ]
    results, _, _ = run_recipe(recipe_of(changes), folder)
    coefficients = Coefficients.load(folder / results["rows"][-1]["coefficients_file"])
    record = coefficients.record
    assert record["early_stopped_at"] in (1, 2)
    assert [set(entry) for entry in record["history"]] == [{"epoch", "loss", "val_loss"}] * 2
    blocks = ("prep", "layer1", "residual1", "layer2", "layer3", "residual3", "linear")
    assert coefficients.layers == blocks


def test_merges_take_the_base_of_the_recipe_and_resume(copied):
    folder = copied[0].with_name("merges")
    ties = (("soups", "ties"), {"method": "ties", "step": 0.5, "density": 0.5, "scale": 1.5})
    regmean = (
        ("soups", "regmean"),
        {
            "method": "regmean",
            "threats": ["Linf 16/255", "Linf 32/255"],
            "weights": "uniform",
            "measure_samples": 16,
        },
    )
    recipe = recipe_of([ties, regmean])
    results, _, reporter = run_recipe(recipe, folder)
    rows = {row["name"]: row for row in results["rows"] if row["role"] == "merge"}
    assert list(rows) == [
        *("ties-0-1", "ties-0.5-0.5", "ties-1-0"),
        *("regmean-linf-16-255", "regmean-linf-32-255"),
    ]
    assert steps_of_kind(reporter, "merge") == list(rows)
    record = Checkpoint.load(folder / rows["ties-1-0"]["checkpoint"]).provenance["merge"]
    base = Checkpoint.load(folder / "checkpoints" / "pretrained.safetensors")
    assert record["base"] == base.digest
    assert (record["density"], record["scale"]) == (0.5, 1.5)
    again = run_recipe(recipe, folder)[2]
    assert steps_of_kind(again, "merge") == []


def test_a_subspace_gives_ingredients_whose_soups_measure_statistics_anew(copied):
    folder = copied[0].with_name("subspace")
    subspace = {
        "threats": ["Linf 64/255", "Linf 16/255"],
        "epochs": 1,
        "lr": 0.05,
        "at_ends": 0.5,
    }
    line = {"method": "line", "ingredients": ["end1", "end2"], "step": 0.5}
    changes = [
        (("subspace",), subspace),
        (("soups", "grid", "ingredients"), ["low", "high"]),
        ((*LEARNED, "ingredients"), ["low", "high"]),
        (("soups", "line"), line),
    ]
    results, _, reporter = run_recipe(recipe_of(changes), folder)
    assert steps_of_kind(reporter, "subspace") == ["subspace"]
    assert steps_of_kind(reporter, "end") == ["end1", "end2"]
    rows = {row["name"]: row for row in results["rows"]}
    assert (rows["end1"]["role"], rows["end1"]["threat"]) == ("ingredient", "Linf 64/255")
    end = Checkpoint.load(folder / rows["end2"]["checkpoint"]).provenance
    assert (end["subspace"]["position"], end["subspace"]["at_ends"]) == (1, 0.5)
    assert (
        end["parents"][0]["digest"]
        == Checkpoint.load(folder / "checkpoints" / "pretrained.safetensors").digest
    )
    soup = Checkpoint.load(folder / rows["line-0.5-0.5"]["checkpoint"]).provenance
    assert soup["buffers"]["policy"] == "recalibrate"
    grid = Checkpoint.load(folder / rows["grid-0.5-0.5"]["checkpoint"]).provenance
    assert grid["buffers"]["policy"] == "average"

"""Recipes that ask for more than a machine can do, or never end, are refused at once."""

import os

import pytest
from command_line import RECIPE

from robustsoup.errors import CoefficientError, RecipeError
from robustsoup.recipes import load_recipe
from robustsoup.settings import MOST_SOUPS
from robustsoup.soups.grid import grid

LARGEST = 2**63 - 1


def refused(tmp_path, text, *overrides):
    """Return the message with which a recipe is refused."""
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2_100
    return str(caught.value)


def tuned(changes, finetune=""):
    """A recipe that fine-tunes one ingredient, with changes of its table."""
    start = 'model = "resnet9:width=2"\n[pretrain]\nthreat = "clean"\n'
    return (
        f'name = "one"\ndata = "digits"\n{start}[finetune]\nthreat = "clean"\n{finetune}\n'
        f"[ingredients]\na = {{ {changes} }}\n"
    )


def soups(text):
    return RECIPE.replace('[soups.flat]\nmethod = "uniform"', f"[soups.flat]\n{text}")


@pytest.mark.parametrize("epochs", [2_000, 10**8, LARGEST])
def test_checkpoints_of_very_many_epochs_are_not_listed(tmp_path, epochs):
    changes = 'threat = "clean", checkpoint_every = 1'
    for recipe in (tuned(f"{changes}, epochs = {epochs}"), tuned(changes, f"epochs = {epochs}")):
        message = refused(tmp_path, recipe)
        assert f"a.checkpoint_every: got 1, which makes {epochs:,} ingredients" in message
        assert "expected at most 1,000" in message


def test_very_many_ingredients_are_refused(tmp_path):
    many = "\n".join(f'a{number} = "low.safetensors"' for number in range(1_001))
    recipe = RECIPE.replace('low = "low.safetensors"', many)
    assert "ingredients: got 1,002, expected at most 1,000" in refused(tmp_path, recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('method = "grid"\nmax_soups = 100000000', "max_soups: got 100000000, expected a number"),
        ('method = "grid"\nstep = 1e-5', "step: got 1e-05, expected a number in [0.0001, 1]"),
        ('method = "grid"\nstep = 5e-324', "step: got 5e-324, expected a number in [0.0001, 1]"),
        ('method = "grid"\nstep = 1e-4', "makes 10,001 soups; mixing and evaluating"),
        (
            f'method = "dial"\nthreats = ["Linf 0.1"]\nat = {[i / 6_000 for i in range(6_000)]}',
            f"soups: got 6,000, expected at most {MOST_SOUPS:,}",
        ),
        (
            f'method = "learned"\nthreats = {["Linf 0.1"] * 99}\nobjectives = {["ce"] * 99}',
            f"soups: got 9,801, expected at most {MOST_SOUPS:,}",
        ),
    ],
)
def test_very_many_soups_are_not_listed(tmp_path, text, message):
    assert message in refused(tmp_path, soups(text))


def test_a_grid_of_very_many_ingredients_is_counted_without_a_list(tmp_path):
    many = "\n".join(f'a{number} = "low.safetensors"' for number in range(900))
    recipe = soups('method = "grid"\nstep = 1e-3').replace('low = "low.safetensors"', many)
    message = refused(tmp_path, recipe)
    assert "soups.flat: step 0.001 makes 1.2e+569 soups" in message
    for step in (5e-324, 1e-300):
        with pytest.raises(CoefficientError, match="expected n >= 1 and a step such as 0"):
            grid(900, step)
    with pytest.raises(CoefficientError, match=r"make 5\.9e\+777 soups"):
        grid(900, 0.0005)


def test_recipes_that_extend_others_many_times_are_read_once_each(tmp_path):
    (tmp_path / "r60.toml").write_text(RECIPE)
    for number in range(60):
        other = f"r{number + 1}.toml"
        (tmp_path / f"r{number}.toml").write_text(f'extends = ["{other}", "{other}", "./{other}"]')
    assert load_recipe(tmp_path / "r0.toml") == load_recipe(tmp_path / "r60.toml")


@pytest.mark.parametrize("kind", ["deep", "wide"])
def test_very_many_extended_recipes_are_refused(tmp_path, kind):
    names = [f"r{number}.toml" for number in range(300)]
    for number, name in enumerate(names):
        text = f'extends = "{names[number + 1]}"' if kind == "deep" and number < 299 else ""
        (tmp_path / name).write_text(text)
    first = str([names[0]] if kind == "deep" else names).replace("'", '"')
    assert "extends: more than 100 recipes are extended" in refused(tmp_path, f"extends = {first}")


def test_a_circle_of_recipes_is_refused(tmp_path):
    for name, other in (("a", "b"), ("b", "c"), ("c", "./a")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{other}.toml"')
    with pytest.raises(RecipeError, match=r"c\.toml: extends: got '\./a\.toml', expected the name"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_recipe_that_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "a.toml").write_text('extends = "fifo.toml"')
    for name in ("fifo", "a"):
        with pytest.raises(RecipeError, match=r"fifo\.toml: not a TOML file: got a FIFO"):
            load_recipe(tmp_path / f"{name}.toml")
    with pytest.raises(RecipeError, match="not a TOML file: got a device"):
        load_recipe("/dev/zero")


def test_links_in_a_circle_are_refused_in_one_line(tmp_path):
    (tmp_path / "circle.toml").symlink_to("circle.toml")
    (tmp_path / "a.toml").write_text('extends = "circle.toml"')
    for name in ("circle", "a"):
        with pytest.raises(RecipeError, match=r"circle\.toml: not a TOML file: Too many levels of"):
            load_recipe(tmp_path / f"{name}.toml")


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 5_000, "a." * 5_000 + "b = 1", "a = 1" + "0" * 5_000, "#" * 300_000, "a = inf"],
)
def test_recipes_that_no_person_writes_are_refused_in_one_line(tmp_path, text):
    refused(tmp_path, text)
    if len(text) < 100_000:
        refused(tmp_path, RECIPE, text.replace(" ", ""))


def test_a_long_value_is_not_shown_whole(tmp_path):
    assert "seed" in refused(tmp_path, f'seed = "{"x" * 100_000}"\n{RECIPE}')
    assert "expected fewer" in refused(tmp_path, RECIPE, f"{'a.' * 50}b=1")

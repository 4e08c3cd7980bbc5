"""A recipe that anybody wrote: it is read, or one line says why not."""

from pathlib import Path

import pytest
from json_mutations import mutated_recipes

import robustsoup
from robustsoup.errors import RobustsoupError
from robustsoup.recipes import load_recipe

QUICKSTART = Path(robustsoup.__file__).with_name("quickstart.toml")


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_recipes_are_read_or_refused_in_one_line(tmp_path, seed):
    path, refusals = tmp_path / "recipe.toml", []
    for text in mutated_recipes(QUICKSTART.read_text(encoding="utf-8"), 150, seed):
        path.write_text(text, encoding="utf-8")
        try:
            load_recipe(path)
        except RobustsoupError as error:
            refusals.append(str(error))
    assert len(refusals) > 60
    assert all(message.isprintable() for message in refusals)

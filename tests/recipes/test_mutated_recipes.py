"""A recipe that anybody wrote: it is read, or one line says why not."""

import json
import random
import tomllib
from pathlib import Path

import pytest
from json_mutations import TEXTS, mutate

import robustsoup
from robustsoup.errors import RobustsoupError
from robustsoup.recipes import load_recipe

QUICKSTART = Path(robustsoup.__file__).with_name("quickstart.toml")


def write_value(value):
    """Return a value as one line of TOML; null, which TOML lacks, becomes an empty text."""
    match value:
        case None:
            return '""'
        case dict():
            items = (f"{json.dumps(key)} = {write_value(item)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
        case list():
            return f"[{', '.join(map(write_value, value))}]"
        case _:
            return json.dumps(value)


def mutated_recipes(seed, count):
    """Yield recipes with a few changed values, cut-short ones, and texts that are no recipe."""
    chance, whole = random.Random(seed), QUICKSTART.read_text(encoding="utf-8")
    yield from TEXTS
    for number in range(count):
        if number % 8 == 0:
            yield whole[: chance.randrange(len(whole))]
            continue
        changed = tomllib.loads(whole)
        for _ in range(chance.randrange(1, 4)):
            changed = mutate(changed, chance)
        yield "\n".join(f"{json.dumps(key)} = {write_value(changed[key])}" for key in changed)


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_recipes_are_read_or_refused_in_one_line(tmp_path, seed):
    path, refusals = tmp_path / "recipe.toml", []
    for text in mutated_recipes(seed, 150):
        path.write_text(text, encoding="utf-8")
        try:
            load_recipe(path)
        except RobustsoupError as error:
            refusals.append(str(error))
    assert len(refusals) > 60
    assert all(message.isprintable() for message in refusals)

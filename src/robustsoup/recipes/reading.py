"""From a TOML file, and what it extends, to a recipe. An unknown key is an error that names the nearest valid one."""

import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from robustsoup.errors import RecipeError
from robustsoup.recipes.recipe import Recipe
from robustsoup.recipes.sections import (
    PUBLISHED,
    EarlyStop,
    Evaluate,
    Ingredient,
    Plane,
    Pretrain,
    Report,
    Select,
    Soup,
    Training,
    nearest,
)


def load_recipe(path: str | os.PathLike, sets: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe; sets: "a.b=value" overrides, values in TOML (a bare word is a string).

    extends = "other.toml", or several in a list, the last one first: what those files say, table by table, where this one says
    nothing else. They need not be whole recipes; their paths are relative to the recipe that is read.

    Raises RecipeError with the file, the key, what is wrong and, for an unknown key, the nearest valid one.
    """
    path = Path(path)
    content = _read(path, ())
    for setting in sets:
        _apply(content, setting)
    return parse_recipe(content, str(path), path.parent)


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a recipe with what it extends; `below`: who asked for it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such file; recipes are TOML files; `robustsoup demo` leaves one as runs/quickstart/recipe.toml"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file: {error}") from None
    if "extends" not in content:
        return content
    named = content.pop("extends")
    under: dict[str, Any] = {}
    for other in named if isinstance(named, list) else [named]:
        if not isinstance(other, str) or (path.parent / other).resolve() in {
            p.resolve() for p in (path, *below)
        }:
            raise RecipeError(
                f"{path}: extends: got {other!r}, expected the name of another recipe, in no circle"
            )
        under = _merged(under, _read(path.parent / other, (path, *below)))
    return _merged(under, content)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with what `over` says: tables are merged, all else is replaced."""
    both = {
        k: _merged(under[k], v)
        for k, v in over.items()
        if isinstance(v, dict) and isinstance(under.get(k), dict)
    }
    return under | over | both


def parse_recipe(content: dict[str, Any], where: str, folder: Path) -> Recipe:
    """Validate a recipe that is at hand as a dict; paths are made relative to `folder`. Raises RecipeError."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from None
    return _resolve_paths(recipe, folder)


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    def absolute(path: str | None) -> str | None:
        if path is None or path.startswith(PUBLISHED):
            return path
        return str((folder / Path(path).expanduser()).resolve())

    ingredients = {
        name: ingredient.model_copy(update={"checkpoint": absolute(ingredient.checkpoint)})
        for name, ingredient in recipe.ingredients.items()
    }
    data = recipe.data
    if data.startswith("folder:"):
        data = f"folder:{absolute(data.removeprefix('folder:'))}"
    sections = {
        name: section and section.model_copy(update={"synthetic": absolute(section.synthetic)})
        for name, section in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune))
    }
    return recipe.model_copy(
        update={
            "ingredients": ingredients,
            "checkpoint": absolute(recipe.checkpoint),
            "data": data,
            **sections,
        }
    )


def _apply(content: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals:
        raise RecipeError(f'--set {setting}: expected a.b=value, as in "soups.learned.epochs=2"')
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *tables, last = key.strip().split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise RecipeError(f"--set {setting}: {table} is not a table")
    content[last] = parsed


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(str(first['loc'][-1]), _keys_at(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{place}: missing"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f"; got {first['input']!r}"
    return f"{place}: {message}{got}" if place else f"{message}{got}"


def _keys_at(place: tuple) -> list[str]:
    """The valid keys of the table at `place` in a recipe."""
    tables = {
        "pretrain": Pretrain,
        "finetune": Training,
        "evaluate": Evaluate,
        "select": Select,
        "report": Report,
    }
    if not place:
        return list(Recipe.model_fields)
    if place[-1] == "early_stop":
        return list(EarlyStop.model_fields)
    named = {"ingredients": Ingredient, "soups": Soup, "planes": Plane}
    return list((named[place[0]] if place[0] in named else tables[place[0]]).model_fields)


def with_files(recipe: Recipe, place: Callable[[str], str]) -> Recipe:
    """The recipe with a path, place(NAME), for each published checkpoint "robustbench:NAME" that it names."""

    def found(checkpoint: str | None) -> str | None:
        named = checkpoint is not None and checkpoint.startswith(PUBLISHED)
        return place(checkpoint.removeprefix(PUBLISHED)) if named else checkpoint

    ingredients = {
        name: item.model_copy(update={"checkpoint": found(item.checkpoint)})
        for name, item in recipe.ingredients.items()
    }
    return recipe.model_copy(
        update={"ingredients": ingredients, "checkpoint": found(recipe.checkpoint)}
    )

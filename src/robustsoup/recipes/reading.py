"""Read a recipe from a TOML file and the files that it extends."""

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from robustsoup.catalog import DATA_SOURCES
from robustsoup.checkpoints.remote import remote_address
from robustsoup.documents import parse_toml, read_toml
from robustsoup.errors import RecipeError
from robustsoup.paths import user_path
from robustsoup.recipes.recipe import Recipe
from robustsoup.recipes.sections import (
    PUBLISHED_PREFIX,
    EarlyStopSection,
    Evaluate,
    Ingredient,
    Plane,
    Pretrain,
    Report,
    Select,
    Soup,
    Subspace,
    Training,
)
from robustsoup.schema import describe_value
from robustsoup.settings import suggest

MAX_EXTENDED = 100
"""Most recipes that one recipe extends, directly or through others."""
MAX_KEY_PARTS = 8
"""Most parts of a key of --set, such as 3 in "soups.learned.epochs"."""

_TABLES: dict[str, type[BaseModel]] = {
    "pretrain": Pretrain,
    "finetune": Training,
    "subspace": Subspace,
    "evaluate": Evaluate,
    "select": Select,
    "report": Report,
}
_NAMED_TABLES: dict[str, type[BaseModel]] = {
    "ingredients": Ingredient,
    "soups": Soup,
    "planes": Plane,
}


_EXPECTED = {
    "tuple_type": "expected a list, such as [...]",
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "too_short": "expected at least 1 entry",
}
"""What a value should have been, in the words of TOML, by pydantic's type of error."""


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    A recipe may extend others: `extends = "other.toml"`, or a list of files, of which later ones
    take precedence. The tables of the files are merged, and the recipe itself takes precedence.
    Extended files need not be complete; their paths are relative to the recipe that is read.

    Args:
        path: A TOML file.
        overrides: "a.b=value" with a TOML value; a bare word is text.

    Raises:
        RecipeError: Names the file, the key and the problem; for an unknown key, the nearest one.
    """
    path = user_path(path)
    content = _read_extended(path, (), {})
    for override in overrides:
        _apply_override(content, override)
    return parse_recipe(content, str(path), path.parent)


def parse_recipe(content: dict[str, Any], where: str, folder: Path) -> Recipe:
    """Validate a recipe.

    Args:
        content: The parsed TOML.
        where: Name of the recipe in error messages.
        folder: Folder that paths in the recipe are relative to.

    Raises:
        RecipeError: Names the key and the problem.
    """
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_describe_first_error(error)}") from None
    for place in _find_empty_texts(content):
        raise RecipeError(f"{where}: {place}: got an empty text; give a value or leave the key out")
    return _resolve_paths(recipe, folder)


def _find_empty_texts(content: Mapping[str, Any], table: str = "") -> Iterator[str]:
    """Yield the keys whose value is an empty text, which would count as unset."""
    for key, value in content.items():
        if value == "":
            yield f"{table}{key}"
        elif isinstance(value, Mapping):
            yield from _find_empty_texts(value, f"{table}{key}.")


def with_files(recipe: Recipe, locate: Callable[[str], str]) -> Recipe:
    """Replace published checkpoints ("robustbench:NAME") with paths.

    Args:
        recipe: A recipe.
        locate: Returns the path of the published checkpoint NAME.
    """

    def path_of(checkpoint: str | None) -> str | None:
        if checkpoint is None or not checkpoint.startswith(PUBLISHED_PREFIX):
            return checkpoint
        return locate(checkpoint.removeprefix(PUBLISHED_PREFIX))

    return _map_checkpoints(recipe, path_of)


def checkpoint_places(recipe: Recipe) -> list[str]:
    """Return the files and addresses of all checkpoints that a recipe names."""
    places = [*(item.checkpoint for item in recipe.ingredients.values()), recipe.checkpoint]
    return [place for place in places if place]


def _read_extended(
    path: Path, extending: tuple[Path, ...], done: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of a recipe merged with the files it extends.

    Args:
        path: The recipe.
        extending: The recipes that extend this one, to detect circles.
        done: The recipes that were read before, by resolved path; each is read once.
    """
    resolved = _resolve(path)
    if resolved in done:
        return done[resolved]
    if max(len(done), len(extending)) > MAX_EXTENDED:
        raise RecipeError(f"{path}: extends: more than {MAX_EXTENDED} recipes are extended")
    content = _read_table(path)
    extends = content.pop("extends", [])
    opened = {resolved, *extending}
    base: dict[str, Any] = {}
    for name in extends if isinstance(extends, list) else [extends]:
        if not isinstance(name, str) or _resolve(path.parent / user_path(name)) in opened:
            raise RecipeError(
                f"{path}: extends: got {describe_value(name)}, "
                "expected the name of another recipe that does not extend this one"
            )
        other = _read_extended(path.parent / user_path(name), (resolved, *extending), done)
        base = _merge_tables(base, other)
    done[resolved] = _merge_tables(base, content)
    return done[resolved]


def _resolve(path: Path) -> Path:
    """Return an absolute path without links; one that leads in a circle stays, and cannot be read.

    Path.resolve raises RuntimeError for such a path in Python 3.11 and 3.12.
    """
    return Path(os.path.realpath(path))


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such file; expected a recipe in TOML; "
            "`robustsoup demo` writes an example, runs/quickstart/recipe.toml"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: not a TOML file: {reason}") from None


def _merge_tables(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `content`, table by table."""
    merged = {
        key: _merge_tables(base[key], value)
        for key, value in content.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | content | merged


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = map(str.strip, override.partition("="))
    if not equals:
        raise RecipeError(f'--set {override}: expected KEY=VALUE, such as "soups.learned.epochs=2"')
    try:
        value = parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.startswith(("[", "{", '"', "'")):
            reason = str(error).partition(" (at ")[0]
            raise RecipeError(
                f"--set {override}: not TOML: {reason}; the shell removes quotes that are not "
                """quoted, so write --set 'evaluate.threats=["Linf 8/255"]'"""
            ) from None
        value = text
    except ValueError as error:
        raise RecipeError(f"--set {override}: {error}") from None
    *tables, last = parts = _split_key(key)
    if not all(parts):
        raise RecipeError(f"--set {override}: expected KEY=VALUE with a key, such as seed=1")
    if len(tables) >= MAX_KEY_PARTS:
        raise RecipeError(f"--set {override}: got {len(tables) + 1} parts in a key, expected fewer")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise RecipeError(f"--set {override}: {table} is not a table")
    content[last] = value


def _split_key(key: str) -> list[str]:
    """Split a dotted key as TOML does, which may quote a part: ingredients."eps0.5".epochs."""
    try:
        table: Any = parse_toml(f"{key} = 0")
    except ValueError:
        return key.split(".")  # names that TOML would quote
    parts: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        ((part, table),) = table.items()
        parts.append(part)
    return parts if table == 0 else key.split(".")


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make the paths of a recipe absolute; they are relative to `folder`.

    A last part that is a link stays: the caches of other programs link to files without an ending.
    """

    def absolute(path: str) -> str:
        place = folder / user_path(path)
        return str(_resolve(place) if place.name == ".." else _resolve(place.parent) / place.name)

    def absolute_checkpoint(path: str | None) -> str | None:
        if path is None or path.startswith(PUBLISHED_PREFIX) or remote_address(path):
            return path
        return absolute(path)

    updates: dict[str, Any] = {}
    kind, colon, place = recipe.data.partition(":")
    if colon and _names_path(kind, place, folder):
        updates["data"] = f"{kind}:{absolute(place)}"
    if recipe.evaluate.shift:
        shift = absolute(recipe.evaluate.shift)
        updates["evaluate"] = recipe.evaluate.model_copy(update={"shift": shift})
    for name in ("pretrain", "finetune"):
        section = recipe[name]
        if section and section["synthetic"]:
            path = absolute(section["synthetic"])
            updates[name] = section.model_copy(update={"synthetic": path})
    return _map_checkpoints(recipe.model_copy(update=updates), absolute_checkpoint)


def _names_path(kind: str, place: str, folder: Path) -> bool:
    """Return whether the place of a data source is a path; an existing path comes before a name."""
    what = DATA_SOURCES[kind].facts.get("place") if kind in DATA_SOURCES else None
    return what == "path" or (what == "path or name" and (folder / user_path(place)).exists())


def _map_checkpoints(recipe: Recipe, path_of: Callable[[str | None], str | None]) -> Recipe:
    ingredients = {
        name: item.model_copy(update={"checkpoint": path_of(item.checkpoint)})
        for name, item in recipe.ingredients.items()
    }
    updates = {
        "ingredients": ingredients,
        "checkpoint": path_of(recipe.checkpoint),
        "adapter_base": path_of(recipe.adapter_base),
    }
    return recipe.model_copy(update=updates)


def _describe_first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    location = first["loc"]
    place = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        hint = suggest(str(location[-1]), sorted(_known_keys(location[:-1])))
        return f"{place}: unknown key{hint}"
    if first["type"] == "missing":
        return f"{place}: missing"
    message = first["msg"].removeprefix("Value error, ")
    message = _EXPECTED.get(first["type"], message)
    if first["type"] != "value_error":
        message += f"; got {describe_value(first['input'])}"
    return _name_place(location, message) if place else message


def _name_place(location: tuple[int | str, ...], message: str) -> str:
    """Return a message after the place of its key, which the message may name itself."""
    place = ".".join(str(part) for part in location)
    name = next((part for part in reversed(location) if isinstance(part, str)), "")
    message = message.removeprefix(f"{name}: ")
    key = message.partition(": ")[0]
    within = "." if location[-1] in _TABLES and key in _known_keys(location) else ": "
    return f"{place}{within}{message}"


def _known_keys(location: tuple[int | str, ...]) -> Iterable[str]:
    """Return the valid keys of the table at a location in a recipe."""
    if not location:
        return Recipe.model_fields
    if location[-1] == "early_stop":
        return EarlyStopSection.model_fields
    name = str(location[0])
    return (_NAMED_TABLES.get(name) or _TABLES[name]).model_fields

"""Recipes: TOML files, validated into settings."""

from robustsoup.recipes.reading import (
    checkpoint_places,
    load_recipe,
    parse_recipe,
    with_files,
)
from robustsoup.recipes.recipe import Recipe
from robustsoup.recipes.sections import Figure, Ingredient, Plane, Soup, Training

__all__ = [
    "Figure",
    "Ingredient",
    "Plane",
    "Recipe",
    "Soup",
    "Training",
    "checkpoint_places",
    "load_recipe",
    "parse_recipe",
    "with_files",
]

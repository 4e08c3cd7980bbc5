"""Commands that build a recipe from their options and run it: search and landscape."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustsoup.catalog import SOUP_METHODS
from robustsoup.cli.options import (
    AllowLeakage,
    AsJson,
    CheckpointPlace,
    DataOptions,
    Fields,
    Files,
    NetworkOptions,
    RunOptions,
    SampleLimit,
    ShiftFolder,
    Threats,
)
from robustsoup.errors import RequestError
from robustsoup.settings import AttackSettings, BufferSettings, LandscapeSettings, SearchSettings

if TYPE_CHECKING:
    from robustsoup.recipes import Recipe


def search_command(
    checkpoints: Files,
    data: DataOptions,
    threat: Threats,
    output: Annotated[Path, typer.Option("-o", help="Run folder: soup, table, figures, report.")],
    search: Annotated[SearchSettings, Fields(omit=("max_soups", "screen_steps"))],
    attack: Annotated[AttackSettings, Fields(omit=("targets", "eot", "seed", "batch_size"))],
    soup: Annotated[BufferSettings, Fields(only=("buffers",))],
    network: NetworkOptions,
    run: RunOptions,
    samples: SampleLimit = None,
    shift: ShiftFolder = None,
    allow_leakage: AllowLeakage = False,
    as_json: AsJson = False,
) -> int:
    """Choose the most robust soup that meets --require.

    Evaluates soups on val, reports the chosen one on test, and writes it with a table, figures and
    a report. Exit code 3 if no soup meets the requirements, 4 if the chosen one misses them on
    test. The same command resumes an interrupted search.

    Example: `robustsoup search eps16.safetensors eps64.safetensors eps96.safetensors --data digits
    --threat "Linf 56/255" --require "clean>=0.5" --steps 20 -o best`
    """
    from robustsoup.cli.inputs import name_checkpoints
    from robustsoup.cli.recipe_runs import run_recipe

    names = name_checkpoints(checkpoints)
    content = _recipe_content("search", data, network, names, allow_leakage=allow_leakage)
    content |= {
        "soups": _soup_section(search, soup, names),
        "evaluate": {
            "threats": threat,
            "attack": attack.attack,
            "loss": attack.loss,
            "steps": attack.steps,
            "restarts": attack.restarts,
            "n_queries": attack.n_queries,
            "masking_check": attack.masking_check,
            "precision": attack.precision,
            "screen": search.screen,
            "select_samples": samples,
            "report_samples": samples,
            "report": "chosen",
            "shift": None if shift is None else str(shift),
        },
        "select": {
            "maximise": search.maximise,
            "require": list(search.require),
            "point": search.point,
        },
        "report": {"figures": ["ternary", "tradeoff"]},
    }
    recipe = _parse_content(content)
    return run_recipe(recipe, output, run, data_root=data.data_root, as_json=as_json)


def landscape_command(
    first: Annotated[
        Path,
        CheckpointPlace(),
        typer.Argument(
            metavar="W0",
            help="Checkpoint at the origin, such as the pre-trained network.",
            show_default=False,
        ),
    ],
    second: Annotated[
        Path,
        CheckpointPlace(),
        typer.Argument(metavar="W1", help="Checkpoint off the x axis.", show_default=False),
    ],
    third: Annotated[
        Path,
        CheckpointPlace(),
        typer.Argument(metavar="W2", help="Checkpoint on the x axis.", show_default=False),
    ],
    data: DataOptions,
    output: Annotated[Path, typer.Option("-o", help="Run folder: losses, figure, report.")],
    settings: Annotated[LandscapeSettings, Fields(required=("threat",))],
    network: NetworkOptions,
    run: RunOptions,
    allow_leakage: AllowLeakage = False,
    as_json: AsJson = False,
) -> int:
    """Map the robust loss on the plane through three checkpoints.

    The same command resumes an interrupted map after the last finished point.

    Example: `robustsoup landscape base.safetensors eps16.safetensors eps96.safetensors
    --data digits --threat "Linf 56/255" --points 5 --samples 200 -o plane`
    """
    from robustsoup.cli.inputs import name_checkpoints
    from robustsoup.cli.recipe_runs import run_recipe

    names = name_checkpoints([first, second, third])
    content = _recipe_content("landscape", data, network, names, allow_leakage=allow_leakage)
    content |= {
        "precision": settings.precision,
        "planes": {
            "plane": {
                "checkpoints": list(names),
                "threat": str(settings.threat),
                "points": settings.points,
                "samples": settings.samples,
                "buffers": settings.buffers,
                "attack_steps": settings.attack_steps,
                "calibrate_samples": settings.calibrate_samples,
            }
        },
        "evaluate": {"threats": []},
        "report": {"figures": ["landscape"]},
    }
    recipe = _parse_content(content)
    return run_recipe(recipe, output, run, data_root=data.data_root, as_json=as_json)


def _recipe_content(
    name: str,
    data: DataOptions,
    network: NetworkOptions,
    checkpoints: dict[str, Path],
    *,
    allow_leakage: bool,
) -> dict[str, Any]:
    """Return the entries that the recipes of both commands share.

    Paths are absolute; a copy in the cache is named by its address, which other machines know too.
    """
    from robustsoup.checkpoints.remote import find_copy_of

    copies = {key: find_copy_of(path) for key, path in checkpoints.items()}
    places = {
        key: str(checkpoints[key].absolute()) if copy is None else copy.address
        for key, copy in copies.items()
    }
    return {
        "name": name,
        "data": data.data,
        "seed": data.seed,
        "image_size": data.image_size,
        "channels": data.channels,
        "model": network.model,
        "normalize": network.constants and list(network.constants),
        "key": network.key,
        "allow_leakage": allow_leakage,
        "ingredients": places,
    }


def _soup_section(
    search: SearchSettings, soup: BufferSettings, checkpoints: dict[str, Path]
) -> dict[str, Any]:
    """Return the [soups] table; the name of its section differs from every ingredient."""
    method = str(search.method)
    if method == "greedy" and search.screen:
        raise RequestError(
            "--screen: does not apply to --method greedy, which evaluates each soup in full"
        )
    if method == "surrogate" and search.screen:
        raise RequestError(
            "--screen: does not apply to --method surrogate, which attacks few soups, in full"
        )
    section: dict[str, Any] = {"method": method, "buffers": soup.buffers}
    if method in ("grid", "line", "surrogate") or method not in SOUP_METHODS:
        section["step"] = search.step
    if method == "surrogate":
        section |= {"tolerance": search.tolerance, "time_limit": search.time_limit}
    if search.score is not None:
        section["score"] = search.score
    name = method.rpartition(":")[2]
    return {name if name not in checkpoints else f"{name}-soup": section}


def _parse_content(content: dict[str, Any]) -> "Recipe":
    from robustsoup.recipes import parse_recipe

    return parse_recipe(content, content["name"], Path.cwd())

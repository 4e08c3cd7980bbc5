"""Commands that build a recipe from their options and run it: search and landscape."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustsoup.catalog import BUFFER_POLICIES, SOUP_METHODS
from robustsoup.cli.options import (
    AllowLeakage,
    AsJson,
    Base,
    CheckpointPlace,
    DataOptions,
    Fields,
    Files,
    Given,
    NetworkOptions,
    RunOptions,
    SampleLimit,
    ShiftFolder,
    Threats,
    flag,
)
from robustsoup.errors import RequestError
from robustsoup.settings import (
    ALL_METHODS,
    AttackSettings,
    BufferSettings,
    LandscapeSettings,
    LearnSettings,
    MergeSettings,
    SearchSettings,
    to_record,
)
from robustsoup.soups.method_keys import find_unread, is_merge, method_keys
from robustsoup.threats import ThreatModel, first_attacked, parse_threats

if TYPE_CHECKING:
    from robustsoup.recipes import Recipe


EPOCHS_HELP = "Passes over the training split of --method learned, dial and all."


def search_command(
    checkpoints: Files,
    data: DataOptions,
    threat: Threats,
    output: Annotated[Path, typer.Option("-o", help="Run folder: soup, table, figures, report.")],
    search: Annotated[SearchSettings, Fields(omit=("max_soups", "screen_steps"))],
    attack: Annotated[AttackSettings, Fields(omit=("targets", "eot", "seed", "batch_size"))],
    soup: Annotated[BufferSettings, Fields(only=("buffers",))],
    learn: Annotated[LearnSettings, Fields(only=("epochs",), helps={"epochs": EPOCHS_HELP})],
    merging: Annotated[MergeSettings, Fields()],
    network: NetworkOptions,
    run: RunOptions,
    given: Given,
    base: Base = None,
    samples: SampleLimit = None,
    shift: ShiftFolder = None,
    allow_leakage: AllowLeakage = False,
    as_json: AsJson = False,
) -> int:
    """Choose the most robust soup that meets --require.

    Evaluates soups on val, reports the chosen one on test, and writes it with a table, figures and
    a report. Exit code 3 if no soup meets the requirements, 4 if the chosen one misses them on
    test. The same command resumes an interrupted search.

    Example: `robustsoup search eps16.safetensors eps96.safetensors --data digits
    --threat "Linf 56/255" --require "clean>=0.5" --steps 20 -o best`
    """
    from robustsoup.cli.inputs import name_checkpoints
    from robustsoup.cli.recipe_runs import run_recipe

    _check_goal_options(search)
    _check_meanings(search, merging, given)
    names = name_checkpoints(checkpoints)
    content = _recipe_content("search", data, network, names, allow_leakage=allow_leakage)
    content |= {
        "soups": _soup_sections(search, soup, learn, names, threat),
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
    _add_merging(content, search, merging, base)
    recipe = _parse_content(content)
    return run_recipe(
        recipe, output, run, data_root=data.data_root, as_json=as_json, compares_ways=True
    )


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


def _check_goal_options(search: SearchSettings) -> None:
    """Check --require, --maximise and --score, so that errors name the option."""
    from robustsoup.soups.goal import Requirement, Score, parse_target

    with _naming_option("require"):
        Requirement.parse_all(search.require)
    with _naming_option("maximise"):
        parse_target("clean" if search.maximise is None else search.maximise)
    with _naming_option("score"):
        Score.parse("clean" if search.score is None else search.score)


@contextmanager
def _naming_option(name: str) -> Iterator[None]:
    """Let a RequestError about a setting begin with its option."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"--{name}: {str(error).removeprefix(f'{name}: ')}") from None


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
    base = network.adapter_base
    return {
        "name": name,
        "data": data.data,
        "seed": data.seed,
        "image_size": data.image_size,
        "channels": data.channels,
        "model": network.model,
        "normalize": network.constants and list(network.constants),
        "key": network.key,
        "adapter_base": None if base is None else _place_of(base),
        "allow_leakage": allow_leakage,
        "ingredients": {name: _place_of(path) for name, path in checkpoints.items()},
    }


def _place_of(path: Path) -> str:
    from robustsoup.checkpoints.remote import find_copy_of

    copy = find_copy_of(path)
    return str(path.absolute()) if copy is None else copy.address


def _soup_sections(
    search: SearchSettings,
    soup: BufferSettings,
    learn: LearnSettings,
    checkpoints: dict[str, Path],
    threats: Sequence[str],
) -> dict[str, Any]:
    """Return the [soups] tables; their names differ from those of the ingredients."""
    from robustsoup.soups.learned_search import (
        LEARNING,
        TOGETHER,
        LearnedFamily,
        why_not_screened,
    )

    method = str(search.method)
    reason = why_not_screened(method)
    if search.screen and reason is not None:
        raise RequestError(f"--screen: does not apply to --method {method}, {reason}")
    if search.score is not None and method not in ("greedy", ALL_METHODS):
        raise RequestError(
            f"--score: applies to --method greedy, got {method}; --maximise says what is best"
        )
    parsed = parse_threats(threats)
    sections: dict[str, Any] = {}
    for part in TOGETHER if method == ALL_METHODS else (method,):
        name = part.rpartition(":")[2]
        section = _soup_section(part, search)
        if part in LEARNING:
            family = LearnedFamily.of(part, parsed, search.sweep)
            section |= {"epochs": learn.epochs, "threats": list(map(str, family.threats))}
            section |= (
                {"at": list(family.positions)}
                if part == "dial"
                else {"objectives": list(family.objectives)}
            )
        if soup.buffers is not None:
            section |= _describe_buffers(soup.buffers, parsed)
        sections[_name_section(name, checkpoints)] = section
    return sections


def _name_section(name: str, checkpoints: Iterable[str]) -> str:
    """Return a name of a section whose soups, NAME or NAME-..., have the name of no checkpoint."""
    taken = [f"{other}-".casefold() for other in checkpoints]
    while any(other.startswith(f"{name}-".casefold()) for other in taken):
        name = f"{name}-soup"
    return name


def _describe_buffers(policy: str, threats: Sequence[ThreatModel]) -> dict[str, Any]:
    """Return the keys of a buffer policy; one that attacks does so under the first threat."""
    section: dict[str, Any] = {"buffers": policy}
    if "threat" in BUFFER_POLICIES.get_entry(policy).facts.get("needs", ()):
        section["calibrate_threat"] = str(_first_attacked(threats, f"--buffers {policy}"))
    return section


def _first_attacked(threats: Sequence[ThreatModel], option: str) -> ThreatModel:
    """Return the first threat with a radius, which an option requires."""
    threat = first_attacked(threats)
    if threat.is_clean:
        raise RequestError(f"{option}: attacks training samples; give a threat (--threat)")
    return threat


def _soup_section(method: str, search: SearchSettings) -> dict[str, Any]:
    """Return the [soups] table of one method."""
    keys = method_keys(method)
    values = {name: getattr(search, name) for name in ("time_limit", "step", "tolerance", "score")}
    section = {name: value for name, value in values.items() if name in keys and value is not None}
    return {"method": method} | section


def _check_meanings(search: SearchSettings, merging: MergeSettings, given: Given) -> None:
    """Raise RequestError if an option was typed that the method does not read."""
    from robustsoup.soups.learned_search import TOGETHER

    method = str(search.method)
    parts = TOGETHER if method == ALL_METHODS else (method,)
    names = ("step", "tolerance", "epochs", "weights", *to_record(merging))
    if unread := find_unread(filter(given.__contains__, names), parts):
        raise RequestError(f"{flag(unread)}: has no meaning with --method {method}")


def _add_merging(
    content: dict[str, Any], search: SearchSettings, merging: MergeSettings, base: Path | None
) -> None:
    """Add the keys of a merging method to its [soups] table, and its base to the recipe."""
    method = str(search.method)
    entry, keys = SOUP_METHODS.find(method), method_keys(method)
    requires = entry.facts.get("requires", ()) if entry is not None else ()
    if base is not None:
        if "base" not in requires and all(
            section.get("buffers") != "base" for section in content["soups"].values()
        ):
            raise RequestError("--base: requires --buffers base or a --method that takes a base")
        content["checkpoint"] = _place_of(base)
    if not is_merge(method):
        return
    (section,) = content["soups"].values()
    values = {**to_record(merging), "weights": search.weights}
    section |= {name: value for name, value in values.items() if name in keys}
    if "threat" in requires:
        threats = parse_threats(content["evaluate"]["threats"])
        section["threats"] = [str(_first_attacked(threats, f"--method {method}"))]


def _parse_content(content: dict[str, Any]) -> "Recipe":
    from robustsoup.recipes import parse_recipe
    from robustsoup.user_code import current_folder_importable

    with current_folder_importable():  # a method may be the user's function
        return parse_recipe(content, content["name"], Path.cwd())

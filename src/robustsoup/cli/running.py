"""Commands that run a recipe, estimate its cost, or draw its report."""

from pathlib import Path
from typing import Annotated

import typer

from robustsoup.cli.options import AsJson, ClusterOptions, RunOptions
from robustsoup.cli.terminal import print_error, print_json, print_line

RecipeFile = Annotated[Path, typer.Argument(help="Recipe (TOML).", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option("--set", help="Override a setting, such as soups.learned.epochs=2; repeatable."),
]
DataRoot = Annotated[
    str | None,
    typer.Option(
        help="Folder of the data; by default $ROBUSTSOUP_DATA, else the user's cache folder."
    ),
]


def demo_command(
    run: RunOptions,
    output: Annotated[Path, typer.Option("-o", help="Run folder.")] = Path("runs/quickstart"),
) -> int:
    """Run the quickstart recipe on embedded data.

    Trains, mixes and evaluates small networks on scikit-learn's digits, then writes a report.

    Example: `robustsoup demo`
    """
    from robustsoup.cli.recipe_runs import run_recipe
    from robustsoup.recipes import load_recipe

    run_recipe(load_recipe(locate_quickstart()), output, run)
    return 0


def locate_quickstart() -> Path:
    """Return the quickstart recipe of the package."""
    return Path(__file__).parents[1] / "quickstart.toml"


def run_command(
    recipe: RecipeFile,
    run: RunOptions,
    cluster: ClusterOptions,
    overrides: Overrides = [],
    output: Annotated[
        Path | None, typer.Option("-o", help="Run folder; runs/NAME by default.")
    ] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> int:
    """Run or resume a recipe and write its report.

    Steps that are already in the store do not run again. With --ray or --slurm, each step runs as
    soon as its inputs are there, with --threads CPUs, on machines that share the store.

    Examples, after `robustsoup demo`:
    `robustsoup run runs/quickstart/recipe.toml --set evaluate.steps=10 -o runs/ten`
    `robustsoup run runs/quickstart/recipe.toml --ray local --threads 1 --set seed=1 -o runs/ray`
    """
    from robustsoup.cli.recipe_runs import run_recipe
    from robustsoup.recipes import load_recipe
    from robustsoup.user_code import current_folder_importable

    with current_folder_importable():
        loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / loaded.name
    return run_recipe(loaded, folder, run, cluster=cluster, data_root=data_root, as_json=as_json)


def plan_command(
    recipe: RecipeFile,
    run: RunOptions,
    overrides: Overrides = [],
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Predict the run on this many devices (--ray, --slurm). With --device h100, it is "
            "calculated for GPUs that are not here.",
        ),
    ] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """List the steps of a recipe and their cost.

    Shows which steps are already in the store, and runs none of the others. Their cost is
    extrapolated from a few batches timed on this device. Downloads neither CIFAR nor checkpoints
    whose network is known: their sizes suffice.

    Examples, after `robustsoup demo`:
    `robustsoup plan runs/quickstart/recipe.toml --set finetune.epochs=20`
    `robustsoup plan runs/quickstart/recipe.toml --set seed=1 --devices 8 --device h100`
    """
    from dataclasses import replace

    from robustsoup.cli.recipe_runs import prepare_recipe, price_plan
    from robustsoup.cli.tables import print_plan
    from robustsoup.recipes import load_recipe
    from robustsoup.runs.scaling import RATES
    from robustsoup.user_code import current_folder_importable

    with current_folder_importable():
        loaded = load_recipe(recipe, overrides)
    rate = RATES.get(run.device)
    if rate is not None:
        devices, run = devices or 1, replace(run, device="cpu")
        if loaded.precision == "auto":
            loaded = loaded.model_copy(update={"precision": "bfloat16"})
    part_samples = ClusterOptions().part_samples if (devices or 1) > 1 else None
    prepared = prepare_recipe(loaded, run, data_root, part_samples, plans_only=True)
    price = price_plan(prepared, devices, rate)
    if as_json:
        print_json(price)
    else:
        print_plan(price, prepared.context.device.type)


def report_command(
    folder: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
) -> None:
    """Write the figures and report.html of a run folder.

    Reads stored results and runs nothing.

    Example, after `robustsoup demo`: `robustsoup report runs/quickstart`
    """
    from robustsoup.cli.progress import Bar
    from robustsoup.reports import check_finished, write_report
    from robustsoup.runs.locks import lock_folder
    from robustsoup.runs.results import Results

    check_finished(folder)
    Results.load(folder / "results.json")  # an error before a lock is left in a wrong folder
    with lock_folder(folder, print_error), Bar("drawing the report"):
        page = write_report(folder)
    print_line(f"report: {page}")

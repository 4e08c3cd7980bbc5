"""Commands that run a recipe, be it a file or made of their options."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from robustsoup.cli.app import app, stdout
from robustsoup.cli.inputs import (
    absolute_folder,
    fetch_checkpoint,
    fetch_data,
    names_of,
    numbers,
    print_json,
    say_leakage,
    use_threads,
)
from robustsoup.cli.options import (
    AsJson,
    Attack,
    Buffers,
    DataOption,
    DataRoot,
    Device,
    Files,
    ImageSize,
    Leakage,
    Loss,
    Model,
    Normalize,
    Precision,
    Restarts,
    Samples,
    SearchPrecision,
    Seed,
    Sets,
    Steps,
    Threads,
    ThreatOption,
    Threats,
)
from robustsoup.cli.progress import Bar, RunReporter, duration
from robustsoup.cli.tables import as_bytes, print_results
from robustsoup.errors import RequestError
from robustsoup.recipes import Recipe, load_recipe, parse_recipe, with_files
from robustsoup.reports import write_report
from robustsoup.runs.cost import estimate_bytes, estimate_seconds
from robustsoup.runs.folder import ensure_folder
from robustsoup.runs.run import PreparedRun, prepare_run, run_prepared


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", help="The run folder.")] = Path("runs/quickstart"),
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Run the quickstart recipe on embedded data (scikit-learn's digits), then write its report.

    Example: `robustsoup demo`
    """
    use_threads(threads)
    recipe = load_recipe(str(files("robustsoup") / "quickstart.toml"))
    _finish(recipe, output, device, None, as_json=False)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    sets: Sets = [],
    output: Annotated[
        Path | None, typer.Option("-o", help="The run folder; else runs/NAME.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe, or go on with it: only what the store lacks is done. Then write the report.

    Example, after `robustsoup demo`: `robustsoup run runs/quickstart/recipe.toml --set evaluate.steps=10 -o runs/ten`
    """
    use_threads(threads)
    loaded = load_recipe(recipe, sets)
    raise typer.Exit(
        _finish(loaded, output or Path("runs") / loaded.name, device, data_root, as_json=as_json)
    )


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    sets: Sets = [],
    device: Device = "auto",
    threads: Threads = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Show a recipe's steps, which are in the store already, and what the others will cost. Runs none of them.

    The cost comes from timing a few batches on this device.

    Example, after `robustsoup demo`: `robustsoup plan runs/quickstart/recipe.toml --set finetune.epochs=20`
    """
    use_threads(threads)
    prepared = _prepare(load_recipe(recipe, sets), device, data_root)
    steps, store = prepared.plan.steps, prepared.store
    cost = estimate_seconds(steps, prepared.context)
    rows = [
        {
            "kind": s.kind,
            "name": s.name,
            "key": s.key,
            "done": store.has(s.key),
            "seconds": round(cost[s.key], 2),
        }
        for s in steps
    ]
    missing = sum(row["seconds"] for row in rows if not row["done"])
    todo = [step for step in steps if not store.has(step.key)]
    price = {
        "seconds": missing,
        "bytes": estimate_bytes(todo, prepared.context),
        "passes": sum(step.passes for step in todo),
        "epochs": sum(step.task.epochs for step in todo),
    }
    if as_json:
        return print_json({"recipe": prepared.plan.recipe.name, "steps": rows, **price})
    table = Table("step", "name", "store", "about", box=None)
    for row in rows:
        table.add_row(
            row["kind"],
            row["name"],
            "done" if row["done"] else "-",
            "" if row["done"] else duration(row["seconds"]),
        )
    stdout.print(table)
    stdout.print(
        f"{len(rows)} steps, {len(todo)} to do: {price['epochs']} epochs, {price['passes']:.1e} forward passes, "
        f"about {duration(missing)} on this {prepared.context.device.type} and {as_bytes(price['bytes'])} of disk",
        soft_wrap=True,
    )


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Draw the figures of a run folder anew and write its report.html.

    Example, after `robustsoup demo`: `robustsoup report runs/quickstart`
    """
    stdout.print(f"report: {write_report(folder)}", markup=False, soft_wrap=True)


@app.command()
def search(
    checkpoints: Files,
    data: DataOption,
    threat: Threats,
    output: Annotated[
        Path, typer.Option("-o", help="The run folder: soup, table, figures, report.")
    ],
    method: Annotated[str, typer.Option(help="grid, line, uniform or greedy.")] = "grid",
    step: Annotated[float, typer.Option(help="The grid's step.")] = 0.2,
    score: Annotated[
        str | None,
        typer.Option(
            help='What greedy must not lose, as in "0.3 clean + 0.7 Linf 8/255"; else --maximise.'
        ),
    ] = None,
    require: Annotated[list[str], typer.Option(help='As in "clean>=0.85"; repeatable.')] = [],
    maximise: Annotated[
        str | None, typer.Option(help="What to maximise; else the first --threat.")
    ] = None,
    point: Annotated[
        bool,
        typer.Option("--point", help="Judge --require by the estimate, not by its 95 % lower end."),
    ] = False,
    attack: Attack = "apgd",
    loss: Loss = "ce",
    steps: Steps = 100,
    restarts: Restarts = 1,
    samples: Samples = None,
    screen: Annotated[
        bool, typer.Option("--screen", help="Try all briefly, confirm in full what no other beats.")
    ] = False,
    buffers: Buffers = None,
    model: Model = None,
    normalize: Normalize = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    precision: SearchPrecision = "float32",
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    allow_leakage: Leakage = False,
    as_json: AsJson = False,
) -> None:
    """Try soups on `val`, pick the most robust one that meets --require, judge it on `test`, write it. Resumes.

    Example: `robustsoup search eps16.safetensors eps64.safetensors eps96.safetensors --data digits --threat "Linf 56/255"
    --require "clean>=0.9" --steps 20 -o best`
    """
    use_threads(threads)
    names = names_of(checkpoints)
    section = method if method not in names else f"{method}-soup"
    own = {"step": step} if method in ("grid", "line") else {}
    if method == "greedy" and screen:
        raise RequestError("--screen: a greedy soup is judged in full at each turn; leave it out")
    if score is not None:
        own["score"] = score
    content = {
        "name": "search",
        "data": absolute_folder(data),
        "seed": seed,
        "image_size": image_size,
        "model": model,
        "normalize": normalize and [numbers(part) for part in normalize],
        "allow_leakage": allow_leakage,
        "ingredients": {name: str(Path(path).absolute()) for name, path in names.items()},
        "soups": {section: {"method": method, "buffers": buffers} | own},
        "evaluate": {
            "threats": threat,
            "attack": attack,
            "loss": loss,
            "steps": steps,
            "restarts": restarts,
            "screen": screen,
            "select_samples": samples,
            "report_samples": samples,
            "report": "chosen",
            "precision": precision,
        },
        "select": {"maximise": maximise, "require": require, "point": point},
        "report": {"figures": ["ternary", "tradeoff"]},
    }
    recipe = parse_recipe(content, "search", Path.cwd())
    raise typer.Exit(_finish(recipe, output, device, data_root, as_json=as_json))


@app.command("landscape")
def landscape_command(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="W0", help="At the origin, say the pre-trained network.", show_default=False
        ),
    ],
    second: Annotated[
        Path, typer.Argument(metavar="W1", help="Off the x axis.", show_default=False)
    ],
    third: Annotated[
        Path, typer.Argument(metavar="W2", help="At the end of the x axis.", show_default=False)
    ],
    data: DataOption,
    threat: ThreatOption,
    output: Annotated[Path, typer.Option("-o", help="The run folder: losses, picture, report.")],
    points: Annotated[int, typer.Option(min=2, help="Points along each side.")] = 21,
    samples: Annotated[
        int, typer.Option(min=1, help="At most so many test samples, drawn by the seed.")
    ] = 2000,
    attack_steps: Annotated[
        int, typer.Option(min=1, help="APGD steps; the highest loss of every sample counts.")
    ] = 10,
    buffers: Annotated[
        str, typer.Option(help="base, recalibrate or recalibrate-adversarial.")
    ] = "recalibrate",
    calibrate_samples: Annotated[
        int, typer.Option(min=2, help="Training samples that statistics are measured on.")
    ] = 10_000,
    model: Model = None,
    normalize: Normalize = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "auto",
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    allow_leakage: Leakage = False,
    as_json: AsJson = False,
) -> None:
    """Map the robust loss on the plane through three checkpoints. Goes on where it was killed, point by point.

    Example: `robustsoup landscape base.safetensors eps16.safetensors eps96.safetensors --data digits --threat "Linf 56/255"
    --points 5 --samples 200 -o plane`
    """
    use_threads(threads)
    names = names_of([first, second, third])
    plane = {
        "checkpoints": list(names),
        "threat": threat,
        "points": points,
        "samples": samples,
        "buffers": buffers,
        "attack_steps": attack_steps,
        "calibrate_samples": calibrate_samples,
    }
    content = {
        "name": "landscape",
        "data": absolute_folder(data),
        "seed": seed,
        "image_size": image_size,
        "model": model,
        "normalize": normalize and [numbers(part) for part in normalize],
        "allow_leakage": allow_leakage,
        "precision": precision,
        "ingredients": {name: str(Path(path).absolute()) for name, path in names.items()},
        "planes": {"plane": plane},
        "evaluate": {"threats": []},
        "report": {"figures": ["landscape"]},
    }
    recipe = parse_recipe(content, "landscape", Path.cwd())
    raise typer.Exit(_finish(recipe, output, device, data_root, as_json=as_json))


def _finish(
    recipe: Recipe, folder: Path, device: str, data_root: str | None, *, as_json: bool
) -> int:
    """Run a recipe into `folder`, report, print where to look; 3 if nothing meets the requirements."""
    prepared = _prepare(recipe, device, data_root)
    say_leakage(prepared.leakage)
    ensure_folder(folder)
    with RunReporter(prepared.context, folder) as reporter:
        run, selection = run_prepared(prepared, folder, reporter)
    results = run.to_json()
    page = write_report(folder)
    if as_json:
        print_json(
            {
                key: results.get(key)
                for key in ("name", "selection", "soup", "leakage", "protocol", "rows", "planes")
            }
        )
    else:
        print_results(stdout, results, page)
    return 3 if selection is not None and not selection.met else 0


def _prepare(recipe: Recipe, device: str, data_root: str | None) -> PreparedRun:
    fetch_data(recipe.data, data_root)
    recipe = with_files(recipe, lambda name: fetch_checkpoint(name, data_root, None)["path"])
    with Bar(f"reading {recipe.data}") as bar:
        return prepare_run(recipe, device=device, data_root=data_root, on_progress=bar)

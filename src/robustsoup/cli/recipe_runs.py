"""Run one recipe, or estimate its cost, with progress on the terminal."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from robustsoup import distributed
from robustsoup.cli.copying import copy_checkpoint
from robustsoup.cli.inputs import (
    download_checkpoint,
    download_data,
    print_leakage,
    print_notes,
    warn_of_overlaps,
)
from robustsoup.cli.options import ClusterOptions, RunOptions
from robustsoup.cli.progress import Bar, RunReporter, SilentReporter, format_duration
from robustsoup.cli.tables import print_results
from robustsoup.cli.terminal import print_error, print_json, print_line, print_warning
from robustsoup.errors import RequestError
from robustsoup.files import check_writable
from robustsoup.recipes import Recipe, checkpoint_places, with_files
from robustsoup.recipes.sections import PUBLISHED_PREFIX
from robustsoup.reports import write_report
from robustsoup.runs.caches import hold_caches
from robustsoup.runs.cluster import Cluster, Pool
from robustsoup.runs.cost import (
    WaysToSearch,
    compare_ways,
    estimate_bytes,
    estimate_seconds,
)
from robustsoup.runs.locks import lock_folder
from robustsoup.runs.run import PreparedRun, prepare_run, run_prepared
from robustsoup.runs.scaling import DeviceRate, predict
from robustsoup.runs.stand_ins import list_absent
from robustsoup.runs.tasks import FittingTask
from robustsoup.user_code import import_named_module

JSON_KEYS = ("name", "selection", "soup", "leakage", "protocol", "rows", "planes")


@distributed.local_first()
def prepare_recipe(
    recipe: Recipe,
    run: RunOptions,
    data_root: str | None = None,
    part_samples: int | None = None,
    *,
    plans_only: bool = False,
) -> PreparedRun:
    """Download and load the data and checkpoints of a recipe, and plan it.

    With `plans_only`, what has a stand-in is not downloaded (`robustsoup.runs.stand_ins`).
    """
    hold_caches()
    run.use_threads()
    for name in recipe.list_named_functions():
        import_named_module(name)
    absent = list_absent(recipe, data_root) if plans_only else []
    if recipe.data not in absent:
        download_data(recipe.data, data_root)

    def locate(name: str) -> str:
        published = f"{PUBLISHED_PREFIX}{name}"
        return published if published in absent else str(download_checkpoint(name, data_root).path)

    recipe = with_files(recipe, locate)
    places = checkpoint_places(recipe)
    if recipe.adapter_base is not None and not set(places) <= set(absent):
        places.append(recipe.adapter_base)
    for place in places:
        if place not in absent:
            copy_checkpoint(place)
    with Bar(f"reading {recipe.data}") as bar:
        prepared = prepare_run(
            recipe,
            device=run.device,
            data_root=data_root,
            part_samples=part_samples,
            absent=absent,
            on_progress=bar,
        )
    for place in prepared.absent:
        print_error(f"{place} is not on this machine; planned by its size, without downloading it")
    print_notes(prepared.context.data, *prepared.planner.plan.files.values())
    return prepared


def run_recipe(
    recipe: Recipe,
    folder: Path,
    run: RunOptions,
    *,
    cluster: ClusterOptions | None = None,
    data_root: str | None = None,
    as_json: bool = False,
    compares_ways: bool = False,
) -> int:
    """Run a recipe into a folder, write its report and print the results.

    Args:
        recipe: The recipe.
        folder: The run folder.
        run: Device, threads and the like.
        cluster: Other machines that run the steps.
        data_root: Folder of the data sets.
        as_json: Whether to print the results as JSON.
        compares_ways: Whether to say first how long each way to search would take.

    Returns:
        The exit code: 3 if no soup meets the requirements, 4 if they fail on `test`, else 0.
    """
    check_writable(folder, folder=True)
    cluster = cluster or ClusterOptions()
    if cluster.named and distributed.world() > 1:
        raise RequestError("--ray and --slurm start processes themselves; run without torchrun")
    require_pool(cluster)
    part_samples = cluster.part_samples if cluster.named else None
    prepared = prepare_recipe(recipe, run, data_root, part_samples)
    print_leakage(prepared.leakage)
    warn_of_overlaps(prepared.overlaps)
    for warning in prepared.plan.warnings:
        print_warning(warning)
    if compares_ways:
        print_ways(prepared)
    if not distributed.is_first():
        run_prepared(prepared, folder, SilentReporter())
        return distributed.from_first(lambda: 0)
    with lock_folder(folder, print_error):
        with (
            RunReporter(prepared.context, folder) as reporter,
            open_executor(prepared, cluster, data_root) as executor,
        ):
            results, _ = run_prepared(prepared, folder, reporter, executor)
        if as_json:
            content = results.to_json()
            print_json({key: content.get(key) for key in JSON_KEYS})
        else:
            print_results(results, folder)
        with Bar("drawing the report"):
            page = write_report(folder)
    if not as_json:
        print_line(f"report: {page}")
    code = 0 if results.selection is None else results.selection.exit_code
    return distributed.from_first(lambda: code)


def require_pool(cluster: ClusterOptions) -> None:
    """Raise RequestError if the extra that a cluster requires is not installed."""
    if cluster.ray is not None:
        from robustsoup.runs.ray_pool import import_ray

        import_ray()
    if cluster.slurm is not None:
        from robustsoup.runs.slurm_pool import import_submitit

        import_submitit()


def open_executor(
    prepared: PreparedRun, cluster: ClusterOptions, data_root: str | None
) -> AbstractContextManager[Cluster | None]:
    """Return what runs the steps: a cluster, or None for this process.

    Raises:
        RequestError: The extra that the cluster requires is not installed, or one GPU is named.
    """
    if not cluster.named:
        return nullcontext()
    device = prepared.context.device
    if device.index is not None:
        raise RequestError(
            f"--device: got {device}, expected {device.type}: the cluster chooses the device of "
            "each step; for --slurm local, CUDA_VISIBLE_DEVICES limits the choice"
        )
    threads, gpus = torch.get_num_threads(), int(device.type == "cuda")
    pool: Pool
    if cluster.ray is not None:
        from robustsoup.runs.ray_pool import RayPool

        pool = RayPool(cluster.ray, threads=threads, gpus=gpus)
    else:
        from robustsoup.runs.slurm_pool import SlurmPool

        pool = SlurmPool(cluster.slurm or "", threads=threads, gpus=gpus)
    return Cluster(prepared, pool, data_root)


def print_ways(prepared: PreparedRun) -> None:
    """Print how long each way to search would take, on standard error, unless all is done."""
    if not prepared.plan.list_missing(prepared.store.has):
        return
    ways = compare_ways(prepared.planner, prepared.context)
    if ways is not None:
        print_error(describe_ways(ways))


def describe_ways(ways: WaysToSearch) -> str:
    """Say how long each way to search takes; one that takes as long as the grid saves nothing."""
    others = {"--screen": ways.screen, "--method surrogate": ways.surrogate}
    parts = [f"{ways.soups} soups: about {format_duration(ways.grid)}"]
    parts += [
        f"{way}: {format_duration(seconds) if seconds < ways.grid else 'saves nothing here'}"
        for way, seconds in others.items()
    ]
    return "; ".join(parts)


def price_plan(
    prepared: PreparedRun, devices: int | None = None, rate: DeviceRate | None = None
) -> dict[str, Any]:
    """Return the steps of a plan and the cost of the missing steps, JSON-able.

    Args:
        prepared: The planned run.
        devices: Number of devices to predict the cost on; None for this one.
        rate: Kind of these devices; None for that of this one.
    """
    plan, store, context = prepared.plan, prepared.store, prepared.context
    missing = plan.list_missing(store.has)
    to_run = {step.key for step in missing}
    if devices is None:
        seconds, prediction = estimate_seconds(plan.steps, context), None
    else:
        prediction = predict(missing, context, devices, rate)
        seconds = dict.fromkeys((step.key for step in plan.steps), 0.0) | prediction.seconds
    rows = [
        {
            "kind": step.kind,
            "name": step.name,
            "key": step.key,
            "done": step.key not in to_run,
            "seconds": round(seconds[step.key], 2),
        }
        for step in plan.steps
    ]
    predicted = {} if prediction is None else {"prediction": prediction.as_record()}
    return {
        "recipe": plan.recipe.name,
        "steps": rows,
        "seconds": round(sum(seconds[step.key] for step in missing), 2),
        "bytes": estimate_bytes(missing, context),
        "passes": sum(step.passes for step in missing),
        "epochs": sum(
            task.settings.epochs
            for task in (step.task for step in missing)
            if isinstance(task, FittingTask)
        ),
        **predicted,
    }

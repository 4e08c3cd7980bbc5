"""Run a recipe: plan, execute, confirm screened soups, select, report, write the run folder."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robustsoup import distributed
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import (
    choose_image_size,
    describe_configuration,
    describe_other_sizes,
    resolve_network,
)
from robustsoup.checkpoints.provenance import Leakage, check_leakage, worst_leakage
from robustsoup.data import Data, Synthetic, load_data
from robustsoup.data.cifar import imitate_cifar
from robustsoup.data.duplicates import Overlap, find_copies, find_exact_overlaps
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.evaluation.evaluate import check_above_chance
from robustsoup.models import NetworkSettings
from robustsoup.models.fit import check_fit
from robustsoup.progress import Progress
from robustsoup.recipes import Recipe, checkpoint_places
from robustsoup.runs.choose import choose_soup, confirm_screened_soups, explain_choice
from robustsoup.runs.context import Context
from robustsoup.runs.execute import Executor, InProcess, Reporter, execute_plan
from robustsoup.runs.folder import write_run_folder
from robustsoup.runs.plan import Plan
from robustsoup.runs.planner import Planner
from robustsoup.runs.results import Results
from robustsoup.runs.soup_rows import plan_recipe
from robustsoup.runs.stand_ins import imitate_checkpoints
from robustsoup.runs.store import Store
from robustsoup.runs.surrogates import search_by_surrogate
from robustsoup.runs.tasks import (
    AttackExamples,
    EvaluateNetwork,
    LearnCoefficients,
    MapPlane,
    TrainNetwork,
    TrainSubspace,
)
from robustsoup.runs.time_limited import (
    evaluate_in_time,
    limited_tables,
    tightest_limit,
    without_limited_rows,
)
from robustsoup.soups import time_limit
from robustsoup.soups.ancestry import check_ingredients
from robustsoup.soups.constants import describe_differing_constants
from robustsoup.soups.goal import check_goal
from robustsoup.soups.learning import check_network
from robustsoup.soups.selection import Selection
from robustsoup.soups.time_limit import Late


@dataclass(frozen=True)
class PreparedRun:
    """A planned run, with everything that executing it or estimating its cost requires.

    Attributes:
        planner: The planner with the plan.
        context: Data, network and device.
        store: Finished steps.
        leakage: Whether networks were trained on samples that evaluate them.
        overlaps: Samples of val and test that are in another split or in generated images.
        absent: What is not on this machine, so that the plan has stand-ins for it.
        image_size: Side in pixels to which image files are resized; None for the source's default.
    """

    planner: Planner
    context: Context
    store: Store
    leakage: Leakage
    overlaps: tuple[Overlap, ...] = ()
    absent: tuple[str, ...] = ()
    image_size: int | None = None

    @property
    def plan(self) -> Plan:
        """The plan so far."""
        return self.planner.plan


def prepare_run(
    recipe: Recipe,
    *,
    device: str = "auto",
    data_root: str | None = None,
    part_samples: int | None = None,
    absent: Collection[str] = (),
    on_progress: Progress | None = None,
) -> PreparedRun:
    """Load the data and the checkpoints that a recipe names, and plan without running a step.

    Args:
        recipe: The recipe.
        device: "auto", "cpu", "cuda" or a device.
        data_root: Folder of the data sets.
        part_samples: Samples of the parts that evaluations are divided into; see `Planner`.
        absent: Data and places of checkpoints to take stand-ins for, as
            `robustsoup.runs.stand_ins` lists them; such a run must not be executed.
        on_progress: Called with (done, total, figures) while data is read.

    Raises:
        LeakageError: A checkpoint was trained on samples that evaluate it, and the recipe does not
            set allow_leakage.
        RobustsoupError: The data, a file or the network cannot be used.
    """
    resolved = resolve_device(device)
    places = checkpoint_places(recipe)
    side = recipe.image_size or choose_image_size(
        recipe.data, recipe.model, [p for p in places if p not in absent], recipe.opening
    )
    data = load_recipe_data(
        recipe, data_root, on_progress, image_size=side, imitates=recipe.data in absent
    )
    stand_ins = imitate_checkpoints(recipe, absent, data)
    checkpoints = [stand_ins.get(place, place) for place in places]
    if not stand_ins:  # an absent checkpoint may be the adapter that the base is for
        recipe.opening.check(checkpoints)
    network = resolve_network(
        recipe.model,
        normalize=recipe.normalize,
        data=data,
        checkpoints=checkpoints,
        opening=recipe.opening,
    )
    context = make_context(recipe, data, network, resolved)
    precision = resolve_precision(recipe.precision, resolved)
    planner = plan_recipe(recipe, data, network, precision, part_samples, stand_ins=stand_ins)
    _check_radii(planner.plan, data)
    _check_goal(planner, data)
    files = list(planner.plan.files.values())
    if recipe.model:
        planner.plan.warnings = tuple(describe_configuration(network, data, files))
    if files:
        files = [context.record_network(item) for item in files]
        check_ingredients([item.with_names_like(files[0]) for item in files])
        planner.plan.files.update(zip(list(planner.plan.files), files, strict=True))
        check_fit(files[0].network(), data.test)
        planner.plan.warnings = (
            *planner.plan.warnings,
            *describe_differing_constants(files),
            *describe_other_sizes(files, data),
        )
    _check_learning(planner.plan, context, files)
    leakage, overlaps = _find_leakage(recipe, files, data), _find_overlaps(recipe, data)
    return PreparedRun(planner, context, Store(), leakage, overlaps, tuple(absent), side)


def run_prepared(
    prepared: PreparedRun, folder: Path, reporter: Reporter, executor: Executor | None = None
) -> tuple[Results, Selection | None]:
    """Execute missing steps, select a soup, report it on `test`, and write the run folder.

    Args:
        prepared: The planned run.
        folder: The run folder; must exist.
        reporter: Receives progress events.
        executor: Runs the steps; by default this process does.

    Returns:
        The results, and the selection (None if the recipe selects no soup).
    """
    started = time_limit.clock()
    planner, context, store = prepared.planner, prepared.context, prepared.store
    plan, recipe = planner.plan, planner.recipe
    _refuse_files_near_chance(plan, context, reporter)
    chosen_executor = executor or InProcess(context, store)

    def execute_part(part: Plan) -> None:
        execute_plan(part, store, reporter, chosen_executor)

    def execute() -> None:
        execute_part(plan)

    limited = bool(limited_tables(recipe))

    def execute_unlimited() -> None:
        execute_part(without_limited_rows(plan) if limited else plan)

    execute_unlimited()
    surrogates = [
        search_by_surrogate(planner, store, section, execute_unlimited, started=started)
        for section in plan.surrogates
    ]
    left_out = evaluate_in_time(planner, execute_part, started=started) if limited else 0
    late = sum((item.late for item in surrogates), Late(left_out))
    if recipe.evaluate.screens:
        limit = tightest_limit(plan, started=started)
        unfinished = confirm_screened_soups(planner, store, execute, limit)
        late = replace(late, unfinished=unfinished)
    choice = choose_soup(planner, store, execute)
    selection = None if choice is None else choice.selection
    if selection is not None:
        planned = len(plan.steps)
        if recipe.evaluate.report == "chosen":
            planner.add_report(selection.best.name)
        planner.add_examples(selection.best.name)
        if len(plan.steps) > planned:
            execute()
    answer = None
    if choice is not None:
        answer = explain_choice(planner, store, choice, prepared.leakage, late)
    results = distributed.from_first(
        lambda: write_run_folder(
            folder,
            plan,
            context,
            store,
            answer=answer,
            leakage=prepared.leakage,
            overlaps=prepared.overlaps,
            surrogates=surrogates,
        )
    )
    return results, selection


def make_context(
    recipe: Recipe, data: Data, network: NetworkSettings, device: torch.device
) -> Context:
    """Return the data, network and device of a recipe, and what of the network it names."""
    return Context(
        data,
        network,
        device,
        network_named=bool(recipe.model),
        constants_named=bool(recipe.normalize),
    )


def load_recipe_data(
    recipe: Recipe,
    data_root: str | None,
    on_progress: Progress | None = None,
    *,
    image_size: int | None = None,
    imitates: bool = False,
) -> Data:
    """Load the data of a recipe, and read generated images once to compute their digest.

    Image files are resized to `image_size` pixels a side, or to the source's default. With
    `imitates`, return random images of the sizes of CIFAR instead.
    """
    if imitates:
        data = imitate_cifar(recipe.data, seed=recipe.seed)
    else:
        data = load_data(
            recipe.data,
            root=data_root,
            seed=recipe.seed,
            image_size=image_size,
            channels=recipe.channels,
            on_progress=on_progress,
        )
    for section in (recipe.pretrain, recipe.finetune):
        if section is not None and section["synthetic"]:
            Synthetic.open(section["synthetic"], on_progress)
    return data


def _find_overlaps(recipe: Recipe, data: Data) -> tuple[Overlap, ...]:
    """Count the samples of val and test that networks of the run are fitted on, byte for byte."""
    overlaps = find_exact_overlaps(data)
    sections = [recipe.pretrain, recipe.finetune]
    paths = {section["synthetic"] for section in sections if section is not None}
    for path in sorted(path for path in paths if path):
        overlaps += find_copies(Synthetic.open(path), data)
    return tuple(overlaps)


def _check_radii(plan: Plan, data: Data) -> None:
    """Raise ThreatError if the ball of a threat model holds every image of the data."""
    shape = data.test.images.shape[1:]
    for task in (step.task for step in plan.steps):
        if isinstance(task, (EvaluateNetwork, AttackExamples, TrainNetwork, LearnCoefficients)):
            for threat in task.settings.threats:
                threat.check_shape(shape)
        elif isinstance(task, TrainSubspace):
            for threat in (*task.threats, *task.settings.also):
                threat.check_shape(shape)
        elif isinstance(task, MapPlane):
            task.settings.threat.check_shape(shape)


def _check_learning(plan: Plan, context: Context, files: Sequence[Checkpoint]) -> None:
    """Check the settings of learning that depend on the network.

    Raises:
        RequestError: If a pattern of `granularity` matches no parameter.
        ModelError: If the network has too few blocks for `recompute_activations`.
    """
    tasks = [step.task for step in plan.steps if isinstance(step.task, LearnCoefficients)]
    if tasks:
        network = files[0].network() if files else context.fresh_network(0)
        for task in tasks:
            check_network(task.settings, network)


def _check_goal(planner: Planner, data: Data) -> None:
    """Raise RequestError if the samples that select cannot show a requirement at all."""
    recipe = planner.recipe
    soups = sum(len(recipe.soup_names(section)) for section in recipe.soups)
    if recipe.goal is not None and soups:
        check_goal(
            recipe.goal,
            recipe.measures,
            samples=planner.settings_of_all().count_samples(data),
            candidates=soups,
            confirms=recipe.confirms,
        )


def _find_leakage(recipe: Recipe, files: list[Checkpoint], data: Data) -> Leakage:
    """Return the worst leakage on the splits that select and report."""
    selects = recipe.soups or recipe.select
    splits = {recipe.evaluate.report_on} | ({recipe.select_on} if selects else set())
    return worst_leakage(
        check_leakage(files, data.split(name), allow=recipe.allow_leakage)
        for name in ("val", "test")
        if name in splits
    )


def _refuse_files_near_chance(plan: Plan, context: Context, reporter: Reporter) -> None:
    """Raise ModelError if a checkpoint is near chance, usually because its network is wrong."""
    for checkpoint in plan.files.values():
        described = context.record_network(checkpoint)
        device = str(context.device)
        doubt = check_above_chance(described, context.data.val, checkpoint.name, device=device)
        if doubt is not None:
            reporter.warn(doubt)

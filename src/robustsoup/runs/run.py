"""run_recipe: from a recipe to a filled run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustsoup.checkpoints.network import resolve_network
from robustsoup.checkpoints.provenance import Leakage, check_leakage, worst_leakage
from robustsoup.data import Synthetic, load_data
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.evaluation.evaluate import check_above_chance
from robustsoup.models.fit import check_fit
from robustsoup.progress import Progress
from robustsoup.recipes import Recipe
from robustsoup.runs.execute import Context, Reporter, execute
from robustsoup.runs.folder import fill, select_row, to_confirm
from robustsoup.runs.plan import Plan, chosen_on_test, confirmed, make_plan
from robustsoup.runs.store import Store
from robustsoup.soups.ancestry import check_ingredients
from robustsoup.soups.selection import Selection


@dataclass(frozen=True)
class Prepared:
    """A plan and all that is needed to execute or price it."""

    plan: Plan
    context: Context
    store: Store
    leakage: Leakage


def prepare(
    recipe: Recipe,
    *,
    device: str = "auto",
    data_root: str | None = None,
    on_progress: Progress | None = None,
) -> Prepared:
    """Load the data (telling on_progress), read the checkpoints that the recipe names, and plan. Runs nothing.

    Raises LeakageError where a checkpoint was trained on the samples that select (unless the recipe allows it), and
    whatever makes the data, the files or the network unusable.
    """
    where = resolve_device(device)
    data = load_data(
        recipe.data,
        root=data_root,
        seed=recipe.seed,
        image_size=recipe.image_size,
        on_progress=on_progress,
    )
    for training in (recipe.pretrain, recipe.finetune):
        if training and training.synthetic:
            Synthetic.open(
                training.synthetic, on_progress
            )  # reads the whole file once, and tells how far it is
    paths = [i.checkpoint for i in recipe.ingredients.values() if i.checkpoint] + [
        recipe.checkpoint
    ] * bool(recipe.checkpoint)
    model = resolve_network(recipe.model, normalize=recipe.normalize, data=data, checkpoints=paths)
    context = Context(data, model, where)
    plan = make_plan(recipe, data, model, resolve_precision(recipe.precision, where))
    files = list(plan.files.values())
    if files:
        check_ingredients(files)
        check_fit(context.describe(files[0]).network(), data.test)
    selects = recipe.soups or recipe.select
    looked_at = dict.fromkeys([*([recipe.select_on] if selects else []), recipe.evaluate.report_on])
    leakage = worst_leakage(
        check_leakage(files, data.split(name), allow=recipe.allow_leakage) for name in looked_at
    )
    return Prepared(plan, context, Store(), leakage)


def run_prepared(
    prepared: Prepared, folder: Path, reporter: Reporter
) -> tuple[dict[str, Any], Selection | None]:
    """Do what is missing, select, judge the chosen soup on the reporting split, and fill the run folder."""
    plan, context, store = prepared.plan, prepared.context, prepared.store
    for checkpoint in plan.files.values():
        check_above_chance(
            context.describe(checkpoint),
            context.data.val,
            checkpoint.name,
            device=str(context.device),
        )
    execute(plan, context, store, reporter)
    precision = resolve_precision(plan.recipe.precision, context.device)
    if plan.recipe.evaluate.screen:
        plan = confirmed(plan, context.data, to_confirm(plan, store), context.model, precision)
        execute(plan, context, store, reporter)
    selection = select_row(plan, store)
    if selection is not None and plan.recipe.evaluate.report == "chosen":
        plan = chosen_on_test(plan, context.data, selection.best.name, context.model, precision)
        execute(plan, context, store, reporter)
    return fill(folder, plan, context, store, selection, prepared.leakage), selection

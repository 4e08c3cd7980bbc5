"""The run folder: all outputs of a run under readable names, and results.json."""

import datetime
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import Leakage
from robustsoup.checkpoints.wrapping import soup_ending, soup_wrapping
from robustsoup.data.duplicates import Overlap
from robustsoup.device import resolve_precision
from robustsoup.diagnosis.landscape import Landscape
from robustsoup.evaluation.doubts import describe_masking
from robustsoup.evaluation.two_phase import SUBSET_KEY
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.files import write_text
from robustsoup.leftovers import remove_leftovers
from robustsoup.runs.context import Context
from robustsoup.runs.plan import Plan, PlannedRow
from robustsoup.runs.results import (
    EvaluationProtocol,
    ExamplesResult,
    PlaneResult,
    ResultRow,
    Results,
    RowScores,
    read_results,
)
from robustsoup.runs.soup_rows import dial_file
from robustsoup.runs.staging import PAGE, RESULTS, StagedFiles, stage_files
from robustsoup.runs.store import Store
from robustsoup.runs.surrogate_results import SurrogateResult
from robustsoup.runs.tasks import Key
from robustsoup.runs.worker import (
    CHECKPOINT,
    COEFFICIENTS,
    DIAL,
    EVALUATION,
    EXAMPLES,
    LANDSCAPE,
    load_evaluation,
    load_shares,
)
from robustsoup.soups.answer import Answer
from robustsoup.soups.goal import Goal
from robustsoup.soups.racing import round_ends
from robustsoup.soups.screening import decisive_measure
from robustsoup.soups.selection import Candidate
from robustsoup.stamp import describe_release


def write_run_folder(
    folder: Path,
    plan: Plan,
    context: Context,
    store: Store,
    *,
    answer: Answer | None,
    leakage: Leakage,
    overlaps: Sequence[Overlap],
    surrogates: Sequence[SurrogateResult] = (),
) -> Results:
    """Write recipe, checkpoints, coefficients, evaluations, soup and results into the run folder.

    All files are written beside the old ones first and then renamed, results.json last. It holds
    the digest of every file, so a reader sees when a kill in between left files of two runs.
    Evaluations, planes and the soup of an earlier run that are not part of this run are removed.

    Args:
        folder: The run folder.
        plan: The plan, all of whose steps are finished.
        context: Data, network and device.
        store: Finished steps.
        answer: The chosen soup and why, or None.
        leakage: Whether networks were trained on samples that evaluate them.
        overlaps: Samples of val and test that are in another split or in generated images.
        surrogates: How the searches by surrogate ended.

    Returns:
        The content of results.json.

    Raises:
        StorageError: A file cannot be written, or a stored step was damaged meanwhile.
    """
    remove_leftovers(folder, depth=1)
    with stage_files(folder, store) as staged:
        write_text(staged.new_path("recipe.toml"), plan.recipe.to_toml())
        results = _write_results(
            staged, plan, context, answer=answer, leakage=leakage, overlaps=overlaps
        )
        described = tuple(item.to_json() for item in surrogates)
        results = replace(results, surrogates=described, files=staged.digest_files())
        results.save(staged.staging / RESULTS)
        staged.publish(replaced=_removable_files(folder))
    return results


def _write_results(
    staged: StagedFiles,
    plan: Plan,
    context: Context,
    *,
    answer: Answer | None,
    leakage: Leakage,
    overlaps: Sequence[Overlap],
) -> Results:
    """Stage all files but the recipe, and return the results without their digests."""
    recipe, store = plan.recipe, staged.store
    rows = tuple(_write_row(staged, row, plan) for row in plan.rows)
    return Results(
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        data=context.data.record,
        model=context.network.spec,
        leakage=leakage,
        duplicates=tuple(item.as_record() for item in overlaps),
        warnings=plan.warnings,
        figures=recipe.report.figures,
        protocol=_describe_protocol(plan, rows, context.device),
        versions=_list_versions(context),
        seconds=sum(
            store.record(step.key).get("seconds", 0)
            for step in plan.steps
            if step.kind != "part" or store.has(step.key)  # finished steps need no parts
        ),
        rows=rows,
        planes=tuple(_write_plane(staged, name, key, plan) for name, key in plan.planes.items()),
        examples=_copy_examples(staged, plan),
        selection=answer,
        soup=None if answer is None else _write_soup(staged, plan, answer.chosen).name,
    )


_REMOVABLE = re.compile(r"(evaluations|landscapes)/[^/.][^/]*|examples\.npz|soup(\.[a-z]+)+")
"""Files of a run that a run with other settings removes; others may read its checkpoints."""


def _removable_files(folder: Path) -> set[str]:
    """Return the page of the old results and the removable files that they name, if there are any.

    The new page is written after the new results; until then, none is better than the old one.
    """
    try:
        names = read_results(folder / RESULTS)["files"]
        return {PAGE, *(name for name in names if _REMOVABLE.fullmatch(name))}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_row(staged: StagedFiles, row: PlannedRow, plan: Plan) -> ResultRow:
    """Stage the files of a row and return its results."""
    recipe = plan.recipe
    checkpoint = None
    if row.network not in plan.files:
        checkpoint = f"checkpoints/{row.name}.safetensors"
        staged.copy(row.network, CHECKPOINT, checkpoint)
    coefficients_file = _copy_coefficients(staged, row)
    coefficients = load_shares(staged.store, row)
    val = plan.selecting_evaluation(row)
    selecting, reporting = (
        _copy_evaluation(staged, row.name, split, key, with_points=recipe.evaluate.keep_points)
        for split, key in ((recipe.select_on, val), (recipe.evaluate.report_on, row.test))
    )
    evaluations = {
        split: evaluation
        for split, evaluation in (
            (recipe.select_on, selecting),
            (recipe.evaluate.report_on, reporting),
        )
        if evaluation is not None
    }
    part = None if selecting is None else selecting.record.get(SUBSET_KEY)
    attacked = left_after = None
    if part is not None and selecting is not None:
        attacked = int(part["samples"])
        goal = recipe.goal or Goal()
        if recipe.evaluate.screens and decisive_measure(goal, list(selecting.threats)):
            left_after = round_ends(len(selecting.ids)).index(attacked) + 1
    scores = {split: dict(evaluation.accuracy) for split, evaluation in evaluations.items()}
    warnings = {text for evaluation in evaluations.values() for text in evaluation.warnings}
    masking = [
        f"{split}, {findings}"
        for split, evaluation in evaluations.items()
        for findings in describe_masking(evaluation.record)
    ]
    return ResultRow(
        name=row.name,
        role=row.role,
        soup=row.soup,
        ingredients=row.ingredients,
        coefficients=coefficients,
        threat=row.threat,
        objective=row.objective,
        at=row.at,
        ingredient=plan.find_equal_ingredient(row, coefficients),
        checkpoint=checkpoint,
        coefficients_file=coefficients_file,
        val=scores.get("val"),
        test=scores.get("test"),
        screened=selecting is not None and not Candidate(row.name, (), selecting).confirmed,
        attacked=attacked,
        left_after=left_after,
        warnings=tuple(sorted(warnings)),
        masking_check=tuple(masking),
    )


def _copy_coefficients(staged: StagedFiles, row: PlannedRow) -> str | None:
    """Stage the coefficients of a row and return their file; None if the soup has none."""
    if row.dial is not None:
        staged.copy(row.dial, DIAL, f"coefficients/{dial_file(row)}")
    if row.learned is None:
        return None
    file = f"coefficients/{row.name}.safetensors"
    staged.copy(row.learned, COEFFICIENTS, file)
    return file


def _copy_evaluation(
    staged: StagedFiles, name: str, split: str, key: Key | None, *, with_points: bool
) -> Evaluation | None:
    """Stage the files of an evaluation and load it; None if there is none."""
    if key is None:
        return None
    stem = Path(EVALUATION).stem
    for suffix in (".npz", ".json", *([".points.npz"] if with_points else [])):
        if staged.store.lists_file(key, stem + suffix):
            staged.copy(key, stem + suffix, f"evaluations/{name}.{split}{suffix}")
    return load_evaluation(staged.store, key)


def _write_plane(staged: StagedFiles, name: str, key: Key, plan: Plan) -> PlaneResult:
    checkpoints = plan.recipe.planes[name].checkpoints
    plane = PlaneResult(name=name, checkpoints=checkpoints, file=f"landscapes/{name}.json")
    landscape = Landscape.load(staged.store.file(key, LANDSCAPE))
    replace(landscape, checkpoints=checkpoints).save(staged.new_path(plane.file))
    return plane


def _copy_examples(staged: StagedFiles, plan: Plan) -> ExamplesResult | None:
    """Stage the attacked samples of the chosen row; None without them."""
    if plan.examples is None:
        return None
    staged.copy(plan.examples.key, EXAMPLES, EXAMPLES)
    return ExamplesResult(
        network=plan.examples.row, split=plan.recipe.evaluate.report_on, file=EXAMPLES
    )


def _describe_protocol(
    plan: Plan, rows: tuple[ResultRow, ...], device: torch.device
) -> EvaluationProtocol:
    recipe, evaluate = plan.recipe, plan.recipe.evaluate
    precision = resolve_precision(recipe.precision, device)
    attack = evaluate.attack_settings(seed=recipe.seed, precision=precision)

    def count_samples(scores_of: Callable[[ResultRow], RowScores | None]) -> int | None:
        return next((scores["clean"].n for row in rows if (scores := scores_of(row))), None)

    return EvaluationProtocol(
        attack=str(attack.attack),
        loss=attack.loss_name if attack.attacks_each_alone else "",
        steps=attack.steps_taken if attack.attacks_each_alone else 0,
        restarts=attack.restarts,
        search_precision=attack.precision,
        screened=evaluate.screens,
        seed=attack.seed,
        select_on=recipe.select_on,
        report_on=evaluate.report_on,
        samples={
            "val": count_samples(lambda row: row.val),
            "test": count_samples(lambda row: row.test),
        },
        threats=tuple(map(str, evaluate.threats)),
    )


def _list_versions(context: Context) -> dict[str, Any]:
    return {
        "robustsoup": describe_release(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(context.device),
        "threads": torch.get_num_threads(),
    }


def _write_soup(staged: StagedFiles, plan: Plan, chosen: str) -> Path:
    """Stage the chosen soup in the same format as the first ingredient."""
    key = plan.row(chosen).network
    if key in plan.files:
        soup, parents = plan.files[key], [key]
    else:
        soup = Checkpoint.load(staged.store.file(key, CHECKPOINT))
        parents = list(plan.step(key).parents)
    files = [plan.files[parent] for parent in parents if parent in plan.files]
    wrapping, ending = None, ".safetensors"
    if files and parents[0] in plan.files:
        wrapping, _ = soup_wrapping([item.wrapping for item in files])
        ending = soup_ending(files[0].path, wrapping)
    wrapped = Checkpoint(soup.tensors, soup.provenance, wrapping=wrapping)
    return wrapped.save(staged.new_path(f"soup{ending}"))

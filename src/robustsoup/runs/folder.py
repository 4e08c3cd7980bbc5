"""The run folder: all outputs of a run under readable names, and results.json."""

import datetime
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import Leakage
from robustsoup.errors import StorageError
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.files import link_file, remove_file, write_text
from robustsoup.runs.choose import load_evaluation
from robustsoup.runs.context import Context
from robustsoup.runs.plan import Plan, PlannedRow
from robustsoup.runs.results import (
    EvaluationProtocol,
    PlaneResult,
    ResultRow,
    Results,
    RowScores,
    SelectionResult,
)
from robustsoup.runs.soup_rows import dial_file
from robustsoup.runs.store import Store
from robustsoup.runs.tasks import Key
from robustsoup.runs.worker import CHECKPOINT, COEFFICIENTS, DIAL, EVALUATION, LANDSCAPE
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.selection import Candidate, Selection
from robustsoup.stamp import stamp_record

RESULTS = "results.json"


def ensure_folder(folder: Path) -> None:
    """Create the run folder.

    Raises:
        StorageError: The folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: the folder cannot be created: {error.strerror}; set another one with -o"
        ) from error


def write_run_folder(
    folder: Path,
    plan: Plan,
    context: Context,
    store: Store,
    *,
    selection: Selection | None,
    leakage: Leakage,
) -> Results:
    """Write recipe, checkpoints, coefficients, evaluations, soup and results into the run folder.

    Evaluations and planes of earlier runs that are not part of this run are removed.

    Args:
        folder: The run folder.
        plan: The plan, all of whose steps are finished.
        context: Data, network and device.
        store: Finished steps.
        selection: The chosen soup, or None.
        leakage: Whether networks were trained on samples that evaluate them.

    Returns:
        The content of results.json.
    """
    for leftover in folder.rglob(".*.tmp"):  # of a run that was killed while writing
        leftover.unlink(missing_ok=True)
    earlier_files = _measured_files(folder)
    recipe = plan.recipe
    write_text(folder / "recipe.toml", recipe.to_toml())
    rows = tuple(_write_row(folder, row, plan, store) for row in plan.rows)
    results = Results(
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        data=context.data.record,
        model=context.network.spec,
        leakage=leakage,
        figures=recipe.report.figures,
        protocol=_describe_protocol(plan, rows),
        versions=_list_versions(context),
        seconds=sum(store.record(step.key)["seconds"] for step in plan.steps),
        rows=rows,
        planes=tuple(
            _write_plane(folder, name, key, plan, store) for name, key in plan.planes.items()
        ),
        selection=None if selection is None else _describe_selection(plan, store, selection),
        soup=None if selection is None else _write_soup(folder, plan, store, selection.best).name,
    )
    write_text(folder / RESULTS, json.dumps(stamp_record(results.to_json()), indent=1))
    for stale in earlier_files - _measured_files(folder):
        remove_file(folder / stale)
    return results


def _measured_files(folder: Path) -> set[str]:
    """Return the files of measurements that the folder's results.json names; none without it."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        planes = {f"landscapes/{Path(plane['file']).name}" for plane in results.get("planes", ())}
        evaluations = [
            f"{Path(row['name']).name}.{split}"
            for row in results["rows"]
            for split in ("val", "test")
            if row[split]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    suffixes = (".json", ".npz", ".points.npz")
    return planes | {f"evaluations/{name}{suffix}" for name in evaluations for suffix in suffixes}


def _write_row(folder: Path, row: PlannedRow, plan: Plan, store: Store) -> ResultRow:
    """Link the files of a row into the run folder and return its results."""
    recipe = plan.recipe
    checkpoint = None
    if row.network not in plan.files:
        checkpoint = f"checkpoints/{row.name}.safetensors"
        link_file(store.path(row.network) / CHECKPOINT, folder / checkpoint)
    coefficients_file, coefficients = _link_coefficients(folder, row, store)
    selecting = _link_evaluation(folder, row.name, recipe.select_on, row.val, store)
    reporting = _link_evaluation(folder, row.name, recipe.evaluate.report_on, row.test, store)
    evaluations = {
        split: evaluation
        for split, evaluation in (
            (recipe.select_on, selecting),
            (recipe.evaluate.report_on, reporting),
        )
        if evaluation is not None
    }
    scores = {split: dict(evaluation.accuracy) for split, evaluation in evaluations.items()}
    warnings = {text for evaluation in evaluations.values() for text in evaluation.warnings}
    return ResultRow(
        name=row.name,
        role=row.role,
        soup=row.soup,
        ingredients=row.ingredients,
        coefficients=coefficients,
        threat=row.threat,
        objective=row.objective,
        at=row.at,
        checkpoint=checkpoint,
        coefficients_file=coefficients_file,
        val=scores.get("val"),
        test=scores.get("test"),
        screened=selecting is not None and not Candidate(row.name, (), selecting).confirmed,
        warnings=tuple(sorted(warnings)),
    )


def _link_coefficients(
    folder: Path, row: PlannedRow, store: Store
) -> tuple[str | None, tuple[float, ...] | None]:
    """Link the coefficients of a row into the run folder.

    Returns:
        The file of coefficients, or None if the soup has none; and one coefficient for each
        ingredient, or None if they differ by layer.
    """
    if row.dial is not None:
        link_file(store.path(row.dial) / DIAL, folder / "coefficients" / dial_file(row))
    if row.learned is None:
        return None, row.coefficients
    file = f"coefficients/{row.name}.safetensors"
    link_file(store.path(row.learned) / COEFFICIENTS, folder / file)
    if row.role != "greedy":
        return file, row.coefficients
    return file, tuple(map(float, Coefficients.load(folder / file).row("")))


def _link_evaluation(
    folder: Path, name: str, split: str, key: Key | None, store: Store
) -> Evaluation | None:
    """Link the files of an evaluation into the run folder and load it; None if there is none."""
    if key is None:
        return None
    source = store.path(key) / EVALUATION
    target = folder / "evaluations" / f"{name}.{split}.json"
    link_file(source.with_suffix(".npz"), target.with_suffix(".npz"))
    link_file(source, target)
    points = source.with_suffix(".points.npz")
    if points.exists():
        link_file(points, target.with_suffix(".points.npz"))
    else:
        remove_file(target.with_suffix(".points.npz"))
    return load_evaluation(store, key)


def _write_plane(folder: Path, name: str, key: Key, plan: Plan, store: Store) -> PlaneResult:
    checkpoints = plan.recipe.planes[name].checkpoints
    plane = PlaneResult(name=name, checkpoints=checkpoints, file=f"landscapes/{name}.json")
    content = json.loads((store.path(key) / LANDSCAPE).read_text(encoding="utf-8"))
    content |= {"name": name, "checkpoints": list(checkpoints)}
    write_text(folder / plane.file, json.dumps(content))
    return plane


def _describe_protocol(plan: Plan, rows: tuple[ResultRow, ...]) -> EvaluationProtocol:
    recipe, evaluate = plan.recipe, plan.recipe.evaluate
    attack = evaluate.attack_settings(seed=recipe.seed)

    def count_samples(scores_of: Callable[[ResultRow], RowScores | None]) -> int | None:
        return next((scores["clean"].n for row in rows if (scores := scores_of(row))), None)

    return EvaluationProtocol(
        attack=str(attack.attack),
        loss=attack.loss_name,
        steps=attack.steps,
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
        "robustsoup": version("robustsoup"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(context.device),
        "threads": torch.get_num_threads(),
    }


def _describe_selection(plan: Plan, store: Store, selection: Selection) -> SelectionResult:
    row = plan.row(selection.best.name)
    held_on_test = None
    if row.test is not None and row.test != row.val and selection.require:
        scores = load_evaluation(store, row.test).accuracy
        held_on_test = all(item.met_by(scores, point=True) for item in selection.require)
    return SelectionResult(
        maximise=selection.maximise,
        require=tuple(map(str, selection.require)),
        met=selection.met,
        chosen=selection.best.name,
        point=selection.point,
        message=selection.message,
        held_on_test=held_on_test,
    )


def _write_soup(folder: Path, plan: Plan, store: Store, chosen: Candidate) -> Path:
    """Write the chosen soup in the same format as the first ingredient."""
    key = plan.row(chosen.name).network
    if key in plan.files:
        soup = first = plan.files[key]
    else:
        soup = Checkpoint.load(store.path(key) / CHECKPOINT)
        first = plan.files.get(plan.step(key).parents[0])
    if first is None or first.wrapping is None or first.path is None:
        return soup.save(folder / "soup.safetensors")
    wrapped = Checkpoint(soup.tensors, soup.provenance, wrapping=first.wrapping)
    return wrapped.save(folder / f"soup{first.path.suffix}")

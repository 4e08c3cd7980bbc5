"""The run folder: every output of a run under a name that people can read, and the table of results."""

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import Leakage
from robustsoup.errors import StorageError
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.files import link_file, remove_file, write_text
from robustsoup.recipes import slug
from robustsoup.runs.execute import Context
from robustsoup.runs.plan import Plan, Row
from robustsoup.runs.store import Store
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.selection import Candidate, Selection, select, worth_confirming

SOUPS = ("grid", "line", "uniform", "greedy", "learned", "dial")


def soups_tried(plan: Plan, store: Store) -> list[Candidate]:
    """The soups of a plan with what they scored on the split that selects."""
    return [
        Candidate(
            row.name,
            row.coefficients or (),
            Evaluation.load(store.path(row.val) / "evaluation.json"),
        )
        for row in plan.rows
        if row.role in SOUPS and row.val
    ]


def to_confirm(plan: Plan, store: Store) -> list[str]:
    """The rows that were only screened and are worth confirming, and the one that would be chosen."""
    tried = soups_tried(plan, store)
    if not tried:
        return []
    names = {c.name for c in worth_confirming(tried)}
    if wanted := plan.recipe.select:
        by = wanted.maximise or plan.recipe.evaluate.threats[0]
        best = select(
            tried, maximise=by, require=wanted.require, point=wanted.point, unconfirmed=True
        ).best
        names |= {best.name} if not best.confirmed else set()
    return sorted(names)


def select_row(plan: Plan, store: Store) -> Selection | None:
    """The choice among the soups of a plan by the recipe's [select], on the validation split; None if it asks for none."""
    wanted, tried = plan.recipe.select, soups_tried(plan, store)
    if wanted is None or not tried:
        return None
    return select(
        tried,
        maximise=wanted.maximise or plan.recipe.evaluate.threats[0],
        require=wanted.require,
        point=wanted.point,
    )


def fill(
    folder: Path,
    plan: Plan,
    context: Context,
    store: Store,
    selection: Selection | None,
    leakage: Leakage,
) -> dict[str, Any]:
    """Put recipe, checkpoints, coefficients, evaluations, the chosen soup and results.json into `folder`.

    Its "seconds" are those that all steps took, whenever they were done.
    """
    for leftover in folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink(missing_ok=True)
    earlier = _numbers(folder)
    write_text(folder / "recipe.toml", plan.recipe.to_toml())
    rows = [_row(folder, row, plan, store) for row in plan.rows]
    results = {
        "name": plan.recipe.name,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "recipe": plan.recipe.model_dump(mode="json", exclude_none=True),
        "data": context.data.record,
        "model": context.model.spec,
        "leakage": leakage.as_record(),
        "figures": list(plan.recipe.report.figures),
        "protocol": _protocol(plan, rows),
        "versions": {
            "robustsoup": version("robustsoup"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(context.device),
            "threads": torch.get_num_threads(),
        },
        "seconds": sum(
            json.loads((store.path(s.key) / "step.json").read_text())["seconds"] for s in plan.steps
        ),
        "rows": rows,
        "planes": [_plane(folder, name, key, plan, store) for name, key in plan.planes.items()],
        "selection": _selection(plan, store, selection),
    }
    if selection is not None:
        results["soup"] = _save_soup(folder, plan, store, selection).name
    write_text(folder / "results.json", json.dumps(results, indent=1))
    for stale in earlier - _numbers(folder):
        remove_file(folder / stale)
    return results


def _numbers(folder: Path) -> set[str]:
    """The files of measured numbers that the folder's results.json tells of, if it is one."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found = {f"landscapes/{Path(plane['file']).name}" for plane in results.get("planes", ())}
        judged = [
            f"{Path(row['name']).name}.{split}"
            for row in results["rows"]
            for split in ("val", "test")
            if row[split]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return found | {
        f"evaluations/{name}{kind}" for name in judged for kind in (".json", ".npz", ".points.npz")
    }


def _row(folder: Path, row: Row, plan: Plan, store: Store) -> dict[str, Any]:
    entry = {
        name: getattr(row, name)
        for name in (
            "name",
            "role",
            "soup",
            "ingredients",
            "coefficients",
            "threat",
            "objective",
            "at",
        )
    }
    entry |= {"checkpoint": None, "coefficients_file": None, "val": None, "test": None}
    if not row.key.startswith("file:"):
        entry["checkpoint"] = f"checkpoints/{row.name}.safetensors"
        link_file(store.path(row.key) / "checkpoint.safetensors", folder / entry["checkpoint"])
    if row.learned:
        entry["coefficients_file"] = f"coefficients/{row.name}.safetensors"
        link_file(
            store.path(row.learned) / "coefficients.safetensors",
            folder / entry["coefficients_file"],
        )
    if row.dial:
        link_file(
            store.path(row.dial) / "dial.safetensors",
            folder / "coefficients" / f"{row.soup}-{slug(row.threat)}.dial.safetensors",
        )
    if row.role == "greedy":
        entry["coefficients"] = Coefficients.load(folder / entry["coefficients_file"]).row("")
    recipe = plan.recipe
    for split, key in ((recipe.select_on, row.val), (recipe.evaluate.report_on, row.test)):
        if key:
            source, target = (
                store.path(key) / "evaluation.json",
                folder / "evaluations" / f"{row.name}.{split}.json",
            )
            link_file(source.with_suffix(".npz"), target.with_suffix(".npz"))
            link_file(source, target)
            record = json.loads(source.read_text())
            entry[split] = record["accuracy"]
            if record.get("screened"):
                entry["screened"] = True
            if record["warnings"]:
                entry["warnings"] = sorted({*entry.get("warnings", ()), *record["warnings"]})
            if (points := source.with_suffix(".points.npz")).exists():
                link_file(points, target.with_suffix(".points.npz"))
            else:
                remove_file(target.with_suffix(".points.npz"))
    return entry


def _plane(folder: Path, name: str, key: str, plan: Plan, store: Store) -> dict[str, Any]:
    entry = {
        "name": name,
        "checkpoints": list(plan.recipe.planes[name].checkpoints),
        "file": f"landscapes/{name}.json",
    }
    found = json.loads((store.path(key) / "landscape.json").read_text(encoding="utf-8"))
    write_text(
        folder / entry["file"],
        json.dumps(found | {"name": name, "checkpoints": entry["checkpoints"]}),
    )
    return entry


def _protocol(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    evaluate = plan.recipe.evaluate
    seed = plan.recipe.seed if evaluate.seed is None else evaluate.seed
    samples = {
        split: next((row[split]["clean"]["n"] for row in rows if row[split]), None)
        for split in ("val", "test")
    }
    return {
        "attack": evaluate.attack,
        "loss": evaluate.loss,
        "steps": evaluate.steps,
        "restarts": evaluate.restarts,
        "precision": "float32",
        "search_precision": evaluate.precision,
        "screened": evaluate.screen,
        "seed": seed,
        "select_on": plan.recipe.select_on,
        "report_on": evaluate.report_on,
        "samples": samples,
        "threats": list(evaluate.threats),
    }


def _selection(plan: Plan, store: Store, selection: Selection | None) -> dict[str, Any] | None:
    if selection is None:
        return None
    row = next(row for row in plan.rows if row.name == selection.best.name)
    held = None
    if row.test and row.test != row.val and selection.require:
        scores = Evaluation.load(store.path(row.test) / "evaluation.json").accuracy
        held = all(r.met_by(scores, point=True) for r in selection.require)
    return {
        "maximise": selection.maximise,
        "require": [str(r) for r in selection.require],
        "met": selection.met,
        "chosen": selection.best.name,
        "point": selection.point,
        "message": selection.message,
        "held_on_test": held,
    }


def _save_soup(folder: Path, plan: Plan, store: Store, selection: Selection) -> Path:
    """Write the chosen soup in the format and wrapping of the first ingredient."""
    row = next(row for row in plan.rows if row.name == selection.best.name)
    if row.key in plan.files:
        soup = first = plan.files[row.key]
    else:
        soup = Checkpoint.load(store.path(row.key) / "checkpoint.safetensors")
        first = plan.files.get(plan.step(row.key).parents[0])
    if first is None or first.wrapping is None:
        return soup.save(folder / "soup.safetensors")
    return Checkpoint(soup.tensors, soup.provenance, wrapping=first.wrapping).save(
        folder / f"soup{first.path.suffix}"
    )


def ensure_folder(folder: Path) -> None:
    """Make the run folder. Raises StorageError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be made: {error.strerror}; choose another place with -o"
        ) from error

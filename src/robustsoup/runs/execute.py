"""Execute the missing steps of a plan, in this process."""

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from robustsoup.errors import CheckpointError, RobustsoupError, StorageError
from robustsoup.files import read_regular, write_text
from robustsoup.runs.context import Context
from robustsoup.runs.plan import Plan, Step
from robustsoup.runs.store import Store
from robustsoup.runs.tasks import Key, task_record
from robustsoup.runs.worker import Worker

_MAX_SECONDS_BYTES = 100


class Reporter(Protocol):
    """Receives progress events of a run."""

    def begin(self, plan: Plan, missing: Sequence[Step]) -> None:
        """Receive the plan before any step runs; steps that are not in `missing` are finished."""

    def progress(self, step: Step, done: int, total: int, figures: str) -> None:
        """Receive that `done` of `total` parts of a step are finished."""

    def warn(self, text: str) -> None:
        """Receive a warning about a doubtful result."""

    def note(self, text: str) -> None:
        """Receive a line about the run itself: what it waits for, which damage it repairs."""

    def finished(self, step: Step, figures: str, seconds: float) -> None:
        """Receive that a step is finished, its figures in one line and its seconds."""


def execute_plan(plan: Plan, context: Context, store: Store, reporter: Reporter) -> None:
    """Run every step of a plan that the store lacks or holds damaged, parents first.

    Finished steps stay in the store if a later one fails. If a repeated step gives another output
    than the damaged one did, the steps that read it are repeated too.

    Raises:
        RobustsoupError: A step failed; the message starts with its name.
        StorageError: A step does not stay undamaged.
    """
    missing = _list_missing(plan, store, reporter)
    reporter.begin(plan, missing)
    executed: set[Key] = set()
    while missing:
        worker = Worker(context, store, plan.files, plan.recipe.allow_leakage, reporter.warn)
        for step in missing:
            if step.key in executed:
                raise StorageError(
                    f"{store.path(step.key)}: damaged again as soon as it is written; "
                    "check the disk, or set ROBUSTSOUP_STORE to a folder on another one"
                )
            started = time.perf_counter()
            figures = execute_step(step, worker, reporter)
            reporter.finished(step, figures, time.perf_counter() - started)
        executed |= {step.key for step in missing}
        if missing := _list_missing(plan, store, reporter):
            reporter.begin(plan, missing)


def _list_missing(plan: Plan, store: Store, reporter: Reporter) -> list[Step]:
    """Return the steps that must run, with one line for each damaged one."""
    missing = []
    for step in plan.steps:
        if store.has(step.key):
            continue
        missing.append(step)
        damage = store.find_damage(step.key)
        if damage is not None:
            reporter.note(f"{step.name}: {damage}; the step runs again")
    return missing


def execute_step(step: Step, worker: Worker, reporter: Reporter) -> str:
    """Run one step and store its output, unless another process stored it first.

    Returns:
        The figures of the result in one line.
    """
    record = _step_record(step, worker.context)
    with worker.store.write_step(
        step.key, record, parents=step.parents, notice=reporter.note
    ) as folder:
        if folder is None:
            return "done by another process"
        clock = StepClock(folder / "seconds.txt", reporter, step)
        try:
            figures = _run_or_restart(step, worker, folder, clock)
        except RobustsoupError as error:
            raise type(error)(f"{step.name}: {error}") from error
        record["seconds"] = clock.stop()
        return figures


def _run_or_restart(step: Step, worker: Worker, folder: Path, clock: "StepClock") -> str:
    """Run a step; if what an interrupted attempt left is damaged, run it from its beginning."""
    try:
        return worker.run_step(step, folder, clock)
    except CheckpointError as error:
        if str(folder) not in str(error):
            raise
        clock.reporter.note(f"{step.name}: {error}; the step starts again")
        shutil.rmtree(folder)
        folder.mkdir()
        return worker.run_step(step, folder, clock)


def _step_record(step: Step, context: Context) -> dict[str, Any]:
    return {
        "kind": step.kind,
        "name": step.name,
        "task": task_record(step.task),
        "parents": list(step.parents),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(context.device),
    }


class StepClock:
    """Reports the progress of a step and counts its seconds, including interrupted attempts.

    The seconds are written to a file at most every SAVE_EVERY seconds.

    Args:
        path: File for the seconds so far.
        reporter: Receives the progress.
        step: The step.
    """

    SAVE_EVERY = 5.0

    def __init__(self, path: Path, reporter: Reporter, step: Step) -> None:
        self.path = path
        self.reporter = reporter
        self.step = step
        self.started = self.saved = time.perf_counter()
        with contextlib.suppress(OSError, ValueError):
            seconds = float(read_regular(path, _MAX_SECONDS_BYTES))
            self.started -= seconds if math.isfinite(seconds) else 0.0

    def __call__(self, done: int, total: int, figures: str) -> None:
        """Report that `done` of `total` parts are finished."""
        now = time.perf_counter()
        if now - self.saved >= self.SAVE_EVERY:
            self.saved = now
            write_text(self.path, f"{now - self.started:.3f}")
        self.reporter.progress(self.step, done, total, figures)

    def stop(self) -> float:
        """Remove the file and return all seconds so far."""
        self.path.unlink(missing_ok=True)
        return time.perf_counter() - self.started

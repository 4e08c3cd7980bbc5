"""Execute the missing steps of a plan, in this process."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from robustsoup.errors import RobustsoupError
from robustsoup.files import write_text
from robustsoup.runs.context import Context
from robustsoup.runs.plan import Plan, Step
from robustsoup.runs.store import Store
from robustsoup.runs.tasks import task_record
from robustsoup.runs.worker import Worker


class Reporter(Protocol):
    """Receives progress events of a run."""

    def begin(self, plan: Plan, missing: Sequence[Step]) -> None:
        """Receive the plan before any step runs; steps that are not in `missing` are finished."""

    def progress(self, step: Step, done: int, total: int, figures: str) -> None:
        """Receive that `done` of `total` parts of a step are finished."""

    def warn(self, text: str) -> None:
        """Receive a warning about a doubtful result."""

    def finished(self, step: Step, figures: str, seconds: float) -> None:
        """Receive that a step is finished, its figures in one line and its seconds."""


def execute_plan(plan: Plan, context: Context, store: Store, reporter: Reporter) -> None:
    """Run every step of a plan that the store lacks, parents first.

    Finished steps stay in the store if a later one fails.

    Raises:
        RobustsoupError: A step failed; the message starts with its name.
    """
    missing = [step for step in plan.steps if not store.has(step.key)]
    reporter.begin(plan, missing)
    worker = Worker(context, store, plan.files, plan.recipe.allow_leakage, reporter.warn)
    for step in missing:
        started = time.perf_counter()
        figures = execute_step(step, worker, reporter)
        reporter.finished(step, figures, time.perf_counter() - started)


def execute_step(step: Step, worker: Worker, reporter: Reporter) -> str:
    """Run one step and store its output, unless another process stored it first.

    Returns:
        The figures of the result in one line.
    """
    record = _step_record(step, worker.context)
    with worker.store.write_step(step.key, record) as folder:
        if folder is None:
            return "done by another process"
        clock = StepClock(folder / "seconds.txt", reporter, step)
        try:
            figures = worker.run_step(step, folder, clock)
        except RobustsoupError as error:
            raise type(error)(f"{step.name}: {error}") from error
        record["seconds"] = clock.stop()
        return figures


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
            self.started -= float(path.read_text())

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

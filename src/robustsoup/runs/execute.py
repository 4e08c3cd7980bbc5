"""Execute the missing steps of a plan: a step starts as soon as its inputs are in the store."""

import contextlib
import itertools
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from robustsoup import distributed
from robustsoup.digests import digest_json
from robustsoup.errors import (
    CheckpointError,
    RequestError,
    RobustsoupError,
    StorageError,
    WorkError,
)
from robustsoup.evaluation.sharing import RANK_FOLDER
from robustsoup.files import read_regular, write_text
from robustsoup.runs.context import Context
from robustsoup.runs.plan import Plan, Step
from robustsoup.runs.store import Store
from robustsoup.runs.tasks import Key, task_record
from robustsoup.runs.worker import Worker

_MAX_SECONDS_BYTES = 100

MOST_LOSSES = 3
"""How many times a step runs again because its worker was lost; a worker that was told to end and
got further than those before it is not counted."""


class StepReporter(Protocol):
    """Receives the events of one step."""

    def progress(self, step: Step, done: int, total: int, figures: str) -> None:
        """Receive that `done` of `total` parts of a step are finished."""

    def warn(self, text: str) -> None:
        """Receive a warning about a doubtful result."""

    def note(self, text: str) -> None:
        """Receive a line about the run itself: what it waits for, which damage it repairs."""


class Reporter(StepReporter, Protocol):
    """Receives the events of a run."""

    def begin(self, plan: Plan, missing: Sequence[Step]) -> None:
        """Receive the plan before any step runs; steps that are not in `missing` are finished."""

    def started(self, step: Step, place: str) -> None:
        """Receive on which machine a step runs, unless it runs in this process."""

    def finished(self, step: Step, figures: str, seconds: float) -> None:
        """Receive that a step is finished, its figures in one line and its seconds."""


@dataclass(frozen=True)
class Ended:
    """How a started step ended.

    Attributes:
        step: The step.
        figures: Its figures in one line.
        seconds: Its seconds.
        lost: Why its worker is gone; None if the step is finished.
        done: Finished parts that a worker saved before it ended.
    """

    step: Step
    figures: str = ""
    seconds: float = 0.0
    lost: str | None = None
    done: int = 0


class Executor(Protocol):
    """Runs steps whose inputs are in the store, here or on other machines.

    Attributes:
        most_at_once: How many steps may be started and not ended.
    """

    most_at_once: int

    def begin(self, plan: Plan, reporter: Reporter) -> None:
        """Get ready for steps of a plan."""

    def start(self, step: Step) -> None:
        """Start a step."""

    def wait(self) -> list[Ended]:
        """Wait until a started step ends.

        Raises:
            RobustsoupError: A step failed; the message starts with its name.
        """


class InProcess:
    """Runs one step after the other in this process.

    Args:
        context: Data, network and device.
        store: Finished steps.
    """

    most_at_once = 1

    def __init__(self, context: Context, store: Store) -> None:
        self.context = context
        self.store = store
        self.worker: Worker | None = None
        self.reporter: Reporter | None = None
        self.steps: list[Step] = []

    def begin(self, plan: Plan, reporter: Reporter) -> None:
        """Get ready for steps of a plan."""
        self.worker = Worker(
            self.context, self.store, plan.files, plan.recipe.allow_leakage, reporter.warn
        )
        self.reporter = reporter

    def start(self, step: Step) -> None:
        """Start a step, which runs in `wait`."""
        self.steps.append(step)

    def wait(self) -> list[Ended]:
        """Run the started step."""
        step = self.steps.pop(0)
        assert self.worker is not None
        assert self.reporter is not None
        started = time.perf_counter()
        figures = execute_step(step, self.worker, self.reporter)
        return [Ended(step, figures, time.perf_counter() - started)]


def execute_plan(plan: Plan, store: Store, reporter: Reporter, executor: Executor) -> None:
    """Run every step of a plan that the store lacks or holds damaged, parents first.

    Finished steps stay in the store if a later one fails. If a repeated step gives another output
    than the damaged one did, the steps that read it are repeated too.

    Args:
        plan: The plan.
        store: Finished steps.
        reporter: Receives the events.
        executor: Runs the steps.

    Raises:
        RobustsoupError: A step failed; the message starts with its name.
        StorageError: A step does not stay undamaged.
        WorkError: A step lost its worker too often.
    """
    keys = [step.key for step in plan.steps]
    distributed.check_same(
        {"digest of the plan": digest_json(keys)}, "give all processes the same files and options"
    )
    missing = _list_missing(plan, store, reporter)
    reporter.begin(plan, missing)
    executed: set[Key] = set()
    while missing:
        for step in missing:
            if step.key in executed:
                raise StorageError(
                    f"{store.path(step.key)}: damaged again as soon as it is written; "
                    "check the disk, or set ROBUSTSOUP_STORE to a folder on another one"
                )
        executor.begin(plan, reporter)
        _run_steps(missing, reporter, executor)
        executed |= {step.key for step in missing}
        if missing := _list_missing(plan, store, reporter):
            reporter.begin(plan, missing)


def _run_steps(steps: Sequence[Step], reporter: Reporter, executor: Executor) -> None:
    """Start each step once its inputs are finished, in the order of the plan, and await all."""
    waiting = {step.key: step for step in steps}
    unfinished = set(waiting)
    losses: Counter[Key] = Counter()
    furthest: Counter[Key] = Counter()
    while unfinished:
        free = executor.most_at_once - (len(unfinished) - len(waiting))
        for step in _first_ready(waiting, unfinished, free):
            executor.start(waiting.pop(step.key))
        for end in executor.wait():
            step = end.step
            if end.lost is None:
                unfinished.remove(step.key)
                reporter.finished(step, end.figures, end.seconds)
                continue
            waiting[step.key] = step
            if end.done > furthest[step.key]:
                furthest[step.key] = end.done
                reporter.note(f"{step.name}: {end.lost}; the step goes on in another worker")
                continue
            losses[step.key] += 1
            if losses[step.key] > MOST_LOSSES:
                raise WorkError(
                    f"{step.name}: lost its worker {losses[step.key]} times, last: {end.lost}; "
                    "run the same command again to resume"
                )
            reporter.note(
                f"{step.name}: lost its worker ({end.lost}); the step runs again "
                f"({losses[step.key]} of at most {MOST_LOSSES} times)"
            )


def _first_ready(waiting: dict[Key, Step], unfinished: set[Key], most: int) -> list[Step]:
    """Return the first waiting steps none of whose inputs is unfinished."""
    ready = (step for step in waiting.values() if unfinished.isdisjoint(step.inputs))
    return list(itertools.islice(ready, max(most, 0)))


def _list_missing(plan: Plan, store: Store, reporter: Reporter) -> list[Step]:
    """Return the steps that must run, with one line for each damaged one."""
    keys = distributed.from_first(lambda: {step.key for step in plan.list_missing(store.has)})
    missing = [step for step in plan.steps if step.key in keys]
    for step in missing:
        damage = store.find_damage(step.key)
        if damage is not None:
            reporter.note(f"{step.name}: {damage}; the step runs again")
    return missing


def execute_step(step: Step, worker: Worker, reporter: StepReporter) -> str:
    """Run one step and store its output, unless another process stored it first.

    Returns:
        The figures of the result in one line.
    """
    record = _step_record(step, worker.context)
    with _open_step(step, record, worker.store, reporter) as folder:
        if folder is None:
            return "done by another process"
        clock = StepClock(folder / "seconds.txt", reporter, step)
        try:
            figures = _run_or_restart(step, worker, folder, clock)
        except RobustsoupError as error:
            raise type(error)(f"{step.name}: {error}") from error
        record["seconds"] = clock.stop()
        return figures


@contextlib.contextmanager
def _open_step(
    step: Step, record: dict[str, Any], store: Store, reporter: StepReporter
) -> Iterator[Path | None]:
    """Yield the folder of a step; None if another process stored it first.

    All ranks run the step, and the folder of the first one is stored. The others get a folder
    within it, which keeps the state of an interrupted attempt and is removed at the end.
    """
    if distributed.is_first():
        parents, notice = step.parents, reporter.note
        with store.write_step(step.key, record, parents=parents, notice=notice) as folder:
            distributed.from_first(lambda: folder)
            yield folder
            distributed.gather(None)  # all ranks have finished
            for other in folder.glob(f"{RANK_FOLDER}*") if folder else ():
                shutil.rmtree(other)
    else:
        folder = distributed.from_first(lambda: None)
        if folder is not None and not folder.is_dir():
            raise RequestError(
                f"store: rank {distributed.rank()} does not see {folder}; set ROBUSTSOUP_STORE to "
                "a folder that all machines share"
            )
        own = folder and folder / f"{RANK_FOLDER}{distributed.rank()}"
        if own is not None:
            own.mkdir(exist_ok=True)
        yield own
        distributed.gather(None)
    distributed.gather(None)  # the step is in the store


def _run_or_restart(step: Step, worker: Worker, folder: Path, clock: "StepClock") -> str:
    """Run a step; if its parts or what an interrupted attempt left cannot be used, do all of it."""
    try:
        return worker.run_step(step, folder, clock)
    except CheckpointError as error:
        if str(folder) not in str(error) or distributed.world() > 1:
            raise
        clock.reporter.note(f"{step.name}: {error}; the step starts again")
        shutil.rmtree(folder)
        folder.mkdir()
        return worker.run_step(step.without_parts(), folder, clock)


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

    def __init__(self, path: Path, reporter: StepReporter, step: Step) -> None:
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

"""Run the steps of a plan on workers of a pool (Ray, Slurm) that share the store."""

import contextlib
import json
import os
import pickle
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast

import torch

from robustsoup import errors
from robustsoup.distributed import describe_device, required_versions
from robustsoup.errors import RobustsoupError, StorageError, WorkError
from robustsoup.files import write_text
from robustsoup.leftovers import remove_leftovers, temporary_sibling
from robustsoup.paths import user_path
from robustsoup.runs.execute import Ended, Reporter
from robustsoup.runs.plan import Plan, Step
from robustsoup.runs.remote import PROBE, Assignment, Meeting, Status, StepEnd, Surroundings
from robustsoup.runs.run import PreparedRun
from robustsoup.runs.tasks import Key

POLL_SECONDS = 1.0
VISIBLE_SECONDS = 90.0
"""How long the output of a worker may stay hidden: NFS looks for new folders once a minute."""
TOUCH_SECONDS = 3600.0
"""How often the folder of a run is touched; other hosts remove one that is unchanged for a day."""


@dataclass(frozen=True)
class Lost:
    """A worker ended without an answer.

    Attributes:
        reason: Why, in one line.
        saved: Whether it was told to end and saved the state of its step, as at a time limit.
    """

    reason: str
    saved: bool = False


class Pool(Protocol):
    """Starts `run_assignment` on workers, each with the threads and the GPU that a step needs.

    Attributes:
        most_at_once: How many steps may be submitted and not ended; the pool queues them.
    """

    most_at_once: int

    def open(self, meeting: Meeting) -> str:
        """Connect, and check the workers that there are before any work.

        Returns:
            What there is, in one line.

        Raises:
            RequestError: There is no such pool, or a worker does not fit.
        """

    def submit(self, key: Key, name: str, meeting: Meeting, content: bytes) -> None:
        """Start run_assignment(meeting, content) for the step with a key and a name."""

    def poll(self, seconds: float) -> Mapping[Key, StepEnd | Lost]:
        """Return how steps ended, by key; wait for at most some seconds until one ends."""

    def close(self) -> None:
        """Cancel what still runs, and leave."""


class Cluster:
    """An executor that runs steps on the workers of a pool.

    The pool is opened when the first step is missing. Use the cluster as a context: its end cancels
    what still runs.

    Args:
        prepared: The planned run.
        pool: The pool.
        data_root: Folder of the data sets that the command names.
    """

    def __init__(self, prepared: PreparedRun, pool: Pool, data_root: str | None = None) -> None:
        context = prepared.context
        root = data_root or os.environ.get("ROBUSTSOUP_DATA")
        self.pool = pool
        self.most_at_once = pool.most_at_once
        self.store = prepared.store
        self.surroundings = Surroundings(
            recipe=prepared.plan.recipe.to_toml(),
            network=context.network,
            device=context.device.type,
            threads=torch.get_num_threads(),
            data_root=str(user_path(root).absolute()) if root else None,
            folder=str(Path.cwd()),
            image_size=prepared.image_size,
        )
        self.device = context.device
        self.meeting: Meeting | None = None
        self.files: Mapping[Key, str] = {}
        self.reporter: Reporter | None = None
        self.running: dict[Key, Step] = {}
        self.told: dict[Key, Status] = {}
        self.touched = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.meeting is not None:
            try:
                self.pool.close()
            finally:
                shutil.rmtree(self.meeting["folder"], ignore_errors=True)

    def begin(self, plan: Plan, reporter: Reporter) -> None:
        """Connect to the pool, unless that is done."""
        self.files = {
            key: str(file.path.absolute())
            for key, file in plan.files.items()
            if file.path is not None
        }
        self.reporter = reporter
        if self.meeting is None:
            self.meeting = self._make_meeting()
            reporter.note(self.pool.open(self.meeting))

    def _make_meeting(self) -> Meeting:
        """Write the probe into a new folder in the store."""
        root = self.store.root.absolute()
        remove_leftovers(root)
        folder, token = temporary_sibling(root / "run"), secrets.token_hex(16)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{root}: the store cannot be written: {error.strerror}") from error
        write_text(folder / PROBE, token)
        return Meeting(
            versions=required_versions(),
            devices={self.device.type: describe_device(self.device)},
            store=str(root),
            folder=str(folder),
            token=token,
        )

    def start(self, step: Step) -> None:
        """Submit a step to the pool."""
        assert self.meeting is not None
        self._status_path(step.key).unlink(missing_ok=True)  # of a lost worker
        self.told.pop(step.key, None)
        files = {key: self.files[key] for key in step.inputs if key in self.files}
        content = pickle.dumps(Assignment(step, self.surroundings, files))
        self.pool.submit(step.key, step.name, self.meeting, content)
        self.running[step.key] = step

    def wait(self) -> list[Ended]:
        """Wait until a submitted step ends, and report the progress of all meanwhile.

        Raises:
            RobustsoupError: A step failed.
        """
        while True:
            ends = self.pool.poll(POLL_SECONDS)
            self._touch_probe()
            for key in self.running.keys() - ends.keys():
                status = self._read_status(key)
                if status is not None:
                    self._tell(key, status)
            if ends:
                return [self._end(key, answer) for key, answer in ends.items()]

    def _touch_probe(self) -> None:
        """Show other hosts that the run goes on, however long its steps wait."""
        if self.meeting is not None and time.monotonic() >= self.touched + TOUCH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(Path(self.meeting["folder"]) / PROBE)
            self.touched = time.monotonic()

    def _end(self, key: Key, answer: StepEnd | Lost) -> Ended:
        step = self.running.pop(key)
        if isinstance(answer, Lost):
            status = self._read_status(key) if answer.saved else None
            return Ended(step, lost=answer.reason, done=status["done"] if status else 0)
        if answer["error"] is not None:
            name, text = answer["error"]
            kind = getattr(errors, name, WorkError)
            raise kind(text) if issubclass(kind, RobustsoupError) else WorkError(text)
        self._tell(key, answer["status"], step)
        self._await_output(step)
        return Ended(step, answer["figures"], answer["seconds"])

    def _await_output(self, step: Step) -> None:
        """Wait until this machine sees the output of a step in the store."""
        end = time.monotonic() + VISIBLE_SECONDS
        while not self.store.path(step.key).is_dir() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _status_path(self, key: Key) -> Path:
        assert self.meeting is not None
        return Path(self.meeting["folder"]) / f"{key}.json"

    def _read_status(self, key: Key) -> Status | None:
        with contextlib.suppress(OSError, ValueError):
            return cast("Status", json.loads(self._status_path(key).read_text(encoding="utf-8")))
        return None

    def _tell(self, key: Key, status: Status, step: Step | None = None) -> None:
        """Report what a step has told since the last time."""
        assert self.reporter is not None
        step, before = step or self.running[key], self.told.get(key)
        if before is None:
            self.reporter.started(step, status["place"])
        for note in status["notes"][len(before["notes"]) if before else 0 :]:
            self.reporter.note(f"{step.name}: {note}")
        for warning in status["warnings"][len(before["warnings"]) if before else 0 :]:
            self.reporter.warn(warning)
        self.reporter.progress(step, status["done"], status["total"], status["figures"])
        self.told[key] = status

"""Run one step on a worker: a process, perhaps on another machine, that sees the same store.

A worker gets names and settings alone. It loads the data and the checkpoints itself, and plans the
step again: the same key says that its data, network and code are those of the run.
"""

import contextlib
import json
import os
import pickle
import socket
import time
import tomllib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from robustsoup.device import resolve_device
from robustsoup.distributed import SAME_VERSION, describe_device, required_versions
from robustsoup.errors import RequestError, RobustsoupError, WorkError
from robustsoup.files import write_text
from robustsoup.models import NetworkSettings
from robustsoup.recipes import Recipe, parse_recipe
from robustsoup.runs.caches import hold_caches
from robustsoup.runs.context import Context
from robustsoup.runs.execute import execute_step
from robustsoup.runs.plan import Step
from robustsoup.runs.planner import Planner
from robustsoup.runs.run import load_recipe_data, make_context
from robustsoup.runs.store import Store
from robustsoup.runs.tasks import Key
from robustsoup.runs.worker import Worker
from robustsoup.user_code import current_folder_importable, import_named_module

if TYPE_CHECKING:
    from robustsoup.checkpoints.checkpoint import Checkpoint

PROBE = "probe"
"""The file in the folder of a run that every worker must see."""
STATUS_SECONDS = 1.0
"""Seconds between two lines about the progress of a step."""


class Meeting(TypedDict):
    """What a worker compares with the process that started the run, before any work.

    It holds plain text, which every version can read.

    Attributes:
        versions: Versions by what they are.
        devices: The kind of the run's device by its type, such as the name of a GPU.
        store: The store.
        folder: Folder in the store for this run: the probe, and a file for each running step.
        token: Content of the probe.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    store: str
    folder: str
    token: str


class Status(TypedDict):
    """What a running step has told so far.

    Attributes:
        place: Machine and process.
        done: Finished parts.
        total: All parts.
        figures: The latest figures.
        notes: Lines about the run itself.
        warnings: Warnings about doubtful results.
    """

    place: str
    done: int
    total: int
    figures: str
    notes: list[str]
    warnings: list[str]


class StepEnd(TypedDict):
    """How a step ended on a worker.

    Attributes:
        status: The last status.
        figures: The figures of the result.
        seconds: Seconds of the step.
        error: Name of the class of an error and its text; None if the step is finished.
    """

    status: Status
    figures: str
    seconds: float
    error: tuple[str, str] | None


@dataclass(frozen=True)
class Surroundings:
    """What all steps of a run share.

    Attributes:
        recipe: The resolved recipe, as TOML.
        network: How the network is built.
        device: "cpu" or "cuda".
        threads: CPU threads.
        data_root: Folder of the data sets.
        folder: The current folder of the command, where the user's code may be.
        image_size: Side in pixels to which image files are resized; None for the source's default.
    """

    recipe: str
    network: NetworkSettings
    device: str
    threads: int
    data_root: str | None
    folder: str
    image_size: int | None = None


@dataclass(frozen=True)
class Assignment:
    """A step for a worker.

    Attributes:
        step: The step; its parents are in the store.
        surroundings: What all steps of the run share.
        files: Paths of the checkpoints that the step reads, by key.
    """

    step: Step
    surroundings: Surroundings
    files: Mapping[Key, str]


@dataclass
class StatusFile:
    """Receives the events of a step and writes them where the run's first process reads them.

    Attributes:
        path: The file.
        status: What it holds.
        written: Time of the last writing.
    """

    path: Path
    status: Status = field(
        default_factory=lambda: Status(
            place=f"{socket.gethostname()}, process {os.getpid()}",
            done=0,
            total=1,
            figures="",
            notes=[],
            warnings=[],
        )
    )
    written: float = 0.0

    def write(self) -> None:
        """Write the file."""
        write_text(self.path, json.dumps(self.status))
        self.written = time.monotonic()

    def progress(self, step: Step, done: int, total: int, figures: str) -> None:
        """Receive progress, which is written about once a second."""
        del step  # a file is about one step
        self.status.update(done=done, total=total, figures=figures)
        if time.monotonic() - self.written >= STATUS_SECONDS:
            self.write()

    def warn(self, text: str) -> None:
        """Receive a warning."""
        self.status["warnings"].append(text)
        self.write()

    def note(self, text: str) -> None:
        """Receive a line about the run."""
        self.status["notes"].append(text)
        self.write()


def find_misfit(meeting: Meeting) -> str | None:
    """Return why this process cannot do steps of a run, in one line; None if it can."""
    host, installed = socket.gethostname(), required_versions()
    for name, expected in meeting["versions"].items():
        got = installed.get(name)
        if got != expected:
            return f"worker {host}: {name}: got {got}, expected {expected}; {SAME_VERSION}"
    for kind, expected in meeting["devices"].items():
        if kind == "cuda" and not torch.cuda.is_available():
            continue  # a check before the work, which reserves no GPU
        got = describe_device(torch.device(kind))
        if got != expected:
            return (
                f"worker {host}: device: got {got}, expected {expected} as where the run started; "
                "run all steps on devices of one kind"
            )
    try:
        seen = (Path(meeting["folder"]) / PROBE).read_text(encoding="utf-8")
    except OSError:
        seen = ""
    if seen != meeting["token"]:
        return (
            f"worker {host}: does not see the store {meeting['store']}; set ROBUSTSOUP_STORE to a "
            "folder that all machines share"
        )
    return None


def run_assignment(meeting: Meeting, content: bytes) -> StepEnd:
    """Run a step on this worker and store its output.

    Args:
        meeting: What is compared first.
        content: A pickled Assignment.

    Returns:
        The end of the step; errors are a part of it, because their classes may not pickle.
    """
    misfit = find_misfit(meeting)
    if misfit is not None:
        return _describe_end(StatusFile(Path()), error=RequestError(misfit))
    assignment: Assignment = pickle.loads(content)
    step = assignment.step
    status = StatusFile(Path(meeting["folder"]) / f"{step.key}.json")
    status.write()
    started = time.perf_counter()
    try:
        figures = execute_step(step, _open_worker(assignment, meeting["store"], status), status)
    except RobustsoupError as error:
        return _describe_end(status, error=error)
    except MemoryError:
        return _describe_end(status, error=WorkError(f"{step.name}: out of memory"))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{step.name}: unexpected {type(error).__name__} in {Path(place.filename).name}"
        failure = WorkError(f"{text}, line {place.lineno}: {error}")
        return _describe_end(status, error=failure)
    return _describe_end(status, figures, time.perf_counter() - started)


def _describe_end(
    status: StatusFile,
    figures: str = "",
    seconds: float = 0.0,
    error: RobustsoupError | None = None,
) -> StepEnd:
    described = None
    if error is not None:
        described = (type(error).__name__, f"{error} (on {status.status['place']})")
    return StepEnd(status=status.status, figures=figures, seconds=seconds, error=described)


def _open_worker(assignment: Assignment, store: str, status: StatusFile) -> Worker:
    """Load what a step reads.

    Raises:
        RequestError: The data, the network, the code or a checkpoint is another one here.
    """
    step = assignment.step
    hold_caches()
    recipe, context = _load_context(assignment.surroundings)
    planner = Planner(recipe, context.data, context.network, "float32")
    if planner.add_step(step.name, step.task) != step.key:
        raise RequestError(
            f"{step.name}: the data, the network or the user's code differs from that of the "
            "process that started the run; give all machines the same files"
        )
    files: dict[Key, Checkpoint] = {}
    for key, path in assignment.files.items():
        files[key] = recipe.opening.open(path)
        if key != planner.file_key(files[key]):
            raise RequestError(
                f"{path}: differs from the file of this name where the run started; "
                "give all machines the same files"
            )
    return Worker(context, Store(store), files, recipe.allow_leakage, status.warn)


@lru_cache(maxsize=1)
def _load_context(surroundings: Surroundings) -> tuple[Recipe, Context]:
    """Load the recipe and the data once for all steps that this process runs.

    This process changes to the folder of the command, which a network such as hf:FOLDER is below.
    """
    torch.set_num_threads(surroundings.threads)
    folder = Path(surroundings.folder)
    with contextlib.suppress(OSError):  # other machines may lack the folder, and not need it
        os.chdir(folder)
    with current_folder_importable(folder):
        recipe = parse_recipe(tomllib.loads(surroundings.recipe), "recipe", folder)
    for name in recipe.list_named_functions():
        import_named_module(name, folder)
    data = load_recipe_data(recipe, surroundings.data_root, image_size=surroundings.image_size)
    device = resolve_device(surroundings.device)
    return recipe, make_context(recipe, data, surroundings.network, device)

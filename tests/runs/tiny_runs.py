"""A tiny recipe on digits, and helpers to plan and run it."""

import contextlib
import copy
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import torch
from trained_seed import trained_seed

from robustsoup.data import load_data
from robustsoup.models import NetworkSettings
from robustsoup.recipes import parse_recipe
from robustsoup.runs.locks import HELD_NAME, lock_folder
from robustsoup.runs.results import Results
from robustsoup.runs.run import prepare_run, run_prepared
from robustsoup.runs.soup_rows import plan_recipe
from robustsoup.runs.store import Store

TINY = """
name = "tiny"
data = "digits"
model = "resnet9:width=2"
precision = "float32"

[pretrain]
threat = "Linf 32/255"
epochs = 4
lr = 0.2
schedule = "cosine"
early_stop = { steps = 2, samples = 64 }

[finetune]
epochs = 2
lr = 0.05

[ingredients]
low = { threat = "Linf 16/255" }
high = { threat = "Linf 64/255" }

[soups.grid]
method = "grid"
step = 0.5

[soups.learned]
method = "learned"
threats = ["Linf 32/255"]
epochs = 2

[evaluate]
threats = ["Linf 32/255"]
steps = 3
select_samples = 64
report_samples = 64

[select]
require = ["clean>=0"]

[report]
examples = 0
"""
PLANE = {
    "checkpoints": ["pretrained", "low", "high"],
    "points": 2,
    "samples": 16,
    "attack_steps": 1,
    "calibrate_samples": 32,
}
FEW_SAMPLES = {
    "threats": ["Linf 32/255"],
    "steps": 2,
    "select_samples": 64,
    "report_samples": 16,
    "report": "chosen",
}
"""A table [evaluate] for searches of many soups."""
DATA = load_data("digits")
MODEL = NetworkSettings("resnet9:width=2", classes=10, channels=1)
ROWS = ["pretrained", "low", "high", "grid-0-1", "grid-0.5-0.5", "grid-1-0", "learned-linf-32-255"]
LEARNED = ("soups", "learned")
SCREENED = [
    (("evaluate", "screen"), True),
    (("evaluate", "screen_steps"), 2),
    (("soups", "grid", "step"), 0.25),
]


class RecordingReporter:
    """Keeps the progress events of a run.

    Args:
        stop_after: Number of finished steps after which the run is interrupted.
    """

    def __init__(self, stop_after=None):
        self.missing, self.finished_steps, self.shares, self.warnings = [], [], [], []
        self.notes, self.places = [], {}
        self.stop_after = stop_after

    def begin(self, plan, missing):
        self.missing.append([(step.kind, step.name) for step in missing])

    def started(self, step, place):
        self.places[step.name] = place

    def progress(self, step, done, total, figures):
        self.shares.append(done / total)

    def warn(self, text):
        self.warnings.append(text)

    def note(self, text):
        self.notes.append(text)

    def finished(self, step, figures, seconds):
        assert figures
        assert seconds >= 0
        self.finished_steps.append((step.kind, step.name))
        if len(self.finished_steps) == self.stop_after:
            raise KeyboardInterrupt


def recipe_of(changes=()):
    """Return the tiny recipe with some values replaced, such as (("finetune", "epochs"), 3).

    Its networks take `trained_seed()`, unless a change sets the seed of the whole recipe.
    """
    content = tomllib.loads(TINY)
    if trained_seed() and ("seed",) not in [keys for keys, _ in changes]:
        for table in (content["pretrain"], content["finetune"], content["soups"]["learned"]):
            table["seed"] = trained_seed()
    for keys, value in changes:
        table = content
        for name in keys[:-1]:
            table = table.setdefault(name, {})
        table[keys[-1]] = copy.deepcopy(value)  # a later change may go into it
    return parse_recipe(content, "tiny", Path("/nowhere"))


def planner_of(changes=(), *, data=DATA, model=MODEL, precision="float32"):
    """Return the planner of the tiny recipe with some values replaced."""
    return plan_recipe(recipe_of(changes), data, model, precision)


def plan_of(*changes, **surroundings):
    """Return the plan of the tiny recipe with some values replaced."""
    return planner_of(changes, **surroundings).plan


def keys_of(plan):
    """Return the key of each step by (kind, name)."""
    return {(step.kind, step.name): step.key for step in plan.steps}


def steps_of(plan):
    """Return the steps by (kind, name)."""
    return {(step.kind, step.name): step for step in plan.steps}


def run_recipe(recipe, folder, reporter=None):
    """Run a recipe; return its results as JSON, the selection and the reporter."""
    reporter = reporter or RecordingReporter()
    prepared = prepare_run(recipe, device="cpu")
    with lock_folder(folder, reporter.note):
        results, selection = run_prepared(prepared, folder, reporter)
    assert Results.load(folder / "results.json") == results
    return results.to_json(), selection, reporter


@contextlib.contextmanager
def one_thread():
    """Let PyTorch use one thread, whatever the number that the tests run with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def forget_steps(root, *names):
    """Remove the steps with some names from a store."""
    store = Store(root)
    for key in store.keys():  # noqa: SIM118
        if store.record(key)["name"] in names:
            shutil.rmtree(store.path(key))


TIMES = ("created", "seconds", "digest", "digests", "files", "inputs")
"""What differs between the JSON files of equal runs: times, and digests of files with times."""


def without_times(content):
    """Return JSON without what says when and how long."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in TIMES}
    return [without_times(item) for item in content] if isinstance(content, list) else content


def stored_content(root):
    """Return every file of every step in a store: its digest, or JSON without times."""
    store = Store(root)
    return {
        f"{store.record(key)['name']}/{path.name} {key}": (
            without_times(json.loads(path.read_text()))
            if path.suffix == ".json"
            else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for key in store.keys()  # noqa: SIM118
        for path in store.path(key).iterdir()
    }


def modification_times(folder):
    """Return every file below a folder with the time of its last change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def find_leftovers(folder):
    """Return the files below a folder that only unfinished work leaves."""
    return [
        str(path)
        for path in Path(folder).rglob("*")
        if path.name != HELD_NAME
        and (path.name.startswith(".") or path.suffix in (".tmp", ".partial", ".lock", ".pt"))
    ]


def recipe_of_files(folder, **changes):
    """Return a recipe of the checkpoints low and high in a folder."""
    content = {
        "name": "files",
        "data": "digits",
        "ingredients": {name: str(folder / f"{name}.safetensors") for name in ("low", "high")},
        "soups": {"grid": {"method": "grid", "step": 0.5}},
        "report": {"examples": 0},
        "evaluate": {"threats": ["Linf 32/255"], "steps": 2},
    }
    return parse_recipe(content | changes, "files", folder)

"""The work of single steps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from constant_steps import (
    CLEAN,
    MIXING,
    constant_worker,
    name_ingredients,
    resume_clean_verdicts,
)
from ranks import run_ranks

from robustsoup.errors import StorageError
from robustsoup.progress import SavedState
from robustsoup.runs import worker as worker_module
from robustsoup.runs.execute import StepClock, _run_or_restart
from robustsoup.runs.plan import Step
from robustsoup.runs.store import STATE
from robustsoup.runs.tasks import (
    BuildGreedySoup,
    DoPart,
    EvaluateNetwork,
    MeasureClean,
    MergeSoup,
    Mixing,
)
from robustsoup.runs.worker import EVALUATION, HITS, PART, build_greedy_soup, merge_soup
from robustsoup.settings import AttackSettings, BufferSettings, MergeSettings
from robustsoup.soups.goal import Score
from robustsoup.threats import ThreatModel

ATTACKED = replace(
    CLEAN,
    samples=32,
    threats=(ThreatModel("Linf", 0.1),),
    attack=AttackSettings(steps=1, masking_check=False),
)
EVALUATE = EvaluateNetwork("ingredient0", ATTACKED)


@pytest.fixture
def save_at_every_opportunity(monkeypatch):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)


@pytest.mark.usefixtures("save_at_every_opportunity")
@pytest.mark.parametrize(
    ("task", "output"),
    [
        (EVALUATE, EVALUATION),
        (DoPart(EVALUATE, 0, 1), PART),
        (MeasureClean(name_ingredients(2), ((0.5, 0.5),), MIXING, CLEAN), HITS),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_state_stays_until_the_result_is_written(tmp_path, task, output):
    (tmp_path / output).mkdir()
    worker, step = constant_worker(tmp_path / "store", 2), Step("key", "name", task, 0)
    with pytest.raises(StorageError, match=output):
        worker.run_step(step, tmp_path, lambda *_: None)
    assert (tmp_path / STATE).exists()


def test_an_evaluation_has_the_same_bytes_with_another_number_of_threads(tmp_path, monkeypatch):
    worker, contents = constant_worker(tmp_path / "store", 1), []
    step = Step("key", "name", EvaluateNetwork("ingredient0", CLEAN), 0)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        worker.run_step(step, tmp_path, lambda *_: None)
        contents.append((tmp_path / EVALUATION).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kinds", [["cuda"], ["cuda", "cpu"]], ids=["another", "different"])
def test_a_step_is_done_as_a_whole_if_its_parts_were_done_on_other_devices(tmp_path, kinds):
    worker, notes = constant_worker(tmp_path / "store", 1), []
    for kind in kinds:
        with worker.store.write_step(kind, {}, notice=notes.append) as part:
            SavedState(part / PART, kind).save({"outcomes": {}})
    step = Step("key", "name", replace(EVALUATE, parts=tuple(kinds)), 0)
    reporter = SimpleNamespace(note=notes.append, progress=lambda *_: None)
    with worker.store.write_step("key", {}, notice=notes.append) as folder:
        clock = StepClock(folder / "seconds.txt", reporter, step)
        _run_or_restart(step, worker, folder, clock)
    assert (worker.store.path("key") / EVALUATION).exists()
    assert [note.endswith("; the step starts again") for note in notes] == [True]


def test_a_greedy_soup_may_have_many_ingredients(tmp_path):
    """The shares of 36 ingredients are longer than a file name may be."""
    worker, shown = constant_worker(tmp_path / "store", 36), []
    task = BuildGreedySoup(Score.parse("clean"), name_ingredients(36), (), MIXING, CLEAN)
    figures = build_greedy_soup(worker, task, tmp_path, lambda *progress: shown.append(progress))
    assert figures.startswith("36 of 36 ingredients")
    assert shown[-1][:2] == (task.rounds, task.rounds)
    assert len(list(tmp_path.glob("*.json"))) == task.rounds


@pytest.mark.usefixtures("save_at_every_opportunity")
def test_a_greedy_soup_keeps_the_state_of_the_attack_until_it_is_built(tmp_path):
    worker = constant_worker(tmp_path / "store", 1)
    task = BuildGreedySoup(Score.parse("clean"), name_ingredients(1), (), MIXING, ATTACKED)
    (tmp_path / "1.npz").mkdir()
    with pytest.raises(StorageError, match=r"1\.npz"):
        build_greedy_soup(worker, task, tmp_path, lambda *_: None)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["1.cpu.pt"]
    (tmp_path / "1.npz").rmdir()
    build_greedy_soup(worker, task, tmp_path, lambda *_: None)
    assert not list(tmp_path.glob("*.pt"))


def test_a_merge_measures_and_calibrates_under_threats_of_their_own(tmp_path, monkeypatch):
    given = {}

    def keep_arguments(*_, **arguments):
        given.update(arguments)
        return SimpleNamespace(save=lambda _: None)

    monkeypatch.setattr(worker_module, "merge", keep_arguments)
    buffers = BufferSettings(buffers="recalibrate-adversarial", calibrate_threat="L2 0.5")
    names, threat = name_ingredients(2), ThreatModel.parse("Linf 0.1")
    task = MergeSoup("fisher", MergeSettings(), names, (0.5, 0.5), Mixing(buffers), threat=threat)
    merge_soup(constant_worker(tmp_path / "store", 2), task, tmp_path)
    assert given["threat"] == threat
    assert str(given["calibrate_threat"]) == "L2 0.5"


def test_more_processes_resume_the_clean_verdicts_of_one(tmp_path):
    assert run_ranks(2, resume_clean_verdicts, tmp_path) == [[(3, 3)], [(3, 3)]]

"""The work of single steps."""

from types import SimpleNamespace

from constant_steps import (
    CLEAN,
    MIXING,
    constant_worker,
    name_ingredients,
    resume_clean_verdicts,
)
from ranks import run_ranks

from robustsoup.runs import worker as worker_module
from robustsoup.runs.tasks import BuildGreedySoup, MergeSoup, Mixing
from robustsoup.runs.worker import build_greedy_soup, merge_soup
from robustsoup.settings import BufferSettings, MergeSettings
from robustsoup.soups.goal import Score
from robustsoup.threats import ThreatModel


def test_a_greedy_soup_may_have_many_ingredients(tmp_path):
    """The shares of 36 ingredients are longer than a file name may be."""
    worker, shown = constant_worker(tmp_path / "store", 36), []
    task = BuildGreedySoup(Score.parse("clean"), name_ingredients(36), (), MIXING, CLEAN)
    figures = build_greedy_soup(worker, task, tmp_path, lambda *progress: shown.append(progress))
    assert figures.startswith("36 of 36 ingredients")
    assert shown[-1][:2] == (task.rounds, task.rounds)
    assert len(list(tmp_path.glob("*.json"))) == task.rounds


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

"""The work of single steps."""

from constant_steps import (
    CLEAN,
    MIXING,
    constant_worker,
    name_ingredients,
    resume_clean_verdicts,
)
from ranks import run_ranks

from robustsoup.runs.tasks import BuildGreedySoup
from robustsoup.runs.worker import build_greedy_soup
from robustsoup.soups.goal import Score


def test_a_greedy_soup_may_have_many_ingredients(tmp_path):
    """The shares of 36 ingredients are longer than a file name may be."""
    worker, shown = constant_worker(tmp_path / "store", 36), []
    task = BuildGreedySoup(Score.parse("clean"), name_ingredients(36), (), MIXING, CLEAN)
    figures = build_greedy_soup(worker, task, tmp_path, lambda *progress: shown.append(progress))
    assert figures.startswith("36 of 36 ingredients")
    assert shown[-1][:2] == (task.rounds, task.rounds)
    assert len(list(tmp_path.glob("*.json"))) == task.rounds


def test_more_processes_resume_the_clean_verdicts_of_one(tmp_path):
    assert run_ranks(2, resume_clean_verdicts, tmp_path) == [[(3, 3)], [(3, 3)]]

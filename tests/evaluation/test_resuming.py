"""An evaluation that is interrupted or killed resumes sample by sample, with the same verdicts."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from evaluated_networks import (
    L2,
    LINF,
    WRONG,
    Counted,
    N,
    interrupt_at_gate,
    rounding,
    same_verdicts,
)

from robustsoup.attacks.outcome import Outcome
from robustsoup.errors import CheckpointError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models.normalize import normalize_inputs


@pytest.mark.parametrize(
    ("precision", "share", "left"),
    [("float32", 0.4, 1.0), ("bfloat16", 0.4, 1.0), ("float32", 0.8, 0.6)],
)
def test_an_interrupted_evaluation_resumes(model, data, tmp_path, passes, precision, share, left):
    """Interrupted after a share of its passes, it does less than `left` of them again."""
    state, reports = tmp_path / "deep" / "state.pt", []
    settings = {"steps": 20, "seed": 3, "restarts": 2, "batch_size": 8, "precision": precision}
    complete_run = evaluate(Counted(model), data, [LINF, L2], keep_points=True, **settings)
    cost = passes[True]

    def interrupt(done, total, figures):
        reports.append(done)
        interrupt_at_gate(done, total, figures)

    Counted.reset(gate_after=int(share * cost))
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            Counted(model),
            data,
            [LINF, L2],
            keep_points=True,
            state_path=state,
            on_progress=interrupt,
            **settings,
        )
    assert state.exists()
    reached, later = reports[-1], []
    Counted.reset()
    resumed = evaluate(
        Counted(model),
        data,
        [LINF, L2],
        keep_points=True,
        state_path=state,
        on_progress=lambda *report: later.append(report[0]),
        **settings,
    )
    assert 0 < passes[True] < left * cost
    assert same_verdicts(resumed, complete_run)
    for name, verdicts in resumed.threats.items():
        assert torch.equal(verdicts.x_adv, complete_run.threats[name].x_adv)
    assert resumed.record["certificate"] == complete_run.record["certificate"]
    assert reached < max(later) == 3 * N
    assert not state.exists()


def test_a_half_written_sample_is_dropped_from_the_saved_state():
    """`settled` is written last and saved first; a sample that is not settled may be half done."""
    state = Outcome.blank(4).snapshot()
    state["settled"] = torch.tensor([2, 0, 1, 2])
    state["broken"] = torch.tensor([True, True, False, False])
    state["by"], state["step"] = torch.tensor([1, 0, 0, -1]), torch.tensor([5, 3, 3, -1])
    outcome = Outcome.blank(4)
    outcome.restore(state, 2)
    assert outcome.broken.tolist() == [True, False, False, False]
    assert outcome.by.tolist() == [1, -1, -1, -1]
    assert outcome.step.tolist() == [5, -1, -1, -1]
    assert outcome.settled.tolist() == [2, 0, 1, 2]


def test_a_resumed_evaluation_keeps_its_warnings(model, data, tmp_path, passes):
    network, settings = Counted(rounding(model)), {"steps": 20, "batch_size": 8}
    complete_run = evaluate(network, data, [LINF], **settings)
    Counted.reset(gate_after=passes[True] // 2)
    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, data, [LINF], state_path=state, on_progress=interrupt_at_gate, **settings)
    assert state.exists()
    Counted.reset()
    resumed = evaluate(network, data, [LINF], state_path=state, **settings)
    assert resumed.warnings == complete_run.warnings
    assert len(complete_run.warnings) == 2
    assert resumed.record["masking_check"] == complete_run.record["masking_check"]


def test_a_killed_evaluation_resumes(model, data, tmp_path, passes, save_every_step):
    """A kill leaves the state that was saved last, before anything that an error would save."""
    network = Counted(model)
    settings = {"steps": 20, "seed": 3, "restarts": 2, "batch_size": 8}
    complete_run = evaluate(network, data, [LINF, L2], **settings)
    cost, state, left = passes[True], tmp_path / "state.pt", tmp_path / "left.pt"

    def kill_at_gate(done, total, figures):
        if Counted.reached_gate():
            shutil.copy(state, left)
        interrupt_at_gate(done, total, figures)

    Counted.reset(gate_after=int(0.8 * cost))
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, data, [LINF, L2], state_path=state, on_progress=kill_at_gate, **settings)
    Counted.reset()
    resumed = evaluate(network, data, [LINF, L2], state_path=left, **settings)
    assert same_verdicts(resumed, complete_run)
    assert passes[True] < 0.6 * cost  # settled samples are not attacked again
    assert not left.exists()


def test_a_state_of_other_settings_or_another_network_is_refused(
    with_points, model, neighbour, data, tmp_path
):
    state = tmp_path / "state.pt"

    def interrupt_attack(done, total, figures):
        if done > N + WRONG:  # a sample is settled
            raise KeyboardInterrupt

    request = {"network": model, "data": data, "threats": [LINF], "steps": 5, "seed": 3}
    with pytest.raises(KeyboardInterrupt):
        evaluate(**request, state_path=state, on_progress=interrupt_attack)
    before = state.read_bytes()
    for change in (
        {"steps": 6},
        {"seed": 4},
        {"loss": "dlr"},
        {"attack": "pgd"},
        {"restarts": 2},
        {"eot": 2},
        {"network": neighbour},
        {"network": normalize_inputs(copy.deepcopy(model), [0.1], [1.0])},
        {"precision": "bfloat16"},
        {"batch_size": 10},
        {"keep_points": True},
        {"pool": [with_points]},
        {"after": with_points},
        {"data": data.first(N - 1)},
        {"data": replace(data, name="train")},
    ):
        with pytest.raises(CheckpointError, match=r"state\.pt: saved by work with other settings"):
            evaluate(**(request | change), state_path=state)
        assert state.read_bytes() == before
    state.write_bytes(before[:100])
    with pytest.raises(
        CheckpointError,
        match=r"state\.pt: the saved state cannot be read .*; delete it to start again",
    ):
        evaluate(**request, state_path=state)

"""Several processes share an evaluation: the same bits as one process gives, whatever N."""

import json
import re

import pytest
import torch
from evaluated_networks import NAMES, same_verdicts
from ranks import run_command, run_ranks
from shared_evaluations import (
    CHUNK,
    evaluate_counted,
    evaluate_own,
    evaluate_path,
    evaluate_until,
    noisy_step,
    start_as,
)

from robustsoup import distributed
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import RequestError, WorkError
from robustsoup.evaluation import attackers
from robustsoup.evaluation.sharing import SharedState
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.progress import SavedState

SETTINGS = {"seed": 3, "batch_size": 8}


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    network = {"spec": "resnet9:width=4", "channels": 1}
    return Checkpoint.of(model, {"network": network}).save(
        tmp_path_factory.mktemp("shared") / "a.safetensors"
    )


@pytest.fixture(scope="module")
def labels(data):
    return data.labels.tolist()


@pytest.fixture
def few_in_chunks(monkeypatch):
    monkeypatch.setattr(attackers, "CHUNK_SAMPLES", CHUNK)
    monkeypatch.setattr(attackers.FunctionAttacker, "together", CHUNK)


def comparable(record):
    return {key: record[key] for key in record if key not in ("seconds", "processes")}


def assert_same_bits(evaluation, expected):
    assert same_verdicts(evaluation, expected)
    for part in ("ids", "labels", "prediction", "margin"):
        assert torch.equal(getattr(evaluation, part), getattr(expected, part))
    for name, verdicts in expected.threats.items():
        if verdicts.x_adv is not None:
            points = evaluation.threats[name].x_adv
            assert torch.equal(points.view(torch.int32), verdicts.x_adv.view(torch.int32))
    assert comparable(evaluation.record) == comparable(expected.record)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.scale), 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 5, "restarts": 2, "keep_points": True},
        {"attack": noisy_step},
        *(
            pytest.param(settings, marks=pytest.mark.scale)
            for settings in (
                {"steps": 10, "precision": "bfloat16", "loss": "targeted dlr", "targets": 2},
                {"attack": "square", "n_queries": 30},
            )
        ),
    ],
    ids=["apgd", "in chunks", "targeted in bfloat16", "square"],
)
@pytest.mark.usefixtures("few_in_chunks")
def test_verdicts_are_those_of_one_process(path, labels, world, settings):
    threats = NAMES[:2] if "keep_points" in settings else NAMES[:1]
    settings = SETTINGS | settings
    expected = evaluate_path(path, labels, threats, settings)
    for evaluation in run_ranks(world, evaluate_path, path, labels, threats, settings):
        assert_same_bits(evaluation, expected)
        assert evaluation.record["processes"] == world
    assert "processes" not in expected.record


@pytest.mark.scale
def test_more_processes_than_samples(path, labels):
    few, settings = labels[-2:], SETTINGS | {"steps": 2}
    expected = evaluate_path(path, few, NAMES[:1], settings)
    for evaluation in run_ranks(3, evaluate_path, path, few, NAMES[:1], settings):
        assert_same_bits(evaluation, expected)


@pytest.mark.parametrize("later", [1, pytest.param(3, marks=pytest.mark.scale)])
def test_an_interrupted_evaluation_resumes_with_another_number_of_processes(
    path, labels, tmp_path, later
):
    state = tmp_path / "state.pt"
    settings = SETTINGS | {"steps": 20, "restarts": 2}
    expected, cost = evaluate_counted(path, labels, NAMES[:2], settings)
    resumable = settings | {"state_path": state}
    # A rank takes about a quarter of the passes for each threat: this is amid the first one.
    ended = run_ranks(2, evaluate_until, cost // 6, path, labels, NAMES[:2], resumable)
    # A rank that waits for the other's part loses the connection to it.
    types = {type(end) for end in ended}
    assert KeyboardInterrupt in types <= {KeyboardInterrupt, WorkError}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.pt", "state.rank1.pt"]
    if later == 1:
        results = [evaluate_counted(path, labels, NAMES[:2], resumable)]
    else:
        results = run_ranks(later, evaluate_counted, path, labels, NAMES[:2], resumable)
    if later == 1:  # passes of 3 ranks are less full
        assert results[0][1] < cost
    for evaluation, _ in results:
        assert_same_bits(evaluation, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["state.pt", ".rank1/state.pt"], ids=["first", "another"])
def test_fewer_processes_resume_what_all_folders_of_ranks_hold(tmp_path, place):
    for rank, name in enumerate(["state.pt", ".rank1/state.rank1.pt", ".rank2/state.rank2.pt"]):
        attacked = (torch.arange(3) == rank).long()
        snapshot = {"settled": attacked, "broken": attacked * (rank + 1)}
        SavedState(tmp_path / name, "work").save({"outcomes": {"Linf 0.1": snapshot}})
    state = SharedState(tmp_path / place, "work")
    merged = state.load()["Linf 0.1"]
    assert merged["settled"].tolist() == [1, 1, 1]
    assert merged["broken"].tolist() == [1, 2, 3]
    state.clear()
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("checkpoint", r"digest of the checkpoint: got \w{12} in rank 1, expected \w{12} as in"),
        ("device", "device: got another GPU in rank 1, expected a GPU as in rank 0; "),
        ("data", r"digest of the data: got \w{12} in rank 1, expected \w{12} as in rank 0; "),
    ],
)
def test_ranks_with_other_inputs_are_refused(path, neighbour, labels, tmp_path, what, reason):
    paths, own_labels, devices = [path, path], [labels, labels], ["a GPU", "a GPU"]
    if what == "checkpoint":
        network = {"spec": "resnet9:width=4", "channels": 1}
        paths[1] = Checkpoint.of(neighbour, {"network": network}).save(tmp_path / "b.safetensors")
    elif what == "device":
        devices[1] = "another GPU"
    else:
        own_labels[1] = labels[1:]
    for error in run_ranks(2, evaluate_own, paths, own_labels, devices, NAMES[:1]):
        assert isinstance(error, RequestError)
        assert re.match(reason, str(error))


def test_another_version_is_refused():
    for error in run_ranks(2, start_as, ["1.0", "1.1"]):
        assert str(error) == (
            "version of robustsoup: got 1.1 in rank 1, expected 1.0 as in rank 0; "
            "install the same version on every machine"
        )


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(RequestError) as caught:
        distributed.start()
    assert str(caught.value) == (
        "$MASTER_PORT: not set, although $RANK and $WORLD_SIZE are; start the command with torchrun"
    )


COMMAND = ("--data", "digits", "--threat", "Linf 8/255", "--steps", "2", "--samples", "40")


def test_the_command_prints_and_writes_once(path, tmp_path):
    command = ("evaluate", str(path), *COMMAND, "--json")
    (first, *others) = run_ranks(2, run_command, *command, "-o", str(tmp_path / "two"))
    assert others == [(0, "", "")]
    assert first[0] == 0
    assert run_command(*command, "-o", str(tmp_path / "one"))[0] == 0
    one, two = (Evaluation.load(tmp_path / name / "a.test.json") for name in ("one", "two"))
    assert_same_bits(two, one)
    assert json.loads(first[1])["a"]["accuracy"] == one.to_json()["accuracy"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("evaluate", "absent.safetensors", *COMMAND), "absent.safetensors"),
        (("mix", "a.safetensors", "-o", "b.safetensors"), "mix: runs in one process, got 2; "),
    ],
)
def test_an_error_is_printed_by_one_rank(command, reason):
    ended = run_ranks(2, run_command, *command)
    assert [code for code, _, _ in ended] == [2, 2]
    (message,) = [messages for _, _, messages in ended if messages]
    assert message.count("\n") == 1
    assert reason in message

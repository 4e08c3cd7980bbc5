"""robustsoup evaluate and compare: verdicts, records, warnings, and resuming after a kill."""

import json
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from command_line import FEW, LINF, PAIR, run, start
from corruptions import write_corruptions

import robustsoup
from robustsoup import distributed
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli.evaluating import _FinishedEvaluations, _locate_states
from robustsoup.device import resolve_precision
from robustsoup.evaluation.sharing import SharedState
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.settings import AttackSettings

LOW = ("evaluate", "low.safetensors", *LINF, *FEW)
DEADLINE = 120  # seconds after which a process that never reaches the awaited state fails the test


def test_json_and_records_hold_the_same_verdicts(here, capsys):
    assert run("evaluate", *PAIR, *LINF, *FEW, "--json", "-o", "verdicts") == 0
    output = json.loads(capsys.readouterr().out)
    assert set(output) == {"low", "high"}
    for name, content in output.items():
        assert content["accuracy"]["clean"]["n"] == 64
        assert content["leakage"] == {"status": "known", "why": ""}
        record = Evaluation.load(here / "verdicts" / f"{name}.test.json")
        assert record.to_json() == content
        assert len(record.ids) == 64


def test_the_masking_check_is_printed_and_can_be_switched_off(here, capsys):
    command = ("evaluate", "low.safetensors", *LINF, *FEW)
    assert run(*command, "--steps", 5) == 0
    assert "low, masking check, Linf" in capsys.readouterr().out
    assert run(*command, "--steps", 5, "--no-masking-check", "--json") == 0
    content = json.loads(capsys.readouterr().out)["low"]
    assert "masking_check" not in content
    assert run(*command, "--attack", "square", "--n-queries", 3) == 0
    assert "SQUARE-MARGIN 3 queries, 1 restart, float32" in capsys.readouterr().out


def test_the_training_split_is_evaluated_with_a_notice(here, capsys):
    assert run(*LOW, "--split", "train") == 0
    printed = capsys.readouterr()
    assert "64 samples of train" in printed.out
    assert "was trained on the train split itself" in printed.err


def test_files_of_the_same_name_get_different_names(here, capsys):
    for folder in ("a", "b"):
        (here / folder).mkdir()
        shutil.copy("low.safetensors", here / folder / "low.safetensors")
    files = ("a/low.safetensors", "b/low.safetensors", "low.safetensors")
    assert run("evaluate", *files, "--data", "digits", "--samples", 64, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


@pytest.mark.parametrize(
    ("options", "record", "text"),
    [
        ((), {"attack": "apgd", "loss": "ce"}, "APGD-CE 2 steps, 1 restart, float32"),
        (("--attack", "pgd"), {"attack": "pgd"}, "PGD-CE 2 steps, 1 restart, float32"),
        (
            ("--loss", "dlr", "--restarts", 2),
            {"loss": "dlr", "restarts": 2},
            "APGD-DLR 2 steps, 2 restarts, float32",
        ),
        (
            ("--precision", "bfloat16"),
            {"search_precision": "bfloat16", "precision": "float32"},
            "APGD-CE 2 steps, 1 restart, float32, search in bfloat16",
        ),
        (("--eot", 3, "--batch-size", 16), {"eot": 3, "rows": 16}, "APGD-CE 2 steps"),
    ],
)
def test_the_output_names_the_attack(here, capsys, options, record, text):
    assert run(*LOW, *options, "-o", "verdicts") == 0
    output = capsys.readouterr().out
    assert f"64 samples of test, 95 % Wilson intervals, {text}" in output
    assert ("search in" in output) == ("search in" in text)
    evaluation = Evaluation.load("verdicts/low.test.json")
    assert {key: evaluation.record[key] for key in record} == record
    several_attacks = len(evaluation.record["broken_by"]) > 2
    assert ("accuracy after each attack" in output) == several_attacks
    assert not list(here.glob("verdicts/*.points.npz"))


def test_an_attack_may_be_a_function_in_this_folder(here, capsys):
    code = "def stay(model, x, y, threat, *, seed):\n    return x\n"
    (here / "idle_attacks.py").write_text(code)
    assert run(*LOW, "--attack", "idle_attacks:stay", "-o", "verdicts") == 0
    assert "95 % Wilson intervals, idle_attacks:stay" in capsys.readouterr().out
    record = Evaluation.load("verdicts/low.test.json").record
    assert record["attack"] == "idle_attacks:stay"


def test_the_output_lists_the_accuracy_after_each_attack(here, capsys):
    assert run(*LOW, "--loss", "targeted dlr", "-o", "verdicts") == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "after each attack" in line)
    left = Evaluation.load("verdicts/low.test.json").after_each("Linf 32/255")
    assert line.startswith("low, Linf 32/255, accuracy after each attack: clean ")
    assert re.findall(r"([^,:]+) (\d+\.\d)%", line.partition("attack:")[2]) == [
        (f" {name}", f"{accuracy.value:.1%}"[:-1]) for name, accuracy in left.items()
    ]
    targeted = [name for name in left if "target" in name]
    assert targeted == [f"apgd-t target {rank}" for rank in range(1, 10)]


def test_points_are_kept_on_request(here):
    assert run(*LOW, "--keep-points", "-o", "verdicts") == 0
    evaluation = Evaluation.load("verdicts/low.test.json")
    assert evaluation.threats["Linf 32/255"].x_adv.shape == (64, 1, 8, 8)
    names = {path.name for path in (here / "verdicts").iterdir()}
    assert names == {"low.test.json", "low.test.npz", "low.test.points.npz"}


def test_warnings_are_printed_and_recorded(here, capsys):
    low = Checkpoint.load("low.safetensors")
    tensors = {**low.tensors, "linear.weight": low.tensors["linear.weight"] * 10_000}
    Checkpoint(tensors, low.provenance).save(here / "masked.safetensors")
    assert run("evaluate", "masked.safetensors", *LINF, *FEW, "-o", "verdicts") == 0
    warning = "robustsoup: warning: masked: the gradient is exactly zero at the start for"
    assert warning in capsys.readouterr().err
    assert len(Evaluation.load("verdicts/masked.test.json").warnings) == 1
    assert run(*LOW) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_normalization_is_never_ignored(here, capsys):
    command = ("evaluate", "low.safetensors", "--data", "digits", "--samples", 64, "--json")
    outcomes = []
    for options in ((), ("--normalize", 0.9, 0.1)):
        code = run(*command, *options)
        output = capsys.readouterr().out
        accuracy = json.loads(output)["low"]["accuracy"]["clean"] if code == 0 else None
        outcomes.append((code, accuracy))
    assert outcomes[0] != outcomes[1]


WAIT_ONCE_SETTLED = """
import sys, time
from robustsoup.cli import main
from robustsoup.progress import SavedState

save = SavedState.save

def save_and_wait(self, state):
    save(self, state)
    if any(outcome["settled"].any() for outcome in state["outcomes"].values()):
        time.sleep(600)  # until the test kills this process

SavedState.__init__.__defaults__ = (0.0,)  # save at every opportunity
SavedState.save = save_and_wait
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_evaluation_resumes(here, tmp_path, capsys):
    """A state in $ROBUSTSOUP_STORE/unfinished keeps what is settled; it goes when all is done."""
    command = ("evaluate", *PAIR, *LINF, "--steps", 20, "--restarts", 2, "--threads", 1)
    assert run(*command, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    store = tmp_path / "store"
    assert not list(store.rglob("*.pt"))
    process = start(*command, store=store, script=("-c", WAIT_ONCE_SETTLED))

    def count_settled():
        for path in store.glob("unfinished/*.pt"):
            outcome = torch.load(path, weights_only=True)["outcomes"]["Linf 32/255"]
            return int(outcome["settled"].sum())
        return 0

    deadline = time.monotonic() + DEADLINE
    while not count_settled() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert count_settled() > 0
    assert run(*command, "--json") == 0
    resumed = json.loads(capsys.readouterr().out)
    for content in (*whole.values(), *resumed.values()):
        content.pop("seconds")
    assert resumed == whole
    assert [p for p in (store / "unfinished").iterdir() if not p.name.endswith(".tmp")] == []


def test_the_state_of_an_evaluation_belongs_to_its_split_device_and_precision(here, digits):
    item = {"low": Checkpoint.load("low.safetensors")}

    def locate(kind, precision, split=digits.test):
        attack, device = AttackSettings(precision=precision), torch.device(kind)
        return _locate_states(item, split, attack, device, [])["low"]

    cpu = torch.device("cpu")
    assert locate("cpu", "auto") == locate("cpu", resolve_precision("auto", cpu))
    kinds = [("cpu", "float32"), ("cpu", "bfloat16"), ("cuda", "float32")]
    assert len({locate(*kind) for kind in kinds}) == 3
    assert locate("cuda:0", "float32") == locate("cuda:1", "float32")
    renamed = replace(digits.test, name="train")  # which has the same digest
    assert locate("cpu", "float32") != locate("cpu", "float32", renamed)


@pytest.mark.parametrize(
    "options",
    [(), ("-o", "verdicts"), ("--shift", "digits-c")],
    ids=["printed", "written", "shift"],
)
def test_an_interrupted_command_keeps_what_it_finished(
    here, capsys, monkeypatch, tmp_path, options
):
    from robustsoup.evaluation import evaluate as evaluating

    write_corruptions(here / "digits-c")
    command = ("evaluate", *PAIR, *LINF, "--steps", 2, "--samples", 32, *options, "--json")
    assert run(*command) == 0
    expected = json.loads(capsys.readouterr().out)
    evaluate, evaluated = evaluating.evaluate, []

    def interrupt_second(checkpoint, *args, **options):
        if "state_path" not in options:  # a look at the network before the work
            return evaluate(checkpoint, *args, **options)
        if len(evaluated) == 1:
            evaluated.append("interrupted")
            raise KeyboardInterrupt
        evaluated.append(checkpoint.path.stem)
        return evaluate(checkpoint, *args, **options)

    monkeypatch.setattr(evaluating, "evaluate", interrupt_second)
    assert run(*command) == 130
    assert run(*command) == 0
    assert evaluated == ["low", "interrupted", "high"]
    resumed = json.loads(capsys.readouterr().out)
    for content in (*expected.values(), *resumed.values()):
        content.pop("seconds")
    assert resumed == expected
    assert run(*command) == 0  # nothing is left of it
    assert evaluated[3:] == ["low", "high"]
    assert list((tmp_path / "store" / "unfinished").iterdir()) == []


def test_an_evaluation_goes_without_a_store_that_cannot_be_written(here, capsys, monkeypatch):
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(here / "low.pth" / "store"))
    monkeypatch.setattr(SharedState, "due", lambda state: True)
    assert run(*LOW, "--samples", 8, "--no-masking-check") == 0
    assert capsys.readouterr().err.count("an interrupted evaluation starts again; set ROBUST") == 1


def test_one_of_several_processes_keeps_what_is_finished(here, digits, tmp_path, monkeypatch):
    evaluation = robustsoup.evaluate("low.safetensors", digits.test, samples=4)
    finished = _FinishedEvaluations({"low": tmp_path / "unfinished" / "a.pt"})
    monkeypatch.setattr(distributed, "world", lambda: 2)
    for rank, expected in [(1, None), (0, evaluation.accuracy)]:
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        finished.keep("low", evaluation)
        kept = finished.load("low")
        assert (kept and kept.accuracy) == expected


def test_compare_pairs_two_evaluations(here, capsys):
    assert run("evaluate", *PAIR, *LINF, *FEW, "-o", "verdicts") == 0
    capsys.readouterr()
    records = ("verdicts/low.test.json", "verdicts/high.test.json")
    assert run("compare", *records, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    low, high = (Evaluation.load(path) for path in records)
    assert output == json.loads(json.dumps(robustsoup.compare(low, high).to_json()))
    assert output["n"] == 64
    assert set(output["rows"]) == {"clean", "Linf 32/255"}
    for key, row in output["rows"].items():
        hits = (low.accuracy[key].hits, high.accuracy[key].hits)
        assert (row["a"]["hits"], row["b"]["hits"]) == hits
        assert row["value"] == pytest.approx((hits[1] - hits[0]) / 64)
        assert row["low"] <= row["value"] <= row["high"]
    assert run("compare", *records) == 0
    text = capsys.readouterr().out
    assert "second - first" in text
    assert "64 paired samples" in text
    assert f"{low.accuracy['clean'].value:.1%}" in text
    assert "note: 2 comparisons; the p-values are not adjusted" in text


def test_compare_notes_different_protocols(here, capsys):
    assert run(*LOW, "-o", "first") == 0
    assert run(*LOW, "--steps", 3, "--samples", 32, "-o", "second") == 0
    capsys.readouterr()
    assert run("compare", "first/low.test.json", "second/low.test.json") == 0
    text = capsys.readouterr().out
    assert "note: on 32 common samples, of 64 in the first and 32 in the second" in text
    assert "note: different steps: 2 and 3; the robust accuracies are not comparable" in text


def test_accuracies_are_printed_even_if_they_cannot_be_written(here, tmp_path, capsys, monkeypatch):
    from robustsoup.evaluation import evaluate as evaluating

    (tmp_path / "out" / "a.test.npz" / "taken").mkdir(parents=True)
    shutil.copy(PAIR[0], tmp_path / "a.safetensors")
    output = ("-o", tmp_path / "out")
    assert run("evaluate", tmp_path / "a.safetensors", *LINF, *FEW, *output) == 1
    printed = capsys.readouterr()
    assert "clean" in printed.out
    assert "a.test.npz" in printed.err
    # The same command goes on with the verdicts that it could not write.
    (tmp_path / "out" / "a.test.npz" / "taken").rmdir()
    (tmp_path / "out" / "a.test.npz").rmdir()
    evaluate = evaluating.evaluate

    def look_at_network(*args, **options):
        assert "state_path" not in options, "it attacks again"
        return evaluate(*args, **options)

    monkeypatch.setattr(evaluating, "evaluate", look_at_network)
    assert run("evaluate", tmp_path / "a.safetensors", *LINF, *FEW, *output) == 0
    assert Evaluation.load(tmp_path / "out" / "a.test.json").accuracy

"""`robustsoup show`: what a checkpoint is, what it was made of, and who judged it."""

import json
import shutil

import pytest
import torch
from command_line import FEW, LINF, MIX, PAIR, run

from robustsoup.checkpoints.checkpoint import Checkpoint

ESCAPES = "\x1b[31m[red]:smile:\u202e\n"


def show(capsys, *arguments):
    """Return the description of a checkpoint as JSON."""
    capsys.readouterr()
    assert run("show", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_soup_names_its_network_its_family_and_its_evaluations(here, capsys):
    assert run(*MIX, "--coefficients", "0.25,0.75") == 0
    assert run("evaluate", "soup.safetensors", "low.safetensors", *LINF, *FEW, "-o", ".") == 0
    shown = show(capsys, "soup.safetensors")
    soup = Checkpoint.load("soup.safetensors")
    assert shown["network"]["spec"] == "resnet9:width=2"
    assert shown["digest"] == soup.digest
    by_name = {tensor["name"]: tensor for tensor in shown["tensors"]}
    assert by_name.keys() == soup.tensors.keys()
    assert by_name["linear.weight"]["role"] == "parameter"
    assert by_name["prep.1.running_mean"]["role"] == "buffer"
    parents = shown["provenance"]["parents"]
    assert [parent["coefficient"] for parent in parents] == [0.25, 0.75]
    assert [parent["name"] for parent in parents] == list(PAIR)
    assert "trained against Linf 8/255 on digits (train)" in parents[0]["made"]
    for parent in parents:
        assert [item["name"] for item in parent["parents"]] == ["base.safetensors"]
    assert [judged["file"] for judged in shown["judged_by"]] == ["soup.test.json"]
    assert shown["judged_by"][0]["accuracy"].keys() == {"clean", "Linf 32/255"}


def test_the_text_holds_what_the_json_holds(here, capsys):
    assert run(*MIX) == 0
    capsys.readouterr()
    assert run("show", "soup.safetensors") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("resnet9:width=2", "soup of 2 ingredients", "0.5 x low", "base.safetensors"):
        assert part in text
    assert "no evaluation of these weights" in text


def test_ancestors_are_recognised_by_their_weights_not_by_their_names(here, capsys):
    assert run(*MIX) == 0
    shutil.copy("wide.safetensors", "low.safetensors")
    parents = show(capsys, "soup.safetensors")["provenance"]["parents"]
    assert [parent["file"] for parent in parents] == [None, "high.safetensors"]
    assert parents[0]["made"] == ""


def test_an_evaluation_of_other_weights_is_not_taken(here, capsys):
    assert run("evaluate", "low.safetensors", "--data", "digits", *FEW, "-o", ".") == 0
    shutil.move("low.test.json", "high.test.json")
    shutil.move("low.test.npz", "high.test.npz")
    assert show(capsys, "high.safetensors")["judged_by"] == []
    assert [item["file"] for item in show(capsys, "low.safetensors")["judged_by"]] == [
        "high.test.json"
    ]


def test_a_damaged_evaluation_is_a_note(here, capsys):
    assert run("evaluate", "low.safetensors", "--data", "digits", *FEW, "-o", ".") == 0
    shutil.copy("low.test.json", "other.test.json")
    with open("other.test.npz", "wb") as file:  # noqa: PTH123
        file.write(b"no arrays")
    shown = show(capsys, "low.safetensors")
    assert len(shown["judged_by"]) == 1
    assert "other.test.json: not an evaluation" in shown["notes"][0]


def test_a_foreign_file_has_no_record(here, capsys):
    shown = show(capsys, "low.pth")
    assert shown["network"] is None
    assert shown["provenance"]["made"] == "no record"
    assert run("show", "missing.pth") == 2


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_hostile_names_are_only_text(tmp_path, capsys, as_json):
    record = {
        "network": {"spec": ESCAPES, "classes": 2, "channels": 1, "normalize": None},
        "parameters": [f"weight{ESCAPES}"],
        "parents": [{"digest": "0" * 64, "file": f"parent{ESCAPES}"}],
        "coefficients": [1.0],
        "buffers": {"policy": ESCAPES},
        "training": {"threat": [ESCAPES], "lr": ESCAPES},
        "trained_on": [ESCAPES],
    }
    file = tmp_path / "hostile.safetensors"
    Checkpoint({f"weight{ESCAPES}": torch.ones(2)}, record).save(file)
    assert run("show", file, *as_json) == 0
    shown = capsys.readouterr()
    for character in "\x1b\u202e":
        assert character not in shown.out + shown.err
    assert "[red]" in shown.out


def test_coefficients_of_the_wrong_number_are_unknown(tmp_path, capsys):
    parents = [{"digest": "0" * 64}, {"digest": "1" * 64}]
    for coefficients in ([1.0], {}, {"weight": [0.5]}):
        file = tmp_path / "soup.safetensors"
        record = {"parents": parents, "coefficients": coefficients}
        Checkpoint({"weight": torch.ones(2)}, record).save(file)
        shown = show(capsys, file)["provenance"]["parents"]
        assert [parent["coefficient"] for parent in shown] == [None, None]


def test_the_checkpoints_of_a_run_know_their_rows(here, capsys):
    search = ("search", *PAIR, *LINF, *FEW, "--step", 0.5, "-o", "best")
    assert run(*search) == 0
    shown = show(capsys, "best/soup.safetensors")
    assert {judged["split"] for judged in shown["judged_by"]} == {"val", "test"}


def test_a_network_without_sizes_has_the_usual_ones(tmp_path, capsys):
    record = {"network": {"spec": "resnet9:width=2"}}
    path = Checkpoint({"w": torch.zeros(2)}, record).save(tmp_path / "a.safetensors")
    assert run("show", path) == 0
    assert "network: resnet9:width=2, classes 10, channels 3\n" in capsys.readouterr().out


def test_a_file_that_a_record_names_many_times_is_opened_once(tmp_path, capsys, monkeypatch):
    beside = Checkpoint({"w": torch.ones(2)}).save(tmp_path / "b.safetensors")
    parents = [{"digest": f"{number:064x}", "file": beside.name} for number in range(400)]
    path = Checkpoint({"w": torch.zeros(2)}, {"parents": parents}).save(tmp_path / "a.safetensors")
    opened, open_checkpoint = [], Checkpoint.open

    def open_and_count(place, **options):
        opened.append(place)
        return open_checkpoint(place, **options)

    monkeypatch.setattr(Checkpoint, "open", open_and_count)
    assert len(show(capsys, path)["provenance"]["parents"]) == 400
    assert opened == [path, beside]

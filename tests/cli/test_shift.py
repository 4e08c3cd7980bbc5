"""evaluate --shift: accuracy on corrupted copies of the test set."""

import json

from command_line import run
from corruptions import write_corruptions


def test_evaluate_prints_and_records_natural_shift(here, capsys):
    write_corruptions(here / "digits-c")
    command = ("evaluate", "low.safetensors", "--data", "digits", "--shift", "digits-c")
    assert run(*command, "--samples", 40, "-o", "out") == 0
    printed = capsys.readouterr().out
    assert "low, natural shift, all corruptions " in printed
    assert "low, natural shift, black at severity 1 to 5: " in printed
    content = json.loads((here / "out" / "low.test.json").read_text())
    assert set(content["shift"]["corruptions"]) == {"none", "black"}
    assert run(*command, "--split", "val") == 2
    assert "--shift: applies to --split test, got val" in capsys.readouterr().err

"""`robustsoup plan --devices N`: the prediction of a run on many devices."""

import json
from pathlib import Path

import pytest

from robustsoup.cli import main

RECIPE = """
name = "small"
data = "digits"
model = "resnet9:width=2"
[pretrain]
threat = "Linf 32/255"
epochs = 1
[finetune]
epochs = 1
[ingredients]
low = { threat = "Linf 16/255" }
[evaluate]
threats = ["Linf 32/255"]
steps = 3
report_samples = 64
"""


@pytest.fixture
def price(tmp_path, monkeypatch, capsys):
    """Return the JSON of `plan` with some options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))
    Path("small.toml").write_text(RECIPE)

    def run(*options):
        with pytest.raises(SystemExit) as end:
            main(["plan", "small.toml", "--json", *options])
        captured = capsys.readouterr()
        return end.value.code, json.loads(captured.out) if captured.out else captured.err

    return run


def test_devices_that_are_not_here_are_calculated(price):
    code, priced = price("--devices", "8", "--device", "h100")
    assert code == 0
    prediction = priced["prediction"]
    assert prediction["devices"] == 8
    assert prediction["source"].startswith("calculated from")
    assert 0 < prediction["seconds"] <= prediction["device_seconds"] * 1.01
    assert all(prediction[name] > 0 for name in ("memory_bytes", "read_bytes", "written_bytes"))


def test_devices_like_this_one_are_measured(price):
    code, priced = price("--devices", "2", "--device", "cpu")
    assert code == 0
    assert priced["prediction"]["source"] == "measured on this cpu"
    assert "prediction" not in price("--device", "cpu")[1]


def test_an_attack_needs_the_memory_of_a_pass(price):
    needed = [
        price("--device", "h100", "--set", f"evaluate.batch_size={size}")[1]["prediction"]
        for size in (256, 1024, 4096)
    ]
    small, medium, large = (prediction["memory_bytes"] for prediction in needed)
    assert small < medium < large < 4.1 * medium


def test_no_device_is_refused(price):
    assert price("--devices", "0")[0] == 2

"""Checkpoints that plain PyTorch wrote, for a network in the user's own file."""

import html
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import read_files, run
from torch import nn
from trained_seed import trained_seed

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import to_float
from robustsoup.reports.commands import list_commands
from robustsoup.reports.origins import describe_soup_of
from robustsoup.runs.results import Results

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))
"""
MEAN, STD = 0.3, 0.35
FOREIGN = ("--model", "mynet:Net", "--data", "digits", "--normalize", MEAN, STD)


@pytest.fixture(scope="module")
def foreign_folder(tmp_path_factory, digits):
    """A folder with the network's file and three .pth files of one training run.

    The inputs are normalized outside the network, and the names start with "module.".
    """
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "mynet.py").write_text(NETWORK)
    names = {}
    exec(NETWORK, names)
    with torch.random.fork_rng():
        torch.manual_seed(trained_seed())
        net = names["Net"]()
        x, y = (to_float(digits.train.images) - MEAN) / STD, digits.train.labels
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(45):
            optimizer.zero_grad()
            rows = torch.randperm(1000)[:256]
            noisy = x[rows] + 0.3 * torch.randn_like(x[rows])
            nn.functional.cross_entropy(net(noisy), y[rows]).backward()
            optimizer.step()
            if step in (34, 39, 44):
                state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
                content = {"state_dict": state, "epoch": 3, "note": "mine"}
                torch.save(content, folder / f"net{step}.pth")
    return folder


@pytest.fixture
def foreign_files(foreign_folder, tmp_path, monkeypatch):
    """The names of the .pth files, copied into the current folder."""
    for path in foreign_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    yield sorted(path.name for path in tmp_path.glob("*.pth"))
    sys.modules.pop("mynet", None)


def make_network():
    return sys.modules["mynet"].Net()


def test_a_chosen_soup_keeps_the_format_of_its_ingredients(
    foreign_files, digits, tmp_path, capsys, monkeypatch
):
    before = read_files(tmp_path)
    options = ("--threat", "Linf 16/255", "--steps", 3, "--samples", 100, "--step", 0.5)
    command = ("search", *foreign_files, *FOREIGN, *options, "--require", "clean>=0")
    assert run(*command, "--json", "-o", "best") == 0
    printed = capsys.readouterr()
    output = json.loads(printed.out)
    assert "split unknown" in printed.err
    assert output["leakage"]["status"] == "unknown"
    assert output["soup"] == "soup.pth"
    assert before.items() <= read_files(tmp_path).items()

    content = torch.load("best/soup.pth", weights_only=True)
    assert content.keys() == {"state_dict", "note"}  # the soup has no epoch
    assert content["note"] == "mine"
    net = nn.DataParallel(make_network())  # its names start with "module."
    assert net.load_state_dict(content["state_dict"]).missing_keys == []
    images, labels = to_float(digits.test.first(100).images), digits.test.first(100).labels
    with torch.no_grad():
        predicted = net.module.eval()((images - MEAN) / STD).argmax(1)
    hits = int((predicted == labels).sum())
    chosen = next(row for row in output["rows"] if row["name"] == output["selection"]["chosen"])
    assert abs(hits - chosen["test"]["clean"]["hits"]) <= 1  # kernels may round differently

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir("best")
    content = json.loads(Path("results.json").read_text(encoding="utf-8"))
    results = Results.from_json(content, "results.json")
    recorded = describe_soup_of(results, tmp_path / "best").network
    commands = dict(list_commands(results, recorded))
    names = {}
    exec(commands["Load"], names)
    with torch.no_grad():
        assert hits == int((names["network"](images).argmax(1) == labels).sum())
    assert run(*shlex.split(commands["Judge"])[1:], "--samples", 100, "--json") == 0
    accuracy = json.loads(capsys.readouterr().out)["soup"]["accuracy"]
    assert accuracy["clean"] == chosen["test"]["clean"]
    report = html.unescape(Path("report.html").read_text(encoding="utf-8"))
    assert all(command in report for command in commands.values())


def test_foreign_checkpoints_are_mixed_and_learned(foreign_files, capsys):
    assert run("mix", *foreign_files, "-o", "mean.pth") == 0
    learn = ("learn", *foreign_files, *FOREIGN, "--threat", "Linf 16/255", "--epochs", 1)
    assert run(*learn, "-o", "learned") == 0
    assert "split unknown" in capsys.readouterr().err
    for path in ("mean.pth", "learned/soup.pth"):
        state = torch.load(path, weights_only=True)["state_dict"]
        plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        make_network().load_state_dict(plain)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in foreign_files]
    mean = torch.stack([state["module.head.weight"] for state in states]).mean(0)
    mixed = torch.load("mean.pth", weights_only=True)["state_dict"]["module.head.weight"]
    assert torch.allclose(mixed, mean, atol=1e-6)


def test_a_network_near_chance_is_judged_with_a_warning(foreign_files, capsys):
    command = ("evaluate", foreign_files[-1], "--model", "mynet:Net", "--data", "digits")
    assert run(*command, "--samples", 100, "--normalize", 40, 0.01) == 0
    assert "--normalize" in capsys.readouterr().err
    for radius in ("Linf 8", "L2 128"):
        assert run(*command, "--normalize", 40, 0.01, "--threat", radius) == 2
        (line,) = capsys.readouterr().err.splitlines()  # refused before the network is looked at
        assert radius in line


def test_the_current_folder_is_importable_only_for_named_code(foreign_files, capsys):
    command = ("evaluate", foreign_files[-1], *FOREIGN, "--samples", 32)
    before = list(sys.path)
    assert run(*command) == 0
    assert sys.path == before


def test_a_recorded_network_of_the_current_folder_is_not_imported(foreign_files, tmp_path):
    record = {"spec": "mynet:Net", "classes": 10, "channels": 1}
    recorded = Checkpoint.load(foreign_files[0]).with_provenance(network=record)
    recorded.save("recorded.safetensors")
    (tmp_path / "mynet.py").write_text("open('imported', 'w')\n" + NETWORK)
    script = (
        "import sys; sys.path.pop(0); from robustsoup.cli import main;"
        "main(['evaluate', 'recorded.safetensors', '--data', 'digits'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "recorded.safetensors: the file names 'mynet:Net' as its network" in done.stderr
    assert not (tmp_path / "imported").exists()


def test_modules_of_the_current_folder_do_not_shadow_others(tmp_path):
    """`python -m` puts the current folder first on the path, the command takes it off."""
    for module in ("typing", "json", "typer", "numpy", "torch"):
        (tmp_path / f"{module}.py").write_text("open('imported', 'w')\n")
    Checkpoint({"weight": torch.zeros(2)}).save(tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "robustsoup", "verify", "a.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 verified" in done.stdout
    assert not (tmp_path / "imported").exists()

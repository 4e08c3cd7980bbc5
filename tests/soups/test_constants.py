"""Constants that differ between ingredients: said once, by name, wherever they are mixed."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run

import robustsoup as rs

NETWORK = """
import torch
from torch import nn

class WithMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(64), nn.Linear(64, 10)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        return self.last(self.norm((x - self.mean).flatten(1)))
"""
WARNING = (
    "b.pth: mean differs from a.pth; it is not averaged, so a soup takes a.pth's. If it normalises "
    "the input, the networks expect different inputs"
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A current folder with a network and two files of it whose constants differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "with_mean.py").write_text(NETWORK)
    network, train = rs.load_model("with_mean:WithMean"), rs.load_data("digits").train
    images = (train.images / 255).flatten(1)
    means = torch.stack([images[train.labels == k].mean(0) for k in range(10)])
    for seed, name in enumerate("ab"):
        state = {key: value.clone() for key, value in network.state_dict().items()}
        generator = torch.Generator().manual_seed(seed)
        state["last.weight"] = means + 0.01 * torch.rand(10, 64, generator=generator)
        state["last.bias"] = -means.square().sum(1) / 2  # the nearest mean
        torch.save(state | {"mean": torch.tensor([seed / 4])}, f"{name}.pth")
    return ["a.pth", "b.pth"], network


def test_mix_and_learn_say_so(files):
    paths, network = files
    assert rs.mix(paths, [0.5, 0.5], network=network).warnings == [WARNING]
    assert rs.mix([paths[0]] * 2, [0.5, 0.5], network=network).warnings == []
    data = rs.load_data("digits").train.first(64)
    learned = rs.learn(paths, data, threat="Linf 8/255", epochs=1, network=network, device="cpu")
    assert learned.record["warnings"] == [WARNING]
    base = rs.mix(paths, [0.5, 0.5], buffers="base", base=paths[1], network=network)
    assert base.tensors["mean"] == 0.25
    assert base.warnings == [WARNING.replace("takes a.pth's", "takes the base's")]


def test_a_soup_takes_the_constants_of_the_first_ingredient_that_takes_part(files):
    paths, network = files
    alone = rs.mix(paths, [0.0, 1.0], network=network)
    assert (alone.tensors["mean"], alone.warnings) == (0.25, [])
    assert torch.equal(alone.tensors["last.weight"], torch.load("b.pth")["last.weight"])


def test_a_search_says_so_once(files):
    paths, network = files
    data = rs.load_data("digits").val.first(32)
    settings = {"steps": 1, "step": 0.5, "network": network, "device": "cpu"}
    result = rs.search(paths, data, ["Linf 8/255"], allow_leakage=True, **settings)
    assert result.warnings == (WARNING,)
    assert WARNING in result._repr_html_().replace("&#x27;", "'")


def test_commands_say_so_in_tables_records_and_reports(files, capsys, blank_figures):
    paths, _ = files
    network = ("--model", "with_mean:WithMean")
    assert run("mix", *paths, *network, "-o", "soup.safetensors") == 0
    assert capsys.readouterr().err.count(WARNING) == 1
    assert run("show", "soup.safetensors") == 0
    assert f"warning: {WARNING}" in " ".join(capsys.readouterr().out.split())
    few = ("--data", "digits", "--threat", "Linf 8/255", "--steps", 1, "--samples", 32)
    assert run("search", *paths, *network, *few, "--step", 0.5, "-o", "best") == 0
    assert capsys.readouterr().err.count(WARNING) == 1
    folder = Path("best")
    assert json.loads((folder / "results.json").read_text())["warnings"] == [WARNING]
    for name in ("report.html", "README.md"):
        assert "mean differs from a.pth" in (folder / name).read_text()

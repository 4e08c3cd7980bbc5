"""Several processes run a recipe together: each step is shared, one store and one run folder."""

import json

import pytest
from digits import digits_network
from ingredients import perturbed
from ranks import run_command, run_ranks

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.runs.results import Results

pytestmark = pytest.mark.scale

DATA = ("--data", "digits", "--model", "resnet9:width=4", "--seed", "0")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("shared"), digits_network(4)
    return [
        str(
            Checkpoint(perturbed(base, seed, 0.03).tensors, {}).save(folder / f"{seed}.safetensors")
        )
        for seed in range(3)
    ]


def commands(paths):
    linf = ("--threat", "Linf 8/255")
    yield ("search", *paths[:2], *DATA, *linf, "--steps", "2", "--samples", "64", "--step", "0.5")
    yield ("landscape", *paths, *DATA, *linf, "--points", "2", "--samples", "64")


@pytest.mark.parametrize("number", [0, 1], ids=["search", "landscape"])
def test_a_run_by_two_processes_is_that_of_one(paths, tmp_path, monkeypatch, number):
    command = list(commands(paths))[number]
    written = {}
    for world in (1, 2):
        monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / f"store{world}"))
        folder = tmp_path / f"run{world}"
        ended = run_ranks(world, run_command, *command, "--json", "-o", str(folder))
        assert [code for code, _, _ in ended] == [ended[0][0]] * world
        assert ended[0][0] in (0, 3)
        assert [output for _, output, _ in ended[1:]] == [""] * (world - 1)
        written[world] = json.loads(ended[0][1])
        assert Results.load(folder / "results.json").to_json()["rows"] == written[world]["rows"]
        assert not list((tmp_path / f"store{world}").rglob(".rank*"))
    for row, expected in zip(written[2]["rows"], written[1]["rows"], strict=True):
        assert row["name"] == expected["name"]
        assert row.get("val") == expected.get("val")
    for plane, expected in zip(written[2]["planes"], written[1]["planes"], strict=True):
        assert plane["name"] == expected["name"]

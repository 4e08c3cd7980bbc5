"""README.md beside the soups that commands write."""

import json
from pathlib import Path

import pytest
import torch
from command_line import FEW, LEARN, LINF, PAIR, run

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli.learned_folder import LearnedFolder
from robustsoup.reports.card import find_card


def read_card(folder):
    return Path(folder, "README.md").read_text(encoding="utf-8")


def test_a_search_writes_the_card_of_its_soup(here):
    yaml = pytest.importorskip("yaml")
    search = ("search", *PAIR, *LINF, *FEW, "--step", 0.5, "-o", "best")
    assert run(*search) == 0
    results = json.loads(Path("best/results.json").read_text(encoding="utf-8"))
    text = read_card("best")
    header = yaml.safe_load(text.split("\n---\n")[0])
    row = next(r for r in results["rows"] if r["name"] == results["selection"]["chosen"])
    for result in header["model-index"][0]["results"]:
        scores = row[result["dataset"]["split"]]
        measured = [(m["value"], m["args"]["low"], m["args"]["n"]) for m in result["metrics"]]
        assert measured == [(s["value"], s["low"], s["n"]) for s in scores.values()]
    assert len(header["model-index"][0]["results"]) == 2
    for part in (row["name"], "`low`", "`high`", "Masking check", "test, Linf 32/255: "):
        assert part in text
    assert str(here) not in text
    edited = text.replace("## Licence", "license: mine\n## Licence")
    Path("best/README.md").write_text(edited, encoding="utf-8")
    assert run("report", "best") == 0
    assert read_card("best") == edited
    assert "README.md was edited" in Path("best/report.html").read_text(encoding="utf-8")
    Path("best/README.md").unlink()
    assert run("report", "best") == 0
    assert read_card("best") == text


def test_learning_writes_a_card_and_a_dial_removes_it(here):
    learn = (*LEARN, "--epochs", 1, "--attack-steps", 1, "-o", "learned")
    assert run(*learn, "--threat", "L2 0.5", "--combine", "max") == 0
    text = read_card("learned")
    assert "coefficients learned against Linf 32/255 and L2 0.5" in text
    assert "were not evaluated where this card was written" in text
    assert run(*learn, "--dial") == 0
    assert not Path("learned/README.md").exists()


def test_learning_again_says_that_an_edited_card_stays(here, capsys):
    learn = (*LEARN, "--epochs", 1, "--attack-steps", 1, "-o", "learned")
    assert run(*learn) == 0
    card = Path("learned/README.md")
    card.write_text(card.read_text(encoding="utf-8") + "mine\n", encoding="utf-8")
    assert run(*learn, "--epochs", 2) == 0
    assert "README.md was edited and stays as it is" in capsys.readouterr().out
    assert read_card("learned").endswith("mine\n")


def test_the_card_of_a_learned_soup_is_that_of_both_its_files(tmp_path):
    own = Checkpoint({"w": torch.ones(2)})
    own.save(tmp_path / "soup.safetensors")
    torch.save({"backbone.w": torch.ones(2)}, tmp_path / "soup.pth")
    names = {"soup.safetensors", "soup.pth"}
    LearnedFolder(tmp_path, ["a"])._write_card(names)
    for name in names:
        digest = Checkpoint.load(tmp_path / name).digest
        assert find_card(tmp_path / name, digest) == tmp_path / "README.md"

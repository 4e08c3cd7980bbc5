"""What the README shows is run as it stands there."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from robustsoup.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(block):
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("robustsoup ")]


def test_the_commands_under_you_have_none_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen = [block for block in blocks("sh") if "robustsoup train" in block or "--dial" in block]
    assert len(chosen) == 2
    for command in itertools.chain(*map(commands, chosen)):
        with pytest.raises(SystemExit) as end:
            main(command[1:])
        assert end.value.code == 0, command
    assert (tmp_path / "learned" / "soup.safetensors").exists()
    assert "half" in capsys.readouterr().out
    for written in ("blocks/coefficients.csv", "cleaner.safetensors", "greedy/soup.safetensors"):
        assert (tmp_path / written).exists()


def test_the_python_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert "Linf 64/255" in example or "Linf 56/255" in example
    assert capsys.readouterr().out.count("%") >= 4


def test_the_recipe_commands_name_files_that_exist(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    named = {
        word
        for block in blocks("sh")
        for c in commands(block)
        for word in c
        if word.endswith(".toml")
    }
    assert named
    assert all(Path(name).is_file() for name in named)


def test_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile

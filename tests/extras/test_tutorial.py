"""The tutorial on one's own networks: its scripts and commands run, with few images."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from robustsoup.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "tutorial-your-own-networks.md"
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)
FEW = {"--samples": "16", "--steps": "1", "--require": "clean>=0"}


def run_script(name, printed):
    runpy.run_path(name, run_name="__main__")
    assert printed().out.strip(), f"{name} prints its result"


def run_command(words):
    small = [FEW.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    with pytest.raises(SystemExit) as end:
        main([*small, "--device", "cpu", "--point"])
    assert end.value.code in (0, 3, 4), small


def run_line(line, printed):
    words = shlex.split(line)
    match words[0], words[1]:
        case "pip", _:
            pass
        case "robustsoup", "fetch":
            pass
        case "robustsoup", _:
            run_command(words[1:])
        case "python", name:
            run_script(name, printed)
        case _:
            subprocess.run(words, check=True)


@pytest.mark.filterwarnings("ignore")
def test_the_tutorial_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    if not os.environ.get("ROBUSTSOUP_DATA"):
        pytest.skip("needs CIFAR-10: set ROBUSTSOUP_DATA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("IMAGES", "32")
    # Networks that saw so few images are near chance, and a search refuses such files.
    monkeypatch.setattr("robustsoup.runs.run._refuse_files_near_chance", lambda *_: None)
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))
    for language, code in BLOCK.findall(PAGE.read_text("utf-8")):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", code)[1]
            (tmp_path / name).write_text(code, "utf-8")
            continue
        for line in code.replace("\\\n", " ").splitlines():
            run_line(line, capsys.readouterr)
    sys.modules.pop("plain", None)
    assert (tmp_path / "timm-soup" / "soup.pth").is_file()
    assert (tmp_path / "vit-soup" / "model.safetensors").is_file()

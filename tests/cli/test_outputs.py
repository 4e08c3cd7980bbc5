"""Outputs that cannot be written are refused before the work, in one line."""

import os

import pytest
from command_line import LEARN, LINF, PAIR, RECIPE, run

from robustsoup.files import check_writable

COMMANDS = {
    "train": (("train", "--model", "resnet9:width=2", *LINF), "file"),
    "mix": (("mix", *PAIR), "file"),
    "learn": (LEARN, "folder"),
    "evaluate": (("evaluate", *PAIR, *LINF), "folder"),
    "search": (("search", *PAIR, *LINF), "folder"),
    "landscape": (("landscape", *PAIR, PAIR[0], *LINF), "folder"),
    "run": (("run", "two.toml"), "folder"),
    "demo": (("demo",), "folder"),
}
"""The commands with -o, and what each writes."""


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch):
    """A folder in which data, checkpoints and recipe are missing or empty: no work can begin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.toml").write_text(RECIPE)
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    return tmp_path


def list_wrong(kind):
    """Return outputs that a command cannot write, each with a part of the message."""
    common = [("file/soup.safetensors", "got a file"), ("file/a/soup.safetensors", "got a file")]
    if kind == "folder":
        return [*common, ("file", "got a file, expected a folder"), ("/dev/null", "got a file")]
    return [
        *common,
        ("folder.safetensors", "got a folder, expected a regular file"),
        ("pipe.safetensors", "got a FIFO"),
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFO")
@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_of_the_wrong_kind_is_refused_before_the_work(name, inputs, capsys):
    words, kind = COMMANDS[name]
    before = sorted(inputs.rglob("*"))
    for output, text in list_wrong(kind):
        assert run(*words, "-o", output) == 1, output
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith(f"robustsoup: {output}: cannot be written: ")
        assert text in error
    assert sorted(inputs.rglob("*")) == before
    assert (inputs / "file").read_text() == "mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_without_permission_is_refused_before_the_work(name, inputs, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK | os.X_OK)
    words, _ = COMMANDS[name]
    assert run(*words, "-o", "new/soup.safetensors") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no permission to write; set another one with -o" in error
    assert not (inputs / "new").exists()


def test_missing_parents_are_no_fault_and_are_not_created(tmp_path):
    for folder in (False, True):
        check_writable(tmp_path / "a" / "b" / "c", folder=folder)
    assert not (tmp_path / "a").exists()

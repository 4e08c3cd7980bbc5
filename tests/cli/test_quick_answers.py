"""Help, versions, usage errors and shell completion do not import slow libraries."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch
import typer
from command_line import run

from robustsoup.cli import diagnosis, versions
from robustsoup.cli.application import COMMANDS
from robustsoup.cli.diagnosis import explain_slowness

SLOW = ["torch", "numpy", "matplotlib", "safetensors", "tomli_w", "filelock"]
if not any(line.startswith("pydantic") for line in importlib.metadata.requires("typer")):
    SLOW.append("pydantic")
if tuple(map(int, typer.__version__.split(".")[:2])) >= (0, 20):  # older ones import rich at once
    SLOW.append("rich")
SCRIPT = """
import atexit, sys
slow = {slow!r}

@atexit.register
def report():
    sys.stderr.write("imported: " + ",".join(name for name in slow if name in sys.modules))

from robustsoup.cli import main
for line in sys.argv[1].splitlines() or [""]:
    try:
        main(line.split())
    except SystemExit as end:
        code = end.code
sys.exit(code)
"""


def imported_by(lines, **environment):
    """Run command lines in one new process; return its slow imports and the process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(slow=SLOW), lines],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.stderr.rpartition("imported: ")[2], done


def test_help_imports_nothing_slow():
    imported, done = imported_by("\n".join(f"{name} --help" for name in ("", *COMMANDS)))
    assert imported == ""
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"Usage: robustsoup {name} " in done.stdout


def test_versions_import_nothing_slow():
    imported, done = imported_by("--version -v")
    assert imported == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"robustsoup {versions.package_version('robustsoup')}"
    assert f"torch {importlib.metadata.version('torch')}" in lines
    assert len(imported_by("--version")[1].stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bake", 'robustsoup: no command "bake"; see robustsoup --help\n'),
        (
            "evalute",
            'robustsoup: no command "evalute"; did you mean "evaluate"? See robustsoup --help\n',
        ),
        ("evaluate --stepz 3", "robustsoup: No such option: --stepz"),
        ("learn x.safetensors", "robustsoup: Missing option '--data'"),
    ],
)
def test_usage_errors_import_nothing_slow(line, message):
    imported, done = imported_by(line)
    assert imported == ""
    assert done.returncode == 2
    assert done.stderr.startswith(message)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("robustsoup ev", {"evaluate"}),
        ("robustsoup train --data ", {"digits", "cifar10", "folder"}),
        ("robustsoup learn --batchnorm ", {"per-rank", "sync"}),
        ("robustsoup train --model resnet1", {"resnet18"}),
    ],
)
def test_completion_imports_nothing_slow(words, expected):
    words = words.split(" ")
    imported, done = imported_by(
        "",
        _ROBUSTSOUP_COMPLETE="complete_bash",
        COMP_WORDS=" ".join(words),
        COMP_CWORD=str(len(words) - 1),
    )
    assert imported == ""
    assert expected <= set(done.stdout.split())


def test_no_words_show_the_commands(capsys):
    assert run() == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in COMMANDS)


def test_doctor_describes_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("ROBUSTSOUP_DATA", str(tmp_path / "data"))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_bytes(b"0123456789")
    report = diagnosis.diagnose()
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["cpu"]["kernels"] == torch.backends.cpu.get_cpu_capability()
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["folders"]["store"] == {"path": str(tmp_path / "store"), "bytes": 10}
    assert report["folders"]["data"] == {"path": str(tmp_path / "data"), "bytes": None}
    assert set(report["extras"]) >= {"folders", "autoattack"}
    assert not {"test", "docs", "dev"} & set(report["extras"])
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert run("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"store: {tmp_path / 'store'} (10 B)" in lines
    assert f"data: {tmp_path / 'data'} (absent)" in lines


def test_a_missing_extra_has_its_install_line(monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "list_extras", lambda: {"folders": {"pillow": None}})
    assert run("doctor") == 0
    assert "extra folders: pip install 'robustsoup[folders]'" in capsys.readouterr().out


CPU = {"cores": 4, "threads": 4, "kernels": "AVX2", "bfloat16": True}
GPU = {"name": "X100", "memory": 2**30, "compute_capability": "7.0", "bfloat16": True}


@pytest.mark.parametrize(
    ("cpu", "gpus", "cause"),
    [
        ({"threads": 8}, [], "8 threads share 4 cores"),
        ({"threads": 1}, [], "1 of 4 cores are used"),
        ({"kernels": "DEFAULT"}, [], "without vector instructions"),
        ({"bfloat16": False}, [], "the CPU has no native bfloat16"),
        ({}, [GPU | {"bfloat16": False}], "X100 has no native bfloat16"),
    ],
)
def test_causes_of_slowness_are_named(cpu, gpus, cause):
    assert not any(cause in text for text in explain_slowness(CPU, [GPU]))
    assert any(cause in text for text in explain_slowness(CPU | cpu, gpus))

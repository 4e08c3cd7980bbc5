"""Running the command line from tests, and the arguments that many of them share."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from robustsoup.cli import app, main

LINF = ("--data", "digits", "--threat", "Linf 32/255")
FEW = ("--steps", 2, "--samples", 64)
PAIR = ("low.safetensors", "high.safetensors")
SEARCH = ("search", *PAIR, *LINF, *FEW, "--step", 0.5)
LEARN = ("learn", *PAIR, *LINF)
SMALL = {
    "train": ("--epochs", 1),
    "check": ("--samples", 32),
    "learn": ("--epochs", 1),
    "evaluate": ("--steps", 2, "--samples", 64),
    "search": ("--steps", 2, "--samples", 32, "--step", 0.5),
    "landscape": ("--points", 2, "--samples", 16, "--attack-steps", 1, "--calibrate-samples", 64),
}
"""Options that make the examples of commands quick."""
MIX = ("mix", *PAIR, "-o", "soup.safetensors")


def run(*arguments):
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def start(*arguments, store, script=("-m", "robustsoup")):
    """Start a command as a process of its own."""
    env = {**os.environ, "ROBUSTSOUP_STORE": str(store), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *script, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_files(folder):
    """Return the bytes of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


RECIPE = """
name = "two"
data = "digits"
[ingredients]
low = "low.safetensors"
high = "high.safetensors"
[soups.flat]
method = "uniform"
[evaluate]
threats = ["Linf 32/255"]
steps = 2
select_samples = 64
report_samples = 64
"""


def list_examples():
    """Return command -> the robustsoup lines in its help, as lists of words."""
    examples = {}
    for registered in app.registered_commands:
        lines = re.findall(r"`(robustsoup [^`]+)`", inspect.getdoc(registered.callback))
        examples[registered.name] = [shlex.split(" ".join(line.split())) for line in lines]
    return examples

"""Coverage-guided fuzzing of each reader and parser: one line of an error, or a value.

Each reader gets ROBUSTSOUP_FUZZ_SECONDS of the processor (default 5). Requires the extra
robustsoup[fuzz].
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from readers import READERS

SECONDS = float(os.environ.get("ROBUSTSOUP_FUZZ_SECONDS", "5"))
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="pip install 'robustsoup[fuzz]'"
)


@needs_atheris
@pytest.mark.parametrize("name", READERS)
def test_a_reader_survives_fuzzing(tmp_path, tally_of, name):
    tally = tally_of(f"coverage-guided fuzzing for {SECONDS:g} s: {name}")
    paths = [*sys.path, os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz.py"), name, str(SECONDS), tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=20 * SECONDS + 300,  # the machine may be busy
    )
    if process.returncode != 0:
        tally.lost.append(f"the process ended with {process.returncode}: {process.stderr[-800:]}")
        tally.count()
    else:
        result = json.loads(process.stdout.splitlines()[-1])
        tally.count(result["tried"])
        tally.lost += [
            f"{reason}: {tmp_path}/findings/{n}" for reason, n in result["found"].items()
        ]
    tally.check()

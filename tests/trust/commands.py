"""Start robustsoup's commands as processes that begin within milliseconds, and compare their files.

A server process imports everything once; each command is a fork of it. So a kill can fall on any
moment of the work itself, and hundreds of kills take minutes.
"""

import json
import multiprocessing
import os
import re
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
HANG_SECONDS = 3600
"""Seconds after which a command counts as hanging, however busy the machine is."""
UNLASTING = {"created", "seconds", "files", "digest", "digests"}
"""Keys of JSON files that hold times, or digests of files that hold some."""


def start_process(target, *arguments):
    """Start a function in a fork of the server process, which has everything imported.

    Args:
        target: Function of a module that the server can import.
        arguments: Its arguments.
    """
    CONTEXT.set_forkserver_preload(["preloaded", "reading_costs"])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11 preloads without this sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


class Command:
    """A command that runs in a process of its own.

    Args:
        arguments: The words after `robustsoup`.
        folder: Working folder.
        store: The store.
        before: Function that the process calls first, such as one that breaks its clock.
    """

    def __init__(self, arguments, folder, store, before=None):
        # Not beside the store, whose disk may be full.
        descriptor, name = tempfile.mkstemp(prefix="trust-", suffix=".log")
        os.close(descriptor)
        self.log = Path(name)
        words = [str(word) for word in arguments]
        self.process = start_process(_run, words, str(folder), str(store), str(self.log), before)

    def wait(self, seconds=HANG_SECONDS):
        """Wait for the end; return the exit code, None if the process still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self):
        """Kill the process with SIGKILL."""
        self.process.kill()
        self.process.join()

    def output(self):
        """Return what the command printed, once."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        self.log.unlink()
        return text


def _run(words, folder, store, log, before):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ["ROBUSTSOUP_STORE"] = store
    from preloaded import main, save_after_each_step  # in the process alone

    save_after_each_step()
    if before is not None:
        before()
    main(words)


def run(arguments, folder, store, before=None, seconds=HANG_SECONDS):
    """Run a command to its end; return its exit code and what it printed."""
    command = Command(arguments, folder, store, before)
    code = command.wait(seconds)
    if code is None:
        command.kill()
    return code, command.output()


def lasting_files(folder):
    """Return the content of every file below a folder, by relative path.

    Times and digests of them are left out of JSON files and of the report, and log.txt is left
    out; everything else is the file's bytes.
    """
    return {
        str(path.relative_to(folder)): _lasting_content(path)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "log.txt"
    }


def _lasting_content(path):
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(_without_times(json.loads(content)))
    if path.suffix == ".html":
        return re.sub(rb"\d{4}-\d\d-\d\dT[\d:]+Z|seconds</th><td>[\d.,]+", b"", content)
    return content


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in UNLASTING}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value


def find_differences(found, expected):
    """Return the names of files that differ or that only one of two folders has."""
    names = found.keys() | expected.keys()
    return sorted(name for name in names if found.get(name) != expected.get(name))


def is_one_line(output):
    """Return whether an error is one line without a traceback; progress lines may come before."""
    lines = [line for line in output.splitlines() if line.strip()]
    return "Traceback" not in output and bool(lines) and lines[-1].isprintable()

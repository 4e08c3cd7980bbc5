"""Signals that end a command: held for a while, sent again, ignored where the parent says so."""

import os
import signal
import subprocess
import sys

import pytest

from robustsoup.interruption import exit_code, handled_signals, held_signals, signal_received

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")

SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture(autouse=True)
def _own_handlers():
    """Handle the signals in this process, however the tests were started."""
    numbers = [getattr(signal, name) for name in SIGNALS]
    earlier = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_interrupts_and_gives_its_exit_code(name):
    number = getattr(signal, name)
    with handled_signals(restore=True):
        assert not signal_received()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert signal_received()
        assert exit_code() == SIGNALS[name]
    assert signal.getsignal(number) is signal.default_int_handler


def send_in_held_block(count, reached):
    with held_signals():
        for _ in range(count):
            signal.raise_signal(signal.SIGTERM)
        reached.append(count)


def test_a_signal_waits_for_the_end_of_a_block_and_a_second_one_does_not():
    reached = []
    with handled_signals(restore=True):
        for count in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                send_in_held_block(count, reached)
    assert reached == [1]


def test_a_signal_that_torchrun_passes_on_is_no_second_one(monkeypatch):
    """A scheduler sends it to torchrun and to the processes that torchrun started."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    reached = []
    with handled_signals(restore=True), pytest.raises(KeyboardInterrupt):
        send_in_held_block(2, reached)
    assert reached == [2]


def fail_in_held_block():
    with held_signals():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def test_an_error_in_a_held_block_is_raised_and_the_signal_is_remembered():
    with handled_signals(restore=True):
        with pytest.raises(ZeroDivisionError):
            fail_in_held_block()
        assert signal_received()
    with held_signals():  # a later block, outside of the command that was interrupted
        pass


def test_a_signal_that_the_parent_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handled_signals(restore=True):
        signal.raise_signal(signal.SIGHUP)
        assert not signal_received()


SWALLOWING = """
import signal, time
from robustsoup.interruption import handled_signals

class Swallow:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

with handled_signals(restore=True):
    try:
        Swallow()
        time.sleep(600)  # longer than the time limit of run_script: the signal must end it
    except KeyboardInterrupt:
        print("interrupted")
"""

IMPORTING = """
import signal, sys
from robustsoup.interruption import handled_signals

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            signal.raise_signal(signal.{signal})

sys.meta_path.insert(0, Interrupt())
with handled_signals(restore=True):
    try:
        import torch
    except BaseException:
        print("never reached")
"""


def run_script(script):
    prepare = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", prepare + script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_signal_that_a_destructor_swallowed_is_sent_again():
    done = run_script(SWALLOWING)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


TWICE = """
import signal
from robustsoup import cli
from robustsoup.cli import application

def send(*arguments):
    signal.raise_signal(signal.{first})

def send_while_the_end_is_said():
    cli.{place} = original
    signal.raise_signal(signal.{second})
    return original()

original, cli.{place} = cli.{place}, send_while_the_end_is_said
application.run_command_line = send
cli.main()
"""
AT_SHUTDOWN = """
import atexit, signal, sys
from robustsoup.cli import main

atexit.register(signal.raise_signal, signal.SIGTERM)
sys.argv = ["robustsoup", "--version"]
main()
"""


@pytest.mark.parametrize("place", ["end_at_next_signal", "describe_end", "exit_code"])
@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT")])
def test_a_second_signal_ends_the_command_like_one(place, first, second):
    done = run_script(TWICE.format(place=place, first=first, second=second))
    assert done.returncode in (SIGNALS[first], SIGNALS[second])
    assert len(done.stderr.splitlines()) <= 1
    assert "Traceback" not in done.stderr


def test_a_signal_as_the_process_shuts_down_gives_its_exit_code():
    done = run_script(AT_SHUTDOWN)
    assert (done.returncode, done.stderr) == (SIGNALS["SIGTERM"], "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_amid_an_import_ends_the_process_in_one_line(name):
    done = run_script(IMPORTING.format(signal=name))
    assert done.returncode == SIGNALS[name]
    assert done.stdout == ""
    assert done.stderr.endswith("ed; run the same command again to resume\n")
    assert len(done.stderr.splitlines()) == 1

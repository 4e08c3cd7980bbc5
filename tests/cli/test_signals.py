"""Signals amid the work of each long command: saved, said in one line, and resumed."""

import signal
from importlib import import_module
from pathlib import Path

import pytest
from command_line import FEW, LEARN, LINF, PAIR, RECIPE, SEARCH, run
from web_server import files_below, serving

from robustsoup.checkpoints import formats
from robustsoup.checkpoints.published import Published
from robustsoup.cli.progress import Bar
from robustsoup.progress import SavedState
from robustsoup.soups import mixing

ENDS = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
    signal.SIGHUP: (129, "hung up"),
}
NUMBERS = [
    signal.SIGTERM,
    *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP)),
]
ONE = ("--threads", 1)
SAVE = (SavedState, "due", 3)
"""Amid training, learning and mapping a plane: a method, and which call of it sends the signal."""
CHECK = (import_module("robustsoup.evaluation.evaluate"), "_check_masking", 1)
"""Amid an evaluation, when the attack of the first threat model is over."""
SAVING = {
    "train": (
        SAVE, "train", "--from", "base.safetensors", *LINF, "--epochs", 1, "-o", "t.safetensors"
    ),
    "learn": (SAVE, *LEARN, "--epochs", 1, "-o", "learned"),
    "evaluate": (CHECK, "evaluate", PAIR[0], *LINF, *FEW, "-o", "evaluated"),
    "search": (CHECK, *SEARCH, "--precision", "float32", "-o", "best"),
    "landscape": (
        SAVE, "landscape", "base.safetensors", *PAIR, *LINF, "--points", 2, "--samples", 32,
        "--attack-steps", 1, "-o", "plane",
    ),
    "run": (CHECK, "run", "two.toml", "-o", "two"),
    "demo": (SAVE, "demo", "-o", "quick"),
}  # fmt: skip
"""Commands that save their state, each after the place of the signal."""


@pytest.fixture(autouse=True)
def _handled_signals():
    """Let signals end commands, however the tests were started."""
    earlier = {number: signal.signal(number, signal.default_int_handler) for number in ENDS}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture
def send_at(monkeypatch):
    """A function that lets the n-th call of a method send a signal to this process."""

    def patch(owner, name, number, count):
        original, calls = getattr(owner, name), []

        def call_and_send(*arguments, **options):
            calls.append(name)
            if len(calls) == count:
                signal.raise_signal(number)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call_and_send)

    return patch


def check_end(number, code, error):
    """Check the exit code, and that the last line alone says what happened."""
    expected, verb = ENDS[number]
    assert code == expected, error
    lines = [line for line in error.splitlines() if line.startswith("robustsoup: ")]
    assert lines[-1] == error.splitlines()[-1]
    assert lines[-1] == f"robustsoup: {verb}; run the same command again to resume"
    assert "Traceback" not in error


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", SAVING)
def test_a_signal_saves_the_work_and_the_same_command_resumes(
    here, tmp_path, capsys, monkeypatch, send_at, name, number
):
    Path("two.toml").write_text(RECIPE, encoding="utf-8")
    (owner, method, count), *command = SAVING[name]
    send_at(owner, method, number, count)
    check_end(number, run(*command, *ONE), capsys.readouterr().err)
    states = [*here.rglob("*state.pt"), *(tmp_path / "store").rglob("*.pt")]
    assert len(states) == 1
    if name == "demo":
        return  # too long to finish; `run` shows the same
    load, loaded = SavedState.load, []

    def load_and_note(saved):
        state = load(saved)
        loaded.extend([saved.path.name] if state else [])
        return state

    monkeypatch.setattr(SavedState, "load", load_and_note)
    assert run(*command, *ONE) == 0, capsys.readouterr().err
    assert loaded == [states[0].name]
    assert not states[0].exists()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", [(mixing, "canonical_sum", 5), (formats, "write_safetensors", 1)])
def test_a_signal_amid_mixing_leaves_no_file(here, capsys, send_at, place, number):
    """The tensors stay in the files of the ingredients; the signal falls on sums and on writing."""
    before = files_below(here)
    send_at(*place[:2], number, place[2])
    command = ("mix", *PAIR, "-o", "soup.safetensors", *ONE)
    check_end(number, run(*command), capsys.readouterr().err)
    assert files_below(here) == before
    assert run(*command) == 0


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_amid_a_download_leaves_no_file(here, capsys, monkeypatch, send_at, number):
    name = "Wang2023Better_WRN-28-10"
    send_at(Bar, "__call__", number, 1)
    with serving(Path("low.pth").read_bytes()) as (url, _):
        monkeypatch.setattr(Published, "url", url)
        code = run("fetch", f"robustbench:{name}", "--data-root", "downloads")
    check_end(number, code, capsys.readouterr().err)
    assert files_below(here / "downloads") == []

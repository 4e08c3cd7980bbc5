"""What commands print: names cannot control the terminal, and each error is one line."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from command_line import LINF, run

from robustsoup.cli import application
from robustsoup.cli.progress import Bar
from robustsoup.cli.terminal import print_error, print_json, print_line, print_table
from robustsoup.cli.terminal import print_warning as warn

HOSTILE = "a\x1b[31mred\x1b]0;owned\x07\x7f\x9b2J\u202e\u200d\u2028\nb[bold]c[/bold][link=x]:boom:"
SHOWN = r"a\x1b[31mred\x1b]0;owned\x07\x7f\x9b2J\u202e\u200d\u2028\nb[bold]c[/bold][link=x]:boom:"

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX systems")


def is_plain(text):
    return text.replace("\n", "").isprintable()


@pytest.mark.parametrize("show", [print_line, print_error, warn])
def test_a_line_stays_one_line_of_plain_text(capsys, show):
    show(HOSTILE)
    shown = "".join(capsys.readouterr())
    assert shown.endswith(f"{SHOWN}\n")
    assert len(shown.splitlines()) == 1


def test_cells_titles_and_headers_of_a_table_are_plain_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    print_table((HOSTILE, "x"), [(HOSTILE, "1"), ("b", HOSTILE)], title=HOSTILE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(SHOWN in line and line.isprintable() for line in lines)


def test_json_holds_every_character_and_prints_none_of_them(capsys):
    print_json({HOSTILE: [HOSTILE]})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {HOSTILE: [HOSTILE]}
    assert is_plain(shown)


def test_a_progress_bar_shows_plain_text(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    with Bar(HOSTILE) as bar:
        bar(1, 2, HOSTILE)
    assert bar.figures == SHOWN
    assert bar.display.tasks[0].description == SHOWN


@pytest.mark.skipif(os.name != "posix", reason="names with control characters")
def test_hostile_files_are_named_in_one_plain_line(here, capsys):
    name = HOSTILE.replace("/", "")
    Path("low.safetensors").rename(name + ".safetensors")
    missing = b"\xff\x1b[2J".decode("utf-8", "surrogateescape")
    for command in (
        ("check", name + ".safetensors", "wide.safetensors"),
        ("check", name + ".safetensors", "high.safetensors"),
        ("check", missing, "high.safetensors"),
        ("evaluate", missing, *LINF),
        ("mix", missing, "high.safetensors", "-o", "x.safetensors"),
        ("compare", missing, missing),
        ("plan", missing),
        ("report", missing),
        ("mix", "base.safetensors", "high.safetensors", "-o", missing),
        (missing,),
        ("mix", f"--{missing}"),
        ("train", *LINF, "--model", HOSTILE, "-o", "x.safetensors"),
    ):
        code = run(*command)
        shown = capsys.readouterr()
        assert code in (0, 1, 2, 3), command
        assert is_plain(shown.out + shown.err), command
        if code in (1, 2):
            assert len(shown.err.splitlines()) == 1, (command, shown.err)


def test_a_warning_of_a_library_is_one_plain_line(monkeypatch, capsys):
    monkeypatch.setattr(application, "app", lambda **_: warnings.warn(HOSTILE, stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("doctor") == 0
    assert capsys.readouterr().err == f"robustsoup: warning: {SHOWN}\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TypeError(HOSTILE), r"unexpected TypeError in test_terminal.py, line \d+: a.x1b"),
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied", "a\nb"), r"a\\nb: Permission denied$"),
        (EOFError(), "unexpected EOFError"),
        (RecursionError("deep"), "unexpected RecursionError"),
    ],
)
def test_an_unexpected_error_is_one_line_and_debug_raises_it(monkeypatch, capsys, error, message):
    def fail(**_):
        raise error

    monkeypatch.setattr(application, "app", fail)
    assert run("doctor") == 1
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert is_plain(shown)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(shown.removeprefix("robustsoup: ").strip())
    with pytest.raises(type(error)):
        application.run_command_line(["doctor", "--debug"])


def test_an_input_that_ends_at_a_question_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(application, "app", lambda **_: typer.confirm("Send?", err=True))
    assert run("push") == 2
    question, error = capsys.readouterr().err.splitlines()
    assert question.startswith("Send?")
    assert error == "robustsoup: the input ended without an answer; --yes asks nothing"


@pytest.mark.parametrize("show", [print_line, lambda name: print_table(("name",), [(name,)])])
def test_a_name_that_the_output_cannot_encode_is_escaped(monkeypatch, show):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(application, "app", lambda **_: show("\u0441\u0443\u043f"))
    assert run("show") == 0
    output.flush()
    assert rb"\u0441\u0443\u043f" in output.buffer.getvalue()


def start_help(stdout):
    return subprocess.Popen(
        [sys.executable, "-m", "robustsoup", "--help"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@posix
def test_a_closed_pipe_ends_a_command_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    process = start_help(writer)
    os.close(writer)
    assert process.communicate()[1] == ""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with Path("/dev/full").open("w") as full:
        process = start_help(full)
        error = process.communicate()[1]
    assert error == "robustsoup: the output cannot be written: No space left on device\n"
    assert process.returncode == 1

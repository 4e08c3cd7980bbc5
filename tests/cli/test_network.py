"""The network is used where a command was asked to fetch, and nowhere else.

That the other commands use none is asserted by tests/cli/test_examples.py, whose examples cover
every command.
"""

import socket

import pytest
from command_line import run
from network_watch import refused_network

import robustsoup as rs


def test_the_watch_notices_what_a_program_swallows():
    with refused_network() as attempts, pytest.raises(OSError, match=r"socket\.getaddrinfo"):
        socket.create_connection(("example.invalid", 443), timeout=1)
    assert len(attempts) == 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link, refused_network() as attempts:
        for act in (
            lambda: link.sendto(b"", ("127.0.0.1", 9)),
            lambda: link.connect(("127.0.0.1", 9)),
            lambda: link.connect_ex(("127.0.0.1", 9)),
        ):
            with pytest.raises(OSError, match=r"socket\."):
                act()
    assert len(attempts) == 3


@pytest.mark.parametrize("name", ["cifar10", "robustbench:Wang2023Better_WRN-28-10"])
def test_fetch_asks_the_network_once(name, tmp_path, capsys):
    with refused_network() as attempts:
        assert run("fetch", name, "--data-root", tmp_path) == 1
    assert len(attempts) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_cifar10_is_fetched_when_a_command_names_it(tmp_path, capsys):
    arguments = ("--model", "resnet9:width=2", "--data", "cifar10", "--data-root", tmp_path)
    with refused_network() as attempts:
        assert run("train", *arguments, "--threat", "clean", "-o", tmp_path / "a.safetensors") != 0
    assert len(attempts) == 1
    assert "cannot be downloaded" in capsys.readouterr().err


def test_loading_a_file_never_asks_the_network(trained_files):
    with refused_network() as attempts:
        checkpoint = rs.Checkpoint.load(trained_files / "base.safetensors")
        checkpoint.network()
        rs.Checkpoint.load(trained_files / "low.pth")
        rs.load_data("digits")
    assert not attempts

"""Run a function in several processes that form one group, as torchrun starts them.

The function and its arguments are pickled, so the function belongs to a module of `tests/`, not to
a test file. One server process imports the package once and forks the ranks.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from robustsoup import distributed
from robustsoup.cli import main

PRELOADED = [
    "ranks",
    "torch._dynamo",
    "robustsoup.evaluation.evaluate",
    "robustsoup.soups.learning",
]
SECONDS = 300


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what function(*arguments) returns in each rank; an exception that it raises too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables |= {"WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    work = pickle.dumps((function, arguments))
    ranks = []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_run_rank, args=(own, work, sender))
        process.start()
        sender.close()
        ranks.append((process, receiver))
    try:
        return [_receive(receiver) for _, receiver in ranks]
    finally:
        for process, _ in ranks:
            process.join(5)
            process.kill()


def _receive(receiver: Connection) -> Any:
    assert receiver.poll(SECONDS), "a rank does not answer"
    return pickle.loads(receiver.recv_bytes())


def _run_rank(variables: dict[str, str], work: bytes, sender: Connection) -> None:
    os.environ.update(variables)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        function, arguments = pickle.loads(work)
        if not getattr(function, "joins", False):
            distributed.start()
        result = function(*arguments)
    except BaseException as error:
        result = error
    sender.send_bytes(pickle.dumps(result))


def run_command(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this rank; return its exit code, its output and its messages."""
    output, messages = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(messages):
        try:
            main(list(arguments))
        except SystemExit as end:
            return end.code, output.getvalue(), messages.getvalue()
    raise AssertionError("main returns by SystemExit")


run_command.joins = True  # the command line joins the group itself

"""Lanes: CPU threads that each take whole passes, one core a lane.

A pass over a few dozen images keeps one core busy from its own cache; a pass that is spread over the cores waits for
the slowest one at every layer. And a pass on one core gives the same bits whatever the number of threads.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

import torch


def lane_count(device: torch.device) -> int:
    """How many lanes there are: as many as PyTorch has threads on a CPU, else one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def in_lanes(
    tasks: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    poll: Callable[[], None] | None = None,
    stop: Callable[[], None] | None = None,
) -> list[Any]:
    """Call every task, as many at a time as there are lanes, and return their results in order.

    poll is called in this thread several times a second meanwhile. If it, a task or Ctrl-C raises, `stop` is called once
    (it should make the tasks return soon), and the error is raised when all of them have ended.
    """
    threads = torch.get_num_threads()
    pool = _pool(os.getpid(), lane_count(device))
    futures = [pool.submit(task) for task in tasks]
    try:
        _await(futures, poll)
    except BaseException:
        if stop:
            stop()
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    finally:
        torch.set_num_threads(threads)  # the lanes' own setting also became that of threads to come
    return [future.result() for future in futures]


def _await(futures: Sequence[Future], poll: Callable[[], None] | None) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.1 if poll else None, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if poll:
            poll()


@lru_cache(maxsize=4)
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """One pool for each process (threads do not survive a fork) and number of lanes."""
    return ThreadPoolExecutor(count, "lane", initializer=torch.set_num_threads, initargs=(1,))

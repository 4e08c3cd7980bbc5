"""Lanes: CPU threads that each run whole forward and backward passes on one core.

A pass over a few dozen images keeps one core busy from its own cache. A pass that is split over
all cores waits for the slowest core at every layer. A pass on one core also gives the same bits
for any number of threads.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from typing import TypeVar

import torch

T = TypeVar("T")
KEPT_BYTES = 256 << 20
"""Most freed memory that a process keeps for its next pass."""
LARGEST_BLOCK = 32 << 20
"""Largest tensor whose memory is kept; glibc allows no more."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def lane_count(device: torch.device) -> int:
    """Return the number of lanes: PyTorch's number of threads on a CPU, else 1."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def run_in_lanes(
    tasks: Sequence[Callable[[], T]],
    device: torch.device,
    *,
    poll: Callable[[], None] | None = None,
    stop: Callable[[], None] | None = None,
) -> list[T]:
    """Run every task, as many at a time as there are lanes.

    Tasks on a GPU use the stream that is current for the caller, so they run after the work
    that the caller launched before. Tasks do not inherit the caller's autocast or gradient mode.

    Args:
        tasks: Functions without arguments.
        device: Device that the tasks compute on.
        poll: Called in the caller's thread several times a second until all tasks have ended.
        stop: Called once if a task or `poll` raises, or on Ctrl-C; it should make the running
            tasks return soon. The error is raised after all tasks have ended.

    Returns:
        The results, in the order of the tasks.
    """
    threads = torch.get_num_threads()
    pool = _thread_pool(os.getpid(), lane_count(device))
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    futures = [pool.submit(partial(_run_on_stream, task, stream)) for task in tasks]
    try:
        _await_futures(futures, poll)
    except BaseException:
        if stop:
            stop()
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    finally:
        # Each lane limits itself to one thread, which also lowers the default of later threads.
        torch.set_num_threads(threads)
    return [future.result() for future in futures]


def _run_on_stream(task: Callable[[], T], stream: torch.cuda.Stream | None) -> T:
    # torch.cuda.stream also selects the stream's device.
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        return task()


def _await_futures(futures: Sequence[Future[T]], poll: Callable[[], None] | None) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.1 if poll else None, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if poll:
            poll()


@lru_cache(maxsize=4)
def _thread_pool(_process: int, lanes: int) -> ThreadPoolExecutor:
    """Return the thread pool of a process; a fork needs a new one, as threads do not survive."""
    keep_freed_memory()
    return ThreadPoolExecutor(lanes, "lane", initializer=torch.set_num_threads, initargs=(1,))


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Let glibc keep the memory of a pass for the next one, and return whether it does.

    By default glibc returns freed memory to the kernel after every pass, which then clears each
    page again: 5 to 20 % of a pass in float32. Other C libraries and allocators are left alone, and
    so is glibc where the user has set it up.
    """
    settings = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in settings):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    )

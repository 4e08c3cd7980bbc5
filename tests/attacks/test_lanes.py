"""Lanes: results keep their order, errors come out, and the number of threads is restored."""

import platform
import threading

import pytest
import torch
from torch import nn

from robustsoup.attacks import apgd
from robustsoup.attacks.lanes import keep_freed_memory, lane_count, run_in_lanes
from robustsoup.errors import ModelError

CPU = torch.device("cpu")


@pytest.fixture
def set_threads():
    """Sets PyTorch's number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_tasks(set_threads):
    set_threads(2)
    second_ran = threading.Event()

    def wait_for_the_second():
        assert second_ran.wait(60)
        return 1

    def run_second():
        second_ran.set()
        return 2

    assert lane_count(CPU) == 2
    assert run_in_lanes([wait_for_the_second, run_second], CPU) == [1, 2]


def test_poll_is_called_in_the_callers_thread_until_the_tasks_end(set_threads):
    set_threads(1)
    polled = threading.Event()
    threads = set()

    def poll():
        threads.add(threading.get_ident())
        polled.set()

    assert run_in_lanes([lambda: polled.wait(60)], CPU, poll=poll) == [True]
    assert threads == {threading.get_ident()}


def test_an_error_stops_the_other_tasks_and_is_raised_once_they_have_ended(set_threads):
    set_threads(2)
    stopped, ended = threading.Event(), threading.Event()

    def run_until_stopped():
        assert stopped.wait(60)
        ended.set()

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_in_lanes([run_until_stopped, fail], CPU, stop=stopped.set)
    assert ended.is_set()
    assert torch.get_num_threads() == 2


def test_later_threads_have_as_many_pytorch_threads_as_before(set_threads):
    """A lane limits itself to one thread, which PyTorch would pass on to every later thread."""
    set_threads(3)
    assert run_in_lanes([torch.get_num_threads] * 3, CPU) == [1, 1, 1]
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]
    assert torch.get_num_threads() == 3


def test_an_error_of_the_network_comes_out_of_an_attack(set_threads):
    set_threads(2)

    class Fails(nn.Module):
        def forward(self, x):
            if x.requires_grad:
                raise ZeroDivisionError
            return x.flatten(1)

    x = torch.rand(100, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="ZeroDivisionError") as caught:
        apgd(Fails(), x, x.flatten(1).argmax(1), "Linf 0.1")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert torch.get_num_threads() == 2


def test_freed_memory_is_kept_unless_the_user_has_set_up_the_allocator(monkeypatch):
    keep_freed_memory.cache_clear()
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    keep_freed_memory.cache_clear()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")
    assert not keep_freed_memory()
    keep_freed_memory.cache_clear()

"""The decision whether a recorded step can replace the step; recording requires a GPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from robustsoup.attacks import cuda_graph
from robustsoup.attacks.cuda_graph import freezes_randomness
from robustsoup.attacks.forward import call_network

A, B = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
NAN = torch.tensor([1.0, torch.nan])


@pytest.mark.parametrize(
    ("called", "replayed", "frozen"),
    [
        ([A, A], [A, A], False),  # deterministic
        ([A, B], [A, A], True),  # random on the host
        ([A, B], [A, B], False),  # random on the device
        ([NAN, NAN], [NAN, NAN], False),  # NaN equals nothing
    ],
)
def test_only_randomness_of_the_host_is_frozen(called, replayed, frozen):
    assert freezes_randomness(called, replayed) == frozen


def test_a_network_that_cannot_be_captured_is_called_instead(monkeypatch):
    def wait_for_device(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda _: None)
    device = SimpleNamespace(
        CUDAGraph=object,
        current_device=lambda: 0,
        current_stream=lambda: None,
        default_generators=[generator],
        graph=lambda *_, **__: contextlib.nullcontext(),
        set_stream=lambda _: None,
    )
    monkeypatch.setattr(cuda_graph, "torch", SimpleNamespace(cuda=device))
    assert cuda_graph._record_graph(lambda: call_network(wait_for_device, A), None) is None

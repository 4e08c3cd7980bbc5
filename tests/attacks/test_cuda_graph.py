"""The decision whether a recorded step can replace the step; recording requires a GPU."""

import pytest
import torch

from robustsoup.attacks.cuda_graph import freezes_randomness

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

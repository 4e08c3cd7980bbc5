"""Fixtures of the tests that evaluate: a small network, samples and their evaluations."""

from dataclasses import replace

import pytest
import torch
from digits import digits_network
from evaluated_networks import L1, L2, LINF, WRONG, Counted, N

from robustsoup.data import load_data
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model


@pytest.fixture(scope="session")
def model():
    """A small network after a few training steps on digits."""
    return digits_network(4).requires_grad_(True)


@pytest.fixture(scope="session")
def data(model):
    """Samples with the network's predictions as labels, except WRONG samples with other labels."""
    split = load_data("digits").test.first(N)
    labels = evaluate(model, split).prediction.clone()
    labels[:WRONG] = (labels[:WRONG] + 1) % 10
    return replace(split, labels=labels)


@pytest.fixture(scope="session")
def evaluation(model, data):
    return evaluate(model, data, [LINF, L2, L1], steps=5, seed=3)


@pytest.fixture(scope="session")
def with_points(model, data):
    """The evaluation of `evaluation`, with its adversarial points."""
    return evaluate(model, data, [LINF, L2, L1], steps=5, seed=3, keep_points=True)


@pytest.fixture(scope="session")
def neighbour(model):
    """A second network, close to the first."""
    network = load_model("resnet9:width=4", channels=1)
    network.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor += 0.1 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)
    return network.eval()


@pytest.fixture
def passes():
    """The passes of `Counted` networks, with (True) and without (False) a gradient."""
    Counted.reset()
    yield Counted.passes
    Counted.reset()

"""A forgotten or doubled normalisation is found; outputs that are probabilities are noticed."""

import pytest
import torch
from torch import nn

from robustsoup.data import Split, load_data
from robustsoup.evaluation.doubts import warn_of_outputs
from robustsoup.evaluation.evaluate import doubt_network, evaluate
from robustsoup.evaluation.normalization import find_better_inputs
from robustsoup.models import NetworkSettings
from robustsoup.models.normalize import normalize_inputs


class Stripes(nn.Module):
    """Reads the class off the mean of normalized images, in steps of 0.5 around 0."""

    def forward(self, x):
        centres = torch.arange(-1.5, 2.0, 0.5)
        return -(x.mean((1, 2, 3)).view(-1, 1) - centres).abs()


def stripes():
    """Return images of which Stripes gets all right after (x - 0.5) / 0.5 alone."""
    labels = torch.arange(7).repeat(20)[torch.randperm(140, generator=torch.manual_seed(0))]
    labels = labels.clamp(1, 5)
    levels = ((torch.arange(-1.5, 2.0, 0.5) * 0.5 + 0.5) * 255).clamp(0, 255).to(torch.uint8)
    images = levels[labels].view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    record = {"name": "made", "split_digest": "made", "classes": [str(c) for c in range(7)]}
    return Split(images, labels, torch.arange(140), "val", record)


def test_a_forgotten_normalization_is_named():
    hint = find_better_inputs(Stripes(), stripes(), NetworkSettings("x"))
    assert hint is not None
    assert "100.0 % with --normalize 0." in hint


def test_a_doubled_normalization_is_named():
    class Inside(Stripes):
        def forward(self, x):
            return super().forward((x - 0.5) / 0.5)

    doubled = normalize_inputs(Inside(), [0.5], [0.5])
    settings = NetworkSettings("x", normalize=((0.5,), (0.5,)))
    hint = find_better_inputs(doubled, stripes(), settings)
    assert hint is not None
    assert "100.0 % without --normalize" in hint


@pytest.mark.parametrize("threats", [[], ["Linf 1/255"]])
def test_evaluate_warns_of_a_forgotten_normalization(threats):
    evaluation = evaluate(Stripes(), stripes(), threats, steps=1, masking_check=False)
    assert "100.0 % with --normalize 0." in evaluation.warnings[0]
    again = evaluate(Stripes(), stripes(), threats, steps=1, masking_check=False, after=evaluation)
    assert sorted(again.warnings) == sorted(evaluation.warnings)
    few = evaluate(Stripes(), stripes().first(40), threats, steps=1, masking_check=False)
    assert not any("--normalize" in warning for warning in few.warnings)


def test_networks_that_were_never_trained_get_no_hint():
    data = load_data("digits").test
    for seed in range(20):
        torch.manual_seed(seed)
        untrained = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        assert find_better_inputs(untrained, data, NetworkSettings("x")) is None


def test_a_good_network_is_called_once_for_the_hint():
    calls = []

    class Right(Stripes):
        def forward(self, x):
            calls.append(len(x))
            return super().forward((x - 0.5) / 0.5)

    assert find_better_inputs(Right(), stripes(), NetworkSettings("x")) is None
    assert sum(calls) == 140


def test_a_right_normalization_is_not_doubted():
    right = normalize_inputs(Stripes(), [0.5], [0.5])
    settings = NetworkSettings("x", normalize=((0.5,), (0.5,)))
    assert find_better_inputs(right, stripes(), settings) is None
    assert doubt_network(right, stripes()) is None


def test_a_collapsed_network_is_doubted_without_blaming_the_normalization():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 7).cumsum(1)

    doubt = doubt_network(Constant(), stripes())
    assert doubt is not None
    assert doubt.near_chance
    assert "no usual --normalize helps" in doubt.text
    assert "collapsed soup" in doubt.text


@pytest.mark.parametrize(
    ("outputs", "word"),
    [
        (torch.randn(30, 5).sigmoid(), "sigmoid"),
        (torch.randn(30, 5).softmax(1), "sum to 1"),
        (torch.randn(30, 5) * 5, None),
    ],
)
def test_probabilities_are_noticed(outputs, word):
    warnings = warn_of_outputs(outputs, None)
    assert [word in text for text in warnings] == ([] if word is None else [True])

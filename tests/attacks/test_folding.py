"""BatchNorm folding: the copy is the same function; layers that cannot be folded stay."""

import pytest
import torch
from digits import digits_network
from torch import nn
from torch.nn import functional

from robustsoup.attacks.folding import fold_batchnorm


class ConvNet(nn.Module):
    """Two times convolution, BatchNorm and ReLU, then a linear layer; no statistic is trivial."""

    def __init__(self, seed=0, track_running_stats=True):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4, track_running_stats=track_running_stats)
        self.norm2 = nn.BatchNorm2d(4, track_running_stats=track_running_stats)
        self.head = nn.Linear(4 * 36, 3)
        generator = torch.Generator().manual_seed(seed)
        for norm in (self.norm1, self.norm2):
            for tensor in (*norm.parameters(), *norm.buffers()):
                if tensor.is_floating_point():
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        return self.head(self.norm2(self.second(x)).relu().flatten(1))


class FunctionBetween(ConvNet):
    """A plain function stands between convolution and BatchNorm."""

    def forward(self, x):
        x = self.norm1(self.first(x) * 2 + 1).relu()
        return self.head(self.norm2(functional.relu(self.second(x))).relu().flatten(1))


class SecondReader(ConvNet):
    """A plain function reads the output of each convolution beside its BatchNorm."""

    def forward(self, x):
        x = self.first(x)
        x = self.norm1(x).relu() + x
        second = self.second(x)
        return self.head((self.norm2(second) - second.mean()).relu().flatten(1))


class InPlace(ConvNet):
    """The output of each convolution is changed in place before its BatchNorm reads it."""

    def forward(self, x):
        x = self.norm1(self.first(x).relu_()).relu()
        return self.head(self.norm2(self.second(x).mul_(3)).relu().flatten(1))


class PreActivation(ConvNet):
    """Each BatchNorm precedes its convolution."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(1)

    def forward(self, x):
        x = self.first(self.norm1(x).relu())
        return self.head(self.second(self.norm2(x.relu()).relu()).flatten(1))


class CalledTwice(ConvNet):
    """One BatchNorm follows two convolutions, and one convolution precedes two BatchNorms."""

    def __init__(self):
        super().__init__()
        self.norm3 = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        x = self.norm1(self.second(x)).relu()
        return self.head(self.norm3(self.second(x)).relu().flatten(1))


class OneOfTwo(ConvNet):
    """Only the first BatchNorm can be folded."""

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        return self.head(self.norm2(self.second(x) + x).relu().flatten(1))


def images(n=8):
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(9))


def count_batchnorms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def check_unchanged(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def copy_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_batchnorm_after_a_convolution_is_folded():
    model = ConvNet().eval()
    before = copy_state(model)
    copied = fold_batchnorm(model, images())
    assert copied is not model
    assert (count_batchnorms(copied), count_batchnorms(model)) == (0, 2)
    check_unchanged(model, before)
    shared = {id(tensor) for tensor in copied.parameters()} & set(map(id, model.parameters()))
    assert not shared
    assert not any(module._forward_hooks for module in copied.modules())
    x = images(50)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_resnet_is_folded_through_its_shortcuts():
    model = digits_network(4)
    x = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    copied = fold_batchnorm(model, x[:16])
    assert (count_batchnorms(copied), count_batchnorms(model)) == (0, 8)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "network",
    [
        FunctionBetween,
        SecondReader,
        InPlace,
        PreActivation,
        CalledTwice,
        lambda: ConvNet(track_running_stats=False),
    ],
    ids=["function between", "second reader", "in place", "pre-activation", "called twice", "none"],
)
def test_a_network_that_cannot_be_folded_is_returned(network):
    model = network().eval()
    before = copy_state(model)
    assert fold_batchnorm(model, images()) is model
    check_unchanged(model, before)


def test_one_pair_is_folded_where_another_cannot_be():
    model = OneOfTwo().eval()
    copied = fold_batchnorm(model, images())
    assert isinstance(copied.norm1, nn.Identity)
    assert isinstance(copied.norm2, nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(copied(images(50)), model(images(50)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [ConvNet, OneOfTwo])
@pytest.mark.parametrize("wrap", [lambda logits: (logits, 0), lambda logits: {"logits": logits}])
def test_a_network_that_returns_a_tuple_or_a_dict_is_folded(network, wrap):
    model = network().eval()
    expected = count_batchnorms(fold_batchnorm(model, images()))
    model.register_forward_hook(lambda _module, _inputs, logits: wrap(logits))
    copied = fold_batchnorm(model, images())
    assert count_batchnorms(copied) == expected
    assert type(copied(images())) is type(wrap(0))

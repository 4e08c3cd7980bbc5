"""Networks that return more than logits, refuse a memory format or cannot be copied as they are."""

import copy
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import robustsoup as rs
from robustsoup.attacks import run_attack
from robustsoup.attacks.adaptation import adapt_network, check_train_mode, copy_network
from robustsoup.attacks.forward import as_logits, choose_logits
from robustsoup.errors import DataError, ModelError
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

LINF = ThreatModel("Linf", 0.1)


class Output(NamedTuple):
    """What some networks return."""

    logits: torch.Tensor
    aux: object


class Plain(nn.Module):
    """A small network with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6 * 16, 10)

    def features(self, x):
        return nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)

    def forward(self, x):
        return self.linear(self.features(x).flatten(1))


class Views(Plain):
    """Calls view on a feature map, which the channels-last format does not allow."""

    def forward(self, x):
        return self.linear(self.features(x).view(len(x), -1))


class InPlace(Plain):
    def forward(self, x):
        x -= 0.5
        return super().forward(x)


class Wrapped(Plain):
    """Returns what `wrap` makes of the logits."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


class Keeps(Plain):
    """Keeps an activation, its history included, in a list on itself."""

    def forward(self, x):
        self.kept = [self.features(x)]
        return self.linear(self.kept[0].flatten(1))


class WeightNorm(Plain):
    def __init__(self):
        super().__init__()
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(self.linear)


class SpectralNorm(Plain):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.linear)


class Fails(nn.Module):
    """Fails as user code fails."""

    def __init__(self, error):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(1)), error

    def forward(self, x):
        raise self.error


WRAPS = {
    "tuple": lambda z: (z, z.sum()),
    "loss first": lambda z: (z.sum(), z),
    "nested": lambda z: ((z, 1), 2),
    "list": lambda z: [z],
    "dict": lambda z: {"features": 0, "logits": z},
    "single entry": lambda z: {"out": z},
    "named tuple": lambda z: Output(z, None),
    "ordered dict": lambda z: OrderedDict(logits=z, loss=None),
}
DATA = rs.load_data("digits")
FEW = DATA.test.first(24)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand((6, 1, 8, 8), generator=generator)


def same_weights(network, of):
    network.load_state_dict(of.state_dict())
    return network.eval()


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Plain().eval()


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_logits_are_found_in_what_a_network_returns(plain, images, wrap):
    network = same_weights(Wrapped(wrap), plain)
    y = plain(images).argmax(1)
    settings = AttackSettings(steps=3)
    expected = run_attack(plain, images, y, LINF, settings)
    assert torch.equal(run_attack(network, images, y, LINF, settings).x_adv, expected.x_adv)
    adapt_network(network, images)
    torch.testing.assert_close(network(images), plain(images))


def features_first(z):
    return z.repeat(1, 3), z, z.sum()


def test_logits_after_features_are_told_by_the_number_of_classes(plain):
    network = same_weights(Wrapped(features_first), plain)
    expected, got = (rs.evaluate(m, FEW, ["Linf 8/255"], steps=2) for m in (plain, network))
    assert got.accuracy == expected.accuracy
    assert torch.equal(got.prediction, expected.prediction)
    items = [rs.Checkpoint.of(network)] * 2
    adversarial = {"buffers": "recalibrate-adversarial", "threat": LINF, "calibrate_on": FEW}
    soups = [rs.mix(items, [0.5, 0.5], network=m, **adversarial) for m in (plain, network)]
    assert soups[0].digest == soups[1].digest


def test_logits_beside_features_require_the_number_of_classes(plain):
    network = same_weights(Wrapped(features_first), plain)
    x, y = FEW.images, FEW.labels.clamp(max=8)
    with pytest.raises(ModelError, match=r"of 30, 10 columns, .* inferred .*; give classes, as in"):
        rs.evaluate(network, (x, y), [])
    stated = rs.Split.from_tensors(x, y, classes=10)
    assert torch.equal(rs.evaluate(network, stated, []).prediction, plain(x / 255).argmax(1))


@pytest.mark.parametrize(
    ("widths", "chosen"), [((10, 10, 30), 0), ((30, 10), 1), ((10, 30), 0), ((30, 10, 10), 0)]
)
def test_the_first_output_is_taken_unless_another_alone_fits(widths, chosen):
    output = tuple(torch.zeros(2, width) for width in widths)
    assert choose_logits(output, 10, inferred=False) is output[chosen]
    assert as_logits(output) is output[0]


@pytest.mark.parametrize(
    ("widths", "chosen"), [((10, 1), 0), ((1, 12), 1), ((30, 10), 1), ((10, 30), 0), ((4, 12), 1)]
)
def test_labels_tell_the_least_number_of_logits(widths, chosen):
    output = tuple(torch.zeros(2, width) for width in widths)
    assert choose_logits(output, 10, inferred=True) is output[chosen]


def test_logits_that_are_named_are_taken():
    output = Output(torch.zeros(2, 10), torch.zeros(2, 30))
    assert choose_logits(output, 30, inferred=True) is output.logits


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_every_function_takes_networks_that_return_more_than_logits(plain, wrap):
    network = same_weights(Wrapped(wrap), plain)
    short = {"steps": 2}
    expected, got = (rs.evaluate(m, FEW, ["Linf 8/255"], **short) for m in (plain, network))
    assert got.accuracy == expected.accuracy
    trained = rs.train(network, DATA.train.first(64), threat="Linf 8/255", epochs=1, lr=0.01)
    again = rs.train(plain, DATA.train.first(64), threat="Linf 8/255", epochs=1, lr=0.01)
    assert all(torch.equal(trained.tensors[k], again.tensors[k]) for k in again.tensors)


@pytest.mark.parametrize(
    "output", [{"a": torch.ones(1), "b": torch.ones(1)}, None, "text", (), ({}, 1), {"logits": 3}]
)
def test_other_outputs_are_refused_in_one_line(plain, images, output):
    with pytest.raises(ModelError, match=r"expected \(b, classes\) logits") as caught:
        as_logits(output)
    assert "\n" not in str(caught.value)
    network = Wrapped(lambda _: output)
    with pytest.raises(ModelError, match="logits"):
        rs.evaluate(network, FEW, ["Linf 8/255"], steps=1)
    with pytest.raises(ModelError, match="logits"):
        rs.apgd(network, images, torch.zeros(6, dtype=torch.long), LINF, steps=1)


def test_networks_that_view_run_in_the_contiguous_format(plain, images):
    network = same_weights(Views(), plain)
    channels_last = images.repeat(1, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    adapt_network(network, images)
    torch.testing.assert_close(network(channels_last), plain(images))
    hooks = len(network._forward_pre_hooks), len(network._forward_hooks)
    adapt_network(network, images)
    assert (len(network._forward_pre_hooks), len(network._forward_hooks)) == hooks
    copied = copy_network(network)
    torch.testing.assert_close(copied(channels_last), plain(images))


def test_networks_that_read_memory_in_order_run_in_the_contiguous_format(plain, images):
    class Strides(Plain):
        def forward(self, x):
            features = self.features(x)
            return self.linear(torch.as_strided(features, (len(x), 6 * 16), (6 * 16, 1)))

    network = same_weights(Strides(), plain)
    torch.testing.assert_close(adapt_network(network, images), plain(images).detach())
    channels_last = images.repeat(1, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(channels_last), plain(images))


@pytest.mark.parametrize("noise", [0, 1])
def test_networks_run_in_the_channels_last_format(plain, images, noise):
    class Noisy(Plain):
        def forward(self, x):
            return super().forward(x + noise * torch.randn(x.shape))

    network = same_weights(Noisy(), plain)
    adapt_network(network, images)
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not network._forward_pre_hooks


def test_networks_that_view_in_train_mode_alone_are_trained_in_the_contiguous_format(images):
    class ViewsInTraining(Views):
        def forward(self, x):
            return super().forward(x) if self.training else Plain.forward(self, x)

    network = ViewsInTraining()
    adapt_network(network, images)
    check_train_mode(network, images)
    network.train()(images.contiguous(memory_format=torch.channels_last)).sum().backward()


def test_networks_with_three_dimensional_convolutions_are_adapted(images):
    network = nn.Sequential(
        nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, 1), nn.Flatten(), nn.Linear(128, 10)
    )
    expected = network(images)
    torch.testing.assert_close(adapt_network(network, images), expected.detach())


@pytest.mark.parametrize("kind", [Views, InPlace, Keeps, WeightNorm, SpectralNorm])
def test_every_function_takes_unusual_networks(kind):
    torch.manual_seed(0)
    network = kind()
    if kind is Keeps:
        network(DATA.train.images[:2].float() / 255)
    few = {"threat": "Linf 8/255", "epochs": 1, "lr": 0.01}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ingredients = [rs.train(network, DATA.train.first(64), **few, seed=s) for s in (0, 1)]
    learned = rs.learn(ingredients, DATA.train.first(64), network=network, **few)
    for soup in (rs.mix(ingredients, learned), ingredients[0]):
        model = copy_network(network)
        soup.load_into(model)
        result = rs.evaluate(model, FEW, ["Linf 8/255"], steps=2)
        assert 0 <= result.accuracy["clean"].value <= 1
    assert rs.check(ingredients, data=DATA.val.first(32), network=network, threat="Linf 8/255")
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_network_that_changes_its_input_never_changes_the_images(plain):
    network = same_weights(InPlace(), plain)
    images = FEW.images.clone()
    result = rs.evaluate(network, FEW, ["Linf 8/255"], steps=2)
    assert torch.equal(FEW.images, images)
    with torch.no_grad():
        correct = plain(FEW.images.float() / 255 - 0.5).argmax(1) == FEW.labels
    assert result.accuracy["clean"].hits == int(correct.sum())
    x = images[:2].float() / 255
    with pytest.raises(ModelError, match="changes its input in place"):
        rs.apgd(network, x, FEW.labels[:2], LINF, steps=1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError("size must be 224\nand more"), "AssertionError: size must be 224"),
        (AssertionError(), "AssertionError"),
        (TypeError("forward() missing 1 required argument: 'mask'"), "TypeError: .*mask"),
        (RuntimeError("shapes cannot be multiplied"), "shapes cannot be multiplied"),
        (KeyError("x"), "KeyError"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_a_network_that_fails_ends_in_one_line(images, error, message):
    y = torch.zeros(6, dtype=torch.long)
    calls = (
        lambda m: rs.evaluate(m, FEW, ["Linf 8/255"], steps=1),
        lambda m: rs.train(m, DATA.train.first(64), threat="Linf 8/255", epochs=1, lr=0.1),
        lambda m: rs.apgd(m, images, y, LINF, steps=1),
        lambda m: rs.pgd(m, images, y, LINF, steps=1),
    )
    for call in calls:
        with pytest.raises(ModelError, match=message) as caught:
            call(Fails(error))
        assert "\n" not in str(caught.value)


def test_a_network_that_fails_in_train_mode_ends_in_one_line(images):
    class OneValue(Plain):
        def __init__(self):
            super().__init__()
            self.last = nn.BatchNorm1d(10)

        def forward(self, x):
            return self.last(super().forward(x))

    few = {"threat": "Linf 8/255", "epochs": 1, "lr": 0.1}
    with pytest.raises(ModelError, match=r"train mode on 1 images.*more than 1 value"):
        rs.train(OneValue(), DATA.train.first(1), **few)
    network = OneValue()
    adapt_network(network, images)
    before = copy.deepcopy(network.state_dict())
    check_train_mode(network, images[:2])
    assert all(torch.equal(network.state_dict()[k], v) for k, v in before.items())


def test_a_network_that_cannot_be_copied_is_refused_by_name():
    network = Plain()
    network.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"Plain cannot be copied: .*lock"):
        rs.evaluate(network, FEW, ["Linf 8/255"], steps=1)


@pytest.mark.parametrize("kind", [Keeps, WeightNorm, SpectralNorm])
def test_copies_are_independent_and_give_the_same_logits(kind, images):
    torch.manual_seed(0)
    network = kind().eval()
    network(images)
    copied = copy_network(network)
    torch.testing.assert_close(copied(images), network(images))
    before = network(images).detach().clone()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert torch.equal(network(images), before)
    assert not torch.allclose(copied(images), before)


# what apgd and pgd accept


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integer_labels_of_any_width_are_the_same(plain, images, dtype):
    y = torch.arange(6)
    expected = rs.apgd(plain, images, y, LINF, steps=2)
    assert torch.equal(rs.apgd(plain, images, y.to(dtype), LINF, steps=2), expected)
    assert torch.equal(rs.apgd(plain, images, y.tolist(), LINF, steps=2), expected)
    assert torch.equal(rs.apgd(plain, images.numpy(), y.numpy(), LINF, steps=2), expected)


def test_images_are_converted_to_the_type_of_the_network(plain, images):
    y = torch.arange(6)
    expected = rs.apgd(plain, images, y, LINF, steps=2)
    assert torch.equal(rs.apgd(plain, images.double(), y, LINF, steps=2), expected)
    assert torch.equal(
        rs.apgd(plain, images.numpy().astype(np.float64), y, LINF, steps=2), expected
    )
    assert rs.apgd(plain.double(), images, y, LINF, steps=2).dtype == torch.float64


def test_a_function_is_attacked_as_its_network_is(plain, images):
    y = plain(images).argmax(1)
    expected = rs.apgd(plain, images, y, LINF, steps=3)
    assert torch.equal(rs.apgd(plain.forward, images, y, LINF, steps=3), expected)
    with pytest.raises(ModelError, match=r"expected an nn\.Module or a function"):
        rs.apgd(3, images, y, LINF)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(6.0), "got torch.float32, expected the number of a class"),
        (torch.ones(6, dtype=torch.bool), "got torch.bool"),
        (torch.eye(10, dtype=torch.long)[:6], r"got shape \(6, 10\).*argmax"),
        (torch.arange(6)[:, None], r"got shape \(6, 1\).*squeeze"),
        (torch.tensor(3), r"got shape \(\)"),
    ],
)
def test_other_labels_are_refused_in_one_line(plain, images, labels, message):
    for attack in (rs.apgd, rs.pgd):
        with pytest.raises(DataError, match=message):
            attack(plain, images, labels, LINF, steps=1)


def test_groupnorm_gets_contiguous_input():
    """PyTorch's kernel for channels-last input without a gradient ends the process."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 4))
    x = torch.rand(2, 3, 8, 8)
    adapt_network(network, x)
    adapt_network(network, x)
    network[0].requires_grad_(False)
    formats = []
    network[1].register_forward_hook(
        lambda _module, inputs, _output: formats.append(inputs[0].is_contiguous())
    )
    logits = network(x.contiguous(memory_format=torch.channels_last))
    assert formats == [True]
    weight, _ = torch.autograd.grad(logits.sum(), list(network[1].parameters()))
    assert weight.isfinite().all()
    assert len(network[1]._forward_pre_hooks) == 1


# networks of other kinds: each works, or is refused in a line before any work


class OneForm(Plain):
    """Takes batches of two images alone, as a program that torch.export traced does."""

    def forward(self, x):
        assert len(x) == 2, "Guard failed: x.size()[0] == 2"
        return super().forward(x)


class NoHistory(Plain):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class LeavesTorch(Plain):
    def forward(self, x):
        return super().forward(torch.from_numpy(x.numpy().copy()))


class LateHead(nn.Module):
    """Adds its last layer in its first pass."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), None

    def forward(self, x):
        features = self.conv(x).flatten(1)
        if self.head is None:
            self.head = nn.Linear(features.shape[1], 10)
        return self.head(features)


class Hides(Plain):
    """Saves its weights under other names."""

    def __init__(self):
        super().__init__()
        self._register_state_dict_hook(self.rename)

    def rename(self, _module, state, _prefix, _metadata):
        for name in list(state):
            state[f"w_{name}"] = state.pop(name)


def build_on_meta():
    with torch.device("meta"):
        return Plain()


def replace_forward():
    network = Plain()
    forward = network.forward
    network.forward = lambda x: forward(x + 0)
    return network


def compile_network():
    return torch.compile(Plain(), backend="eager")


def train_briefly(network):
    return rs.train(network, DATA.train.first(64), threat="Linf 8/255", epochs=1, lr=0.01)


def attack_briefly(network):
    """Attack images under their predicted labels: others would not be attacked."""
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        y = network.eval()(x).argmax(1)
    return rs.apgd(network, x, y, LINF, steps=1)


def evaluate_briefly(network):
    return rs.evaluate(network, FEW, ["Linf 8/255"], steps=2)


REFUSED = {
    "batches of one size": (evaluate_briefly, OneForm, "fails on 32 images.*Guard failed"),
    "integers": (evaluate_briefly, lambda: Wrapped(lambda z: z.argmax(1)), "returned int64"),
    "complex numbers": (evaluate_briefly, lambda: Wrapped(lambda z: z * 1j), "returned complex64"),
    "no autograd": (attack_briefly, LeavesTorch, r"fails on \d+ images.*numpy"),
    "no gradient": (train_briefly, NoHistory, r"no gradient of its logits.*no_grad\(\)"),
    "late weights": (evaluate_briefly, LateHead, r"its first pass added head\.weight"),
    "float64": (evaluate_briefly, lambda: Plain().double(), r"weights are float64.*float\(\)"),
    "meta": (evaluate_briefly, build_on_meta, "is on the meta device"),
    "forward of its own": (train_briefly, replace_forward, "forward of Plain was replaced by a fu"),
    "other names": (train_briefly, Hides, r"state_dict\(\) has no conv\.weight"),
    "TorchScript": (
        evaluate_briefly,
        lambda: torch.jit.trace(Plain().eval(), torch.rand(2, 1, 8, 8)),
        "got a TorchScript module",
    ),
    "no weights": (rs.Checkpoint.of, nn.Flatten, "Flatten holds no weights"),
    "lazy network": (evaluate_briefly, lambda: nn.LazyLinear(3), "has lazy weights, which have no"),
    "lazy weights": (rs.Checkpoint.of, lambda: nn.LazyLinear(3), "weight has no values yet"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_networks_that_cannot_work_are_refused_in_one_line(case):
    function, build, message = REFUSED[case]
    network = build()
    with pytest.raises(rs.RobustsoupError, match=message) as caught:
        function(network)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_a_gradient_that_a_network_forbids_is_refused_in_one_line():
    class Recomputes(Plain):
        def forward(self, x):
            features = torch.utils.checkpoint.checkpoint(self.features, x, use_reentrant=True)
            return self.linear(features.flatten(1))

    with pytest.raises(ModelError, match=r"no gradient reaches the images: .*use_reentrant"):
        attack_briefly(Recomputes())


class ReturnsNone(Plain):
    """Overrides `train` without returning the network, as code that freezes BatchNorm does."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()


class FrozenWeights(Plain):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


@pytest.mark.parametrize("build", [ReturnsNone, FrozenWeights, compile_network])
def test_other_networks_are_mixed_learned_and_checked(build):
    torch.manual_seed(0)
    network = build()
    few, items = DATA.train.first(64), [rs.Checkpoint.of(network)] * 2
    if build is not FrozenWeights:
        items = [rs.train(network, few, threat="Linf 8/255", epochs=1, ema=0.5)] * 2
        assert items[0].digest != rs.Checkpoint.of(network).digest
    soup = rs.mix(items, [0.5, 0.5], network=network, buffers="recalibrate", calibrate_on=few)
    soup.load_into(copy_network(network))
    rs.learn(items, few, network=network, threat="Linf 8/255", epochs=1)
    rs.check(items, data=FEW, network=network, threat="Linf 8/255")


@pytest.mark.parametrize("x", [["a"], [object()], [[1.0], [1.0, 2.0]]])
def test_images_and_labels_that_are_no_numbers_end_in_one_line(images, x):
    network = Plain()
    with pytest.raises(DataError, match=r"^x: got list, expected a tensor or array of numbers"):
        rs.apgd(network, x, [0], "Linf 8/255", steps=1)
    with pytest.raises(DataError, match=r"^y: got list, expected a tensor or array of numbers"):
        rs.apgd(network, images[:1], x, "Linf 8/255", steps=1)

"""The one place that calls networks: state restored, float32 kept, gradients averaged."""

from functools import partial

import pytest
import torch
from torch import nn

from robustsoup.attacks import apgd, apgd_train, pgd, square
from robustsoup.attacks.forward import frozen_eval, input_gradient, pass_size, predict_logits
from robustsoup.attacks.losses import ce
from robustsoup.errors import DataError, ModelError, RequestError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Scaled(nn.Module):
    """A linear network whose weights are scaled by the number of passes with a gradient."""

    def __init__(self, w):
        super().__init__()
        self.w, self.passes = w, 0

    def forward(self, x):
        self.passes += x.requires_grad
        return x.flatten(1) @ (self.w * (self.passes if x.requires_grad else 1))


def test_eot_averages_losses_and_gradients():
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    y = torch.arange(5) % 3
    _, loss, grad = input_gradient(Scaled(w), x, y, ce, "float32", eot=3)
    parts = [
        input_gradient(lambda x, k=k: x.flatten(1) @ (w * k), x, y, ce, "float32")
        for k in (1, 2, 3)
    ]
    torch.testing.assert_close(loss, sum(part[1] for part in parts) / 3)
    torch.testing.assert_close(grad, sum(part[2] for part in parts) / 3)


@pytest.mark.parametrize("eot", [1, 2, 5])
def test_eot_takes_that_many_passes_a_step(eot):
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 1e-6
    x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    model = Scaled(w)
    x_adv = apgd(model, x, (x.flatten(1) @ w).argmax(1), "Linf 1e-4", steps=4, eot=eot)
    assert torch.equal((x_adv.flatten(1) @ w).argmax(1), (x.flatten(1) @ w).argmax(1))
    assert model.passes == 4 * eot


def test_a_network_without_a_gradient_has_gradient_0():
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    for network in (lambda x: x.flatten(1).detach(), lambda x: x.flatten(1).round()):
        _, _, grad = input_gradient(network, x, y, ce, "float32")
        assert torch.equal(grad, torch.zeros_like(x))


class ReportsTf32(nn.Module):
    """A linear network that records whether TF32 is allowed while it is called."""

    def __init__(self):
        super().__init__()
        self.allowed = []

    def forward(self, x):
        self.allowed.append(
            torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        )
        return x.flatten(1)


def test_no_pass_of_an_attack_may_use_tf32():
    model, before = ReportsTf32(), torch.backends.cudnn.allow_tf32
    x = torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    apgd(model, x, x.flatten(1).argmax(1), "Linf 0.1", steps=2)
    assert model.allowed
    assert not any(model.allowed)
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_float32_attack_ignores_the_callers_autocast():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    expected = apgd_train(model, x, y, "L2 0.5"), apgd(model, x, y, "L2 0.5", steps=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _, _ = input_gradient(model, x, y, ce, "float32")
        assert logits.dtype == torch.float32
        assert torch.equal(apgd_train(model, x, y, "L2 0.5"), expected[0])
        assert torch.equal(apgd(model, x, y, "L2 0.5", steps=5), expected[1])
        assert torch.is_autocast_enabled("cpu")


def test_images_that_require_a_gradient_are_attacked():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(20, dtype=torch.long)
    expected = apgd_train(model, x, y, "Linf 0.1")
    found = apgd_train(model, x.clone().requires_grad_(), y, "Linf 0.1")
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_frozen_eval_keeps_running_statistics_and_restores_modes():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2)).train()
    model[2].eval()
    model[2].bias.requires_grad_(False)
    mean = model[0].running_mean.clone()
    with frozen_eval(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model(torch.rand(8, 1, 2, 2))
    assert torch.equal(model[0].running_mean, mean)
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("device", "batch_size", "size"),
    [(CPU, None, 32), (CPU, 5, 5), (CPU, 250, 32), (GPU, None, 500), (GPU, 5, 5), (GPU, 900, 900)],
)
def test_the_size_of_a_pass(device, batch_size, size):
    assert pass_size(device, batch_size) == size


def test_predictions_keep_the_order_and_every_pass_is_full():
    sizes = []

    class Records(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x.flatten(1)

    x = torch.rand(10, 1, 2, 2)
    logits = predict_logits(Records(), lambda samples: x[samples], 10, 4, CPU)
    assert torch.equal(logits, x.flatten(1))
    assert sizes == [4, 4, 4]


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda *_: 1.0])
def test_a_loss_must_return_one_value_for_each_image(loss):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    for form in (apgd, apgd_train):
        with pytest.raises(RequestError, match=r"loss: returned .*, expected \(\d+,\), one value"):
            form(model, x, y, "Linf 0.1", steps=1, loss=loss)


# images and networks that attacks are given


def linear():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))


@pytest.mark.parametrize("attack", [apgd, pgd, square])
@pytest.mark.parametrize("threat", ["Linf 0.1", "clean"])
def test_points_are_in_no_graph_of_the_images(attack, threat):
    x = torch.rand(2, 1, 2, 2, requires_grad=True)
    points = attack(linear().eval(), x * 1, torch.zeros(2, dtype=torch.long), threat)
    assert not points.requires_grad


@pytest.mark.parametrize("attack", [apgd, pgd, square])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_half_precision_are_refused(attack, dtype):
    x, y = torch.rand(2, 1, 2, 2, dtype=dtype), torch.zeros(2, dtype=torch.long)
    for network in (linear().to(dtype), lambda x: x.flatten(1)):
        with pytest.raises(DataError, match=r"x: got .*16, expected float32 or float64; .*float\("):
            attack(network, x, y, "L2 0.5")
    assert attack(linear(), x, y, "L2 0.5").dtype == torch.float32


class Defence:
    """Calls one of the networks that it holds."""

    def __init__(self, network):
        self.network, self.other = network, linear()

    def __call__(self, x):
        return self.network(x)

    def logits(self, x):
        return self.network(x)


class Trainer(nn.Module):
    """A module whose own mode does not matter to its network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def logits(self, x):
        return self.network(x)


def calling(held, call=lambda held, x: held(x)):
    return lambda x: call(held, x)


def reading(held):
    return lambda x: held.network(x / 2)


FUNCTIONS = {
    "a closure": lambda network: lambda x: network((x - 0.5) / 0.25),
    "a closure of a method": lambda network: calling(network.forward),
    "a bound method": lambda network: network.forward,
    "a default": lambda network: lambda x, network=network: network(x),
    "a list": lambda network: calling([network], lambda held, x: held[0](x)),
    "a partial function": lambda network: partial(Defence.logits, Defence(network)),
    "a callable object": Defence,
    "a method of an object": lambda network: Defence(network).logits,
    "an attribute": lambda network: reading(Defence(network)),
    "a part of a module": lambda network: Trainer(network).logits,
    "a decorated function": lambda network: torch.no_grad()(calling(network)),
}


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_that_calls_a_network_in_train_mode_is_refused(make):
    network = linear()
    x, y = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    before = network[1].running_mean.clone()
    with pytest.raises(ModelError, match=r"calls a \w+ in train mode.*call eval\(\)"):
        apgd(make(network), x, y, "Linf 0.1", steps=1)
    assert torch.equal(network[1].running_mean, before)
    network.eval()
    assert apgd(make(network), x, y, "Linf 0.1", steps=1).shape == x.shape


def scale_and_call(x):
    return HELD.network(x / 2)


def test_networks_that_global_names_lead_to_are_found():
    x, y = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    for function in (scale_and_call, lambda x: -scale_and_call(x)):
        with pytest.raises(ModelError, match="in train mode"):
            apgd(function, x, y, "Linf 0.1", steps=1)


HELD = Defence(linear())

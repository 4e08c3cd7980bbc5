"""Fingerprints change exactly when the code or the network may give other results."""

import copy
import functools
import importlib
import importlib.util
import math
import subprocess
import sys
import types
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from plugins import write_plugin
from torch import nn

from robustsoup.fingerprint import code_fingerprint
from robustsoup.models import load_model, network_fingerprint


def load_function(path, source, name="loss"):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_comments_and_blank_lines_do_not_matter_but_code_does(tmp_path):
    path = tmp_path / "own.py"
    first = code_fingerprint(load_function(path, "def loss(x):\n    return 2 * x\n"))
    commented = "# twice\n\n\ndef loss(x):\n    # here\n    return 2 * x\n"
    assert code_fingerprint(load_function(path, commented)) == first
    changed = "def loss(x):\n    return 3 * x\n"
    assert code_fingerprint(load_function(path, changed)) != first
    assert len(first) == 32


def test_other_code_of_the_file_and_the_name_matter(tmp_path):
    path = tmp_path / "own.py"
    source = (
        "FACTOR = 2\ndef loss(x):\n    return FACTOR * x\ndef other(x):\n    return FACTOR * x\n"
    )
    loss = load_function(path, source)
    first = code_fingerprint(loss)
    assert code_fingerprint(load_function(path, source, "other")) != first
    assert code_fingerprint(load_function(path, source.replace("= 2", "= 3"))) != first


def scale(x, factor, offset=0):
    return factor * x + offset


def test_arguments_of_a_partial_matter():
    prints = {
        code_fingerprint(partial(scale, factor=2)),
        code_fingerprint(partial(scale, factor=3)),
        code_fingerprint(partial(scale, factor=3, offset=1)),
        code_fingerprint(scale),
    }
    assert len(prints) == 4
    assert code_fingerprint(partial(scale, offset=1, factor=3)) in prints


def test_lambdas_of_one_file_differ_by_their_bytecode():
    twice, thrice, again = (lambda x: 2 * x), (lambda x: 3 * x), (lambda x: 2 * x)
    assert code_fingerprint(twice) == code_fingerprint(again)
    assert code_fingerprint(twice) != code_fingerprint(thrice)


class Callable:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


def test_attributes_of_a_callable_object_matter():
    assert code_fingerprint(Callable(2)) == code_fingerprint(Callable(2))
    assert code_fingerprint(Callable(2)) != code_fingerprint(Callable(3))
    assert code_fingerprint(Callable) != code_fingerprint(Callable(2))


class Penalty(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor


def make_loss(factor, default=0):
    class Loss:
        weight = default

        def __call__(self, x):
            return factor * x

    def loss(x, offset=default):
        return factor * x + offset

    return Loss, Loss(), Loss().__call__, loss


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize(
    "values",
    [
        (2, 2, 3),
        (torch.ones(2000), torch.ones(2000), torch.ones(2000) * (torch.arange(2000) != 1000)),
        (np.ones(2000), np.ones(2000), np.ones(2000) * (np.arange(2000) != 1000)),
        (nn.Linear(2, 2), None, nn.Linear(2, 2)),
        ({"b": [scale], "a": 1}, {"a": 1, "b": [scale]}, {"a": 1, "b": [len]}),
        (Callable(2), Callable(2), Callable(3)),
        (Penalty(2), Penalty(2), Penalty(3)),
    ],
    ids=["number", "tensor", "array", "network", "functions", "object", "module"],
)
def test_values_that_a_nested_function_takes_from_around_it_matter(values, kind):
    value, equal, other = values
    equal = copy.deepcopy(value) if equal is None else equal
    same, again, changed = (code_fingerprint(make_loss(v)[kind]) for v in (value, equal, other))
    assert same == again
    assert same != changed
    same, again, changed = (code_fingerprint(make_loss(1, v)[kind]) for v in (value, equal, other))
    assert same == again
    assert same != changed


def scaled(factor):
    def decorate(function):
        @functools.wraps(function)
        def run(x):
            return factor * function(x)

        return run

    return decorate


def test_what_a_decorator_adds_matters():
    first, again, other = (code_fingerprint(scaled(k)(scale)) for k in (1, 1, 2))
    assert first == again
    assert len({first, other, code_fingerprint(scale)}) == 3


@dataclass
class Pair:
    function: object
    weights: torch.Tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda k: Pair(lambda x: k * x, torch.ones(3)),
        lambda k: Pair(scale, k * 1e-9 + torch.ones(2000, dtype=torch.float64)),
        lambda k: types.SimpleNamespace(weights=k * torch.ones(2)),
        lambda k: torch.tensor([1.0, k]).conj(),
        lambda k: {"set": {1, k + 5}, "own": []},
        lambda k: nn.Sequential(nn.Linear(2, 2), Penalty(k)) if torch.manual_seed(0) else None,
    ],
)
def test_objects_count_by_what_they_hold(make):
    first, again, other = (code_fingerprint(make_loss(make(k))[3]) for k in (1, 1, 2))
    assert first == again
    assert first != other


def test_use_of_a_bound_network_does_not_change_it():
    network = nn.Sequential(nn.Linear(2, 2), Penalty(1))
    before = code_fingerprint(make_loss(network)[3])
    network[0].register_forward_hook(lambda *_: None)
    network.eval()
    assert code_fingerprint(make_loss(network)[3]) == before


@pytest.mark.parametrize(
    "value",
    [
        torch.Generator(),
        np.random.default_rng(0),
        torch.Tensor.sign,
        str.lower,
        "a".join,
        property(lambda self: 1),
        functools.lru_cache(scale),
        math,
        torch,
        slice(1),
        torch.float32,
        torch.device("cpu"),
        np.float32(1),
        np.array([None, "a"], dtype=object),
        iter([1]),
        open,
        type,
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_may_be_bound(value):
    assert code_fingerprint(make_loss(value)[3]) == code_fingerprint(make_loss(value)[3])
    assert code_fingerprint(make_loss(value)[1])


def test_densely_linked_objects_are_described_once():
    nodes = [types.SimpleNamespace() for _ in range(30)]
    for node in nodes:
        node.others = nodes
    assert code_fingerprint(make_loss(nodes)[3])


def test_a_function_may_refer_to_itself():
    def first(x):
        return x and first(x - 1)

    assert code_fingerprint(first) == code_fingerprint(first)


def test_values_have_the_same_fingerprint_in_every_process(tmp_path, monkeypatch):
    (tmp_path / "nested.py").write_text(
        "from functools import partial\n"
        "from robustsoup.fingerprint import code_fingerprint\n"
        "class Plain: pass\n"
        "def make(*bound):\n"
        "    return lambda x, y=Plain(): (x, y, bound, x in {'Linf', 'L2', 'L1'})\n"
        "FINGERPRINT = code_fingerprint(partial(make(Plain(), make, len, {'a', 'b'}), make))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = [sys.executable, "-c", "import nested; print(nested.FINGERPRINT)"]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == importlib.import_module("nested").FINGERPRINT


def test_code_without_a_file_has_a_fingerprint():
    spaces = [{"__name__": "notebook"} for _ in range(3)]
    for space, factor in zip(spaces, (2, 2, 3), strict=True):
        exec(f"def loss(x):\n    return {factor} * x\n", space)
    same, again, other = (code_fingerprint(space["loss"]) for space in spaces)
    assert same == again
    assert same != other
    for space, factor in zip(spaces, (2, 2, 3), strict=True):
        code = f"class Loss:\n    def __call__(self, x):\n        return {factor} * x * self.one\n"
        exec(code + "    @property\n    def one(self):\n        return 1\n", space)
    same, again, other = (code_fingerprint(space["Loss"]()) for space in spaces)
    assert same == again
    assert same != other
    assert code_fingerprint(len) != code_fingerprint(max)  # built-in functions have no bytecode


def test_a_network_is_identified_without_its_weights():
    first = network_fingerprint(load_model("resnet9:width=2", seed=0))
    assert network_fingerprint(load_model("resnet9:width=2", seed=1)) == first
    assert network_fingerprint(load_model("resnet9:width=4", seed=0)) != first


CLASS = """
from torch import nn
class Scaled(nn.Flatten):
    def forward(self, x):
        return 2 * super().forward(x)
"""
FACTORY = """
from torch import nn
def load():
    model = nn.Flatten()
    model.register_forward_hook(lambda model, inputs, output: 2 * output)
    return model
"""


@pytest.mark.parametrize("code", [CLASS, FACTORY], ids=["class", "factory"])
def test_the_users_code_identifies_a_network(tmp_path, monkeypatch, request, code):
    module = f"own_{request.node.callspec.id}_of_fingerprints"
    monkeypatch.syspath_prepend(tmp_path)
    write_plugin(tmp_path, module, code)
    own = importlib.import_module(module)
    model = nn.Sequential(own.Scaled()) if code == CLASS else load_model(f"{module}:load")
    first = network_fingerprint(model)
    write_plugin(tmp_path, module, f"# doubles\n{code}")
    assert network_fingerprint(model) == first
    write_plugin(tmp_path, module, code.replace("2 *", "3 *"))
    assert network_fingerprint(model) != first


def test_addresses_that_a_network_prints_do_not_identify_it():
    first, second = nn.Identity(), nn.Identity()
    first.extra_repr = lambda: "<note at 0x7f01>"
    second.extra_repr = lambda: "<note at 0x7f02>"
    assert repr(first) != repr(second)
    assert network_fingerprint(first) == network_fingerprint(second)


def test_constants_outside_the_state_dict_identify_a_network():
    def normalised(mean, *, persistent=False):
        model = nn.Sequential(nn.Flatten())
        model.register_buffer("mean", torch.tensor([mean]), persistent=persistent)
        return network_fingerprint(model)

    assert normalised(0.4) == normalised(0.4)
    assert normalised(0.4) != normalised(0.5)
    assert normalised(0.4, persistent=True) == normalised(0.5, persistent=True)

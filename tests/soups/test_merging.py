"""Merging methods: their formulas on small tensors, and what they require."""

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ingredients import perturbed
from learning_helpers import SmallNetwork, small_ingredients
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from training_helpers import DATA, fresh_network, train_digits

from robustsoup.catalog import SOUP_METHODS
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import (
    CheckpointError,
    CoefficientError,
    IngredientMismatch,
    RequestError,
)
from robustsoup.models import load_model
from robustsoup.settings import MergeSettings
from robustsoup.soups import regmean as regmean_module
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.fisher import measure_fisher
from robustsoup.soups.interpolation import arc_factors
from robustsoup.soups.merging import Merge, Merged, merge
from robustsoup.soups.method_keys import METHOD_KEYS, is_merge
from robustsoup.soups.mixing import mix
from robustsoup.soups.regmean import find_linear_layers, group_by_budget, list_inputs
from robustsoup.soups.task_vectors import average_agreeing, stock_ratio
from robustsoup.threats import ThreatModel

LINF = ThreatModel("Linf", 16 / 255)
MERGES = [name for name in SOUP_METHODS if is_merge(name)]


def point(*values: float) -> Checkpoint:
    """Return a checkpoint of one parameter."""
    return Checkpoint(
        {"weight": torch.tensor([values], dtype=torch.float32)}, {"parameters": ["weight"]}
    )


def merged_weight(method, items, weights=None, **arguments) -> list[float]:
    """Return the merged parameter of checkpoints of one parameter."""
    return merge(items, method, weights, **arguments).tensors["weight"].flatten().tolist()


# Formulas.


def test_slerp_keeps_the_norm_on_the_arc_between_unit_vectors():
    got = merged_weight("slerp", [point(1, 0), point(0, 1)], [2 / 3, 1 / 3])
    assert got == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])


def test_slerp_of_parallel_and_of_zero_tensors_is_the_line():
    assert arc_factors([torch.ones(3), 2 * torch.ones(3)], (0.25, 0.75)) == (0.25, 0.75)
    assert arc_factors([torch.zeros(3), torch.ones(3)], (0.25, 0.75)) == (0.25, 0.75)


def test_task_arithmetic_scales_the_mean_task_vector():
    got = merged_weight("task-arithmetic", [point(2, 1), point(0, 5)], base=point(1, 1), scale=2.0)
    assert got == pytest.approx([1, 5])  # (1, 1) + 2 * ((1, 0) + (-1, 4)) / 2


def test_ties_trims_elects_signs_and_averages_what_agrees():
    base = point(1, 1, 1, 1)
    a, b = point(5, 1.5, 4, 2.5), point(3, -3, 1.25, -0.5)
    # Tasks (4, .5, 3, 1.5) and (2, -4, .25, -1.5); half kept: (4, 0, 3, 0) and (2, -4, 0, 0).
    got = merged_weight("ties", [a, b], base=base, density=0.5)
    assert got == pytest.approx([1 + 3, 1 - 4, 1 + 3, 1])
    doubled = merged_weight("ties", [a, b], base=base, density=0.5, scale=2.0)
    assert doubled == pytest.approx([1 + 6, 1 - 8, 1 + 6, 1])


def test_ties_drops_the_entries_of_the_minority_sign():
    tasks = [torch.tensor([3.0, 1.0, 1.0]), torch.tensor([-1.0, 1.0, -1.0])]
    got = average_agreeing(tasks, [0.5, 0.5])
    assert got.tolist() == [3, 1, 1]  # the sum of the third is 0: it takes the sign of the most
    weighted = average_agreeing([torch.tensor([1.0]), torch.tensor([4.0])], [0.75, 0.25])
    assert weighted.tolist() == [1.75]


def test_ties_trims_over_the_whole_network():
    def two(a: float, b: float) -> Checkpoint:
        return Checkpoint(
            {"a": torch.tensor([a]), "b": torch.tensor([b])}, {"parameters": ["a", "b"]}
        )

    soup = merge([two(3, 1), two(3, 1)], "ties", base=two(0, 0), density=0.5)
    assert [float(soup.tensors[name]) for name in "ab"] == [3, 0]


def test_dare_keeps_weights_tied_without_a_record():
    base, *items = (
        Checkpoint({name: tensor.clone() for name in ("head.weight", "last.weight")})
        for tensor in torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    )
    soup = merge(items, "dare", [0.5, 0.5], density=0.5, base=base)
    assert torch.equal(soup.tensors["head.weight"], soup.tensors["last.weight"])


def test_dare_drops_or_rescales_each_entry_and_repeats_by_seed():
    base, item = point(*[1.0] * 400), point(*[2.0] * 400)
    got = torch.tensor(merged_weight("dare", [item], base=base, density=0.25, seed=3))
    assert set(got.tolist()) == {1.0, 5.0}  # base, or base + task / density
    assert 40 < int((got == 5).sum()) < 160
    again = merged_weight("dare", [item], base=base, density=0.25, seed=3)
    assert got.tolist() == again
    assert got.tolist() != merged_weight("dare", [item], base=base, density=0.25, seed=4)
    whole = merged_weight("dare", [item], base=base, density=1.0)
    assert whole == [2.0] * 400


@pytest.mark.parametrize(
    ("tasks", "ratio"),
    [
        ([(1.0, 0.0), (0.0, 1.0)], 0.0),  # orthogonal: cos 0
        ([(1.0, 0.0), (3.0, 0.0)], 1.0),  # parallel: cos 1
        ([(1.0, 0.0), (1.0, math.sqrt(3))], 2 / 3),  # 60 degrees: 2 * 0.5 / (1 + 0.5)
        ([(1.0, 0.0), (-1.0, 0.0)], 0.0),  # opposite
    ],
)
def test_model_stock_draws_towards_the_base_by_the_angle(tasks, ratio):
    assert stock_ratio([torch.tensor(task) for task in tasks]) == pytest.approx(ratio, abs=1e-7)


def test_model_stock_mixes_the_average_and_the_base():
    items = [point(2, 1), point(2, 1 + math.sqrt(3))]
    got = merged_weight("model-stock", items, base=point(1, 1))
    assert got == pytest.approx([1 + 2 / 3, 1 + 2 / 3 * math.sqrt(3) / 2])
    soup = merge(items, "model-stock", base=point(1, 1))
    assert soup.provenance["merge"]["mean_ratio"] == pytest.approx(2 / 3)


class Linear(nn.Module):
    """A linear classifier of digits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        """Return the logits."""
        return self.linear(x.flatten(1))


def linear_ingredients(n: int = 2) -> list[Checkpoint]:
    torch.manual_seed(0)
    return [perturbed(Linear(), seed) for seed in range(n)]


def test_fisher_of_a_linear_layer_is_that_of_the_softmax():
    network = Linear()
    inputs = inputs_for([Checkpoint.of(network)], [network], samples=64)
    got = measure_fisher(inputs, network)
    # d log p_c / d bias_k = [k = c] - p_k, whose square lies in [0, 1] and has mean p (1 - p).
    with torch.no_grad():
        p = torch.cat([network(x).softmax(1) for x, _ in inputs.attacked_batches(network)])
    assert got["linear.bias"].sum() == pytest.approx(float((p * (1 - p)).sum(1).mean()), rel=0.1)
    pixels = torch.cat([x.flatten(1) for x, _ in inputs.attacked_batches(network)])
    dead = (pixels == 0).all(0)
    assert torch.equal(got["linear.weight"].sum(0) == 0, dead)


def test_fisher_weighs_each_entry_by_its_information():
    items = linear_ingredients()
    networks = [Linear(), Linear()]
    for item, network in zip(items, networks, strict=True):
        item.load_into(network)
    soup = merge(
        items,
        "fisher",
        [0.25, 0.75],
        data=DATA,
        threat=LINF,
        network=networks[0],
        measure_samples=32,
        device="cpu",
        precision="float32",
    )
    inputs = inputs_for(items, networks, samples=32)
    f, g = (measure_fisher(inputs, network)["linear.bias"] for network in networks)
    a, b = (item.tensors["linear.bias"].double() for item in items)
    expected = (0.25 * f * a + 0.75 * g * b) / (0.25 * f + 0.75 * g)
    torch.testing.assert_close(soup.tensors["linear.bias"].double(), expected, rtol=1e-5, atol=1e-6)


def test_regmean_solves_the_least_squares_of_the_shrunk_grams():
    items, inputs = linear_ingredients(), torch.rand(50, 64)
    gram = (inputs.T @ inputs / 50).double()
    shrunk = regmean_module.shrink(gram)
    assert torch.equal(shrunk.diagonal(), gram.diagonal())
    matrices = [item.tensors["linear.weight"].double().T for item in items]
    average = sum(matrices) / 2
    same = regmean_module.solve_layer(shrunk, shrunk @ matrices[0], average)
    torch.testing.assert_close(same, matrices[0], rtol=1e-4, atol=1e-5)


def test_regmean_averages_inputs_that_are_always_zero():
    gram, average = torch.diag(torch.tensor([2.0, 0.0]).double()), torch.ones(2, 1).double()
    got = regmean_module.solve_layer(gram, gram @ torch.tensor([[5.0], [7.0]]).double(), average)
    assert got.flatten().tolist() == pytest.approx([5, 1])
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(regmean_module.solve_layer(nothing, nothing @ average, average), average)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False),
        nn.Conv2d(3, 4, (1, 3), bias=False),
        nn.Linear(5, 4, bias=False),
    ],
)
def test_a_layer_is_linear_in_its_listed_inputs(layer):
    x = torch.rand(2, 3, 5, 5)
    got = list_inputs(layer, x) @ layer.weight.flatten(1).T
    out = layer(x)
    expected = out.flatten(2).transpose(1, 2).reshape(-1, 4) if out.shape[1] == 4 else out
    torch.testing.assert_close(got.reshape(expected.shape), expected)


def test_regmean_streams_layers_that_exceed_the_budget(monkeypatch):
    network, items = small_ingredients(2)
    arguments = {
        "data": DATA,
        "threat": LINF,
        "network": network,
        "measure_samples": 32,
        "device": "cpu",
    }
    whole = merge(items, "regmean", **arguments)
    monkeypatch.setattr(regmean_module, "GRAM_BUDGET", 1)
    streamed = merge(items, "regmean", **arguments)
    assert all(torch.equal(whole.tensors[n], streamed.tensors[n]) for n in whole.tensors)
    sizes = find_linear_layers(network)
    assert sizes == {"conv1.weight": 9, "conv2.weight": 36, "linear.weight": 6}
    assert list(group_by_budget(sizes, 24 * (81 + 1296))) == [
        ["conv1.weight", "conv2.weight"],
        ["linear.weight"],
    ]
    assert [len(group) for group in group_by_budget(sizes, 1)] == [1, 1, 1]


def test_regmean_averages_layers_with_a_forward_of_their_own():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    network = nn.Sequential(nn.Conv2d(1, 2, 3), Padded(2, 2, 3))
    assert list(find_linear_layers(network)) == ["0.weight"]


def test_swap_takes_named_blocks_and_their_statistics_from_the_second():
    _, (a, b) = small_ingredients(2)
    soup = merge([a, b], "swap", [0, 1], blocks=("conv2", "norm2"))
    for name, tensor in soup.tensors.items():
        source = b if name.split(".")[0] in ("conv2", "norm2") else a
        assert torch.equal(tensor, source.tensors[name]) or name.endswith("tracked"), name


def test_swap_moves_blocks_along_the_line():
    _, (a, b) = small_ingredients(2)
    soup, line = merge([a, b], "swap", [0.5, 0.5], blocks="linear"), mix([a, b], [0.5, 0.5])
    assert torch.equal(soup.tensors["linear.weight"], line.tensors["linear.weight"])
    assert torch.equal(soup.tensors["conv1.weight"], a.tensors["conv1.weight"])


# Properties of all.


def inputs_for(items, networks, samples: int) -> Merge:
    """Return the inputs of a method that attacks digits."""
    settings = MergeSettings(measure_samples=samples)
    weights = (1 / len(items),) * len(items)
    return Merge(items, weights, settings, None, DATA, LINF, 2, lambda i: networks[i], "float32", 0)


def arguments_of(method: str, network, base) -> dict:
    requires = SOUP_METHODS[method].facts.get("requires", ())
    arguments = {"device": "cpu", "network": network}
    if "base" in requires:
        arguments["base"] = base
    if "data" in requires:
        arguments |= {"data": DATA, "threat": LINF, "measure_samples": 16}
    if "blocks" in requires:
        arguments["blocks"] = ("conv2",)
    return arguments


@pytest.mark.parametrize("method", [m for m in MERGES if m != "swap"])
def test_permuting_the_ingredients_changes_no_bit(method):
    network, items = small_ingredients(2)
    arguments = arguments_of(method, network, Checkpoint.of(network))
    uniform = SOUP_METHODS[method].facts.get("weights") == "uniform"
    weights = [0.5, 0.5] if uniform else [0.25, 0.75]
    one = merge(items, method, weights, **arguments)
    other = merge(items[::-1], method, weights[::-1], **arguments)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("method", MERGES)
def test_a_merge_of_equal_checkpoints_is_their_checkpoint(method):
    network, (item, _) = small_ingredients(2)
    arguments = arguments_of(method, network, item)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    soup = merge([item, item], method, **arguments)
    for name, tensor in item.tensors.items():
        torch.testing.assert_close(soup.tensors[name], tensor, rtol=1e-4, atol=1e-5)
        assert soup.tensors[name].dtype == tensor.dtype
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())


@pytest.mark.parametrize("method", MERGES)
def test_the_record_names_method_and_parents(method, tmp_path):
    network, items = small_ingredients(2)
    base = Checkpoint.of(network)
    soup = merge(items, method, **arguments_of(method, network, base))
    record = soup.provenance
    assert record["merge"]["method"] == method
    numbers = {field.name for field in fields(MergeSettings)}
    assert numbers & set(record["merge"]) == numbers & METHOD_KEYS[method]
    assert [parent["digest"] for parent in record["parents"]] == [item.digest for item in items]
    assert record["learned"] is None
    measured = "data" in SOUP_METHODS[method].facts.get("requires", ())
    assert record["trained_on"] == (["train"] if measured else [])
    assert ("threat" in record["merge"]) == measured
    soup.save(tmp_path / "soup.safetensors")
    assert Checkpoint.load(tmp_path / "soup.safetensors").digest == soup.digest


def test_a_function_of_the_users_merges():
    def first(inputs: Merge) -> Merged:
        return Merged({name: inputs.rows(name)[0] for name in inputs.parameters})

    items = [point(1), point(2)]
    assert merged_weight(first, items) == [1]
    with pytest.raises(RequestError, match="must return each parameter; differs in weight"):
        merge(items, lambda inputs: Merged({}))


def test_statistics_follow_the_buffer_policies():
    network, items = small_ingredients(2)
    base = Checkpoint.of(network)
    average = merge(items, "ties", [0.25, 0.75], base=base)
    line = mix(items, [0.25, 0.75])
    copied = merge(items, "ties", base=base, buffers="base")
    measured = merge(
        items, "ties", base=base, buffers="recalibrate", data=DATA, network=network, device="cpu"
    )
    under_attack = {"buffers": "recalibrate-adversarial", "calibrate_threat": "L2 0.5"}
    request = {"base": base, "data": DATA, "network": network, "device": "cpu"}
    attacked = merge(items, "ties", threat="Linf 0.1", **under_attack, **request)
    assert attacked.provenance["buffers"]["threat"] == "L2 0.5"
    name = "norm1.running_mean"
    assert torch.equal(average.tensors[name], line.tensors[name])
    assert torch.equal(copied.tensors[name], base.tensors[name])
    assert not torch.equal(measured.tensors[name], average.tensors[name])


def test_weights_may_be_tensors_or_coefficients_of_these_ingredients():
    items = [point(1, 0), point(0, 1)]
    listed = merged_weight("slerp", items, [0.25, 0.75])
    for weights in (torch.tensor([0.25, 0.75]), np.array([0.25, 0.75])):
        assert merged_weight("slerp", items, weights) == listed
    digests = [item.digest for item in items]
    learned = Coefficients(
        torch.tensor([[0.25, 0.75]], dtype=torch.float64),
        ingredients=tuple(digests),
        record={"trained_on": ["val"]},
    )
    assert merged_weight("slerp", items, learned) == listed
    assert merged_weight("slerp", items[::-1], learned) == listed
    assert merge(items, "slerp", learned).provenance["trained_on"] == ["val"]
    with pytest.raises(CoefficientError, match="computed for other ingredients"):
        merge([point(1, 2), items[1]], "slerp", learned)
    with pytest.raises(CoefficientError, match="got coefficients by layer"):
        merge(items, "slerp", {"weight": [0.25, 0.75]})


def test_a_function_that_may_measure_on_data_is_recorded_so():
    def first(inputs: Merge) -> Merged:
        return Merged({name: inputs.rows(name)[0] for name in inputs.parameters})

    _, items = small_ingredients(2)
    soup = merge(items, first, data=DATA, threat=LINF)
    assert soup.provenance["trained_on"] == ["train"]
    assert soup.provenance["merge"]["threat"] == str(LINF)


class WithHeads(nn.Module):
    """A classifier of digits with layers that are not called like others."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear, self.training_alone = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        """Return the logits."""
        x = x.reshape(-1, 8, 8)
        return self.linear(input=self.attention(x, x, x)[0].flatten(1))


def test_regmean_averages_layers_that_are_never_called():
    network = WithHeads()
    items = [perturbed(network, seed) for seed in range(2)]
    soup = merge(items, "regmean", **arguments_of("regmean", network, None))
    averaged = ["attention.out_proj.weight", "training_alone.weight"]
    assert soup.provenance["merge"]["averaged_layers"] == averaged
    line = mix(items, [0.5, 0.5])
    for name in averaged:
        torch.testing.assert_close(soup.tensors[name], line.tensors[name])
    assert not torch.allclose(soup.tensors["linear.weight"], line.tensors["linear.weight"])


def test_regmean_counts_the_inputs_of_all_layers_that_share_a_weight():
    network, kept = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64)), []
    network[2].weight = network[1].weight
    items = [perturbed(network, seed) for seed in range(2)]

    def keep(inputs: Merge) -> Merged:
        kept.append(inputs)
        return Merged({name: inputs.rows(name)[0] for name in inputs.parameters})

    merge(items, keep, **arguments_of("regmean", network, None))
    (inputs,), total, product = kept, 0, 0
    for i, item in enumerate(items):
        model, weight = inputs.network(i), item.tensors["1.weight"].double()
        first = inputs.attacked_batches(model)[0][0].flatten(1)
        x = torch.cat([first, model[1](first).detach()]).double()
        gram = regmean_module.shrink(x.T @ x) / (2 * len(x))
        total, product = total + gram, product + gram @ weight.T
    got = regmean_module.regmean(inputs).tensors
    average = mix(items, [0.5, 0.5]).tensors["1.weight"].double()
    expected = regmean_module.solve_layer(total, product, average.T).T
    torch.testing.assert_close(got["1.weight"], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got["1.weight"], got["2.weight"])


def test_regmean_names_layers_whose_weight_is_parametrized():
    network = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 8)), nn.Linear(8, 10))
    items = [perturbed(network, seed) for seed in range(2)]
    soup = merge(items, "regmean", **arguments_of("regmean", network, None))
    assert soup.provenance["merge"]["averaged_layers"] == ["1.weight"]


def test_files_without_a_record_merge_by_the_network_that_was_named(tmp_path):
    spec, items = {"classes": 10, "channels": 1}, []
    network = load_model("resnet9:width=2", **spec)
    for seed in range(2):
        path = tmp_path / f"{seed}.pth"
        torch.save(dict(perturbed(network, seed).tensors), path)
        items.append(Checkpoint.load(path).with_network("resnet9:width=2", **spec))
    arguments = arguments_of("fisher", None, None)
    named = merge(items, "fisher", **arguments)
    given = merge(items, "fisher", **(arguments | {"network": network}))
    assert named.digest == given.digest


class Tied(nn.Module):
    """A network whose second layer is its first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("block", ["first", "second"])
def test_swap_moves_tied_weights_under_any_of_their_names(block):
    items = [perturbed(Tied(), seed) for seed in range(2)]
    assert merge(items, "swap", [0, 1], blocks=(block,)).digest == items[1].digest


class Complex(nn.Module):
    """A classifier of digits with a complex layer."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(10, 64, dtype=torch.complex64))

    def forward(self, x):
        """Return the logits."""
        return (x.flatten(1) @ self.phase.real.T) + (x.flatten(1) @ self.phase.imag.T)


@pytest.mark.parametrize("method", [m for m in MERGES if m != "swap"])
def test_complex_weights_keep_both_parts(method):
    torch.manual_seed(0)
    network = Complex()
    item = Checkpoint.of(network)
    soup = merge([item, item], method, **arguments_of(method, network, item))
    torch.testing.assert_close(soup.tensors["phase"], item.tensors["phase"])


def test_slerp_of_complex_weights_is_that_of_their_parts():
    values = [torch.tensor([[1 + 2j, 3j]]), torch.tensor([[2 - 1j, 1 + 0j]])]
    items = [Checkpoint({"weight": value}, {"parameters": ["weight"]}) for value in values]
    got = merge(items, "slerp", [0.25, 0.75]).tensors["weight"]
    flat = [point(*torch.view_as_real(value).flatten().tolist()) for value in values]
    expected = merged_weight("slerp", flat, [0.25, 0.75])
    assert torch.view_as_real(got).flatten().tolist() == pytest.approx(expected)


# Wrong requests.


def test_a_base_that_holds_nan_is_named():
    with pytest.raises(CheckpointError, match="weight holds NaN or infinity; this checkpoint is"):
        merge([point(1), point(2)], "ties", base=point(math.nan))


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("ties", {}, 'method "ties": requires the checkpoint .* give base'),
        ("fisher", {"threat": LINF}, 'method "fisher": measures on training samples; give data'),
        ("regmean", {"data": DATA}, 'method "regmean": measures on attacked images, got clean'),
        ("swap", {}, 'method "swap": give the blocks'),
        ("swap", {"blocks": "conv9"}, 'no parameter begins with "conv9"'),
        ("grid", {}, 'method: "grid" is made by mix, search or learn'),
        ("tyes", {}, 'did you mean "ties"'),
        (3, {}, "method: got 3, expected a name or a function"),
        ("slerp", {"weights": [1.0]}, "got 1, expected 2, one for each ingredient"),
        ("slerp", {"weights": [2.0, -1.0]}, "expected none below 0"),
        ("slerp", {"buffers": "tracked"}, "only learned soups"),
        ("slerp", {"density": 0.0}, "density: got 0.0, expected a number in"),
        ("slerp", {"density": 0.2}, 'density: has no meaning with method "slerp"'),
        ("ties", {"settings": MergeSettings(blocks=("conv1",))}, "blocks: has no meaning with"),
        ("slerp", {"dens": 0.1}, 'unknown setting "dens"; did you mean "density"'),
    ],
)
def test_wrong_requests_are_refused_in_one_line(method, arguments, message):
    with pytest.raises(RequestError, match=message) as error:
        merge([point(1, 2), point(3, 4)], method, **arguments)
    assert "\n" not in str(error.value)


def test_counts_and_weights_that_a_method_cannot_take_are_refused():
    items = [point(1), point(2), point(3)]
    with pytest.raises(RequestError, match="merges 2 checkpoints, got 3"):
        merge(items, "slerp")
    with pytest.raises(RequestError, match=r"weigh the same, got 0.2, 0.8; leave the weights out"):
        merge(items[:2], "model-stock", [0.2, 0.8], base=point(0))
    with pytest.raises(RequestError, match="expected at least 2"):
        merge(items[:1], "model-stock", base=point(0))


def test_checkpoints_of_other_networks_are_refused():
    small, other = Checkpoint.of(SmallNetwork()), Checkpoint.of(fresh_network())
    with pytest.raises(IngredientMismatch):
        merge([small, other], "slerp")
    with pytest.raises(IngredientMismatch):
        merge([small, small], "ties", base=other)


def test_a_base_beside_the_ingredients_is_found(tmp_path: Path):
    base = point(0, 0)
    base.save(tmp_path / "base.safetensors")
    parents = [{"digest": base.digest, "file": "base.safetensors"}]
    items = []
    for number, item in enumerate([point(1, 0), point(0, 1)]):
        path = tmp_path / f"{number}.safetensors"
        replace(item, provenance={**item.provenance, "parents": parents}).save(path)
        items.append(path)
    assert merged_weight("task-arithmetic", items, scale=2.0) == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_is_found_beside_its_fine_tunes(tmp_path, dtype):
    network = fresh_network().to(dtype)
    Checkpoint.of(network, Checkpoint.of(fresh_network()).provenance).save(
        tmp_path / "base.safetensors"
    )
    for seed in (1, 2):
        tuned = train_digits(tmp_path / "base.safetensors", epochs=1, seed=seed)
        tuned.save(tmp_path / f"{seed}.safetensors")
    items = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    merged = merge(items, "ties")
    base = Checkpoint.load(tmp_path / "base.safetensors")
    assert merged.provenance["merge"]["base"] == base.digest
    wide = base.with_dtypes_like(Checkpoint.load(items[0]))
    assert merged.digest == merge(items, "ties", base=wide).digest
    assert merged.tensors["linear.weight"].dtype == torch.float32
    soup = mix(items, [0.5, 0.5], buffers="base")
    statistics = soup.tensors["prep.1.running_var"]
    assert torch.equal(statistics, base.tensors["prep.1.running_var"].float())
    assert soup.provenance["buffers"]["base"] == base.digest

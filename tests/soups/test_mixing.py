"""Mixing: exact results, buffer policies, refusals, provenance, and coefficients files."""

import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustsoup.attacks import apgd_train
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import batches, load_data
from robustsoup.errors import (
    CheckpointError,
    CoefficientError,
    DataError,
    IngredientMismatch,
    RequestError,
)
from robustsoup.models import load_model
from robustsoup.soups.ancestry import common_ancestor
from robustsoup.soups.batchnorm import divide_samples, norm_layers, recalibrate, running_statistics
from robustsoup.soups.coefficients import Coefficients, uniform_coefficients
from robustsoup.soups.mixing import mix
from robustsoup.soups.summation import weighted_sum
from robustsoup.threats import ThreatModel

few = settings(max_examples=25, deadline=None)
COUNTERS = "num_batches_tracked"


def ingredient(seed, dtype=torch.float32, **provenance):
    """Return a small network with its own running statistics and counters."""
    model = load_model("resnet9:width=2", channels=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in norm_layers(model).values():
        with torch.no_grad():
            layer.weight.uniform_(0.5, 1.5, generator=generator)
            layer.bias.normal_(0, 0.1, generator=generator)
        layer.running_mean.normal_(0, 0.1, generator=generator)
        layer.running_var.uniform_(0.5, 2, generator=generator)
        layer.num_batches_tracked.fill_(100 + seed)
    item = Checkpoint.of(model, provenance)
    return Checkpoint(
        {n: t.to(dtype) if t.is_floating_point() else t for n, t in item.tensors.items()},
        item.provenance,
    )


FIVE = [ingredient(seed) for seed in range(5)]
PARAMETERS = FIVE[0].parameters
STATISTICS = [n for n in FIVE[0].tensors if n.endswith(("running_mean", "running_var"))]


def one_hot(n, index):
    return [float(i == index) for i in range(n)]


def random_alpha(n, seed):
    weights = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (weights / weights.sum()).tolist()


def random_alpha_by_parameter(n, seed=0):
    return {name: random_alpha(n, seed + number) for number, name in enumerate(PARAMETERS)}


def exact_mix(ingredients, alpha, name):
    row = alpha[name] if isinstance(alpha, dict) else alpha
    return sum(
        weight * item.tensors[name].double() for weight, item in zip(row, ingredients, strict=True)
    )


# values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("rows", ["network", "parameters"])
def test_a_one_hot_mix_equals_its_ingredient_bit_for_bit(dtype, at, rows):
    ingredients = [ingredient(seed, dtype) for seed in range(3)]
    alpha = one_hot(3, at) if rows == "network" else dict.fromkeys(PARAMETERS, one_hot(3, at))
    soup = mix(ingredients, alpha, buffers="average")
    assert soup.digest == ingredients[at].digest
    assert mix(ingredients, one_hot(3, at), base=ingredients[at]).digest == ingredients[at].digest


@few
@given(
    n=st.integers(2, 5),
    seed=st.integers(0, 1000),
    shuffle=st.randoms(use_true_random=False),
    by_layer=st.booleans(),
)
def test_permuting_ingredients_with_their_coefficients_changes_no_bit(n, seed, shuffle, by_layer):
    order = list(range(n))
    shuffle.shuffle(order)
    alpha = random_alpha_by_parameter(n, seed) if by_layer else random_alpha(n, seed)
    if by_layer:
        permuted = {name: [row[i] for i in order] for name, row in alpha.items()}
    else:
        permuted = [alpha[i] for i in order]
    soup = mix(FIVE[:n], alpha, buffers="average")
    again = mix([FIVE[i] for i in order], permuted, buffers="average")
    assert list(soup.tensors) == list(again.tensors)
    for name in [*PARAMETERS, *STATISTICS]:
        assert torch.equal(soup.tensors[name], again.tensors[name]), name


def test_permuting_an_ingredient_that_occurs_twice_changes_no_bit():
    twice, alpha = [FIVE[0], FIVE[0], FIVE[1]], [0.1, 0.7, 0.2]
    soup, again = mix(twice, alpha), mix(twice, [0.7, 0.1, 0.2])
    assert soup.digest == again.digest


@few
@given(n=st.integers(1, 5), seed=st.integers(0, 1000), by_layer=st.booleans())
def test_a_mix_equals_the_weighted_sum(n, seed, by_layer):
    alpha = random_alpha_by_parameter(n, seed) if by_layer else random_alpha(n, seed)
    soup = mix(FIVE[:n], alpha)
    for name in PARAMETERS:
        torch.testing.assert_close(
            soup.tensors[name].double(), exact_mix(FIVE[:n], alpha, name), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype):
    ingredients = [ingredient(seed, dtype) for seed in range(5)]
    soup = mix(ingredients, [0.2] * 5)
    for name in PARAMETERS:
        mixed, exact = soup.tensors[name], exact_mix(ingredients, [0.2] * 5, name)
        assert mixed.dtype == dtype
        torch.testing.assert_close(
            mixed.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-7
        )


def test_float64_is_not_rounded_to_float32():
    ingredients = [ingredient(seed, torch.float64) for seed in range(2)]
    soup = mix(ingredients, [1 / 3, 2 / 3])
    for name in PARAMETERS:
        exact = exact_mix(ingredients, [1 / 3, 2 / 3], name)
        torch.testing.assert_close(soup.tensors[name], exact, rtol=1e-14, atol=1e-15)


def test_ingredients_with_coefficient_zero_are_skipped():
    assert torch.equal(
        weighted_sum([torch.full((2,), torch.inf), torch.ones(2)], [0.0, 1.0]), torch.ones(2)
    )
    without_nan = weighted_sum(
        [torch.full((2,), torch.nan), torch.ones(2), 3 * torch.ones(2)], [0.0, 0.5, 0.5]
    )
    assert torch.equal(without_nan, torch.full((2,), 2.0))


def test_a_mix_shares_no_memory_with_its_ingredients():
    before = {name: tensor.clone() for name, tensor in FIVE[0].tensors.items()}
    soup = mix(FIVE[:2], [1.0, 0.0])
    for tensor in soup.tensors.values():
        tensor.zero_()
    assert all(torch.equal(FIVE[0].tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("buffers", ["base", "average"])
def test_integer_buffers_are_copied(buffers):
    soup = mix(FIVE[:3], [0.2, 0.3, 0.5], buffers=buffers)
    counters = [name for name in soup.tensors if COUNTERS in name]
    assert len(counters) == 8
    for name in counters:
        assert soup.tensors[name].dtype == torch.int64
        assert int(soup.tensors[name]) == 100


def test_parameters_that_require_gradients_mix_without_them(tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(dict(nn.Linear(3, 2).named_parameters()), tmp_path / f"{seed}.pth")
    soup = mix([tmp_path / "0.pth", tmp_path / "1.pth"], [0.5, 0.5])
    assert not any(tensor.requires_grad for tensor in soup.tensors.values())


# running statistics


def test_base_copies_the_statistics_of_the_named_checkpoint():
    soup = mix(FIVE[:2], [0.5, 0.5], buffers="base", base=FIVE[3])
    for name in [*STATISTICS, *(name for name in soup.tensors if COUNTERS in name)]:
        assert torch.equal(soup.tensors[name], FIVE[3].tensors[name])
    assert soup.provenance["buffers"] == {"policy": "base", "base": FIVE[3].digest}
    torch.testing.assert_close(
        soup.tensors["linear.weight"].double(), exact_mix(FIVE[:2], [0.5, 0.5], "linear.weight")
    )


def with_parents(item, *parents):
    return item.with_provenance(
        parents=[{"digest": parent.digest, "file": file} for parent, file in parents]
    )


def test_base_finds_the_common_ancestor_beside_the_ingredients(tmp_path):
    theta = FIVE[4]
    paths = [
        with_parents(FIVE[i], (theta, "theta.safetensors")).save(tmp_path / f"{i}.safetensors")
        for i in range(2)
    ]
    without = mix(paths, [0.5, 0.5], buffers="base")
    assert without.provenance["buffers"]["base"] == FIVE[0].digest
    theta.save(tmp_path / "theta.safetensors")
    soup = mix(paths, [0.5, 0.5], buffers="base")
    assert soup.provenance["buffers"]["base"] == theta.digest
    for name in STATISTICS:
        assert torch.equal(without.tensors[name], FIVE[0].tensors[name])
        assert torch.equal(soup.tensors[name], theta.tensors[name])


def test_the_ancestor_is_shared_by_all_and_its_file_is_checked(tmp_path):
    theta, other = FIVE[4], FIVE[3]
    shared = with_parents(FIVE[0], (theta, "theta.safetensors"))
    stranger = with_parents(FIVE[1], (other, "other.safetensors"))
    shared, stranger, third = (
        Checkpoint.load(item.save(tmp_path / f"{number}.safetensors"))
        for number, item in enumerate(
            [shared, stranger, with_parents(FIVE[2], (theta, "theta.safetensors"))]
        )
    )
    theta.save(tmp_path / "theta.safetensors")
    assert common_ancestor([shared, stranger]) is None
    assert common_ancestor([shared, third]).digest == theta.digest
    assert common_ancestor([shared, theta]) is theta  # wise-ft: the base itself is an ingredient
    other.save(tmp_path / "theta.safetensors")
    assert common_ancestor([shared, third]) is None


def test_average_mixes_the_statistics_with_the_coefficients_of_their_batchnorm():
    soup = mix(FIVE[:3], [0.2, 0.3, 0.5], buffers="average")
    for name in STATISTICS:
        exact = exact_mix(FIVE[:3], [0.2, 0.3, 0.5], name)
        torch.testing.assert_close(soup.tensors[name].double(), exact, rtol=1e-6, atol=1e-6)
    alpha = random_alpha_by_parameter(3)
    soup = mix(FIVE[:3], alpha, buffers="average")
    owners = running_statistics(soup)
    assert sorted(owners) == sorted(STATISTICS)
    for name in STATISTICS:
        owner = name.replace("running_mean", "weight").replace("running_var", "weight")
        assert owners[name] == owner
        exact = exact_mix(FIVE[:3], {name: alpha[owner]}, name)
        torch.testing.assert_close(soup.tensors[name].double(), exact, rtol=1e-6, atol=1e-6)


def unweighted_network():
    """Return a network whose files sort its convolutions away from their BatchNorms."""
    layers = {"z": nn.Conv2d(1, 4, 3), "a_norm": nn.BatchNorm2d(4, affine=False)}
    layers |= {"y": nn.Conv2d(4, 4, 3, bias=False), "b_norm": nn.BatchNorm2d(4, affine=False)}
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_statistics_of_a_batchnorm_without_weight_follow_the_layer_before_it(tmp_path, ending):
    item = Checkpoint.of(unweighted_network())
    read = Checkpoint.load(item.save(tmp_path / f"a.{ending}"))
    soup = Checkpoint.load(mix([read], [1.0]).save(tmp_path / f"soup.{ending}"))
    prefixed = {f"module.{name}": tensor for name, tensor in read.tensors.items()}
    fitted = Checkpoint.of(prefixed).with_network_of(unweighted_network())
    for checkpoint in (item, read, soup, fitted):
        owners = running_statistics(checkpoint)
        assert owners == {
            "a_norm.running_mean": "z.bias", "a_norm.running_var": "z.bias",
            "b_norm.running_mean": "y.weight", "b_norm.running_var": "y.weight",
        }  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return load_data("digits").train.first(64)


def statistics_by_hand(model, inputs):
    """Return the means over batches of each BatchNorm input's mean and unbiased variance."""
    seen = {name: [] for name in norm_layers(model)}
    model.train()
    for name, layer in norm_layers(model).items():
        layer.register_forward_hook(lambda _, args, out, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for x in inputs:
            model(x)
    by_hand = {}
    for name, values in seen.items():
        by_hand[f"{name}.running_mean"] = torch.stack(
            [v.double().mean((0, 2, 3)) for v in values]
        ).mean(0)
        by_hand[f"{name}.running_var"] = torch.stack(
            [v.double().var((0, 2, 3)) for v in values]
        ).mean(0)
    return by_hand


def check_statistics(tensors, by_hand, count):
    assert len(by_hand) == 16
    for name, value in by_hand.items():
        torch.testing.assert_close(tensors[name].double(), value, rtol=1e-4, atol=1e-5)
    assert {int(tensor) for name, tensor in tensors.items() if COUNTERS in name} == {count}


def test_recalibrate_measures_the_statistics(digits):
    soup = mix(FIVE[:2], [0.5, 0.5], buffers="recalibrate", calibrate_on=digits)
    inputs = [x for x, _, _ in batches(digits, 64, seed=0, epoch=0)]
    check_statistics(soup.tensors, statistics_by_hand(soup.network(), inputs), count=1)
    averaged = mix(FIVE[:2], [0.5, 0.5], buffers="average")
    for name in STATISTICS:
        assert not torch.allclose(soup.tensors[name], averaged.tensors[name], rtol=1e-3)
    for name in PARAMETERS:
        assert torch.equal(soup.tensors[name], averaged.tensors[name])


def test_recalibrate_takes_one_pass_over_batches_with_cumulative_momentum(digits):
    model = FIVE[0].network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = recalibrate(model, digits, samples=48, batch_size=16, seed=3)
    inputs = [x for x, _, _ in batches(digits, 16, seed=3, epoch=0)][:3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    check_statistics(measured, statistics_by_hand(model, inputs), count=3)
    other = recalibrate(model, digits, samples=48, batch_size=16, seed=4)
    assert not torch.equal(measured["prep.1.running_mean"], other["prep.1.running_mean"])


def test_recalibrate_adversarial_measures_on_attacked_samples(digits):
    threat = ThreatModel("Linf", 0.2)
    soup = mix(
        FIVE[:2],
        [0.5, 0.5],
        buffers="recalibrate-adversarial",
        calibrate_on=digits,
        threat=threat,
        attack_steps=3,
    )
    attacked_network = mix(FIVE[:2], [0.5, 0.5], buffers="average").network()
    x, y, _ = next(iter(batches(digits, 64, seed=0, epoch=0)))
    x_adv = apgd_train(attacked_network, x, y, threat, steps=3)
    assert float((x_adv != x).flatten(1).any(1).double().mean()) > 0.5
    check_statistics(soup.tensors, statistics_by_hand(attacked_network, [x_adv]), count=1)
    clean = mix(FIVE[:2], [0.5, 0.5], buffers="recalibrate", calibrate_on=digits)
    assert not torch.allclose(
        soup.tensors["prep.1.running_var"], clean.tensors["prep.1.running_var"], rtol=1e-3
    )
    recorded = soup.provenance["buffers"]
    assert recorded["policy"] == "recalibrate-adversarial"
    assert (recorded["threat"], recorded["attack_steps"]) == (str(threat), 3)
    assert clean.provenance["buffers"]["threat"] == "clean"


def test_statistics_are_measured_on_equal_batches_of_nearly_all_samples(digits):
    for count in (2, 3, 249, 250, 251, 300, 499, 1258, 10_000):
        number, size = divide_samples(count)
        assert 2 <= size <= 250
        assert 0 <= count - number * size < number
    measured = recalibrate(FIVE[0].network(), digits, batch_size=48, seed=3)
    inputs = list(batches(digits, 32, seed=3, epoch=0))
    expected = statistics_by_hand(FIVE[0].network(), [x for x, _, _ in inputs])
    check_statistics(measured, expected, count=2)


@pytest.mark.parametrize(("requested", "used"), [(10_000, 64), (48, 48)])
def test_the_record_holds_the_number_of_calibration_samples(digits, requested, used):
    soup = mix(
        FIVE[:2],
        [0.5, 0.5],
        buffers="recalibrate",
        calibrate_on=digits,
        calibrate_samples=requested,
    )
    assert soup.provenance["buffers"]["samples"] == used


def test_recalibrating_changes_neither_the_network_nor_the_randomness(digits):
    model = load_model("resnet9:width=2", channels=1, seed=8).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randomness = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    nameless = [Checkpoint(item.tensors) for item in FIVE[:2]]
    soup = mix(
        nameless,
        [0.5, 0.5],
        buffers="recalibrate-adversarial",
        calibrate_on=digits,
        network=model,
        threat=ThreatModel("L2", 0.5),
    )
    assert not torch.equal(
        soup.tensors["prep.1.running_mean"], FIVE[0].tensors["prep.1.running_mean"]
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert np.array_equal(np.random.get_state()[1], randomness[2])


def test_a_network_without_batchnorm_has_nothing_to_recalibrate(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert recalibrate(model, digits) == {}
    with pytest.raises(DataError, match="got 1 samples, expected at least 2"):
        recalibrate(model, digits.first(1))


def test_tracked_takes_the_statistics_of_learning():
    tracked = {name: torch.full_like(FIVE[0].tensors[name], 0.25) for name in STATISTICS}
    soup = mix(
        FIVE[:2],
        Coefficients(torch.tensor([[0.5, 0.5]]).double(), tracked=tracked),
        buffers="tracked",
    )
    for name in STATISTICS:
        assert torch.equal(soup.tensors[name], tracked[name])
    assert torch.equal(
        soup.tensors["prep.0.weight"], mix(FIVE[:2], [0.5, 0.5]).tensors["prep.0.weight"]
    )


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"buffers": "tracked"}, RequestError, "only coefficients made by `learn`"),
        ({"buffers": "best"}, RequestError, 'got "best", expected one of base, average'),
        ({"buffers": "recalibrate"}, RequestError, "requires training data; give calibrate_on"),
        (
            {"buffers": "recalibrate-adversarial"},
            RequestError,
            "requires training data; give calibrate_on",
        ),
        ({"buffers": "average", "affine": True}, CoefficientError, "variances can turn negative"),
        ({"buffers": "base", "base": "absent.pth"}, CheckpointError, r"absent\.pth: no such file"),
        (
            {"buffers": "base", "base": Checkpoint({"w": torch.ones(1)})},
            IngredientMismatch,
            r"normalize\.mean|w",
        ),
    ],
)
def test_a_policy_without_what_it_needs_is_refused(wrong, error, text):
    with pytest.raises(error, match=text):
        mix(FIVE[:2], [0.5, 0.5], **wrong)


def test_recalibrating_on_attacked_samples_requires_a_threat(digits):
    with pytest.raises(RequestError, match="requires a threat to attack the samples with"):
        mix(FIVE[:2], [0.5, 0.5], buffers="recalibrate-adversarial", calibrate_on=digits)


def test_a_policy_may_be_a_users_function(tmp_path, monkeypatch):
    (tmp_path / "own_policies.py").write_text(
        "from robustsoup.soups.mixing import Buffers\n"
        "def ones(soup):\n"
        "    names = [n for n in soup.ingredients[0].tensors if n.endswith('running_var')]\n"
        "    tensors = {n: soup.ingredients[0].tensors[n] * 0 + 1 for n in names}\n"
        "    return Buffers(tensors, {'ingredients': len(soup.ingredients)})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    soup = mix(FIVE[:2], [0.5, 0.5], buffers="own_policies:ones")
    assert soup.provenance["buffers"] == {"policy": "own_policies:ones", "ingredients": 2}
    for name in STATISTICS:
        source = FIVE[0].tensors[name]
        expected = torch.ones_like(source) if name.endswith("running_var") else source
        assert torch.equal(soup.tensors[name], expected)
    with pytest.raises(CoefficientError, match=r"own_policies:ones.*affine mix"):
        mix(FIVE[:2], [1.5, -0.5], affine=True, buffers="own_policies:ones")
    with pytest.raises(RequestError, match='module "nowhere" cannot be found'):
        mix(FIVE[:2], [0.5, 0.5], buffers="nowhere:ones")


# affine mixes and tied parameters


def test_negative_coefficients_are_for_affine_mixes_only():
    alpha = [1.5, -0.2, -0.3]
    with pytest.raises(CoefficientError, match=r"\[1\.5, -0\.2, -0\.3\], expected none below 0"):
        mix(FIVE[:3], alpha)
    soup = mix(FIVE[:3], alpha, affine=True)
    for name in PARAMETERS:
        exact = exact_mix(FIVE[:3], alpha, name)
        torch.testing.assert_close(soup.tensors[name].double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(CoefficientError, match="expected sum 1"):
        mix(FIVE[:2], [1.5, -0.2], affine=True)


class Tied(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed, self.out = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
        self.out.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.normal_(generator=generator)
            self.out.bias.normal_(generator=generator)


def test_tied_parameters_are_mixed_once_and_stay_tied(tmp_path):
    items = [Checkpoint.of(Tied(seed)) for seed in range(2)]
    alpha = {
        "embed.weight": [0.25, 0.75],
        "out.bias": [0.5, 0.5],
    }  # the alias has no coefficients
    soup = mix(items, alpha)
    torch.testing.assert_close(
        soup.tensors["embed.weight"].double(), exact_mix(items, alpha, "embed.weight")
    )
    assert torch.equal(soup.tensors["out.weight"], soup.tensors["embed.weight"])
    assert soup.tied == {"out.weight": "embed.weight"}
    again, model = Checkpoint.load(soup.save(tmp_path / "soup.safetensors")), Tied(9)
    again.load_into(model)
    assert torch.equal(model.out.weight, soup.tensors["embed.weight"])
    assert model.out.weight is model.embed.weight


# what is refused


def changed(item, **tensors):
    return Checkpoint({**item.tensors, **tensors}, item.provenance)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            Checkpoint({n: t for n, t in FIVE[1].tensors.items() if n != "prep.1.bias"}),
            r"^prep\.1\.bias: .*but not in",
        ),
        (changed(FIVE[1], extra=torch.ones(1)), "^extra: .*but not in"),
        (
            changed(
                FIVE[1], **{"linear.weight": torch.ones(10, 3), "layer1.1.bias": torch.ones(9)}
            ),
            r"^layer1\.1\.bias: \(4,\) torch\.float32 in .*, \(9,\) torch\.float32 in",
        ),
        (
            changed(FIVE[1], **{"layer2.1.bias": torch.ones(8).double()}),
            r"^layer2\.1\.bias: .*float32.*float64",
        ),
    ],
)
def test_ingredients_that_differ_are_refused_with_the_first_difference(other, text):
    for ingredients in ([FIVE[0], other], [FIVE[0], FIVE[2], other]):
        n = len(ingredients)
        with pytest.raises(IngredientMismatch, match=text) as caught:
            mix(ingredients, [1 / n] * n)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("alpha", "text"),
    [
        ([0.5, 0.4], r"\[0\.5, 0\.4\] with sum 0\.9, expected sum 1"),
        ([0.5, 0.6], "expected sum 1"),
        ([1 / 2, 1 / 2 + 2e-6], "expected sum 1"),
        ([0.2, 0.3, 0.5], "got 3, expected 2"),
        ([1.0], "got 1, expected 2"),
        ([], "got 0, expected 2"),
        ([1.2, -0.2], "expected none below 0"),
        ([math.nan, 0.5], "expected sum 1"),
        ([math.inf, -math.inf], "expected sum 1"),
        (["half", "half"], "expected n numbers"),
        ({"prep.0.weight": [0.5, 0.5]}, r"none for layer prep\.1\.weight"),
        ({}, "expected n numbers or rows by name"),
        (
            random_alpha_by_parameter(2) | {"prep.0.weight": [0.5, 0.6]},
            r"prep\.0\.weight: got .*expected sum 1",
        ),
        (
            random_alpha_by_parameter(2) | {"prep.0.weight": [0.2, 0.3, 0.5]},
            "expected n numbers or rows",
        ),
        (dict.fromkeys(PARAMETERS, 1.0), "coefficients: "),
    ],
)
def test_invalid_coefficients_are_refused(alpha, text):
    with pytest.raises(CoefficientError, match=text):
        mix(FIVE[:2], alpha)


def test_rounded_thirds_are_accepted():
    mix(FIVE[:3], [0.3333333, 0.3333333, 0.3333333])


def test_no_ingredients_are_refused():
    with pytest.raises(CheckpointError, match="got none"):
        mix([], [])


# the soup


def test_a_soup_is_an_ordinary_checkpoint_with_a_record_of_its_mixing(tmp_path):
    paths = [FIVE[i].save(tmp_path / f"{i}.safetensors") for i in range(3)]
    soup = mix(paths, [0.2, 0.3, 0.5], buffers="average")
    read = Checkpoint.load(soup.save(tmp_path / "soup.safetensors"))
    assert read.digest == soup.digest
    assert read.provenance["parents"] == [
        {"digest": FIVE[i].digest, "file": f"{i}.safetensors"} for i in range(3)
    ]
    assert read.provenance["coefficients"] == [0.2, 0.3, 0.5]
    assert read.provenance["buffers"] == {"policy": "average"}
    assert read.parameters == PARAMETERS
    with torch.no_grad():
        x = torch.rand(2, 1, 8, 8)
        assert torch.equal(read.network()(x), soup.network()(x))
    mix([read, FIVE[3]], [0.5, 0.5])


def test_a_soup_by_layer_records_its_rows():
    alpha = random_alpha_by_parameter(2)
    assert mix(FIVE[:2], alpha).provenance["coefficients"] == alpha


def test_a_soup_of_foreign_files_keeps_the_format_of_the_first(tmp_path):
    for i in range(2):
        state = {f"module.{name}": tensor for name, tensor in FIVE[i].tensors.items()}
        content = {"state_dict": state, "epoch": i, "arch": "resnet9", "optimizer": {"lr": 0.1}}
        torch.save(content, tmp_path / f"{i}.pth")
    soup = mix([tmp_path / "0.pth", tmp_path / "1.pth"], [0.5, 0.5])
    soup.save(tmp_path / "soup.pth")
    loaded = torch.load(tmp_path / "soup.pth", weights_only=True)
    assert loaded.keys() == {"state_dict", "arch"}
    assert soup.notes == ("soup: left out epoch, optimizer (not mixed)",)
    network = nn.DataParallel(load_model("resnet9:width=2", channels=1))
    network.load_state_dict(loaded["state_dict"])
    assert torch.equal(
        network.module.linear.weight, mix(FIVE[:2], [0.5, 0.5]).tensors["linear.weight"]
    )


# coefficients files


def learned_coefficients(n=3):
    digests = tuple(item.digest for item in FIVE[:n])
    alpha = torch.tensor(
        [random_alpha(n, seed) for seed in range(len(PARAMETERS))], dtype=torch.float64
    )
    tracked = {name: torch.rand(FIVE[0].tensors[name].shape) for name in STATISTICS}
    return Coefficients(
        alpha, tuple(PARAMETERS), digests, {"threat": "Linf 8/255", "epochs": 2}, tracked
    )


def test_coefficients_survive_a_file_bit_for_bit(tmp_path):
    original = learned_coefficients()
    path = original.save(tmp_path / "alpha.safetensors")
    read = Coefficients.load(path)
    assert torch.equal(read.alpha, original.alpha)
    assert read.alpha.dtype == torch.float64
    assert (read.layers, read.ingredients, read.record) == (
        original.layers,
        original.ingredients,
        original.record,
    )
    assert list(read.tracked) == sorted(original.tracked)
    assert all(torch.equal(read.tracked[name], original.tracked[name]) for name in original.tracked)
    assert read.row(PARAMETERS[3]) == original.alpha[3].tolist()


def test_coefficients_follow_their_ingredients_into_another_order(tmp_path):
    read = Coefficients.load(learned_coefficients().save(tmp_path / "alpha.safetensors"))
    soup = mix(FIVE[:3], read, buffers="average")
    again = mix([FIVE[2], FIVE[0], FIVE[1]], read, buffers="average")
    for name in [*PARAMETERS, *STATISTICS]:
        assert torch.equal(soup.tensors[name], again.tensors[name])
    moved = read.for_ingredients([FIVE[i].digest for i in (2, 0, 1)])
    assert torch.equal(moved.alpha, read.alpha[:, [2, 0, 1]])
    assert again.provenance["coefficients"][PARAMETERS[0]] == moved.alpha[0].tolist()


def test_coefficients_of_an_ingredient_that_occurs_twice_follow_it():
    twice = [FIVE[0], FIVE[0], FIVE[1]]
    digests = tuple(item.digest for item in twice)
    alpha = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    coefficients = Coefficients(alpha, ingredients=digests)
    soup, again = mix(twice, coefficients), mix(twice[::-1], coefficients)
    assert again.provenance["coefficients"] == [0.5, 0.2, 0.3]
    for name in PARAMETERS:
        torch.testing.assert_close(soup.tensors[name], again.tensors[name])


@pytest.mark.parametrize("others", [[0, 1, 3], [0, 1], [0, 1, 2, 3], [0, 0, 1]])
def test_coefficients_are_refused_for_other_ingredients(others):
    with pytest.raises(CoefficientError, match="computed for other ingredients") as caught:
        mix([FIVE[i] for i in others], learned_coefficients())
    assert FIVE[2].digest[:12] in str(caught.value)


def test_a_file_without_coefficients_is_refused(tmp_path):
    path = FIVE[0].save(tmp_path / "a.safetensors")
    with pytest.raises(CoefficientError, match=r"a\.safetensors: not a coefficients file"):
        Coefficients.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        Coefficients.load(path)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        Coefficients.load(tmp_path / "absent.safetensors")


def test_entropy_is_between_one_ingredient_and_the_uniform_soup():
    assert float(Coefficients.of([1.0, 0.0, 0.0]).entropy()) == 0
    torch.testing.assert_close(float(uniform_coefficients(3).entropy()), math.log(3))
    assert uniform_coefficients(4).row("anything") == [0.25] * 4


def test_the_default_policy_depends_on_the_coefficients():
    def policy(alpha, **more):
        return mix(FIVE[:2], alpha, **more).provenance["buffers"]["policy"]

    assert policy([0.5, 0.5]) == "average"
    assert policy([1.5, -0.5], affine=True) == "base"
    assert policy([0.5, 0.5], base=FIVE[3]) == "base"
    tracked = {name: tensor for name, tensor in FIVE[0].tensors.items() if name in STATISTICS}
    learned_once = Coefficients.of([0.5, 0.5])
    assert policy(Coefficients(learned_once.alpha, tracked=tracked)) == "tracked"
    assert (
        policy(Coefficients(learned_once.alpha, record={"at": 0.3}, tracked=tracked)) == "average"
    )  # a dial's

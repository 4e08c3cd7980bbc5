"""check: tells fine-tuned networks from independently trained ones, and names every problem."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
from trained_seed import trained_seed

from robustsoup.attacks.losses import ce
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main
from robustsoup.data import load_data, to_float
from robustsoup.diagnosis import geometry
from robustsoup.diagnosis.barriers import LINE_POINTS, Curve
from robustsoup.diagnosis.check import check
from robustsoup.diagnosis.geometry import gram_matrix
from robustsoup.diagnosis.rules import check_basin, check_robust_drop
from robustsoup.errors import CheckpointError, IngredientMismatch, ModelError, RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model
from robustsoup.soups.mixing import mix
from robustsoup.threats import ThreatModel
from robustsoup.training.adversarial_loss import measure_robust_loss
from robustsoup.training.train import train

DIGITS = load_data("digits")
SAMPLES = 128
LINF = "Linf 24/255"


def fine_tune(start, seed, threat="clean", lr=0.1, epochs=4, data=DIGITS):
    return train(
        start,
        data.train,
        threat=threat,
        epochs=epochs,
        lr=lr,
        batch_size=64,
        seed=trained_seed(seed),
        device="cpu",
        precision="float32",
    )


def untrained(seed, width=4):
    return load_model(f"resnet9:width={width}", channels=1, seed=trained_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two networks fine-tuned from it, and one trained independently on the same split."""
    folder = tmp_path_factory.mktemp("networks")
    fine_tune(untrained(1), 1).save(folder / "base.safetensors")
    base = Checkpoint.load(folder / "base.safetensors")
    for name, threat in (("clean", "clean"), ("eps16", "Linf 16/255")):
        fine_tune(base, 5, threat, lr=0.02, epochs=2).save(folder / f"{name}.safetensors")
    fine_tune(untrained(2), 2).save(folder / "independent.safetensors")
    return folder


@pytest.fixture(scope="module")
def related(folder):
    return [folder / "clean.safetensors", folder / "eps16.safetensors"]


def check_on_digits(files, **options):
    return check(files, **({"data": DIGITS.val, "samples": SAMPLES, "device": "cpu"} | options))


def replace_tensors(checkpoint, tensors):
    return replace(checkpoint, tensors={**checkpoint.tensors, **tensors})


def convert_floats(checkpoint, dtype):
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def small_network(seed=0, *, batchnorm=True):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4) if batchnorm else nn.GroupNorm(2, 4)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 10))
    if batchnorm:
        model[1].num_batches_tracked += 1
        model[1].running_mean += torch.rand(4)
    return Checkpoint.of(model, {"data": DIGITS.record})


# Curves between networks


def test_fine_tuned_networks_can_be_mixed(related):
    result = check_on_digits(related)
    assert result.soupable
    assert result.problems == result.warnings == []
    assert result.split == "same"
    assert result.geometry.base.endswith("base.safetensors")
    assert result.pairs[0].curves["clean"].relative_barrier(10) < 0.1
    assert result.pairs[0].curves["clean"].drop < 0.05


def test_independently_trained_networks_cannot_be_mixed(folder, related):
    result = check_on_digits([related[0], folder / "independent.safetensors"])
    assert not result.soupable
    (problem,) = result.problems
    assert "does not share a basin" in problem
    assert "clean.safetensors and " in problem
    assert "independent.safetensors" in problem
    assert result.pairs[0].curves["clean"].relative_barrier(10) > 0.7
    assert result.pairs[0].curves["clean"].drop > 0.3
    assert min(result.pairs[0].curves["clean"].accuracy[::4]) > 0.5
    assert any("no common ancestor is known" in warning for warning in result.warnings)
    assert any("the cosine of their weights" in warning for warning in result.warnings)


def test_curves_match_the_soups(folder, related):
    files = [related[0], folder / "independent.safetensors"]
    curve = check_on_digits(files).pairs[0].curves["clean"]
    for t, loss, accuracy in zip(LINE_POINTS, curve.loss, curve.accuracy, strict=True):
        soup = mix(files, [1 - t, t], buffers="average")
        with torch.no_grad():
            each = ce(
                soup.network()(to_float(DIGITS.val.images[:SAMPLES])), DIGITS.val.labels[:SAMPLES]
            )
        assert loss == pytest.approx(float(each.mean()), rel=1e-5)
        assert (
            accuracy
            == evaluate(soup, DIGITS.val, samples=SAMPLES, device="cpu").accuracy["clean"].value
        )


def test_a_threat_adds_a_curve_under_attack(related):
    result = check_on_digits(related, threat=LINF)
    assert list(result.pairs[0].curves) == ["clean", LINF]
    clean, robust = result.pairs[0].curves.values()
    assert all(r > c for r, c in zip(robust.loss, clean.loss, strict=True))
    half = mix(related, [0.5, 0.5], buffers="average").network()
    direct = measure_robust_loss(half, DIGITS.val.first(SAMPLES), ThreatModel.parse(LINF), steps=10)
    assert (robust.loss[2], robust.accuracy[2]) == pytest.approx(direct, rel=1e-4)


def test_only_the_most_distant_pairs_are_measured(folder, related):
    seen = []
    result = check_on_digits(
        [*related, folder / "independent.safetensors"],
        pairs=1,
        on_progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen == [(done, 5) for done in range(1, 6)]
    assert len(result.pairs) == 3
    assert result.measured == 1
    far = max(result.pairs, key=lambda pair: pair.distance)
    assert [bool(pair.curves) for pair in result.pairs] == [pair is far for pair in result.pairs]
    assert 2 in (far.a, far.b)


def test_a_foreign_file_runs_on_the_given_network(tmp_path, related):
    for path in related:
        state = {f"module.{name}": tensor for name, tensor in Checkpoint.load(path).tensors.items()}
        torch.save({"state_dict": state}, tmp_path / f"{path.stem}.pth")
    network = untrained(9).train()
    before = copy.deepcopy(network.state_dict())
    files = [tmp_path / f"{path.stem}.pth" for path in related]
    result = check_on_digits(files, network=network)
    assert result.pairs[0].curves == check_on_digits(related).pairs[0].curves
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ModelError, match="does not record its network"):
        check_on_digits(files)
    assert check(files).pairs[0].distance == pytest.approx(check(related).pairs[0].distance)


def test_half_precision_weights_are_evaluated_in_float32(related):
    files = [Checkpoint.load(path) for path in related]
    half = [convert_floats(item, torch.bfloat16) for item in files]
    restored = [convert_floats(item, torch.float32) for item in half]
    result = check_on_digits(half)
    curve, expected = (
        outcome.pairs[0].curves["clean"] for outcome in (result, check_on_digits(restored))
    )
    assert not result.problems
    assert curve.loss[::4] == expected.loss[::4]
    assert curve.accuracy[::4] == expected.accuracy[::4]
    assert result.cost.bytes[0] < 0.51 * check(files).cost.bytes[0]


def test_a_guessing_network_is_a_warning(related):
    one = Checkpoint.load(related[0])
    lost = replace_tensors(one, {"linear.weight": torch.zeros_like(one.tensors["linear.weight"])})
    assert any(
        lost.name in warning and "no better than guessing" in warning
        for warning in check_on_digits([one, lost]).warnings
    )


def test_a_soup_that_outputs_nan_is_a_problem():
    one, two = small_network(0), small_network(1)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10)
    )
    broken = replace_tensors(two, {"1.running_var": torch.full((4,), -1.0)})
    result = check_on_digits([one, broken], network=network)
    assert any("1.running_var" in problem and "below 0" in problem for problem in result.problems)
    assert any("does not share a basin" in problem for problem in result.problems)
    assert math.isinf(result.pairs[0].curves["clean"].barrier)
    json.dumps(result.to_json(), allow_nan=False)


# Barriers


def test_the_barrier_of_known_curves():
    tent = Curve((1.0, 2.0, 3.0, 2.0, 1.0), (0.9, 0.8, 0.5, 0.8, 0.9))
    assert tent.barrier == 2
    assert tent.drop == pytest.approx(0.4)
    assert tent.relative_barrier(10) == pytest.approx(2 / (math.log(10) - 1))
    valley = Curve((1.0, 0.5, 0.5, 0.5, 1.0), (0.5, 0.6, 0.6, 0.6, 0.5))
    assert valley.barrier == valley.drop == 0
    assert str(valley.drop) == "0.0"


@given(st.lists(st.floats(0, 10), min_size=5, max_size=5), st.floats(-5, 5), st.floats(-5, 5))
def test_the_barrier_ignores_tilt_and_direction(loss, at_0, at_1):
    curve = Curve(tuple(loss), tuple(loss))
    tilted = Curve(
        tuple(v + (1 - t) * at_0 + t * at_1 for t, v in zip(LINE_POINTS, loss, strict=True)),
        curve.accuracy,
    )
    assert curve.barrier >= 0
    assert tilted.barrier == pytest.approx(curve.barrier, abs=1e-9)
    assert Curve(tuple(loss[::-1]), curve.accuracy).barrier == pytest.approx(
        curve.barrier, abs=1e-9
    )


BASE = (0.9, 0.9, 0.9, 0.9, 0.9)


@pytest.mark.parametrize(
    ("loss", "accuracy", "expected"),
    [
        (0.3, 0.9, []),
        (0.3, 0.86, []),
        (0.3, 0.84, ["warning"]),
        (0.6, 0.9, []),
        (0.9, 0.9, ["warning"]),
        (1.5, 0.9, ["warning"]),
        (1.5, 0.84, ["problem"]),
        (0.3, 0.79, ["problem"]),
        (math.nan, 0.9, ["problem"]),
    ],
)
def test_thresholds(loss, accuracy, expected):
    """The ends have loss 0.3, 2 nats below guessing among 10 classes."""
    curve = Curve((0.3, 0.3, loss, 0.3, 0.3), (0.9, 0.9, accuracy, 0.9, 0.9))
    assert [kind for kind, _ in check_basin("a and b", curve, 10)] == expected


def test_robust_accuracy_below_the_line_is_a_warning():
    flat = Curve((0.3,) * 5, (0.9,) * 5)
    for half, expected in ((0.45, 0), (0.35, 1)):
        robust = Curve((1.0,) * 5, (0.5, 0.5, half, 0.5, 0.5))
        findings = check_robust_drop("a and b", {"clean": flat, LINF: robust})
        assert [kind for kind, _ in findings] == ["warning"] * expected


# Distances


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
def test_the_gram_matrix_matches_whole_vectors(n, numbers, seed):
    torch.manual_seed(seed)
    shapes = {"a": (3, 2, 3, 3), "b": (5,), "c": (), "d": (1, 7), "e": (0, 4)}
    files = [
        Checkpoint({name: torch.randn(shape) for name, shape in shapes.items()})
        for _ in range(n + 1)
    ]
    files[0].tensors["a"] = files[0].tensors["a"].contiguous(memory_format=torch.channels_last)
    flat = torch.stack(
        [torch.cat([item.tensors[name].reshape(-1) for name in shapes]) for item in files]
    ).double()
    flat[:-1] -= flat[-1].clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "MAX_NUMBERS_IN_MEMORY", numbers)
        got = gram_matrix(files[:-1], files[-1], list(shapes))
    assert torch.allclose(got, flat @ flat.T, rtol=1e-10, atol=1e-10)


def test_distances_take_little_memory(monkeypatch):
    files = [Checkpoint({"w": torch.randn(64, 100)}) for _ in range(4)]
    real_stack, sizes = torch.stack, []

    def counting_stack(tensors, *rest):
        block = real_stack(tensors, *rest)
        sizes.append(block.numel())
        return block

    monkeypatch.setattr(geometry, "MAX_NUMBERS_IN_MEMORY", 2000)
    monkeypatch.setattr(torch, "stack", counting_stack)
    gram_matrix(files[:-1], files[-1], ["w"])
    assert max(sizes) <= 2000
    assert sum(sizes) == 4 * 6400


def flatten(checkpoint):
    return torch.cat(
        [checkpoint.tensors[name].reshape(-1).double() for name in checkpoint.parameters]
    )


def test_task_vectors_are_measured_from_the_base(folder, related):
    base, one, two = (
        flatten(Checkpoint.load(path)) for path in (folder / "base.safetensors", *related)
    )
    for base_path in (None, folder / "base.safetensors"):
        result = check(related, base=base_path)
        (pair,) = result.pairs
        assert result.geometry.norms == pytest.approx(
            [float((one - base).norm()), float((two - base).norm())]
        )
        assert result.geometry.relative == pytest.approx(
            [v / float(base.norm()) for v in result.geometry.norms]
        )
        assert pair.distance == pytest.approx(float((one - two).norm()))
        assert pair.relative == pytest.approx(float((one - two).norm() / base.norm()))
        assert pair.cosine == pytest.approx(
            float(torch.cosine_similarity(one - base, two - base, dim=0))
        )
        assert pair.curves == {}


def test_without_a_base_weights_are_measured():
    items = [small_network(seed) for seed in range(3)]
    result = check(items)
    for pair in result.pairs:
        one, two = flatten(items[pair.a]), flatten(items[pair.b])
        assert pair.distance == pytest.approx(float((one - two).norm()))
        assert pair.relative == pytest.approx(
            float((one - two).norm() / ((one @ one + two @ two) / 2).sqrt())
        )
        assert pair.cosine == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)))
    assert [(pair.a, pair.b) for pair in result.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert result.geometry.base is None
    assert result.soupable
    assert "no common ancestor is known" in result.warnings[0]


def test_an_ancestor_whose_file_is_elsewhere_is_named(tmp_path, related):
    for path in related:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = check([tmp_path / path.name for path in related])
    assert result.geometry.base is None
    (warning,) = result.warnings
    assert "base.safetensors" in warning
    assert "--base" in warning


@pytest.fixture
def descendants(tmp_path):
    """A function that saves a base and returns two checkpoints beside it whose records name it."""

    def make(base):
        base.save(tmp_path / "base.safetensors")
        parents = [{"digest": base.digest, "file": "base.safetensors"}]
        return [
            replace(small_network(seed).with_provenance(parents=parents), path=tmp_path / str(seed))
            for seed in (1, 2)
        ]

    return make


def test_a_base_in_half_precision_is_used(descendants, tmp_path):
    items = descendants(convert_floats(small_network(), torch.bfloat16))
    path = tmp_path / "base.safetensors"
    for named in (None, path):
        result = check(items, base=named)
        assert result.geometry.base == str(path)
        assert result.warnings == []


def test_an_ancestor_of_another_network_is_named_without_advice(descendants):
    base = small_network()
    result = check(descendants(replace_tensors(base, {"3.bias": torch.zeros(100)})))
    (warning,) = result.warnings
    assert "base.safetensors, but it is another network" in warning
    assert "--base" not in warning


def test_the_base_itself_has_no_cosine(folder, related):
    result = check([folder / "base.safetensors", *related])
    assert [pair.cosine is None for pair in result.pairs] == [True, True, False]
    assert result.geometry.norms[0] == 0
    json.dumps(result.to_json(), allow_nan=False)


# Contents of the files


def test_all_differences_are_listed_and_nothing_is_mixed(related):
    first = Checkpoint.load(related[0])
    other = dict(first.tensors)
    removed = other.pop("prep.1.bias")
    other["linear.weight"] = other["linear.weight"].double()
    other["prep.0.weight"] = torch.zeros(9, 1, 3, 3)
    other["new.weight"] = torch.zeros(2)
    result = check_on_digits([first, first, replace(first, tensors=other, path=None)])
    ((name, differences),) = result.differences.items()
    shape = tuple(other["linear.weight"].shape)
    assert sorted(differences) == [
        f"linear.weight: got {shape} torch.float64, expected {shape} torch.float32",
        "new.weight: got (2,) torch.float32, expected no such tensor",
        "prep.0.weight: got (9, 1, 3, 3) torch.float32, expected (4, 1, 3, 3) torch.float32",
        f"prep.1.bias: got no such tensor, expected {tuple(removed.shape)} torch.float32",
    ]
    assert name in result.problems[0]
    assert result.geometry is None
    assert result.statistics is None
    assert (result.pairs, result.measured) == ([], 0)
    assert "4 tensors differ" in result.problems[0]
    assert str(related[0]) in result.problems[0]


def test_names_are_fitted_as_mix_fits_them(tmp_path):
    model = load_model("resnet9:width=2", channels=1)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    torch.save(AveragedModel(model).state_dict(), tmp_path / "b.pth")
    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    result = check([a, b], base=b)
    assert result.differences == {}
    assert result.pairs[0].distance == 0
    assert result.geometry.base == str(b)


def test_the_text_lists_ten_differences_and_counts_the_rest():
    result = check([Checkpoint.of(untrained(1)), Checkpoint.of(untrained(1, width=2))])
    ((_, differences),) = result.differences.items()
    assert len(differences) > 20
    assert result.problems[0].count("expected (") == 10
    assert f"and {len(differences) - 10} more" in result.problems[0]


def test_a_duplicate_is_a_warning(related):
    result = check_on_digits([related[0], related[1], related[0]])
    assert result.duplicates == [[0, 2]]
    assert result.soupable
    (warning,) = result.warnings
    assert "the same weights 2 times" in warning
    assert result.pairs[1].distance < 1e-5
    assert result.pairs[1].curves["clean"].barrier < 1e-4


def trained_on(weights, **record):
    return small_network(weights).with_provenance(data={**DIGITS.record, **record})


def test_different_splits_are_a_problem():
    result = check([trained_on(0), trained_on(1, split_digest="0" * 64, seed=7)])
    assert result.split == "different"
    (problem,) = result.problems
    assert "no validation sample is fresh for all" in problem
    assert "seed 7" in problem
    assert (
        check([trained_on(0), trained_on(1, digest="other", name="cifar10")]).split == "different"
    )
    assert (
        check([trained_on(0, split_digest="several"), trained_on(1, split_digest="several")]).split
        == "different"
    )


def test_a_file_without_a_record_leaves_the_split_unknown():
    foreign = replace(small_network(1), provenance={})
    result = check([trained_on(0), foreign])
    assert result.split == "unknown"
    assert result.soupable
    assert any(
        foreign.name in warning and "no record of the training samples" in warning
        for warning in result.warnings
    )
    assert (
        check([trained_on(0), foreign, trained_on(2, seed=7, split_digest="0" * 64)]).split
        == "different"
    )


def test_buffers_that_are_not_averaged_must_agree(related):
    one = Checkpoint.load(related[0])
    name = next(n for n in one.tensors if n.startswith("normalize."))
    result = check([one, replace_tensors(one, {name: one.tensors[name] + 1})])
    assert any(name in warning and "not averaged" in warning for warning in result.warnings)
    outside = one.with_provenance(
        network={**one.provenance["network"], "normalize": [[0.5], [0.5]]}
    )
    assert any("normalises its input" in warning for warning in check([one, outside]).warnings)


# Running statistics


def with_statistics(**tensors):
    return replace_tensors(
        small_network(1), {f"1.{name}": torch.as_tensor(value) for name, value in tensors.items()}
    )


@pytest.mark.parametrize(
    ("tensors", "kind", "text"),
    [
        ({"running_var": [1.0, 1.0, -1e-3, 1.0]}, "problem", "below 0"),
        ({"running_var": [1.0, 1.0, math.inf, 1.0]}, "problem", "infinity"),
        ({"running_mean": [1.0, 1.0, math.nan, 1.0]}, "problem", "NaN"),
        ({"running_var": [1.0, 0.0, 1.0, 1.0]}, "warning", "variance 0"),
        (
            {"num_batches_tracked": 0, "running_mean": [0.0] * 4, "running_var": [1.0] * 4},
            "problem",
            "never tracked",
        ),
        ({"num_batches_tracked": 0}, "warning", "copied in"),
    ],
)
def test_broken_statistics_are_named(tensors, kind, text):
    broken = with_statistics(**tensors)
    result = check([small_network(0), broken])
    texts = {"problem": result.problems, "warning": result.warnings}[kind]
    assert any(broken.name in line and "1." in line and text in line for line in texts)
    assert result.soupable == (kind == "warning")


def test_difference_of_statistics():
    one, two = small_network(0), with_statistics(running_var=[3.0] * 4)
    two = replace_tensors(two, {"1.running_mean": one.tensors["1.running_mean"]})
    result = check([one, two]).statistics
    assert (result.layers, result.tensor, result.difference) == (
        1,
        "1.running_var",
        pytest.approx(0.5),
    )
    shifted = replace_tensors(one, {"1.running_mean": one.tensors["1.running_mean"] + 3})
    result = check([one, shifted]).statistics
    assert (result.tensor, result.difference) == ("1.running_mean", pytest.approx(1.5))


def test_networks_without_batchnorm_have_no_statistics():
    result = check([small_network(0, batchnorm=False), small_network(1, batchnorm=False)])
    assert (result.statistics.layers, result.statistics.difference) == (0, None)
    assert result.soupable


# One file, no file, invalid files


def test_one_file_alone_works(related):
    result = check_on_digits(related[:1])
    assert result.soupable
    assert result.pairs == []
    assert "got one checkpoint" in result.warnings[0]


def test_invalid_arguments_are_errors(tmp_path, related, folder):
    with pytest.raises(CheckpointError, match="got no checkpoint, expected at least one"):
        check([])
    with pytest.raises(CheckpointError, match=r"missing\.safetensors: no such file"):
        check([*related, tmp_path / "missing.safetensors"])
    for invalid in ({"samples": 0}, {"pairs": 0}, {"threat": "Linf -1"}):
        with pytest.raises(RequestError):
            check_on_digits(related, **invalid)
    with pytest.raises(IngredientMismatch, match="not the same network"):
        check(related, base=small_network(0))


# Cost, JSON, command line


def test_cost_counts_bytes_and_seconds(related):
    result = check_on_digits(related).cost
    tensors = Checkpoint.load(related[0]).tensors
    assert result.bytes == (sum(t.nbytes for t in tensors.values()),) * 2
    assert result.on_disk == tuple(path.stat().st_size for path in related)
    assert result.largest_layer == ("residual3.0.0.weight", tensors["residual3.0.0.weight"].nbytes)
    assert result.layers == len(Checkpoint.load(related[0]).parameters)
    assert 0 < result.step_seconds < 60
    assert check(related).cost.step_seconds is None


def test_the_json_holds_the_result(related):
    result = check_on_digits(related, threat=LINF)
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["soupable"] is True
    assert content["problems"] == content["warnings"] == []
    curve = content["pairs"][0]["curves"][LINF]
    assert curve["t"] == list(LINE_POINTS)
    assert curve["barrier"] == result.pairs[0].curves[LINF].barrier
    assert len(curve["loss"]) == len(curve["accuracy"]) == 5


def run_check(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["check", *map(str, arguments)])
    return end.value.code


def test_the_command_accepts_related_networks(related, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run_check(*related, "--data", "digits", "--threat", LINF, "--samples", SAMPLES) == 0
    output = capsys.readouterr().out
    assert output.startswith("these 2 can be mixed\n")
    for text in (
        "eps16",
        "barrier, clean",
        f"accuracy drop, {LINF}",
        "BatchNorm: 8 layers",
        "one step of `learn`",
        "base.safetensors",
    ):
        assert text in output, text


def test_the_command_exits_with_3_for_independent_networks(folder, related, capsys):
    assert (
        run_check(*related, folder / "independent.safetensors", "--data", "digits", "--json") == 3
    )
    content = json.loads(capsys.readouterr().out)
    assert content["soupable"] is False
    assert len(content["problems"]) == 2
    assert (
        run_check(
            related[0], folder / "independent.safetensors", "--data", "digits", "--samples", SAMPLES
        )
        == 3
    )
    output = capsys.readouterr().out
    assert output.startswith("cannot be mixed: ")
    assert "warning: no common ancestor" in output


def test_the_command_without_data_says_what_was_not_measured(related, capsys):
    assert run_check(*related) == 0
    assert "judging by their weights; --data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "required"),
    [
        (("--threat", LINF), "--data"),
        (("--model", "resnet9"), "--data"),
        (("--samples", 9), "--data"),
        (("--pairs", 2), "--data"),
        (("--image-size", 8), "--data"),
        (("--granularity", "module", "--data", "digits"), "--layers"),
    ],
)
def test_the_command_refuses_options_that_nothing_reads(options, required, capsys):
    assert run_check("a.safetensors", "b.safetensors", *options) == 2
    assert f"{options[0]}: requires {required}" in capsys.readouterr().err

"""check: networks that were really trained apart are told from fine-tuned ones, and every other reason is named."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustsoup.attacks.losses import ce
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main
from robustsoup.cli.app import stdout
from robustsoup.data import load_data, to_float
from robustsoup.diagnosis import geometry
from robustsoup.diagnosis import rules as soupability
from robustsoup.diagnosis.barriers import ALONG, Curve
from robustsoup.diagnosis.geometry import gram
from robustsoup.diagnosis.rules import check
from robustsoup.errors import CheckpointError, IngredientMismatch, ModelError, RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model
from robustsoup.soups.mixing import mix
from robustsoup.training.adversarial_loss import robust_loss
from robustsoup.training.train import train

DIGITS = load_data("digits")
SAMPLES = 128
LINF = "Linf 24/255"


def fitted(start, seed, threat="clean", lr=0.1, epochs=4, data=DIGITS):
    return train(
        start,
        data.train,
        threat=threat,
        epochs=epochs,
        lr=lr,
        batch_size=64,
        seed=seed,
        device="cpu",
        precision="float32",
    )


def fresh(seed, width=4):
    return load_model(f"resnet9:width={width}", channels=1, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base, two that were fine-tuned from it, and one that was trained apart on the same split."""
    folder = tmp_path_factory.mktemp("networks")
    fitted(fresh(1), 1).save(folder / "base.safetensors")
    base = Checkpoint.load(folder / "base.safetensors")
    for name, threat in (("clean", "clean"), ("eps16", "Linf 16/255")):
        fitted(base, 5, threat, lr=0.02, epochs=2).save(folder / f"{name}.safetensors")
    fitted(fresh(2), 2).save(folder / "apart.safetensors")
    return folder


@pytest.fixture(scope="module")
def related(folder):
    return [folder / "clean.safetensors", folder / "eps16.safetensors"]


def checked(files, **chosen):
    return check(files, **({"data": DIGITS.val, "samples": SAMPLES, "device": "cpu"} | chosen))


def changed(checkpoint, tensors):
    return replace(checkpoint, tensors={**checkpoint.tensors, **tensors})


def small(seed=0, *, normed=True):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4) if normed else nn.GroupNorm(2, 4)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 10))
    if normed:
        model[1].num_batches_tracked += 1
        model[1].running_mean += torch.rand(4)
    return Checkpoint.of(model, {"data": DIGITS.record})


# what lies between


def test_fine_tuned_networks_can_be_mixed(related):
    found = checked(related)
    assert found.soupable
    assert found.problems == found.warnings == []
    assert found.split == "same"
    assert found.geometry.base.endswith("base.safetensors")
    assert found.pairs[0].curves["clean"].share(10) < 0.1
    assert found.pairs[0].curves["clean"].drop < 0.05


def test_networks_that_were_trained_apart_cannot(folder, related):
    found = checked([related[0], folder / "apart.safetensors"])
    assert not found.soupable
    (problem,) = found.problems
    assert "does not share a basin" in problem
    assert "clean.safetensors and " in problem
    assert "apart.safetensors" in problem
    assert found.pairs[0].curves["clean"].share(10) > 0.7
    assert found.pairs[0].curves["clean"].drop > 0.3
    assert min(found.pairs[0].curves["clean"].accuracy[::4]) > 0.7
    assert any("no common ancestor is known" in warning for warning in found.warnings)
    assert any("the cosine of their weights" in warning for warning in found.warnings)


def test_the_curves_are_those_of_the_soups(folder, related):
    files = [related[0], folder / "apart.safetensors"]
    curve = checked(files).pairs[0].curves["clean"]
    for t, loss, accuracy in zip(ALONG, curve.loss, curve.accuracy, strict=True):
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


def test_a_threat_adds_the_curve_under_attack(related):
    found = checked(related, threat=LINF)
    assert list(found.pairs[0].curves) == ["clean", LINF]
    clean, robust = found.pairs[0].curves.values()
    assert all(r > c for r, c in zip(robust.loss, clean.loss, strict=True))
    half = mix(related, [0.5, 0.5], buffers="average").network()
    direct = robust_loss(
        half, DIGITS.val.first(SAMPLES), soupability.ThreatModel.parse(LINF), steps=10
    )
    assert (robust.loss[2], robust.accuracy[2]) == pytest.approx(direct, rel=1e-4)


def test_only_the_farthest_pairs_are_walked_along(folder, related):
    seen = []
    found = checked(
        [*related, folder / "apart.safetensors"],
        pairs=1,
        on_progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen == [(done, 5) for done in range(1, 6)]
    assert len(found.pairs) == 3
    assert found.measured == 1
    far = max(found.pairs, key=lambda pair: pair.distance)
    assert [bool(pair.curves) for pair in found.pairs] == [pair is far for pair in found.pairs]
    assert 2 in (far.a, far.b)


def test_a_foreign_file_is_run_by_the_network_given(tmp_path, related):
    for path in related:
        state = {f"module.{name}": tensor for name, tensor in Checkpoint.load(path).tensors.items()}
        torch.save({"state_dict": state}, tmp_path / f"{path.stem}.pth")
    network = fresh(9).train()
    before = copy.deepcopy(network.state_dict())
    files = [tmp_path / f"{path.stem}.pth" for path in related]
    found = checked(files, network=network)
    assert found.pairs[0].curves == checked(related).pairs[0].curves
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ModelError, match="does not record its network"):
        checked(files)
    assert check(files).pairs[0].distance == pytest.approx(check(related).pairs[0].distance)


def test_half_precision_is_judged_in_float32(related):
    files = [Checkpoint.load(path) for path in related]
    half = [
        replace(
            f,
            tensors={n: t.bfloat16() if t.is_floating_point() else t for n, t in f.tensors.items()},
        )
        for f in files
    ]
    found = checked(half)
    assert not found.problems
    assert found.pairs[0].curves["clean"].loss == pytest.approx(
        checked(files).pairs[0].curves["clean"].loss, rel=0.1
    )
    assert found.cost.bytes[0] < 0.51 * checked(files).cost.bytes[0]


def test_a_network_that_guesses_is_named(related):
    one = Checkpoint.load(related[0])
    lost = changed(one, {"linear.weight": torch.zeros_like(one.tensors["linear.weight"])})
    assert any(
        lost.name in warning and "guessing" in warning for warning in checked([one, lost]).warnings
    )


def test_a_soup_that_answers_nan_is_a_problem():
    one, two = small(0), small(1)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10)
    )
    broken = changed(two, {"1.running_var": torch.full((4,), -1.0)})
    found = checked([one, broken], network=network)
    assert any("1.running_var" in problem and "below 0" in problem for problem in found.problems)
    assert any("does not share a basin" in problem for problem in found.problems)
    assert math.isinf(found.pairs[0].curves["clean"].barrier)
    json.dumps(found.to_json(), allow_nan=False)


# the barrier


def test_the_barrier_of_known_curves():
    tent = Curve((1.0, 2.0, 3.0, 2.0, 1.0), (0.9, 0.8, 0.5, 0.8, 0.9))
    assert tent.barrier == 2
    assert tent.drop == pytest.approx(0.4)
    assert tent.share(10) == pytest.approx(2 / (math.log(10) - 1))
    valley = Curve((1.0, 0.5, 0.5, 0.5, 1.0), (0.5, 0.6, 0.6, 0.6, 0.5))
    assert valley.barrier == valley.drop == 0
    assert str(valley.drop) == "0.0"


@given(st.lists(st.floats(0, 10), min_size=5, max_size=5), st.floats(-5, 5), st.floats(-5, 5))
def test_the_barrier_is_none_of_the_line_and_has_no_direction(loss, at_0, at_1):
    curve = Curve(tuple(loss), tuple(loss))
    tilted = Curve(
        tuple(v + (1 - t) * at_0 + t * at_1 for t, v in zip(ALONG, loss, strict=True)),
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
def test_the_thresholds(loss, accuracy, expected):
    """The ends lose 0.3, so 2 nats part them from guessing among 10 classes."""
    curve = Curve((0.3, 0.3, loss, 0.3, 0.3), (0.9, 0.9, accuracy, 0.9, 0.9))
    found = list(soupability._judge_pair("a and b", {"clean": curve}, 10))
    assert [kind for kind, _ in found] == expected


def test_robust_accuracy_below_the_line_is_a_warning():
    flat = Curve((0.3,) * 5, (0.9,) * 5)
    for half, expected in ((0.45, 0), (0.35, 1)):
        found = list(
            soupability._judge_pair(
                "a and b", {"clean": flat, LINF: Curve((1.0,) * 5, (0.5, 0.5, half, 0.5, 0.5))}, 10
            )
        )
        assert [kind for kind, _ in found] == ["warning"] * expected


# distances


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
def test_gram_is_that_of_the_whole_vectors(n, numbers, seed):
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
        patch.setattr(geometry, "NUMBERS", numbers)
        got = gram(files[:-1], files[-1], list(shapes))
    assert torch.allclose(got, flat @ flat.T, rtol=1e-10, atol=1e-10)


def test_distances_take_little_memory(monkeypatch):
    files = [Checkpoint({"w": torch.randn(64, 100)}) for _ in range(4)]
    real, largest = torch.stack, []

    def watched(tensors, *rest):
        whole = real(tensors, *rest)
        largest.append(whole.numel())
        return whole

    monkeypatch.setattr(geometry, "NUMBERS", 2000)
    monkeypatch.setattr(torch, "stack", watched)
    gram(files[:-1], files[-1], ["w"])
    assert max(largest) <= 2000
    assert sum(largest) == 4 * 6400


def vector(checkpoint):
    return torch.cat(
        [checkpoint.tensors[name].reshape(-1).double() for name in checkpoint.parameters]
    )


def test_task_vectors_are_measured_from_the_base(folder, related):
    base, one, two = (
        vector(Checkpoint.load(path)) for path in (folder / "base.safetensors", *related)
    )
    for given_base in (None, folder / "base.safetensors"):
        found = check(related, base=given_base)
        (pair,) = found.pairs
        assert found.geometry.norms == pytest.approx(
            [float((one - base).norm()), float((two - base).norm())]
        )
        assert found.geometry.relative == pytest.approx(
            [v / float(base.norm()) for v in found.geometry.norms]
        )
        assert pair.distance == pytest.approx(float((one - two).norm()))
        assert pair.relative == pytest.approx(float((one - two).norm() / base.norm()))
        assert pair.cosine == pytest.approx(
            float(torch.cosine_similarity(one - base, two - base, dim=0))
        )
        assert pair.curves == {}


def test_without_a_base_the_weights_are_measured():
    items = [small(seed) for seed in range(3)]
    found = check(items)
    for pair in found.pairs:
        one, two = vector(items[pair.a]), vector(items[pair.b])
        assert pair.distance == pytest.approx(float((one - two).norm()))
        assert pair.relative == pytest.approx(
            float((one - two).norm() / ((one @ one + two @ two) / 2).sqrt())
        )
        assert pair.cosine == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)))
    assert [(pair.a, pair.b) for pair in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert found.geometry.base is None
    assert found.soupable
    assert "no common ancestor is known" in found.warnings[0]


def test_an_ancestor_that_is_not_beside_the_files_is_named(tmp_path, related):
    for path in related:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = check([tmp_path / path.name for path in related])
    assert found.geometry.base is None
    (warning,) = found.warnings
    assert "base.safetensors" in warning
    assert "--base" in warning


def test_the_base_itself_has_no_cosine(folder, related):
    found = check([folder / "base.safetensors", *related])
    assert [pair.cosine is None for pair in found.pairs] == [True, True, False]
    assert found.geometry.norms[0] == 0
    json.dumps(found.to_json(), allow_nan=False)


# what the files hold


def test_all_differences_are_told_and_nothing_is_mixed(related):
    first = Checkpoint.load(related[0])
    other = dict(first.tensors)
    gone = other.pop("prep.1.bias")
    other["linear.weight"] = other["linear.weight"].double()
    other["prep.0.weight"] = torch.zeros(9, 1, 3, 3)
    other["new.weight"] = torch.zeros(2)
    found = checked([first, first, replace(first, tensors=other, path=None)])
    ((name, told),) = found.differences.items()
    shape = tuple(other["linear.weight"].shape)
    assert sorted(told) == [
        f"linear.weight: got {shape} torch.float64, expected {shape} torch.float32",
        "new.weight: got (2,) torch.float32, expected no such tensor",
        "prep.0.weight: got (9, 1, 3, 3) torch.float32, expected (4, 1, 3, 3) torch.float32",
        f"prep.1.bias: got no such tensor, expected {tuple(gone.shape)} torch.float32",
    ]
    assert name in found.problems[0]
    assert found.geometry is None
    assert found.statistics is None
    assert (found.pairs, found.measured) == ([], 0)
    assert "4 tensors differ" in found.problems[0]
    assert str(related[0]) in found.problems[0]


def test_the_text_names_ten_differences_and_counts_the_others():
    found = check([Checkpoint.of(fresh(1)), Checkpoint.of(fresh(1, width=2))])
    ((_, differences),) = found.differences.items()
    assert len(differences) > 20
    assert found.problems[0].count("expected (") == 10
    assert f"and {len(differences) - 10} more" in found.problems[0]


def test_a_duplicate_is_a_warning(related):
    found = checked([related[0], related[1], related[0]])
    assert found.duplicates == [[0, 2]]
    assert found.soupable
    (warning,) = found.warnings
    assert "the same weights 2 times" in warning
    assert found.pairs[1].distance < 1e-5
    assert found.pairs[1].curves["clean"].barrier < 1e-6


def of_split(weights, **record):
    return small(weights).with_provenance(data={**DIGITS.record, **record})


def test_other_splits_are_a_problem():
    found = check([of_split(0), of_split(1, split_digest="0" * 64, seed=7)])
    assert found.split == "different"
    (problem,) = found.problems
    assert "no validation sample is fresh to all" in problem
    assert "seed 7" in problem
    assert check([of_split(0), of_split(1, digest="other", name="cifar10")]).split == "different"
    assert (
        check([of_split(0, split_digest="several"), of_split(1, split_digest="several")]).split
        == "different"
    )


def test_a_file_without_a_record_leaves_the_split_unknown():
    foreign = replace(small(1), provenance={})
    found = check([of_split(0), foreign])
    assert found.split == "unknown"
    assert found.soupable
    assert any(
        foreign.name in warning and "no record of the samples" in warning
        for warning in found.warnings
    )
    assert (
        check([of_split(0), foreign, of_split(2, seed=7, split_digest="0" * 64)]).split
        == "different"
    )


def test_buffers_that_are_not_averaged_must_agree(related):
    one = Checkpoint.load(related[0])
    name = next(n for n in one.tensors if n.startswith("normalize."))
    found = check([one, changed(one, {name: one.tensors[name] + 1})])
    assert any(name in warning and "not averaged" in warning for warning in found.warnings)
    outside = one.with_provenance(
        network={**one.provenance["network"], "normalize": [[0.5], [0.5]]}
    )
    assert any("normalises its input" in warning for warning in check([one, outside]).warnings)


# running statistics


def statistics_of(**tensors):
    return changed(
        small(1), {f"1.{name}": torch.as_tensor(value) for name, value in tensors.items()}
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
def test_statistics_that_are_broken_are_named(tensors, kind, text):
    broken = statistics_of(**tensors)
    found = check([small(0), broken])
    told = {"problem": found.problems, "warning": found.warnings}[kind]
    assert any(broken.name in line and "1." in line and text in line for line in told)
    assert found.soupable == (kind == "warning")


def test_the_difference_of_statistics():
    one, two = small(0), statistics_of(running_var=[3.0] * 4)
    two = changed(two, {"1.running_mean": one.tensors["1.running_mean"]})
    found = check([one, two]).statistics
    assert (found.layers, found.tensor, found.difference) == (
        1,
        "1.running_var",
        pytest.approx(0.5),
    )
    shifted = changed(one, {"1.running_mean": one.tensors["1.running_mean"] + 3})
    found = check([one, shifted]).statistics
    assert (found.tensor, found.difference) == ("1.running_mean", pytest.approx(1.5))


def test_networks_without_batchnorm_say_so():
    found = check([small(0, normed=False), small(1, normed=False)])
    assert (found.statistics.layers, found.statistics.difference) == (0, None)
    assert found.soupable


# one file, none, wrong ones


def test_one_file_alone_works(related):
    found = checked(related[:1])
    assert found.soupable
    assert found.pairs == []
    assert "one file alone" in found.warnings[0]


def test_what_is_refused(tmp_path, related, folder):
    with pytest.raises(CheckpointError, match="got no checkpoint, expected at least one"):
        check([])
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        check([*related, tmp_path / "gone.safetensors"])
    for wrong in ({"samples": 0}, {"pairs": 0}, {"threat": "Linf -1"}):
        with pytest.raises(RequestError):
            checked(related, **wrong)
    with pytest.raises(IngredientMismatch, match="not the same network"):
        check(related, base=small(0))


# cost, JSON, command line


def test_cost_counts_bytes_and_seconds(related):
    found = checked(related).cost
    tensors = Checkpoint.load(related[0]).tensors
    assert found.bytes == (sum(t.nbytes for t in tensors.values()),) * 2
    assert found.on_disk == tuple(path.stat().st_size for path in related)
    assert found.largest_layer == ("residual3.0.0.weight", tensors["residual3.0.0.weight"].nbytes)
    assert found.layers == len(Checkpoint.load(related[0]).parameters)
    assert 0 < found.step_seconds < 60
    assert check(related).cost.step_seconds is None


def test_the_json_holds_the_answer(related):
    found = checked(related, threat=LINF)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["soupable"] is True
    assert content["problems"] == content["warnings"] == []
    curve = content["pairs"][0]["curves"][LINF]
    assert curve["t"] == list(ALONG)
    assert curve["barrier"] == found.pairs[0].curves[LINF].barrier
    assert len(curve["loss"]) == len(curve["accuracy"]) == 5


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["check", *map(str, arguments)])
    return end.value.code


def test_the_command_says_yes(related, capsys, monkeypatch):
    monkeypatch.setattr(stdout, "width", 200)
    assert run(*related, "--data", "digits", "--threat", LINF, "--samples", SAMPLES) == 0
    said = capsys.readouterr().out
    assert said.startswith("these 2 can be mixed\n")
    for text in (
        "eps16",
        "barrier, clean",
        f"accuracy drop, {LINF}",
        "BatchNorm: 8 layers",
        "a step of learn",
        "base.safetensors",
    ):
        assert text in said, text


def test_the_command_says_no_with_exit_code_3(folder, related, capsys):
    assert run(*related, folder / "apart.safetensors", "--data", "digits", "--json") == 3
    content = json.loads(capsys.readouterr().out)
    assert content["soupable"] is False
    assert len(content["problems"]) == 2
    assert (
        run(related[0], folder / "apart.safetensors", "--data", "digits", "--samples", SAMPLES) == 3
    )
    said = capsys.readouterr().out
    assert said.startswith("cannot be mixed: ")
    assert "warning: no common ancestor" in said


def test_the_command_without_data_says_what_it_did_not_do(related, capsys):
    assert run(*related) == 0
    assert "as far as their weights tell; --data" in capsys.readouterr().out
    assert run(*related, "--threat", LINF) == 2
    assert "give --data" in capsys.readouterr().err

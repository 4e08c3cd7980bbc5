"""Arguments of other types: what is plain is taken, the rest ends in one line."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import robustsoup as rs

NET = rs.load_model("resnet9:width=2", channels=1)
STATE = NET.state_dict()
CALLS = {
    "evaluate None": lambda data: rs.evaluate(None, data.test),
    "evaluate without threats": lambda data: rs.evaluate(NET, data.test, None),
    "train None": lambda data: rs.train(None, data.train),
    "train without a threat": lambda data: rs.train(NET, data.train, threat=None),
    "mix None": lambda data: rs.mix(None, [1]),
    "mix a path": lambda data: rs.mix("a.pth", [1]),
    "mix a list of None": lambda data: rs.mix([None], [1]),
    "mix without coefficients": lambda data: rs.mix([NET], None),
    "mix with a name as network": lambda data: rs.mix([NET], [1], network="resnet9"),
    "learn None": lambda data: rs.learn(None, data.train),
    "search None": lambda data: rs.search(None, data.val, ["clean"]),
    "search without threats": lambda data: rs.search([NET], data.val, None),
    "check None": lambda data: rs.check(None),
    "check a path": lambda data: rs.check("a.pth"),
    "landscape None": lambda data: rs.landscape(None, data.val, threat="clean", buffers="average"),
    "load None": lambda data: rs.Checkpoint.load(None),
    "mix in another precision": lambda data: rs.mix([NET], [1], precision="half"),
    "mix on half a sample": lambda data: rs.mix([NET], [1], calibrate_samples=0.5),
    "a checkpoint of a list": lambda data: rs.Checkpoint.of([1]),
    "a checkpoint of text": lambda data: rs.Checkpoint.of({"a": "b"}),
}


@pytest.fixture(scope="module")
def digits():
    return rs.load_data("digits")


@pytest.mark.parametrize("name", CALLS)
def test_other_types_end_in_one_line(digits, name):
    with pytest.raises(rs.RobustsoupError) as caught:
        CALLS[name](digits)
    assert "got" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("source", [NET, STATE, {"state_dict": STATE, "epoch": 3}])
def test_networks_and_state_dicts_are_checkpoints(source):
    soup = rs.mix([source, source], [0.5, 0.5])
    assert torch.equal(soup.tensors["linear.weight"], STATE["linear.weight"])
    taken = rs.Checkpoint.of(source)
    fresh = rs.load_model("resnet9:width=2", channels=1, seed=5)
    taken.load_into(fresh)
    assert torch.equal(fresh.linear.weight, NET.linear.weight)


def test_one_threat_is_a_list_of_one(digits):
    one = rs.evaluate(NET, digits.test, "Linf 1/255", samples=8, steps=1)
    assert list(one.accuracy) == ["clean", "Linf 1/255"]


WRONG_VALUES = {
    "samples 8.0": lambda data: evaluate(data, samples=8.0),
    "samples in a tensor of floats": lambda data: evaluate(data, samples=torch.tensor(8.0)),
    "samples as text": lambda data: evaluate(data, samples="8"),
    "samples true": lambda data: evaluate(data, samples=True),
    "subset 4.0": lambda data: evaluate(data, subset=4.0),
    "device None": lambda data: evaluate(data, device=None),
    "settings of another class": lambda data: evaluate(data, settings=rs.TrainSettings()),
    "settings as a mapping": lambda data: evaluate(data, settings={"steps": 2}),
    "no attack": lambda data: evaluate(data, attack=None),
    "no method": lambda data: rs.SearchSettings(method=None),
    "a pool of text": lambda data: evaluate(data, pool=["a.json"]),
    "after a path": lambda data: evaluate(data, after="a.json"),
    "compare paths": lambda data: rs.compare("a.json", "b.json"),
    "no images": lambda data: evaluate((data.images[:0], data.labels[:0])),
    "a threat in an array of no dimension": lambda data: evaluate(
        data, threats=np.array("Linf 1/255")
    ),
    "a radius as text": lambda data: rs.ThreatModel("Linf", "8/255"),
    "a radius of None": lambda data: rs.ThreatModel("Linf", None),
    "two lists as requirements": lambda data: (
        rs.SearchSettings(require=[["clean", 0.5]])
        and rs.select([1], maximise="clean", require=[["clean", 0.5]])
    ),
    "learning settings as a mapping": lambda data: rs.search(
        [NET, NET], data, ["clean"], samples=8, learn_settings={"epochs": 1}
    ),
}


def evaluate(data, **changes):
    return rs.evaluate(NET, data, **{"samples": 8, "steps": 1, **changes})


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values_end_in_one_line(digits, name):
    with pytest.raises(rs.RobustsoupError, match=r"got|requested|cannot be used"):
        WRONG_VALUES[name](digits.test)


def test_numbers_of_numpy_become_plain_ones(digits, tmp_path):
    changes = {"threats": ["Linf 1/255"], "samples": 8, "steps": 1, "seed": 3}
    plain = rs.evaluate(NET, digits.test, **changes)
    numbers = {"samples": np.int64(8), "steps": np.int32(1), "seed": np.uint8(3)}
    evaluation = rs.evaluate(NET, digits.test, **{**changes, **numbers})
    assert torch.equal(evaluation.hits()["Linf 1/255"], plain.hits()["Linf 1/255"])
    evaluation.save(tmp_path / "a.json")
    assert rs.Evaluation.load(tmp_path / "a.json").record["seed"] == 3
    settings = rs.TrainSettings(lr=np.float32(0.5), epochs=np.int64(2), nesterov=np.True_)
    assert [type(value) for value in (settings.lr, settings.epochs)] == [float, int]
    assert settings.nesterov is True
    assert rs.load_model("resnet9:width=2", channels=np.int64(1), seed=np.int64(2)) is not None
    assert rs.load_data("digits", seed=np.int64(1)).record["seed"] == 1


def test_records_hold_plain_numbers_for_those_of_numpy(digits):
    one, two, eight = np.int64(1), np.int32(2), np.int16(8)
    network, items = linear(), [rs.Checkpoint.of(linear(seed)) for seed in range(2)]
    few, threat = digits.train.first(8), {"threat": "Linf 1/255", "attack_steps": one}
    data = rs.Data.from_tensors(digits.test.images, digits.test.labels, seed=two)
    recalibrate = {"buffers": "recalibrate-adversarial", "calibrate_samples": eight, "seed": two}
    kept: list[int] = []
    short = {"epochs": 1, "attack_steps": 1, "batch_size": 4}
    rs.train(network, few, checkpoint_every=one, on_checkpoint=lambda n, _: kept.append(n), **short)
    assert kept == [1]
    ends = rs.train_subspace(
        network, few, ["Linf 1/255", "clean"], at_ends=np.float32(0.5), **short
    )
    for record in (
        data.record,
        rs.evaluate(network, few, "Linf 1/255", steps=1, subset=two).record,
        rs.mix(
            items, [1, 0], calibrate_on=few, network=network, **threat, **recalibrate
        ).provenance,
        rs.merge(items, "fisher", data=few, network=network, **threat, **recalibrate).provenance,
        ends[0].provenance,
    ):
        assert json.loads(json.dumps(record))


def test_one_evaluation_is_a_pool_of_one(digits):
    kept = evaluate(digits.test, threats="Linf 1/255", keep_points=True)
    pooled = evaluate(digits.test, threats="Linf 1/255", pool=kept)
    assert "pool" in pooled.record["broken_by"]


def test_attacks_work_in_the_callers_inference_mode(digits):
    x, y = digits.test.images[:8].float() / 255, digits.test.labels[:8]
    expected = rs.apgd(NET, x, y, "Linf 8/255", steps=2)
    trained = rs.apgd_train(NET, x, y, "Linf 8/255")
    many_x, many_y = x.repeat(8, 1, 1, 1), y.repeat(8)  # divided among the cores
    evaluation = evaluate(digits.test, threats="Linf 8/255")
    assert not torch.equal(trained, x)
    with torch.inference_mode():
        assert torch.equal(rs.apgd_train(NET, x * 1, y * 1, "Linf 8/255"), trained)
        assert not torch.equal(rs.apgd_train(NET, many_x * 1, many_y * 1, "Linf 8/255"), many_x)
        assert torch.equal(rs.apgd(NET, x * 1, y * 1, "Linf 8/255", steps=2), expected)
        assert rs.square(NET, x * 1, y * 1, "Linf 8/255", n_queries=2).shape == x.shape
        again = evaluate(digits.test, threats="Linf 8/255")
        inner = rs.load_model("resnet9:width=2", channels=1)
        with pytest.raises(rs.RobustsoupError, match="inference_mode"):
            rs.apgd(inner, x, y, "Linf 8/255", steps=2)
    assert torch.equal(again.hits()["Linf 8/255"], evaluation.hits()["Linf 8/255"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_functions_that_take_gradients_do_so_in_any_mode_of_the_caller(digits, mode):
    data = digits.train.first(32)
    settings = {"epochs": 1, "lr": 0.1, "attack_steps": 1, "batch_size": 16}
    ends = ["Linf 16/255", "Linf 1/255"]
    attack = {"threat": "Linf 16/255", "attack_steps": 1}

    def compute(network):
        items = [rs.train(network, data, threat=end, **settings) for end in ends]
        yield from (item.digest for item in items)
        yield from (end.digest for end in rs.train_subspace(network, data, ends, **settings))
        yield rs.learn(items, data, **settings).alpha
        yield rs.learn_dial(items, data, by="objective", **settings).at(0.5).alpha
        for method in ("fisher", "regmean"):
            yield rs.merge(items, method, data=data, **attack).digest
        policy = {"buffers": "recalibrate-adversarial", "calibrate_on": data}
        yield rs.mix(items, [0.5, 0.5], **policy, **attack).digest

    expected = list(compute(NET))
    with mode():
        inner = rs.load_model("resnet9:width=2", channels=1)
        inner.load_state_dict(STATE)
        found = list(compute(inner))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def linear(seed=0):
    """A network of the digits that takes little time, with BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_diagnoses_attack_in_any_mode_of_the_caller(digits, mode):
    few, network = {"threat": "Linf 16/255", "samples": 4}, linear()
    with mode():
        items = [rs.Checkpoint.of(linear(seed)) for seed in range(3)]
        checked = rs.check(items, data=digits.val, network=network, **few)
        layers = rs.map_layers(*items[:2], digits.val, network=network, **few)
        plane = {"points": 2, "attack_steps": 1, "buffers": "base", **few}
        measured = rs.landscape(items, digits.val, network=network, **plane)
    assert checked.samples == layers.samples == measured.samples == 4
    assert len(measured.loss) == 2


def test_samples_that_choose_a_soup_do_not_report_it(digits):
    val = digits.val
    with pytest.raises(rs.RobustsoupError, match="report_on: got 8 samples of val that choose"):
        rs.search([NET, NET], val, ["clean"], samples=8, step=0.5, report_on=val)
    others = val.take(torch.arange(len(val)) >= 8).first(8)
    found = rs.search([NET, NET], val, ["clean"], samples=8, step=0.5, report_on=others)
    assert found.answer.fresh_split == "val"

"""Arguments of other types: what is plain is taken, the rest ends in one line."""

import pytest
import torch

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

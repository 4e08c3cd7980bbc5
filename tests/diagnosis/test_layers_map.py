"""map_layers: every block is swapped alone, in both directions, and measured as it is."""

import json

import pytest
from command_line import run
from learning_helpers import SmallNetwork, small_ingredients
from training_helpers import DATA, LINF, fresh_network

from robustsoup.attacks.forward import frozen_eval
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.diagnosis.barriers import ATTACK_STEPS
from robustsoup.diagnosis.layers import map_layers
from robustsoup.errors import IngredientMismatch, RequestError
from robustsoup.soups.merging import merge
from robustsoup.threats import CLEAN
from robustsoup.training.adversarial_loss import measure_robust_loss

FEW = {"samples": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def pair():
    network, items = small_ingredients(2)
    return network, items


@pytest.fixture(scope="module")
def layers(pair):
    network, items = pair
    return map_layers(*items, DATA, threat=LINF, network=network, granularity="module", **FEW)


def accuracy(checkpoint, network, threat):
    checkpoint.load_into(network)
    with frozen_eval(network):
        return measure_robust_loss(network, DATA.first(32), threat, steps=ATTACK_STEPS)[1]


def test_each_block_is_swapped_in_both_directions(pair, layers):
    _, (a, b) = pair
    assert [swap.block for swap in layers.swaps] == ["conv1", "norm1", "conv2", "norm2", "linear"]
    assert sum(swap.numbers for swap in layers.swaps) == sum(
        a.tensors[name].numel() for name in a.parameters
    )
    for swap in layers.swaps:
        for items, got in (((a, b), swap.into_first), ((b, a), swap.into_second)):
            soup = merge(items, "swap", [0, 1], blocks=swap.parameters)
            for threat, key in ((CLEAN, "clean"), (LINF, str(LINF))):
                assert got[key].value == accuracy(soup, SmallNetwork(), threat)


def test_the_map_holds_both_ends_and_tells_the_change(pair, layers):
    _, (a, b) = pair
    for item, ends in ((a, layers.first), (b, layers.second)):
        assert ends["clean"].value == accuracy(item, SmallNetwork(), CLEAN)
        assert ends[str(LINF)].n == layers.samples == 32
    swap = layers.swaps[0]
    change = layers.change(swap, "clean")
    assert change[0] == swap.into_first["clean"].value - layers.first["clean"].value
    content = json.loads(json.dumps(layers.to_json()))
    assert content["swaps"][0]["change"]["clean"] == list(change)
    assert len(layers.rows()[0]) == len(layers.columns()) == 6
    assert "conv" in repr(layers) or "norm" in repr(layers) or "linear" in repr(layers)


def test_swapping_equal_checkpoints_changes_nothing(pair):
    network, (item, _) = pair
    layers = map_layers(item, item, DATA, network=network, **FEW)
    changes = {layers.change(swap, "clean") for swap in layers.swaps}
    assert changes == {(0.0, 0.0)}
    assert list(layers.first) == ["clean"]


def test_wrong_requests_are_refused(pair):
    network, (item, other) = pair
    with pytest.raises(RequestError, match="got samples 0"):
        map_layers(item, other, DATA, network=network, samples=0)
    with pytest.raises(RequestError, match='granularity: got "stage"'):
        map_layers(item, other, DATA, network=network, granularity="stage", **FEW)
    with pytest.raises(IngredientMismatch):
        map_layers(item, Checkpoint.of(fresh_network()), DATA, **FEW)


def test_check_layers_prints_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        Checkpoint.of(fresh_network(seed=seed)).save(f"{seed}.safetensors")
    command = ("check", "0.safetensors", "1.safetensors")
    data = ("--data", "digits", "--threat", "Linf 32/255", "--samples", 16, "--layers")
    assert run(*command, *data, "--json") in (0, 3)
    content = json.loads(capsys.readouterr().out)["layers"]
    assert content["names"] == ["0.safetensors", "1.safetensors"]
    assert {"clean", "Linf 32/255"} == set(content["swaps"][0]["change"])
    assert run(*command, *data) in (0, 3)
    assert "what a swapped block changes, in points" in capsys.readouterr().out
    assert run(*command, "--layers") == 2
    assert "--layers: swaps blocks between 2 checkpoints" in capsys.readouterr().err

"""Records of checkpoints: malformed ones are refused in one line, and none of them names code."""

import contextlib
import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plugins import write_plugin
from safetensors.torch import save_file

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import record_network
from robustsoup.checkpoints.provenance import check_leakage
from robustsoup.checkpoints.record import ENTRIES
from robustsoup.data import load_data
from robustsoup.diagnosis.check import check
from robustsoup.diagnosis.landscape import landscape
from robustsoup.errors import CheckpointError, ModelError, RobustsoupError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import NetworkSettings, load_model
from robustsoup.soups.learning import learn
from robustsoup.soups.mixing import mix
from robustsoup.soups.search import search
from robustsoup.training.train import train

SPEC = "resnet9:width=2"
DATA = load_data("digits")
MODEL = load_model(SPEC, channels=1)
NETWORK = {"spec": SPEC, "classes": 10, "channels": 1, "normalize": None}
SKETCH = {
    "name": "digits",
    "split": "train",
    "digest": "ab",
    "images": 3,
    "smallest": [f"{number:016x}" for number in range(3)],
}
SPLIT = {"name": "digits", "digest": "ab", "split_digest": "cd", "seed": 0}
OWN_NETWORK = """
from torch import nn

def load(classes=10, channels=1, width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, width), nn.Linear(width, classes))
"""


def write(path, record, model=MODEL):
    """Write a file with the weights of a network and any record."""
    save_file(dict(model.state_dict()), path, metadata={"robustsoup": json.dumps(record)})
    return path


def use(path):
    """Do everything that reads the record of a file."""
    for work in (
        lambda: Checkpoint.load(path).network(),
        lambda: Checkpoint.load(path).parameters,
        lambda: mix([path, path], [0.5, 0.5]),
        lambda: mix([path, path], [0.5, 0.5], buffers="base"),
        lambda: check_leakage([Checkpoint.load(path)], DATA.val, allow=True),
        lambda: check([path, path]),
        lambda: record_network(Checkpoint.load(path), NetworkSettings(SPEC, 10, 1)),
    ):
        with contextlib.suppress(RobustsoupError):
            work()


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"network": [1]}, "network: got [1], expected a table"),
        ({"network": "x"}, "network: got 'x', expected a table"),
        ({"network": {}}, "network: got [], expected the keys spec, classes, channels, normalize"),
        ({"network": {**NETWORK, "evil": 1}}, "expected the keys spec, classes"),
        ({"network": {**NETWORK, "spec": 5}}, "network.spec: got 5, expected text"),
        ({"network": {**NETWORK, "classes": "10"}}, "network.classes: got '10', expected an int"),
        ({"network": {**NETWORK, "classes": True}}, "network.classes: got True"),
        ({"network": {**NETWORK, "classes": 10**9}}, "expected an integer from 1 to 1,000,000"),
        ({"network": {**NETWORK, "channels": 0}}, "network.channels: got 0"),
        ({"network": {**NETWORK, "normalize": [0, 1]}}, "network.normalize: got 0, expected a"),
        ({"network": {**NETWORK, "normalize": "ab"}}, "network.normalize: got 'ab', expected two"),
        ({"network": {**NETWORK, "normalize": [[0.5], [0]]}}, "each std above 0"),
        ({"network": {**NETWORK, "normalize": [[0.5], [0.5, 0.5]]}}, "one number a channel"),
        ({"network": {**NETWORK, "normalize": [["a"], [0.5]]}}, "network.normalize[0]: got 'a'"),
        ({"parameters": None}, "parameters: got None, expected a list"),
        ({"parameters": "abc"}, "parameters: got 'abc', expected a list"),
        ({"parameters": [["a"]]}, "parameters[0]: got ['a'], expected text"),
        ({"parameters": ["nope"]}, "parameters[0]: got 'nope', expected the name of a tensor"),
        ({"parameters": ["prep.0.weight"] * 2}, "expected each name once"),
        ({"tied": "xy"}, "tied: got 'xy', expected a table"),
        ({"tied": {"prep.0.weight": 1}}, "tied['prep.0.weight']: got 1, expected text"),
        ({"tied": {"nope": "prep.0.weight"}}, "expected two names of one tensor"),
        ({"tied": {"prep.0.weight": "prep.0.weight"}}, "expected two names of one tensor"),
        ({"tied": {"prep.0.weight": "linear.weight"}}, "expected a tensor of shape (2, 1, 3, 3)"),
        ({"data": ["x"]}, "data: got ['x'], expected a table"),
        ({"data": {"digest": "x"}}, "data: got ['digest'], expected the keys name, digest, split"),
        ({"data": {**SPLIT, "seed": "0"}}, "data.seed: got '0', expected an integer"),
        ({"earlier_data": [SPLIT, 5]}, "earlier_data[1]: got 5, expected a table"),
        ({"fitted_images": 5}, "fitted_images: got 5, expected a list"),
        ({"fitted_images": [{**SKETCH, "images": -1}]}, "fitted_images[0].images: got -1"),
        ({"fitted_images": [{**SKETCH, "smallest": [1]}]}, "[0].smallest[0]: got 1, expected text"),
        ({"fitted_images": [{**SKETCH, "smallest": []}]}, "different ascending numbers"),
        ({"fitted_images": [{**SKETCH, "smallest": ["1"]}]}, "different ascending numbers"),
        ({"fitted_images": [{**SKETCH, "smallest": ["0" * 16] * 2}]}, "different ascending"),
        ({"fitted_images": [SKETCH] * 17}, "at most 16 sketches"),
        ({"parents": 5}, "parents: got 5, expected a list"),
        ({"parents": [{"file": "a"}]}, "parents[0]: got ['file'], expected the keys digest"),
        ({"parents": [{"digest": "a", "file": "../b"}]}, "parents[0].file: got '../b', expected"),
        ({"parents": [{"digest": "a", "file": "/dev/zero"}]}, "the name of a file, without a"),
        ({"trained_on": 7}, "trained_on: got 7, expected a list"),
        ({"trained_on": "val"}, "trained_on: got 'val', expected a list"),
        ({"synthetic": 7}, "synthetic: got 7, expected a list"),
        ({"history": 7}, "history: got 7, expected a list"),
        ({"training": []}, "training: got [], expected a table"),
        ({"learned": 1}, "learned: got 1, expected a table"),
        ({"versions": "1"}, "versions: got '1', expected a table"),
        ({"coefficients": ["a"]}, "coefficients[0]: got 'a', expected a finite number"),
        ({"coefficients": {"a": 1}}, "coefficients['a']: got 1, expected a list"),
        ({"kind": []}, "kind: got [], expected text"),
        ({"statistics": []}, "statistics: got [], expected a table"),
        (
            {"statistics": {"no": "prep.0.weight"}},
            "statistics['no']: got 'prep.0.weight', expected",
        ),
    ],
)
def test_a_malformed_record_is_refused_when_the_file_is_read(tmp_path, entries, text):
    path = write(tmp_path / "a.safetensors", entries)
    for read in (Checkpoint.load, Checkpoint.open):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert text in str(caught.value)
        assert str(caught.value).startswith(f"{path}: record: ")
        assert "\n" not in str(caught.value)
    use(path)


RECORD = {
    "network": NETWORK,
    "parameters": [name for name, _ in MODEL.named_parameters()],
    "tied": {},
    "statistics": {"prep.1.running_mean": "prep.0.weight"},
    "data": {**SPLIT, "val": 10, "classes": ["a", "b"], "mean": [0.5]},
    "earlier_data": [None, SPLIT],
    "fitted_images": [SKETCH],
    "trained_on": ["train"],
    "parents": [{"digest": "ab", "file": "b.safetensors"}, {"digest": "cd", "file": None}],
    "synthetic": [{"file": "x.npz", "digest": "ab", "images": 3}],
    "kind": "trained",
    "training": {"epochs": 3},
    "history": [{"epoch": 1, "loss": 0.5}],
    "early_stopped_at": None,
    "epoch": 2,
    "seed": 0,
    "versions": {"torch": "2"},
    "coefficients": {"a": [0.5, 0.5]},
    "learned": None,
    "buffers": {"policy": "average"},
    "merge": {"method": "ties", "base": "base.safetensors"},
    "subspace": {"shape": "line", "position": 0, "run": "ab", "ends": ["low", "high"]},
    "adapter": {"folder": "lora", "digest": "ab"},
    "warnings": ["ingredients differ"],
}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, at=()):
    """Yield the way to each value inside a record."""
    yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*at, key))


PLACES = [place for place in places({**RECORD, "parameters": RECORD["parameters"][:2]}) if place]


def changed(record, place, value):
    """Return a copy of a record with one value replaced."""
    record = copy.deepcopy(record)
    parent = record
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return record


def test_every_known_entry_is_read_as_it_was_written(tmp_path):
    assert set(RECORD) == set(ENTRIES)
    path = write(tmp_path / "a.safetensors", {**RECORD, "note": {"of": "mine"}})
    assert Checkpoint.load(path).provenance == {**RECORD, "note": {"of": "mine"}}
    assert Checkpoint.load(path).network().network_settings == NetworkSettings(SPEC, 10, 1)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.sampled_from(PLACES), value=ANY_JSON)
def test_any_value_in_any_place_is_used_or_refused_in_one_line(tmp_path, place, value):
    use(write(tmp_path / "a.safetensors", changed(RECORD, place, value)))


# networks that a record names


def hostile(tmp_path, name="hostile"):
    """Write a file whose record makes a folder if its network is built; return both paths."""
    mark = tmp_path / f"ran-{name}"
    record = {**RECORD, "network": {**NETWORK, "spec": f"os:mkdir:path={mark}"}}
    return write(tmp_path / f"{name}.safetensors", record), mark


def other_names(tmp_path, monkeypatch):
    """Specs of code of all kinds that is importable here."""
    write_plugin(tmp_path, "own_net", OWN_NETWORK)
    write_plugin(tmp_path, "own_plugin", OWN_NETWORK, "robustsoup.models", "own-plugin")
    monkeypatch.syspath_prepend(tmp_path)
    return ["own_net:load", "own_net:load:width=3", "own-plugin", "own-plugin:width=2"]


def test_a_recorded_network_that_is_not_built_in_is_refused(tmp_path, monkeypatch):
    names = [*other_names(tmp_path, monkeypatch), "os:system:command=true", ":", "", "resnet9 :a"]
    for spec in names:
        path = write(tmp_path / "a.safetensors", {"network": {**NETWORK, "spec": spec}})
        with pytest.raises(ModelError) as caught:
            Checkpoint.load(path).network()
        assert f"a.safetensors: the file names {spec!r} as its network" in str(caught.value)
        assert "--model package.module:factory" in str(caught.value)


def test_the_recorded_name_is_shown_on_one_short_line(tmp_path):
    spec = "os:system:command=" + "a\n\x1b[2J" * 1000
    path = write(tmp_path / "a.safetensors", {"network": {**NETWORK, "spec": spec}})
    with pytest.raises(ModelError, match=r"'os:system") as caught:
        Checkpoint.load(path).network()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


WORK = {
    "network": lambda path: Checkpoint.load(path).network(),
    "evaluate": lambda path: evaluate(path, DATA.val.first(8), []),
    "train": lambda path: train(path, DATA.train.first(8), threat="clean", epochs=1),
    "learn": lambda path: learn([path, path], DATA.train.first(8), threat="clean", epochs=1),
    "search": lambda path: search([path, path], DATA.val.first(8), [], allow_leakage=True),
    "mix": lambda path: mix(
        [path, path], [0.5, 0.5], buffers="recalibrate", calibrate_on=DATA.train.first(8)
    ),
    "check": lambda path: check([path, path], data=DATA.val.first(8)),
    "landscape": lambda path: landscape(
        [path, path, path], DATA.val.first(8), threat="clean", points=2
    ),
}


@pytest.mark.parametrize("name", WORK)
def test_no_function_runs_code_that_a_file_names(tmp_path, name):
    path, mark = hostile(tmp_path)
    with pytest.raises(RobustsoupError):
        WORK[name](path)
    assert not mark.exists()


def test_the_named_network_comes_before_the_record(tmp_path):
    path, mark = hostile(tmp_path)
    split = DATA.train.first(16)
    module = load_model(SPEC, channels=1)
    named = Checkpoint.load(path).with_network(SPEC)
    assert named.network_settings == NetworkSettings(SPEC, 10, 1)
    assert named.provenance["network"] == NETWORK
    assert Checkpoint.load(path).network(SPEC).network_settings == NetworkSettings(SPEC, 10, 1)
    evaluate(named, split, [])
    trained = train(named, split, threat="clean", epochs=1, batch_size=8, device="cpu")
    soups = [mix([named, named], [0.5, 0.5])]
    for more in ({"ingredients": [path, path], "network": module}, {"ingredients": [named] * 2}):
        soups.append(mix(more["ingredients"], [0.5, 0.5], network=more.get("network")))
        learn(**more, data=split, threat="clean", epochs=1, batch_size=8, device="cpu")
        search(**more, data=split, threats=[], step=0.5, allow_leakage=True, device="cpu")
    check([path, path], data=split, network=module, device="cpu")
    for item in (trained, *soups):
        assert item.provenance["network"] == NETWORK
        assert item.network().network_settings == NetworkSettings(SPEC, 10, 1)
    assert not mark.exists()


def test_constants_of_the_record_stay_with_a_named_network(tmp_path):
    record = {"network": {**NETWORK, "spec": "a.b:c", "normalize": [[0.5], [0.25]]}}
    item = Checkpoint.load(write(tmp_path / "a.safetensors", record))
    named = record_network(item, NetworkSettings(SPEC, 10, 1), named=True)
    assert named.network_settings == NetworkSettings(SPEC, 10, 1, ((0.5,), (0.25,)))
    constants = ((0.1,), (0.2,))
    named = record_network(item, NetworkSettings(SPEC, 10, 1, constants), named=True)
    assert named.network_settings.normalize == constants


def test_a_network_of_ones_own_is_built_while_the_program_that_named_it_runs(tmp_path, monkeypatch):
    spec = other_names(tmp_path, monkeypatch)[0]
    item = Checkpoint.of(load_model(spec, channels=1))
    twin = replace(item, tensors={k: v + 0.1 for k, v in item.tensors.items()})
    soup = mix([item, twin], [0.5, 0.5])
    assert soup.network().network_settings == NetworkSettings(spec, 10, 1)
    path = soup.save(tmp_path / "soup.safetensors")
    with pytest.raises(ModelError, match=f"the file names '{spec}' as its network"):
        Checkpoint.load(path).network()
    named = Checkpoint.load(path).with_network(spec)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(named.network()(x), soup.network()(x))
    assert train(named, DATA.train.first(8), threat="clean", epochs=1).network() is not None


def test_the_own_parameters_of_a_named_module_come_before_the_recorded_ones(tmp_path):
    path = write(tmp_path / "a.safetensors", {"network": NETWORK, "parameters": ["prep.0.weight"]})
    item = Checkpoint.load(path)
    assert item.with_parameters_of(MODEL).parameters == RECORD["parameters"]


@pytest.mark.parametrize("spec", ["wide_resnet:depth=6000004,width=1", "resnet9:width=60000"])
def test_a_recorded_network_of_another_size_takes_no_memory(tmp_path, spec):
    path = write(tmp_path / "a.safetensors", {"network": {**NETWORK, "spec": spec}})
    with pytest.raises(ModelError, match=r"got shape|expected an integer"):
        Checkpoint.load(path).network()

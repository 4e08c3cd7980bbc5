"""The network of a command: named by the user, else recorded by the first file that has one."""

import pytest
import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import record_network, resolve_network
from robustsoup.data import load_data
from robustsoup.errors import ModelError
from robustsoup.models import NetworkSettings, build_network, load_model

DATA = load_data("digits")
SPEC = "resnet9:width=2"
CONSTANTS = ((0.5,), (0.25,))
RECORDED = NetworkSettings(SPEC, channels=1)


def recorded(settings=RECORDED):
    return Checkpoint.of(build_network(settings))


def foreign():
    return Checkpoint(build_network(RECORDED).state_dict())


def resolved(spec=None, normalize=None, checkpoints=()):
    return resolve_network(spec, normalize=normalize, data=DATA, checkpoints=checkpoints)


def test_the_named_network_takes_its_sizes_from_the_data_and_opens_no_file():
    settings = resolved("resnet9:width=3", [[0.5], [0.25]], ["missing.safetensors"])
    assert settings == NetworkSettings("resnet9:width=3", 10, 1, CONSTANTS)


def test_the_first_file_that_records_a_network_decides(tmp_path):
    other = recorded(NetworkSettings("resnet9:width=3", channels=1))
    paths = [
        item.save(tmp_path / f"{number}.safetensors")
        for number, item in enumerate([foreign(), recorded(), other])
    ]
    assert resolved(checkpoints=paths) == RECORDED
    assert resolved(checkpoints=[foreign(), other]) == other.network_settings


def test_named_constants_override_the_recorded_ones():
    inside = NetworkSettings(SPEC, channels=1, normalize=((0.1,), (0.2,)))
    assert resolved(checkpoints=[recorded(inside)]) == inside
    overridden = resolved(normalize=CONSTANTS, checkpoints=[recorded(inside)])
    assert overridden == NetworkSettings(SPEC, channels=1, normalize=CONSTANTS)


def test_an_unknown_network_is_refused_and_the_first_file_is_named(tmp_path):
    path = foreign().save(tmp_path / "foreign.safetensors")
    for item, where in ((path, str(path)), (foreign(), "checkpoint ")):
        with pytest.raises(ModelError, match=r"does not record its network; set --model") as error:
            resolved(checkpoints=[item])
        assert str(error.value).startswith(where)
    with pytest.raises(ModelError, match="no network is named; set --model"):
        resolved()


@pytest.mark.parametrize("normalize", [[[0.5], [0.0]], [[0.5], [0.2, 0.3]], [[], []], [[0.5]]])
def test_wrong_constants_are_refused_before_a_file_is_opened(normalize):
    with pytest.raises(ModelError, match="normalize: got"):
        resolved(normalize=normalize, checkpoints=["missing.safetensors"])


def test_a_foreign_file_is_recorded_with_the_settings():
    described = record_network(foreign(), RECORDED)
    assert described.network_settings == RECORDED
    assert described.provenance["parameters"] == recorded().provenance["parameters"]


def test_a_recorded_network_stays_but_for_named_constants():
    item = recorded()
    assert record_network(item, NetworkSettings("resnet9:width=3")) == item
    changed = record_network(item, NetworkSettings("resnet9:width=3", normalize=CONSTANTS))
    assert changed.network_settings == NetworkSettings(SPEC, channels=1, normalize=CONSTANTS)
    x = torch.rand(2, 1, 8, 8)
    plain, normalized = item.network()(x), changed.network()(x)
    assert not torch.equal(plain, normalized)
    assert torch.equal(normalized, item.network()((x - 0.5) / 0.25))


def test_settings_come_back_from_their_record():
    for settings in (RECORDED, NetworkSettings("a.b:c", 3, 1, CONSTANTS)):
        assert NetworkSettings.from_record(settings.as_record()) == settings
    assert NetworkSettings.from_record({"spec": "x"}) == NetworkSettings("x", 10, 3, None)


def test_the_arguments_of_network_override_the_record():
    wide = load_model("resnet9:width=2,channels=3")
    item = Checkpoint(wide.state_dict(), {"network": RECORDED.as_record()})
    assert item.network(channels=3).prep[0].in_channels == 3
    with pytest.raises(ModelError, match=r"normalize\.mean: got shape"):
        item.network()

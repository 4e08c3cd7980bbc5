"""The network of a command: named by the user, else recorded by the first file that has one."""

import pytest
import torch
from plugins import write_plugin
from safetensors.torch import save_file
from small_data import write_images
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import (
    choose_image_size,
    describe_other_sizes,
    infer_sizes,
    record_network,
    resolve_network,
)
from robustsoup.cli.inputs import load_requested_data, make_context
from robustsoup.cli.options import DataOptions, NetworkOptions, RunOptions
from robustsoup.data import Data, load_data
from robustsoup.errors import ModelError
from robustsoup.models import NetworkSettings, build_network, load_model
from robustsoup.soups.merging import merge
from robustsoup.soups.mixing import fit_to_own_network, mix

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


def test_a_file_may_have_more_classes_than_the_labels_of_the_data():
    few = DATA.test.labels < 4
    data = Data.from_tensors(DATA.test.images[few], DATA.test.labels[few])
    for checkpoints, classes in (([foreign()], 10), ([], 4)):
        settings = resolve_network(SPEC, normalize=None, data=data, checkpoints=checkpoints)
        assert (settings.classes, settings.channels) == (classes, 1)


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


def own_sizes(num_classes=7):
    """A network that has numbers of classes and channels of its own."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, num_classes))


def sizes_of_settings(classes, channels):
    """A network that takes its numbers from the settings."""
    return nn.Sequential(nn.Linear(4, classes), nn.Conv2d(channels, 4, 3))


@pytest.mark.parametrize("given", [(10, 3), (7, 2), (7, 3)])
@pytest.mark.parametrize(
    ("spec", "model"),
    [
        (f"{__name__}:own_sizes", own_sizes()),
        (f"{__name__}:sizes_of_settings", sizes_of_settings(7, 2)),
        ("resnet9:width=2", load_model(SPEC, classes=7, channels=2)),
        ("resnet9:width=2,classes=7,channels=2", load_model(SPEC, classes=7, channels=2)),
    ],
)
def test_the_sizes_of_a_named_network_are_those_of_the_file(spec, model, given):
    found = infer_sizes(NetworkSettings(spec, *given), Checkpoint(model.state_dict()))
    assert found == NetworkSettings(spec, 7, 2)


def test_a_recorded_network_stays_but_for_named_constants():
    item = recorded()
    others = NetworkSettings("resnet9:width=3", normalize=CONSTANTS)
    assert record_network(item, others) == item
    changed = record_network(item, others, constants_named=True)
    assert changed.network_settings == NetworkSettings(SPEC, channels=1, normalize=CONSTANTS)
    x = torch.rand(2, 1, 8, 8)
    plain, normalized = item.network()(x), changed.network()(x)
    assert not torch.equal(plain, normalized)
    assert torch.equal(normalized, item.network()((x - 0.5) / 0.25))


def test_a_soup_that_was_written_under_the_names_of_files_is_fitted_again(tmp_path):
    prefixed = {f"model.{name}": tensor for name, tensor in recorded().tensors.items()}
    save_file(prefixed, tmp_path / "a.safetensors")
    item = record_network(Checkpoint.load(tmp_path / "a.safetensors"), RECORDED)
    mix([item], [1.0]).save(tmp_path / "soup.safetensors")
    soup = Checkpoint.load(tmp_path / "soup.safetensors")
    assert set(soup.tensors) == set(prefixed)
    for fitted in (record_network(soup, RECORDED), *fit_to_own_network([soup])):
        assert set(fitted.tensors) == set(recorded().tensors)
        assert fitted.parameters == recorded().parameters
        assert fitted.digest == soup.digest


RENAMING = """
from torch import nn
from robustsoup.models.network import set_file_names

def build(num_classes, in_channels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
    set_file_names(model, {"1.weight": "head.kernel", "1.bias": "head.offset"})
    return model
"""


def test_a_base_may_have_the_names_that_a_library_uses_in_files(tmp_path, monkeypatch):
    write_plugin(tmp_path, "renaming_network", RENAMING)
    monkeypatch.syspath_prepend(tmp_path)
    trained = Checkpoint.of(load_model("renaming_network:build", channels=1))
    base = Checkpoint({"head.kernel": torch.ones(10, 64), "head.offset": torch.zeros(10)})
    assert set(base.with_names_like(trained).tensors) == set(trained.tensors)
    moved = merge([trained], "task-arithmetic", base=base).provenance["merge"]["base"]
    assert moved == base.digest
    unnamed = Checkpoint(trained.tensors)
    assert base.with_names_like(unnamed) is base


def test_a_command_judges_each_file_by_its_own_constants():
    normalized = recorded(NetworkSettings(SPEC, channels=1, normalize=CONSTANTS))
    files = [normalized, recorded()]
    context = make_context(DATA, NetworkOptions(), RunOptions(device="cpu"), files)
    assert [context.record_network(item) for item in files] == files
    named = NetworkOptions(normalize=("0.1", "0.2"))
    context = make_context(DATA, named, RunOptions(device="cpu"), files)
    used = [context.record_network(item).network_settings.normalize for item in files]
    assert used == [((0.1,), (0.2,))] * 2


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


def trained_at(size, path):
    return recorded().with_provenance(data={**DATA.record, "size": size}).save(path)


def test_a_folder_is_decoded_at_the_size_that_the_first_checkpoint_records(tmp_path, capsys):
    for name in ("cats", "dogs"):
        write_images(tmp_path / "pets" / name, 10)
    source = f"folder:{tmp_path / 'pets'}"
    path = trained_at([6, 6], tmp_path / "a.safetensors")
    network = NetworkOptions()
    loaded = load_requested_data(DataOptions(data=source), network, [path])
    assert loaded.record["size"] == [6, 6]
    assert "was trained on images" not in capsys.readouterr().err
    other = trained_at([5, 5], tmp_path / "b.safetensors")
    chosen = load_requested_data(DataOptions(data=source, image_size=5), network, [other, path])
    assert chosen.record["size"] == [5, 5]
    error = " ".join(capsys.readouterr().err.split())
    assert "a.safetensors: was trained on images of 6 x 6 pixels, the data has 5 x 5" in error
    assert load_requested_data(DataOptions(data=source), network).record["size"] == [32, 32]


def test_images_with_a_size_of_their_own_keep_it_but_a_warning_names_the_other(tmp_path):
    path = trained_at([6, 6], tmp_path / "a.safetensors")
    assert choose_image_size("folder:pets", "resnet9", [foreign(), path]) == 6
    for data in ("hf:pets", "wds:pets", "digits", "mymodule:load"):
        assert choose_image_size(data, None, [path]) is None
    warning = next(describe_other_sizes([Checkpoint.open(path)], DATA))
    assert "6 x 6 pixels, the data has 8 x 8; for image files, --image-size" in warning
    same = trained_at([8, 8], tmp_path / "b.safetensors")
    assert list(describe_other_sizes([foreign(), Checkpoint.open(same)], DATA)) == []


@pytest.mark.parametrize("size", [[6, 7], [6], [True, True], [-6, -6], "66", None])
def test_a_recorded_size_that_is_no_square_decides_nothing(tmp_path, size):
    path = trained_at(size, tmp_path / "a.safetensors")
    assert choose_image_size("folder:pets", None, [path]) is None

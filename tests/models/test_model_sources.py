"""Network sources: built-in names, functions, factories in modules, and installed plugins."""

import dataclasses
import enum
import importlib.metadata
import itertools
import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from plugins import write_plugin
from torch import nn

from robustsoup.catalog import MODELS
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import describe_missing_constants
from robustsoup.checkpoints.published import PUBLISHED_CHECKPOINTS
from robustsoup.errors import ModelError
from robustsoup.models import (
    NetworkSettings,
    default_image_size,
    factory_fingerprint,
    input_settings,
    is_built_in,
    load_model,
    robustbench_networks,
    torchvision_networks,
    transformers_networks,
)
from robustsoup.models.libraries import LibrarySpec, may_be_recorded
from robustsoup.models.robustbench_networks import PUBLISHED_NETWORKS

BUILT_IN = [name for name, entry in MODELS.items() if not entry.facts.get("library")]

OWN_NETWORK = """
from torch import nn

def load(classes=10, width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes))
"""


def linear_network(classes=10, channels=3):
    """A factory at the top level of this module."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_network_in_the_catalog_can_be_built(name):
    model = load_model(f"{name}:width=1", classes=7)
    assert model.network_settings == NetworkSettings(f"{name}:width=1", classes=7)
    assert factory_fingerprint(name) is None


def lazy_network():
    """A factory of a network whose weights have no shape before its first pass."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def test_lazy_weights_are_refused_with_what_to_do():
    with pytest.raises(ModelError, match=r"has lazy weights.*calls the network once on images"):
        load_model(lazy_network)


@pytest.mark.parametrize("module", ["own_networks", "own_package.networks"])
def test_a_factory_in_a_module_gets_the_options_that_it_names(tmp_path, monkeypatch, module):
    folder = tmp_path / "own_package" if "." in module else tmp_path
    folder.mkdir(exist_ok=True)
    write_plugin(folder, module.rpartition(".")[2], OWN_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model(f"{module}:load:width=5", classes=4, channels=1)
    assert (model[1].out_features, model[2].out_features) == (5, 4)
    rebuilt = Checkpoint.of(model).network()
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(rebuilt(x), model(x))
    assert len(factory_fingerprint(f"{module}:load:width=5")) == 32


def test_an_entry_point_of_an_installed_package_is_a_network(tmp_path, monkeypatch):
    write_plugin(tmp_path, "own_network_plugin", OWN_NETWORK, "robustsoup.models", "own-net")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("own-net", classes=4)[2].out_features == 4
    model = load_model("own-net:width=6")
    assert model[1].out_features == 6
    assert Checkpoint.of(model).network()[1].out_features == 6
    assert factory_fingerprint("own-net:width=6") == factory_fingerprint("own_network_plugin:load")
    with pytest.raises(ModelError, match='did you mean "own-net"'):
        load_model("own-ned")


def test_a_function_is_a_network_and_is_recorded_by_its_module(tmp_path, monkeypatch):
    write_plugin(tmp_path, "own_function", OWN_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    from own_function import load

    model = load_model(load, classes=4)
    assert model.network_settings == NetworkSettings("own_function:load", classes=4)
    assert Checkpoint.of(model).network()[2].out_features == 4


SIZED = """
from torch import nn
def load({arguments}):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * {channels}, {classes}))
"""


@pytest.mark.parametrize(
    ("arguments", "channels", "classes"),
    [("in_channels, num_classes", "in_channels", "num_classes"), ("*, n_classes", 1, "n_classes")],
)
def test_a_factory_gets_sizes_that_it_requires_under_other_names(
    tmp_path, monkeypatch, arguments, channels, classes
):
    module = f"sized_{classes}"
    code = SIZED.format(arguments=arguments, channels=channels, classes=classes)
    write_plugin(tmp_path, module, code)
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model(f"{module}:load", classes=4, channels=1)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    assert Checkpoint.of(model).network()[1].out_features == 4
    assert load_model(f"{module}:load:{classes}=7", classes=4, channels=1)[1].out_features == 7


def test_a_size_with_a_default_keeps_it(tmp_path, monkeypatch):
    code = SIZED.format(arguments="num_classes=6", channels=1, classes="num_classes")
    write_plugin(tmp_path, "sized_by_default", code)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("sized_by_default:load", classes=4, channels=1)[1].out_features == 6


@pytest.mark.parametrize(
    ("module", "code", "text"),
    [
        ("faulty_a", "def load(:", 'module "faulty_a" cannot be imported: SyntaxError'),
        ("faulty_b", "import no_such_library", 'module "no_such_library" cannot be found'),
        ("faulty_c", "1 / 0", 'module "faulty_c" cannot be imported: ZeroDivisionError'),
        ("faulty_d", "def load(): return {}['key']", "cannot be built with {}: KeyError: 'key'"),
        ("faulty_e", "def load(depth, size): 0", "write faulty_e:load:depth=VALUE,size=VALUE"),
    ],
)
def test_faulty_code_of_the_user_ends_in_one_line(tmp_path, monkeypatch, module, code, text):
    write_plugin(tmp_path, module, code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=text) as caught:
        load_model(f"{module}:load")
    assert "\n" not in str(caught.value)


def test_a_function_that_cannot_be_recorded_is_refused():
    for factory in (lambda: None, nn.Module.cpu):
        with pytest.raises(ModelError, match="define it at the top level of a module"):
            load_model(factory)


def test_what_names_no_network_is_refused_in_one_line(tmp_path):
    calls = load_model, Checkpoint({"weight": torch.ones(1)}).with_network
    for spec, call in itertools.product((tmp_path, nn.Linear(1, 1), 3), calls):
        with pytest.raises(ModelError, match=r"^model: got \w+, expected a name such as"):
            call(spec)


def test_a_checkpoint_takes_a_factory_as_its_network():
    network = load_model(linear_network, classes=3, channels=1)
    checkpoint = Checkpoint(network.state_dict())
    built = checkpoint.network(linear_network, classes=3, channels=1)
    assert torch.equal(built[1].weight, network[1].weight)


OPTIONS = """
from torch import nn

def load(**options):
    network = nn.Linear(1, 1)
    network.options = options
    return network
"""


def test_switches_and_none_in_options_are_no_text(tmp_path, monkeypatch):
    write_plugin(tmp_path, "networks_with_switches", OPTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model("networks_with_switches:load:a=False,b=true,c=None,d=none,e=1,f=0.5")
    assert model.options == {"a": False, "b": True, "c": None, "d": "none", "e": 1, "f": 0.5}
    assert model.options["a"] is False
    assert type(model.options["e"]) is int


@pytest.mark.parametrize(
    ("options", "is_allowed"),
    [
        ({"qkv_bias": False}, True),
        ({"depth": 12}, True),
        ({"act": None}, False),
        ({"a": "x"}, False),
        ({"pretrained": True}, False),
    ],
)
def test_a_record_may_hold_numbers_and_switches_alone(options, is_allowed):
    assert may_be_recorded(LibrarySpec("timm:net", "net", options)) == is_allowed


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("resnet9:width=True", "width: got True, expected a number"),
        ("resnet9:mean=None", "mean: got None, expected a number"),
        ("resnet8", 'models: got "resnet8", expected one of resnet9'),
        ("no_such:net", 'module "no_such" cannot be found; is it on the Python path?'),
        ("json:no_such", 'module "json" has no "no_such"'),
        ("json:dumps", "the factory requires obj; write json:dumps:obj=VALUE"),
        ("json:dumps:indent=2", "the factory requires obj; write json:dumps:indent=2,obj=VALUE"),
        ("json:dumps:obj=2,no=3", "cannot be built with"),
        ("json:JSONDecoder", "the factory returned JSONDecoder, expected a torch.nn.Module"),
        ("resnet9:width", 'got "width", expected key=value'),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec, text):
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


LIBRARIES = {"timm": "timm", "transformers": "hf", "torchvision": "torchvision"}


def refuse_package(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(("library", "source"), LIBRARIES.items())
def test_a_missing_library_is_named_with_its_install_line(tmp_path, monkeypatch, library, source):
    monkeypatch.delitem(sys.modules, f"{library}.models", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(importlib.metadata, "version", refuse_package)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    name = tmp_path if source == "hf" else "resnet18"
    expected = (
        f"model \"{source}:{name}\": {library} is not installed; pip install 'robustsoup[{source}]'"
    )
    for act in (load_model, factory_fingerprint):
        with pytest.raises(ModelError) as caught:
            act(f"{source}:{name}")
        assert str(caught.value) == expected
    path = Checkpoint.of(linear_network(), {"network": {"spec": f"{source}:{name}"}}).save(
        tmp_path / "a.safetensors"
    )
    with pytest.raises(ModelError) as caught:
        Checkpoint.load(path).network()
    refusal = "files never choose code that runs" if source == "hf" else expected
    assert refusal in str(caught.value)


def test_a_torchvision_that_does_not_fit_pytorch_is_named(tmp_path, monkeypatch):
    write_plugin(tmp_path, "torchvision", "raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    write_plugin(tmp_path, "timm", "import torchvision")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    for spec in ("torchvision:resnet18", "timm:resnet18"):
        with pytest.raises(ModelError) as caught:
            load_model(spec)
        assert "torchvision does not work with PyTorch" in str(caught.value)
        assert "operator nms does not exist; install both from one source" in str(caught.value)


class StandInWeights:
    """Transforms of pretrained weights, as torchvision describes them."""

    meta: ClassVar = {"categories": ["tench", "goldfish"]}

    @staticmethod
    def transforms():
        interpolation = SimpleNamespace(value="bilinear")
        half = (0.5, 0.5, 0.5)
        return SimpleNamespace(crop_size=[518], mean=half, std=half, interpolation=interpolation)


@pytest.fixture
def torchvision_options(monkeypatch):
    """Replace torchvision.models; return the options that each network was built with."""
    options = {}
    library = SimpleNamespace(
        list_models=lambda module: ["googlenet", "inception_v3", "resnet18", "vit_h_14"],
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=StandInWeights),
        get_model=lambda name, **given: options.update({name: given}) or linear_network(),
    )
    monkeypatch.setattr(torchvision_networks, "import_library", lambda *_: library)
    return options


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_inception_networks_are_built_as_for_pretrained_weights(torchvision_options, name):
    load_model(f"torchvision:{name}")
    assert torchvision_options[name]["transform_input"] is True
    load_model(f"torchvision:{name}:transform_input=False")
    assert torchvision_options[name]["transform_input"] is False
    load_model("torchvision:resnet18")
    assert "transform_input" not in torchvision_options["resnet18"]


@pytest.mark.parametrize(("name", "side"), [("vit_h_14", 224), ("resnet18", 518)])
@pytest.mark.usefixtures("torchvision_options")
def test_images_get_the_size_that_a_network_of_torchvision_is_built_for(name, side):
    assert default_image_size("folder:x", f"torchvision:{name}") == side
    assert default_image_size("folder:x", f"torchvision:{name}:image_size=64") == 64


@pytest.fixture
def read_folder(tmp_path, monkeypatch):
    """Read the inputs of a folder of transformers whose network says 224 pixels a side."""

    def read(processor, options=""):
        config = SimpleNamespace(image_size=224, id2label={})
        monkeypatch.setattr(transformers_networks, "_read_config", lambda *_: config)
        if processor is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        return input_settings(NetworkSettings(f"hf:{tmp_path}{options}"))

    read.folder = tmp_path
    return read


@pytest.mark.parametrize(
    ("processor", "options", "side"),
    [
        ({"size": {"shortest_edge": 96}}, "", 96),
        ({"size": 256, "crop_size": 192, "do_center_crop": True}, "", 192),
        ({"size": {"shortest_edge": 96}}, ":image_size=224", 224),
        ({}, "", 224),
        (None, "", 224),
    ],
)
def test_images_get_the_size_of_the_image_processor(read_folder, processor, options, side):
    assert read_folder(processor, options).size == (side, side)


@pytest.mark.parametrize(
    "processor",
    [
        {"do_flip_channel_order": True},
        {"feature_extractor_type": "MobileViTFeatureExtractor"},
        {"image_processor_type": "PPLCNetImageProcessor"},
    ],
)
def test_image_processors_that_swap_red_and_blue_are_refused(read_folder, processor):
    with pytest.raises(ModelError, match="its image processor swaps red and blue; give a function"):
        read_folder(processor)


CONSTANTS = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3}


@pytest.mark.parametrize(
    ("processor", "constants"),
    [
        ({"include_top": True}, (0.5, 0.04)),
        ({"include_top": True, "do_normalize": False}, (0.0, 0.2)),
        (
            {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": False},
            None,
        ),
    ],
)
def test_constants_are_those_that_the_image_processor_uses(read_folder, processor, constants):
    normalize = read_folder(CONSTANTS | processor).normalize
    assert (normalize and tuple(part[0] for part in normalize)) == constants


def test_a_folder_without_an_image_processor_is_in_doubt_unless_constants_are_known(read_folder):
    network = NetworkSettings(f"hf:{read_folder.folder}")
    constants = ((0.5,), (0.5,))
    plain = Checkpoint({}, {"network": {"spec": "hf:absent"}})
    recorded = Checkpoint({}, {"network": network.as_record() | {"normalize": constants}})
    read_folder(None)
    (text,) = describe_missing_constants(network, [recorded, plain])
    assert "has no preprocessor_config.json, so inputs are not normalised" in text
    assert not list(describe_missing_constants(network, [recorded]))
    named = dataclasses.replace(network, normalize=constants)
    assert not list(describe_missing_constants(named, [plain]))
    read_folder({"do_normalize": False})
    assert not list(describe_missing_constants(network, [plain]))


def test_published_networks_of_robustbench_are_built_in():
    built = {name: published.model for name, published in PUBLISHED_CHECKPOINTS.items()}
    assert built == PUBLISHED_NETWORKS
    name = "Gowal2021Improving_R18_ddpm_100m"
    model = load_model(f"robustbench:{name}")
    assert model.network_settings == NetworkSettings("preact_resnet18")
    assert factory_fingerprint(f"robustbench:{name}") is None


class NormalisingNetwork(nn.Module):
    """A network of three classes that saves its constants, as those of RobustBench do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.4))
        self.register_buffer("sigma", torch.full((1, 3, 1, 1), 0.2))
        self.model = nn.Linear(3, 3)

    def forward(self, x):
        return self.model(((x - self.mu) / self.sigma).mean((2, 3)))


@pytest.fixture
def _robustbench(monkeypatch):
    """Replace the model zoo of RobustBench by one of this network under several names."""
    steps = {"Crop": "Crop288", "Resized": "BicubicRes256Crop224", "Unknown": None}
    entries = {
        name: {"model": NormalisingNetwork, "preprocessing": text} for name, text in steps.items()
    }
    names = enum.Enum("names", {name: name for name in ("cifar10", "imagenet", "Linf")})
    threats = {names.Linf: {**entries, "Plain": {"model": NormalisingNetwork}}}
    zoo = SimpleNamespace(model_dicts={names.cifar10: threats, names.imagenet: threats})
    monkeypatch.setattr(robustbench_networks, "import_library", lambda *_: zoo)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("imagenet/Linf/Crop", 288),
        ("imagenet/Linf/Resized", 224),
        ("imagenet/Linf/Unknown", 224),
        ("imagenet/Linf/Plain", 224),
        ("Plain", None),
        ("Gowal2021Improving_R18_ddpm_100m", None),
    ],
)
@pytest.mark.usefixtures("_robustbench")
def test_networks_of_imagenet_in_robustbench_get_the_size_of_their_preprocessing(name, side):
    assert default_image_size("folder:x", f"robustbench:{name}") == side


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.usefixtures("_robustbench")
def test_files_of_robustbench_may_lack_the_constants_of_their_network(prefix):
    torch.manual_seed(0)
    theirs = NormalisingNetwork()
    whole = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    weights = {name: tensor for name, tensor in whole.items() if "model" in name}
    x = torch.rand(2, 3, 4, 4)
    for state in (theirs.model.state_dict(), weights, whole):
        checkpoint = Checkpoint.load(state).with_network("robustbench:Plain", classes=3)
        assert torch.equal(checkpoint.network()(x), theirs(x))
        assert not checkpoint.with_names_of(checkpoint.network_for_names()).notes
    del whole[f"{prefix}sigma"]
    with pytest.raises(ModelError, match="sigma: the network has this tensor, the file does not"):
        Checkpoint.load(whole).with_network("robustbench:Plain", classes=3).network()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("timm", 'model "timm": got no name, expected timm:NAME'),
        ("hf:", 'model "hf:": got no name, expected hf:FOLDER or hf:ORG/NAME'),
        ("hf:absent", "there is no such folder, and a repository is named ORG/NAME"),
        ("hf:/absent/folder", "there is no such folder, and a repository is named ORG/NAME"),
        ("timm:resnet18:width=1,width=2", "got width twice"),
    ],
)
def test_a_network_of_a_library_needs_a_name(spec, text):
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["hf:org/name", "hf:.", "robustbench:Carmon2019Unlabeled"])
def test_a_record_cannot_name_a_place_or_the_code_of_a_library(spec):
    assert not is_built_in(spec)
